"""How fast is a kernel, against named rivals and the machine's own limit?

    python -m kernels.bench OP [--dtype float32|bfloat16] [--repeats N] [--threads N]

OP is a file of this folder with `benchmark_cases()`. A result is checked against its reference
first, and a wrong one is not timed. All contestants run in one process, in turns; printed are the
medians, the share of the machine's limit, and each rival's time over ours.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import tune_allocator


class Case(NamedTuple):
    """One shape of one operation.

    ours, reference (in float64) and each rival: () -> outputs and gradients. flops: floating-point
    operations of one call, 0 where memory decides.
    """

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    reference: Callable[[], tuple[Tensor, ...]]
    rivals: Mapping[str, Callable[[], tuple[Tensor, ...]]]
    flops: float = 0.0


# Largest error, relative to the largest entry of the reference, at which a result is timed.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def leaf(*shape: int, std: float = 1.0, dtype: torch.dtype, device: str) -> Tensor:
    """A normal random tensor that takes gradients."""
    return torch.randn(*shape, device=device).mul_(std).to(dtype).requires_grad_()


def seconds_of(
    contestants: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Time contestants in turns, after two calls each to warm up; seconds of every call.

    In turns, since the speed of a shared or warming machine drifts over seconds.
    """
    cuda = torch.cuda.is_available()

    def once(call: Callable[[], object]) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in contestants.values():
        once(call)
        once(call)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, call in contestants.items():
            times[name].append(once(call))
    return times


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best of several square matmuls: the machine's limit as PyTorch reaches it."""
    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        x = torch.randn(size, size, device=device).to(dtype)
        times = seconds_of({"mm": partial(torch.mm, x, x)}, 8)["mm"]
        best = max(best, 2 * size**3 / min(times))
    return best


def largest_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Largest difference over all tensors, each relative to the largest entry of its reference."""
    errors = [0.0]
    for a, b in zip(got, want, strict=True):
        scale = b.detach().abs().max().double().clamp(min=1e-30)
        error = (a.detach().double() - b.detach().double()).abs().max() / scale
        errors.append(float(error) if torch.isfinite(error) else float("inf"))
    return max(errors)


def run_case(case: Case, repeats: int, limit: float, tolerance: float) -> list[str]:
    """Check, then time; the lines of a table. A wrong result gives a line that says so."""
    error = largest_error(case.ours(), case.reference())
    if not error <= tolerance:
        return [f"{case.name}: WRONG, error {error:.1e} above {tolerance:.0e}; not timed"]
    times = seconds_of({"ours": case.ours, **case.rivals}, repeats)
    median = {name: statistics.median(values) for name, values in times.items()}
    ours = median["ours"]
    share = f", {case.flops / ours / limit:.0%} of the matmul limit" if case.flops else ""
    lines = [f"{case.name}: {ours * 1e3:.2f} ms (error {error:.1e}{share})"]
    lines += [
        f"    {name}: {value * 1e3:.2f} ms = {value / ours:.2f}x ours"
        for name, value in median.items()
        if name != "ours"
    ]
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark of one operation; 1 if any result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("op")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        cases_of = importlib.import_module(f"kernels.{options.op}").benchmark_cases
    except (ModuleNotFoundError, AttributeError):
        print(f"error: kernels/{options.op}.py has no benchmark_cases()", file=sys.stderr)
        return 2
    tune_allocator()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    limit = matmul_rate(dtype, device)
    print(
        f"{options.op} on {device}, {options.dtype}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; forward and backward; matmul limit {limit / 1e9:,.0f} GFLOP/s"
    )
    wrong = False
    for case in cases_of(dtype, device):
        lines = run_case(case, options.repeats, limit, TOLERANCE[dtype])
        wrong = wrong or "WRONG" in lines[0]
        print("\n".join(lines), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
