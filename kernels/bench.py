"""How fast is a kernel, against named rivals and the machine's own limits?

    python -m kernels.bench OP [--shapes NAME ...] [--device cpu|cuda] [--dtype bfloat16]
                               [--repeats N] [--threads N] [--json FOLDER] [--tune]

OP is a file of this folder with `benchmark_cases()`, in it or in OP_benchmark.py beside it, or
`all` of them. Forward and gradients are checked against an exact reference first; a wrong result
is not timed. All contestants run in one process, in turns. Printed are medians with the middle
half's spread, TFLOP/s or GB/s, and the share of what a plain matmul or a copy reaches on the same
machine in the same run; for ours also the bytes that are saved for the backward pass, and on a GPU
the peak memory. --json adds a file CHIP_OP_DTYPE.json to a folder, of which `kernels.report` makes
tables.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.launch import has_compiler, resolve_backend, tune_allocator


class Contestant(NamedTuple):
    """One implementation: run(*leaves) -> output.

    leaves: tensors whose gradients are asked for, none for an operation on indices. same: whether
    the output is that of the operation, and not of another one that stands for a limit.
    """

    run: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    same: bool = True

    def both(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The output, and the gradients of the leaves for the output's gradient `grad`."""
        out = self.run(*self.leaves)
        if not self.leaves:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, self.leaves, grad.to(out.dtype))


class Case(NamedTuple):
    """One shape of one operation.

    ours: takes `backend` and the leaves. reference: the same function of the leaves, for float64.
    rivals: by name.
    grad: gradient of the output. flops: of the forward pass, 0 where memory decides;
    backward_flops: as counted where such kernels are compared, None for twice as many. moved_bytes:
    what the forward pass has to read and write. tokens: rows of the input. compiles: whether
    `torch_compile` is anything but `torch` here.
    """

    name: str
    ours: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    reference: Callable[..., Tensor]
    rivals: Mapping[str, Contestant]
    grad: Tensor
    tokens: int
    flops: float = 0.0
    moved_bytes: float = 0.0
    backward_flops: float | None = None
    compiles: bool = False


class CaseBuilder(NamedTuple):
    """A case by name, whose tensors are made only when it is run."""

    name: str
    case: Callable[[], Case]


class Limits(NamedTuple):
    """What the machine reaches: FLOP/s of a plain matmul, bytes/s of a copy (read and written)."""

    flops: float
    bandwidth: float


# Largest error, relative to the largest entry of the reference, at which a result is timed.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def leaf(*shape: int, std: float = 1.0, dtype: torch.dtype, device: str) -> Tensor:
    """A normal random tensor that takes gradients."""
    return torch.randn(*shape, device=device).mul_(std).to(dtype).requires_grad_()


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
    # Not at the head: that file measures itself with this one.
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


def largest_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Largest difference over all tensors, each relative to the largest entry of its reference.

    Integers are right or wrong.
    """
    errors = [0.0]
    for a, b in zip(got, want, strict=True):
        if a.numel() == 0:
            continue
        if not b.is_floating_point():
            errors.append(0.0 if torch.equal(a, b) else float("inf"))
            continue
        scale = b.detach().abs().max().double().clamp(min=1e-30)
        error = (a.detach().double() - b.detach().double()).abs().max() / scale
        errors.append(float(error) if torch.isfinite(error) else float("inf"))
    return max(errors)


def saved_bytes(contestant: Contestant) -> int:
    """Bytes that the forward pass keeps for the backward pass, leaves left out."""
    leaves = {leaf.untyped_storage().data_ptr() for leaf in contestant.leaves}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in leaves:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        contestant.run(*contestant.leaves)
    return sum(kept.values())


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Most memory allocated on the GPU during a call, above what there was; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def backends_for(case: Case) -> list[str]:
    """The implementations of ours to time: Triton's where it compiles, and PyTorch's."""
    # In the interpreter, only `triton` by name is taken, and its time says nothing.
    if resolve_backend("bench", "auto", case.grad, has_triton=True) == "triton":
        return ["triton", "torch"]
    compiles = case.compiles and not case.grad.is_cuda and has_compiler()
    return ["torch", "torch_compile"] if compiles else ["torch"]


def reference_of(case: Case) -> tuple[Tensor, ...]:
    """Output and gradients in float64; those of bfloat16 on a GPU in float32, to spare memory."""
    short = case.grad.is_cuda and case.grad.dtype == torch.bfloat16
    exact = torch.float32 if short else torch.float64
    leaves = tuple(x.detach().to(exact).requires_grad_() for x in case.leaves)
    return Contestant(case.reference, leaves).both(case.grad)


def run_case(case: Case, repeats: int, limits: Limits, tolerance: float) -> dict[str, Any]:
    """Check, then time one case.

    Returns: `name`, and either `wrong` (a line) or `contestants`: name -> milliseconds of
    `forward`, `backward` and `both` (medians), `spread` of both, rates, share of the limit,
    `error`; of a rival that fails or is wrong, `wrong` alone.
    """
    expected = reference_of(case)
    result: dict[str, Any] = {"name": case.name, "contestants": {}}
    contestants: dict[str, Contestant] = {}
    for backend in backends_for(case):
        ours = Contestant(partial(case.ours, backend=backend), case.leaves)
        error = largest_error(ours.both(case.grad), expected)
        if not error <= tolerance:
            result["wrong"] = f"{backend}: WRONG, error {error:.1e} above {tolerance:.0e}"
            return result
        contestants[f"ours ({backend})"] = ours
        result["contestants"][f"ours ({backend})"] = {
            "error": error,
            "saved_bytes_per_token": saved_bytes(ours) / max(1, case.tokens),
            "peak_bytes": peak_bytes(partial(ours.both, case.grad)),
        }
    for name, rival in case.rivals.items():
        wrong = _what_is_wrong(rival, case.grad, expected[0], tolerance)
        if wrong is None:
            contestants[name] = rival
        else:
            result["contestants"][name] = {"wrong": wrong}
    forward = {name: partial(each.run, *each.leaves) for name, each in contestants.items()}
    both = {name: partial(each.both, case.grad) for name, each in contestants.items()}
    clock = clock_of(case.grad.device)
    seconds = {
        "forward": seconds_of(forward, repeats, clock),
        "both": seconds_of(both, repeats, clock),
    }
    for name in contestants:
        facts = result["contestants"].setdefault(name, {})
        facts |= _timing(case, {which: seconds[which][name] for which in seconds}, limits)
    return result


def _what_is_wrong(
    rival: Contestant, grad: Tensor, expected: Tensor, tolerance: float
) -> str | None:
    """Why a rival is not timed: it fails here, or its output is another one."""
    try:
        output = rival.both(grad)[0]
    except Exception as error:  # whatever a library of others raises
        lines = str(error).strip().splitlines() or [""]
        return f"fails here: {type(error).__name__}: {lines[0]}"
    # A rival may round where ours does not: its gradients are its own affair.
    off = largest_error((output,), (expected,)) if rival.same else 0.0
    return None if off <= 3 * tolerance else f"WRONG, error {off:.1e}"


def _timing(case: Case, seconds: Mapping[str, list[float]], limits: Limits) -> dict[str, Any]:
    forward, both = (statistics.median(seconds[which]) for which in ("forward", "both"))
    quartiles = statistics.quantiles(seconds["both"], n=4) if len(seconds["both"]) > 1 else [0, 0]
    facts: dict[str, Any] = {
        "forward_ms": forward * 1e3,
        "backward_ms": (both - forward) * 1e3,
        "both_ms": both * 1e3,
        "spread": (quartiles[-1] - quartiles[0]) / both,
    }
    if case.flops:
        doubled = 2 * case.flops
        of_backward = doubled if case.backward_flops is None else case.backward_flops
        work = {
            "forward": (case.flops, forward),
            "backward": (of_backward, both - forward),
            "both": (case.flops + of_backward, both),
        }
        for which, (flops, time_taken) in work.items():
            facts[f"{which}_tflops"] = flops / time_taken / 1e12 if time_taken > 0 else None
        facts["share_of_matmul"] = (case.flops + of_backward) / both / limits.flops
    if case.moved_bytes:
        facts["forward_gbps"] = case.moved_bytes / forward / 1e9
        facts["share_of_copy"] = case.moved_bytes / forward / limits.bandwidth
    return facts


def render(result: Mapping[str, Any]) -> str:
    """Lines of the table for one case."""
    if "wrong" in result:
        return f"{result['name']}: {result['wrong']}; not timed"
    lines = [result["name"]]
    fastest = min(
        facts["both_ms"] for name, facts in result["contestants"].items() if name.startswith("ours")
    )
    for name, facts in result["contestants"].items():
        if "wrong" in facts:
            lines.append(f"  {name:32} {facts['wrong']}; not timed")
            continue
        parts = [
            f"{facts['forward_ms']:9.3f} + {facts['backward_ms']:9.3f} = {facts['both_ms']:9.3f} ms"
            f" ±{facts['spread'] / 2:.0%}"
        ]
        if "both_tflops" in facts:
            rates = [facts[f"{which}_tflops"] for which in ("forward", "backward", "both")]
            listed = " / ".join("-" if rate is None else f"{rate:.3g}" for rate in rates)
            parts.append(f"{listed} TFLOP/s ({facts['share_of_matmul']:.0%} of matmul)")
        if "forward_gbps" in facts:
            parts.append(f"{facts['forward_gbps']:.0f} GB/s ({facts['share_of_copy']:.0%} of copy)")
        if "error" in facts:
            parts.append(f"error {facts['error']:.1e}")
            parts.append(f"saves {facts['saved_bytes_per_token']:,.0f} B/token")
            if facts["peak_bytes"] is not None:
                parts.append(f"peak {facts['peak_bytes'] / 2**20:,.0f} MiB")
        else:
            parts.append(f"{facts['both_ms'] / fastest:.2f}x ours")
        lines.append(f"  {name:32} " + ", ".join(parts))
    return "\n".join(lines)


def operations() -> list[str]:
    """The files of this folder that can be measured."""
    here = Path(__file__).parent
    texts = {
        path.stem: path.read_text() for path in sorted(here.glob("*.py")) if path.stem != "bench"
    }
    measured = [name for name, text in texts.items() if "\ndef benchmark_cases(" in text]
    return [name.removesuffix("_benchmark") for name in measured]


def cases_of(op: str, dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Its cases, from the file that has them."""
    beside = importlib.util.find_spec(f"kernels.{op}_benchmark")
    module = importlib.import_module(f"kernels.{op}_benchmark" if beside else f"kernels.{op}")
    return module.benchmark_cases(dtype, device)


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


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark of one operation, or of all; 1 if any result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("op", metavar="OP", help=f"all, or one of {', '.join(operations())}")
    parser.add_argument(
        "--shapes", nargs="+", help="names of cases; those that contain one of them"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write the results there too")
    parser.add_argument(
        "--tune", action="store_true", help="search tiles, write kernels/tiles.json"
    )
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.op not in ("all", *operations()):
        return _refuse(f"OP ({options.op}) must be all, or one of {', '.join(operations())}")
    if options.repeats < 1 or (options.threads is not None and options.threads < 1):
        return _refuse("--repeats and --threads must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: PyTorch sees no GPU; leave the option out, or use cpu")
    if options.tune and device == "cpu":
        return _refuse("--tune needs a GPU: tiles are those of Triton's kernels")
    if options.json and options.json.exists() and not options.json.is_dir():
        return _refuse(f"--json ({options.json}) must be a folder")
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_allocator()
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    limits = Limits(matmul_rate(dtype, device), copy_rate(device))
    facts = machine_facts(device) | {"dtype": str(dtype).removeprefix("torch.")}
    facts |= {"matmul_tflops": limits.flops / 1e12, "copy_gbps": limits.bandwidth / 1e9}
    print(
        f"{facts['dtype']} on {device} ({facts['chip']}), torch {facts['torch']}, triton "
        f"{facts['triton']}, {facts['threads']} threads; limits: matmul "
        f"{facts['matmul_tflops']:.3g} TFLOP/s, copy {facts['copy_gbps']:.0f} GB/s\n"
        f"forward + backward = both, medians of {options.repeats} in turns"
    )
    results = []
    for op in operations() if options.op == "all" else [options.op]:
        print(op)
        results += run_operation(
            op, options, limits, facts | {"op": op, "repeats": options.repeats}
        )
    if not results:
        return _refuse(f"--shapes {' '.join(options.shapes or [])}: no such case")
    return int(any("wrong" in result for result in results))


def run_operation(
    op: str, options: argparse.Namespace, limits: Limits, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure and print the cases of one operation; write them if asked to."""
    dtype = getattr(torch, facts["dtype"])
    results: list[dict[str, Any]] = []
    for build in cases_of(op, dtype, facts["device"]):
        if options.shapes and not any(name in build.name for name in options.shapes):
            continue
        if options.tune:
            tune_here(build.case(), TOLERANCE[dtype], options.repeats)
        try:
            results.append(run_case(build.case(), options.repeats, limits, TOLERANCE[dtype]))
        except torch.OutOfMemoryError:
            results.append({"name": build.name, "contestants": {}, "wrong": "out of memory"})
        print(render(results[-1]), flush=True)
        if options.json:
            # After each case: what was measured stays, whatever the next one meets.
            options.json.mkdir(parents=True, exist_ok=True)
            chip = re.sub("[^a-z0-9]+", "_", facts["chip"].lower()).strip("_")
            path = options.json / f"{chip}_{op}_{facts['dtype']}.json"
            path.write_text(json.dumps(facts | {"cases": results}, indent=1) + "\n")
    return results


def tune_here(case: Case, tolerance: float, repeats: int) -> None:
    """`--tune` for one case."""
    from kernels.tune import tune_case

    print(f"{case.name}: tuning")
    if not tune_case(case, tolerance, repeats, partial(print, flush=True)):
        print("the tiles of kernels/tiles.json are best")


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
