"""What is this machine, and how fast can it go? Clocks and limits of all benchmarks."""

import functools
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """What the machine reaches: FLOP/s of a plain matmul, bytes/s of a copy (read and written)."""

    flops: float
    bandwidth: float


def host_seconds(call: Callable[[], object]) -> float:
    """Of one call as the program sees it, until the GPU is done too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gpu_seconds(call: Callable[[], object]) -> float:
    """Of what one call does on the GPU, by the GPU's clock and with cold caches.

    A write of 1 GiB before it flushes the caches, and keeps the GPU busy (0.2 ms at 4.8 TB/s) while
    the host launches the first kernels: of a short operation the launches are not timed.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flushed_memory().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _flushed_memory() -> Tensor:
    return torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def clock_of(device: str | torch.device) -> Callable[[Callable[[], object]], float]:
    """What times an operation on that device."""
    return gpu_seconds if torch.device(device).type == "cuda" else host_seconds


def seconds_of(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = host_seconds,
) -> dict[str, list[float]]:
    """Time contestants in turns, after two calls each to warm up; seconds of every call.

    In turns, since the speed of a shared or warming machine drifts over seconds.
    """
    for call in contestants.values():
        clock(call)
        clock(call)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, call in contestants.items():
            times[name].append(clock(call))
    return times


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best of several square matmuls: the machine's limit as PyTorch's libraries
    reach it, by whichever way."""
    # Not at the head: that file is measured by one that imports this.
    from kernels.matmul import matmul

    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        x = torch.randn(size, size, device=device).to(dtype)
        times = seconds_of({"matmul": partial(matmul, x, x)}, 8, clock_of(device))["matmul"]
        best = max(best, 2 * size**3 / min(times))
    return best


def copy_rate(device: str) -> float:
    """Bytes/s, read and written, of a copy much larger than the caches."""
    source = torch.zeros((1 << 27) if device == "cpu" else (1 << 30), dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    times = seconds_of({"copy": partial(target.copy_, source)}, 8, clock_of(device))["copy"]
    return 2 * source.numel() / min(times)


def chip_name(device: str) -> str:
    """`NVIDIA H200`, `AMD EPYC`, ..."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_facts(device: str) -> dict[str, Any]:
    """What a result depends on: chip, versions, commit."""
    facts = {
        "device": device,
        "chip": chip_name(device),
        "torch": torch.__version__,
        "commit": commit_of(Path(__file__).parents[1]),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    return facts | {"python": platform.python_version(), "threads": torch.get_num_threads()}


def commit_of(checkout: Path) -> str | None:
    """The commit that is checked out, with `-dirty` behind it where tracked files are changed,
    except results and README.md, into which benchmarks write; None without git or a commit."""
    if shutil.which("git") is None:
        return None

    def git(*command: str) -> str:
        said = subprocess.run(["git", *command], capture_output=True, text=True, cwd=checkout)
        return said.stdout.strip()

    commit = git("describe", "--always")
    if not commit:
        return None
    paths = "--", ".", ":(exclude)kernels/results", ":(exclude)README.md"
    changed = git("status", "--porcelain", "--untracked-files=no", *paths)
    return f"{commit}-dirty" if changed else commit
