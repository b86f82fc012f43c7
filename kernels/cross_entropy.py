"""Linear layer and cross entropy in one, without the (T, V) logits in memory.

With z = weight @ x_t and lse_t = logsumexp(z), over the N tokens whose label is not ignored:

    loss = (1/N) sum_t (lse_t - z[label_t])  +  z_loss
    z_loss = (z_loss_weight / N) sum_t lse_t^2
    dz_t = (1/N) ((1 + 2 z_loss_weight lse_t) softmax(z_t) - onehot(label_t))

Works through blocks of rows; where a gradient is wanted, it is computed in the forward pass, while
the probabilities are in the cache, so that the backward pass only scales it.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import check_shape, compute_dtype, no_autocast, resolve_backend
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
    logits: Tensor, target: Tensor, share: Tensor, z_loss_weight: float, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sums of share * nll and share * lse^2 over a group of rows; gradients replace the logits.

    logits (n, V), target (n, 1) labels, share (n,) 1/N or 0.
    """
    probs = torch.softmax(logits, -1, dtype=share.dtype)  # (n, V) float32
    # The largest probability is at least 1/V, so this logsumexp cannot underflow.
    lse = logits.amax(-1).to(share.dtype) - probs.amax(-1).log()  # (n,)
    nll = lse - logits.gather(-1, target).squeeze(-1).to(share.dtype)
    if wants_grad:
        probs *= (share * (1 + 2 * z_loss_weight * lse)).unsqueeze(-1)
        probs.scatter_add_(-1, target, -share.unsqueeze(-1))
        logits.copy_(probs)
    return torch.dot(share, nll), torch.dot(share, lse.square())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, ignore_index, z_loss_weight, dtype, wants_grad):
        valid = labels != ignore_index
        num_tokens = valid.sum()
        wide = torch.promote_types(dtype, torch.float32)
        per_token = valid.to(wide) / num_tokens.clamp(min=1)  # (T,) 1/N, 0 where ignored
        target = labels.masked_fill(~valid, 0).unsqueeze(-1)  # (T, 1)
        xs, w = x.to(dtype), weight.to(dtype)
        grad_x = torch.empty_like(xs if wants_grad else xs[:0])
        grad_w = torch.zeros_like(weight if wants_grad else weight[:0], dtype=wide)
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
                    per_token[these],
                    z_loss_weight,
                    wants_grad,
                )
                nll_sum += nll
                z_sum += z
            if wants_grad:
                matmul(logits, w, out=grad_x[rows])
                grad_w += matmul(logits.T, xs[rows])
        z_loss = z_loss_weight * z_sum
        if wants_grad:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(z_loss, num_tokens)
        return nll_sum + z_loss, z_loss, num_tokens

    @staticmethod
    def backward(ctx, grad_loss, _grad_z_loss, _grad_num_tokens):
        grad_x, grad_w = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        # Not in place: a graph that is kept may be walked again.
        grad_x = grad_x * grad_loss.to(grad_x.dtype)
        grad_w = grad_w * grad_loss
        return grad_x.to(x_dtype), grad_w.to(w_dtype), None, None, None, None, None


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
        backend: `auto`, `triton` or `torch`.
        debug: look at the labels first, which waits for a GPU.
    Returns:
        LinearCrossEntropy(loss, z_loss, num_tokens); `loss` is 0 where every label is ignored, and
        alone carries a gradient. Softmax and sums are in float32.
    Raises:
        ValueError: if the shapes do not fit, or with `debug` if a label is neither of the V nor
            `ignore_index`; without it, Triton's loss is NaN then.
    Source: the gradient in the forward pass as in Liger-Kernel, arXiv 2410.10989.
    """
    check_shape("linear_cross_entropy", "weight", weight, (None, None))
    check_shape("linear_cross_entropy", "x", x, (None, weight.shape[1]))
    check_shape("linear_cross_entropy", "labels", labels, (x.shape[0],))
    if debug:
        _check_labels(labels, weight.shape[0], ignore_index)
    dtype = compute_dtype(x)
    # Asked here, as inside a Function gradients are always off: an evaluation computes none.
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    options = (ignore_index, z_loss_weight, dtype, wants_grad)
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
    return [
        CaseBuilder("T{} D{} V{}".format(*shape), partial(_benchmark_case, shape, dtype, device))
        for shape in shapes
    ]


def _benchmark_case(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Case:
    num_tokens, hidden, vocab = shape
    torch.manual_seed(0)
    x = leaf(num_tokens, hidden, dtype=dtype, device=device)
    weight = leaf(vocab, hidden, std=0.05, dtype=dtype, device=device)
    labels = torch.randint(0, vocab, (num_tokens,), device=device)

    def library(x: Tensor, weight: Tensor) -> Tensor:
        logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(logits, labels)

    return Case(
        name="T{} D{} V{}".format(*shape),
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
