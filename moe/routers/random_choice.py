"""Random routing: every token has K different experts, all sets equally likely; for debugging.

    topk_indices[t] = the K largest of E uniform numbers,   topk_weights = 1/K

It is the baseline that says what routing is worth, and a load that is balanced but for noise. In
training the numbers are the run's noise, in evaluation those of a stream of `seed` and layer that
begins anew at each call: the place in the batch then decides, not the token.

Causal. Source: the random baseline of Roller et al., Hash Layers, arXiv 2106.04426, section 4.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels.routing import lowest_index_topk
from moe.router import RouterModule
from moe.routing import RouterContext, Routing, noise_like, uniform_routing
from moe.variants import Count, Natural, VariantConfig

EXAMPLES = ({"top_k": 3, "seed": 5},)


class Config(VariantConfig):
    """top_k experts a token; seed of the choice in evaluation."""

    name: Literal["random_choice"] = "random_choice"
    top_k: Count = 2
    seed: Natural = 0


class Router(RouterModule):
    """(T, D) -> Routing, whatever the tokens are."""

    permutes_tokens = False
    permutes_experts = False
    learned = False
    replays = True

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        config = self.config
        indices = context.topk_indices
        if indices is None:
            if not context.training:
                # The global stream is training's: evaluation takes no number from it.
                generator = torch.Generator(x.device)
                generator.manual_seed((config.seed << 16) + context.layer)
                context = context._replace(generator=generator, noise_seeds=None)
            numbers = x.new_empty(len(x), self.num_experts, dtype=torch.float32)
            numbers = noise_like(numbers, context, Tensor.uniform_)  # (T, E)
            indices = lowest_index_topk(numbers, config.top_k)  # (T, K)
        return uniform_routing(x, indices, self.num_experts, 1 / config.top_k, context.valid)
