"""What is claimed about speed, runnable: python -m benchmarks.train_step | encode | prepare | loader (--help: options).

Each prints its figures beside a ceiling measured in the same run, in turns, because machines are shared and drift.
"""
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # TensorFlow's notices would bury the tables
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # else it announces its rounding, which matters to no file
