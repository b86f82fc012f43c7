"""Does each file import only what its place in the tree allows, and is every import harmless?"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "moe", "train")

# What a package may import beside the standard library and itself.
ALLOWED = {
    "kernels": {"torch", "triton", "numpy"},
    "moe": {"torch", "kernels", "pydantic", "numpy"},
}
# Libraries that only these places may name; a place is a folder or a file.
PLACES = {
    "triton": ("kernels/",),
    "deepspeed": ("train/deepspeed_engine.py", "train/expert_parallel.py", "train/fragments.py"),
    "datasets": ("train/",),
    "tokenizers": ("train/",),
    "tensorboard": ("train/",),
    "transformers": ("kernels/swiglu_experts_benchmark.py", "moe/interop/", "train/"),
    "scattermoe": ("kernels/swiglu_experts_benchmark.py",),
    "liger_kernel": ("kernels/swiglu_experts_benchmark.py",),
    "safetensors": ("train/", "moe/interop/", "moe/surgery/"),
}
VARIANTS = ("moe/routers/", "moe/losses/", "moe/experts/")


def imported_modules(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Every (line, module) that the source imports anywhere, also inside functions.

    `from moe import routing` counts as moe.routing, a relative import as what it means from `path`,
    and importlib.import_module("x") as x.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = Path(path).parts[:-1]
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # The first part of a name from outside decides; of our own, the file does.
            names = [f".{alias.name}" for alias in node.names] if module in OWN_FOLDERS else [""]
            yield from ((node.lineno, module + name) for name in names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = getattr(function, "attr", None) or getattr(function, "id", None)
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(source: str, path: str) -> list[str]:
    """One line for each import in `source` that its place, `path` from the root, does not allow."""
    package = path.split("/")[0]
    found = []
    for line, module in imported_modules(source, path):
        top = module.split(".")[0]
        where = f"{path}:{line} imports {module}"
        allowed = ALLOWED.get(package, {top}) | {package} | sys.stdlib_module_names
        if top in PLACES:
            if not path.startswith(PLACES[top]):
                found.append(f"{where}: only in {', '.join(PLACES[top])}")
        elif top not in allowed:
            found.append(f"{where}: {package} may import {', '.join(sorted(ALLOWED[package]))}")
        folder = f"{Path(path).parent}/"
        sibling = "/".join(module.split(".")[:3]) + ".py"
        if folder in VARIANTS and sibling.startswith(folder) and sibling in SOURCES:
            found.append(f"{where}: variants stand alone")
    return found


SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")
)
OWN_FOLDERS = {str(Path(source).parent).replace("/", ".") for source in SOURCES}


def test_every_import_is_allowed_where_it_stands():
    assert len(SOURCES) > 20
    found = [line for path in SOURCES for line in violations((ROOT / path).read_text(), path)]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("kernels/dispatch.py", "import moe.routing", "kernels may import numpy, torch, triton"),
        ("kernels/dispatch.py", "from moe import routing", "kernels may import"),
        ("kernels/dispatch.py", "import pydantic", "kernels may import"),
        ("moe/layer.py", "def f():\n    from train.config import RunConfig", "moe may import"),
        ("moe/layer.py", "import triton.language as tl", "only in kernels/"),
        ("train/loop.py", "import triton", "only in kernels/"),
        ("train/loop.py", "from deepspeed import comm", "only in train/deepspeed_engine.py"),
        (
            "moe/model.py",
            "import importlib\nimportlib.import_module('deepspeed')",
            "only in train/",
        ),
        ("moe/model.py", "import safetensors.torch", "only in train/, moe/interop/"),
        ("moe/model.py", "if False:\n    import tokenizers", "only in train/"),
        ("moe/routers/a.py", "from moe.routers.topk import Router", "variants stand alone"),
        ("moe/routers/a.py", "from moe.routers import topk", "variants stand alone"),
        ("moe/routers/a.py", "from . import topk", "variants stand alone"),
        ("moe/losses/a.py", "from .load_balancing import loss", "variants stand alone"),
    ],
)
def test_the_walker_finds_a_planted_import(path, source, expected):
    (line,) = violations(source, path)
    assert expected in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "kernels/attention.py",
            "import triton, torch.nn, os\nfrom kernels import launch",
        ),
        ("moe/interop/olmoe.py", "from safetensors.torch import load_file"),
        ("moe/experts/a.py", "from moe.routing import Routing\nimport kernels.dispatch"),
        ("moe/losses/a.py", "from moe.losses import LossContext"),
        ("train/expert_parallel.py", "import deepspeed"),
    ],
)
def test_the_walker_leaves_allowed_imports_alone(path, source):
    assert violations(source, path) == []


def module_name(source: str) -> str:
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_import_touches_a_gpu_the_network_or_a_process_group():
    """All files are imported in one process, in which connecting and starting CUDA are refused."""
    code = f"""
import importlib, os, socket, sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("an import reached for the network, the GPU or a process group")

socket.socket.connect = socket.getaddrinfo = refuse
torch._C._cuda_init = torch.cuda.init = torch.cuda._lazy_init = refuse
torch.cuda.is_available = torch.cuda.device_count = refuse
torch.distributed.init_process_group = refuse
threads, argv, environment = torch.get_num_threads(), list(sys.argv), dict(os.environ)
for name in {[module_name(source) for source in SOURCES]!r}:
    importlib.import_module(name)
    assert not torch.cuda.is_initialized(), name
    assert not torch.distributed.is_initialized(), name
    assert torch.get_num_threads() == threads, name
    assert torch.get_default_dtype() == torch.float32, name
    assert "deepspeed" not in sys.modules, name
print("harmless")
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.stdout.endswith("harmless\n"), finished.stderr


def test_names_in_train_hide_no_library():
    """A launcher that is given a file puts `train/` itself on the path, before the libraries."""
    names = {Path(source).stem for source in SOURCES if source.startswith("train/")} - {"__init__"}
    libraries = {"datasets", "tokenizers", "torch", "triton", "deepspeed", "transformers", "yaml"}
    assert not names & (sys.stdlib_module_names | libraries)


def test_tests_stay_flat_and_without_a_package():
    """`tests/kernels/__init__.py` would hide our `kernels` from pytest."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
