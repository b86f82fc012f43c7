"""Which K experts does each token choose, and with what weights? Score function and top-k in one.

    probs = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))    (T, E) float32
    topk_indices[t] = the K largest of probs[t] + bias, ties to the lowest index
    topk_weights[t, k] = probs[t, topk_indices[t, k]], divided by their sum if `normalize`

The bias enters the choice only, never the weights (loss-free balancing, arXiv 2408.15664). Without
one, and without a group limit, the logits are compared, whose order is that of the probs: two
experts whose probs round to one float32 are still told apart.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    at_least_float32,
    check_floating,
    check_same_device,
    check_shape,
    no_autocast,
    resolve_backend,
)

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
# Below it the square root of softplus counts as constant: its square stays a normal float32.
LEAST_SOFTPLUS = -80.0


class TopK(NamedTuple):
    """topk_weights (T, K) float32; topk_indices (T, K) int64; router_probs (T, E) float32;
    logits_finite (T,) bool, False where a logit of the token is inf or NaN."""

    topk_weights: Tensor
    topk_indices: Tensor
    router_probs: Tensor
    logits_finite: Tensor


def lowest_index_topk(scores: Tensor, top_k: int) -> Tensor:
    """Indices (T, K) of the K largest of each row, in falling order; ties go to the lowest index.

    All differ, also among -inf, which counts as the least finite number, and NaN, which counts as
    the largest. `torch.topk` leaves the order of ties open; `argmax` returns the first maximum. K
    passes of it are quicker on a CPU than a stable sort of all E, up to K of about 16.
    """
    # A copy in which only what was taken is -inf.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    if top_k > 16:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    columns = []
    for _ in range(top_k):
        best = scores.argmax(-1, keepdim=True)
        scores.scatter_(-1, best, -torch.inf)
        columns.append(best)
    return torch.cat(columns, dim=-1)


def score_of(logits: Tensor, score: str) -> Tensor:
    """The scores of (T, E) logits: `softmax`, `sigmoid` or `sqrt_softplus`."""
    if score == "softmax":
        return logits.softmax(-1)
    if score == "sigmoid":
        return logits.sigmoid()
    # The root's gradient at 0 would be inf times 0.
    return F.softplus(logits.clamp(min=LEAST_SOFTPLUS)).sqrt()


def _mask_groups(scores: Tensor, num_groups: int, groups_kept: int) -> Tensor:
    """Lower experts outside each token's best groups to -inf; a group scores by its best two."""
    size = scores.shape[-1] // num_groups
    grouped = scores.unflatten(-1, (num_groups, size))  # (T, groups, E / groups)
    group_score = grouped.topk(min(2, size), dim=-1).values.sum(-1)  # (T, groups)
    kept = lowest_index_topk(group_score, groups_kept)
    outside = torch.ones_like(group_score, dtype=torch.bool).scatter_(-1, kept, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).view_as(scores)


def _weights(probs: Tensor, topk_indices: Tensor, normalize: bool) -> Tensor:
    """(T, K) the probabilities of the chosen experts."""
    weights = probs.gather(-1, topk_indices)
    return _normalized(weights) if normalize else weights


def _normalized(weights: Tensor) -> Tensor:
    # Sigmoid scores can all underflow; softmax ones sum to at least 1/E.
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)


def fused_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    bias: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    backend: str = "auto",
) -> TopK:
    """Score the experts and choose K of them for each token; always in float32.

    Args:
        router_logits: (T, E).
        top_k: K, at most E.
        score: `softmax` over the experts, `sigmoid` or `sqrt_softplus` of each (DeepSeek-V4).
        normalize: divide the chosen weights by their sum (so that they sum to 1).
        bias: (E,) added for the choice only.
        groups: (number of groups of neighbouring experts, groups that a token may use).
        backend: see `kernels.launch`.
    Returns:
        TopK(topk_weights, topk_indices, router_probs, logits_finite); gradients flow to
        `router_logits` from weights and probs. Indices are distinct and in range even where
        logits or bias are inf or NaN.
    Raises:
        ValueError: on a wrong shape, dtype or device, K > E, an unknown score, or groups that do
            not divide E or leave fewer than K experts.
    Source: group limit as in DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    check_shape("fused_topk", "router_logits", router_logits, (None, None))
    num_experts = router_logits.shape[-1]
    if not (isinstance(top_k, int) and 1 <= top_k <= num_experts):
        raise ValueError(
            f"fused_topk: top_k ({top_k}) must be an integer from 1 to num_experts ({num_experts})"
        )
    if score not in SCORES:
        raise ValueError(f"fused_topk: score ({score!r}) must be one of {', '.join(SCORES)}")
    if bias is not None:
        check_shape("fused_topk", "bias", bias, (num_experts,))
    check_floating("fused_topk", router_logits=router_logits, bias=bias)
    check_same_device("fused_topk", router_logits=router_logits, bias=bias)
    if groups is not None:
        num_groups, groups_kept = groups
        divides = num_groups >= 1 and num_experts % num_groups == 0
        fits = divides and 1 <= groups_kept <= num_groups
        if not fits or num_experts // num_groups * groups_kept < top_k:
            raise ValueError(
                f"fused_topk: groups {groups} must divide num_experts ({num_experts}) and "
                f"leave at least top_k ({top_k}) experts"
            )
    if resolve_backend("fused_topk", backend, router_logits, has_triton=True) == "triton":
        from kernels.routing_triton import topk_op

        logits = router_logits.contiguous()
        bias = None if bias is None else bias.contiguous()
        options = top_k, SCORES.index(score), normalize
        return TopK(*topk_op(logits, bias, *options, *(groups or (0, 0))))
    with no_autocast(router_logits):
        # bfloat16 scores tie and flip choices; the router is in float32 whatever the model is in.
        logits = at_least_float32(router_logits)
        probs = score_of(logits, score)  # (T, E)
        choice = logits.detach()
        if bias is not None or groups is not None:
            choice = probs.detach()
        if bias is not None:
            choice = choice + bias.to(logits.dtype)
        if groups is not None:
            choice = _mask_groups(choice, *groups)
        topk_indices = lowest_index_topk(choice, top_k)  # (T, K)
        topk_weights = _weights(probs, topk_indices, normalize)
    return TopK(topk_weights, topk_indices, probs, torch.isfinite(logits.detach()).all(-1))


def weights_of(
    router_logits: Tensor,
    topk_indices: Tensor,
    *,
    score: str = "softmax",
    normalize: bool = True,
) -> TopK:
    """The record of `fused_topk` for experts that were chosen elsewhere: replayed routes.

    The same formula and gradients, by PyTorch whatever the backend; the choice is not questioned.

    Args:
        router_logits: (T, E).
        topk_indices: (T, K) int64, -1 for no assignment, which weighs 0.
        score, normalize: as in `fused_topk`.
    Raises:
        ValueError: on a wrong shape, dtype or device, or an unknown score.
    """
    check_shape("weights_of", "router_logits", router_logits, (None, None))
    check_shape("weights_of", "topk_indices", topk_indices, (len(router_logits), None))
    check_floating("weights_of", router_logits=router_logits)
    check_same_device("weights_of", router_logits=router_logits, topk_indices=topk_indices)
    if topk_indices.dtype != torch.int64:
        raise ValueError(f"weights_of: topk_indices is {topk_indices.dtype}, must be torch.int64")
    if score not in SCORES:
        raise ValueError(f"weights_of: score ({score!r}) must be one of {', '.join(SCORES)}")
    with no_autocast(router_logits):
        logits = at_least_float32(router_logits)
        probs = score_of(logits, score)  # (T, E)
        weights = _weights(probs, topk_indices.clamp(min=0), False)  # (T, K)
        weights = weights.masked_fill(topk_indices < 0, 0)
        if normalize:
            weights = _normalized(weights)
    return TopK(weights, topk_indices, probs, torch.isfinite(logits.detach()).all(-1))


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Softmax, top-k and renormalisation, against `softmax` and `topk` of PyTorch."""
    shapes = ((4096, 16, 4), (32768, 64, 8), (32768, 128, 8), (8192, 256, 8))
    builders = []
    for shape in shapes:
        name = "T{} E{} K{}".format(*shape)
        builders.append(CaseBuilder(name, partial(_benchmark_case, name, shape, device)))
    return builders


def _benchmark_case(name: str, shape: tuple[int, int, int], device: str) -> Case:
    num_tokens, num_experts, top_k = shape
    torch.manual_seed(0)
    logits = leaf(num_tokens, num_experts, dtype=torch.float32, device=device)

    def library(logits: Tensor) -> Tensor:
        weights = logits.softmax(-1).topk(top_k, dim=-1).values
        return weights / weights.sum(-1, keepdim=True)

    return Case(
        name=name,
        ours=lambda logits, backend: fused_topk(logits, top_k, backend=backend).topk_weights,
        leaves=(logits,),
        reference=library,
        rivals={"softmax + topk": Contestant(library, (logits,))},
        grad=torch.randn(num_tokens, top_k, device=device),
        tokens=num_tokens,
        # Logits in; probabilities, weights and indices out.
        moved_bytes=num_tokens * (8 * num_experts + 12 * top_k),
    )
