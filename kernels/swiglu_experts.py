"""The fused expert layer: gather -> up and SwiGLU -> down -> weighted sum, and its backward.

For token t, its experts e = e(t, k) and combine weights s = topk_weights[t, k]:

    gate = w1[e] x_t,   up = w3[e] x_t,   a = silu(gate) * up,   y = w2[e] a
    out[t] = sum_k s y

With a clamp c: gate = min(gate, c), up = clip(up, -c, c) before the product (DeepSeek-V4).

Backward without y and without a gathered copy of x or of the output gradient g (SonicMoE, arXiv
2512.14080): da' = w2[e]^T g_t, ds = <da', a> (= <g_t, y>), da = s da'. What is saved, per row:

    save="x"     nothing: gate and up are computed again (about 22 % more work)
    save="xh"    gate and up (2F), the default
    save="xha"   gate, up and a (3F)

Rows, T, K, R as in the data map of `kernels.dispatch`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, leaf
from kernels.dispatch import DispatchPlan, plan_dispatch, sum_rows, weights_by_row
from kernels.grouped_matmul import (
    Span,
    pad_rows,
    row_quantum,
    rows_in_use,
    segments,
    zero_idle_experts,
    zero_unused_rows,
)
from kernels.launch import (
    check_same_device,
    check_shape,
    compute_dtype,
    no_autocast,
    resolve_backend,
)

SAVE = ("x", "xh", "xha")


class _Options(NamedTuple):
    clamp: float | None
    save: str
    dtype: torch.dtype


def _activate(gate: Tensor, clamp: float | None) -> Tensor:
    """silu of the clamped gate, (n, F)."""
    return F.silu(gate if clamp is None else gate.clamp(max=clamp))


def _clip(up: Tensor, clamp: float | None) -> Tensor:
    return up if clamp is None else up.clamp(-clamp, clamp)


def _swiglu_backward(
    grad_a: Tensor, activated: Tensor, gate: Tensor, up: Tensor, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, each (n, F), from that of a; `activated` is silu(gate), used up."""
    grad_up = activated.mul_(grad_a)
    if clamp is None:
        return torch.ops.aten.silu_backward(grad_a.mul_(up), gate), grad_up
    grad_gate = torch.ops.aten.silu_backward(grad_a.mul_(_clip(up, clamp)), gate.clamp(max=clamp))
    return grad_gate.masked_fill_(gate > clamp, 0), grad_up.masked_fill_(up.abs() > clamp, 0)


def _up_projection(
    x_rows: Tensor, w1: Tensor, w3: Tensor, spans: list[Span]
) -> tuple[Tensor, Tensor]:
    """gate and up of all rows, each (R, F)."""
    gate = x_rows.new_empty(x_rows.shape[0], w1.shape[1])
    up = torch.empty_like(gate)
    for e, first, _, stop in spans:
        torch.mm(x_rows[first:stop], w1[e].T, out=gate[first:stop])
        torch.mm(x_rows[first:stop], w3[e].T, out=up[first:stop])
    return gate, up


def _forward_rows(
    x_rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, spans: list[Span], options: _Options
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """y of all rows (R, D), unused ones undefined; and gate, up and a as far as they are kept."""
    gate, up = _up_projection(x_rows, w1, w3, spans)
    y = torch.empty_like(x_rows)
    activations = torch.empty_like(gate) if options.save == "xha" else None
    for e, first, _, stop in spans:
        rows = slice(first, stop)
        a = _activate(gate[rows], options.clamp).mul_(_clip(up[rows], options.clamp))
        torch.mm(a, w2[e].T, out=y[rows])
        if activations is not None:
            activations[rows] = a
    kept = (None, None) if options.save == "x" else (gate, up)
    return y, (*kept, activations)


def _backward_rows(grad_y, x_rows, weights, scale, saved, spans, options, weight_dtype):
    """The backward pass over sorted rows.

    grad_y (R, D) is the gradient of the weighted sum at each row, scale (R,) the combine weights.
    Returns the gradients of x_rows (R, D), scale (R,) float32, w1, w2, w3.
    """
    w1, w2, w3 = weights
    gate, up, activations = saved
    if gate is None:
        gate, up = _up_projection(x_rows, w1, w3, spans)
    grad_x = torch.empty_like(x_rows)
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    grad_scale = grad_y.new_empty(x_rows.shape[0], dtype=wide)
    grad_weights = [torch.empty_like(w, dtype=weight_dtype) for w in weights]
    zero_idle_experts(spans, *grad_weights)
    for e, first, end, stop in spans:
        rows = slice(first, stop)
        x = x_rows[rows]
        activated = _activate(gate[rows], options.clamp)  # (n, F)
        if activations is not None:
            a = activations[rows]
        else:
            a = activated * _clip(up[rows], options.clamp)
        grad_a = grad_y[rows] @ w2[e]  # (n, F), before the combine weight
        grad_scale[rows] = torch.sum(grad_a * a, -1, dtype=wide)
        s = scale[rows].unsqueeze(-1).to(grad_a.dtype)
        grad_a, g = grad_a.mul_(s), grad_y[rows] * s
        grad_gate, grad_up = _swiglu_backward(
            grad_a, activated, gate[rows], up[rows], options.clamp
        )
        # The sums over rows below must not see the rows of the next expert.
        for factor in (grad_gate, grad_up, g):
            factor[end - first :] = 0
        torch.mm(grad_gate, w1[e], out=grad_x[rows])
        grad_x[rows].addmm_(grad_up, w3[e])
        for buffer, left, right in zip(
            grad_weights, (grad_gate, g, grad_up), (x, a, x), strict=True
        ):
            if buffer.dtype == left.dtype:
                torch.mm(left.T, right, out=buffer[e])
            else:
                buffer[e] = left.T @ right
    zero_unused_rows(spans, grad_x, grad_scale)
    return grad_x, grad_scale, *grad_weights


class _SwigluExpertsSorted(torch.autograd.Function):
    """y for rows that are sorted by expert already; `scale` (R,) multiplies y."""

    @staticmethod
    def forward(ctx, rows, w1, w2, w3, scale, expert_offsets, options):
        spans = segments(expert_offsets, row_quantum(rows.device, options.dtype))
        ctx.dtypes = rows.dtype, w1.dtype
        x_rows = pad_rows(rows.to(options.dtype), spans)
        w1, w2, w3 = (t.to(options.dtype) for t in (w1, w2, w3))
        y, kept = _forward_rows(x_rows, w1, w2, w3, spans, options)
        zero_unused_rows(spans, y)
        y, used = y[: rows.shape[0]], rows_in_use(spans)
        y[:used] *= scale[:used].unsqueeze(-1)
        ctx.save_for_backward(x_rows, w1, w2, w3, scale, *kept)
        ctx.spans, ctx.options = spans, options
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x_rows, w1, w2, w3, scale, *saved = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        grad_x, grad_scale, *grad_weights = _backward_rows(
            pad_rows(grad_y.contiguous(), ctx.spans),
            x_rows,
            (w1, w2, w3),
            pad_rows(scale, ctx.spans),
            saved,
            ctx.spans,
            ctx.options,
            w_dtype,
        )
        num_rows = scale.shape[0]
        grad_scale = grad_scale[:num_rows].to(scale.dtype)
        return grad_x[:num_rows].to(x_dtype), *grad_weights, grad_scale, None, None


class _SwigluExperts(torch.autograd.Function):
    """The whole layer on (T, D): gathers, experts and weighted sum in one autograd node."""

    @staticmethod
    def forward(ctx, x, w1, w2, w3, topk_weights, plan, options):
        spans = segments(plan.expert_offsets, row_quantum(x.device, options.dtype))
        ctx.dtypes = x.dtype, w1.dtype
        x, w1, w2, w3 = (t.to(options.dtype) for t in (x, w1, w2, w3))
        y, kept = _forward_rows(_gather(x, plan, spans), w1, w2, w3, spans, options)
        out = sum_rows(y, plan.row_of, rows_in_use(spans), topk_weights)  # (T, D)
        ctx.save_for_backward(x, w1, w2, w3, topk_weights, *kept)
        ctx.plan, ctx.spans, ctx.options = plan, spans, options
        return out

    @staticmethod
    def backward(ctx, grad_out):
        x, w1, w2, w3, topk_weights, *saved = ctx.saved_tensors
        plan, spans = ctx.plan, ctx.spans
        x_dtype, w_dtype = ctx.dtypes
        grad_rows, grad_scale, *grad_weights = _backward_rows(
            _gather(grad_out.to(x.dtype), plan, spans),
            _gather(x, plan, spans),
            (w1, w2, w3),
            pad_rows(weights_by_row(plan, topk_weights), spans),
            saved,
            spans,
            ctx.options,
            w_dtype,
        )
        grad_x = sum_rows(grad_rows, plan.row_of, rows_in_use(spans), None).to(x_dtype)
        grad_topk = grad_scale.to(topk_weights.dtype)[plan.row_of.clamp(min=0)]
        grad_topk = grad_topk.masked_fill_(plan.row_of < 0, 0)
        return grad_x, *grad_weights, grad_topk, None, None


def _gather(x: Tensor, plan: DispatchPlan, spans: list[Span]) -> Tensor:
    """Each row's token of x (T, D), padded as the spans need: (R, D) or longer."""
    return pad_rows(x.index_select(0, plan.token_of_row), spans)


def _check(op: str, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, save: str) -> None:
    check_shape(op, "w1", w1, (None, None, None))
    num_experts, inner, hidden = w1.shape
    check_shape(op, "w3", w3, (num_experts, inner, hidden))
    check_shape(op, "w2", w2, (num_experts, hidden, inner))
    check_shape(op, "x", x, (None, hidden))
    check_same_device(op, x=x, w1=w1, w2=w2, w3=w3)
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
        clamp: bound of gate and up before their product; None for none.
        save: what the backward pass keeps, see above.
        backend: `auto`, `triton` or `torch`.
    Returns:
        (T, D) in the dtype of the matmuls (autocast's, else that of `x`).
    Raises:
        ValueError: if shapes or devices do not fit.
    Source: Shazeer, GLU variants, arXiv 2002.05202; backward: SonicMoE, arXiv 2512.14080.
    """
    _check("swiglu_experts", x, w1, w2, w3, save)
    check_shape("swiglu_experts", "plan.row_of", plan.row_of, tuple(topk_weights.shape))
    check_shape("swiglu_experts", "x", x, (plan.row_of.shape[0], None))
    check_shape("swiglu_experts", "plan.expert_offsets", plan.expert_offsets, (w1.shape[0] + 1,))
    resolve_backend("swiglu_experts", backend, x)
    options = _Options(clamp, save, compute_dtype(x))
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
        ValueError: if shapes or devices do not fit.
    """
    _check("swiglu_experts_sorted", rows, w1, w2, w3, save)
    check_shape("swiglu_experts_sorted", "expert_offsets", expert_offsets, (w1.shape[0] + 1,))
    if scale is not None:
        check_shape("swiglu_experts_sorted", "scale", scale, (rows.shape[0],))
    resolve_backend("swiglu_experts_sorted", backend, rows)
    options = _Options(clamp, save, compute_dtype(rows))
    if scale is None:
        scale = torch.ones(rows.shape[0], device=rows.device)
    with no_autocast(rows):
        return _SwigluExpertsSorted.apply(rows, w1, w2, w3, scale, expert_offsets, options)


# Tokens, hidden, intermediate, experts, top-k.
BENCHMARK_SHAPES = (
    (2048, 256, 512, 8, 2),
    (4096, 256, 512, 16, 4),
    (4096, 512, 1024, 8, 2),
    (4096, 512, 512, 64, 8),
    (8192, 256, 256, 64, 8),
)


def reference_experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, topk_indices: Tensor, topk_weights: Tensor
) -> Tensor:
    """The layer as the formula reads, expert by expert; arguments as in `swiglu_experts`."""
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, slot = (topk_indices == e).nonzero(as_tuple=True)
        y = (F.silu(x[token] @ w1[e].T) * (x[token] @ w3[e].T)) @ w2[e].T
        out = out.index_add(0, token, y * topk_weights[token, slot].unsqueeze(-1))
    return out


def benchmark_cases(dtype: torch.dtype, device: str) -> list[Case]:
    """Forward and backward against a dense layer of equal FLOPs."""
    return [_benchmark_case(shape, dtype, device) for shape in BENCHMARK_SHAPES]


def _benchmark_case(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> Case:
    num_tokens, hidden, inner, num_experts, top_k = shape
    torch.manual_seed(0)
    x, grad = (leaf(num_tokens, hidden, dtype=dtype, device=device) for _ in range(2))
    std = hidden**-0.5
    w1, w3 = (
        leaf(num_experts, inner, hidden, std=std, dtype=dtype, device=device) for _ in range(2)
    )
    w2 = leaf(num_experts, hidden, inner, std=std, dtype=dtype, device=device)
    wide = top_k * inner
    d1, d3 = (leaf(wide, hidden, std=std, dtype=dtype, device=device) for _ in range(2))
    d2 = leaf(hidden, wide, std=std, dtype=dtype, device=device)
    combine = leaf(num_tokens, top_k, dtype=torch.float32, device=device)
    indices = torch.rand(num_tokens, num_experts, device=device).argsort(1)[:, :top_k]
    plan = plan_dispatch(indices, num_experts)

    def ours():
        out = swiglu_experts(x, w1, w2, w3, plan, combine)
        return out, *torch.autograd.grad(out, (x, w1, w2, w3, combine), grad)

    def reference():
        leaves = [t.detach().double().requires_grad_() for t in (x, w1, w2, w3, combine)]
        out = reference_experts(leaves[0], leaves[1], leaves[2], leaves[3], indices, leaves[4])
        return out, *torch.autograd.grad(out, leaves, grad.double())

    def dense():
        out = F.linear(F.silu(F.linear(x, d1)) * F.linear(x, d3), d2)
        return out, *torch.autograd.grad(out, (x, d1, d2, d3), grad)

    return Case(
        name=f"T{num_tokens} D{hidden} F{inner} E{num_experts} K{top_k}",
        ours=ours,
        reference=reference,
        rivals={"dense layer of equal FLOPs": dense},
        flops=18 * num_tokens * top_k * hidden * inner,
    )
