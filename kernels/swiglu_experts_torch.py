"""The fused expert layer in plain PyTorch: what `kernels.swiglu_experts` runs on a CPU.

One matmul an expert over its rows, which lie together, or a batched one of neighbours that have
about as many; what is done element by element runs over neighbouring experts at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import DispatchPlan, sum_rows, weights_by_row
from kernels.grouped_matmul import (
    Batch,
    RowLayout,
    layout_rows,
    multiply_rows,
    place_rows,
    rows_in_use,
    take_rows,
    weight_gradients,
    zero_idle_experts,
)
from kernels.launch import first_derivative_only
from kernels.matmul import goes_to_onednn
from kernels.swiglu_torch import activate, activate_backward, gate_and_up

# An F below which matmuls of w1 and w3 apart are slow on a CPU.
NARROW = 256
# A combine weight below which its product with a gradient could underflow.
LEAST_SCALE = 1e-9
# Elements of each (rows, F) temporary of neighbouring experts that are done together, where one
# batch has not more by itself. The backward pass has eight of them at a time: 0.5 GB in float32.
GROUP_ELEMENTS = 1 << 24
# The same with float32 by oneDNN, where they had better stay in the cache.
CACHED_ELEMENTS = 1 << 19


class Options(NamedTuple):
    """clamp and save as `swiglu_experts` takes them. dtype: of the matmuls. compiled: whether
    `torch.compile` makes one pass of what is done element by element, where that pays."""

    clamp: float | None
    save: str
    dtype: torch.dtype
    compiled: bool = False


class _Needs(NamedTuple):
    """Which gradients the backward pass is asked for."""

    x: bool
    w1: bool
    w2: bool
    w3: bool
    scale: bool


class _Rows(NamedTuple):
    """Rows (R, D), or those to be gathered: row r is source[token[r]], times scale[r] of (R,).

    Gathered a group at a time: the rows of the others take no memory meanwhile.
    """

    source: Tensor
    token: Tensor | None
    scale: Tensor | None = None

    def of(self, group: "_Group") -> Tensor:
        scale = None if self.scale is None else self.scale[group.rows].unsqueeze(-1)
        if self.token is None:
            rows = self.source[group.rows]
            return rows if scale is None else rows * scale
        token = self.token[group.rows]
        if scale is None:
            return self.source.index_select(0, token)
        return sum_rows(self.source, token.unsqueeze(-1), scale, all_assigned=True)


class _Scale(NamedTuple):
    """The factor s of each row's y in two factors, for ds = <da', a> and da = s da'.

    before (R,): of g as it is gathered, so that ds = <before da', a> / before. after (R,): of a and
    of the gradient of H. None for 1.
    """

    before: Tensor | None
    after: Tensor | None


def _divide_scale(
    scale: Tensor, layout: RowLayout, dtype: torch.dtype, needs: _Needs, options: Options
) -> _Scale:
    """In `dtype`, laid out as the rows; 0 in padding, which keeps it out of the sums over rows.

    All of it after where that is compiled: it costs nothing there, and g is gathered faster
    without; but not in float16, where da' could overflow. Else all before, which saves two passes,
    except where ds is wanted and s is so small that products with it could underflow, or 0.
    """
    scale = scale.to(dtype)
    if options.compiled and dtype != torch.float16:
        return _Scale(None, place_rows(scale, layout))
    small = scale.abs() < LEAST_SCALE
    if not needs.scale or not small[: rows_in_use(layout)].any():
        return _Scale(place_rows(scale, layout), None)
    parts = scale.masked_fill(small, 1), scale.masked_fill(~small, 1)
    return _Scale(*(place_rows(part, layout) for part in parts))


class _Weights(NamedTuple):
    """The experts' matrices in the dtype of the matmuls.

    up: those that make H: one stack (E, 2F, D), gate then up, which makes one larger matmul, where
    a cast has to copy them anyway or they are narrow; else w1 and w3. down: w2 (E, D, F).
    """

    up: list[Tensor]
    down: Tensor


def _cast_weights(w1: Tensor, w2: Tensor, w3: Tensor, dtype: torch.dtype) -> _Weights:
    inner = w1.shape[1]
    if w1.dtype == dtype and inner >= NARROW:
        return _Weights([w1, w3], w2)
    both = w1.new_empty(w1.shape[0], 2 * inner, w1.shape[2], dtype=dtype)
    both[:, :inner], both[:, inner:] = w1, w3
    return _Weights([both], w2.to(dtype))


class _Group(NamedTuple):
    """Neighbouring experts whose rows are done together."""

    rows: slice
    batches: list[Batch]


def _groups(batches: list[Batch], inner: int, x: Tensor) -> list[_Group]:
    """The batches in their order, whose matmuls have a factor like x."""
    most = CACHED_ELEMENTS if goes_to_onednn(x) else GROUP_ELEMENTS
    together: list[list[Batch]] = []
    for batch in batches:
        if together and (batch.stop - together[-1][0].first) * inner <= most:
            together[-1].append(batch)
        else:
            together.append([batch])
    return [_Group(slice(group[0].first, group[-1].stop), group) for group in together]


def _up_projection(x: Tensor, stacks: list[Tensor], group: _Group, h: Tensor) -> None:
    """Fill H of the group: gate and up (2, n, F) of two stacks, or both (1, n, 2F) of one."""
    for part, stack in zip(h, stacks, strict=True):
        multiply_rows(x, stack.mT, part, group.batches)


def _empty_h(weights: _Weights, num_rows: int, like: Tensor) -> Tensor:
    return like.new_empty(len(weights.up), num_rows, weights.up[0].shape[1])


def _forward_rows(
    x_rows: _Rows, weights: _Weights, layout: RowLayout, options: Options
) -> tuple[Tensor, Tensor | None]:
    """y of all rows (R, D), unused ones undefined; H if it is kept."""
    h = None
    if options.save != "x":
        h = _empty_h(weights, layout.num_rows, x_rows.source)
    y = x_rows.source.new_empty(layout.num_rows, x_rows.source.shape[1])
    for group in _groups(layout.batches, weights.down.shape[2], y):
        rows = group.rows
        part = _empty_h(weights, rows.stop - rows.start, y) if h is None else h[:, rows]
        _up_projection(x_rows.of(group), weights.up, group, part)
        multiply_rows(
            activate(part, options.clamp, compiled=options.compiled),
            weights.down.mT,
            y[rows],
            group.batches,
        )
    return y, h


def _backward_rows(
    grad_y: _Rows,
    x_rows: _Rows,
    scale: _Scale,
    weights: _Weights,
    h_kept: Tensor | None,
    *,
    layout: RowLayout,
    options: Options,
    weight_dtype: torch.dtype,
    needs: _Needs,
) -> tuple[Tensor | None, ...]:
    """The backward pass over sorted rows.

    grad_y (R, D) is the gradient of each row's s y. Returns the gradients of x_rows (R, D), w1, w2,
    w3 and s (R,), None where they are not needed; of rows that are unused or padding, undefined.
    """
    num_experts, hidden, inner = weights.down.shape
    like = x_rows.source
    grad_x = like.new_empty(layout.num_rows, hidden) if needs.x else None
    grad_w1, grad_w3 = (
        like.new_empty(num_experts, inner, hidden, dtype=weight_dtype) if needed else None
        for needed in (needs.w1, needs.w3)
    )
    grad_w2 = torch.empty_like(weights.down, dtype=weight_dtype) if needs.w2 else None
    dots = None
    if needs.scale:
        dots = like.new_empty(layout.num_rows, dtype=torch.promote_types(like.dtype, torch.float32))
    for group in _groups(layout.batches, inner, like):
        rows, batches = group.rows, group.batches
        x, g = x_rows.of(group), grad_y._replace(scale=scale.before).of(group)
        if h_kept is None:
            h = _empty_h(weights, len(x), like)
            _up_projection(x, weights.up, group, h)
        else:
            h = h_kept[:, rows]
        grad_a = like.new_empty(len(x), inner)
        multiply_rows(g, weights.down, grad_a, batches)
        factor, dots_here = (None if t is None else t[rows] for t in (scale.after, dots))
        compiled = options.compiled and factor is not None
        a, grad_h = activate_backward(
            h, grad_a, factor, dots_here, options.clamp, compiled=compiled
        )
        if grad_x is not None:
            for i, (part, stack) in enumerate(zip(grad_h, weights.up, strict=True)):
                multiply_rows(part, stack, grad_x[rows], batches, add=i > 0)
        _up_weight_gradients(grad_h, x, grad_w1, grad_w3, batches)
        if grad_w2 is not None:
            weight_gradients(g, a, (grad_w2,), batches)
    if dots is not None and scale.before is not None:
        dots /= scale.before
    return grad_x, grad_w1, grad_w2, grad_w3, dots


def _up_weight_gradients(
    grad_h: Tensor, x: Tensor, grad_w1: Tensor | None, grad_w3: Tensor | None, batches: list[Batch]
) -> None:
    """Fill those of w1 and w3 that are wanted; both in one product of a stack."""
    if len(grad_h) == 1 and grad_w1 is not None and grad_w3 is not None:
        weight_gradients(grad_h[0], x, (grad_w1, grad_w3), batches)
        return
    for part, grad_w in zip(gate_and_up(grad_h), (grad_w1, grad_w3), strict=True):
        if grad_w is not None:
            weight_gradients(part, x, (grad_w,), batches)


class SwigluExpertsSorted(torch.autograd.Function):
    """y for rows that are sorted by expert already; `scale` (R,) multiplies y."""

    @staticmethod
    def forward(ctx, rows, w1, w2, w3, scale, expert_offsets, options):
        num_rows = rows.shape[0]
        ctx.dtypes, rows = (rows.dtype, w1.dtype), rows.to(options.dtype)
        layout = layout_rows(expert_offsets, num_rows, rows)
        weights = _cast_weights(w1, w2, w3, options.dtype)
        x_rows = place_rows(rows, layout)
        y_rows, h = _forward_rows(_Rows(x_rows, None), weights, layout, options)
        y, used = take_rows(y_rows, layout, num_rows), rows_in_use(layout)
        y[:used] *= scale[:used].unsqueeze(-1)
        ctx.save_for_backward(x_rows, scale, h, weights.down, *weights.up)
        ctx.layout, ctx.options = layout, options
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_y):
        x_rows, scale, h, down, *up = ctx.saved_tensors
        layout, (x_dtype, w_dtype) = ctx.layout, ctx.dtypes
        num_rows, grad_y = scale.shape[0], grad_y.contiguous()
        needs = _Needs(*ctx.needs_input_grad[:5])
        factors = _divide_scale(scale, layout, x_rows.dtype, needs, ctx.options)
        grad_x, *grad_weights, grad_scale = _backward_rows(
            _Rows(place_rows(grad_y, layout), None),
            _Rows(x_rows, None),
            factors,
            _Weights(up, down),
            h,
            layout=layout,
            options=ctx.options,
            weight_dtype=w_dtype,
            needs=needs,
        )
        zero_idle_experts(layout, *(g for g in grad_weights if g is not None))
        if grad_x is not None:
            grad_x = take_rows(grad_x, layout, num_rows).to(x_dtype)
        if grad_scale is not None:
            grad_scale = take_rows(grad_scale, layout, num_rows).to(scale.dtype)
        return grad_x, *grad_weights, grad_scale, None, None


class SwigluExperts(torch.autograd.Function):
    """The whole layer on (T, D): gathers, experts and weighted sum in one autograd node."""

    @staticmethod
    def forward(ctx, x, w1, w2, w3, topk_weights, plan, options):
        ctx.dtypes, x = (x.dtype, w1.dtype), x.to(options.dtype)
        layout = layout_rows(plan.expert_offsets, plan.num_rows, x)
        weights = _cast_weights(w1, w2, w3, options.dtype)
        y, h = _forward_rows(_Rows(x, _tokens(plan, layout)), weights, layout, options)
        everything = rows_in_use(layout) == plan.num_rows
        row_of = _row_of(plan, layout)
        out = sum_rows(y, row_of, topk_weights, all_assigned=everything)  # (T, D)
        ctx.save_for_backward(x, topk_weights, h, weights.down, *weights.up)
        ctx.plan, ctx.layout, ctx.options = plan, layout, options
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_out):
        x, topk_weights, h, down, *up = ctx.saved_tensors
        plan, layout = ctx.plan, ctx.layout
        x_dtype, w_dtype = ctx.dtypes
        token, grad_out = _tokens(plan, layout), grad_out.to(x.dtype).contiguous()
        needs = _Needs(*ctx.needs_input_grad[:5])
        by_row = weights_by_row(plan.row_of, topk_weights)
        factors = _divide_scale(by_row, layout, x.dtype, needs, ctx.options)
        grad_rows, *grad_weights, grad_scale = _backward_rows(
            _Rows(grad_out, token),
            _Rows(x, token),
            factors,
            _Weights(up, down),
            h,
            layout=layout,
            options=ctx.options,
            weight_dtype=w_dtype,
            needs=needs,
        )
        zero_idle_experts(layout, *(g for g in grad_weights if g is not None))
        row_of = _row_of(plan, layout)
        grad_x = grad_topk = None
        if grad_rows is not None:
            everything = rows_in_use(layout) == plan.num_rows
            grad_x = sum_rows(grad_rows, row_of, None, all_assigned=everything).to(x_dtype)
        if grad_scale is not None:
            grad_topk = grad_scale[row_of.clamp(min=0)].masked_fill_(row_of < 0, 0)
            grad_topk = grad_topk.to(topk_weights.dtype)
        return grad_x, *grad_weights, grad_topk, None, None


def _tokens(plan: DispatchPlan, layout: RowLayout) -> Tensor:
    """(R,) each row's token, laid out for the matmuls; in padding one that the expert has anyway,
    so that what is not finite in a token reaches its own experts alone."""
    if layout.position is None:
        return plan.token_of_row
    used = layout.position.numel()
    sizes = torch.tensor([batch.size for batch in layout.batches for _ in batch.used])
    ends = torch.tensor([n for batch in layout.batches for n in batch.used]).cumsum(0)
    tokens = plan.token_of_row[ends - 1].repeat_interleave(sizes)
    return tokens.index_copy_(0, layout.position, plan.token_of_row[:used])


def _row_of(plan: DispatchPlan, layout: RowLayout) -> Tensor:
    """(T, K) buffer row of each assignment, -1 for none."""
    if layout.position is None:
        return plan.row_of
    return layout.position[plan.row_of.clamp(min=0)].masked_fill_(plan.row_of < 0, -1)
