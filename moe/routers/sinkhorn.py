"""Sinkhorn routing: in training, tokens are assigned to experts as in an optimal transport.

    logits L = W x,   S = L / temperature over the valid tokens of the batch
    repeat num_iterations times:   v_e = -logsumexp_t(S + u),   u_t = -logsumexp_e(S + v)
    choice: the K largest of S[t] + v in training, of L[t] in evaluation
    weights: softmax(L) or sigmoid(L) at the chosen experts, divided by their sum if `normalize`

exp(S + u + v) tends to a plan whose rows sum to 1 and whose columns are all equal: -v is a price
that an expert in demand asks. u moves no choice, as it is the same for all experts of a token. The
plan is balanced, its top-K only nearly so; at a low temperature (which takes more iterations) the
plan tends to the assignment that BASE layers solve exactly. The iteration is in float32 and has no
gradient. It sees the tokens of one forward pass on one rank.

Not causal: the prices of training depend on later tokens; evaluation is plain top-K and causal, so
training and evaluation choose differently. Sources: Lewis et al., BASE Layers, arXiv 2103.16716;
S-BASE: Clark et al., arXiv 2202.01169, section 4 and appendix B.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.routing import lowest_index_topk
from moe.router import ChoosingRouter, refuse_constant_weight
from moe.routing import RouterContext
from moe.variants import Count, Real, VariantConfig

EXAMPLES = (
    {"top_k": 1, "score": "sigmoid", "num_iterations": 3},
    {"top_k": 3, "normalize": True, "temperature": 0.2},
)


class Config(VariantConfig):
    """top_k experts a token; score that weighs them; num_iterations of the normalisation;
    temperature by which it divides the logits."""

    name: Literal["sinkhorn"] = "sinkhorn"
    top_k: Count = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    num_iterations: Count = 8
    temperature: Annotated[Real, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _router_gets_a_gradient(self):
        refuse_constant_weight(self.top_k, self.normalize)
        return self


class Router(ChoosingRouter):
    """(T, D) -> Routing. In float32 always."""

    causal = False
    independent = False
    divisible = False

    def choose(self, router_logits: Tensor, context: RouterContext) -> Tensor:
        config, choice = self.config, router_logits
        if context.training:
            choice = choice / config.temperature
            choice = choice + _offsets(choice, context.valid, config.num_iterations)
        return lowest_index_topk(choice, config.top_k)


def _offsets(scores: Tensor, valid: Tensor | None, num_iterations: int) -> Tensor:
    """(E,) v of the formula, by alternate normalisation of columns and rows, in the log domain."""
    lowest = torch.finfo(scores.dtype).min
    u = torch.zeros_like(scores[:, :1])  # (T, 1)
    v = scores.new_zeros(scores.shape[1])  # (E,)
    for _ in range(num_iterations):
        columns = scores + u
        if valid is not None:
            # Not -inf: where all tokens are padding it would become NaN.
            columns = columns.masked_fill(~valid.unsqueeze(-1), lowest)
        v = -columns.logsumexp(0)  # (E,)
        u = -(scores + v).logsumexp(-1, keepdim=True)  # (T, 1)
    return v
