"""What a pre-training update needs on a TPU, as the TPU's compiler says on a machine that has none."""
