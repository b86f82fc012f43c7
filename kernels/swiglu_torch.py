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

MAX_VARIANTS = 64


def gate_and_up(h: Tensor) -> tuple[Tensor, Tensor]:
    """Views (n, F) of H, whichever way it is laid out."""
    gate, up = h.unbind(0) if h.shape[0] == 2 else h[0].chunk(2, -1)
    return gate, up


def clamped(gate: Tensor, up: Tensor, clamp: float | None) -> tuple[Tensor, Tensor]:
    """min(gate, clamp) and clip(up, -clamp, clamp), of equal shapes; None for no clamp."""
    return (gate, up) if clamp is None else (gate.clamp(max=clamp), up.clamp(-clamp, clamp))


def activate(h: Tensor, clamp: float | None) -> Tensor:
    """A = silu(gate) * up (n, F)."""
    gate, up = clamped(*gate_and_up(h), clamp)
    return F.silu(gate) * up


def activate_backward(
    h: Tensor, grad_a: Tensor, clamp: float | None, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """A (n, F) anew, and the gradient of H, laid out as H, from that of A.

    compiled: in one pass of a kernel by `torch.compile`, which takes half the time of PyTorch's
    five passes and rounds once. The forward pass, of two, gains nothing.
    """
    a, grad_h = torch.empty_like(grad_a), torch.empty_like(h)
    # For a single row the compiler would make another kernel, and what looks at each operator, to
    # count or to trace it, must find one.
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if compiled and len(grad_a) > 1 and not watched:
        # A tensor: with another number PyTorch 2.13 finds the kernel of the first one on disk.
        bound = None if clamp is None else torch.tensor(clamp, dtype=torch.float64, device=h.device)
        _compiled_formula()(*gate_and_up(h), grad_a, a, *gate_and_up(grad_h), bound)
    else:
        _fill_by_passes(*gate_and_up(h), grad_a, a, *gate_and_up(grad_h), clamp)
    return a, grad_h


def _fill_by_passes(
    raw_gate: Tensor,
    raw_up: Tensor,
    grad_a: Tensor,
    a: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
    clamp: float | None,
) -> None:
    gate, up = clamped(raw_gate, raw_up, clamp)
    activated = F.silu(gate)
    torch.mul(activated, grad_a, out=grad_up)
    torch.ops.aten.silu_backward(grad_a * up, gate, grad_input=grad_gate)
    torch.mul(activated, up, out=a)
    if clamp is not None:
        grad_gate.masked_fill_(raw_gate > clamp, 0)
        grad_up.masked_fill_(raw_up.abs() > clamp, 0)


def _fill_by_formula(
    raw_gate: Tensor,
    raw_up: Tensor,
    grad_a: Tensor,
    a: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
    clamp: Tensor | None,
) -> None:
    """The same in plain operators, which the compiler fuses; in float32 until they are stored."""
    raw_gate, raw_up, grad_a = (at_least_float32(x) for x in (raw_gate, raw_up, grad_a))
    gate, up = raw_gate, raw_up
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    slope = sigmoid + activated * (1 - sigmoid)
    of_gate, of_up = grad_a * up * slope, grad_a * activated
    if clamp is not None:
        of_gate = of_gate.masked_fill(raw_gate > clamp, 0)
        of_up = of_up.masked_fill(raw_up.abs() > clamp, 0)
    a.copy_(activated * up)
    grad_gate.copy_(of_gate)
    grad_up.copy_(of_up)


def _compiled_formula() -> Callable[..., None]:
    """Compiled at the first call with each dtype, layout of H, number of threads, and with or
    without a clamp; PyTorch keeps what it has compiled on disk."""
    # A process with several models needs more variants than the 8 that PyTorch allows a function,
    # in each thread anew.
    if torch.compiler.config.recompile_limit < MAX_VARIANTS:
        torch.compiler.config.recompile_limit = MAX_VARIANTS
    return _compile()


@cache
def _compile() -> Callable[..., None]:
    return torch.compile(_fill_by_formula, dynamic=True, fullgraph=True)
