"""Training: configuration, set-up, loop, checkpoints."""
