"""Kernels of a sparse MoE transformer. Imports nothing, so it cannot fail: import the files."""
