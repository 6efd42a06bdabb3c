"""Sparse parameter-efficient fine-tuning: choose, train, save, apply and merge a few weights of a PyTorch model."""
