"""On which device does this process run, in which precision, and on which kernels?"""

import time
from functools import cache

import torch

from kernels.launch import resolve_backend
from kernels.swiglu_torch import activate_backward
from train.errors import ConfigError


def choose_device(setting: str) -> str:
    """`cpu` or `cuda`; `auto` takes a GPU where there is one."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "training.device: cuda, but PyTorch sees no GPU; set training.device: auto, or install "
            "a CUDA build of torch (README, set-up)"
        )
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return setting


def choose_precision(setting: str, device: str, *, earlier: str | None = None) -> str:
    """`float32` or `bfloat16`; `auto` keeps what the run has used, or takes the faster.

    Args:
        setting: of `training.precision`. device: `cpu` or `cuda`.
        earlier: what the run has used so far, None at its beginning.
    """
    if setting != "auto":
        return setting
    return earlier or ("bfloat16" if bfloat16_is_faster(device) else "float32")


def choose_kernels(setting: str, device: str) -> str:
    """`triton`, `torch` or `torch_compile`: what `model.kernel_backend` comes to on this device.

    `torch_compile` is tried once, which takes up to half a minute on a new machine.

    Raises:
        ConfigError: if a backend is asked for that cannot run here.
    """
    try:
        probe = torch.empty(0, device=device)
        chosen = resolve_backend("model.kernel_backend", setting, probe, has_triton=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if chosen == "torch_compile":
        _try_compiler()
    return chosen


@cache
def _try_compiler() -> None:
    try:
        h, grad_a = torch.zeros(1, 2, 8), torch.zeros(2, 4)
        activate_backward(h, grad_a, torch.ones(2), torch.empty(2), None, compiled=True)
    except RuntimeError as error:  # a compiler that fails, no headers of Python, a full disk, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A compiler says what is missing amid pages of flags.
        reason = next((line for line in lines if "error: " in line), lines[0])
        raise ConfigError(
            f"model.kernel_backend: torch_compile, but PyTorch cannot compile here ({reason}); "
            f"install a C++ compiler and Python's headers, or set model.kernel_backend: torch"
        ) from error


def bfloat16_is_faster(device: str) -> bool:
    """Whether matmuls in bfloat16 take at most 3/4 of the time of float32, measured (about 20 ms).

    Whether a CPU has the instructions is not enough: some emulate them and are slower.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    # On one thread: several wait for each other where another process has a core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < 0.75 * seconds[torch.float32]
