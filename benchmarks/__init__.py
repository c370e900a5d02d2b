"""Benchmarks behind the claims about speed: python -m benchmarks.train_step | encode | prepare | loader (see --help).

Each prints its figures beside a ceiling measured in alternation in the same run, because machines are shared and drift.
"""
import os

from m2d_clap_jax.startup import keep_memory

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # hides TensorFlow's notices
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # hides its notice about rounding, which affects no file
keep_memory()  # as a run does; PyTorch's steps in the same process gain from it, too
