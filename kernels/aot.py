"""What does a Triton kernel need of a chip? Compiled ahead of time, without one.

    python -m kernels.aot [OP ...] [--arch sm_80 sm_89 sm_90 gfx942] [--quick] [--json FILE]

Compiles each kernel of `kernels/OP_triton.py` with the tiles that it ships, and prints registers,
spills, shared memory and the instructions that matter. Needs no GPU, and must run without Triton's
interpreter (TRITON_INTERPRET unset). The table of all operations and architectures stands in
`kernels/results/aot.json`: write it anew when a kernel, a tile or the version of Triton changes.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from kernels.tiles import Tile

# sm_89 stands for every chip with as little shared memory: sm_86 and sm_12x too take its tiles.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "gfx942")
# Bytes of shared memory that one program may use.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "gfx942": 64 * 1024,
}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    int: "i32",
    float: "fp32",
}


class AotCase(NamedTuple):
    """One compilation of one kernel.

    arguments: name -> dtype of a pointer (divisible by 16), int or float; None for an absent one.
    tile: block sizes and launch options. constants: further constexprs. divisible: integer
    arguments that are multiples of 16. architectures: for which the kernel is launched so.
    spills: whether they are allowed. name: tells cases of one kernel apart. rare: left out with
    `--quick`.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    tile: Tile
    constants: Mapping[str, Any] = MappingProxyType({})
    divisible: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES
    spills: bool = False
    name: str = ""
    rare: bool = False

    def label(self) -> str:
        """Kernel, dtype of its first pointer, and constants."""
        first = next(value for value in self.arguments.values() if isinstance(value, torch.dtype))
        constants = {**self.tile.blocks, **self.constants}
        listed = " ".join(f"{key}={value}" for key, value in constants.items())
        warps = f"{self.tile.num_warps}w {self.tile.num_stages}s"
        dtype = str(first).removeprefix("torch.")
        return " ".join(
            part for part in (self.kernel.__name__, self.name, dtype, listed, warps) if part
        )


class Resources(NamedTuple):
    """registers of a thread; spills: instructions that move registers to memory and back;
    shared_memory: bytes; has_dot: whether the kernel multiplies matrices, itself or in a function
    that it calls; matrix: matrix-unit instructions (wgmma on sm_90); old_matrix: those of sm_80 on
    sm_90, which do not use all of its units; wide_loads, narrow_loads, loads: from global memory,
    those of 16 bytes, of at most 2, and all; tile_loads: how many of 16 bytes the loads of 16-bit
    matrices come to, the wide_loads that there should be at least."""

    registers: int
    spills: int
    shared_memory: int
    has_dot: bool
    matrix: int
    old_matrix: int
    wide_loads: int
    narrow_loads: int
    loads: int
    tile_loads: int


def compile_case(case: AotCase, arch: str) -> Any:
    """Compile for an architecture; returns Triton's compiled kernel.

    Raises:
        RuntimeError: if Triton refuses, or the interpreter is on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(case.kernel, "arg_names"):
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    names = case.kernel.arg_names
    constants = {**case.tile.blocks, **case.constants}
    constants |= {name: None for name, value in case.arguments.items() if value is None}
    missing = [name for name in names if name not in case.arguments and name not in constants]
    if missing:
        raise RuntimeError(f"{case.kernel.__name__}: no type given for {', '.join(missing)}")
    signature = {
        name: "constexpr" if name in constants else _TYPES[case.arguments[name]] for name in names
    }
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in case.divisible
    }
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=attrs)
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch[3:]), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    options = {"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages}
    return triton.compile(source, target=target, options=options)


def _tile_loads(compiled: Any, lanes: int) -> int:
    """16-byte loads of a thread for the 16-bit matrices that Triton's last representation loads.

    A load of a matrix that has less than 16 bytes for each thread counts as one.
    """
    load = r"(?:tt\.load|async_copy_global_to_local)\b.*: tensor<(\d+)x(\d+)x!tt\.ptr<b?f16>"
    at_once = 8 * lanes * compiled.metadata.num_warps
    matrices = re.findall(load, compiled.asm["ttgir"])
    return sum(-(-int(rows) * int(columns) // at_once) for rows, columns in matrices)


def resources(compiled: Any, arch: str) -> Resources:
    """What a compiled kernel needs, read from its machine code."""
    shared, has_dot = compiled.metadata.shared, "tt.dot" in compiled.asm["ttir"]
    tile_loads = _tile_loads(compiled, 32 if arch.startswith("sm_") else 64)
    if not arch.startswith("sm_"):
        text = compiled.asm["amdgcn"]

        def number(key: str) -> int:
            return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", text))

        registers, spills = number("vgpr_count"), number("vgpr_spill_count")
        matrix = text.count("v_mfma")
        wide = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
        narrow = len(re.findall(r"(?:global|buffer)_load_[us]?(?:byte|short)", text))
        loads = len(re.findall(r"(?:global|buffer)_load_", text))
        numbers = matrix, 0, wide, narrow, loads, tile_loads
        return Resources(registers, spills, shared, has_dot, *numbers)
    import triton

    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(binaries / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
        code = dump("-sass")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    assert usage is not None
    old_matrix = count(r"\bHMMA") if arch == "sm_90" else 0
    matrix = count("HGMMA") if arch == "sm_90" else count(r"\bHMMA")
    copies = count("UTMALDG")  # by the copy engine, always wide
    wide = count(r"\bLDG(?:STS)?\.[^;]*\.128") + copies
    narrow = count(r"\bLDG\.[^;]*\.[US](?:8|16)\b")
    loads = count(r"\bLDG(?:STS)?\.") + copies
    spills = count(r"\bSTL\b") + count(r"\bLDL\b")
    numbers = matrix, old_matrix, wide, narrow, loads, tile_loads
    return Resources(int(usage[1]), spills, shared, has_dot, *numbers)


def operations() -> list[str]:
    """Names of the operations with Triton kernels."""
    files = Path(__file__).parent.glob("*_triton.py")
    return sorted(file.stem.removesuffix("_triton") for file in files)


def cases_of(op: str) -> list[AotCase]:
    """The cases of `kernels/OP_triton.py`."""
    return importlib.import_module(f"kernels.{op}_triton").aot_cases()


def write_table(path: Path, cases: Mapping[str, Any]) -> None:
    """Versions, and the cases under `kernels`, as JSON: a line for each case and architecture."""
    import triton

    facts = {"torch": torch.__version__, "triton": triton.__version__, "kernels": cases}
    text = json.dumps(facts, indent=1)
    # The innermost objects hold numbers alone.
    text = re.sub(r"\{[^{}]*\}", lambda match: " ".join(match[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel does not compile or exceeds its chip."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(operations())}")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--quick", action="store_true", help="the most important cases alone")
    parser.add_argument("--json", type=Path, help="write the table there too")
    options = parser.parse_args(argv)
    table: dict[str, dict[str, dict[str, int | bool]]] = {}
    failed = False
    for op in options.ops or operations():
        for case in cases_of(op):
            for arch in options.arch:
                if arch not in case.architectures or (case.rare and options.quick):
                    continue
                needed = resources(compile_case(case, arch), arch)
                facts = needed._asdict()
                by_arch = table.setdefault(f"{op}: {case.label()}", {})
                assert by_arch.setdefault(arch, facts) == facts, f"two are called {case.label()}"
                too_much = needed.shared_memory > SHARED_MEMORY[arch]
                bad = too_much or (needed.spills > 0 and not case.spills)
                failed |= bad
                shown = " ".join(f"{key}={value}" for key, value in facts.items())
                mark = "  <-- exceeds the chip" if bad else ""
                print(f"{op:16} {arch:7} {case.label()}: {shown}{mark}", flush=True)
    if options.json:
        write_table(options.json, table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
