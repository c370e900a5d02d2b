"""The authors' PyTorch checkpoints: their names, files and folder names, read and written."""
