"""Data on disk: preparing it (manifest and audio in, TFRecord shards out), reading it back, and the training loader.

Nothing is imported here on purpose: worker processes import `data.worker` and must not pull in TensorFlow or jax.
"""
