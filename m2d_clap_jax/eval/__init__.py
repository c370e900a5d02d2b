"""Evaluation: numpy arrays in, plain numbers out. No models, data sets or configs are known here."""
