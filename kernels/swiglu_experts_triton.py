"""Triton kernels of `kernels.swiglu_experts`, forward and backward; names as in its formulas.

    forward                                             backward
    F1  H = gate, up = w1 x, w3 x; a = silu(gate) up    B1  da' = w2^T g, ds = <da', a>, s a, dH
    F2  y = w2 a                                        B2  dw2 = sum g (s a)^T
    F3  out = sum_k s y                                 B3  dx of each row = w1^T dgate + w3^T dup
                                                        B4  dx = sum over the token's rows
                                                        B5  dw1, dw3 = sum dgate x^T, sum dup x^T

F1, B1, B2 and B5 read x and g at the token of each row: no gathered copy of them is ever stored,
and y lives only until F3. Rows that arrive sorted (without a plan) are read where they lie; then
F2 applies the scale, and F3 and B4 have nothing to do. F2, B2, B3 and B5 are the kernels of
`kernels.grouped_matmul_triton`, F3 and B4 those of `kernels.dispatch_triton`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotCase
from kernels.dispatch import weights_by_row
from kernels.dispatch_triton import gather_sum
from kernels.grouped_matmul_triton import (
    Groups,
    expert_layer_cases,
    grouped_linear,
    in_units,
    matmul_cases,
    rows_of_tile,
    swizzle,
    transposed,
    weight_grads,
)
from kernels.launch import first_derivative_only, on_device_of
from kernels.tiles import Tile


@triton.jit
def _clamped(gate, up, clamp, CLAMP: tl.constexpr):
    if CLAMP:
        # Comparisons, not minimum and maximum: those would hide a NaN.
        gate = tl.where(gate > clamp, clamp, gate)
        up = tl.where(up > clamp, clamp, tl.where(up < -clamp, -clamp, up))
    return gate, up


@triton.jit
def _up_kernel(
    x_ptr,
    token_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    h_ptr,
    a_ptr,
    tile_map_ptr,
    num_tiles,
    num_experts,
    size_n,
    size_k,
    clamp,
    CLAMP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # F1, and H alone where the backward pass makes it again. Unused rows are left as they are.
    size_n, size_k = size_n * UNIT, size_k * UNIT
    blocks_n = tl.cdiv(size_n, BLOCK_N)
    tile, block_n = swizzle(tl.program_id(0), num_tiles, blocks_n, GROUP_M)
    expert, first, end = rows_of_tile(tile_map_ptr, num_tiles, tile)
    if (first < end) & (expert < num_experts):
        row = first + tl.arange(0, BLOCK_M)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Behind an edge the last row or column is read again: its result is not stored.
        source = tl.minimum(row, end - 1)
        if token_ptr is not None:
            source = tl.load(token_ptr + source)
        from_row = source[:, None] * size_k + k[None, :]
        from_column = tl.minimum(column, size_n - 1).to(tl.int64)[None, :] * size_k + k[:, None]
        gate_weight_ptr += expert * size_n * size_k
        up_weight_ptr += expert * size_n * size_k
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, size_k, BLOCK_K):
            left = size_k - start
            inside_w = k[:, None] < left
            x = tl.load(x_ptr + from_row + start, mask=k[None, :] < left, other=0.0)
            w = tl.load(gate_weight_ptr + from_column + start, mask=inside_w, other=0.0)
            gate = tl.dot(x, w, gate, input_precision="ieee")
            w = tl.load(up_weight_ptr + from_column + start, mask=inside_w, other=0.0)
            up = tl.dot(x, w, up, input_precision="ieee")
        inside = (row < end)[:, None] & (column < size_n)[None, :]
        dtype = x_ptr.dtype.element_ty
        # Rounded as H is stored: so the backward pass finds the values that made a.
        gate, up = gate.to(dtype), up.to(dtype)
        if h_ptr is not None:
            at_h = row[:, None] * (2 * size_n) + column[None, :]
            tl.store(h_ptr + at_h, gate, mask=inside)
            tl.store(h_ptr + at_h + size_n, up, mask=inside)
        if a_ptr is not None:
            g, u = _clamped(gate.to(tl.float32), up.to(tl.float32), clamp, CLAMP)
            a = g / (1.0 + tl.exp(-g)) * u
            tl.store(a_ptr + row[:, None] * size_n + column[None, :], a.to(dtype), mask=inside)


@triton.jit
def _columns_in_halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _part_backward(
    grad_a,
    row,
    column,
    end,
    scale,
    h_ptr,
    a_ptr,
    scaled_a_ptr,
    grad_h_ptr,
    size_n,
    clamp,
    CLAMP: tl.constexpr,
):
    """Stores s a and dH of a part of the columns; returns its part of ds."""
    inside = (row < end)[:, None] & (column < size_n)[None, :]
    at_h = row[:, None] * (2 * size_n) + column[None, :]
    at_a = row[:, None] * size_n + column[None, :]
    raw_gate = tl.load(h_ptr + at_h, mask=inside, other=0.0).to(tl.float32)
    raw_up = tl.load(h_ptr + at_h + size_n, mask=inside, other=0.0).to(tl.float32)
    gate, up = _clamped(raw_gate, raw_up, clamp, CLAMP)
    dtype = h_ptr.dtype.element_ty
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if a_ptr is not None:
        a = tl.load(a_ptr + at_a, mask=inside, other=0.0).to(tl.float32)
    else:
        a = (gate / (1.0 + tl.exp(-gate)) * up).to(dtype).to(tl.float32)
    grad_scale = tl.sum(tl.where(inside, grad_a * a, 0.0), 1)
    tl.store(scaled_a_ptr + at_a, (a * scale[:, None]).to(dtype), mask=inside)
    # From here on da = s da'.
    grad_a *= scale[:, None]
    grad_up = grad_a * gate * sigmoid
    grad_gate = grad_a * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if CLAMP:
        grad_gate = tl.where(raw_gate > clamp, 0.0, grad_gate)
        grad_up = tl.where(tl.abs(raw_up) > clamp, 0.0, grad_up)
    tl.store(grad_h_ptr + at_h, grad_gate.to(dtype), mask=inside)
    tl.store(grad_h_ptr + at_h + size_n, grad_up.to(dtype), mask=inside)
    return grad_scale


@triton.jit
def _down_backward_kernel(
    grad_ptr,
    token_ptr,
    weight_ptr,
    h_ptr,
    a_ptr,
    scale_ptr,
    scaled_a_ptr,
    grad_h_ptr,
    partial_ptr,
    tile_map_ptr,
    num_rows,
    num_tiles,
    num_experts,
    size_n,
    size_k,
    clamp,
    CLAMP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # B1. partial (blocks of N, R): each block's part of ds, added up later in a fixed order.
    size_n, size_k = size_n * UNIT, size_k * UNIT
    blocks_n = tl.cdiv(size_n, BLOCK_N)
    tile, block_n = swizzle(tl.program_id(0), num_tiles, blocks_n, GROUP_M)
    expert, first, end = rows_of_tile(tile_map_ptr, num_tiles, tile)
    if (first < end) & (expert < num_experts):
        row = first + tl.arange(0, BLOCK_M)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        source = tl.minimum(row, end - 1)
        if token_ptr is not None:
            source = tl.load(token_ptr + source)
        from_row = source[:, None] * size_k + k[None, :]
        from_column = k.to(tl.int64)[:, None] * size_n + column[None, :]
        weight_ptr += expert * size_n * size_k
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)  # da'
        for start in range(0, size_k, BLOCK_K):
            left = size_k - start
            w_at = weight_ptr + from_column + tl.cast(start, tl.int64) * size_n
            inside_w = (k[:, None] < left) & (column[None, :] < size_n)
            g = tl.load(grad_ptr + from_row + start, mask=k[None, :] < left, other=0.0)
            w = tl.load(w_at, mask=inside_w, other=0.0)
            total = tl.dot(g, w, total, input_precision="ieee")
        scale = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row, mask=row < end, other=0.0).to(tl.float32)
        # In quarters of the columns: all at once, the values at hand exceed the registers.
        quarter: tl.constexpr = BLOCK_N // 4
        low, high = _columns_in_halves(total, BLOCK_M, BLOCK_N)
        column = block_n * BLOCK_N + tl.arange(0, quarter)
        grad_scale = tl.zeros([BLOCK_M], dtype=tl.float32)
        for half in tl.static_range(2):
            one, two = _columns_in_halves(low if half == 0 else high, BLOCK_M, BLOCK_N // 2)
            for part in tl.static_range(2):
                grad_scale += _part_backward(
                    one if part == 0 else two,
                    row,
                    column + (2 * half + part) * quarter,
                    end,
                    scale,
                    h_ptr,
                    a_ptr,
                    scaled_a_ptr,
                    grad_h_ptr,
                    size_n,
                    clamp,
                    CLAMP,
                )
        at = block_n.to(tl.int64) * num_rows + row
        tl.store(partial_ptr + at, grad_scale, mask=row < end)


@triton.jit
def _sum_partials_kernel(
    partial_ptr,
    row_of_ptr,
    offset_ptr,
    out_ptr,
    count,
    num_rows,
    num_experts,
    num_parts,
    BLOCK: tl.constexpr,
):
    # ds of each assignment, or of each row without a plan; 0 where there is none.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if row_of_ptr is not None:
        row = tl.load(row_of_ptr + at, mask=at < count, other=-1)
        used = row >= 0
    else:
        row = at
        used = at < tl.load(offset_ptr + num_experts)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(0, num_parts):
        part_ptr = partial_ptr + tl.cast(part, tl.int64) * num_rows
        total += tl.load(part_ptr + row, mask=used, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < count)


def _up(x, w1, w3, token, groups: Groups, clamp: float | None, *, keep_h: bool, make_a: bool):
    """H (R, 2F) and a (R, F) as far as they are asked for; those of unused rows are undefined."""
    inner, hidden = w1.shape[1:]
    h = x.new_empty(groups.num_rows, 2 * inner) if keep_h else None
    a = x.new_empty(groups.num_rows, inner) if make_a else None
    if groups.num_rows and inner:
        tile = groups.tile("swiglu_up", x)
        num_tiles = groups.num_tiles(tile.blocks["BLOCK_M"])
        tensors = x, token, w1, w3, h, a, groups.tile_map(tile.blocks["BLOCK_M"])
        unit, *sizes = in_units(inner, hidden)
        numbers = num_tiles, groups.num_experts, *sizes, clamp or 0.0
        constants = {"CLAMP": clamp is not None, "UNIT": unit, **tile.options()}
        grid = (num_tiles * triton.cdiv(inner, tile.blocks["BLOCK_N"]),)
        _up_kernel[grid](*tensors, *numbers, **constants)
    return h, a


def _down_backward(grad, w2, h, a, scale, token, groups: Groups, clamp: float | None):
    """s a (R, F), dH (R, 2F), and the parts of ds (blocks, R)."""
    hidden, inner = w2.shape[1:]
    scaled_a, grad_h = h.new_empty(h.shape[0], inner), torch.empty_like(h)
    tile = groups.tile("swiglu_backward", h)
    blocks_n = triton.cdiv(inner, tile.blocks["BLOCK_N"])
    partial = h.new_empty(blocks_n, h.shape[0], dtype=torch.float32)
    if groups.num_rows and inner:
        num_tiles = groups.num_tiles(tile.blocks["BLOCK_M"])
        tensors = grad, token, w2, h, a, scale, scaled_a, grad_h, partial
        tile_map = groups.tile_map(tile.blocks["BLOCK_M"])
        unit, *sizes = in_units(inner, hidden)
        numbers = groups.num_rows, num_tiles, groups.num_experts, *sizes, clamp or 0.0
        constants = {"CLAMP": clamp is not None, "UNIT": unit, **tile.options()}
        grid = (num_tiles * blocks_n,)
        _down_backward_kernel[grid](*tensors, tile_map, *numbers, **constants)
    return scaled_a, grad_h, partial


def _sum_partials(partial: Tensor, like: Tensor, row_of: Tensor | None, groups: Groups) -> Tensor:
    out = torch.empty_like(like)
    if out.numel():
        tensors = partial, row_of, groups.offsets, out
        sizes = out.numel(), groups.num_rows, groups.num_experts, partial.shape[0]
        _sum_partials_kernel[(triton.cdiv(out.numel(), 256),)](*tensors, *sizes, BLOCK=256)
    return out


@torch.library.custom_op("sparse_moe_lm::swiglu_experts", mutates_args=())
def swiglu_experts_op(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    scale: Tensor | None,
    casts: list[Tensor],
    expert_offsets: Tensor,
    token_of_row: Tensor | None,
    row_of: Tensor | None,
    clamp: float | None,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, and H and a as far as `keep` (`h`, `ha` or nothing) names them, else empty.

    With a plan (token_of_row, row_of) x and out are (T, D) and scale (T, K); without one they are
    (R, D) and (R,), and scale may be absent. `casts` are w1, w2, w3 in the dtype of x, nothing if
    they are in it: gradients are those of w1, w2, w3, in their dtype, without another rounding.
    """
    up, down, other = casts or (w1, w2, w3)
    groups = Groups(expert_offsets, x.shape[0] if token_of_row is None else token_of_row.numel())
    with on_device_of(x):
        h, a = _up(x, up, other, token_of_row, groups, clamp, keep_h="h" in keep, make_a=True)
        if row_of is None:
            out = grouped_linear(a, down, groups, scale)
        else:
            out = gather_sum(grouped_linear(a, down, groups), row_of, scale)  # (T, D)
    return out, x.new_empty(0) if h is None else h, a if "a" in keep else x.new_empty(0)


@swiglu_experts_op.register_fake
def _(x, w1, w2, w3, scale, casts, expert_offsets, token_of_row, row_of, clamp, keep):
    num_rows, inner = x.shape[0] if token_of_row is None else token_of_row.numel(), w1.shape[1]
    h = x.new_empty(num_rows, 2 * inner) if "h" in keep else x.new_empty(0)
    a = x.new_empty(num_rows, inner) if "a" in keep else x.new_empty(0)
    return torch.empty_like(x), h, a


@torch.library.custom_op("sparse_moe_lm::swiglu_experts_backward", mutates_args=())
def swiglu_experts_backward_op(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    scale: Tensor | None,
    expert_offsets: Tensor,
    token_of_row: Tensor | None,
    row_of: Tensor | None,
    h: Tensor,
    a: Tensor,
    clamp: float | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2, w3 (in `dtype`) and scale; empty for those of the five that `needs`
    leaves out, but w1 and w3 get theirs together."""
    groups = Groups(expert_offsets, x.shape[0] if token_of_row is None else token_of_row.numel())
    kept, rows = (h, a if a.numel() else None), (token_of_row, row_of)
    with on_device_of(grad):
        return _gradients(
            grad.contiguous(), x, (w1, w2, w3), scale, kept, rows, groups, clamp, dtype, needs
        )


def _gradients(grad, x, matrices, scale, kept, rows, groups: Groups, clamp, dtype, needs):
    (w1, w2, w3), (h, a), (token_of_row, row_of) = matrices, kept, rows
    if h.numel() == 0:
        h, _ = _up(x, w1, w3, token_of_row, groups, clamp, keep_h=True, make_a=False)
    by_row = scale
    if row_of is not None and scale is not None:
        by_row = weights_by_row(row_of, scale)
    scaled_a, grad_h, partial = _down_backward(grad, w2, h, a, by_row, token_of_row, groups, clamp)
    grad_x, grad_scale = x.new_empty(0), x.new_empty(0)
    # A tensor each: an operator must not return one twice.
    grad_w1, grad_w2, grad_w3 = (x.new_empty(0, dtype=dtype) for _ in range(3))
    if needs[2]:
        (grad_w2,) = weight_grads(grad, scaled_a, groups, dtype, left_token=token_of_row)
    del scaled_a
    if needs[0]:
        grad_rows = transposed(grad_h, (w1, w3), groups)  # (R, D)
        grad_x = grad_rows if row_of is None else gather_sum(grad_rows, row_of, None)
        del grad_rows
    if needs[1] or needs[3]:
        # One kernel makes both.
        grad_w1, grad_w3 = weight_grads(
            grad_h, x, groups, dtype, halves=2, right_token=token_of_row
        )
    if needs[4]:
        grad_scale = _sum_partials(partial, scale, row_of, groups)
    return grad_x, grad_w1, grad_w2, grad_w3, grad_scale


@swiglu_experts_backward_op.register_fake
def _(grad, x, w1, w2, w3, scale, offsets, token_of_row, row_of, h, a, clamp, dtype, needs):
    both = needs[1] or needs[3]
    weights = (
        x.new_empty(w.shape if needed else (0,), dtype=dtype)
        for w, needed in zip((w1, w2, w3), (both, needs[2], both), strict=True)
    )
    return (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        *weights,
        torch.empty_like(scale) if needs[4] else x.new_empty(0),
    )


def _save(ctx, inputs, output):
    x, w1, w2, w3, scale, casts, offsets, token_of_row, row_of, clamp, _ = inputs
    matrices = casts or (w1, w2, w3)
    ctx.save_for_backward(x, *matrices, scale, offsets, token_of_row, row_of, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.clamp, ctx.dtype, ctx.num_casts = clamp, w1.dtype, len(casts)


@first_derivative_only
def _backward(ctx, grad, _grad_h, _grad_a):
    # Once: activation checkpointing unpacks them one time only.
    saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:5])
    grads = swiglu_experts_backward_op(grad, *saved, ctx.clamp, ctx.dtype, needs)
    needed = (g if needs_it else None for g, needs_it in zip(grads, needs, strict=True))
    plan = None, None, None
    return *needed, [None] * ctx.num_casts, *plan, None, None


swiglu_experts_op.register_autograd(_backward, setup_context=_save)


def aot_cases() -> list[AotCase]:
    """Every tile that ships, of these and the shared kernels, with the layer's operands."""
    types = {"token_ptr": torch.int64, "clamp": float}
    backward = types | {"scale_ptr": torch.float32, "partial_ptr": torch.float32, "a_ptr": None}
    cases = expert_layer_cases()
    for clamp in (False, True):
        constants = {"CLAMP": clamp}
        cases += matmul_cases("swiglu_up", _up_kernel, types, constants)
        cases += matmul_cases("swiglu_backward", _down_backward_kernel, backward, constants)
    known: dict[str, Any] = {
        "partial_ptr": torch.float32,
        "row_of_ptr": torch.int64,
        "offset_ptr": torch.int64,
    }
    known |= {"out_ptr": torch.float32}
    known |= dict.fromkeys(("count", "num_rows", "num_experts", "num_parts"), int)
    cases.append(AotCase(_sum_partials_kernel, known, Tile({"BLOCK": 256})))
    return cases
