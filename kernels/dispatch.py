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

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    check_floating,
    check_integers,
    check_same_device,
    check_shape,
    resolve_backend,
)

# The Triton plan counts in shared memory: four bytes for each expert.
MAX_EXPERTS_TRITON = 8192


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

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that errors give them."""
        return {f"plan.{name}": t for name, t in zip(self._fields, self, strict=True)}


def plan_dispatch(
    topk_indices: Tensor, num_experts: int, *, backend: str = "auto", debug: bool = False
) -> DispatchPlan:
    """Sort the assignments by expert.

    Args:
        topk_indices: (T, K) int, experts in [0, num_experts), or -1 for no assignment. What an
            index of `num_experts` or more does is undefined; below -1 it counts as -1.
        num_experts: E.
        backend: see `kernels.launch`.
        debug: look for such indices, at the price of a synchronisation.
    Returns:
        DispatchPlan; counts sum to the number of indices >= 0.
    Raises:
        ValueError: if `topk_indices` is not a (T, K) integer tensor, or `num_experts` below 1; in
            debug, if an index is out of range.
    """
    check_shape("plan_dispatch", "topk_indices", topk_indices, (None, None))
    check_integers("plan_dispatch", topk_indices=topk_indices)
    if num_experts < 1:
        raise ValueError(f"plan_dispatch: num_experts ({num_experts}) must be at least 1")
    if debug and topk_indices.numel():
        lowest, highest = (int(index) for index in topk_indices.aminmax())
        if lowest < -1 or highest >= num_experts:
            wrong = highest if highest >= num_experts else lowest
            raise ValueError(
                f"plan_dispatch: topk_indices holds {wrong}, must be from 0 to "
                f"num_experts - 1 ({num_experts - 1}), or -1 for no assignment"
            )
    if _plan_backend(backend, topk_indices, num_experts) == "triton":
        from kernels.dispatch_triton import plan_dispatch_op

        return DispatchPlan(*plan_dispatch_op(topk_indices, num_experts))
    return _plan_by_sorting(topk_indices, num_experts)


def _plan_backend(backend: str, topk_indices: Tensor, num_experts: int) -> str:
    # A float32 in their place: a plan computes with integers alone, of whatever dtype.
    on_device = topk_indices.new_empty(0, dtype=torch.float32)
    fits = num_experts <= MAX_EXPERTS_TRITON
    chosen = resolve_backend(
        "plan_dispatch", backend, on_device, has_triton=fits or backend != "auto"
    )
    if chosen == "triton" and not fits:
        raise ValueError(
            f"plan_dispatch: backend 'triton' counts at most {MAX_EXPERTS_TRITON} experts, got "
            f"{num_experts}; use 'auto' or 'torch'"
        )
    return chosen


def _plan_by_sorting(topk_indices: Tensor, num_experts: int) -> DispatchPlan:
    num_tokens, top_k = topk_indices.shape
    flat = topk_indices.reshape(-1)
    dropped = flat < 0
    # Dropped assignments sort behind the last expert. int16 keys sort twice as fast on a CPU, and
    # int8 indices could not hold the mark.
    narrow = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int32
    key = flat.to(narrow).masked_fill(dropped, num_experts)
    key, order = torch.sort(key, stable=True)  # (R,)
    # Not bincount: on a GPU it synchronises.
    experts = torch.arange(num_experts + 1, dtype=narrow, device=key.device)
    offsets = torch.searchsorted(key, experts)  # (E+1,)
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(order.numel(), device=order.device)
    row_of = row_of.masked_fill_(dropped, -1).view(num_tokens, top_k)
    token_of_row = order.div(max(top_k, 1), rounding_mode="floor")
    return DispatchPlan(offsets.diff(), offsets, token_of_row, row_of)


def sum_rows(rows: Tensor, row_of: Tensor, weights: Tensor | None, *, all_assigned: bool) -> Tensor:
    """out[t] = sum_k weights[t, k] * rows[row_of[t, k]]; a row_of of -1 adds nothing.

    rows (R, D), of which those named in `row_of` are read; weights (T, K), rounded to the dtype of
    `rows` first, or None for 1; all_assigned: no row_of is -1. `embedding_bag` does it in one pass
    and accumulates in float32.
    """
    if rows.shape[0] == 0 or row_of.numel() == 0:
        return rows.new_zeros(row_of.shape[0], rows.shape[1])
    if not all_assigned:
        # A row of zeros to point to: unused rows may hold NaN, which a weight of 0 does not blank.
        row_of = row_of.masked_fill(row_of < 0, rows.shape[0])
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    if weights is not None:
        # Its gradient is the caller's to compute; PyTorch would prepare for one.
        weights = weights.detach().to(rows.dtype)
    return F.embedding_bag(row_of, rows, mode="sum", per_sample_weights=weights)


def weights_by_row(row_of: Tensor, topk_weights: Tensor) -> Tensor:
    """(R,) the combine weight of each row; 0 for unused rows. Both arguments (T, K)."""
    # Dropped assignments write to one row more, which is cut off: a mask would synchronise.
    by_row = topk_weights.new_zeros(row_of.numel() + 1)
    row = row_of.masked_fill(row_of < 0, row_of.numel())
    return by_row.scatter_(0, row.reshape(-1), topk_weights.reshape(-1))[:-1]


def rows_in_use_bound(plan: DispatchPlan) -> int:
    """Rows that belong to an expert; on a GPU a bound, R, since it must not wait for the number."""
    if plan.expert_offsets.device.type != "cpu":
        return plan.num_rows
    return int(plan.expert_offsets[-1])


# The backward passes of both are plain tensor operations, which can be differentiated again.
class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan):
        ctx.plan = plan
        return x.index_select(0, plan.token_of_row)

    @staticmethod
    def backward(ctx, grad_rows):
        plan = ctx.plan
        return sum_rows(grad_rows.contiguous(), plan.row_of, None, all_assigned=_full(plan)), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, plan, topk_weights):
        ctx.plan = plan
        ctx.save_for_backward(rows, topk_weights)
        return sum_rows(rows, plan.row_of, topk_weights, all_assigned=_full(plan))

    @staticmethod
    def backward(ctx, grad_out):
        rows, topk_weights = ctx.saved_tensors
        plan = ctx.plan
        grad_rows = grad_weights = None
        grad_of_row = grad_out.index_select(0, plan.token_of_row)  # (R, D)
        if ctx.needs_input_grad[0]:
            by_row = weights_by_row(plan.row_of, topk_weights).to(rows.dtype)
            grad_rows = grad_of_row * by_row.unsqueeze(-1)
        if ctx.needs_input_grad[2]:
            grad_weights = _grad_weights(grad_of_row, rows, topk_weights, plan)
        return grad_rows, None, grad_weights


def _grad_weights(
    grad_of_row: Tensor, rows: Tensor, topk_weights: Tensor, plan: DispatchPlan
) -> Tensor:
    """(T, K) <grad_of_row[r], rows[r]> at the row r of each assignment, 0 where there is none."""
    used = rows_in_use_bound(plan)
    grad_weight_of_row = topk_weights.new_zeros(plan.num_rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    products = grad_of_row[:used].to(wide) * rows[:used].to(wide)
    grad_weight_of_row[:used] = products.sum(-1).to(topk_weights.dtype)
    # Rows of which only a GPU knows that they are unused: no assignment takes their sum.
    grad_weights = grad_weight_of_row[plan.row_of.clamp(min=0)]
    return grad_weights.masked_fill(plan.row_of < 0, 0)


def _full(plan: DispatchPlan) -> bool:
    """Whether every row is known to be in use."""
    return plan.expert_offsets.device.type == "cpu" and rows_in_use_bound(plan) == plan.num_rows


def permute(x: Tensor, plan: DispatchPlan, *, backend: str = "auto") -> Tensor:
    """Copy each token to its rows, sorted by expert: rows[r] = x[plan.token_of_row[r]].

    Args:
        x: (T, D).
        plan: DispatchPlan of the same tokens.
        backend: see `kernels.launch`.
    Returns:
        (R, D), dtype of `x`. Rows from `plan.expert_offsets[-1]` on are unused; do not read them.
    Raises:
        ValueError: if `x` has not as many tokens as the plan, is no floating-point tensor, or lies
            on another device.
    """
    check_shape("permute", "x", x, (plan.row_of.shape[0], None))
    check_floating("permute", x=x)
    check_same_device("permute", x=x, **plan.named())
    if resolve_backend("permute", backend, x, has_triton=True) == "triton":
        from kernels.dispatch_triton import permute_op

        return permute_op(x.contiguous(), plan.token_of_row, plan.row_of)
    return _Permute.apply(x, plan)


def unpermute(
    rows: Tensor, plan: DispatchPlan, topk_weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Sum each token's expert outputs, weighted by its router: the reverse of `permute`.

    out[t] = sum_k topk_weights[t, k] * rows[plan.row_of[t, k]], accumulated in float32. PyTorch's
    body rounds `topk_weights` to the dtype of `rows` first.

    Args:
        rows: (R, D) expert outputs, sorted by expert.
        plan: DispatchPlan of the same tokens.
        topk_weights: (T, K) combine weights; a dropped assignment has weight 0.
        backend: see `kernels.launch`.
    Returns:
        (T, D), dtype of `rows`.
    Raises:
        ValueError: if `rows` has not `plan.num_rows` rows, `topk_weights` another shape than
            `plan.row_of`, they are no floating-point tensors, or lie on different devices.
    Source: Gale et al., MegaBlocks, arXiv 2211.15841, section 5.2.
    """
    check_shape("unpermute", "rows", rows, (plan.num_rows, None))
    check_shape("unpermute", "topk_weights", topk_weights, tuple(plan.row_of.shape))
    check_floating("unpermute", rows=rows, topk_weights=topk_weights)
    check_same_device("unpermute", rows=rows, topk_weights=topk_weights, **plan.named())
    if resolve_backend("unpermute", backend, rows, has_triton=True) == "triton":
        from kernels.dispatch_triton import unpermute_op

        return unpermute_op(rows.contiguous(), topk_weights.contiguous(), *plan[1:])
    return _Unpermute.apply(rows, plan, topk_weights)


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """The plan against a stable sort, and the weighted sum against indexing and `sum`."""
    shapes = ((4096, 256, 16, 4), (32768, 2048, 128, 8), (32768, 2048, 64, 8))
    builders = []
    for shape in shapes:
        for what, build in (("plan", _plan_case), ("combine", _combine_case)):
            name = "{} T{} D{} E{} K{}".format(what, *shape)
            builders.append(CaseBuilder(name, partial(build, name, shape, dtype, device)))
    return builders


def _plan_case(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Case:
    num_tokens, _, num_experts, top_k = shape
    torch.manual_seed(0)
    indices = torch.rand(num_tokens, num_experts, device=device).argsort(1)[:, :top_k]

    def sort() -> Tensor:
        return torch.sort(indices.reshape(-1), stable=True).indices // top_k

    return Case(
        name=name,
        ours=lambda backend: plan_dispatch(indices, num_experts, backend=backend).token_of_row,
        leaves=(),
        reference=sort,
        rivals={"stable sort alone": Contestant(sort, ())},
        grad=torch.zeros((), device=device),
        tokens=num_tokens,
    )


def _combine_case(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Case:
    num_tokens, hidden, num_experts, top_k = shape
    torch.manual_seed(0)
    indices = torch.rand(num_tokens, num_experts, device=device).argsort(1)[:, :top_k]
    plan = plan_dispatch(indices, num_experts)
    rows = leaf(plan.num_rows, hidden, dtype=dtype, device=device)
    weights = leaf(num_tokens, top_k, dtype=torch.float32, device=device)

    def indexed(rows: Tensor, weights: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        return (rows[plan.row_of].to(wide) * weights.unsqueeze(-1)).sum(1).to(rows.dtype)

    return Case(
        name=name,
        ours=lambda rows, weights, backend: unpermute(rows, plan, weights, backend=backend),
        leaves=(rows, weights),
        reference=indexed,
        rivals={"index, multiply, sum": Contestant(indexed, (rows, weights))},
        grad=torch.randn(num_tokens, hidden, device=device).to(dtype),
        tokens=num_tokens,
        moved_bytes=(plan.num_rows + num_tokens) * hidden * rows.element_size(),
    )
