"""An audio encoder for X-ARES, the eXtensive Audio Representation and Evaluation Suite. Needs torch.

X-ARES opens a file with one class whose name ends in Encoder, and keeps embeddings and scores under that name, so each
model needs a name of its own:

  from m2d_clap_jax import xares

  class ClipsEncoder(xares.Model):
    path = 'runs/clips'

  python -m xares.run --max-jobs 0 clips_encoder.py src/tasks/*.py

Source: https://github.com/jimbozhang/xares, version 0.1.3. Alphabet: B clips, S samples, T time columns (patches), D width.
"""
import torch

from m2d_clap_jax import api


class Model(torch.nn.Module):
  """Audio [B, S] or [S] at `sampling_rate`, a torch tensor -> frame features [B, T, 5 * D], as of `Pipeline.encode_frames`.

  Audio of any length is cut into windows of the model's crop, a bounded number of which is computed at a time; a last
  column that is not full is padded with silence. JAX chooses the device of the computation, and the result is
  on that of the audio.

  Attributes: path (what `m2d_clap_jax.load` opens), sampling_rate (Hz), output_dim (5 * D), hop_size_in_ms (160 for
  patches of 16 frames), pipeline.
  """
  path: str

  def __init__(self):
    super().__init__()
    self.pipeline = api.load(self.path)
    network, logmel = self.pipeline.network, self.pipeline.logmel
    self.sampling_rate = self.pipeline.sample_rate
    self.output_dim = network.grid[0] * network.width
    self.hop_size_in_ms = 1000 * logmel.hop * network.patch_size[1] / logmel.sample_rate

  def forward(self, audio: torch.Tensor) -> torch.Tensor:
    waves = audio.detach().cpu().numpy()
    frames, _ = self.pipeline.encode_frames(waves[None] if waves.ndim == 1 else waves)
    return torch.from_numpy(frames).to(audio.device)
