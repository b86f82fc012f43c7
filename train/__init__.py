"""Runs: configuration, data, engines, the training loop, checkpoints and metrics."""
