"""Entropy loss: routers that decide, or that use all experts, or both.

With p_t the router's distribution over experts at token t, P its mean over tokens, and the entropy
H(p) = -sum_i p_i log p_i in nats, a positive weight makes smaller

    sharpen   L = mean over tokens of H(p_t)        each token's router decides; 0 is a sure choice
    spread    L = log E - H(P)                      all experts together are used; 0 is uniform
    both      L = log E - H(P) + mean of H(p_t)     log E minus the mutual information of tokens and
                                                    experts; 0 is a sure choice and equal use

`sharpen` alone is content with one expert for all tokens. Scores that do not sum to 1 (sigmoid) are
shared out first. Per layer, over the valid tokens of this forward pass (P of a part of a step is
its own); the model averages over layers.

Source: Shen et al., ModuleFormer, arXiv 2306.04640 (mutual information, its two terms).
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from moe.losses import LossContext
from moe.routing import Routing
from moe.variants import Real, VariantConfig

EXAMPLES = ({"aim": "spread"}, {"aim": "both"})


class Config(VariantConfig):
    """weight of the term; what it aims at."""

    name: Literal["entropy"] = "entropy"
    weight: Annotated[Real, Field(ge=0)] = 0.01
    aim: Literal["sharpen", "spread", "both"] = "sharpen"


def loss(config: Config, routing: Routing, context: LossContext) -> Tensor:
    """One layer's loss, () float32."""
    probs = routing.router_probs
    num_experts = probs.shape[-1]
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1e-20)
    if context.router.valid is not None:
        probs = probs * context.router.valid.unsqueeze(-1)
    num_tokens = routing.num_tokens.clamp(min=1)
    value = probs.new_zeros(())
    if config.aim in ("spread", "both"):
        mean_probs = probs.sum(0) / num_tokens  # (E,)
        # Not log E - H: this is 0, too, where there is no token at all.
        value = value - _entropy(mean_probs) + math.log(num_experts) * mean_probs.sum()
    if config.aim in ("sharpen", "both"):
        value = value + _entropy(probs).sum() / num_tokens
    return value


def _entropy(probs: Tensor) -> Tensor:
    """Of the last dimension; the gradient stays finite at a probability of 0."""
    return -(probs * probs.clamp(min=1e-20).log()).sum(-1)
