"""How many tokens may an expert take? Beyond its capacity, assignments are dropped.

    C = ceil(factor * A / E),   A the assignments of this forward pass on this rank: K T as a rule,
                                E all choices of the router: those that cost nothing are among them
    an expert keeps the first C of its assignments in the order of `priority`:

    position      the tokens' order in the batch; no later token plays a part
    probability   falling probability of the router, ties to the earlier token
    random        a random order, a fresh one at each step

A dropped assignment adds nothing: its token keeps its other experts, with the weights they had, and
its place in the residual stream. Counts for balance are the router's own choices, before the drop.
Under expert parallelism each rank bounds what it sends, so that an expert takes at most the sum of
C over the ranks; as C is of one pass, another split of a batch drops others.

Not causal with `probability` and `random`: whether a token is dropped then depends on how many
later tokens want the same expert. BROKEN_RULES has all that dropping breaks.

Sources: capacity factor, by position: Switch Transformers, arXiv 2101.03961, section 2.2; by
probability: batch prioritized routing, Riquelme et al., arXiv 2106.05974, section 4.
"""

import torch
from torch import Tensor

from moe.routing import (
    RouterContext,
    Routing,
    assignments_per_expert,
    noise_like,
    rank_in_group,
)

# Of `moe.router.RULES`, by priority.
BROKEN_RULES = {
    "position": ("independent", "divisible", "permutes_tokens", "fixed_k"),
    "probability": ("causal", "independent", "divisible", "fixed_k"),
    "random": ("causal", "independent", "divisible", "permutes_tokens", "fixed_k"),
}


def limit_to_capacity(
    routing: Routing,
    factor: float,
    priority: str,
    context: RouterContext,
    *,
    num_bounded: int | None = None,
) -> Routing:
    """The Routing without the assignments beyond each expert's capacity; without a value on the
    host.

    Args:
        factor: an expert's capacity over the mean assignments of an expert.
        priority: `position`, `probability` or `random`.
        context: of the same tokens; the random order is its noise.
        num_bounded: experts behind so many have no bound; None: all have one.
    """
    chosen = routing.topk_indices
    num_experts = routing.router_logits.shape[-1]
    rank = _rank_in_expert(routing, priority, context)
    made = routing.tokens_per_expert.sum().double()
    # A hair less: the product of 1.1 and 10 is above 11 in binary.
    capacity = (factor * made / num_experts * (1 - 1e-12)).ceil().long()
    bounded = (chosen >= 0) & (chosen < (num_experts if num_bounded is None else num_bounded))
    dropped = bounded & (rank >= capacity)  # (T, K)
    kept = chosen.masked_fill(dropped, -1)
    tokens_per_expert = assignments_per_expert(kept, num_experts)
    return routing._replace(
        topk_weights=routing.topk_weights.masked_fill(dropped, 0),
        topk_indices=kept,
        tokens_per_expert=tokens_per_expert,
        num_dropped=routing.tokens_per_expert - tokens_per_expert,
        wanted_indices=chosen,
        wanted_weights=routing.topk_weights,
    )


def _rank_in_expert(routing: Routing, priority: str, context: RouterContext) -> Tensor:
    """(T, K) place of each assignment among those of its expert, from 0."""
    chosen = routing.topk_indices
    expert = chosen.reshape(-1)  # (T * K,)
    order = torch.arange(expert.numel(), device=expert.device)
    if priority == "probability":
        probs = routing.router_probs.detach().gather(-1, chosen.clamp(min=0))
        order = probs.reshape(-1).sort(descending=True, stable=True).indices
    elif priority == "random":
        # A stream of its own: a router's noise must not decide who is dropped.
        numbers = noise_like(routing.topk_weights.detach(), context, Tensor.uniform_, stream=1)
        order = numbers.reshape(-1).sort(stable=True).indices
    return rank_in_group(expert, order).view_as(chosen)
