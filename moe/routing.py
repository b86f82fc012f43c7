"""What did the router decide? The record that every router returns.

Routing facts are returned, never stored on a module: so counts stay right under activation
checkpointing, evaluation and gradient accumulation.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The increment of SplitMix64: its multiples differ in high and low bits alike.
SPLITMIX_STEP = 0x9E3779B97F4A7C15


class RouterContext(NamedTuple):
    """What a router or a balancing loss may know besides the tokens' hidden states.

    token_ids (T,) int64; document_ids (T,) int, unique within a sequence only; valid (T,) bool,
    False for padding, which counts nowhere, or None if every token is valid; batch_shape (B, S)
    with B*S = T; training: whether noise is allowed; generator: of the noise, None for PyTorch's
    global one, which activation checkpointing replays; layer: number of the block, from 0; backend:
    of the kernels, as `kernels.launch` has them; topk_indices: (T, K) experts to take in place of
    the router's own choice, -1 for none, their weights computed as ever; None: it chooses.
    noise_seeds: (B,) int64 on the CPU, in place of the generator: then the noise of a sequence
    follows from its seed and the layer alone, however a batch is split into passes and ranks.
    """

    token_ids: Tensor
    document_ids: Tensor | None
    valid: Tensor | None
    batch_shape: tuple[int, int]
    training: bool
    generator: torch.Generator | None = None
    layer: int = 0
    backend: str = "auto"
    topk_indices: Tensor | None = None
    noise_seeds: Tensor | None = None


def noise_like(
    x: Tensor, context: RouterContext, fill: Callable[..., Tensor], *, stream: int = 0
) -> Tensor:
    """Random numbers of the shape (T, n), dtype and device of `x`, as the context wants them drawn.

    Args: fill: `Tensor.uniform_` or `Tensor.normal_`. stream: another one for each use in a layer,
        from 0: noise of the same sequence and stream is the same.
    """
    noise = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if context.noise_seeds is None:
        return fill(noise, generator=context.generator)
    generator = torch.Generator(x.device)
    sequences = noise.view(*context.batch_shape, x.shape[-1])  # (B, S, n)
    for seed, rows in zip(context.noise_seeds.tolist(), sequences, strict=True):
        # A stream differs in low bits: of a seed, PyTorch's generator of the CPU reads 32.
        place = context.layer + (stream << 16)
        generator.manual_seed((seed + place * SPLITMIX_STEP) % 2**63)
        fill(rows, generator=generator)
    return noise


class Routing(NamedTuple):
    """One layer's decisions for T tokens, E experts and K choices.

    router_logits, router_probs (T, E) float32; topk_weights (T, K) float32, 0 where the index is
    -1; topk_indices (T, K) int64, -1 for no assignment; tokens_per_expert (E,) int64 assignments:
    these three are what a capacity has left, and chosen_weights, chosen_indices and demand what the
    router decided; num_tokens () int64 valid tokens; logits_finite () bool, False if any logit of a
    valid token is inf or NaN; valid (T,) bool, False for padding; num_dropped (E,) int64
    assignments that the router made and a capacity took back; penalty () what the router itself
    adds to the loss, weighted, the mean over valid tokens, None for nothing; feedback (E,) float32
    what its `after_step` is told beside the counts, a mean over valid tokens, None for nothing. Of
    a router that adds noise to its logits, None elsewhere: noise_std (T, E) its standard deviation,
    with gradient; selection_logits (T, E) what it chose by, which are the router_logits with their
    noise. Under a capacity, None elsewhere: wanted_indices and wanted_weights (T, K), what the
    router chose before the drop.
    """

    router_logits: Tensor
    router_probs: Tensor
    topk_weights: Tensor
    topk_indices: Tensor
    tokens_per_expert: Tensor
    num_tokens: Tensor
    logits_finite: Tensor
    valid: Tensor
    num_dropped: Tensor
    penalty: Tensor | None = None
    feedback: Tensor | None = None
    noise_std: Tensor | None = None
    selection_logits: Tensor | None = None
    wanted_indices: Tensor | None = None
    wanted_weights: Tensor | None = None

    @property
    def chosen_indices(self) -> Tensor:
        """(T, K) what the router chose, those dropped since among them."""
        return self.topk_indices if self.wanted_indices is None else self.wanted_indices

    @property
    def chosen_weights(self) -> Tensor:
        """(T, K) the weights of `chosen_indices`."""
        return self.topk_weights if self.wanted_weights is None else self.wanted_weights

    @property
    def demand(self) -> Tensor:
        """(E,) int64 assignments that the router made, those dropped since among them."""
        return self.tokens_per_expert + self.num_dropped


def make_routing(
    router_logits: Tensor,
    router_probs: Tensor,
    topk_weights: Tensor,
    topk_indices: Tensor,
    valid: Tensor | None,
    *,
    logits_finite: Tensor | None = None,
    penalty: Tensor | None = None,
    feedback: Tensor | None = None,
    noise_std: Tensor | None = None,
    selection_logits: Tensor | None = None,
) -> Routing:
    """Complete a router's decision: padding is given no expert, assignments are counted.

    Args: as in `Routing`; `valid` (T,) bool or None; logits_finite: (T,) bool, as `fused_topk`
        returns it, or None to look at the logits here. penalty and what follows: as in `Routing`.
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
    tokens_per_expert = assignments_per_expert(topk_indices, num_experts)
    return Routing(
        router_logits,
        router_probs,
        topk_weights,
        topk_indices,
        tokens_per_expert,
        counted,
        finite.all(),
        torch.ones_like(finite) if valid is None else valid,
        torch.zeros_like(tokens_per_expert),
        penalty,
        feedback,
        noise_std,
        selection_logits,
    )


def uniform_routing(
    x: Tensor, topk_indices: Tensor, num_experts: int, weight: float, valid: Tensor | None
) -> Routing:
    """The Routing of a router without an opinion: logits 0, probabilities 1/E, one weight for all.

    Args: x: (T, D), for its device and dtype; topk_indices: (T, K); weight: of each assignment.
    """
    # At least float32, as every router's scores.
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.new_zeros(len(x), num_experts, dtype=dtype)
    probs = torch.full_like(logits, 1 / num_experts)
    weights = logits.new_full(topk_indices.shape, weight).masked_fill(topk_indices < 0, 0)
    return make_routing(logits, probs, weights, topk_indices, valid)


def assignments_per_expert(topk_indices: Tensor, num_experts: int) -> Tensor:
    """(E,) int64 how often each expert stands in (T, K) indices, -1 for no assignment."""
    # Not bincount, which reads the largest index back from a GPU.
    slot = topk_indices.reshape(-1) + 1  # (T * K,), 0 for no assignment
    counts = slot.new_zeros(num_experts + 1)
    return counts.index_add_(0, slot, slot.new_ones(1).expand_as(slot))[1:]


def rank_in_group(group: Tensor, order: Tensor) -> Tensor:
    """(N,) int64 place of each of N things, from 0, among those of its group.

    Args: group: (N,) integers. order: (N,) the things as they come, whatever their group.
    """
    # By group, and within a group in that order.
    order = order[group[order].sort(stable=True).indices]
    ordered = group[order]
    places = torch.arange(len(order), device=group.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(places).scatter_(0, order, places)


# ---- several layers in one tensor; their numbers of experts and choices may differ


def stack_layers(tensors: Sequence[Tensor], dim: int = 0, fill: float = -1) -> Tensor:
    """One tensor of what each layer has: the last dimension is the longest one's.

    Args:
        tensors: L of them, counts (..., E) or routes (..., K), each of its own E or K.
        dim: the place of L in the result.
        fill: what stands behind the last expert or choice of a layer: -1 in counts is no expert,
            and stays below 0 in every sum; -1 in routes is no assignment.
    """
    longest = max(each.shape[-1] for each in tensors)
    missing = [longest - each.shape[-1] for each in tensors]
    padded = [
        F.pad(each, (0, number), value=fill) if number else each
        for each, number in zip(tensors, missing, strict=True)
    ]
    return torch.stack(padded, dim)


def zero_counts(num_experts: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(L, E) int64 counts of layers with these numbers of experts: 0, and -1 for no expert."""
    expert = torch.arange(max(num_experts, default=1), device=device)
    number = torch.tensor(num_experts, dtype=torch.int64, device=device)
    return -(expert >= number.unsqueeze(-1)).long()


def counts_by_sequence(routing: Routing, num_sequences: int) -> Tensor:
    """(B, E) int64 assignments that the router made in each of the B sequences of the batch."""
    num_experts = routing.router_logits.shape[-1]
    chosen = routing.chosen_indices.view(num_sequences, -1) + 1  # (B, S*K), 0 for none
    counts = chosen.new_zeros(num_sequences, num_experts + 1)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen))[:, 1:]
