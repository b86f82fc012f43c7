"""Router z-loss: keeps the router's logits small, where float32 softmax is exact.

    L = (1/T) sum_t logsumexp(router_logits[t])^2

Per layer, over valid tokens; the model averages over layers.

Source: ST-MoE, arXiv 2202.08906, equation 5.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from moe.losses import LossContext
from moe.routing import Routing
from moe.variants import Real, VariantConfig


class Config(VariantConfig):
    """weight of the term."""

    name: Literal["router_z_loss"] = "router_z_loss"
    weight: Annotated[Real, Field(ge=0)] = 1e-3


def loss(config: Config, routing: Routing, context: LossContext) -> Tensor:
    """One layer's loss, () float32."""
    squares = routing.router_logits.logsumexp(-1).square()  # (T,)
    if context.router.valid is not None:
        squares = squares * context.router.valid
    return squares.sum() / routing.num_tokens.clamp(min=1)
