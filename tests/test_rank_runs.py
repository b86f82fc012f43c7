"""Does the program itself run under the launchers: train, stop, resume in another layout, evaluate,
survive the death of a rank?"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_cases import free_port
from training_cases import ROOT, checkpoint, data, run, write_config

CALM = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "model.moe.num_shared_experts": 1,
    "training.micro_batch_size": None,
    "evaluation.sample_prompts": ["moss "],
    "evaluation.sample_tokens": 4,
    "parallel.timeout_minutes": 0.5,
}
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


class Launch:
    """`train.pretrain` under a launcher, in a session of its own that is gone in the end."""

    def __init__(
        self,
        launcher: str,
        world: int,
        config: Path,
        *arguments: str,
        log: Path,
        port: int | None = None,
    ):
        port = port or free_port()
        command = {
            "deepspeed": f"deepspeed.launcher.runner -q --no_local_rank --num_accelerators={world} "
            f"--master_port={port} --module",
            "torchrun": f"torch.distributed.run --nproc_per_node={world} "
            f"--master_addr=127.0.0.1 --master_port={port} -m",
            # One of several nodes that are started by hand, `world` its number.
            "node": f"deepspeed.launcher.runner -q --no_local_rank --no_ssh --node_rank={world} "
            f"--hostfile={config.parent / 'hostfile'} --master_addr=127.0.0.1 "
            f"--master_port={port} --module",
        }[launcher].split()
        self.log, self.config = log, config
        program = ["train.pretrain", "--config", str(config), *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, *program],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=config.parent,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.ranks():
            process.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def output(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = 90) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {seconds} s:\n{self.output()[-4000:]}") from None

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < end, self.output()[-4000:]
            assert self.process.poll() is None, self.output()[-4000:]
            time.sleep(0.02)

    def ranks(self) -> list[psutil.Process]:
        """Processes that run the program with our config, whoever their parents are by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "train.pretrain" in command[1:4] and str(self.config) in command:
                    found.append(process)
        return found


@pytest.fixture
def launch(tmp_path) -> Iterator[Any]:
    """Starts a run of the tiny config; every process is gone at the end of the test."""
    data()
    started: list[Launch] = []

    def start(
        launcher: str, world: int, changes: dict[str, Any], *arguments: str, port: int | None = None
    ) -> Launch:
        config = write_config(tmp_path / "run", CALM | changes)
        log = tmp_path / f"log_{len(started)}.txt"
        started.append(Launch(launcher, world, config, *arguments, log=log, port=port))
        return started[-1]

    yield start
    for each in started:
        each.__exit__()
        assert each.ranks() == []


def summary(run_dir: Path) -> dict[str, Any]:
    """What the run printed at its end, without its speed."""
    return json.loads((run_dir / "summary.json").read_text())


def exit_record(run_dir: Path, rank: int) -> dict[str, Any]:
    return json.loads((run_dir / f"exit_rank_{rank}.json").read_text())


@pytest.mark.parametrize(
    "launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_a_run_of_two_ranks_equals_that_of_one_process(launcher, launch, tmp_path):
    """Losses, loads and samples; half of it with the experts on both ranks, half shared out."""
    run_dir = tmp_path / "run"
    assert run(tmp_path / "alone", CALM | {"checkpoint.every": 4, "checkpoint.keep_last": 5}) == 0
    first = launch(launcher, 2, {"checkpoint.every": 4, "checkpoint.keep_last": 5})
    assert first.wait() == 0, first.output()
    # As if it had been stopped there.
    shutil.rmtree(run_dir / "checkpoints" / "step_00000008")
    (run_dir / "checkpoints" / "latest").write_text("step_00000004\n")
    second = launch(launcher, 2, {"parallel.expert_parallel_size": 2})
    assert second.wait() == 0, second.output()
    assert "resuming at step 4" in second.output()
    alone, together = summary(tmp_path / "alone"), summary(tmp_path / "run")
    assert together["mean_loss"] == pytest.approx(alone["mean_loss"], rel=1e-5)
    assert together["samples"] == alone["samples"]
    assert exit_record(tmp_path / "run", 0) == {"rank": 0, "exit_code": 0, "message": ""}


def test_two_nodes_started_by_hand_train_together(launch, tmp_path):
    """Both on this machine; the hostfile names no machine that is there."""
    (tmp_path / "hostfile").write_text("worker-0 slots=1\nworker-1 slots=1\n")
    port, changes = free_port(), {"parallel.expert_parallel_size": 2}
    nodes = [launch("node", number, changes, port=port) for number in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output() + nodes[1].output()
    assert "2 ranks, ZeRO stage 1" in nodes[0].output()
    assert checkpoint(tmp_path / "run").step == 8


def test_a_stopped_run_goes_on_in_another_layout(launch, tmp_path):
    run_dir = tmp_path / "run"
    first = launch("torchrun", 2, {"training.steps": 2000, "parallel.zero_stage": 3})
    first.wait_for("step 3/2000")
    for rank in first.ranks():
        rank.send_signal(signal.SIGTERM)
    assert first.wait(40) != 0
    assert "stopped by a signal; saved at step" in first.output()
    assert [exit_record(run_dir, rank)["exit_code"] for rank in (0, 1)] == [143, 143]
    step = checkpoint(run_dir).step
    assert step >= 3
    changes = {"parallel.expert_parallel_size": 2, "training.steps": step + 2}
    second = launch("torchrun", 2, {**changes, "schedule.warmup_steps": 0})
    assert second.wait() == 0, second.output()
    assert f"resuming at step {step}" in second.output()
    assert checkpoint(run_dir).step == step + 2


def test_a_wrong_setting_is_said_once(launch):
    wrong = launch("torchrun", 2, {"parallel.expert_parallel_size": 3})
    assert wrong.wait() != 0
    lines = [line for line in wrong.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: parallel.expert_parallel_size (3) must divide the number")


def kill_one_rank(launch, tmp_path, seed: int) -> None:
    """SIGKILL to one rank at a random instant of a run that saves at every step."""
    draw = random.Random(seed)
    changes = {"training.steps": 100_000, "checkpoint.every": 1, "evaluation.every": 0}
    killed = launch("torchrun", 2, {**changes, "schedule.warmup_steps": 0})
    killed.wait_for("step 2/")
    time.sleep(draw.random())
    victim = draw.choice(killed.ranks())
    victim.kill()
    began = time.monotonic()
    assert killed.wait(40) != 0
    while killed.ranks():
        assert time.monotonic() - began < 30, "a rank outlived the other"
        time.sleep(0.1)
    step = checkpoint(tmp_path / "run").step
    assert step >= 1
    changes["training.steps"] = step + 1
    again = launch("torchrun", 2, {**changes, "schedule.warmup_steps": 0})
    assert again.wait() == 0, again.output()
    assert f"resuming at step {step}" in again.output()


def test_a_killed_rank_ends_the_run_which_goes_on(launch, tmp_path):
    kill_one_rank(launch, tmp_path, seed=0)


def test_a_rank_that_stands_still_ends_the_run(launch, tmp_path):
    """The other one notices within the time limit, also inside DeepSpeed's own operations."""
    changes = {"training.steps": 100_000, "evaluation.every": 0, "schedule.warmup_steps": 0}
    run_of_two = launch("torchrun", 2, {**changes, "parallel.timeout_minutes": 0.1})
    run_of_two.wait_for("step 20/")
    stopped, *_ = run_of_two.ranks()
    stopped.suspend()
    began = time.monotonic()
    while "has not answered within parallel.timeout_minutes (0.1)" not in run_of_two.output():
        assert time.monotonic() < began + 30, run_of_two.output()[-3000:]
        time.sleep(0.1)
    stopped.resume()
    assert run_of_two.wait(60) != 0
    codes = {exit_record(tmp_path / "run", rank)["exit_code"] for rank in (0, 1)}
    assert 6 in codes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ranks_killed_at_random_instants(seed, launch, tmp_path):
    kill_one_rank(launch, tmp_path, seed)
