"""What is trained: models, data, the loop, checkpoints, metrics."""
