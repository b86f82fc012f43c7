"""Noisy top-k: the choice is drawn from a noise whose width each token learns for each expert.

    noise_std = softplus(x W_noise),   H = x W + eps * noise_std,   eps ~ N(0, 1)
    weights = softmax over the K largest of H, 0 elsewhere

In training only; in evaluation eps is 0. The noise lets an expert be tried that a token would just
not choose, and makes the load differentiable, for a balancing loss that asks for `noise_std` and
`selection_logits` (H). `router_logits` and `router_probs` are those without noise.

Causal. Source: Shazeer et al., arXiv 1701.06538, equations 3 to 5; W_noise begins at 0 as there
(appendix A), W as in every router here.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from kernels.launch import at_least_float32, no_autocast
from kernels.matmul import linear
from moe.router import LinearRouter, refuse_constant_weight, routing_of, topk_or_given
from moe.routing import RouterContext, Routing, noise_like
from moe.variants import Count, VariantConfig

EXAMPLES = (
    {"top_k": 3},
    {"top_k": 1, "normalize": False},
)


class Config(VariantConfig):
    """top_k experts a token; normalize False: weights are the softmax of H over all experts."""

    name: Literal["noisy_topk"] = "noisy_topk"
    top_k: Count = 2
    normalize: bool = True

    @model_validator(mode="after")
    def _router_learns(self):
        refuse_constant_weight(self.top_k, self.normalize)
        return self


class Router(LinearRouter):
    """(T, D) -> Routing. In float32 always."""

    replays = True
    draws_noise = True

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        super().__init__(config, hidden_size, num_experts)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def init_weights(
        self, std: float, out_std: float, seed_of: Callable[[str], torch.Generator]
    ) -> None:
        """Normal W; W_noise 0, where every expert's noise has a standard deviation of log 2."""
        nn.init.normal_(self.weight, 0, std, generator=seed_of("router.weight"))
        nn.init.zeros_(self.noise_weight)

    def noise_std(self, x: Tensor) -> Tensor:
        """(T, E) float32 standard deviation of the noise."""
        with no_autocast(x):
            return F.softplus(linear(at_least_float32(x), at_least_float32(self.noise_weight)))

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        router_logits, noise_std = self.logits(x, context), self.noise_std(x)  # (T, E)
        noisy = router_logits
        if context.training:
            noise = noise_like(noise_std, context, Tensor.normal_)
            noisy = router_logits + noise * noise_std
        chosen = topk_or_given(noisy, context, self.config.top_k, normalize=self.config.normalize)
        if context.training:
            chosen = chosen._replace(router_probs=router_logits.softmax(-1))
        return routing_of(
            router_logits, chosen, context, noise_std=noise_std, selection_logits=noisy
        )
