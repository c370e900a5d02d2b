"""What descriptions of models may say: of portable folders and of checkpoints, and which networks there can be."""
import jax.numpy as jnp

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.fields import Nullable, Optional, check, number, text, whole
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.vit import KEPT

_WIDTH, _DEPTH = whole(4, 65536), whole(1, 1000)
_NORM_STATS = (number(-1e4, 1e4), number(1e-3, 1e4))
_SAMPLE_RATE = whole(1000, 1_000_000)
_MOST_PATCHES = 65536  # 40 minutes in patches of 16 x 16
# Fields of M2DCLAP; `options.bind` tells which it does not have.
MODEL = {name: Optional(schema) for name, schema in {
    'input_size': (whole(1, 65536), whole(1, 1_000_000)), 'patch_size': (whole(1, 4096), whole(1, 4096)),
    'width': _WIDTH, 'depth': _DEPTH, 'heads': whole(1, 65536),
    'predictor_width': _WIDTH, 'predictor_depth': _DEPTH, 'predictor_heads': whole(1, 65536),
    'mask_ratio': number(0, 1), 'text_width': Nullable(whole(1, 65536)), 'audio_projector': text(('mlp', 'semantic')),
    'semantic_depth': _DEPTH, 'semantic_mlp_ratio': number(0.01, 100),
    'text_projector': Nullable(text(('identity', 'linear', 'mlp'))), 'predict': text(('features', 'pixels')),
    'norm_stats': _NORM_STATS}.items()}
_HOW = {'dtype': text(('float32', 'bfloat16')), 'remat': text(tuple(KEPT))}
_ENCODER = {'name': text(), 'hash': Nullable(text()), 'width': Nullable(whole(1, 65536))}
# config.json of a portable folder.
CONFIG = {'model': MODEL, 'sample_rate': _SAMPLE_RATE,
          'text_encoder': Nullable(_ENCODER | {'pooling': text(('mean', 'cls', 'eos'))}), 'text_prefix': text(),
          'classes': Nullable([text()]), 'labels': Optional([text()]), 'step': whole(), 'padded_to': Optional(whole(0, 1_000_000)),
          'tensors_checksum': Optional(text())}
# The JSON data of a checkpoint of pre-training or a later stage, whose model is not all in its settings.
RUN = {'settings': {'model': MODEL | {'norm_stats': Optional(Nullable(_NORM_STATS))}}, 'norm_stats': _NORM_STATS,
       'model': Optional(MODEL), 'text_encoder': Nullable(_ENCODER), 'logmel': {'sample_rate': _SAMPLE_RATE},
       'data': Optional({'labels': Optional([text()])})}


def check_network(network: M2DCLAP, where: str):
  """Raises UserError for fields that no network can have, or none that fits a machine.

  where: what stands before a field in the message, e.g. 'config.model.'.
  """
  values = {name: getattr(network, name) for name in MODEL | _HOW}
  values['dtype'] = values['dtype'] if isinstance(values['dtype'], str) else jnp.dtype(values['dtype']).name
  check(values, MODEL | _HOW, where, 'change it')
  for part in ('', 'predictor_'):
    width, heads = values[f'{part}width'], values[f'{part}heads']
    if width % heads or width % 4:
      raise UserError(f'{where}{part}width={width}: is no multiple of {part}heads, {heads}, and of 4')
  for size, patch, name in zip(network.input_size, network.patch_size, ('mel bins', 'frames')):
    if size < patch:
      raise UserError(f'{where}input_size={network.input_size}: {size} {name} are less than one patch of {patch}')
  if network.num_patches > _MOST_PATCHES:
    raise UserError(f'{where}input_size={network.input_size}: {network.num_patches} patches are more than {_MOST_PATCHES}')
  if network.text_projector == 'identity' and network.text_width not in (None, network.width):
    raise UserError(f'{where}text_projector=identity: needs text_width={network.width}, the width of the encoder, where '
                    f'it is {network.text_width}')
