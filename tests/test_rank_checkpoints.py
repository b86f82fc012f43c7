"""Does a checkpoint of one layout of ranks go on in every other, bit for bit?"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import gathered_state, run_ranks
from training_cases import checkpoint, data, make_config, run

from train.config import RunConfig
from train.packing import TrainLoader
from train.ranks import Ranks
from train.step import read_step, train_step

# No noise, whose streams differ between layouts.
CALM = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "training.micro_batch_size": None,
    "training.batch_size": 8,
    "checkpoint.every": 4,
    "checkpoint.keep_last": 10,
    "evaluation.every": 0,
}
LAYOUTS = [(size, stage) for size in (1, 2) for stage in (0, 1, 2, 3)]


def layout(size: int, stage: int) -> dict[str, Any]:
    return {"parallel.expert_parallel_size": size, "parallel.zero_stage": stage}


def config_of(run_dir: Path, size: int, stage: int) -> RunConfig:
    return make_config(run_dir, CALM | layout(size, stage))


def load_and_step(ranks: Ranks, run_dir: Path, layouts: list, text: Any, steps: int) -> list:
    """For each layout: the state right after loading, and the losses of the next steps."""
    from train.engine import build_engine
    from train.pretrain import restore

    results = []
    for size, stage in layouts:
        config = config_of(run_dir, size, stage)
        engine = build_engine(config, config.model, ranks=ranks)
        found = checkpoint(run_dir)
        position = restore(engine, found, config.seed)
        state = gathered_state(engine)
        loader = TrainLoader(text, config.training.seq_len, config.seed)
        losses = []
        for step in range(position.step, position.step + steps):
            metrics = train_step(engine, read_step(loader, step, config, engine), step, config)
            assert metrics is not None
            losses.append(metrics.lm_loss)
        results.append((state, losses))
    return results if ranks.rank == 0 else []


def same_state(loaded: dict, saved: dict) -> None:
    """Bitwise: weights, moments and router biases."""
    for group in ("model", "optimizer"):
        assert loaded[group].keys() == saved[group].keys()
        for name, tensor in saved[group].items():
            assert torch.equal(loaded[group][name], tensor), f"{group}: {name}"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """A run of one process, stopped at step 4 of 8, and a finished one beside it."""
    run_dir = tmp_path_factory.mktemp("ranks") / "run"
    assert run(run_dir, CALM) == 0
    return run_dir


def test_every_layout_goes_on_from_one_process(one_process, tmp_path):
    """The state is the same to the bit, the losses of the next steps to 1e-5."""
    run_dir = tmp_path / "run"
    shutil.copytree(one_process, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000008")
    (run_dir / "checkpoints" / "latest").write_text("step_00000004\n")
    saved = checkpoint(run_dir).tensors
    config = config_of(run_dir, 1, 1)
    expected = load_and_step_alone(config, run_dir)
    (results, _) = run_ranks(2, load_and_step, run_dir, LAYOUTS, data(), 4, seconds=120)
    for (size, stage), (state, losses) in zip(LAYOUTS, results, strict=True):
        same_state(state, saved)
        assert losses == pytest.approx(expected, rel=1e-5), (size, stage)


def load_and_step_alone(config: RunConfig, run_dir: Path) -> list[float]:
    from train.engine import build_engine
    from train.pretrain import restore

    engine = build_engine(config, config.model)
    position = restore(engine, checkpoint(run_dir), config.seed)
    loader = TrainLoader(data(), config.training.seq_len, config.seed)
    return [
        train_step(engine, read_step(loader, step, config, engine), step, config).lm_loss  # type: ignore[union-attr]
        for step in range(position.step, position.step + 4)
    ]
