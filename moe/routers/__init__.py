"""Routers: one file each, chosen by `model.moe.router.name`."""
