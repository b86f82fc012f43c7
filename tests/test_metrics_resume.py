"""Are curves whole after a run was stopped, killed and resumed?"""

import shutil
import signal
import time

import pytest
from metrics_cases import EVALUATED, LOGGED, read, values
from tensorboard.summary.writer.record_writer import RecordWriter
from training_cases import NUM_STEPS, Recorder, at, checkpoint, launcher, run, write_config

import train.pretrain
from train.probe import ProbeRoutes


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x93NUMPY\x01", b"#" * 100])
def test_a_run_that_goes_back_forgets_the_later_probe(damage, tmp_path):
    changes = LOGGED | {"checkpoint.every": 3, "checkpoint.keep_last": 9}
    assert run(tmp_path / "run", changes) == 0
    folder = tmp_path / "run" / "probe_routes"
    assert ProbeRoutes(folder).steps() == EVALUATED
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    (folder / "step_00000003.npy").write_bytes(damage)
    seen = []
    real = ProbeRoutes.exchange

    def exchange(probe, step, routes):
        seen.append((step, probe.steps()))
        return real(probe, step, routes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeRoutes, "exchange", exchange)
        next_second()
        assert run(tmp_path / "run", changes) == 0
    # A damaged file is compared with nothing, and stops nothing.
    assert seen == [(6, [3]), (8, [3, 6])]


def next_second() -> None:
    """TensorBoard reads the files in the order of the seconds in their names; a start takes more
    than one, but not in a test that has imported everything."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def test_a_resumed_run_has_each_step_once(tmp_path):
    with Recorder(before_step=at(3)) as first:
        assert run(tmp_path / "run", LOGGED) == 143
    next_second()
    with Recorder() as second:
        assert run(tmp_path / "run", LOGGED) == 0
    events = read(tmp_path / "run")
    losses = values(events, "health/lm_loss")
    steps = first.steps + second.steps
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    assert list(losses.values()) == pytest.approx([m.lm_loss for m in steps], rel=1e-6)
    assert list(values(events, "validation/mean_loss")) == [3, 6, 8]


def test_steps_after_the_last_checkpoint_of_a_killed_run_are_replaced(tmp_path):
    """They are done again, here with another rate: the curve is the second one's, without a gap."""
    steps = {"training.steps": 60, "evaluation.every": 0, "checkpoint.every": 10}
    steps |= {"schedule.name": "constant", "logging.tensorboard": True}
    config = write_config(tmp_path / "run", steps)
    process = launcher()
    process.start(config)
    process.wait_for("step 27/60")
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    next_second()
    saved = checkpoint(tmp_path / "run").step
    before = values(read(tmp_path / "run"), "health/lm_loss")
    assert 20 <= saved < 60 and set(range(1, saved + 1)) <= set(before), "flushed with each save"
    assert run(tmp_path / "run", steps | {"optimizer.learning_rate": 0.001}) == 0
    events = read(tmp_path / "run")
    assert list(values(events, "health/lm_loss")) == list(range(1, 61))
    rates = values(events, "optimizer/learning_rate")
    assert all(rates[step] == pytest.approx(0.001) for step in range(saved + 1, 61))
    assert rates[saved] == pytest.approx(0.02)


def test_a_checkpoint_comes_after_its_curves(tmp_path, monkeypatch):
    """A kill right after a save loses nothing that the resumed run does not do again."""
    real_write, real_save, seen = RecordWriter.write, train.pretrain.save_checkpoint, []

    def write(writer, data):
        time.sleep(0.002)
        real_write(writer, data)

    def save(run_dir, step, *arguments, **options):
        seen.append((step, max(values(read(run_dir), "router/entropy/layer02"))))
        return real_save(run_dir, step, *arguments, **options)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(train.pretrain, "save_checkpoint", save)
    assert run(tmp_path / "run", LOGGED | {"checkpoint.every": 2, "evaluation.every": 0}) == 0
    assert seen == [(2, 2), (4, 4), (6, 6), (8, 8)]


def test_what_a_start_without_a_checkpoint_wrote_is_moved_aside(tmp_path):
    process = launcher()
    process.start(write_config(tmp_path / "run", LOGGED | {"training.steps": 5000, "seed": 1}))
    process.wait_for("step 9/5000")
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for name in ("checkpoints", "config.yaml"):
        path = tmp_path / "run" / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    next_second()
    assert run(tmp_path / "run", LOGGED) == 0
    events = read(tmp_path / "run")
    assert list(values(events, "health/lm_loss")) == list(range(1, NUM_STEPS + 1))
    assert list(values(events, "validation/mean_loss")) == EVALUATED
    assert any((tmp_path / "run" / "tensorboard_abandoned").glob("events.out.*"))
