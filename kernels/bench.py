"""How fast is a kernel, against named rivals and the machine's own limits?

    python -m kernels.bench OP [--shapes NAME ...] [--device cpu|cuda] [--dtype bfloat16]
                               [--repeats N] [--threads N] [--json PATH] [--tune]

OP is a file of this folder with `benchmark_cases()`, in it or in OP_benchmark.py beside it, or
`all` of them. Forward and gradients are checked against an exact reference first; a wrong result
is not timed. All contestants run in one process, in turns. Printed are medians with the middle
half's spread, TFLOP/s or GB/s, and the share of what a plain matmul or a copy reaches on the same
machine in the same run; for ours also the bytes that are saved for the backward pass, and on a GPU
the peak memory. --json writes them to PATH too, a file that ends in .json or a folder, where each
operation gets its CHIP_OP_DTYPE.json; `kernels.report` makes tables of them.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.launch import has_compiler, resolve_backend, tune_allocator
from kernels.machine import Limits, clock_of, copy_rate, machine_facts, matmul_rate, seconds_of


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
    rivals: by name. large_rivals: those with tensors of their own as large as the leaves, which are
    made when the reference's are gone; one that cannot be made does not take part. grad: gradient
    of the output. flops: of the forward pass, 0 where memory decides; backward_flops: as counted
    where such kernels are compared, None for twice as many. moved_bytes: what the forward pass has
    to read and write. tokens: rows of the input. compiles: whether `torch_compile` is anything but
    `torch` here.
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
    large_rivals: Mapping[str, Callable[[], Contestant]] = {}


class CaseBuilder(NamedTuple):
    """A case by name, whose tensors are made only when it is run."""

    name: str
    case: Callable[[], Case]


# Largest error, relative to the largest entry of the reference, at which a result is timed.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Elements that are compared at a time, in float64.
ERROR_ELEMENTS = 1 << 28


def leaf(*shape: int, std: float = 1.0, dtype: torch.dtype, device: str) -> Tensor:
    """A normal random tensor that takes gradients."""
    return torch.randn(*shape, device=device).mul_(std).to(dtype).requires_grad_()


def largest_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Largest difference over all tensors, each relative to the largest entry of its reference.

    Integers are right or wrong.
    """
    errors = [0.0]
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            errors.append(float("inf"))
            continue
        if a.numel() == 0:
            continue
        if not b.is_floating_point():
            errors.append(0.0 if torch.equal(a, b) else float("inf"))
            continue
        scale = max(float(end.abs()) for end in b.detach().aminmax())
        # In parts: weights of a large layer would not fit a GPU in float64.
        parts = (x.detach().flatten().split(ERROR_ELEMENTS) for x in (a, b))
        differences = [(x.double() - y.double()).abs().max() for x, y in zip(*parts, strict=True)]
        error = float(torch.stack(differences).max()) / max(scale, 1e-30)
        errors.append(error if math.isfinite(error) else float("inf"))
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
    # The gradients may take more memory than all else.
    output, expected = expected[0], ()
    for name in (*case.rivals, *case.large_rivals):
        rival = _right_rival(case, name, output, tolerance)
        if isinstance(rival, str):
            result["contestants"][name] = {"wrong": rival}
        else:
            contestants[name] = rival
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


def _right_rival(case: Case, name: str, expected: Tensor, tolerance: float) -> Contestant | str:
    """A rival that can be timed, or why not: it fails here, or its output is another one."""
    try:
        rival = case.rivals[name] if name in case.rivals else case.large_rivals[name]()
        output = rival.both(case.grad)[0]
    except Exception as error:  # whatever a library of others raises
        lines = str(error).strip().splitlines() or [""]
        return f"fails here: {type(error).__name__}: {lines[0]}"
    # A rival may round where ours does not: its gradients are its own affair.
    off = largest_error((output,), (expected,)) if rival.same else 0.0
    return rival if off <= 3 * tolerance else f"WRONG, error {off:.1e}"


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
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the results there too: a file, or a folder"
    )
    parser.add_argument(
        "--tune", action="store_true", help="search tiles, write kernels/tiles.json"
    )
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.op not in ("all", *operations()):
        return _refuse(f"OP ({options.op}) must be all, or one of {', '.join(operations())}")
    if options.repeats < 1:
        return _refuse(f"--repeats ({options.repeats}) must be at least 1")
    cores = os.cpu_count() or 1
    if options.threads is not None and not 1 <= options.threads <= cores:
        return _refuse(f"--threads ({options.threads}) must be from 1 to {cores}, the cores here")
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: PyTorch sees no GPU; leave the option out, or use cpu")
    if options.tune and device == "cpu":
        return _refuse("--tune needs a GPU: tiles are those of Triton's kernels")
    if options.json and (problem := _problem_with_path(options.json, options.op)):
        return _refuse(problem)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    ops = operations() if options.op == "all" else [options.op]
    names = [build.name for op in ops for build in cases_of(op, dtype, device)]
    if options.shapes and not any(shape in name for shape in options.shapes for name in names):
        shapes = " ".join(options.shapes)
        return _refuse(f"--shapes ({shapes}) must be part of one of: {', '.join(names)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_allocator()
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
    for op in ops:
        print(op)
        results += run_operation(
            op, options, limits, facts | {"op": op, "repeats": options.repeats}
        )
    return int(any("wrong" in result for result in results))


def _is_file(path: Path) -> bool:
    """Whether --json names a file, of one operation."""
    return path.suffix.lower() == ".json" and not path.is_dir()


def _problem_with_path(path: Path, op: str) -> str | None:
    """Why --json cannot be written to; None if it can. Makes the folder."""
    if _is_file(path) and op == "all":
        return f"--json ({path}) must be a folder, for all operations"
    if path.exists() and not path.is_dir() and not _is_file(path):
        return f"--json ({path}) must be a folder, or a file that ends in .json"
    folder = path.parent if _is_file(path) else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"--json ({path}) cannot be written: {error}; choose another path"
    return None


def _path_of_results(path: Path, facts: Mapping[str, Any]) -> Path:
    if _is_file(path):
        return path
    chip = re.sub("[^a-z0-9]+", "_", facts["chip"].lower()).strip("_")
    return path / f"{chip}_{facts['op']}_{facts['dtype']}.json"


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
            path = _path_of_results(options.json, facts)
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
