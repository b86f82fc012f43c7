"""SwiGLU between the matmuls of the experts, element by element, in PyTorch.

H of n rows is (2, n, F), gate and up, or (1, n, 2F), both side by side.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels.launch import at_least_float32

# A process with several models needs more compiled variants than the 8 that PyTorch allows.
MAX_VARIANTS = 64
# Elements of A from which the forward pass is compiled: of few, the call costs more than it saves.
MIN_ACTIVATIONS = 1 << 20
# Products that `dot_rows` holds at a time.
DOT_ELEMENTS = 1 << 18
_Pair = tuple[Tensor, Tensor]


def gate_and_up(h: Tensor) -> tuple[Tensor, Tensor]:
    """Views (n, F) of H, whichever way it is laid out."""
    gate, up = h.unbind(0) if h.shape[0] == 2 else h[0].chunk(2, -1)
    return gate, up


def clamped(gate: Tensor, up: Tensor, clamp: float | None) -> tuple[Tensor, Tensor]:
    """min(gate, clamp) and clip(up, -clamp, clamp), of equal shapes; None for no clamp."""
    return (gate, up) if clamp is None else (gate.clamp(max=clamp), up.clamp(-clamp, clamp))


def activate(h: Tensor, clamp: float | None, *, compiled: bool) -> Tensor:
    """A = silu(gate) * up (n, F).

    compiled: much float32 in one pass of a kernel by `torch.compile`, which takes 0.65 of the time
    of PyTorch's two; bfloat16 was measured to gain nothing in a layer.
    """
    pair = gate_and_up(h)
    much = h.dtype == torch.float32 and pair[0].numel() >= MIN_ACTIVATIONS
    if compiled and much and _may_compile(h):
        a = h.new_empty(pair[0].shape)
        _compiled(_fill_activation)(pair, a, _clamp_tensor(clamp, h.device))
        return a
    gate, up = clamped(*pair, clamp)
    return F.silu(gate) * up


def activate_backward(
    h: Tensor,
    grad_a: Tensor,
    scale: Tensor | None,
    dots: Tensor | None,
    clamp: float | None,
    *,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """s A (n, F) anew, and s times the gradient of H, laid out as H, from that of A.

    scale: s (n,); None for 1, where it is not compiled. dots: (n,), filled with <dA, A> of each
    row; None where that is not wanted. compiled: in one pass of a kernel by `torch.compile`, which
    takes half the time of PyTorch's six, or eight with a scale, and rounds once.
    """
    a, grad_h = torch.empty_like(grad_a), torch.empty_like(h)
    tensors = gate_and_up(h), grad_a, scale, a, gate_and_up(grad_h), dots
    if compiled and _may_compile(h):
        _compiled(_fill_gradients)(*tensors, _clamp_tensor(clamp, h.device))
    else:
        _fill_by_passes(*tensors, clamp)
    return a, grad_h


def _fill_by_passes(
    h: _Pair,
    grad_a: Tensor,
    scale: Tensor | None,
    a: Tensor,
    grad_h: _Pair,
    dots: Tensor | None,
    clamp: float | None,
) -> None:
    """Fill s A, s times the gradients of gate and up, and <dA, A>."""
    (gate, up), (grad_gate, grad_up) = clamped(*h, clamp), grad_h
    activated = F.silu(gate)
    torch.mul(activated, up, out=a)
    if dots is not None:
        dots.copy_(dot_rows(grad_a, a))
    if scale is not None:
        a.mul_(scale.unsqueeze(-1))
        grad_a = grad_a * scale.unsqueeze(-1)
    torch.mul(activated, grad_a, out=grad_up)
    torch.ops.aten.silu_backward(grad_a * up, gate, grad_input=grad_gate)
    if clamp is not None:
        grad_gate.masked_fill_(h[0] > clamp, 0)
        grad_up.masked_fill_(h[1].abs() > clamp, 0)


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """(n,) <a[i], b[i]> of two (n, F), in float32 at least: PyTorch's products of matrices would
    round it to their dtype. On a CPU in parts, whose products stay in the cache."""
    num_rows, size = a.shape
    dtype = torch.promote_types(a.dtype, torch.float32)
    step = max(1, num_rows if a.is_cuda else DOT_ELEMENTS // max(size, 1))
    dots, products = a.new_empty(num_rows, dtype=dtype), a.new_empty(step, size, dtype=dtype)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        part = products[: rows.stop - first].copy_(a[rows]).mul_(b[rows])
        torch.sum(part, -1, out=dots[rows])
    return dots


def _fill_activation(h: _Pair, a: Tensor, clamp: Tensor | None) -> None:
    """Fill A, in plain operators, which the compiler fuses."""
    gate, up = h
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    a.copy_(gate * torch.sigmoid(gate) * up)


def _fill_gradients(
    h: _Pair,
    grad_a: Tensor,
    scale: Tensor,
    a: Tensor,
    grad_h: _Pair,
    dots: Tensor | None,
    clamp: Tensor | None,
) -> None:
    """What `_fill_by_passes` fills, in plain operators; in float32 until it is stored."""
    raw_gate, raw_up, grad_a = (at_least_float32(x) for x in (*h, grad_a))
    gate, up = raw_gate, raw_up
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    slope = sigmoid + activated * (1 - sigmoid)
    grad_gate, grad_up = grad_a * up * slope, grad_a * activated
    if clamp is not None:
        grad_gate = grad_gate.masked_fill(raw_gate > clamp, 0)
        grad_up = grad_up.masked_fill(raw_up.abs() > clamp, 0)
    product = activated * up
    if dots is not None:
        dots.copy_((grad_a * product).sum(-1))
    factor = at_least_float32(scale).unsqueeze(-1)
    a.copy_(product * factor)
    grad_h[0].copy_(grad_gate * factor)
    grad_h[1].copy_(grad_up * factor)


def _may_compile(h: Tensor) -> bool:
    """Not for a single row, for which the compiler would make another kernel; nor where something
    looks at each operator, to count or to trace it, and must find one."""
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return h.shape[1] > 1 and not watched


def _clamp_tensor(clamp: float | None, device: torch.device) -> Tensor | None:
    """The clamp as compiled formulas take it: not as a number, since PyTorch 2.13 finds the kernel
    of another number on disk and takes that."""
    return None if clamp is None else torch.tensor(clamp, dtype=torch.float64, device=device)


def _compiled(formula: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call with each dtype, layout of H and number of threads, with or
    without a clamp and with or without `dots`; PyTorch keeps what it has compiled on disk."""
    # In each thread anew, which all have a limit of their own.
    if torch.compiler.config.recompile_limit < MAX_VARIANTS:
        torch.compiler.config.recompile_limit = MAX_VARIANTS
    return _compile(formula)


@cache
def _compile(formula: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(formula, dynamic=True, fullgraph=True)
