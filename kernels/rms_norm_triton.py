"""Triton kernels of `kernels.rms_norm`, forward and backward.

A program holds BLOCK_ROWS whole vectors. The gradient of the weight is a sum over all rows: each
program adds up its own rows in float32 and stores one partial sum, and the partial sums are added
in a fixed order, so equal calls give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotCase
from kernels.launch import MATMUL_DTYPES, on_device_of
from kernels.tiles import Tile

# Elements of the block of one program, and programs of the backward pass.
BLOCK_ELEMENTS = 2048
MAX_PROGRAMS = 512


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    inverse_ptr,
    num_rows,
    size,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    at = row[:, None] * size + column[None, :]
    # Squares and their mean in float32: bfloat16 has 8 bits, too few to sum D terms.
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / size + eps)  # (BLOCK_ROWS,)
    y = x * inverse[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + row, inverse, mask=row < num_rows)


@triton.jit
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    column = tl.arange(0, BLOCK_SIZE)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < size)[None, :]
        at = row[:, None] * size + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=row < num_rows, other=0.0)
        normed = x * inverse[:, None]
        total += tl.sum(grad * normed, 0)
        g = grad * weight[None, :]
        mean = tl.sum(g * normed, 1) / size
        grad_x = (g - normed * mean[:, None]) * inverse[:, None]
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    at = tl.program_id(0) * size + column
    tl.store(partial_ptr + at, total, mask=column < size)


def _tile(size: int) -> Tile:
    block_size = triton.next_power_of_2(size)
    block_rows = max(1, min(16, BLOCK_ELEMENTS // block_size))
    blocks = {"BLOCK_ROWS": block_rows, "BLOCK_SIZE": block_size}
    # 16 elements a thread: more of them spill.
    return Tile(blocks, num_warps=min(16, max(4, block_rows * block_size // 512)))


@torch.library.custom_op("sparse_moe_lm::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y (rows, D) in `dtype`, and 1/rms (rows,) float32, of x (rows, D)."""
    num_rows, size = x.shape
    y = torch.empty_like(x, dtype=dtype)
    inverse = x.new_empty(num_rows, dtype=torch.float32)
    tile = _tile(size)
    if x.numel():
        grid = (triton.cdiv(num_rows, tile.blocks["BLOCK_ROWS"]),)
        with on_device_of(x):
            _forward_kernel[grid](x, weight, y, inverse, num_rows, size, eps, **tile.options())
    return y, inverse


@rms_norm_op.register_fake
def _(x, weight, eps, dtype):
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("sparse_moe_lm::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    grad_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (rows, D) and weight (D,)."""
    num_rows, size = x.shape
    grad_x = torch.empty_like(x)
    tile = _tile(size)
    programs = min(MAX_PROGRAMS, triton.cdiv(num_rows, tile.blocks["BLOCK_ROWS"]))
    partial = x.new_empty(programs, size, dtype=torch.float32)
    if x.numel():
        tensors = grad_y.contiguous(), x, weight, inverse, grad_x, partial
        with on_device_of(x):
            _backward_kernel[(programs,)](*tensors, num_rows, size, **tile.options())
    return grad_x, partial.sum(0).to(weight.dtype)


@rms_norm_backward_op.register_fake
def _(grad_y, x, weight, inverse):
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_y, _grad_inverse):
    x, weight, inverse = ctx.saved_tensors
    grad_x, grad_weight = rms_norm_backward_op(grad_y, x, weight, inverse)
    return grad_x, grad_weight, None, None


rms_norm_op.register_autograd(_backward, setup_context=_save)


def aot_cases() -> list[AotCase]:
    """Both kernels at a small and a large vector, in every dtype of the matmuls."""
    cases = []
    for size in (128, 2048, 8192):
        for dtype in MATMUL_DTYPES:
            rows = {"x_ptr": dtype, "weight_ptr": torch.float32, "num_rows": int, "size": int}
            float32 = torch.float32
            forward = {"y_ptr": dtype, "inverse_ptr": float32, "eps": float}
            backward = {"grad_y_ptr": dtype, "inverse_ptr": float32, "grad_x_ptr": dtype}
            backward["partial_ptr"] = float32
            tile = _tile(size)
            cases += [
                AotCase(_forward_kernel, rows | forward, tile, divisible=("size",)),
                AotCase(_backward_kernel, rows | backward, tile, divisible=("size",)),
            ]
    return cases
