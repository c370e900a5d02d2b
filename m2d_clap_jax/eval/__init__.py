"""Evaluation: metrics, protocols and figures of numpy arrays, and what runs them on a model in training or a finished one."""
