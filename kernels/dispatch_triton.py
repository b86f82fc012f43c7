"""Triton kernels of `kernels.dispatch`: the plan, permute and unpermute, without a synchronisation.

The plan is a counting sort in three launches. Assignments are cut into tiles; each tile counts its
assignments of each expert; one running sum over (expert, tile) is the first row of each tile's
share of each expert; within a tile, an assignment comes after those before it of its expert.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotCase
from kernels.launch import MATMUL_DTYPES, on_device_of
from kernels.tiles import Tile

PLAN_TILE = Tile({"BLOCK": 128}, num_warps=8, num_stages=1)
# Elements of the block of a program that moves rows.
BLOCK_ELEMENTS = 2048


@triton.jit
def _count_kernel(
    index_ptr,
    count_ptr,
    num_assignments,
    num_experts,
    num_tiles,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index_ptr + at, mask=at < num_assignments, other=0).to(tl.int32)
    # Dropped assignments are those of one more expert, and lanes behind the end of yet another.
    expert = tl.where((expert < 0) | (expert > num_experts), num_experts, expert)
    expert = tl.where(at < num_assignments, expert, num_experts + 1)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(expert, BINS)
    tl.store(count_ptr + bins.to(tl.int64) * num_tiles + tile, counts, mask=bins <= num_experts)


@triton.jit
def _place_kernel(
    index_ptr,
    ends_ptr,
    tokens_per_expert_ptr,
    offset_ptr,
    token_of_row_ptr,
    row_of_ptr,
    num_assignments,
    num_experts,
    num_tiles,
    top_k,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # ends (E+1, tiles): the running sum of the counts, so each share begins where the last ends.
    tile = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    at = tile * BLOCK + lane
    inside = at < num_assignments
    expert = tl.load(index_ptr + at, mask=inside, other=0).to(tl.int32)
    dropped = (expert < 0) | (expert > num_experts)
    expert = tl.where(dropped, num_experts, expert)
    share = expert.to(tl.int64) * num_tiles + tile
    start = tl.load(ends_ptr + share - 1, mask=inside & (share > 0), other=0)
    earlier = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    row = start + tl.sum(earlier.to(tl.int32), 1)
    tl.store(row_of_ptr + at, tl.where(dropped, -1, row).to(tl.int64), mask=inside)
    tl.store(token_of_row_ptr + row, (at // top_k).to(tl.int64), mask=inside)
    if tile == 0:
        bins = tl.arange(0, BINS)
        shares = bins.to(tl.int64) * num_tiles
        has_start = (bins > 0) & (bins <= num_experts)
        first = tl.load(ends_ptr + shares - 1, mask=has_start, other=0).to(tl.int64)
        is_expert = bins < num_experts
        end = tl.load(ends_ptr + shares + num_tiles - 1, mask=is_expert, other=0).to(tl.int64)
        tl.store(offset_ptr + bins, first, mask=bins <= num_experts)
        tl.store(tokens_per_expert_ptr + bins, end - first, mask=is_expert)


@triton.jit
def _gather_kernel(
    x_ptr,
    token_of_row_ptr,
    out_ptr,
    num_rows,
    size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    token = tl.load(token_of_row_ptr + row, mask=row < num_rows, other=0)
    x = tl.load(x_ptr + token[:, None] * size + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + row[:, None] * size + column[None, :], x, mask=inside)


@triton.jit
def _gather_sum_kernel(
    rows_ptr,
    row_of_ptr,
    weight_ptr,
    out_ptr,
    num_tokens,
    size,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    total = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_ptr + token * TOP_K + k, mask=token < num_tokens, other=-1)
        assigned = (row >= 0)[:, None] & (column < size)[None, :]
        at = row[:, None] * size + column[None, :]
        value = tl.load(rows_ptr + at, mask=assigned, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + token * TOP_K + k, mask=row >= 0, other=0.0)
            value *= weight.to(tl.float32)[:, None]
        total += value
    inside = (token < num_tokens)[:, None] & (column < size)[None, :]
    at = token[:, None] * size + column[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _unpermute_backward_kernel(
    grad_ptr,
    rows_ptr,
    offset_ptr,
    token_of_row_ptr,
    row_of_ptr,
    weight_ptr,
    grad_rows_ptr,
    grad_weight_ptr,
    num_rows,
    num_experts,
    size,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    used = row < tl.load(offset_ptr + num_experts)
    token = tl.load(token_of_row_ptr + row, mask=used, other=0)
    # Which of its token's assignments a row is: the one that points back to it.
    slot = tl.arange(0, SLOTS)
    assignment = token[:, None] * TOP_K + slot[None, :]
    filled = used[:, None] & (slot < TOP_K)[None, :]
    match = tl.load(row_of_ptr + assignment, mask=filled, other=-1) == row[:, None]
    weights = tl.load(weight_ptr + assignment, mask=filled & match, other=0.0)
    weight = tl.sum(weights.to(tl.float32), 1)
    own = tl.sum(tl.where(match, slot[None, :], 0), 1)
    total = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], dtype=tl.float32)
    for start in range(0, size, BLOCK_SIZE):
        column = start + tl.arange(0, BLOCK_SIZE)
        here = (column < size)[None, :]
        at = row[:, None] * size + column[None, :]
        from_token = token[:, None] * size + column[None, :]
        grad = tl.load(grad_ptr + from_token, mask=used[:, None] & here, other=0.0).to(tl.float32)
        value = tl.load(rows_ptr + at, mask=used[:, None] & here, other=0.0).to(tl.float32)
        total += grad * value
        out = (grad * weight[:, None]).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + at, out, mask=(row < num_rows)[:, None] & here)
    grad_weight = tl.sum(total, 1).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + token * TOP_K + own, grad_weight, mask=used)


def _row_tile(size: int) -> Tile:
    block_size = min(1024, triton.next_power_of_2(max(size, 1)))
    return Tile({"BLOCK_ROWS": min(64, BLOCK_ELEMENTS // block_size), "BLOCK_SIZE": block_size})


def _row_grid(num_rows: int, size: int, tile: Tile) -> tuple[int, int]:
    blocks = tile.blocks
    return triton.cdiv(num_rows, blocks["BLOCK_ROWS"]), triton.cdiv(size, blocks["BLOCK_SIZE"])


@torch.library.custom_op("sparse_moe_lm::plan_dispatch", mutates_args=())
def plan_dispatch_op(
    topk_indices: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a DispatchPlan, of topk_indices (T, K)."""
    index = topk_indices.contiguous()
    num_tiles = max(1, triton.cdiv(index.numel(), PLAN_TILE.blocks["BLOCK"]))
    bins = triton.next_power_of_2(num_experts + 2)
    counts = index.new_empty((num_experts + 1) * num_tiles, dtype=torch.int32)
    tokens_per_expert, offsets, token_of_row, row_of = _empty_plan(index, num_experts)
    sizes = index.numel(), num_experts, num_tiles
    options = {"BINS": bins, **PLAN_TILE.options()}
    with on_device_of(index):
        _count_kernel[(num_tiles,)](index, counts, *sizes, **options)
        ends = counts.cumsum(0, dtype=torch.int32)
        tensors = index, ends, tokens_per_expert, offsets, token_of_row, row_of
        _place_kernel[(num_tiles,)](*tensors, *sizes, max(index.shape[1], 1), **options)
    return tokens_per_expert, offsets, token_of_row, row_of


def _empty_plan(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return index.new_empty(shape, dtype=torch.int64)

    return empty(num_experts), empty(num_experts + 1), empty(index.numel()), empty(*index.shape)


@plan_dispatch_op.register_fake
def _(topk_indices, num_experts):
    return _empty_plan(topk_indices, num_experts)


def gather_sum(rows: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum_k weights[t, k] * rows[row_of[t, k]] (T, D); -1 adds nothing, None is 1.

    All contiguous. Accumulated in float32, in the order of k.
    """
    (num_tokens, top_k), size = row_of.shape, rows.shape[1]
    out = rows.new_empty(num_tokens, size)
    tile = _row_tile(size)
    if out.numel():
        tensors = rows, row_of, weights, out
        grid = _row_grid(num_tokens, size, tile)
        _gather_sum_kernel[grid](*tensors, num_tokens, size, TOP_K=top_k, **tile.options())
    return out


@torch.library.custom_op("sparse_moe_lm::permute", mutates_args=())
def permute_op(x: Tensor, token_of_row: Tensor, row_of: Tensor) -> Tensor:
    """rows (R, D) of x (T, D)."""
    num_rows, size = token_of_row.numel(), x.shape[1]
    rows = x.new_empty(num_rows, size)
    tile = _row_tile(size)
    if rows.numel():
        grid = _row_grid(num_rows, size, tile)
        with on_device_of(x):
            _gather_kernel[grid](x, token_of_row, rows, num_rows, size, **tile.options())
    return rows


@permute_op.register_fake
def _(x, token_of_row, row_of):
    return x.new_empty(token_of_row.numel(), x.shape[1])


@torch.library.custom_op("sparse_moe_lm::permute_backward", mutates_args=())
def permute_backward_op(grad_rows: Tensor, row_of: Tensor) -> Tensor:
    """Gradient (T, D) of the tokens."""
    with on_device_of(grad_rows):
        return gather_sum(grad_rows.contiguous(), row_of.contiguous(), None)


@permute_backward_op.register_fake
def _(grad_rows, row_of):
    return grad_rows.new_empty(row_of.shape[0], grad_rows.shape[1])


def _save_permute(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _backward_permute(ctx, grad_rows):
    return permute_backward_op(grad_rows, *ctx.saved_tensors), None, None


permute_op.register_autograd(_backward_permute, setup_context=_save_permute)


@torch.library.custom_op("sparse_moe_lm::unpermute", mutates_args=())
def unpermute_op(
    rows: Tensor, weights: Tensor, expert_offsets: Tensor, token_of_row: Tensor, row_of: Tensor
) -> Tensor:
    """out (T, D) of rows (R, D) and weights (T, K)."""
    with on_device_of(rows):
        return gather_sum(rows, row_of.contiguous(), weights)


@unpermute_op.register_fake
def _(rows, weights, expert_offsets, token_of_row, row_of):
    return rows.new_empty(row_of.shape[0], rows.shape[1])


@torch.library.custom_op("sparse_moe_lm::unpermute_backward", mutates_args=())
def unpermute_backward_op(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    expert_offsets: Tensor,
    token_of_row: Tensor,
    row_of: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows (R, D), 0 where unused, and of weights (T, K)."""
    (num_rows, size), top_k = rows.shape, weights.shape[1]
    grad_rows, grad_weights = torch.empty_like(rows), torch.zeros_like(weights)
    tile = _row_tile(size)
    if num_rows:
        grid = _row_grid(num_rows, size, tile)[:1]
        plan = expert_offsets, token_of_row, row_of.contiguous()
        tensors = grad.contiguous(), rows, *plan, weights, grad_rows, grad_weights
        sizes = num_rows, expert_offsets.numel() - 1, size
        slots = {"TOP_K": top_k, "SLOTS": triton.next_power_of_2(top_k)}
        with on_device_of(grad):
            _unpermute_backward_kernel[grid](*tensors, *sizes, **slots, **tile.options())
    return grad_rows, grad_weights


@unpermute_backward_op.register_fake
def _(grad, rows, weights, expert_offsets, token_of_row, row_of):
    return torch.empty_like(rows), torch.empty_like(weights)


def _save_unpermute(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_unpermute(ctx, grad):
    # One kernel makes both; what nobody needs is at least not handed on.
    grads = unpermute_backward_op(grad, *ctx.saved_tensors)
    needed = (g if needs else None for g, needs in zip(grads, ctx.needs_input_grad, strict=False))
    return *needed, None, None, None


unpermute_op.register_autograd(_backward_unpermute, setup_context=_save_unpermute)


def aot_cases() -> list[AotCase]:
    """The plan for 8 and 256 experts; moving rows of a small and a large vector."""
    cases = []
    sizes: dict[str, Any] = dict.fromkeys(("num_assignments", "num_experts", "num_tiles"), int)
    for num_experts in (8, 256):
        bins = {"BINS": triton.next_power_of_2(num_experts + 2)}
        count = {"index_ptr": torch.int64, "count_ptr": torch.int32}
        outputs = ("tokens_per_expert_ptr", "offset_ptr", "token_of_row_ptr", "row_of_ptr")
        place: dict[str, Any] = dict.fromkeys(("index_ptr", *outputs), torch.int64)
        place |= {"ends_ptr": torch.int32, "top_k": int}
        cases += [
            AotCase(_count_kernel, count | sizes, PLAN_TILE, bins),
            AotCase(_place_kernel, place | sizes, PLAN_TILE, bins),
        ]
    for size in (128, 2048):
        for dtype in MATMUL_DTYPES:
            cases += _row_cases(size, dtype)
    return cases


def _row_cases(size: int, dtype: torch.dtype) -> list[AotCase]:
    tile, top_k, divisible = _row_tile(size), {"TOP_K": 8}, ("size",)
    plan: dict[str, Any] = dict.fromkeys(
        ("offset_ptr", "token_of_row_ptr", "row_of_ptr"), torch.int64
    )
    sizes: dict[str, Any] = dict.fromkeys(("num_rows", "num_tokens", "num_experts", "size"), int)
    rows: dict[str, Any] = dict.fromkeys(
        ("x_ptr", "rows_ptr", "out_ptr", "grad_ptr", "grad_rows_ptr"), dtype
    )
    known = rows | plan | sizes | {"weight_ptr": torch.float32, "grad_weight_ptr": torch.float32}
    slots = top_k | {"SLOTS": 8}
    return [
        AotCase(_gather_kernel, known, tile, divisible=divisible),
        AotCase(_gather_sum_kernel, known, tile, top_k, divisible),
        AotCase(
            _gather_sum_kernel, known | {"weight_ptr": None}, tile, top_k, divisible, name="sum"
        ),
        AotCase(_unpermute_backward_kernel, known, tile, slots, divisible),
    ]
