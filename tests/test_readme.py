"""The README tells the truth: its tree, its YAML, its example of a router."""

import re
from pathlib import Path

import pytest
import torch
from router_cases import CHECKS, maker
from router_step_cases import CHECKS as STEP_CHECKS

from moe.config import ModelConfig
from moe.model import MoETransformer, init_weights
from moe.variants import load_variant
from train.config import load_config
from train.sweep_config import load_sweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, start: str) -> str:
    """The fenced block of a language that begins with `start`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(text for text in blocks if text.startswith(start))


@pytest.mark.parametrize("package", ["kernels", "moe", "train"])
def test_tree_names_every_file(package):
    tree = block("", "kernels/")
    section = tree[re.search(rf"^{package}/", tree, re.MULTILINE).start() :]
    section = re.split(r"\n(?=\w+/ )", section)[0]
    for path in (ROOT / package).rglob("*.py"):
        if path.name == "__init__.py":
            continue
        folder = path.parent.name if path.parent.name != package else ""
        named = f"{folder}/{path.name}" in section if folder else path.name in section
        assert named or (f"{folder}/ " in section and path.name in section), path


def test_tree_names_nothing_that_is_not_there():
    tree = block("", "kernels/")
    folders = ("kernels", "moe", "train", "configs", "tests")
    paths = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for name in re.findall(r"[\w/]+\.(?:py|yaml)", tree):
        assert any(path.endswith(f"/{name}") for path in paths), name


def test_example_of_a_run_loads(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(block("yaml", "# Does a sigmoid"))
    config = load_config(path)
    assert config.model.moe.router.bias_update_rate == 1e-3
    assert config.num_steps * config.tokens_per_step >= 4_000_000


def test_example_of_a_sweep_loads(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(block("yaml", "# Does a loss-free bias"))
    sweep = load_sweep(path)
    assert list(sweep.arms) == ["loss", "bias", "dense"] and sweep.baseline == "loss"


def test_table_of_sweeps_names_all_of_them():
    named = set(re.findall(r"^\| `(\w+\.yaml)` \|", README, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "configs" / "ablations").glob("*.yaml")}


def test_example_of_a_router_trains(tmp_path, monkeypatch):
    (tmp_path / "readme_lab").mkdir()
    (tmp_path / "readme_lab" / "cosine.py").write_text(block("python", '"""Cosine'))
    monkeypatch.syspath_prepend(tmp_path)
    moe = {"num_experts": 4, "intermediate_size": 8, "router": {"name": "readme_lab.cosine"}}
    model = MoETransformer(ModelConfig(vocab_size=32, hidden_size=16, num_layers=1, moe=moe))
    init_weights(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.randint(0, 32, (2, 9))
    losses = []
    for _ in range(3):
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    # And it keeps the contract, as every router of ours.
    examples = load_variant("routers", "readme_lab.cosine").EXAMPLES
    for settings in ({}, *examples):
        for check in (CHECKS | STEP_CHECKS).values():
            check(maker("readme_lab.cosine", settings))
