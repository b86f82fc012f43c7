"""One process at a time may write a run directory, and a dead one holds nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from train.checkpoint import find_checkpoint
from train.errors import ConfigError
from train.run_directory import SAVING, RunLock

ROOT = Path(__file__).resolve().parents[1]


HOLDER = """
import os, sys, time
from pathlib import Path
from train.run_directory import RunLock
with RunLock(Path(sys.argv[1])):
    child = os.fork() if "fork" in sys.argv else -1
    if child == 0:
        # Announced by the child, which has then passed everything that runs at a fork.
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    if child == -1:
        print(0, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run_dir: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, int]]:
    command = [sys.executable, "-c", HOLDER, str(run_dir), *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_second_process_is_refused_with_the_owners_pid(tmp_path):
    with holder(tmp_path) as (process, _):
        owner = rf"in use by process {process.pid} on \S+: "
        with pytest.raises(ConfigError, match=owner) as error, RunLock(tmp_path):
            pass
        assert error.value.exit_code == 2 and str(tmp_path) in str(error.value)
        process.communicate("")
        assert process.returncode == 0
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("child", ["", "fork"])
def test_the_lock_goes_with_its_process_even_if_a_forked_child_lives_on(tmp_path, child):
    with holder(tmp_path, child) as (process, child_pid):
        process.kill()
        process.wait()
        try:
            with RunLock(tmp_path):
                assert str(os.getpid()) in (tmp_path / "lock").read_text()
        finally:
            if child_pid > 0:
                os.kill(child_pid, signal.SIGKILL)


def test_the_refused_process_leaves_a_save_under_way_alone(tmp_path):
    with holder(tmp_path):
        under_way = tmp_path / "checkpoints" / (SAVING + "step_00000002")
        under_way.mkdir(parents=True)
        with pytest.raises(ConfigError), RunLock(tmp_path):
            pass
        assert under_way.is_dir()


def test_an_exception_inside_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} "), RunLock(tmp_path):
            pass
        raise KeyError
    with RunLock(tmp_path):
        pass


def refusal(run_dir: Path) -> str:
    with pytest.raises(ConfigError) as error, RunLock(run_dir):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("below", [(), ("a", "b")])
def test_an_output_dir_that_is_a_file_is_named_as_one(tmp_path, below):
    file = tmp_path / "run"
    file.write_text("notes")
    run_dir = file.joinpath(*below)
    shown = f"output_dir ({run_dir}){f': {file}' if below else ''}"
    assert refusal(run_dir) == (
        f"{shown} is a file; move it away, or choose an output_dir that can be written"
    )


def test_a_dangling_link_is_named_with_where_it_leads(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.symlink_to(tmp_path / "gone")
    message = refusal(run_dir)
    assert message.startswith(f"output_dir ({run_dir}) is a link to {tmp_path / 'gone'}, which is")
    (tmp_path / "gone").mkdir()
    with RunLock(run_dir):
        pass


def test_checkpoints_that_cannot_be_a_directory_are_noticed_at_the_start(tmp_path):
    """And not at the first save, hours later."""
    place = tmp_path / "checkpoints"
    place.write_text("")
    role = f"the place of the checkpoints ({place})"
    assert refusal(tmp_path).startswith(f"{role} is a file; move it away")
    place.unlink()
    place.symlink_to("elsewhere")
    assert refusal(tmp_path).startswith(f"{role} is a link to elsewhere, which is not there")
    for resume in ("auto", "never", "must"):
        with pytest.raises(ConfigError, match="is a link to elsewhere"):
            find_checkpoint(tmp_path, resume, pytest.fail)
    # The lock was freed each time.
    place.unlink()
    with RunLock(tmp_path):
        assert not place.exists()


def test_a_directory_of_checkpoints_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    place = tmp_path / "checkpoints"
    place.mkdir()
    # Root may write anywhere, so the system call itself refuses.
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != place and real(path, mode))
    assert refusal(tmp_path).startswith(
        f"the place of the checkpoints ({place}) cannot be written by this user; allow writing"
    )
    # Reading it is another matter: `train.generate` may look into a run of someone else.
    assert find_checkpoint(tmp_path, "auto", pytest.fail) is None
