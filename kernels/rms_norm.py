"""RMS normalisation over the last dimension.

    y = x / sqrt(mean(x^2) + eps) * weight

With r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:

    dx = r g - x r^3 mean(g x),   dweight = sum over rows of dy x r
"""

from functools import partial

import torch
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    at_least_float32,
    check_floating,
    check_same_device,
    check_shape,
    compute_dtype,
    first_derivative_only,
    no_autocast,
    resolve_backend,
)


class _RMSNorm(torch.autograd.Function):
    # A Function, since autograd through the formula keeps and walks eight full-size temporaries.
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        # Squares and their mean in float32: bfloat16 has 8 bits, too few to sum D terms.
        wide = at_least_float32(x)
        flat = wide.reshape(-1, wide.shape[-1])
        mean_square = torch.linalg.vecdot(flat, flat).div_(flat.shape[-1]).add_(eps)
        inverse = mean_square.rsqrt_().unsqueeze(-1)  # (rows, 1)
        y = (flat * inverse).mul_(weight)
        ctx.save_for_backward(x, weight, inverse)
        return y.to(dtype).view(x.shape)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_y):
        x, weight, inverse = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1]).to(inverse.dtype)
        grad = grad_y.reshape(flat.shape).to(inverse.dtype)
        normed = flat * inverse  # (rows, D)
        grad_weight = torch.linalg.vecdot(grad, normed, dim=0).to(weight.dtype)
        g = grad * weight
        dot = torch.linalg.vecdot(g, normed).div_(g.shape[-1]).unsqueeze(-1)  # (rows, 1)
        grad_x = g.addcmul_(normed, dot, value=-1).mul_(inverse)
        return grad_x.to(x.dtype).view(x.shape), grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto") -> Tensor:
    """Normalise each vector of the last dimension to a root mean square of 1, then scale.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        backend: see `kernels.launch`.
    Returns:
        Shape of `x`, in autocast's dtype where that is on (the next operation is a matmul, which
        would cast it anyway), else that of `x`. Computed in float32.
    Raises:
        ValueError: if `weight` has not the size of the last dimension, either is no floating-point
            tensor, or they are on different devices.
    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    if x.dim() == 0:
        raise ValueError("rms_norm: x has shape (), needs (..., D)")
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))
    check_floating("rms_norm", x=x, weight=weight)
    check_same_device("rms_norm", x=x, weight=weight)
    dtype = compute_dtype(x)
    if resolve_backend("rms_norm", backend, x, has_triton=True) == "triton":
        from kernels.rms_norm_triton import rms_norm_op

        flat = x.reshape(-1, x.shape[-1]).contiguous()
        return rms_norm_op(flat, weight.contiguous(), eps, dtype)[0].view(x.shape)
    with no_autocast(x):
        return _RMSNorm.apply(x, weight, eps, dtype)


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Forward and backward against `F.rms_norm`, at a small, a common and a large width."""
    shapes = ((4096, 192), (2048, 1024), (32768, 2048))
    builders = []
    for rows, size in shapes:
        name = f"rows{rows} D{size}"
        build = partial(_benchmark_case, name, rows, size, dtype, device)
        builders.append(CaseBuilder(name, build))
    return builders


def _benchmark_case(name: str, rows: int, size: int, dtype: torch.dtype, device: str) -> Case:
    torch.manual_seed(0)
    x, grad = (leaf(rows, size, dtype=dtype, device=device) for _ in range(2))
    weight = leaf(size, dtype=dtype, device=device)

    def library(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)

    return Case(
        name=name,
        ours=lambda x, weight, backend: rms_norm(x, weight, 1e-5, backend=backend),
        leaves=(x, weight),
        reference=library,
        rivals={"F.rms_norm": Contestant(library, (x, weight))},
        grad=grad.detach(),
        tokens=rows,
        moved_bytes=2 * x.numel() * x.element_size(),
    )
