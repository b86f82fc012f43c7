"""Triton kernels of `kernels.grouped_matmul`; the expert layer is built of them too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotCase
from kernels.grouped_tiles import (
    Groups,
    in_units,
    map_cases,
    matmul_cases,
    matmul_variant,
    rows_of_tile,
    swizzle,
)
from kernels.launch import first_derivative_only, on_device_of


@triton.jit
def _linear_kernel(
    rows_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    tile_map_ptr,
    num_tiles,
    num_experts,
    size_n,
    size_k,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # out[r, n] = scale[r] sum_k rows[r, k] weight[e, n, k]; 0 in unused rows.
    size_n, size_k = size_n * UNIT, size_k * UNIT
    blocks_n = tl.cdiv(size_n, BLOCK_N)
    tile, block_n = swizzle(tl.program_id(0), num_tiles, blocks_n, GROUP_M)
    expert, first, end = rows_of_tile(tile_map_ptr, num_tiles, tile)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Behind an edge the last row or column is read again: its result is not stored.
        from_row = tl.minimum(row, end - 1)[:, None] * size_k + k[None, :]
        from_column = tl.minimum(column, size_n - 1).to(tl.int64)[None, :] * size_k + k[:, None]
        weight_ptr += expert * size_n * size_k
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # Unused rows have no matrix, and no step.
        steps_end = tl.where(expert < num_experts, size_k, 0)
        for start in range(0, steps_end, BLOCK_K):
            left = size_k - start
            x = tl.load(rows_ptr + from_row + start, mask=k[None, :] < left, other=0.0)
            w = tl.load(weight_ptr + from_column + start, mask=k[:, None] < left, other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")
        if scale_ptr is not None:
            used = (row < end) & (expert < num_experts)
            total *= tl.load(scale_ptr + row, mask=used, other=0.0).to(tl.float32)[:, None]
        inside = (row < end)[:, None] & (column < size_n)[None, :]
        at = row[:, None] * size_n + column[None, :]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transposed_kernel(
    rows_ptr,
    weight_ptr,
    other_weight_ptr,
    out_ptr,
    tile_map_ptr,
    num_tiles,
    num_experts,
    size_n,
    size_k,
    HALVES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # out[r, n] = sum_k rows[r, k] weight[e, k, n]; 0 in unused rows. With two HALVES, rows has
    # 2 size_k columns, and the second half meets other_weight: one loop with one dot, since two
    # dots into one accumulator are miscompiled for some chips.
    size_n, size_k = size_n * UNIT, size_k * UNIT
    blocks_n = tl.cdiv(size_n, BLOCK_N)
    tile, block_n = swizzle(tl.program_id(0), num_tiles, blocks_n, GROUP_M)
    expert, first, end = rows_of_tile(tile_map_ptr, num_tiles, tile)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        from_row = tl.minimum(row, end - 1)[:, None] * (HALVES * size_k) + k[None, :]
        from_column = k.to(tl.int64)[:, None] * size_n + column[None, :]
        weight_ptr += expert * size_n * size_k
        other_weight_ptr += expert * size_n * size_k
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        steps = tl.cdiv(size_k, BLOCK_K)
        for step in range(0, tl.where(expert < num_experts, HALVES * steps, 0)):
            half = step // steps
            start = (step - half * steps) * BLOCK_K
            matrix_ptr = tl.where(half == 0, weight_ptr, other_weight_ptr)
            left = size_k - start
            x_at = rows_ptr + from_row + half * size_k + start
            w_at = matrix_ptr + from_column + tl.cast(start, tl.int64) * size_n
            x = tl.load(x_at, mask=k[None, :] < left, other=0.0)
            inside_w = (k[:, None] < left) & (column[None, :] < size_n)
            w = tl.load(w_at, mask=inside_w, other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")
        inside = (row < end)[:, None] & (column < size_n)[None, :]
        at = row[:, None] * size_n + column[None, :]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_grad_kernel(
    left_ptr,
    right_ptr,
    left_token_ptr,
    right_token_ptr,
    offset_ptr,
    out_ptr,
    other_out_ptr,
    size_m,
    size_n,
    HALVES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # out[e, m, n] = sum over the rows r of e of left[r, m] right[r, n]; 0 for an idle expert. A
    # side with a token pointer is read at the row's token. With two HALVES, left has 2 size_m
    # columns and the second half goes to other_out.
    size_m, size_n = size_m * UNIT, size_n * UNIT
    blocks_m, blocks_n = tl.cdiv(size_m, BLOCK_M), tl.cdiv(size_n, BLOCK_N)
    blocks = HALVES * blocks_m * blocks_n
    expert = tl.program_id(0) // blocks
    block_m, block_n = swizzle(
        tl.program_id(0) - expert * blocks, HALVES * blocks_m, blocks_n, GROUP_M
    )
    half = block_m // blocks_m
    m = (block_m - half * blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(offset_ptr + expert).to(tl.int64)
    end = tl.load(offset_ptr + expert + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK_K).to(tl.int64)
    left_ptr += half * size_m
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(first, end, BLOCK_K):
        row = start + lane
        inside = row < end
        left_row, right_row = row, row
        if left_token_ptr is not None:
            left_row = tl.load(left_token_ptr + row, mask=inside, other=0)
        if right_token_ptr is not None:
            right_row = tl.load(right_token_ptr + row, mask=inside, other=0)
        left_at = left_ptr + left_row[:, None] * (HALVES * size_m) + m[None, :]
        right_at = right_ptr + right_row[:, None] * size_n + n[None, :]
        left = tl.load(left_at, mask=inside[:, None] & (m < size_m)[None, :], other=0.0)
        right = tl.load(right_at, mask=inside[:, None] & (n < size_n)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    out_ptr = tl.where(half == 0, out_ptr, other_out_ptr) + expert.to(tl.int64) * size_m * size_n
    stored = (m < size_m)[:, None] & (n < size_n)[None, :]
    at = m.to(tl.int64)[:, None] * size_n + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=stored)


def grouped_linear(
    rows: Tensor, weight: Tensor, groups: Groups, scale: Tensor | None = None
) -> Tensor:
    """out[r] = scale[r] weight[e] @ rows[r] (R, N) of weight (E, N, K); 0 in unused rows."""
    size_n, size_k = weight.shape[1:]
    out = rows.new_empty(rows.shape[0], size_n)
    if out.numel():
        tile = groups.tile("grouped_linear", rows)
        block_m, block_n = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]
        num_tiles = groups.num_tiles(block_m)
        tensors = rows, weight, scale, out, groups.tile_map(block_m)
        unit, *sizes = in_units(size_n, size_k)
        counts = num_tiles, groups.num_experts
        grid = (num_tiles * triton.cdiv(size_n, block_n),)
        _linear_kernel[grid](*tensors, *counts, *sizes, UNIT=unit, **tile.options())
    return out


def transposed(rows: Tensor, weights: tuple[Tensor, ...], groups: Groups) -> Tensor:
    """out[r] = rows[r] @ weight[e] (R, N) of one weight (E, K, N), or of two, each of which meets
    its half of `rows` (R, 2K); 0 in unused rows."""
    size_k, size_n = weights[0].shape[1:]
    out = rows.new_empty(rows.shape[0], size_n)
    if out.numel():
        tile = groups.tile("grouped_transposed", rows)
        block_m, block_n = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]
        num_tiles = groups.num_tiles(block_m)
        tensors = rows, weights[0], weights[-1], out, groups.tile_map(block_m)
        unit, *sizes = in_units(size_n, size_k)
        constants = {"HALVES": len(weights), "UNIT": unit, **tile.options()}
        grid = (num_tiles * triton.cdiv(size_n, block_n),)
        _transposed_kernel[grid](*tensors, num_tiles, groups.num_experts, *sizes, **constants)
    return out


def weight_grads(
    left: Tensor,
    right: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    *,
    halves: int = 1,
    left_token: Tensor | None = None,
    right_token: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(E, M, N), the sum of left[r] right[r]^T over each expert's rows; of each half of `left`.

    A side with a token (R,) is (T, ...) and read at the token of each row. Every entry is stored,
    zeros for idle experts.
    """
    size_m, size_n = left.shape[1] // halves, right.shape[1]
    shape = groups.num_experts, size_m, size_n
    outs = tuple(left.new_empty(shape, dtype=dtype) for _ in range(halves))
    if outs[0].numel():
        tile = groups.tile("grouped_weight_grad", left)
        blocks = triton.cdiv(size_m, tile.blocks["BLOCK_M"]) * halves
        blocks *= triton.cdiv(size_n, tile.blocks["BLOCK_N"])
        tensors = left, right, left_token, right_token, groups.offsets, outs[0], outs[-1]
        grid = (groups.num_experts * blocks,)
        unit, *sizes = in_units(size_m, size_n)
        _weight_grad_kernel[grid](*tensors, *sizes, HALVES=halves, UNIT=unit, **tile.options())
    return outs


@torch.library.custom_op("sparse_moe_lm::grouped_matmul", mutates_args=())
def grouped_matmul_op(
    rows: Tensor, weight: Tensor, cast_weight: Tensor | None, expert_offsets: Tensor
) -> Tensor:
    """(R, D_out) of rows (R, D_in); `cast_weight` is `weight` in the dtype of `rows`, None if it is
    in it: the gradient is then that of `weight`, in its own dtype, without another rounding."""
    matrices = weight if cast_weight is None else cast_weight
    with on_device_of(rows):
        return grouped_linear(rows, matrices, Groups(expert_offsets, rows.shape[0]))


@grouped_matmul_op.register_fake
def _(rows, weight, cast_weight, expert_offsets):
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("sparse_moe_lm::grouped_matmul_backward", mutates_args=())
def grouped_matmul_backward_op(
    grad: Tensor,
    rows: Tensor,
    matrices: Tensor,
    expert_offsets: Tensor,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of rows (R, D_in), 0 where unused, and of the matrices (E, D_out, D_in); empty
    for that of the two that `needs` leaves out."""
    groups, grad = Groups(expert_offsets, rows.shape[0]), grad.contiguous()
    grad_rows, grad_weight = rows.new_empty(0), rows.new_empty(0, dtype=dtype)
    with on_device_of(grad):
        if needs[0]:
            grad_rows = transposed(grad, (matrices,), groups)
        if needs[1]:
            (grad_weight,) = weight_grads(grad, rows, groups, dtype)
    return grad_rows, grad_weight


@grouped_matmul_backward_op.register_fake
def _(grad, rows, matrices, expert_offsets, dtype, needs):
    grad_rows = torch.empty_like(rows) if needs[0] else rows.new_empty(0)
    shape = matrices.shape if needs[1] else (0,)
    return grad_rows, rows.new_empty(shape, dtype=dtype)


def _save(ctx, inputs, output):
    rows, weight, cast_weight, expert_offsets = inputs
    ctx.save_for_backward(rows, weight if cast_weight is None else cast_weight, expert_offsets)
    ctx.weight_dtype = weight.dtype


@first_derivative_only
def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:2])
    grads = grouped_matmul_backward_op(grad, *ctx.saved_tensors, ctx.weight_dtype, needs)
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), None, None


grouped_matmul_op.register_autograd(_backward, setup_context=_save)


# Weights in float32 have gradients in float32, whatever the matmuls run in.
FLOAT32_OUT = {"out_ptr": torch.float32, "other_out_ptr": torch.float32}


def aot_cases() -> list[AotCase]:
    """Every tile that ships."""
    scale, offset = {"scale_ptr": None}, {"offset_ptr": torch.int64}
    no_tokens = offset | dict.fromkeys(("left_token_ptr", "right_token_ptr"))
    one = {"HALVES": 1}
    return [
        *matmul_cases("grouped_linear", _linear_kernel, scale, {}),
        *matmul_cases("grouped_transposed", _transposed_kernel, {}, one),
        *matmul_cases("grouped_weight_grad", _weight_grad_kernel, no_tokens, one),
        *matmul_variant(
            "float32-out", "grouped_weight_grad", _weight_grad_kernel, no_tokens | FLOAT32_OUT, one
        ),
        *map_cases(),
    ]


def expert_layer_cases() -> list[AotCase]:
    """As `aot_cases`, with the operands that the expert layer passes to these kernels.

    Rows that arrive sorted have no tokens. What `aot_cases` holds is not repeated.
    """
    offset, int64 = {"offset_ptr": torch.int64}, torch.int64
    gather_left = offset | {"left_token_ptr": int64, "right_token_ptr": None}
    gather_right = offset | {"left_token_ptr": None, "right_token_ptr": int64}
    name, kernel = "grouped_weight_grad", _weight_grad_kernel
    in_float32 = [
        *matmul_variant("float32-out", name, kernel, gather_left | FLOAT32_OUT, {"HALVES": 1}),
        *matmul_variant("float32-out", name, kernel, gather_right | FLOAT32_OUT, {"HALVES": 2}),
    ]
    no_tokens = offset | dict.fromkeys(("left_token_ptr", "right_token_ptr"))
    return [
        *matmul_cases("grouped_linear", _linear_kernel, {"scale_ptr": torch.float32}, {}),
        *matmul_cases("grouped_transposed", _transposed_kernel, {}, {"HALVES": 2}),
        *matmul_cases(name, kernel, gather_left, {"HALVES": 1}),
        *matmul_cases(name, kernel, gather_right, {"HALVES": 2}),
        # Mixed precision trains so: not rare.
        *(case._replace(rare=False) for case in in_float32),
        *matmul_variant("sorted", name, kernel, no_tokens, {"HALVES": 2}),
        *matmul_variant("sorted float32-out", name, kernel, no_tokens | FLOAT32_OUT, {"HALVES": 2}),
    ]
