"""What is claimed about speed, runnable: python -m benchmarks.train_step | prepare | loader  (--help shows the options).

Each prints its figures beside a ceiling measured in the same run, in turns, because machines are shared and drift.
"""
