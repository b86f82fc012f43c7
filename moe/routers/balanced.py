"""Forced balance: tokens take experts by turns, so that all have the same load; for benchmarks.

    topk_indices[t, k] = (n_t K + k) mod E,   n_t the number of valid tokens before t in the batch
    weights: 1/K each, or with `weights: learned` their scores (softmax(W x), say), divided by their
    sum if `normalize`

Loads differ by at most one assignment: the best case of every kernel and of expert parallelism, to
tell what imbalance costs. With learned weights a real model trains, router and all.

Causal: the place in the batch decides, not the token. Source: forced load balancing, as in
NVIDIA's Megatron-LM (`moe-router-force-load-balancing`, there at random).
"""

from typing import Literal

import torch
from torch import Tensor

from moe.router import AssignedConfig, AssignedRouter
from moe.routing import RouterContext

EXAMPLES = (
    {"weights": "learned", "top_k": 4, "score": "sigmoid"},
    {"weights": "learned", "top_k": 1, "normalize": False},
)


class Config(AssignedConfig):
    """top_k experts a token; their weights, normalised or not."""

    name: Literal["balanced"] = "balanced"


class Router(AssignedRouter):
    """(T, D) -> Routing, by turns. Learned weights in float32 always."""

    # Turns begin anew in each part.
    divisible = False
    permutes_tokens = False

    def assign(self, x: Tensor, context: RouterContext) -> Tensor:
        turns = torch.arange(len(x), device=x.device)
        if context.valid is not None:
            turns = (context.valid.cumsum(0) - 1).clamp(min=0)
        choices = torch.arange(self.config.top_k, device=x.device)
        return (turns.unsqueeze(-1) * self.config.top_k + choices) % self.num_experts  # (T, K)
