"""The same update, and the encoder alone, in PyTorch with timm's blocks for comparison: same sizes, PyTorch's best settings.

Only the cost is meant to be the same, not the numbers: weights are initialised by torch, positions are random.
"""
import functools
import time

import jax
import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.m2d_clap import LOGIT_SCALE_INIT, LOGIT_SCALE_MAX
from m2d_clap_jax.models.masking import num_visible


def transformer(width, depth, heads):
  """timm's blocks (with scaled_dot_product_attention) and a final norm, as in the authors' implementation."""
  norm = functools.partial(nn.LayerNorm, eps=1e-6)
  return nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)), norm(width))


def take(x, index):
  return torch.gather(x, 1, index[:, :, None].expand(-1, -1, x.shape[2]))


class Network(nn.Module):
  """The online network; `forward` takes the target encoder and returns the loss."""

  def __init__(self, m: M2DCLAP):
    super().__init__()
    self.m = m
    pixels = m.patch_size[0] * m.patch_size[1]
    self.patch_embed = nn.Linear(pixels, m.width)
    self.cls = nn.Parameter(0.02 * torch.randn(1, 1, m.width))
    self.encoder = transformer(m.width, m.depth, m.heads)
    self.embed = nn.Linear(m.width, m.predictor_width)
    self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, m.predictor_width))
    self.predictor = transformer(m.predictor_width, m.predictor_depth, m.predictor_heads)
    self.pred = nn.Linear(m.predictor_width, pixels if m.predict == 'pixels' else m.width)
    self.register_buffer('positions', torch.rand(1, 1 + m.num_patches, m.width))
    self.register_buffer('predictor_positions', torch.rand(1, 1 + m.num_patches, m.predictor_width))
    if m.text_width is not None:
      self.audio_proj = nn.Sequential(nn.Linear(m.width, m.width), nn.ReLU(), nn.Linear(m.width, m.width))
      self.text_proj = nn.Identity() if m.text_width == m.width else nn.Linear(m.text_width, m.width)
      self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))

  def forward(self, logmel, text, target):
    m = self.m
    b, (rows, columns), (height, length) = len(logmel), m.grid, m.patch_size
    logmel = (logmel.float() - m.norm_stats[0]) / m.norm_stats[1]
    patches = logmel.view(b, rows, height, columns, length).permute(0, 1, 3, 2, 4).reshape(b, m.num_patches, -1)
    order = torch.rand(b, m.num_patches, device=logmel.device).argsort(1)
    visible, masked = order.tensor_split([num_visible(m.num_patches, m.mask_ratio)], 1)
    tokens = self.patch_embed(patches) + self.positions[:, 1:]
    cls = (self.cls + self.positions[:, :1]).expand(b, -1, -1).to(tokens.dtype)
    z = self.encoder(torch.cat([cls, take(tokens, visible)], 1))
    x = self.embed(z)
    hidden = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(b, masked.shape[1], -1)], 1)
    x = torch.cat([x[:, :1], take(hidden, order.argsort(1))], 1) + self.predictor_positions
    prediction = self.pred(take(self.predictor(x)[:, 1:], masked)).float()
    if target is None:
      loss = F.mse_loss(prediction, standardize(take(patches, masked)))
    else:
      with torch.no_grad():
        wanted = standardize(target(torch.cat([cls, take(tokens, masked)], 1))[:, 1:].float())
      loss = (2 - 2 * F.cosine_similarity(prediction, wanted, dim=-1)).mean()
    if text is not None:
      audio = F.normalize(self.audio_proj(z[:, 1:].float().mean(1)).float(), dim=-1)
      text = F.normalize(self.text_proj(text.float()).float(), dim=-1)
      logits = self.logit_scale.exp() * audio @ text.T
      matching = torch.arange(b, device=logits.device)
      loss = loss + 0.01 * 0.5 * (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching))
    return loss


def standardize(x):
  return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6)


def product(left, right, count: int):
  """A function that computes `count` products of two matrices, where the arrays are: on the CPU or a GPU."""
  device = 'cuda' if left.device.platform == 'gpu' else 'cpu'
  left, right = (torch.from_numpy(np.array(x, np.float32)).to(device, getattr(torch, str(x.dtype))) for x in (left, right))

  def compute():
    results = [left @ right for _ in range(count)]
    return results[-1][0, 0].item()  # waits
  return compute


class TorchStep:
  """Update with AdamW (fused or foreach, whichever is faster here), clipping and EMA; calling it does `burst`.

  Args:
    batch: arrays; they are moved to a GPU if there is one.
    compiled: whether the loss goes through torch.compile.
  """

  def __init__(self, model: M2DCLAP, batch: dict, burst: int, compiled: bool):
    on_gpu = next(iter(batch.values())).device.platform == 'gpu'
    if on_gpu and not torch.cuda.is_available():
      raise UserError('--torch: jax has a GPU and torch has none: install torch with CUDA, or set JAX_PLATFORMS=cpu')
    self.device, self.burst, self.dtype = torch.device('cuda' if on_gpu else 'cpu'), burst, model.dtype
    if on_gpu:
      torch.set_float32_matmul_precision('high')  # TF32, which is jax's default there
    self.batch = {key: torch.from_numpy(np.array(x)).to(self.device) for key, x in batch.items()}
    self.network = Network(model).to(self.device)
    self.target = transformer(model.width, model.depth, model.heads).to(self.device)
    self.has_target = model.predict == 'features'
    self.loss_of = torch.compile(self.network) if compiled else self.network
    decayed = [p for p in self.network.parameters() if p.ndim > 1]
    others = [p for p in self.network.parameters() if p.ndim <= 1]
    groups = [{'params': decayed, 'weight_decay': 0.05}, {'params': others, 'weight_decay': 0.0}]
    seconds = {}
    for kind in ('foreach', 'fused'):
      self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), **{kind: True})
      self.updates(2)  # the first one compiles and allocates
      start = time.perf_counter()
      self.updates(2)
      seconds[kind] = time.perf_counter() - start
    kind = min(seconds, key=seconds.get)
    self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), **{kind: True})

  def __call__(self):
    self.updates(self.burst)

  def updates(self, count: int):
    for _ in range(count):
      with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == 'bfloat16'):
        loss = self.loss_of(self.batch['logmel'], self.batch.get('text'), self.target if self.has_target else None)
      self.optimizer.zero_grad()
      loss.backward()
      nn.utils.clip_grad_norm_(self.network.parameters(), 3.0, foreach=True)
      self.optimizer.step()
      with torch.no_grad():
        if self.has_target:
          torch._foreach_lerp_(list(self.target.parameters()), list(self.network.encoder.parameters()), 1 - 0.99995)
        if hasattr(self.network, 'logit_scale'):
          self.network.logit_scale.clamp_(0, LOGIT_SCALE_MAX)
    self.loss = loss.item()  # waits for the last update


class TorchEncoder:
  """Patch embedding and blocks for inference on random patches; calling it encodes `batch` clips.

  Args:
    tokens: of each piece that a clip is cut into, [CLS] included; pieces of one length make a batch.
  """

  def __init__(self, model: M2DCLAP, batch: int, tokens: list[int]):
    self.device = torch.device('cuda' if jax.default_backend() == 'gpu' else 'cpu')
    self.dtype = model.dtype
    pixels = model.patch_size[0] * model.patch_size[1]
    self.network = nn.Sequential(nn.Linear(pixels, model.width), transformer(model.width, model.depth, model.heads))
    self.network.to(self.device).eval()
    sizes = {count: batch * tokens.count(count) for count in tokens}
    self.pieces = [torch.randn(rows, count, pixels, device=self.device) for count, rows in sizes.items()]

  @torch.inference_mode()
  def __call__(self):
    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == 'bfloat16'):
      results = [self.network(piece).mean(1) for piece in self.pieces]
    for result in results:
      result.cpu()  # waits
