"""Plain matrix products and the linear layer, on a CPU by the faster library.

PyTorch leaves float32 products on x86 to MKL, which does not use AVX-512 on chips other than
Intel's, and gives only narrower dtypes to oneDNN, which does. Here float32 goes to oneDNN too on
chips other than Intel's, where a product is large enough to pay for the call: half the time on an
AMD EPYC. On Intel's, MKL is the faster one. oneDNN compiles each new shape at its first use (see
`kernels.grouped_matmul.row_quantum`).
"""

import math
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    check_floating,
    check_same_device,
    check_shape,
    first_derivative_only,
)

# Multiplications, from which oneDNN is the faster one.
MIN_MULTIPLICATIONS = 1 << 22
# A weight gradient has its smaller factor transposed for oneDNN first, which pays from this many
# rows or columns of the result.
MIN_GRADIENT_SIZE = 256


def can_use_onednn() -> bool:
    """Whether oneDNN could multiply float32 here, with AVX-512."""
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    # An operator that PyTorch keeps for its compiler; without it, products stay with MKL.
    present = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return capable and present and torch.backends.mkldnn.is_available()


@cache
def prefers_onednn() -> bool:
    """Whether float32 products on this CPU go to oneDNN: where MKL does not use all of the chip."""
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # another system, or hidden: as PyTorch has it
        return False
    return can_use_onednn() and not intel


def goes_to_onednn(x: Tensor) -> bool:
    """Whether products of `x` that are large enough go to oneDNN by this file's doing."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and prefers_onednn()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) @ weight (N, K)^T; x is copied unless its rows are contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.mm` of a (M, K) and b (K, N), without gradients; float32 as this file says.

    Or `torch.bmm` of (B, M, K) and (B, K, N), which threads share better than B products, and which
    leaves float32 to MKL.
    out: (M, N) or (B, M, N), of any dtype.
    """
    if out is not None and out.dtype != a.dtype:
        return out.copy_(matmul(a, b))
    if a.dim() == 3:
        return torch.bmm(a, b, out=out)
    if not goes_to_onednn(a):
        return torch.mm(a, b, out=out)
    rows, columns = a.shape[0], b.shape[1]
    transposed = a.stride(1) != 1
    if rows * columns * a.shape[1] < MIN_MULTIPLICATIONS or (
        transposed and max(rows, columns) < MIN_GRADIENT_SIZE
    ):
        return torch.mm(a, b, out=out)
    # The first factor is copied unless its rows are contiguous: then rather the smaller one.
    product = _onednn(b.T, a).T if transposed and columns < rows else _onednn(a, b.T)
    return product if out is None else out.copy_(product)


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, of shapes and matrices as in `matmul`, all of one dtype."""
    if a.dim() == 3:
        return out.baddbmm_(a, b)
    return out.add_(matmul(a, b)) if goes_to_onednn(a) else out.addmm_(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.T)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        grad_y = grad_y.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = matmul(grad_y, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = matmul(grad_y.T, x)
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer without bias: y = weight x.

    Args:
        x: (..., D_in).
        weight: (D_out, D_in).
    Returns:
        (..., D_out) in the dtype of the matmul (autocast's, else that of `x`).
    Raises:
        ValueError: if the shapes, dtypes or devices do not fit.
    """
    check_shape("linear", "weight", weight, (None, None))
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, needs (..., {weight.shape[1]})")
    check_floating("linear", x=x, weight=weight)
    check_same_device("linear", x=x, weight=weight)
    if torch.compiler.is_compiling() or not goes_to_onednn(x) or weight.dtype != x.dtype:
        return F.linear(x, weight)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _Linear.apply(rows, weight).view(*x.shape[:-1], weight.shape[0])


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Forward and backward against `F.linear`."""
    shapes = ((512, 128, 256), (2048, 128, 384), (2048, 512, 1024), (2048, 128, 8192))
    return [
        CaseBuilder(name, partial(_benchmark_case, name, shape, dtype, device))
        for name, shape in (("T{} D{} N{}".format(*shape), shape) for shape in shapes)
    ]


def _benchmark_case(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> Case:
    num_tokens, d_in, d_out = shape
    torch.manual_seed(0)
    leaves = (
        leaf(num_tokens, d_in, dtype=dtype, device=device),
        leaf(d_out, d_in, std=d_in**-0.5, dtype=dtype, device=device),
    )
    return Case(
        name=name,
        ours=lambda x, weight, backend: linear(x, weight),
        leaves=leaves,
        reference=F.linear,
        rivals={"F.linear": Contestant(F.linear, leaves)},
        grad=torch.randn(num_tokens, d_out, device=device).to(dtype),
        tokens=num_tokens,
        flops=2 * num_tokens * d_in * d_out,
    )
