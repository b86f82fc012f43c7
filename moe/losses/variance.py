"""Variance loss: an expert's score should differ between tokens.

    L = -(1/E) sum_i var over tokens of router_probs[:, i]

with the population's variance: 0 for a router that says the same of every token, which is its
largest value; a positive weight makes scores of different tokens more different. Per layer, over
the valid tokens of this forward pass (a part of a step has its own means); the model averages over
layers. Balance is for another loss to keep.

Source: Guo et al., arXiv 2505.22323 (variance loss, beside `orthogonality`).
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from moe.losses import LossContext
from moe.routing import Routing
from moe.variants import Real, VariantConfig


class Config(VariantConfig):
    """weight of the term."""

    name: Literal["variance"] = "variance"
    weight: Annotated[Real, Field(ge=0)] = 1e-3


def loss(config: Config, routing: Routing, context: LossContext) -> Tensor:
    """One layer's loss, () float32."""
    probs, valid = routing.router_probs, context.router.valid
    num_tokens = routing.num_tokens.clamp(min=1)
    if valid is not None:
        probs = probs * valid.unsqueeze(-1)
    # Two passes: the mean of squares minus the square of the mean would cancel in float32.
    deviations = probs - probs.sum(0) / num_tokens  # (T, E)
    if valid is not None:
        deviations = deviations * valid.unsqueeze(-1)
    return -(deviations.square().sum(0) / num_tokens).mean()
