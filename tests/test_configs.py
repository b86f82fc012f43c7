"""Every YAML in configs/ is a run: the small ones take two steps here, on a little local text.

Those in configs/ablations are sweeps, and have their test in test_sweep.py.
"""

import json
from pathlib import Path

import pytest
from training_cases import ROOT, base_settings, checkpoint, work_dir

from train.config import load_config
from train.plan import make_plan
from train.pretrain import main
from train.tokenizer import planned_vocab_size, with_vocab_size

CONFIGS = sorted({*ROOT.glob("configs/**/*.yaml")} - {*ROOT.glob("configs/ablations/*.yaml")})
SMALL_PARAMETERS = 20e6


def overrides(run_dir: Path) -> list[str]:
    """Two short steps on the tests' own text; everything that makes the model stays."""
    values = {
        "output_dir": str(run_dir),
        "data.cache_dir": str(work_dir() / "cache"),
        "data.domains": base_settings(run_dir)["data"]["domains"],
        "data.max_bytes_per_domain": None,
        "data.validation_tokens": 64,
        "training.steps": 2,
        "training.tokens": None,
        "training.seq_len": 32,
        "training.batch_size": 2,
        "training.micro_batch_size": 1,
        "training.threads": 1,
        "schedule.warmup_steps": None,
        "evaluation.sample_tokens": 4,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def test_there_are_configs():
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_can_be_planned_and_if_small_takes_two_steps(path, tmp_path, capsys):
    config = load_config(path)
    model = with_vocab_size(config.model, planned_vocab_size(config.tokenizer))
    size = make_plan(config, model, 2).parameters.total
    assert main(["--config", str(path), "--dry-run"]) == 0
    assert "tokens an active parameter" in capsys.readouterr().out
    if size > SMALL_PARAMETERS:
        pytest.skip(f"{size / 1e6:.0f} M parameters are too many for a test")
    assert main(["--config", str(path), *overrides(tmp_path / "run")]) == 0
    assert checkpoint(tmp_path / "run").step == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # From the models' own papers and cards, in billions.
        ("olmoe_1b_7b", 6.92, 1.28),
        ("qwen3_30b_a3b", 30.5, 3.3),
        ("mixtral_8x7b", 46.7, 12.9),
    ],
)
def test_published_shapes_have_the_published_sizes(name, total, active):
    config = load_config(ROOT / f"configs/models/{name}.yaml")
    count = make_plan(config, config.model, 2).parameters
    assert count.total / 1e9 == pytest.approx(total, rel=0.01)
    # Papers count the embedding table as active, which a token only looks up a row of.
    table = config.model.vocab_size * config.model.hidden_size
    assert (count.active + table) / 1e9 == pytest.approx(active, rel=0.03)
