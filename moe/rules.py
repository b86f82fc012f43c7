"""Which rules does the routing of a model break? What a reader of its config should know."""

import torch

from moe.capacity import BROKEN_RULES
from moe.config import ModelConfig
from moe.router import RULES
from moe.variants import load_variant


def broken_rules(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """By setting, the `moe.router.RULES` that it breaks; settings that break none are left out."""
    found = {}
    for layer in config.moe_layers:
        moe = config.at(layer).moe
        with torch.device("meta"):
            router = load_variant("routers", moe.router.name).Router(moe.router, 1, moe.num_choices)
        broken = tuple(rule for rule in RULES if not getattr(router, rule))
        if broken:
            found[f"{config.setting('router', layer)}.name {moe.router.name}"] = broken
    if config.moe_layers and config.moe.drops:
        priority = config.moe.drop_priority
        found[f"model.moe.drop_priority {priority}"] = BROKEN_RULES[priority]
    return found
