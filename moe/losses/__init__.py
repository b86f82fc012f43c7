"""Balancing losses: one file each, chosen by `name` in `model.moe.losses`."""
