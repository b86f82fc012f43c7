"""Rotary position embedding, half-split form.

With x1, x2 the halves of a head's vector and angle = position * theta^(-2i/P):

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

A rotation, so its backward is the rotation by the negative angle.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    check_floating,
    check_integers,
    check_same_device,
    check_shape,
    no_autocast,
    resolve_backend,
)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, each (S, P/2).

    In float32, as the rotation itself: bfloat16 cannot tell positions above 256 apart.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float().unsqueeze(-1) * theta**-exponent  # (S, P/2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (S, 1, P/2)
    x1, x2 = x[..., :half].to(cos.dtype), x[..., half:].to(cos.dtype)
    out = torch.empty_like(x)
    out[..., :half] = (x1 * cos).addcmul_(x2, sin, value=-1)
    out[..., half:] = (x2 * cos).addcmul_(x1, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        return _rotate(grad_q, cos, -sin), _rotate(grad_k, cos, -sin), None, None


def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, *, theta: float = 10000.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: (B, S, H, P). k: (B, S, G, P). P even.
        positions: (S,) int.
        theta: base of the wavelengths.
        backend: see `kernels.launch`.
    Returns:
        q and k rotated, same shapes and dtypes.
    Raises:
        ValueError: if P is odd, or shapes, dtypes or devices do not fit.
    Source: Su et al., RoFormer, arXiv 2104.09864; the split into halves as in GPT-NeoX.
    """
    check_shape("apply_rope", "q", q, (None, None, None, None))
    check_shape("apply_rope", "k", k, (q.shape[0], q.shape[1], None, q.shape[3]))
    check_shape("apply_rope", "positions", positions, (q.shape[1],))
    check_floating("apply_rope", q=q, k=k)
    check_integers("apply_rope", positions=positions)
    check_same_device("apply_rope", q=q, k=k, positions=positions)
    if q.shape[-1] % 2:
        raise ValueError(f"apply_rope: head_dim ({q.shape[-1]}) must be even")
    triton = resolve_backend("apply_rope", backend, q, has_triton=True) == "triton"
    cos, sin = rope_tables(positions, q.shape[-1], theta)
    if triton:
        from kernels.rope_triton import rope_op

        return rope_op(q, k, cos, sin, False)
    if q.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    with no_autocast(q):
        return _Rope.apply(q, k, cos, sin)


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Queries and keys, against the formula with `torch.cat` as Hugging Face writes it."""
    shapes = ((8, 256, 8, 32), (8, 4096, 32, 128))
    builders = []
    for shape in shapes:
        name = "B{} S{} H{} P{}".format(*shape)
        build = partial(_benchmark_case, name, shape, dtype, device)
        builders.append(CaseBuilder(name, build))
    return builders


def _benchmark_case(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Case:
    batch, seq_len, _, head_dim = shape
    torch.manual_seed(0)
    q, k = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
    positions = torch.arange(seq_len, device=device)

    def formula(q: Tensor, k: Tensor) -> Tensor:
        cos, sin = (
            table.to(q.dtype).unsqueeze(1) for table in rope_tables(positions, head_dim, 1e4)
        )
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)  # (S, 1, P)

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        return torch.stack([turned(q), turned(k)])

    return Case(
        name=name,
        ours=lambda q, k, backend: torch.stack(apply_rope(q, k, positions, backend=backend)),
        leaves=(q, k),
        reference=formula,
        rivals={"formula": Contestant(formula, (q, k))},
        grad=torch.randn(2, *shape, device=device).to(dtype),
        tokens=batch * seq_len,
        # The stack that makes one output of two is counted too: on both sides.
        moved_bytes=8 * q.numel() * q.element_size(),
    )
