"""Experts: one file each, chosen by `model.moe.experts.name`."""
