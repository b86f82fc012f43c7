"""Does every Triton kernel compile for real chips, with the tiles that it ships, and fit them?

Compiled in a process of its own: kernels that were imported for the interpreter cannot be.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from kernels.aot import ARCHITECTURES, SHARED_MEMORY, operations


def compiled(op, archs, path):
    """The table of `kernels.aot`: case -> architecture -> what it needs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.aot", op, "--json", str(path), "--arch", *archs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text())


def check(table):
    assert table
    for label, by_arch in table.items():
        for arch, needed in by_arch.items():
            assert needed["shared_memory"] <= SHARED_MEMORY[arch], (label, arch)
            if needed["has_dot"] and "bfloat16" in label:
                assert needed["matrix"] > 0, (label, arch)


@pytest.mark.parametrize("op", operations())
def test_kernels_compile_for_hopper(op, tmp_path):
    check(compiled(op, ["sm_90"], tmp_path / "table.json"))


@pytest.mark.slow
@pytest.mark.parametrize("op", operations())
def test_kernels_compile_for_every_architecture(op, tmp_path):
    check(compiled(op, ARCHITECTURES, tmp_path / "table.json"))
