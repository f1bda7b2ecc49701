"""Low-rank weight gradients for training language models on one GPU."""
