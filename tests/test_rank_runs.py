"""Does the program itself run under the launchers: train, stop, resume in another layout, evaluate,
say once what is wrong, and end when a rank stands still?"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_cases import free_port
from rank_launches import Forked, Launched, Started
from training_cases import checkpoint, data, run, write_config

CALM = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "model.moe.num_shared_experts": 1,
    "training.device": "cpu",
    "training.micro_batch_size": None,
    "evaluation.sample_prompts": ["moss "],
    "evaluation.sample_tokens": 4,
    "parallel.timeout_minutes": 0.5,
}
ENDLESS = {"training.steps": 100_000, "schedule.warmup_steps": 0, "evaluation.every": 0}


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Started]]:
    """Starts a run of the tiny config; every process is gone at the end of the test."""
    data()
    started: list[Started] = []

    def start(
        launcher: str, world: int, changes: dict[str, Any], port: int | None = None
    ) -> Started:
        config = write_config(tmp_path / "run", CALM | changes)
        log = tmp_path / f"log_{len(started)}.txt"
        if launcher == "none":
            started.append(Forked(world, config, log=log))
        else:
            started.append(Launched(launcher, world, config, log=log, port=port))
        return started[-1]

    yield start
    for each in started:
        each.end()


def summary(run_dir: Path) -> dict[str, Any]:
    """What the run printed at its end, without its speed."""
    return json.loads((run_dir / "summary.json").read_text())


def exit_record(run_dir: Path, rank: int) -> dict[str, Any]:
    return json.loads((run_dir / f"exit_rank_{rank}.json").read_text())


def go_back(run_dir: Path, step: int) -> None:
    """As if the run had been stopped after `step`."""
    for path in (run_dir / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (run_dir / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def equals(ours: Path, theirs: Path) -> None:
    """Losses and samples of two finished runs."""
    together, alone = summary(ours), summary(theirs)
    assert together["mean_loss"] == pytest.approx(alone["mean_loss"], rel=1e-5)
    assert together["samples"] == alone["samples"]


def test_a_run_of_two_ranks_equals_that_of_one_process(launch, tmp_path):
    """Half of it under DeepSpeed's launcher, each rank with all experts; half with the experts
    shared out over two nodes that are started by hand. Both are on this machine; the hostfile names
    no machine that is there."""
    run_dir, changes = tmp_path / "run", {"checkpoint.every": 4, "checkpoint.keep_last": 5}
    assert run(tmp_path / "alone", CALM | changes) == 0
    first = launch("deepspeed", 2, changes)
    assert first.wait() == 0, first.output()
    equals(run_dir, tmp_path / "alone")
    assert exit_record(run_dir, 0) == {"rank": 0, "exit_code": 0, "message": ""}
    go_back(run_dir, 4)
    (run_dir / "summary.json").unlink()
    (tmp_path / "hostfile").write_text("worker-0 slots=1\nworker-1 slots=1\n")
    port, changes = free_port(), changes | {"parallel.expert_parallel_size": 2}
    nodes = [launch("node", number, changes, port) for number in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output() + nodes[1].output()
    assert "2 ranks, ZeRO stage 1" in nodes[0].output()
    assert "resuming at step 4" in nodes[0].output()
    equals(run_dir, tmp_path / "alone")


@pytest.mark.slow
def test_a_run_under_torchrun_equals_that_of_one_process(launch, tmp_path):
    assert run(tmp_path / "alone", CALM) == 0
    together = launch("torchrun", 2, {"parallel.expert_parallel_size": 2, "parallel.zero_stage": 2})
    assert together.wait() == 0, together.output()
    equals(tmp_path / "run", tmp_path / "alone")


def test_a_stopped_run_goes_on_in_another_layout(launch, tmp_path):
    run_dir = tmp_path / "run"
    first = launch("torchrun", 2, ENDLESS | {"parallel.zero_stage": 3})
    first.wait_for("step 3/")
    for rank in first.ranks():
        rank.send_signal(signal.SIGTERM)
    assert first.wait(40) != 0
    assert "stopped by a signal; saved at step" in first.output()
    assert [exit_record(run_dir, rank)["exit_code"] for rank in (0, 1)] == [143, 143]
    step = checkpoint(run_dir).step
    assert step >= 3
    shorter = {"training.steps": step + 2, "parallel.expert_parallel_size": 2}
    second = launch("none", 2, ENDLESS | shorter)
    assert second.wait() == 0, second.output()
    assert f"resuming at step {step}" in second.output()
    assert checkpoint(run_dir).step == step + 2


@pytest.mark.parametrize("launcher", ["none", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_wrong_setting_is_said_once(launcher, launch):
    wrong = launch(launcher, 2, {"parallel.expert_parallel_size": 3})
    if launcher == "none":
        assert wrong.wait_for_one() == 0
        # A launcher looks about once a second, and ends all when one has ended.
        time.sleep(1)
        assert wrong.exit_codes() == [2, None]
        wrong.end()
    assert wrong.wait() != 0
    lines = [line for line in wrong.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: parallel.expert_parallel_size (3) must divide the number")


@pytest.mark.parametrize("launcher", ["none", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_rank_that_stands_still_ends_the_run(launcher, launch, tmp_path):
    """The other one notices within the time limit, also inside DeepSpeed's own operations."""
    run_of_two = launch(launcher, 2, ENDLESS | {"parallel.timeout_minutes": 0.1})
    run_of_two.wait_for("step 20/")
    stopped, *_ = run_of_two.ranks()
    stopped.suspend()
    run_of_two.wait_for("has not answered within parallel.timeout_minutes (0.1)", 30)
    stopped.resume()
    assert run_of_two.wait(60) != 0
    codes = {exit_record(tmp_path / "run", rank)["exit_code"] for rank in (0, 1)}
    assert 6 in codes
