"""Linear layer and cross entropy in one, without the (T, V) logits in memory.

With z = weight @ x_t and lse_t = logsumexp(z), over the N tokens whose label is not ignored:

    loss = (1/N) sum_t (lse_t - z[label_t])  +  z_loss
    z_loss = (z_loss_weight / N) sum_t lse_t^2
    N dz_t = (1 + 2 z_loss_weight lse_t) softmax(z_t) - onehot(label_t)

Works through blocks of rows; where a gradient is wanted, it is computed in the forward pass, while
the probabilities are in the cache, so that the backward pass only scales it. Kept is the gradient
of N loss: of order 1, it fits a narrow dtype, and 1/N is applied to it in float32.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    at_least_float32,
    check_floating,
    check_integers,
    check_same_device,
    check_shape,
    compute_dtype,
    first_derivative_only,
    no_autocast,
    resolve_backend,
)
from kernels.matmul import matmul

# Elements of a block of logits: as many rows as fit go through one matmul, so that the (V, D) sum
# of the weight gradients is read and written seldom.
BLOCK_ELEMENTS = 1 << 25
# Elements of a group of rows whose float32 softmax stays in a core's cache.
GROUP_ELEMENTS = 1 << 20
# On a GPU: elements of a chunk of logits, and its least and most rows.
CHUNK_ELEMENTS = 1 << 28
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 1024, 4096


class LinearCrossEntropy(NamedTuple):
    """loss () float32, z_loss () its part that is the z-loss, num_tokens () int64 counted."""

    loss: Tensor
    z_loss: Tensor
    num_tokens: Tensor


def _softmax_rows(
    logits: Tensor, target: Tensor, counted: Tensor, z_loss_weight: float, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sums of nll and lse^2 over the counted of a group of rows; gradients replace the logits.

    logits (n, V), target (n, 1) labels, counted (n,) 1, or 0 where ignored.
    """
    probs = torch.softmax(logits, -1, dtype=counted.dtype)  # (n, V) float32
    # The largest probability is at least 1/V, so this logsumexp cannot underflow.
    lse = logits.amax(-1).to(counted.dtype) - probs.amax(-1).log()  # (n,)
    nll = lse - logits.gather(-1, target).squeeze(-1).to(counted.dtype)
    if wants_grad:
        probs *= (counted * (1 + 2 * z_loss_weight * lse)).unsqueeze(-1)
        probs.scatter_add_(-1, target, -counted.unsqueeze(-1))
        logits.copy_(probs)
    return torch.dot(counted, nll), torch.dot(counted, lse.square())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, ignore_index, z_loss_weight, dtype, wants_x, wants_weight):
        valid = labels != ignore_index
        num_tokens = valid.sum()
        wide = torch.promote_types(dtype, torch.float32)
        counted = valid.to(wide)  # (T,)
        target = labels.masked_fill(~valid, 0).unsqueeze(-1)  # (T, 1)
        xs, w = x.to(dtype), weight.to(dtype)
        grad_x = torch.empty_like(xs if wants_x else xs[:0])
        grad_w = torch.zeros_like(weight if wants_weight else weight[:0], dtype=wide)
        nll_sum, z_sum = xs.new_zeros((), dtype=wide), xs.new_zeros((), dtype=wide)
        block = max(256, BLOCK_ELEMENTS // weight.shape[0])
        group = max(16, GROUP_ELEMENTS // weight.shape[0])
        for first in range(0, xs.shape[0], block):
            rows = slice(first, min(first + block, xs.shape[0]))
            logits = matmul(xs[rows], w.T)  # (n, V)
            for part in range(first, rows.stop, group):
                these = slice(part, min(part + group, rows.stop))
                nll, z = _softmax_rows(
                    logits[part - first : these.stop - first],
                    target[these],
                    counted[these],
                    z_loss_weight,
                    wants_x or wants_weight,
                )
                nll_sum += nll
                z_sum += z
            if wants_x:
                matmul(logits, w, out=grad_x[rows])
            if wants_weight:
                grad_w += matmul(logits.T, xs[rows])
        divisor = num_tokens.clamp(min=1)
        z_loss = z_loss_weight * z_sum / divisor
        grads = grad_x if wants_x else None, grad_w if wants_weight else None
        ctx.save_for_backward(*grads, num_tokens)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(z_loss, num_tokens)
        return nll_sum / divisor + z_loss, z_loss, num_tokens

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_loss, _grad_z_loss, _grad_num_tokens):
        return *scale_gradients(ctx, grad_loss), None, None, None, None, None, None


def scale_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and weight: those of N loss that `ctx` keeps, times grad_loss / N."""
    *grads, num_tokens = ctx.saved_tensors
    # In float32: bfloat16 would round the factor, and float16 a loss scale to infinity. Not in
    # place: a graph that is kept may be walked again.
    factor = grad_loss / num_tokens.clamp(min=1)
    return tuple(
        None if grad is None else (at_least_float32(grad) * factor).to(dtype)
        for grad, dtype in zip(grads, ctx.dtypes, strict=True)
    )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
    backend: str = "auto",
    debug: bool = False,
) -> LinearCrossEntropy:
    """Mean cross entropy of a language-model head, in nats per token.

    Args:
        x: (T, D) final hidden states.
        weight: (V, D) the head.
        labels: (T,) int64 token ids, or `ignore_index`.
        z_loss_weight: of the mean squared logsumexp, which is added to the loss.
        backend: see `kernels.launch`.
        debug: look at the labels first, which waits for a GPU.
    Returns:
        LinearCrossEntropy(loss, z_loss, num_tokens); `loss` is 0 where every label is ignored, and
        alone carries a gradient. Softmax and sums are in float32.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or with `debug` if a label is neither
            of the V nor `ignore_index`; without it, Triton's loss is NaN then.
    Source: the gradient in the forward pass as in Liger-Kernel, arXiv 2410.10989.
    """
    check_shape("linear_cross_entropy", "weight", weight, (None, None))
    check_shape("linear_cross_entropy", "x", x, (None, weight.shape[1]))
    check_shape("linear_cross_entropy", "labels", labels, (x.shape[0],))
    check_floating("linear_cross_entropy", x=x, weight=weight)
    check_integers("linear_cross_entropy", labels=labels)
    check_same_device("linear_cross_entropy", x=x, weight=weight, labels=labels)
    if not weight.shape[0]:
        raise ValueError("linear_cross_entropy: weight has no rows, needs one at least")
    if debug:
        _check_labels(labels, weight.shape[0], ignore_index)
    dtype = compute_dtype(x)
    # Asked here, as inside a Function gradients are always off: an evaluation computes none.
    wants = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
    options = (ignore_index, z_loss_weight, dtype, *wants)
    if resolve_backend("linear_cross_entropy", backend, x, has_triton=True) == "triton":
        from kernels.cross_entropy_triton import linear_cross_entropy_op

        # Large enough for the matmuls, and for few passes over the (V, D) sum.
        chunk = min(MAX_CHUNK_ROWS, max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // weight.shape[0]))
        chunk = max(16, chunk // 16 * 16)
        with no_autocast(x):
            outputs = linear_cross_entropy_op(x, weight, labels, *options, chunk)
        return LinearCrossEntropy(*outputs[:3])
    with no_autocast(x):
        outputs = _LinearCrossEntropy.apply(x, weight, labels, *options)
    return LinearCrossEntropy(*outputs)


def _check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise ValueError(
            f"linear_cross_entropy: {len(wrong)} labels are out of range, as {int(wrong[0])}; they "
            f"must be from 0 to {num_classes - 1}, or ignore_index ({ignore_index})"
        )


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Forward and backward against a linear layer and `F.cross_entropy`."""
    shapes = ((4096, 192, 4096), (2048, 256, 8192), (4096, 512, 32768), (16384, 2048, 50304))
    builders = []
    for shape in shapes:
        name = "T{} D{} V{}".format(*shape)
        build = partial(_benchmark_case, name, shape, dtype, device)
        builders.append(CaseBuilder(name, build))
    return builders


def _benchmark_case(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> Case:
    num_tokens, hidden, vocab = shape
    torch.manual_seed(0)
    x = leaf(num_tokens, hidden, dtype=dtype, device=device)
    weight = leaf(vocab, hidden, std=0.05, dtype=dtype, device=device)
    labels = torch.randint(0, vocab, (num_tokens,), device=device)

    def library(x: Tensor, weight: Tensor) -> Tensor:
        logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(logits, labels)

    return Case(
        name=name,
        ours=lambda x, weight, backend: (
            linear_cross_entropy(x, weight, labels, backend=backend).loss
        ),
        leaves=(x, weight),
        reference=library,
        rivals={"linear + F.cross_entropy": Contestant(library, (x, weight))},
        grad=torch.ones((), device=device),
        tokens=num_tokens,
        # Of the forward pass alone, although ours computes the gradients in it.
        flops=2 * num_tokens * hidden * vocab,
    )
