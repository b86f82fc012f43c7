"""Do ranks write one recording together, the same as one process, and replay each other's?"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rank_launches import Forked
from test_routes import CALM, QUIET, files, record, recorded, replay
from training_cases import NUM_STEPS, data, run, write_config

RANKS = CALM | QUIET | {"training.device": "cpu", "parallel.timeout_minutes": 0.5}


@pytest.fixture
def train(tmp_path) -> Iterator[Callable[..., str]]:
    """Runs two ranks to their end: what they print."""
    data()
    started: list[Forked] = []

    def start(name: str, changes: dict[str, Any]) -> str:
        config = write_config(tmp_path / name, RANKS | {"training.micro_batch_size": 1} | changes)
        started.append(Forked(2, config, log=tmp_path / f"{name}.txt"))
        assert started[-1].wait() == 0, started[-1].output()
        return started[-1].output()

    yield start
    for each in started:
        each.end()


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_record_what_one_process_records_and_each_replays_the_other(size, train, tmp_path):
    alone, together = tmp_path / "alone_routes", tmp_path / "together_routes"
    assert run(tmp_path / "alone", RANKS | record(alone)) == 0
    parallel = {"parallel.expert_parallel_size": size}
    printed = train("together", parallel | record(together))
    assert printed.count(f"recording the routes of all steps in {together}") == 1
    (ours, checks), (theirs, _) = files(together), files(alone)
    # Later steps agree up to rounding, which may tip a choice over.
    assert ours[: len(ours) // NUM_STEPS] == theirs[: len(theirs) // NUM_STEPS]
    assert len(ours) == len(theirs) and len(checks) == 4 * 4 * NUM_STEPS
    again, back = tmp_path / "again", tmp_path / "back"
    train("bound", parallel | {"model.hidden_size": 24} | replay(alone) | record(again))
    assert files(again) == files(alone)
    one = {"training.micro_batch_size": 4, "model.hidden_size": 24}
    assert run(tmp_path / "run_back", RANKS | one | replay(together) | record(back)) == 0
    assert files(back) == files(together)


def test_ranks_go_on_with_the_recording_of_one_process(train, tmp_path):
    """From its checkpoint: what it recorded after that is forgotten, then written again."""
    saving = {"training.steps": 4, "schedule.name": "constant", "schedule.warmup_steps": 0}
    assert run(tmp_path / "run", RANKS | saving | record(tmp_path / "routes")) == 0
    before = recorded(tmp_path / "routes")
    changes = saving | {"training.steps": NUM_STEPS} | record(tmp_path / "routes")
    assert "resuming at step 4" in train("run", changes)
    after = recorded(tmp_path / "routes")
    assert len(after) == NUM_STEPS and (after[:4] == before).all()


def test_what_ranks_refuse_is_said_once(tmp_path):
    data()
    config = write_config(tmp_path / "run", RANKS | replay(tmp_path / "nothing"))
    ranks = Forked(2, config, log=tmp_path / "log.txt")
    try:
        ranks.wait_for_one()
        assert ranks.output().count("error: routes.replay") == 1, ranks.output()
    finally:
        ranks.end()
