"""Does a checkpoint of one layout of ranks go on in every other, bit for bit?"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import gathered_state, run_ranks
from training_cases import checkpoint, data, make_config, make_engine, run

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
    """A finished run of one process with checkpoints at steps 4 and 8."""
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


def run_and_report(ranks: Ranks, folder: Path, layouts: list) -> list[dict]:
    """Finish a run in each layout; the state that its engine then holds."""
    import train.pretrain

    states = []
    build = train.pretrain.build_engine
    for size, stage in layouts:
        engines: list[Any] = []

        def keep(*args: Any, kept: list[Any] = engines, **kwargs: Any) -> Any:
            kept.append(build(*args, **kwargs))
            return kept[-1]

        train.pretrain.build_engine = keep
        config = config_of(folder / f"run_{size}_{stage}", size, stage)
        # What the lock does, which only rank 0 holds.
        Path(config.output_dir).mkdir(exist_ok=True)
        assert train.pretrain.run(config, ranks) == 0
        states.append(gathered_state(engines[0]))
    return states if ranks.rank == 0 else []


def reload(ranks: Ranks, folder: Path, pairs: list, text: Any) -> list:
    """For each (writer, reader): the state after loading the writer's run into the reader."""
    return [
        load_and_step(ranks, folder / "run_{}_{}".format(*writer), [reader], text, 0)[0][0]
        if ranks.rank == 0
        else load_and_step(ranks, folder / "run_{}_{}".format(*writer), [reader], text, 0)
        for writer, reader in pairs
    ]


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_ranks_wrote_goes_on_in_one_process_and_in_other_layouts(tied, tmp_path, monkeypatch):
    """Bit for bit, from the disk."""
    monkeypatch.setitem(CALM, "model.tie_embeddings", tied)
    layouts = [(2, 0), (1, 1), (2, 2), (2, 3)]
    (states, _) = run_ranks(2, with_tied, tied, run_and_report, tmp_path, layouts, seconds=120)
    for (size, stage), state in zip(layouts, states, strict=True):
        run_dir = tmp_path / f"run_{size}_{stage}"
        saved = checkpoint(run_dir).tensors
        same_state(saved, state)
        engine = make_engine(config_of(run_dir, 1, 1))
        engine.load_state_tensors(saved)
        same_state(engine.state_tensors(), state)
    pairs = list(zip(layouts, [*layouts[1:], layouts[0]], strict=True))
    (reloaded, _) = run_ranks(2, with_tied, tied, reload, tmp_path, pairs, data(), seconds=120)
    for (writer, _), state in zip(pairs, reloaded, strict=True):
        same_state(state, states[layouts.index(writer)])


def with_tied(ranks: Ranks, tied: bool, work: Any, *args: Any) -> Any:
    """`work` in a process that knows nothing of the test's own settings."""
    CALM["model.tie_embeddings"] = tied
    return work(ranks, *args)
