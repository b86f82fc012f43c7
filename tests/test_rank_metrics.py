"""Are the numbers in TensorBoard those of one process, however the work is shared out? Is a slow
rank named?"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_cases import run_ranks
from rank_launches import Forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import data, make_config, run, seed_all, write_config

from train.alarms import SLOW_STEPS, Alarms
from train.metrics import LoadWindow
from train.packing import TrainLoader
from train.ranks import Ranks
from train.step import read_step, train_step

LOGGED: dict[str, Any] = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "model.moe.num_shared_experts": 1,
    "training.device": "cpu",
    "training.steps": 4,
    "training.micro_batch_size": 4,
    "optimizer.learning_rate": 0.002,
    "evaluation.every": 2,
    "logging.tensorboard": True,
    "logging.heatmap_every": 2,
    "parallel.timeout_minutes": 0.5,
}
# Of time and memory, which no two runs share, and what only many ranks have.
OWN = ("speed/",)


def everything(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list]]:
    """All scalars, and all histograms as (step, buckets), by tag."""
    kinds = {"scalars": 0, "histograms": 0}
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=kinds).Reload()
    scalars = {
        tag: [(each.step, each.value) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(OWN)
    }
    histograms = {
        tag: [(h.step, list(h.histogram_value.bucket)) for h in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }
    return scalars, histograms


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert run(run_dir, LOGGED) == 0
    return everything(run_dir)


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[[int, dict[str, Any]], Path]]:
    data()
    started: list[Forked] = []

    def start(world: int, changes: dict[str, Any]) -> Path:
        run_dir = tmp_path / "run"
        if world == 1:
            assert run(run_dir, LOGGED | changes) == 0
            return run_dir
        ranks = Forked(world, write_config(run_dir, LOGGED | changes), log=tmp_path / "log.txt")
        started.append(ranks)
        assert ranks.wait() == 0, ranks.output()
        return run_dir

    yield start
    for each in started:
        each.end()


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"training.micro_batch_size": 1}),
        (1, {"training.activation_checkpointing": True}),
        (2, {"training.micro_batch_size": None, "parallel.zero_stage": 0}),
        (
            2,
            {
                "training.micro_batch_size": 1,
                "training.activation_checkpointing": True,
                "parallel.expert_parallel_size": 2,
            },
        ),
    ],
)
def test_every_number_is_that_of_one_process_and_one_pass(world, changes, one_process, launch):
    scalars, histograms = everything(launch(world, changes))
    expected, expected_histograms = one_process
    assert scalars.keys() == expected.keys()
    for tag, wanted in expected.items():
        steps, values = zip(*wanted, strict=True)
        found_steps, found = zip(*scalars[tag], strict=True)
        assert found_steps == steps, tag
        counted = ("tokens_per_expert", "dead_experts", "starved_experts", "/alarms")
        if any(name in tag for name in counted):
            assert found == values, tag
        # What AdamW makes of rounding: a few 1e-5 after some steps.
        tolerance = 1e-6 if wanted[0][0] == 1 and tag.startswith(("loss/", "load/")) else 2e-4
        assert found[0] == pytest.approx(values[0], rel=tolerance, abs=2e-6), tag
        assert found == pytest.approx(values, rel=2e-3, abs=2e-5), tag
    for tag, wanted in expected_histograms.items():
        # A logit on the border of two bins may fall into either.
        for (step, ours), (at, theirs) in zip(histograms[tag], wanted, strict=True):
            assert step == at
            apart = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            assert apart <= 4, tag


def slowed(ranks: Ranks, changes: dict[str, Any], text: Any) -> list[str]:
    """Alarms of some steps in which rank 1 sleeps in each forward pass."""
    from train.engine import build_engine

    config = make_config(Path("unused"), LOGGED | changes)
    seed_all(config.seed, ranks.rank)
    engine = build_engine(config, config.model, ranks=ranks, precision="float32")
    alarms, window = Alarms(config.model), LoadWindow()
    if ranks.rank == 1:
        engine.model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.15))
    loader = TrainLoader(text, config.training.seq_len, config.seed)
    lines = []
    for step in range(SLOW_STEPS + 4):
        with engine.clock.working():
            batches = read_step(loader, step, config, engine)
        metrics = train_step(engine, batches, step, config)
        assert metrics is not None
        window.add(metrics.tokens_per_expert)
        lines += [(a.kind, a.text) for a in alarms.check(metrics, window)]
    assert metrics.work_seconds.shape == (2,)
    return lines


@pytest.mark.parametrize("size", [1, 2])
def test_a_slow_rank_is_named_though_all_wait_for_it(size):
    changes = {
        "training.micro_batch_size": None,
        "parallel.expert_parallel_size": size,
        "training.steps": 100,
    }
    text = data()
    for lines in run_ranks(2, slowed, changes, text):
        assert [kind for kind, _ in lines] == ["slow rank"], lines
        assert "rank 1 needs" in lines[0][1]
