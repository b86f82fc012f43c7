"""Where does each (token, expert) assignment go? The dispatch plan, permute and unpermute.

Data map. A *row* is one assignment; rows are sorted by expert, and by token within an expert.

    name               shape   maps from        to
    topk_indices       (T, K)  assignment       expert, -1 for no assignment
    tokens_per_expert  (E,)    expert           number of its rows
    expert_offsets     (E+1,)  expert           its first row; the last entry is the rows in use
    token_of_row       (R,)    row              token
    row_of             (T, K)  assignment       row, -1 for no assignment

R = T*K whatever is dropped: rows from `expert_offsets[E]` on are unused and never read.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import check_shape


class DispatchPlan(NamedTuple):
    """Index tensors of one dispatch; see the data map above. All int64."""

    tokens_per_expert: Tensor
    expert_offsets: Tensor
    token_of_row: Tensor
    row_of: Tensor

    @property
    def num_rows(self) -> int:
        """R, rows allocated: T*K."""
        return self.token_of_row.numel()


def plan_dispatch(topk_indices: Tensor, num_experts: int) -> DispatchPlan:
    """Sort the assignments by expert.

    Args:
        topk_indices: (T, K) int, experts in [0, num_experts), or -1 for no assignment.
        num_experts: E.
    Returns:
        DispatchPlan; counts sum to the number of indices >= 0.
    Raises:
        ValueError: if `topk_indices` is not a (T, K) integer tensor.
    """
    check_shape("plan_dispatch", "topk_indices", topk_indices, (None, None))
    if topk_indices.is_floating_point() or topk_indices.dtype == torch.bool:
        raise ValueError(f"plan_dispatch: topk_indices must be integers, got {topk_indices.dtype}")
    num_tokens, top_k = topk_indices.shape
    flat = topk_indices.reshape(-1)
    dropped = flat < 0
    # Dropped assignments sort behind the last expert. int16 keys sort twice as fast on a CPU.
    key = flat.masked_fill(dropped, num_experts)
    narrow = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int32
    order = torch.sort(key.to(narrow), stable=True).indices  # (R,)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(order.numel(), device=order.device)
    row_of = row_of.masked_fill_(dropped, -1).view(num_tokens, top_k)
    token_of_row = order.div(max(top_k, 1), rounding_mode="floor")
    return DispatchPlan(counts, offsets, token_of_row, row_of)


def sum_rows(rows: Tensor, row_of: Tensor, weights: Tensor | None, *, all_assigned: bool) -> Tensor:
    """out[t] = sum_k weights[t, k] * rows[row_of[t, k]]; a row_of of -1 adds nothing.

    rows (R, D), of which those named in `row_of` are read; weights (T, K) or None for 1;
    all_assigned: no row_of is -1. `embedding_bag` does it in one pass and accumulates in float32.
    """
    if rows.shape[0] == 0 or row_of.numel() == 0:
        return rows.new_zeros(row_of.shape[0], rows.shape[1])
    if not all_assigned:
        # A row of zeros to point to: unused rows may hold NaN, which a weight of 0 does not blank.
        row_of = row_of.masked_fill(row_of < 0, rows.shape[0])
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    if weights is not None:
        weights = weights.to(rows.dtype)
    return F.embedding_bag(row_of, rows, mode="sum", per_sample_weights=weights)


def weights_by_row(plan: DispatchPlan, topk_weights: Tensor) -> Tensor:
    """(R,) the combine weight of each row; 0 for unused rows."""
    by_row = topk_weights.new_zeros(plan.num_rows)
    chosen = plan.row_of >= 0
    by_row[plan.row_of[chosen]] = topk_weights[chosen]
    return by_row


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan):
        ctx.plan = plan
        return x.index_select(0, plan.token_of_row)

    @staticmethod
    def backward(ctx, grad_rows):
        used = int(ctx.plan.expert_offsets[-1])
        row_of = ctx.plan.row_of
        everything = used == row_of.numel()
        return sum_rows(grad_rows.contiguous(), row_of, None, all_assigned=everything), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, plan, topk_weights):
        ctx.plan = plan
        ctx.save_for_backward(rows, topk_weights)
        everything = int(plan.expert_offsets[-1]) == plan.num_rows
        return sum_rows(rows, plan.row_of, topk_weights, all_assigned=everything)

    @staticmethod
    def backward(ctx, grad_out):
        rows, topk_weights = ctx.saved_tensors
        plan = ctx.plan
        used = int(plan.expert_offsets[-1])
        grad_of_row = grad_out.index_select(0, plan.token_of_row)  # (R, D)
        grad_weight_of_row = topk_weights.new_zeros(plan.num_rows)
        wide = torch.promote_types(rows.dtype, torch.float32)
        products = grad_of_row[:used].to(wide) * rows[:used].to(wide)
        grad_weight_of_row[:used] = products.sum(-1).to(topk_weights.dtype)
        by_row = weights_by_row(plan, topk_weights).to(rows.dtype)
        grad_weights = grad_weight_of_row[plan.row_of.clamp(min=0)]
        grad_weights = grad_weights.masked_fill(plan.row_of < 0, 0)
        return grad_of_row * by_row.unsqueeze(-1), None, grad_weights


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token to its rows, sorted by expert: rows[r] = x[plan.token_of_row[r]].

    Args:
        x: (T, D).
        plan: DispatchPlan of the same tokens.
    Returns:
        (R, D), dtype of `x`. Rows from `plan.expert_offsets[-1]` on are unused; do not read them.
    Raises:
        ValueError: if `x` has not as many tokens as the plan.
    """
    check_shape("permute", "x", x, (plan.row_of.shape[0], None))
    return _Permute.apply(x, plan)


def unpermute(rows: Tensor, plan: DispatchPlan, topk_weights: Tensor) -> Tensor:
    """Sum each token's expert outputs, weighted by its router: the reverse of `permute`.

    out[t] = sum_k topk_weights[t, k] * rows[plan.row_of[t, k]], accumulated in float32.

    Args:
        rows: (R, D) expert outputs, sorted by expert.
        plan: DispatchPlan of the same tokens.
        topk_weights: (T, K) combine weights; a dropped assignment has weight 0.
    Returns:
        (T, D), dtype of `rows`.
    Raises:
        ValueError: if `rows` has not `plan.num_rows` rows, or `topk_weights` another shape than
            `plan.row_of`.
    Source: Gale et al., MegaBlocks, arXiv 2211.15841, section 5.2.
    """
    check_shape("unpermute", "rows", rows, (plan.num_rows, None))
    check_shape("unpermute", "topk_weights", topk_weights, tuple(plan.row_of.shape))
    return _Unpermute.apply(rows, plan, topk_weights)
