"""Triton kernel of `kernels.cross_entropy`: loss and gradient of a chunk of logits, in place.

The two matmuls around it are cuBLAS's. Chunks of rows go through one buffer, which is all the
memory that logits ever take:

    buffer = x[chunk] @ weight^T          (rows, V), rows padded to a multiple of 16 elements
    losses[:, chunk], buffer = kernel     (nll, lse^2) of each row; N dz replaces the logits
    grad_x[chunk] = buffer @ weight,   grad_weight += buffer^T @ x[chunk]

A program reads BLOCK_ROWS rows twice: once for the running maximum and sum, once for the gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotCase
from kernels.cross_entropy import scale_gradients
from kernels.launch import MATMUL_DTYPES, first_derivative_only, on_device_of
from kernels.tiles import Tile, architecture

# Elements of the block of one program, 16 a thread.
BLOCK_ELEMENTS = 4096
# Elements to which rows of logits are padded, so that each begins where 16 bytes can be read.
ROW_MULTIPLE = 16


@triton.jit
def _softmax_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    first,
    num_rows,
    num_tokens,
    num_classes,
    stride,
    ignore_index,
    z_loss_weight,
    WANTS_GRAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = row < num_rows
    token = row + first
    column = tl.arange(0, BLOCK_CLASSES)[None, :]
    label = tl.load(labels_ptr + token, mask=present, other=0)
    counted = present & (label != ignore_index)
    # NaN, not what lies outside, for a label out of range.
    known = counted & (label >= 0) & (label < num_classes)
    at = logits_ptr + row[:, None] * stride
    own = tl.load(logits_ptr + row * stride + label, mask=known, other=0.0).to(tl.float32)
    own = tl.where(known, own, float("nan"))
    # All threads have read it before any writes a gradient over it.
    tl.debug_barrier()

    maximum = tl.full([BLOCK_ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for start in range(0, num_classes, BLOCK_CLASSES):
        # Read to the end of the padded row, which keeps loads wide; the padding counts nothing.
        inside = present[:, None] & (start + column < stride)
        z = tl.load(at + start + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(start + column < num_classes, z, -float("inf"))
        higher = tl.maximum(maximum, tl.max(z, 1))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        maximum = higher
    lse = maximum + tl.log(total)
    tl.store(losses_ptr + token, tl.where(counted, lse - own, 0.0), mask=present)
    tl.store(losses_ptr + num_tokens + token, tl.where(counted, lse * lse, 0.0), mask=present)

    if WANTS_GRAD:
        scale = 1.0 + 2.0 * z_loss_weight * lse
        for start in range(0, num_classes, BLOCK_CLASSES):
            inside = present[:, None] & (start + column < stride)
            z = tl.load(at + start + column, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(z - lse[:, None]) * scale[:, None]
            grad -= tl.where(start + column == label[:, None], 1.0, 0.0)
            grad = tl.where(counted[:, None], grad, 0.0)
            tl.store(at + start + column, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def _tile(num_classes: int, arch: str) -> Tile:
    if arch == "interpreter":
        return Tile({"BLOCK_ROWS": 64, "BLOCK_CLASSES": 64})
    block_classes = min(BLOCK_ELEMENTS, triton.next_power_of_2(num_classes))
    blocks = {"BLOCK_ROWS": max(1, min(16, 1024 // block_classes)), "BLOCK_CLASSES": block_classes}
    return Tile(blocks, num_warps=8 if block_classes == BLOCK_ELEMENTS else 4)


def _launch_softmax(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    first: int,
    ignore_index: int,
    z_loss_weight: float,
    wants_grad: bool,
) -> None:
    """Fill losses[:, first:] of a chunk's rows; replace its logits by their gradient.

    logits (rows, V), a view of rows padded to `logits.stride(0)`; labels (T,); losses (2, T)
    float32.
    """
    num_rows, num_classes = logits.shape
    tile = _tile(num_classes, architecture(logits.device))
    sizes = first, num_rows, labels.shape[0], num_classes, logits.stride(0)
    grid = (triton.cdiv(num_rows, tile.blocks["BLOCK_ROWS"]),)
    _softmax_kernel[grid](
        logits,
        labels,
        losses,
        *sizes,
        ignore_index,
        z_loss_weight,
        WANTS_GRAD=wants_grad,
        **tile.options(),
    )


@torch.library.custom_op("sparse_moe_lm::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    dtype: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
    rows_per_chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, z_loss (), num_tokens () int64, and the gradients of N loss: of x and of weight.

    grad_x (T, D) is in `dtype`, grad_weight (V, D) in float32; one that is not wanted has 0 rows.
    """
    outputs = _empty(x, weight, dtype, wants_x, wants_weight)
    grad_x, grad_weight = outputs[3:]
    num_rows, num_classes = x.shape[0], weight.shape[0]
    xs, w, labels = x.to(dtype), weight.to(dtype), labels.contiguous()
    num_tokens = (labels != ignore_index).sum()
    losses = x.new_empty(2, num_rows, dtype=torch.float32)
    stride = triton.cdiv(num_classes, ROW_MULTIPLE) * ROW_MULTIPLE
    buffer = xs.new_empty(min(rows_per_chunk, num_rows), stride)
    # A library may read the padding of a factor's rows and multiply it by 0, as oneDNN does where
    # the chip has AMX: it must be finite.
    buffer[:, num_classes:] = 0
    grad_weight.zero_()
    options = ignore_index, z_loss_weight, wants_x or wants_weight
    for first in range(0, num_rows, rows_per_chunk):
        rows = slice(first, min(first + rows_per_chunk, num_rows))
        logits = buffer[: rows.stop - first, :num_classes]
        torch.mm(xs[rows], w.T, out=logits)
        with on_device_of(x):
            _launch_softmax(logits, labels, losses, first, *options)
        if wants_x:
            torch.mm(logits, w, out=grad_x[rows])
        if wants_weight:
            _add_matmul(grad_weight, logits.T, xs[rows])
    nll, square = (losses.sum(1) / num_tokens.clamp(min=1)).unbind()
    z_loss = z_loss_weight * square
    return nll + z_loss, z_loss, num_tokens, grad_x, grad_weight


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b: a sum in float32, of a product that is rounded to the dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _empty(
    x: Tensor, weight: Tensor, dtype: torch.dtype, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalar = x.new_empty((), dtype=torch.float32)
    num_rows = x.shape[0] if wants_x else 0
    num_classes = weight.shape[0] if wants_weight else 0
    return (
        scalar,
        torch.empty_like(scalar),
        torch.empty_like(scalar, dtype=torch.int64),
        x.new_empty(num_rows, x.shape[1], dtype=dtype),
        weight.new_empty(num_classes, weight.shape[1], dtype=torch.float32),
    )


@linear_cross_entropy_op.register_fake
def _(x, weight, labels, ignore_index, z_loss_weight, dtype, wants_x, wants_weight, rows_per_chunk):
    return _empty(x, weight, dtype, wants_x, wants_weight)


def _save(ctx, inputs, output):
    x, weight, *_, wants_x, wants_weight, _ = inputs
    _, z_loss, num_tokens, grad_x, grad_weight = output
    grads = grad_x if wants_x else None, grad_weight if wants_weight else None
    ctx.save_for_backward(*grads, num_tokens)
    ctx.dtypes = x.dtype, weight.dtype
    ctx.mark_non_differentiable(z_loss, num_tokens, grad_x, grad_weight)


@first_derivative_only
def _backward(ctx, grad_loss, *_):
    return *scale_gradients(ctx, grad_loss), None, None, None, None, None, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


def aot_cases() -> list[AotCase]:
    """Vocabularies of one block and of many, one of them odd; with and without the gradient."""
    cases = []
    for num_classes in (256, 32768, 50257):
        for dtype in MATMUL_DTYPES:
            arguments: dict[str, Any] = {"logits_ptr": dtype, "labels_ptr": torch.int64}
            arguments["losses_ptr"] = torch.float32
            sizes = ("first", "num_rows", "num_tokens", "num_classes", "stride", "ignore_index")
            arguments |= dict.fromkeys(sizes, int) | {"z_loss_weight": float}
            is_odd = num_classes % 16 != 0
            divisible = ("first", "stride", *([] if is_odd else ["num_classes"]))
            tile = _tile(num_classes, "sm_90")
            for wants_grad in (True, False):
                constants = {"WANTS_GRAD": wants_grad}
                case = AotCase(_softmax_kernel, arguments, tile, constants, divisible)
                cases.append(case._replace(name="odd" * is_odd))
    return cases
