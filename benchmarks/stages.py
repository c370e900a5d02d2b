"""Memory and arithmetic of an update of stage 1 and of stage 2 at the same batch, from the compiled programs; nothing runs.

  python -m benchmarks.stages [--batch=8] [--frames=1001]
"""
import argparse
import functools

import jax
import jax.numpy as jnp
from transformers import BertConfig, FlaxBertModel

from benchmarks import compiled
from m2d_clap_jax.models import M2DCLAP, SIZES
from m2d_clap_jax.train import clap_step, step
from m2d_clap_jax.train.augment import patchout_counts
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine

TOKENS = 32  # of a caption
MASK_RATIO = 0.3


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--frames', type=int, default=1001)
  args = parser.parse_args(argv)
  model = M2DCLAP(**SIZES['base'], input_size=(80, args.frames), audio_projector='semantic')
  tx = make_optimizer(warmup_cosine(1e-3, 1, 10))
  logmel = jax.ShapeDtypeStruct((args.batch, *model.input_size), jnp.float16)
  ids = jax.ShapeDtypeStruct((args.batch, TOKENS), jnp.int32)
  bert = FlaxBertModel(BertConfig(), _do_init=False, add_pooling_layer=False)

  def tower(params, ids, mask, keys):
    def one(ids, mask, key):
      return bert.module.apply({'params': params}, ids[None], mask[None], deterministic=False, rngs={'dropout': key})[0][0, 0]
    return jax.vmap(one)(ids, mask, keys)
  state = jax.eval_shape(functools.partial(step.create_state, 0, model=model, tx=tx))
  update = functools.partial(step.pretrain_step, model=model, tx=tx, ema_schedule=linear_ramp(0.99, 0.999, 10))
  text = jax.ShapeDtypeStruct((args.batch, 768), jnp.float32)
  show('stage 1', update, state, {'logmel': logmel, 'text': text})
  state = jax.eval_shape(functools.partial(clap_step.create_state, 0, model=model, text_shapes=bert.params_shape_tree, tx=tx))
  update = functools.partial(clap_step.clap_step, model=model, tower=tower, tx=tx,
                             drop=patchout_counts(model.grid, MASK_RATIO, 0.5))
  show('stage 2', update, state, {'logmel': logmel, 'ids': ids, 'mask': ids})


def show(name: str, update, state, batch):
  cost = compiled.cost(jax.jit(update, donate_argnums=0).lower(state, batch).compile())
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  print(f'{name}: state {size / 2 ** 20:.0f} MiB, temporary {cost.temporary:.0f} MiB, '
        f'{cost.flops / 1e3:.2f} TFLOP', flush=True)


if __name__ == '__main__':
  main()
