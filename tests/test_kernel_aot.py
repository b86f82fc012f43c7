"""Does every Triton kernel compile for real chips, with the tiles that it ships, and fit them?

Compiled in a process of its own: kernels that were imported for the interpreter cannot be. What
they need is on record in kernels/results/aot.json.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from kernels import aot
from kernels.aot import SHARED_MEMORY, AotCase, Resources, operations
from kernels.tiles import Tile

RECORD = Path(aot.__file__).with_name("results") / "aot.json"
RENEW = "run: python -m kernels.aot --json kernels/results/aot.json"


def compiled(op, path, *options):
    """What `kernels.aot` writes: versions, and kernels: case -> architecture -> what it needs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.aot", op, "--json", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text())


def may_spill(label):
    """float32, sizes that are no multiples of 8 (UNIT=1) and wide heads may; nothing else."""
    head_dim = re.search(r"HEAD_DIM=(\d+)", label)
    wide = head_dim is not None and int(head_dim[1]) > 128
    return wide or " float32 " in label or "UNIT=1 " in label


def archs_of(table):
    return {label: set(by_arch) for label, by_arch in table.items()}


def check(table):
    assert table
    for label, by_arch in table.items():
        for arch, needed in by_arch.items():
            assert needed["shared_memory"] <= SHARED_MEMORY[arch], (label, arch)
            assert needed["spills"] == 0 or may_spill(label), (label, arch)
            if needed["has_dot"] and "bfloat16" in label:
                assert needed["matrix"] > 0, (label, arch)
                # dQ by atomics has too few rows for wgmma; transposed, wide heads would spill more.
                wide_atomic = "BLOCK_P=256 " in label and "ATOMIC=True" in label
                assert needed["old_matrix"] == 0 or wide_atomic, (label, arch)
                if arch == "gfx942" and "down_backward" in label:
                    # 512 threads read quarters of 16 columns of H: 8 bytes for each.
                    continue
                # Matrices are read 16 bytes at a time, or at odd sizes number by number.
                wide = needed["wide_loads"] >= needed["tile_loads"] > 0
                assert wide == ("UNIT=1 " not in label), (label, arch)
                assert wide == (needed["narrow_loads"] == 0), (label, arch)


@pytest.mark.parametrize("op", operations())
def test_kernels_compile_for_hopper(op, tmp_path):
    table = compiled(op, tmp_path / "table.json", "--quick", "--arch", "sm_90")["kernels"]
    check(table)


@pytest.mark.slow
@pytest.mark.parametrize("op", operations())
def test_kernels_compile_for_every_architecture_as_on_record(op, tmp_path):
    now = compiled(op, tmp_path / "table.json")
    table = now["kernels"]
    check(table)
    record = json.loads(RECORD.read_text())
    recorded = {
        label: by_arch for label, by_arch in record["kernels"].items() if label.startswith(f"{op}:")
    }
    if record["triton"] != now["triton"]:
        pytest.skip(f"on record is Triton {record['triton']}, installed is {now['triton']}")
    assert archs_of(recorded) == archs_of(table), RENEW
    assert recorded == table, RENEW


# What orders the sums of a row: the instruction of the product and the terms that it takes, and of
# a sum over columns how many each thread has, which lie how.
ORDERS = """
import json, re
from kernels import aot

BY_ROWS = "_linear_kernel", "_transposed_kernel", "up_kernel", "down_backward_kernel"
SUM = r"\\}\\) : \\(tensor<\\d+x(\\d+)xf32, (#\\w+)>\\) ->"
found = {}
for case in aot.cases_of("swiglu_experts"):
    kernel = case.kernel.__name__
    if kernel not in BY_ROWS or " bfloat16 " not in case.label() or case.constants["UNIT"] == 1:
        continue
    for arch in case.architectures:
        text = aot.compile_case(case, arch).asm["ttgir"]
        order = []
        for kind, body in re.findall(r"#\\w+ = #ttg.(nvidia_mma|amd_mfma)<{(.*?)}>", text):
            version = re.search(r"version\\w* = (\\d)", body)[1]
            shape = re.search(r"instrShape = \\[(.*?)\\]", body)[1].split(", ")
            # Rows, columns, terms; a shape of two numbers leaves the terms to the version.
            order.append([kind, version, shape[2:]])
        for columns, name in re.findall(SUM, text):
            layout = re.search(name + r" = #ttg.blocked<{(.*?)}>", text)[1]
            order.append([columns, re.findall(r"\\[\\d+, (\\d+)\\]", layout)])
        size = case.tile.blocks["BLOCK_M"]
        key = f"{kernel} {arch} CLAMP={case.constants.get('CLAMP')}"
        found.setdefault(key, {})[size] = order
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_row_is_summed_in_one_order_in_the_tiles_of_all_sizes():
    """As compiled: the bits of a row do not depend on how many rows its expert got."""
    import triton

    recorded = json.loads(RECORD.read_text())["triton"]
    if triton.__version__ != recorded:
        pytest.skip(f"the layouts are read as Triton {recorded} writes them")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ORDERS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {len(by_size) for by_size in found.values()} == {1, 2}
    for key, by_size in found.items():
        first, *others = by_size.values()
        assert first and all(order == first for order in others), (key, by_size)
        # Four parts of the columns of a block are summed one by one.
        assert len(first) == (5 if key.startswith("down_backward") else 1), (key, first)


def test_the_record_holds_every_operation_and_keeps_within_the_chips():
    record = json.loads(RECORD.read_text())
    assert record.keys() == {"torch", "triton", "kernels"}
    assert {label.partition(":")[0] for label in record["kernels"]} == set(operations())
    check(record["kernels"])


@pytest.mark.parametrize(
    ("needed", "allowed", "status"),
    [
        ({}, False, 0),
        ({"spills": 1}, False, 1),
        ({"spills": 1}, True, 0),
        ({"shared_memory": 99 * 1024}, True, 0),
        ({"shared_memory": 99 * 1024 + 1}, True, 1),
    ],
)
def test_a_kernel_that_spills_or_exceeds_its_chip_is_refused(
    needed, allowed, status, tmp_path, monkeypatch, capsys
):
    """The table is written all the same."""
    facts = Resources(64, 0, 1024, True, 8, 0, 8, 0, 8, 8)._replace(**needed)
    kernel = SimpleNamespace(__name__="kernel")
    case = AotCase(kernel, {"x_ptr": torch.bfloat16}, Tile({"BLOCK": 16}), spills=allowed)
    monkeypatch.setattr(aot, "cases_of", lambda op: [case])
    monkeypatch.setattr(aot, "compile_case", lambda case, arch: None)
    monkeypatch.setattr(aot, "resources", lambda compiled, arch: facts)
    path = tmp_path / "results" / "table.json"
    assert aot.main(["op", "--arch", "sm_89", "--json", str(path)]) == status
    assert ("exceeds the chip" in capsys.readouterr().out) == bool(status)
    (by_arch,) = json.loads(path.read_text())["kernels"].values()
    assert by_arch == {"sm_89": facts._asdict()}
