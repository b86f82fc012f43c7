"""Which implementation runs a kernel, in which dtype, and are its inputs what it needs?

`backend` is `auto`, `triton`, `torch` or `torch_compile`, and never falls back in silence: `auto`
takes Triton for a CUDA tensor where the operation has a Triton kernel and PyTorch elsewhere;
`triton` raises where there is none. In Triton's interpreter (TRITON_INTERPRET=1) `triton` runs on
CPU tensors too. `torch_compile` is `torch` on a CPU, where the expert layer's activations and their
gradients are compiled by `torch.compile` at their first use: half a minute on a new machine,
seconds later. It needs a C++ compiler and Python's headers; operations with nothing to compile run
as on `torch`.
"""

import ctypes
import functools
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

BACKENDS = ("auto", "triton", "torch", "torch_compile")
# Whether Triton is installed: it has no builds for some platforms.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# What Triton's matrix units multiply here.
MATMUL_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Devices with autocast that kernels here may meet: torch.compile of PyTorch 2.11 cannot trace
# `torch.amp.is_autocast_available`.
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def resolve_backend(op: str, backend: str, x: torch.Tensor, *, has_triton: bool = False) -> str:
    """Return `triton`, `torch` or `torch_compile`: what `backend` comes to for `op` on `x`.

    Raises:
        ValueError: if `backend` is unknown, or `triton` is asked for and `op` has no such kernel or
            `x` is neither on a GPU nor the interpreter on, or `torch_compile` and `x` is not on a
            CPU or there is no C++ compiler.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend ({backend!r}) must be one of {', '.join(BACKENDS)}")
    if backend == "triton":
        if not has_triton:
            raise ValueError(
                f"{op}: backend 'triton' has no kernel for this operation; use 'auto' or 'torch'"
            )
        if not HAS_TRITON:
            raise ValueError(f"{op}: backend 'triton', but triton is not installed; use 'torch'")
        if x.device.type != "cuda" and not interpreting():
            raise ValueError(
                f"{op}: backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1, for tests), "
                f"got {x.device.type}; use 'auto' or 'torch'"
            )
        if x.dtype not in _TRITON_DTYPES:
            raise ValueError(
                f"{op}: backend 'triton' computes in float32 at most, got {x.dtype}; use 'torch'"
            )
        return "triton"
    if backend == "torch_compile":
        if x.device.type != "cpu":
            raise ValueError(
                f"{op}: backend 'torch_compile' is for CPUs, got {x.device.type}; use 'auto'"
            )
        if not has_compiler():
            raise ValueError(
                f"{op}: backend 'torch_compile' needs a C++ compiler, and there is no "
                f"{_compiler()!r} (install it, or name another in CXX); use 'torch'"
            )
        return backend
    fits = has_triton and HAS_TRITON and x.device.type == "cuda" and x.dtype in _TRITON_DTYPES
    return "triton" if backend == "auto" and fits else "torch"


def _compiler() -> str:
    """The C++ compiler that `torch.compile` calls."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def has_compiler() -> bool:
    """Whether `torch.compile` finds a C++ compiler here."""
    return _is_installed(_compiler())


@functools.cache
def _is_installed(program: str) -> bool:
    return shutil.which(program) is not None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the matmuls on `x`: autocast's where that is on for the device, else its own.

    As in PyTorch's own autocast, float64 stays float64.
    """
    narrows = x.is_floating_point() and x.dtype != torch.float64
    narrows = narrows and x.device.type in _AUTOCAST_DEVICES
    if narrows and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def no_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves `x`'s device alone: kernels choose dtypes themselves."""
    if x.device.type not in _AUTOCAST_DEVICES:
        return nullcontext()
    return torch.autocast(device_type=x.device.type, enabled=False)


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which Triton launches on the GPU of `x`, not on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse `create_graph=True`: a backward pass that fills buffers would be cut from the graph.

    PyTorch's `once_differentiable` puts an error there which nothing meets that asks, with
    `torch.autograd.grad`, for the gradients of leaves alone: they would be wrong without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of this kernel cannot be differentiated again: drop create_graph=True"
            )
        return backward(ctx, *grads)

    return wrapper


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it is: for sums and scores that bfloat16 would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_shape(op: str, name: str, x: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `x` has `shape`; None in `shape` stands for any size."""
    fits = x.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, needs ({wanted})")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all given tensors live on one device."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: tensors on different devices: {listed}")


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all given tensors hold floating-point numbers."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op}: {name} is {x.dtype}, needs a floating-point dtype")


def check_integers(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all given tensors hold integers."""
    for name, x in tensors.items():
        if x is not None and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            raise ValueError(f"{op}: {name} is {x.dtype}, needs integers")


def check_offsets(op: str, expert_offsets: torch.Tensor, num_rows: int) -> None:
    """Raise ValueError unless the offsets ascend from 0 to at most R; waits for a GPU."""
    offsets = expert_offsets.tolist()
    ascend = all(first <= end for first, end in itertools.pairwise(offsets))
    if offsets[0] != 0 or not ascend or offsets[-1] > num_rows:
        raise ValueError(
            f"{op}: expert_offsets ({offsets}) must ascend from 0 to at most the number of rows "
            f"({num_rows})"
        )


def tune_allocator() -> None:
    """Keep freed memory in the process, where the C library is glibc.

    By default each large tensor is mapped afresh and its pages fault in at every step, 10-30 % of
    the time of a step on a CPU.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, 2**31 - 1)
