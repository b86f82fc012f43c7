"""Do two ranks share out layers of 4, 8 and 6 experts as one process has them?

The steps themselves are a case of `tests/test_rank_parity.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import gathered_state, run_ranks
from rank_launches import Forked
from test_rank_metrics import everything
from training_cases import MIXED, checkpoint, data, make_config, run, write_config

from train.checkpoint import find_checkpoint
from train.packing import TrainLoader
from train.ranks import Ranks
from train.route_files import open_recording

SHARED = MIXED | {
    "training.device": "cpu",
    "training.steps": 4,
    "training.micro_batch_size": 1,
    "optimizer.learning_rate": 0.002,
    "evaluation.every": 2,
    "logging.tensorboard": True,
    "logging.heatmap_every": 2,
    "parallel.timeout_minutes": 0.5,
    "parallel.expert_parallel_size": 2,
}
ALONE = {key: value for key, value in SHARED.items() if not key.startswith("parallel.")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process, with its routes."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert run(run_dir, ALONE | {"routes.record": str(run_dir.parent / "routes")}) == 0
    return run_dir


def test_every_number_and_route_is_that_of_one_process(alone, tmp_path):
    data()
    changes = SHARED | {"routes.record": str(tmp_path / "routes")}
    config = write_config(tmp_path / "run", changes)
    ranks = Forked(2, config, log=tmp_path / "log.txt")
    try:
        assert ranks.wait() == 0, ranks.output()
    finally:
        ranks.end()
    assert "0 to 1 / 0 to 3 / 0 to 2" in ranks.output()
    assert "2 to 3 / 4 to 7 / 3 to 5" in ranks.output()
    scalars, histograms = everything(tmp_path / "run")
    expected, expected_histograms = everything(alone)
    assert scalars.keys() == expected.keys()
    for tag, wanted in expected.items():
        assert [step for step, _ in scalars[tag]] == [step for step, _ in wanted]
        values, found = ([value for _, value in each] for each in (wanted, scalars[tag]))
        # What AdamW makes of rounding: a few 1e-5 after some steps.
        assert found == pytest.approx(values, rel=2e-3, abs=2e-5), tag
    for tag, wanted in expected_histograms.items():
        assert [step for step, _ in histograms[tag]] == [step for step, _ in wanted]
    ours, theirs = (
        open_recording(folder, "routes.replay")
        for folder in (tmp_path / "routes", alone.parent / "routes")
    )
    assert ours.header.routes == theirs.header.routes
    assert (ours.read(0, 0, 4) == theirs.read(0, 0, 4)).all()


def loaded(ranks: Ranks | None, run_dir: Path, text: Any, *stages: int) -> list[tuple]:
    """The state of engines of these stages that have loaded a checkpoint, and a loss of theirs."""
    from train.engine import build_engine

    found_states = []
    for stage in stages:
        config = make_config(Path("unused"), SHARED | {"parallel.zero_stage": stage})
        engine = build_engine(config, config.model, ranks=ranks, precision="float32")
        found = find_checkpoint(run_dir, "must", pytest.fail, ranks)
        assert found is not None
        engine.load_state_tensors(found.tensors)
        batch = TrainLoader(text, config.training.seq_len, config.seed).batch(0, 4)
        with torch.no_grad():
            loss = engine(batch).lm_loss
        found_states.append((gathered_state(engine), float(loss)))
    return found_states


def test_ranks_load_what_one_process_saved_bit_by_bit(alone):
    saved = {group: dict(named) for group, named in checkpoint(alone).tensors.items()}
    wanted = {group: saved[group] for group in ("model", "optimizer")}
    names = wanted["model"].keys()
    for layer, number in enumerate((4, 8, 6)):
        own = [name for name in names if name.startswith(f"blocks.{layer}.feed_forward.experts.")]
        assert len(own) == 3 * number
    ((_, loss),) = loaded(None, alone, data(), 1)
    for found in run_ranks(2, loaded, alone, data(), 0, 1, 2, 3):
        for state, its_loss in found:
            assert its_loss == pytest.approx(loss, rel=1e-6)
            for group, tensors in wanted.items():
                assert state[group].keys() == tensors.keys()
                for name, tensor in tensors.items():
                    assert torch.equal(state[group][name], tensor), f"{group}: {name}"
