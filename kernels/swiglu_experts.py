"""The fused expert layer: gather -> up and SwiGLU -> down -> weighted sum, and its backward.

For token t, its experts e = e(t, k) and combine weights s = topk_weights[t, k]:

    gate = w1[e] x_t,   up = w3[e] x_t,   a = silu(gate) * up,   y = w2[e] a
    out[t] = sum_k s y

With a clamp c: gate = min(gate, c), up = clip(up, -c, c) before the product (DeepSeek-V4).

No gathered copy of x or of the output gradient g is saved, and on Triton no y
(SonicMoE, arXiv 2512.14080): da' = w2[e]^T g_t, ds = <da', a> = <g_t, y>, da = s da'.
What is saved, per row:

    save="x"     nothing: gate and up are computed again (about 22 % more work)
    save="xh"    gate and up (2F), the default
    save="xha"   gate, up and a (3F)

and in PyTorch y too (D) if the combine weights take gradients: <g_t, y> costs less than <da', a>.
Where the matmuls have another dtype than the weights (autocast from float32), the cast copies of
w1, w2 and w3 are kept too, until the backward pass.

Rows, T, K, R as in the data map of `kernels.dispatch`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import DispatchPlan, sum_rows, weights_by_row
from kernels.grouped_matmul import (
    RowLayout,
    Span,
    layout_rows,
    place_rows,
    rows_in_use,
    take_rows,
    zero_idle_experts,
)
from kernels.launch import (
    check_same_device,
    check_shape,
    compute_dtype,
    first_derivative_only,
    no_autocast,
    resolve_backend,
)
from kernels.matmul import matmul

SAVE = ("x", "xh", "xha")
# An F below which matmuls of w1 and w3 apart are slow on a CPU.
NARROW = 256
# Elements of the (rows, F) temporaries of one pass over neighbouring experts.
GROUP_ELEMENTS = 1 << 19


class _Options(NamedTuple):
    clamp: float | None
    save: str
    dtype: torch.dtype


class _Needs(NamedTuple):
    """Which gradients the backward pass is asked for."""

    x: bool
    w1: bool
    w2: bool
    w3: bool
    scale: bool


class _Kept(NamedTuple):
    """What the forward pass leaves to the backward pass, None where it does not: H, a (R, F) and y
    (R, D) of all rows."""

    h: Tensor | None
    a: Tensor | None
    y: Tensor | None


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


def _up_projection(x_rows: Tensor, weights: _Weights, spans: list[Span]) -> Tensor:
    """H of all rows: gate and up (2, R, F) of two matrices, or both (1, R, 2F) of their stack."""
    h = x_rows.new_empty(len(weights.up), x_rows.shape[0], weights.up[0].shape[1])
    for e, first, _, stop in spans:
        for part, w in zip(h, weights.up, strict=True):
            matmul(x_rows[first:stop], w[e].T, out=part[first:stop])
    return h


def _gate_and_up(h: Tensor) -> tuple[Tensor, ...]:
    """Views (n, F) of H, whichever way it is laid out."""
    return h.unbind(0) if h.shape[0] == 2 else h[0].chunk(2, -1)


def _swiglu(h: Tensor, clamp: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate), and gate and up after the clamp, each (n, F), from H of these rows."""
    gate, up = _gate_and_up(h)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return F.silu(gate), gate, up


def _groups(spans: list[Span], inner: int) -> list[list[Span]]:
    """Neighbouring experts whose (rows, F) temporaries share one pass and fit a core's cache."""
    groups: list[list[Span]] = []
    rows = 0
    for span in spans:
        rows += span.stop - span.first
        if groups and rows * inner <= GROUP_ELEMENTS:
            groups[-1].append(span)
        else:
            groups.append([span])
            rows = span.stop - span.first
    return groups


def _forward_rows(
    x_rows: Tensor, weights: _Weights, spans: list[Span], options: _Options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y of all rows (R, D), unused ones undefined; H and a if they are kept."""
    h = _up_projection(x_rows, weights, spans)
    y = torch.empty_like(x_rows)
    inner = weights.down.shape[2]
    kept_a = h.new_empty(h.shape[1], inner) if options.save == "xha" else None
    for group in _groups(spans, inner):
        start = group[0].first
        activated, _, up = _swiglu(h[:, start : group[-1].stop], options.clamp)
        a = activated.mul_(up)  # (n, F)
        for e, first, _, stop in group:
            matmul(a[first - start : stop - start], weights.down[e].T, out=y[first:stop])
        if kept_a is not None:
            kept_a[start : group[-1].stop] = a
    return y, None if options.save == "x" else h, kept_a


def _backward_rows(
    grad_y: Tensor,
    x_rows: Tensor,
    weights: _Weights,
    scale: Tensor,
    kept: _Kept,
    spans: list[Span],
    options: _Options,
    weight_dtype: torch.dtype,
    needs: _Needs,
) -> tuple[Tensor | None, ...]:
    """The backward pass over sorted rows.

    grad_y (R, D) is the gradient of the weighted sum at each row, scale (R,) the combine weights;
    both 0 in padding. Returns the gradients of x_rows (R, D), scale (R,) float32, w1, w2, w3, None
    where they are not needed; those of unused rows are undefined.
    """
    h = _up_projection(x_rows, weights, spans) if kept.h is None else kept.h
    num_experts, _, inner = weights.down.shape
    grad_x = torch.empty_like(x_rows) if needs.x else None
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    grad_scale = grad_y.new_empty(x_rows.shape[0], dtype=wide) if needs.scale else None
    shape = (num_experts, inner, x_rows.shape[1])
    grad_w1, grad_w3 = (
        x_rows.new_empty(shape, dtype=weight_dtype) if needed else None
        for needed in (needs.w1, needs.w3)
    )
    grad_w2 = torch.empty_like(weights.down, dtype=weight_dtype) if needs.w2 else None
    for group in _groups(spans, inner):
        start, rows = group[0].first, slice(group[0].first, group[-1].stop)
        g = grad_y[rows]
        if grad_scale is not None:
            assert kept.y is not None
            grad_scale[rows] = torch.sum(g * kept.y[rows], -1, dtype=wide)
        g = g * scale[rows].unsqueeze(-1).to(g.dtype)  # of y itself from here on
        activated, gate, up = _swiglu(h[:, rows], options.clamp)
        a = activated * up if kept.a is None else kept.a[rows]  # (n, F)
        grad_a = torch.empty_like(a)
        for e, first, _, stop in group:
            local = slice(first - start, stop - start)
            matmul(g[local], weights.down[e], out=grad_a[local])
        grad_h = _swiglu_backward(grad_a, activated, gate, up, h[:, rows], options.clamp)
        parts = list(zip(_gate_and_up(grad_h), (grad_w1, grad_w3), strict=True))
        for e, first, _, stop in group:
            local, x = slice(first - start, stop - start), x_rows[first:stop]
            if grad_x is not None:
                matmul(grad_h[0, local], weights.up[0][e], out=grad_x[first:stop])
                if len(weights.up) == 2:
                    grad_x[first:stop] += matmul(grad_h[1, local], weights.up[1][e])
            if len(weights.up) == 1 and grad_w1 is not None and grad_w3 is not None:
                both = matmul(grad_h[0, local].T, x)  # (2F, D)
                grad_w1[e], grad_w3[e] = both[:inner], both[inner:]
            else:
                for part, grad_w in parts:
                    if grad_w is not None:
                        matmul(part[local].T, x, out=grad_w[e])
            if grad_w2 is not None:
                matmul(g[local].T, a[local], out=grad_w2[e])
    return grad_x, grad_scale, grad_w1, grad_w2, grad_w3


def _swiglu_backward(
    grad_a: Tensor, activated: Tensor, gate: Tensor, up: Tensor, h: Tensor, clamp: float | None
) -> Tensor:
    """Gradient of H, laid out as H, from that of a (n, F); `activated`, `grad_a` are used up."""
    grad_h = torch.empty_like(h)
    grad_gate, grad_up = _gate_and_up(grad_h)
    torch.mul(activated, grad_a, out=grad_up)
    torch.ops.aten.silu_backward(grad_a.mul_(up), gate, grad_input=grad_gate)
    if clamp is not None:
        raw_gate, raw_up = _gate_and_up(h)
        grad_gate.masked_fill_(raw_gate > clamp, 0)
        grad_up.masked_fill_(raw_up.abs() > clamp, 0)
    return grad_h


class _SwigluExpertsSorted(torch.autograd.Function):
    """y for rows that are sorted by expert already; `scale` (R,) multiplies y."""

    @staticmethod
    def forward(ctx, rows, w1, w2, w3, scale, expert_offsets, options):
        num_rows = rows.shape[0]
        ctx.dtypes, rows = (rows.dtype, w1.dtype), rows.to(options.dtype)
        layout = layout_rows(expert_offsets, num_rows, rows)
        weights = _cast_weights(w1, w2, w3, options.dtype)
        x_rows = place_rows(rows, layout)
        y_rows, h, a = _forward_rows(x_rows, weights, layout.spans, options)
        y, used = take_rows(y_rows, layout, num_rows), rows_in_use(layout)
        kept = _Kept(h, a, None)
        if ctx.needs_input_grad[4]:
            kept = kept._replace(y=y_rows.clone() if y is y_rows else y_rows)
        y[:used] *= scale[:used].unsqueeze(-1)
        ctx.save_for_backward(x_rows, scale, *kept, weights.down, *weights.up)
        ctx.layout, ctx.options = layout, options
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_y):
        x_rows, scale, h, a, y, down, *up = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        needs = _Needs(*ctx.needs_input_grad[:5])
        grad_x, grad_scale, *grad_weights = _backward_rows(
            place_rows(grad_y.contiguous(), ctx.layout),
            x_rows,
            _Weights(up, down),
            place_rows(scale, ctx.layout),
            _Kept(h, a, y),
            ctx.layout.spans,
            ctx.options,
            w_dtype,
            needs,
        )
        zero_idle_experts(ctx.layout, *(g for g in grad_weights if g is not None))
        if grad_x is not None:
            grad_x = take_rows(grad_x, ctx.layout, scale.shape[0]).to(x_dtype)
        if grad_scale is not None:
            grad_scale = take_rows(grad_scale, ctx.layout, scale.shape[0]).to(scale.dtype)
        return grad_x, *grad_weights, grad_scale, None, None


class _SwigluExperts(torch.autograd.Function):
    """The whole layer on (T, D): gathers, experts and weighted sum in one autograd node."""

    @staticmethod
    def forward(ctx, x, w1, w2, w3, topk_weights, plan, options):
        ctx.dtypes, x = (x.dtype, w1.dtype), x.to(options.dtype)
        layout = layout_rows(plan.expert_offsets, plan.num_rows, x)
        weights = _cast_weights(w1, w2, w3, options.dtype)
        y, h, a = _forward_rows(_gather(x, plan, layout), weights, layout.spans, options)
        everything = rows_in_use(layout) == plan.num_rows
        row_of = _row_of(plan, layout)
        out = sum_rows(y, row_of, topk_weights, all_assigned=everything)  # (T, D)
        kept = _Kept(h, a, y if ctx.needs_input_grad[4] else None)
        ctx.save_for_backward(x, topk_weights, *kept, weights.down, *weights.up)
        ctx.plan, ctx.layout, ctx.options = plan, layout, options
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_out):
        x, topk_weights, h, a, y, down, *up = ctx.saved_tensors
        plan, layout = ctx.plan, ctx.layout
        x_dtype, w_dtype = ctx.dtypes
        needs = _Needs(*ctx.needs_input_grad[:5])
        grad_rows, grad_scale, *grad_weights = _backward_rows(
            _gather(grad_out.to(x.dtype), plan, layout),
            _gather(x, plan, layout),
            _Weights(up, down),
            place_rows(weights_by_row(plan.row_of, topk_weights), layout),
            _Kept(h, a, y),
            layout.spans,
            ctx.options,
            w_dtype,
            needs,
        )
        zero_idle_experts(layout, *(g for g in grad_weights if g is not None))
        row_of = _row_of(plan, layout)
        grad_x = grad_topk = None
        if grad_rows is not None:
            everything = rows_in_use(layout) == plan.num_rows
            grad_x = sum_rows(grad_rows, row_of, None, all_assigned=everything).to(x_dtype)
        if grad_scale is not None:
            grad_topk = grad_scale.to(topk_weights.dtype)[row_of.clamp(min=0)]
            grad_topk = grad_topk.masked_fill_(row_of < 0, 0)
        return grad_x, *grad_weights, grad_topk, None, None


def _gather(x: Tensor, plan: DispatchPlan, layout: RowLayout) -> Tensor:
    """Each row's token of x (T, D), laid out for the matmuls; padding is zero."""
    if layout.position is None:
        return x.index_select(0, plan.token_of_row)
    tokens = plan.token_of_row.new_zeros(layout.num_rows)
    used = layout.position.numel()
    tokens.index_copy_(0, layout.position, plan.token_of_row[:used])
    rows = x.index_select(0, tokens)
    for _, _, end, stop in layout.spans:
        rows[end:stop] = 0
    return rows


def _row_of(plan: DispatchPlan, layout: RowLayout) -> Tensor:
    """(T, K) buffer row of each assignment, -1 for none."""
    if layout.position is None:
        return plan.row_of
    return layout.position[plan.row_of.clamp(min=0)].masked_fill_(plan.row_of < 0, -1)


def _check(
    op: str,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    others: Mapping[str, Tensor | None],
    clamp: float | None,
    save: str,
) -> None:
    w1, w2, w3 = weights
    check_shape(op, "w1", w1, (None, None, None))
    num_experts, inner, hidden = w1.shape
    check_shape(op, "w3", w3, (num_experts, inner, hidden))
    check_shape(op, "w2", w2, (num_experts, hidden, inner))
    check_shape(op, "x", x, (None, hidden))
    check_same_device(op, x=x, w1=w1, w2=w2, w3=w3, **others)
    if not w1.dtype == w2.dtype == w3.dtype:
        raise ValueError(
            f"{op}: w1 ({w1.dtype}), w2 ({w2.dtype}) and w3 ({w3.dtype}) must have one dtype"
        )
    # Not `clamp <= 0`, which lets NaN pass.
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp ({clamp}) must be above 0, or None for no clamp")
    if save not in SAVE:
        raise ValueError(f"{op}: save ({save!r}) must be one of {', '.join(SAVE)}")


def swiglu_experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    plan: DispatchPlan,
    topk_weights: Tensor,
    *,
    clamp: float | None = None,
    save: str = "xh",
    backend: str = "auto",
) -> Tensor:
    """Apply each token's SwiGLU experts and sum their outputs, weighted by the router.

    Args:
        x: (T, D).
        w1, w3: (E, F, D), gate and up. w2: (E, D, F), down. Laid out as in `nn.Linear`.
        plan: DispatchPlan of the same tokens.
        topk_weights: (T, K) combine weights; 0 where the plan has no assignment.
        clamp: bound of gate and up before their product, above 0; None for none.
        save: what the backward pass keeps, see above.
        backend: `auto`, `triton` or `torch`.
    Returns:
        (T, D) in the dtype of the matmuls (autocast's, else that of `x`).
    Raises:
        ValueError: if shapes, devices or the weights' dtypes do not fit, or `clamp` is not above 0.
    Source: Shazeer, GLU variants, arXiv 2002.05202; backward: SonicMoE, arXiv 2512.14080.
    """
    others = {"topk_weights": topk_weights, **plan.named()}
    _check("swiglu_experts", x, (w1, w2, w3), others, clamp, save)
    check_shape("swiglu_experts", "plan.row_of", plan.row_of, tuple(topk_weights.shape))
    check_shape("swiglu_experts", "x", x, (plan.row_of.shape[0], None))
    check_shape("swiglu_experts", "plan.expert_offsets", plan.expert_offsets, (w1.shape[0] + 1,))
    options = _Options(clamp, save, compute_dtype(x))
    if resolve_backend("swiglu_experts", backend, x, has_triton=True) == "triton":
        matrices, rows = (w1, w2, w3), (plan.token_of_row, plan.row_of)
        return _on_triton(x, matrices, topk_weights, plan.expert_offsets, rows, options)
    with no_autocast(x):
        return _SwigluExperts.apply(x, w1, w2, w3, topk_weights, plan, options)


def swiglu_experts_sorted(
    rows: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    expert_offsets: Tensor,
    *,
    scale: Tensor | None = None,
    clamp: float | None = None,
    save: str = "xh",
    backend: str = "auto",
) -> Tensor:
    """Apply one SwiGLU expert to each row, for rows that arrive sorted (after an all-to-all).

    Args:
        rows: (R, D), sorted by expert.
        w1, w3: (E, F, D). w2: (E, D, F).
        expert_offsets: (E+1,) int64; rows behind the last are unused: never read, 0 in the output.
        scale: (R,) factor of each row's output; None for 1.
        clamp, save, backend: as in `swiglu_experts`.
    Returns:
        (R, D) in the dtype of the matmuls (autocast's, else that of `rows`).
    Raises:
        ValueError: if shapes, devices or the weights' dtypes do not fit, or `clamp` is not above 0.
    """
    others = {"expert_offsets": expert_offsets, "scale": scale}
    _check("swiglu_experts_sorted", rows, (w1, w2, w3), others, clamp, save)
    check_shape("swiglu_experts_sorted", "expert_offsets", expert_offsets, (w1.shape[0] + 1,))
    if scale is not None:
        check_shape("swiglu_experts_sorted", "scale", scale, (rows.shape[0],))
    options = _Options(clamp, save, compute_dtype(rows))
    if resolve_backend("swiglu_experts_sorted", backend, rows, has_triton=True) == "triton":
        return _on_triton(rows, (w1, w2, w3), scale, expert_offsets, (None, None), options)
    if scale is None:
        scale = torch.ones(rows.shape[0], device=rows.device)
    with no_autocast(rows):
        return _SwigluExpertsSorted.apply(rows, w1, w2, w3, scale, expert_offsets, options)


def _on_triton(x, matrices, scale, expert_offsets, rows, options: _Options) -> Tensor:
    """Either function by the kernels; rows: token_of_row and row_of, or None where sorted."""
    from kernels.swiglu_experts_triton import swiglu_experts_op

    given = [x, scale, *matrices]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    casts = []
    if matrices[0].dtype != options.dtype:
        casts = [w.detach().to(options.dtype).contiguous() for w in matrices]
    scale = None if scale is None else scale.contiguous()
    return swiglu_experts_op(
        x.to(options.dtype).contiguous(),
        *(w.contiguous() for w in matrices),
        scale,
        casts,
        expert_offsets.contiguous(),
        *rows,
        options.clamp,
        # What of H and a is kept.
        options.save.removeprefix("x") if needs_grad else "",
    )[0]
