"""Kernels of a sparse MoE transformer; import the submodules (this file imports nothing, so it cannot fail)."""
