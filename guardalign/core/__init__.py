"""The mathematics: pure tensors and numbers. Knows nothing of models, files, configuration or Ray."""
