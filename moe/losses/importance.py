"""Importance loss: experts should get equal sums of the router's weights.

    I_i = sum over tokens of w(t, i),   L = CV(I)^2 = var(I) / mean(I)^2

with the population's variance: 0 where all sums are equal, E - 1 where one expert has everything.
w(t, i) is the weight with which token t takes expert i, 0 where it does not; or the probability of
every expert, chosen or not. Per layer, over the valid tokens of this forward pass; the model
averages over layers. A pass that is a part of a step has its own sums: as CV^2 is not linear in
the tokens, another split of the batch is another loss.

Source: Shazeer et al., arXiv 1701.06538, section 4, equations 6 and 7 (there sums of gate values).
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from moe.losses import LossContext
from moe.routing import Routing
from moe.variants import Real, VariantConfig

EXAMPLES = ({"of": "router_probs"},)


class Config(VariantConfig):
    """weight of the term; of: what is summed, the combine weights of the chosen experts (as in the
    paper) or the probabilities of all."""

    name: Literal["importance"] = "importance"
    weight: Annotated[Real, Field(ge=0)] = 0.1
    of: Literal["topk_weights", "router_probs"] = "topk_weights"


def loss(config: Config, routing: Routing, context: LossContext) -> Tensor:
    """One layer's loss, () float32."""
    if config.of == "router_probs":
        values = routing.router_probs  # (T, E)
    else:
        # Not index_add over all tokens, which on a GPU sums by atomics, in another order each time.
        num_tokens, num_experts = routing.router_probs.shape
        weights, indices = routing.chosen_weights, routing.chosen_indices
        values = weights.new_zeros(num_tokens, num_experts + 1)
        # Column 0 is where no expert is assigned.
        values = values.scatter(1, indices + 1, weights)[:, 1:]  # (T, E)
    if context.router.valid is not None:
        values = values * context.router.valid.unsqueeze(-1)
    importance = values.sum(0)  # (E,)
    return importance.var(correction=0) / importance.mean().square().clamp(min=1e-20)
