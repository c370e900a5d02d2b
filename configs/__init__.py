"""What to train and evaluate, and how: each file is a `--config` of `python -m m2d_clap_jax.train`."""
