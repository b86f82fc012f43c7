"""Load loss: experts should be as likely as each other to be chosen, as the noise would have it.

    P(t, i) = Phi((clean(t, i) - threshold(t, i)) / std(t, i))
    Load_i = sum over tokens of P(t, i),   L = CV(Load)^2 = var(Load) / mean(Load)^2

P is the probability that expert i is among the K chosen if its noise alone is drawn again; Phi is
the normal distribution, clean are the logits without noise, std the noise's standard deviation, and
threshold is the K-th largest of the other experts' noisy logits. Unlike counts, this has a
gradient. Population's variance. Per layer, over the valid tokens of this forward pass, as
`importance`, beside which the paper has it; the model averages over layers.

Source: Shazeer et al., arXiv 1701.06538, appendix A, equations 8 to 11.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe.losses import LossContext
from moe.routing import Routing
from moe.variants import Real, VariantConfig


class Config(VariantConfig):
    """weight of the term."""

    name: Literal["load"] = "load"
    weight: Annotated[Real, Field(ge=0)] = 0.1

    @property
    def needs_noise(self) -> bool:
        return True


def loss(config: Config, routing: Routing, context: LossContext) -> Tensor:
    """One layer's loss, () float32.

    Raises:
        ValueError: if the router draws no noise on its logits.
    """
    noisy, std = routing.selection_logits, routing.noise_std
    if noisy is None or std is None:
        raise ValueError("the load loss needs the Routing of a router that draws noise")
    num_experts, top_k = noisy.shape[1], routing.topk_indices.shape[1]
    if top_k >= num_experts:
        # Every token takes every expert, whatever the noise.
        return routing.router_logits.sum() * 0
    largest = noisy.topk(top_k + 1).values  # (T, K+1)
    last_in, first_out = largest[:, -2:].split(1, dim=1)  # (T, 1) each
    # The K-th largest of the others: for an expert among the K, the one that would follow.
    threshold = torch.where(noisy > first_out, first_out, last_in)  # (T, E)
    chance = torch.special.ndtr((routing.router_logits - threshold) / std)
    if context.router.valid is not None:
        chance = chance * context.router.valid.unsqueeze(-1)
    load = chance.sum(0)  # (E,)
    return load.var(correction=0) / load.mean().square().clamp(min=1e-20)
