"""The fused expert layer by Triton kernels, forward and backward; names as in the formulas of
`kernels.swiglu_experts`.

    forward                                             backward
    F1  H = gate, up = w1 x, w3 x; a = silu(gate) up    B1  da' = w2^T g, ds = <da', a>, s a, dH
    F2  y = w2 a                                        B2  dw2 = sum g (s a)^T
    F3  out = sum_k s y                                 B3  dx of each row = w1^T dgate + w3^T dup
                                                        B4  dx = sum over the token's rows
                                                        B5  dw1, dw3 = sum dgate x^T, sum dup x^T

F1, B1, B2 and B5 read x and g at the token of each row: no gathered copy of them is ever stored,
and y lives only until F3. Rows that arrive sorted (without a plan) are read where they lie; then
F2 applies the scale, and F3 and B4 have nothing to do. F1 and B1 are the kernels of
`kernels.swiglu_experts_kernels`, F2, B2, B3 and B5 those of `kernels.grouped_matmul_triton`, F3 and
B4 those of `kernels.dispatch_triton`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.aot import AotCase
from kernels.dispatch import weights_by_row
from kernels.dispatch_triton import gather_sum
from kernels.grouped_matmul_triton import (
    expert_layer_cases,
    grouped_linear,
    transposed,
    weight_grads,
)
from kernels.grouped_tiles import Groups, in_units, matmul_cases, matmul_variant
from kernels.launch import first_derivative_only, on_device_of
from kernels.swiglu_experts_kernels import down_backward_kernel, sum_partials_kernel, up_kernel
from kernels.tiles import Tile


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
        up_kernel[grid](*tensors, *numbers, **constants)
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
        down_backward_kernel[grid](*tensors, tile_map, *numbers, **constants)
    return scaled_a, grad_h, partial


def _sum_partials(partial: Tensor, like: Tensor, row_of: Tensor | None, groups: Groups) -> Tensor:
    out = torch.empty_like(like)
    if out.numel():
        tensors = partial, row_of, groups.offsets, out
        sizes = out.numel(), groups.num_rows, groups.num_experts, partial.shape[0]
        sum_partials_kernel[(triton.cdiv(out.numel(), 256),)](*tensors, *sizes, BLOCK=256)
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
        cases += matmul_cases("swiglu_up", up_kernel, types, constants)
        cases += matmul_cases("swiglu_backward", down_backward_kernel, backward, constants)
    cases += _variants(types, backward)
    known: dict[str, Any] = {
        "partial_ptr": torch.float32,
        "row_of_ptr": torch.int64,
        "offset_ptr": torch.int64,
    }
    known |= {"out_ptr": torch.float32}
    known |= dict.fromkeys(("count", "num_rows", "num_experts", "num_parts"), int)
    case = AotCase(sum_partials_kernel, known, Tile({"BLOCK": 256}))
    return [*cases, case, case._replace(arguments=known | {"row_of_ptr": None}, name="sorted")]


def _variants(types: dict[str, Any], backward: dict[str, Any]) -> Iterator[AotCase]:
    """F1 and B1 with their other operands: by what is saved, and for sorted rows."""
    keeps_a: dict[str, Any] = {"a_ptr": torch.bfloat16}
    sorted_rows: dict[str, Any] = {"token_ptr": None}
    without_h, h_alone = {"h_ptr": None}, {"a_ptr": None}
    up = {
        "without-h": without_h,
        "h-alone": h_alone,
        "sorted": sorted_rows,
        "sorted without-h": sorted_rows | without_h,
        "sorted h-alone": sorted_rows | h_alone,
    }
    unscaled = sorted_rows | {"scale_ptr": None}
    down = {
        "with-a": keeps_a,
        "sorted": sorted_rows,
        "sorted with-a": sorted_rows | keeps_a,
        "sorted unscaled": unscaled,
        "sorted unscaled with-a": unscaled | keeps_a,
    }
    no_clamp = {"CLAMP": False}
    for name, others in up.items():
        yield from matmul_variant(name, "swiglu_up", up_kernel, types | others, no_clamp)
    kernel = down_backward_kernel
    for name, others in down.items():
        yield from matmul_variant(name, "swiglu_backward", kernel, backward | others, no_clamp)
