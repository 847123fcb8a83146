"""Training on transformers' Trainer, and everything that a run needs."""
