"""Orthogonality loss: experts should be chosen by different tokens.

    cos(i, j) = <p_i, p_j> / (|p_i| |p_j|),   L = mean over pairs i != j of cos(i, j)^2

p_i (T,) are the router's probabilities of expert i: off the diagonal, the squares of the Gram
matrix of these columns, scaled to cosines. 0 where no token gives two experts a probability, 1
where all tokens want all experts in the same proportion. Per layer, over the valid tokens of this
forward pass (a part of a step has its own cosines); the model averages over layers.

After Guo et al., arXiv 2505.22323, whose orthogonality loss projects the *outputs* of a token's
chosen experts onto each other. Here it is the router that is told apart, which costs no output of
an expert and sees all pairs; outputs of experts may still be alike. It belongs with a balancing
loss, and with `variance`, the other loss of that paper.
Source: Guo et al., arXiv 2505.22323 (the aim; the formula is ours).
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels.launch import no_autocast
from moe.losses import LossContext
from moe.routing import Routing
from moe.variants import Real, VariantConfig


class Config(VariantConfig):
    """weight of the term."""

    name: Literal["orthogonality"] = "orthogonality"
    weight: Annotated[Real, Field(ge=0)] = 1e-3


def loss(config: Config, routing: Routing, context: LossContext) -> Tensor:
    """One layer's loss, () float32."""
    probs = routing.router_probs
    num_experts = probs.shape[-1]
    if context.router.valid is not None:
        probs = probs * context.router.valid.unsqueeze(-1)
    lengths = torch.linalg.vector_norm(probs, dim=0)  # (E,)
    columns = probs / lengths.clamp(min=1e-20)
    # Autocast would round the matrix to bfloat16.
    with no_autocast(columns):
        cosines = columns.T @ columns  # (E, E)
    off_diagonal = ~torch.eye(num_experts, dtype=torch.bool, device=probs.device)
    pairs = max(num_experts * (num_experts - 1), 1)
    return (cosines.square() * off_diagonal).sum() / pairs
