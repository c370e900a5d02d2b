"""M2D-CLAP in JAX: one audio encoder for transfer learning and for zero-shot classification by text."""
