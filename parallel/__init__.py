"""How a model is spread over ranks. Knows nothing of training."""
