"""What models are evaluated on: the tasks of the paper and their metadata, and the clips, cut and decoded."""
