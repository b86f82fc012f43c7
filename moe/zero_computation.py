"""Experts that cost nothing: a router may send a token to them in place of a network.

    zero       y = 0
    copy       y = x
    constant   y = a_1 x + a_2 v,   a = softmax(W_c x),   v (D,) and W_c (2, D) its own

They stand behind the E networks in the router's choice: experts E, E + 1, ... are the zero ones,
then copies, then constants. Where all are chosen equally often, which balancing is there for, a
token has K E / (E + Z) networks on average: easy tokens fewer, hard ones more. No rank holds them
alone and no row of theirs travels; a capacity does not bound them.

Sources: Jin et al., MoE++, arXiv 2410.07348, section 3.1 (without its gating residuals, and with
the same balance for all experts); zero experts and their share: LongCat-Flash, arXiv 2509.01322.
"""

import torch
from torch import Tensor, nn

from kernels.launch import at_least_float32, no_autocast
from kernels.matmul import linear
from moe.routing import Routing

# In the order in which they stand behind the networks.
ZERO_COMPUTATION_KINDS = ("zero", "copy", "constant")


class ZeroComputationExperts(nn.Module):
    """What the experts that cost nothing add to a layer's output: (T, D) -> (T, D).

    Attributes:
        vectors: (C, D) v of each constant expert. weight: (2 C, D) W_c of each.
    """

    def __init__(self, hidden_size: int, num_networks: int, zero: int, copy: int, constant: int):
        super().__init__()
        self.first_copy = num_networks + zero
        self.first_constant = self.first_copy + copy
        self.num_constants = constant
        if constant:
            self.vectors = nn.Parameter(torch.empty(constant, hidden_size))
            self.weight = nn.Parameter(torch.empty(2 * constant, hidden_size))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        indices, weights = routing.topk_indices, routing.topk_weights  # (T, K)
        with no_autocast(x):
            wide = at_least_float32(x)
            copied = (indices >= self.first_copy) & (indices < self.first_constant)
            scale = weights.masked_fill(~copied, 0).sum(-1, keepdim=True)  # (T, 1) of x itself
            if not self.num_constants:
                return (scale * wide).to(x.dtype)
            constants = torch.arange(self.num_constants, device=x.device) + self.first_constant
            chosen = indices.unsqueeze(-1) == constants  # (T, K, C)
            each = (weights.unsqueeze(-1) * chosen).sum(1)  # (T, C)
            mix = linear(wide, at_least_float32(self.weight))
            mix = mix.unflatten(-1, (-1, 2)).softmax(-1) * each.unsqueeze(-1)  # (T, C, 2)
            scale = scale + mix[..., 0].sum(-1, keepdim=True)
            return (scale * wide + mix[..., 1] @ at_least_float32(self.vectors)).to(x.dtype)


def networks_only(routing: Routing, num_networks: int) -> Routing:
    """The part of a Routing that goes to the first experts, which are networks; others are -1."""
    beyond = routing.topk_indices >= num_networks
    return routing._replace(
        router_logits=routing.router_logits[:, :num_networks],
        router_probs=routing.router_probs[:, :num_networks],
        topk_weights=routing.topk_weights.masked_fill(beyond, 0),
        topk_indices=routing.topk_indices.masked_fill(beyond, -1),
        tokens_per_expert=routing.tokens_per_expert[:num_networks],
        num_dropped=routing.num_dropped[:num_networks],
    )
