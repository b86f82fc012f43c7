"""The fused expert layer: gather -> up and SwiGLU -> down -> weighted sum.

For token t, its experts e = e(t, k) and combine weights s = topk_weights[t, k]:

    gate = w1[e] x_t,   up = w3[e] x_t,   a = silu(gate) * up,   y = w2[e] a
    out[t] = sum_k s y

With a clamp c: gate = min(gate, c), up = clip(up, -c, c) before the product (DeepSeek-V4).

No gathered copy of x or of the output gradient g is saved, and no y (SonicMoE, arXiv 2512.14080):
da' = w2[e]^T g_t, ds = <da', a> = <g_t, y>, da = s da'.
What is saved, per row:

    save="x"     nothing: gate and up are computed again (about 22 % more work)
    save="xh"    gate and up (2F), the default
    save="xha"   gate, up and a (3F)

PyTorch never keeps a: reading it back takes as long as computing it.
Where the matmuls have another dtype than the weights (autocast from float32), the cast copies of
w1, w2 and w3 are kept too, until the backward pass; in PyTorch also a stack of narrow w1 and w3,
and of rows that arrive sorted a copy, if they have to be padded.

Rows, T, K, R as in the data map of `kernels.dispatch`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.dispatch import DispatchPlan
from kernels.launch import (
    check_floating,
    check_integers,
    check_offsets,
    check_same_device,
    check_shape,
    compute_dtype,
    no_autocast,
    resolve_backend,
)
from kernels.swiglu_experts_torch import Options, SwigluExperts, SwigluExpertsSorted

SAVE = ("x", "xh", "xha")


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
    check_floating(op, x=x, w1=w1, w2=w2, w3=w3)
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


def _options(clamp: float | None, save: str, x: Tensor, *others: Tensor | None) -> Options:
    """`save` is "x" where no backward pass can follow."""
    given = [x, *others]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return Options(clamp, save if needs_grad else "x", compute_dtype(x))


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
        backend: see `kernels.launch`.
    Returns:
        (T, D) in the dtype of the matmuls (autocast's, else that of `x`).
    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or `clamp` is not above 0.
    Source: Shazeer, GLU variants, arXiv 2002.05202; backward: SonicMoE, arXiv 2512.14080.
    """
    others = {"topk_weights": topk_weights, **plan.named()}
    _check("swiglu_experts", x, (w1, w2, w3), others, clamp, save)
    check_shape("swiglu_experts", "plan.row_of", plan.row_of, tuple(topk_weights.shape))
    check_shape("swiglu_experts", "x", x, (plan.row_of.shape[0], None))
    check_shape("swiglu_experts", "plan.expert_offsets", plan.expert_offsets, (w1.shape[0] + 1,))
    check_floating("swiglu_experts", topk_weights=topk_weights)
    check_integers("swiglu_experts", **plan.named())
    options = _options(clamp, save, x, w1, w2, w3, topk_weights)
    chosen = resolve_backend("swiglu_experts", backend, x, has_triton=True)
    if chosen == "triton":
        matrices, rows = (w1, w2, w3), (plan.token_of_row, plan.row_of)
        return _on_triton(x, matrices, topk_weights, plan.expert_offsets, rows, options)
    options = options._replace(compiled=chosen == "torch_compile")
    with no_autocast(x):
        return SwigluExperts.apply(x, w1, w2, w3, topk_weights, plan, options)


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
    debug: bool = False,
) -> Tensor:
    """Apply one SwiGLU expert to each row, for rows that arrive sorted (after an all-to-all).

    Args:
        rows: (R, D), sorted by expert.
        w1, w3: (E, F, D). w2: (E, D, F).
        expert_offsets: (E+1,) int64; rows behind the last are unused: never read, 0 in the output.
        scale: (R,) factor of each row's output; None for 1.
        clamp, save, backend: as in `swiglu_experts`.
        debug: look at the offsets first, as `grouped_matmul` does.
    Returns:
        (R, D) in the dtype of the matmuls (autocast's, else that of `rows`).
    Raises:
        ValueError: if shapes, devices or dtypes do not fit, `clamp` is not above 0, or offsets that
            are looked at do not ascend from 0 to at most R.
    """
    others = {"expert_offsets": expert_offsets, "scale": scale}
    _check("swiglu_experts_sorted", rows, (w1, w2, w3), others, clamp, save)
    check_shape("swiglu_experts_sorted", "expert_offsets", expert_offsets, (w1.shape[0] + 1,))
    if scale is not None:
        check_shape("swiglu_experts_sorted", "scale", scale, (rows.shape[0],))
    check_floating("swiglu_experts_sorted", scale=scale)
    check_integers("swiglu_experts_sorted", expert_offsets=expert_offsets)
    options = _options(clamp, save, rows, w1, w2, w3, scale)
    chosen = resolve_backend("swiglu_experts_sorted", backend, rows, has_triton=True)
    if debug or chosen != "triton":
        check_offsets("swiglu_experts_sorted", expert_offsets, rows.shape[0])
    if chosen == "triton":
        return _on_triton(rows, (w1, w2, w3), scale, expert_offsets, (None, None), options)
    if scale is None:
        scale = torch.ones(rows.shape[0], device=rows.device)
    options = options._replace(compiled=chosen == "torch_compile")
    with no_autocast(rows):
        return SwigluExpertsSorted.apply(rows, w1, w2, w3, scale, expert_offsets, options)


def _on_triton(x, matrices, scale, expert_offsets, rows, options: Options) -> Tensor:
    """Either function by the kernels; rows: token_of_row and row_of, or None where sorted."""
    from kernels.swiglu_experts_triton import swiglu_experts_op

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
        options.save.removeprefix("x"),
    )[0]
