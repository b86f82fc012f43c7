"""Expert choice: each expert takes the tokens that score highest for it, all experts equally many.

    probs = softmax(W x)
    C = round(T * experts_per_token / E), at least 1 and at most T; T counts valid tokens only
    expert e takes the C tokens of the batch with the highest probs[:, e], ties to the first token
    topk_weights[t, e] = probs[t, e] where e took t

The paper's C = n k / E (its capacity factor k) is `experts_per_token`, the mean over tokens. A
token has from 0 to E experts, so a Routing has E columns: column e holds e, or -1. The load is
balanced by construction, a `load_balancing` loss has nothing to do. T counts the tokens of one
forward pass on one rank, and in generation with a cache, one: what a token is given depends on what
else is in the batch.

Not causal: whether an expert takes a token depends on the scores of later ones (and on those of
other sequences). Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv
2202.09368, section 3.2; without its optional cap on a token's experts.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe.router import ChoosingRouter
from moe.routing import RouterContext
from moe.variants import Real, VariantConfig

EXAMPLES = ({"experts_per_token": 1.3}, {"experts_per_token": 4})


class Config(VariantConfig):
    """experts_per_token: the mean over tokens, with a fraction if wanted (it takes the place of
    K * capacity_factor); top_k None: a token may have all E experts."""

    score: ClassVar[str] = "softmax"
    normalize: ClassVar[bool] = False

    name: Literal["expert_choice"] = "expert_choice"
    experts_per_token: Annotated[Real, Field(gt=0)] = 2.0
    top_k: None = None

    def check_experts(self, num_experts: int) -> None:
        """ValueError if tokens would need more experts than there are."""
        if self.experts_per_token > num_experts:
            raise ValueError(
                f"model.moe.router.experts_per_token ({self.experts_per_token:g}) must not exceed "
                f"model.moe.num_experts ({num_experts})"
            )


class Router(ChoosingRouter):
    """(T, D) -> Routing with E columns. In float32 always."""

    causal = False
    independent = False
    divisible = False
    fixed_k = False

    def choose(self, router_logits: Tensor, context: RouterContext) -> Tensor:
        return _choose(router_logits.softmax(-1), context.valid, self.config.experts_per_token)


def _choose(scores: Tensor, valid: Tensor | None, experts_per_token: float) -> Tensor:
    """(T, E) with e in column e where expert e takes the token, else -1."""
    num_tokens, num_experts = scores.shape
    device = scores.device
    if valid is None:
        num_valid = torch.full((), num_tokens, dtype=torch.int64, device=device)
    else:
        num_valid = valid.sum()
        scores = scores.masked_fill(~valid.unsqueeze(-1), -torch.inf)
    # The capacity stays on the device: `topk` would need it on the host, a rank does not.
    capacity = (num_valid.double() * experts_per_token / num_experts).round().long()
    capacity = capacity.clamp(min=1).minimum(num_valid)
    order = scores.sort(dim=0, descending=True, stable=True).indices  # (T, E)
    takes = (torch.arange(num_tokens, device=device) < capacity).unsqueeze(-1)  # by rank
    taken = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, takes.expand_as(order))
    experts = torch.arange(num_experts, device=device)
    return torch.where(taken, experts, -1)
