"""Does what we install contain our packages, and do they live beside `transformers`?"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, cwd: Path = ROOT, **variables: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_transformers_runs_beside_our_kernels():
    """It probes for the Hugging Face package `kernels`, and finds ours."""
    pytest.importorskip("transformers")
    code = f"""
import torch, transformers
from transformers import OlmoeConfig, OlmoeForCausalLM
import kernels
assert kernels.__file__ == {str(ROOT / "kernels" / "__init__.py")!r}, kernels.__file__
torch.manual_seed(0)
config = OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2,
    pad_token_id=0, bos_token_id=None, eos_token_id=None,
)
model = OlmoeForCausalLM(config)
ids = torch.arange(16).view(2, 8)
output = model(input_ids=ids, labels=ids)
output.loss.backward()
assert output.logits.shape == (2, 8, 64) and output.loss.isfinite()
print("ran")
"""
    assert run_python("-c", code).endswith("ran\n")


def test_kernels_package_cannot_fail_to_import():
    """`transformers` imports it by name: nothing but a docstring may stand there."""
    (only,) = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the tree as it stands, built from a copy and without a network."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("kernels", "moe", "train"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    run_python(
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--disable-pip-version-check", "--wheel-dir", str(copy / "dist"), str(copy)),
    )
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_three_packages(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in ("kernels", "moe", "train")
        for path in (ROOT / name).rglob("*")
        if path.suffix in (".py", ".json", ".html", ".js")
    }
    assert files == expected


def test_version_stays_below_the_one_that_transformers_looks_for(wheel):
    """From 0.18 on, it takes a package `kernels` for the Hugging Face one and uses it."""
    name, version, *_ = wheel.name.split("-")
    assert name == "sparse_moe_lm"
    major, minor, _ = (int(part) for part in version.split("."))
    assert (major, minor) < (0, 18)


def test_wheel_declares_loose_ranges_and_triton_only_where_it_exists(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().split("\n")
    required = {line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line}
    assert "torch>=2.11" in required
    assert "deepspeed<0.20,>=0.19.8" in required
    (triton,) = (line for line in required if line.startswith("triton"))
    assert triton.startswith('triton>=3.6; sys_platform == "linux"')
    assert "Requires-Python: >=3.11" in lines
    assert "License-Expression: Apache-2.0" in lines


@pytest.fixture(scope="module")
def declared() -> dict[str, list[Requirement]]:
    """The requirements in setup.py: `install` and each extra."""
    code = (
        "import json, setuptools; found = {}; setuptools.setup = lambda **kw: found.update(kw);"
        "exec(open('setup.py').read());"
        "print(json.dumps({'install': found['install_requires'], **found['extras_require']}))"
    )
    groups = json.loads(run_python("-c", code))
    return {group: [Requirement(text) for text in texts] for group, texts in groups.items()}


def test_constraints_pin_everything_that_is_required(declared):
    """Each requirement and each extra has its tested version, and torch no local build."""
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().split("\n")
        if line and not line.startswith("#")
    ]
    pinned: dict[str, str] = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins
    }
    assert len(pinned) == len(pins)
    for requirement in (requirement for group in declared.values() for requirement in group):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")


def test_every_library_that_the_packages_import_is_declared(declared):
    """A fresh machine has nothing else, whatever the developer's environment has."""
    distributions = {"yaml": "pyyaml", "pydantic_core": "pydantic"}
    installed = {canonicalize_name(requirement.name) for requirement in declared["install"]}
    optional = {canonicalize_name(r.name) for r in declared["evaluation"]}
    # Rivals of a benchmark, which take part where somebody has installed them.
    optional |= {"scattermoe", "liger-kernel"}
    ours = {"kernels", "moe", "train"}
    for path in (path for name in ours for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - ours:
                library = canonicalize_name(distributions.get(top, top))
                assert library in installed | optional, f"{path} imports {top}"
