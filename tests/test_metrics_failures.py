"""Does a run go on where its curves cannot be written, and keep them where it fails itself?"""

import errno
import shutil
import threading
from pathlib import Path

import pytest
from metrics_cases import EVALUATED, LOGGED, read, values
from tensorboard.summary.writer.record_writer import RecordWriter
from training_cases import NUM_STEPS, Recorder, checkpoint, make_config, run

from train.metrics_writer import MetricsWriter


def a_file_in_its_place(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("")


def test_an_unwritable_directory_is_one_warning(tmp_path, capsys):
    a_file_in_its_place(tmp_path / "run")
    assert run(tmp_path / "run", LOGGED) == 0
    printed = capsys.readouterr()
    assert printed.out.count("warning: TensorBoard: ") == 1 and printed.err == ""
    assert "File exists" in printed.out and "going on without it" in printed.out
    assert checkpoint(tmp_path / "run").step == NUM_STEPS


@pytest.mark.parametrize("writes", [0, 1, 20, 45])
def test_a_disk_that_fills_up_is_one_warning(writes, tmp_path, capsys, monkeypatch):
    real, done = RecordWriter.write, []

    def write(writer, data):
        done.append(None)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer, data)

    hook = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", write)
    with Recorder() as recorder:
        assert run(tmp_path / "run", LOGGED) == 0
    assert len(recorder.steps) == NUM_STEPS and threading.excepthook is hook
    printed = capsys.readouterr()
    assert printed.out.count("warning: TensorBoard: [Errno 28] No space left on device") == 1
    # The writer's own thread would print its traceback.
    assert printed.err == ""


def test_a_disk_that_is_really_full_stops_only_the_curves(tmp_path, small_disk, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(small_disk)
    filler = small_disk / "filler"

    def fill(step: int) -> None:
        if step == 3:
            with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with Recorder(before_step=fill) as recorder:
        assert run(tmp_path / "run", LOGGED | {"training.steps": 8}) == 0
    assert len(recorder.steps) == NUM_STEPS
    assert capsys.readouterr().out.count("warning: TensorBoard: ") == 1
    assert checkpoint(tmp_path / "run").step == NUM_STEPS


def test_a_directory_that_vanishes_is_begun_again(tmp_path, capsys):
    def vanish(step: int) -> None:
        if step == 4:
            shutil.rmtree(tmp_path / "run" / "tensorboard")

    with Recorder(before_step=vanish):
        assert run(tmp_path / "run", LOGGED) == 0
    assert capsys.readouterr().out.count("has vanished; beginning it again") == 1
    events = read(tmp_path / "run")
    assert list(values(events, "health/lm_loss")) == [5, 6, 7, 8]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_probe_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "probe_routes").write_text("")
    assert run(tmp_path / "run", LOGGED) == 0
    assert capsys.readouterr().out.count("the routes of step") == len(EVALUATED)
    assert list(values(read(tmp_path / "run"), "validation/mean_loss")) == EVALUATED


def test_errors_of_other_threads_are_reported_as_ever(tmp_path, capsys):
    config = make_config(tmp_path, LOGGED)
    seen = []
    hook, threading.excepthook = threading.excepthook, seen.append
    try:
        writer = MetricsWriter(tmp_path, config, 0, lambda text: None)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        writer.close()
        assert len(seen) == 1 and threading.excepthook == seen.append
    finally:
        threading.excepthook = hook


def test_the_curves_up_to_a_failure_are_written(tmp_path, monkeypatch):
    def fail(step: int) -> None:
        if step == 5:
            raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"), Recorder(before_step=fail):
        run(tmp_path / "run", LOGGED)
    assert list(values(read(tmp_path / "run"), "health/lm_loss")) == [1, 2, 3, 4, 5]
