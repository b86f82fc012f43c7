"""The Triton kernels that only the fused expert layer has: F1 and B1 of
`kernels.swiglu_experts_triton`.
"""

import triton
import triton.language as tl

from kernels.grouped_tiles import rows_of_tile, swizzle


@triton.jit
def _clamped(gate, up, clamp, CLAMP: tl.constexpr):
    if CLAMP:
        # Comparisons, not minimum and maximum: those would hide a NaN.
        gate = tl.where(gate > clamp, clamp, gate)
        up = tl.where(up > clamp, clamp, tl.where(up < -clamp, -clamp, up))
    return gate, up


@triton.jit
def up_kernel(
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
def down_backward_kernel(
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
def sum_partials_kernel(
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
