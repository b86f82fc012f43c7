"""Does a run of two ranks survive kill -9 of either, again and again, also while it saves?

One run is killed, resumed in another layout and killed again. After each kill the newest checkpoint
is sound, the other rank has ended by itself, and the next start goes on from that checkpoint.
"""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_launches import Forked, Launched
from training_cases import data, write_config

from train.checkpoint import verify_checkpoint
from train.run_directory import SAVING

SETTINGS = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "training.device": "cpu",
    "training.micro_batch_size": None,
    "training.steps": 1_000_000,
    "schedule": {"name": "constant", "warmup_steps": 0},
    "evaluation.every": 0,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 2,
    "parallel.timeout_minutes": 0.5,
}
# Expert parallel size and ZeRO stage, in turns.
LAYOUTS = ((1, 1), (2, 2), (1, 3), (2, 0), (1, 2), (2, 1), (1, 0), (2, 3))
# How long the rank that is left may take to notice.
NOTICES_SECONDS = 30


class KilledRun:
    """One run directory, and what its kills have come to.

    Attributes:
        committed: step of the newest checkpoint after the last kill; 0 as long as there is none.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.run_dir = folder, folder / "run"
        self.draw = random.Random(seed)
        self.committed, self.starts = 0, 0
        self.running: Forked | None = None

    def start(self, **changes: Any) -> Forked:
        """The run goes on from the newest checkpoint, in the next layout."""
        size, stage = LAYOUTS[self.starts % len(LAYOUTS)]
        layout = {"parallel.expert_parallel_size": size, "parallel.zero_stage": stage}
        config = write_config(self.run_dir, SETTINGS | layout | changes)
        self.running = Forked(2, config, log=self.folder / f"log_{self.starts}.txt")
        self.starts += 1
        begins = f"resuming at step {self.committed} " if self.committed else "starting on "
        self.running.wait_for(begins)
        return self.running

    def newest(self) -> int:
        """Step of the newest checkpoint under its own name, sound or not; 0 where there is none."""
        found = (self.run_dir / "checkpoints").glob("step_*")
        return max((int(path.name.removeprefix("step_")) for path in found), default=0)

    def kill(self, victim: int, *, saving: bool) -> bool:
        """Start the run, kill one rank of it, and look at what is left.

        Returns: whether a save was cut off.
        """
        run = self.start()
        run.wait_for(f"step {self.committed + 1}/")
        saved = self._stop_while_saving(run, victim) if saving else None
        if not saving:
            time.sleep(0.5 * self.draw.random())
        before = self.newest()
        run.processes[victim].kill()
        run.processes[victim].join()
        self._other_ends(run, 1 - victim)
        newest = self.newest()
        if newest:
            path = self.run_dir / "checkpoints" / f"step_{newest:08d}"
            assert verify_checkpoint(path) == []
        assert newest >= before >= self.committed
        self.committed = newest
        return saved is not None and newest < saved

    def _stop_while_saving(self, run: Forked, victim: int) -> int:
        """Stop the victim at a random instant of a save, and say of which step.

        Rank 0 is stopped before it commits. Rank 1 before it has written its part, or else the save
        goes on without it, and the next one will do; that is seen a moment later, or, where the
        machine is busy, not at all.
        """
        process, directory = run.ranks()[victim], self.run_dir / "checkpoints"
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = next(directory.glob(f"{SAVING}step_*"), None)
            if found is None:
                continue
            time.sleep(0.01 * self.draw.random())
            process.send_signal(signal.SIGSTOP)
            time.sleep(0 if victim == 0 else 0.2)
            if found.exists():
                return int(found.name.removeprefix(f"{SAVING}step_"))
            process.send_signal(signal.SIGCONT)
        raise AssertionError(f"rank {victim} was never caught saving:\n{run.output()[-2000:]}")

    def _other_ends(self, run: Forked, survivor: int) -> None:
        """By itself, saying why, as nobody is there to end it."""
        process = run.processes[survivor]
        process.join(NOTICES_SECONDS)
        assert process.exitcode == 6, (process.exitcode, run.output()[-4000:])
        assert f"error: rank {survivor}: another rank has ended" in run.output()

    def finish(self) -> None:
        """Two more steps; nothing of what was cut off is left."""
        run = self.start(**{"training.steps": self.committed + 2})
        assert run.wait(60) == 0, run.output()[-4000:]
        assert run.exit_codes() == [0, 0]
        names = {path.name for path in (self.run_dir / "checkpoints").iterdir()}
        kept = [f"step_{self.committed + more:08d}" for more in (1, 2)]
        assert names == {*kept, "latest"}


@pytest.fixture
def killed_run(tmp_path, request) -> Iterator[KilledRun]:
    data()
    run = KilledRun(tmp_path, seed=request.param)
    yield run
    if run.running is not None:
        run.running.end()


@pytest.mark.parametrize("killed_run", [1], indirect=True)
def test_a_run_survives_the_death_of_its_ranks(killed_run):
    """Of rank 1 at any instant, of both while they save."""
    killed_run.kill(1, saving=False)
    for victim in (0, 1):
        assert any(killed_run.kill(victim, saving=True) for _ in range(5))
    killed_run.finish()


@pytest.mark.slow
@pytest.mark.parametrize("killed_run", [2, 3], indirect=True)
def test_a_run_survives_25_deaths_of_its_ranks(killed_run):
    """Every second one aimed at a save, by turns of rank 0 and rank 1."""
    cut_off = [0, 0]
    for number in range(25):
        victim = number // 2 % 2
        cut_off[victim] += killed_run.kill(victim, saving=number % 2 == 0)
    assert min(cut_off) >= 4, cut_off
    killed_run.finish()


@pytest.mark.slow
def test_a_launcher_ends_with_a_killed_rank(tmp_path):
    """And ends the other one."""
    data()
    config = write_config(tmp_path / "run", SETTINGS)
    run = Launched("torchrun", 2, config, log=tmp_path / "log.txt")
    try:
        run.wait_for("step 2/")
        run.ranks()[1].kill()
        assert run.wait(40) != 0
        assert run.ranks() == []
    finally:
        run.end()
