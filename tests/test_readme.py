"""The README tells the truth: its tree, its YAML, its examples."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe.config import ModelConfig
from moe.model import MoETransformer, init_weights
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


def test_examples_of_a_router_a_loss_and_an_expert_keep_their_contracts(tmp_path):
    """By the command that the README gives for files of one's own; and a loss that counts padding
    does not."""
    lab = tmp_path / "my_lab"
    lab.mkdir()
    (lab / "cosine.py").write_text(block("python", '"""Cosine'))
    (lab / "reglu.py").write_text(block("python", '"""ReGLU'))
    soft = block("python", '"""Soft balance')
    (lab / "soft.py").write_text(soft)
    (lab / "leaky.py").write_text(soft.replace(" * routing.valid.unsqueeze(-1)", ""))
    (command,) = re.findall(r"^ROUTERS=my_lab.*$", README, re.MULTILINE)
    words = command.replace("my_lab.soft", "my_lab.soft,my_lab.leaky").split()
    named = dict(word.split("=") for word in words if re.match("[A-Z]+=", word))
    options = words[words.index("-k") :]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", *options],
        env=os.environ | named | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = r"^(PASSED|FAILED|ERROR) \S+::\S+\[.*?my_lab\.(\w+)"
    outcomes = re.findall(outcome, done.stdout, re.MULTILINE)
    passed = Counter(name for outcome, name in outcomes if outcome == "PASSED")
    failed = {name for outcome, name in outcomes if outcome != "PASSED"}
    assert failed == {"leaky"}, done.stdout[-2000:]
    assert re.search(r"^FAILED .*my_lab\.leaky \{\}-padding", done.stdout, re.MULTILINE)
    assert passed["cosine"] > 30 and passed["soft"] >= 10 and passed["reglu"] >= 10
