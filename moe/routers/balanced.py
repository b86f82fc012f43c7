"""Forced balance: tokens take experts by turns, so that all have the same load; for benchmarks.

    topk_indices[t, k] = (n_t K + k) mod E,   n_t the number of valid tokens before t in the batch
    weights: 1/K each, or with `weights: learned` softmax(W x) at these experts, divided by their
    sum if `normalize`

Loads differ by at most one assignment: the best case of every kernel and of expert parallelism, to
tell what imbalance costs. With learned weights a real model trains, router and all.

Causal: the place in the batch decides, not the token. Source: forced load balancing, as in
NVIDIA's Megatron-LM (`moe-router-force-load-balancing`, there at random).
"""

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kernels.routing import weights_of
from moe.router import LinearRouter, RouterModule
from moe.routing import RouterContext, Routing, make_routing, uniform_routing
from moe.variants import Count, VariantConfig

EXAMPLES = (
    {"weights": "learned", "top_k": 4},
    {"weights": "learned", "top_k": 1, "normalize": False},
)


class Config(VariantConfig):
    """top_k experts a token; their weights, normalised or not."""

    name: Literal["balanced"] = "balanced"
    top_k: Count = 2
    weights: Literal["uniform", "learned"] = "uniform"
    normalize: bool = True

    @model_validator(mode="after")
    def _router_gets_a_gradient(self):
        if self.weights == "learned" and self.top_k == 1 and self.normalize:
            raise ValueError(
                "normalize (True) with top_k (1) makes every weight 1, so the router would get no "
                "gradient; set normalize: false or top_k of at least 2"
            )
        return self


class Router(LinearRouter):
    """(T, D) -> Routing, by turns. Learned weights in float32 always."""

    permutes_tokens = False
    permutes_experts = False
    replays = True

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        if config.weights == "learned":
            super().__init__(hidden_size, num_experts)
        else:
            # Without the weight.
            RouterModule.__init__(self)
        self.learned = config.weights == "learned"
        self.config, self.num_experts = config, num_experts

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        config, valid = self.config, context.valid
        indices = context.topk_indices
        if indices is None:
            turns = torch.arange(len(x), device=x.device)
            if valid is not None:
                turns = (valid.cumsum(0) - 1).clamp(min=0)
            choices = torch.arange(config.top_k, device=x.device)
            indices = (turns.unsqueeze(-1) * config.top_k + choices) % self.num_experts  # (T, K)
        if not self.learned:
            weight = 1 / config.top_k if config.normalize else 1.0
            return uniform_routing(x, indices, self.num_experts, weight, valid)
        router_logits = self.logits(x, context)  # (T, E)
        chosen = weights_of(router_logits, indices, normalize=config.normalize)
        return make_routing(
            router_logits,
            chosen.router_probs,
            chosen.topk_weights,
            indices,
            valid,
            logits_finite=chosen.logits_finite,
        )
