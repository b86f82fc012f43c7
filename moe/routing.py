"""What did the router decide, and how well is the load spread? The record and its measures.

Routing facts are returned, never stored on a module: so counts stay right under activation
checkpointing, evaluation and gradient accumulation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RouterContext(NamedTuple):
    """What a router or a balancing loss may know besides the tokens' hidden states.

    token_ids (T,) int64; document_ids (T,) int, unique within a sequence only; valid (T,) bool,
    False for padding, which counts nowhere, or None if every token is valid; batch_shape (B, S)
    with B*S = T; training: whether noise is allowed; generator: of the noise, None for PyTorch's
    global one, which activation checkpointing replays; layer: number of the block, from 0; backend:
    of the kernels, `auto`, `triton` or `torch`.
    """

    token_ids: Tensor
    document_ids: Tensor | None
    valid: Tensor | None
    batch_shape: tuple[int, int]
    training: bool
    generator: torch.Generator | None = None
    layer: int = 0
    backend: str = "auto"


class Routing(NamedTuple):
    """One layer's decisions for T tokens, E experts and K choices.

    router_logits, router_probs (T, E) float32; topk_weights (T, K) float32, 0 where the index is
    -1; topk_indices (T, K) int64, -1 for no assignment; tokens_per_expert (E,) int64 assignments;
    num_tokens () int64 valid tokens; logits_finite () bool, False if any logit of a valid token is
    inf or NaN; valid (T,) bool, False for padding.
    """

    router_logits: Tensor
    router_probs: Tensor
    topk_weights: Tensor
    topk_indices: Tensor
    tokens_per_expert: Tensor
    num_tokens: Tensor
    logits_finite: Tensor
    valid: Tensor


def make_routing(
    router_logits: Tensor,
    router_probs: Tensor,
    topk_weights: Tensor,
    topk_indices: Tensor,
    valid: Tensor | None,
    *,
    logits_finite: Tensor | None = None,
) -> Routing:
    """Complete a router's decision: padding is given no expert, assignments are counted.

    Args: as in `Routing`; `valid` (T,) bool or None; logits_finite: (T,) bool, as `fused_topk`
        returns it, or None to look at the logits here.
    """
    num_tokens, num_experts = router_logits.shape
    finite = logits_finite
    if finite is None:
        finite = torch.isfinite(router_logits).all(-1)  # (T,)
    # Filled on the device: a tensor made of a Python number would wait for the copy.
    counted = torch.full((), num_tokens, dtype=torch.int64, device=router_logits.device)
    if valid is not None:
        padding = ~valid.unsqueeze(-1)
        topk_indices = topk_indices.masked_fill(padding, -1)
        topk_weights = topk_weights.masked_fill(padding, 0)
        finite = finite | ~valid
        counted = valid.sum()
    # Not bincount, which reads the largest index back from a GPU.
    slot = topk_indices.reshape(-1) + 1  # (T * K,), 0 for no assignment
    counts = slot.new_zeros(num_experts + 1)
    tokens_per_expert = counts.index_add_(0, slot, slot.new_ones(1).expand_as(slot))[1:]
    return Routing(
        router_logits,
        router_probs,
        topk_weights,
        topk_indices,
        tokens_per_expert,
        counted,
        finite.all(),
        torch.ones_like(finite) if valid is None else valid,
    )


def counts_by_sequence(routing: Routing, num_sequences: int) -> Tensor:
    """(B, E) int64 assignments of each of the B sequences of the batch."""
    num_experts = routing.router_logits.shape[-1]
    chosen = routing.topk_indices.view(num_sequences, -1) + 1  # (B, S*K), 0 for no assignment
    counts = chosen.new_zeros(num_sequences, num_experts + 1)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen))[:, 1:]


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio = max_i c_i / mean(c) - 1 over the last dimension: 0 when balanced, E - 1 at collapse.

    Args: tokens_per_expert: (..., E) counts.
    Returns: (...,) float32; 0 where nothing was counted.
    Source: Wang et al., loss-free balancing, arXiv 2408.15664.
    """
    load = tokens_per_expert.float()
    mean = load.mean(-1)
    return torch.where(mean > 0, load.amax(-1) / mean.clamp(min=1e-9) - 1, 0.0)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """Number of experts with no assignment in the window that was counted: (..., E) -> (...,)."""
    return (tokens_per_expert == 0).sum(-1)


def starved_experts(tokens_per_expert: Tensor) -> Tensor:
    """Number of experts with fewer than 0.1 of the mean assignments: (..., E) -> (...,)."""
    load = tokens_per_expert.float()
    return (load < 0.1 * load.mean(-1, keepdim=True)).sum(-1)


def effective_experts(tokens_per_expert: Tensor) -> Tensor:
    """exp(H(load)), from 1 (all to one expert) to E (uniform): (..., E) -> (...,)."""
    share = tokens_per_expert / tokens_per_expert.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share.float()).sum(-1).exp()


def router_entropy(routing: Routing) -> Tensor:
    """Mean over valid tokens of the entropy of the router's distribution, divided by log E: 0 to 1.

    Sigmoid scores are divided by their sum first.
    """
    probs = routing.router_probs
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1e-20)
    return _token_mean(
        torch.special.entr(probs).sum(-1) / math.log(max(2, probs.shape[-1])), routing
    )


def confidence_and_margin(routing: Routing) -> tuple[Tensor, Tensor]:
    """Means over valid tokens of p_1, and of p_K - p_{K+1} (0 where K = E)."""
    top_k, num_experts = routing.topk_indices.shape[-1], routing.router_probs.shape[-1]
    ranked = routing.router_probs.topk(min(top_k + 1, num_experts), dim=-1).values
    margin = ranked[:, top_k - 1] - ranked[:, top_k] if top_k < num_experts else ranked[:, 0] * 0
    return _token_mean(ranked[:, 0], routing), _token_mean(margin, routing)


def _token_mean(values: Tensor, routing: Routing) -> Tensor:
    """Mean of (T,) values over valid tokens; 0 where there are none."""
    return (values * routing.valid).sum() / routing.num_tokens.clamp(min=1)


def domain_expert_information(assignments: Tensor) -> Tensor:
    """How much of a token's domain its expert reveals: I(domain; expert) / H(domain), 0 to 1.

    Args: assignments: (..., num_domains, E) counts.
    Returns: (...,) float64; 0 with fewer than two domains.
    """
    joint = assignments.double()
    joint = joint / joint.sum((-2, -1), keepdim=True).clamp(min=1)
    domain, expert = joint.sum(-1), joint.sum(-2)
    entropy = torch.special.entr(domain).sum(-1)
    joint_entropy = torch.special.entr(joint).sum((-2, -1))
    information = entropy + torch.special.entr(expert).sum(-1) - joint_entropy
    return torch.where(entropy > 0, information / entropy.clamp(min=1e-12), 0.0)
