"""Balancing losses: one file each, switched on by a line in `model.moe.losses`."""

from typing import NamedTuple

from torch import Tensor

from moe.routing import RouterContext


class LossContext(NamedTuple):
    """What a balancing loss knows beside one layer's Routing.

    router: the tokens' context. batch_tokens_per_expert: (E,) this layer's counts over the whole
    optimizer step (all ranks and accumulation steps), or None where this forward pass is all of it.
    """

    router: RouterContext
    batch_tokens_per_expert: Tensor | None = None
