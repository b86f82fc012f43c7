"""Failing calls, full disks and kill -9 during a save leave old checkpoints whole."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    FILES,
    is_content_of,
    names_in,
    newest,
    no_warning,
    same_bits,
    save,
    values_of,
)

from train.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from train.errors import ConfigError, NoSpaceError, RunError
from train.run_directory import REPLACED, SAVING, RunLock

ROOT = Path(__file__).resolve().parents[1]


# ---- faults

CALLS = ["open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"]


class Faults:
    """Counts the calls that change the disk, and fails the `at`-th one or all from there on."""

    def __init__(self, at: int, code: int, *, persistent: bool) -> None:
        self.at, self.code, self.persistent = at, code, persistent
        self.calls: list[str] = []
        self.failed = False
        self.committed = False

    @contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._wrap(name, getattr(os, name)))
            yield

    def _wrap(self, name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            self.calls.append(name)
            count = len(self.calls)
            if count == self.at or (self.persistent and count > self.at):
                self.failed = True
                raise OSError(self.code, os.strerror(self.code))
            result = real(*args, **kwargs)
            if name == "rename" and Path(args[0]).name.startswith(SAVING):
                self.committed = True
            return result

        return call


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_fault_at_any_call_leaves_the_old_or_the_new(tmp_path, again, code, persistent):
    """F02: the target is absent or old-complete before the rename, new-complete after it."""
    at = 0
    while True:
        at += 1
        run_dir = tmp_path / str(at)
        save(run_dir, 1)
        save(run_dir, 2)
        if again:
            save_checkpoint(run_dir, 3, values_of(33), {"step": 33}, keep_last=10)
        faults = Faults(at, code, persistent=persistent)
        warnings: list[str] = []
        error: Exception | None = None
        with faults.active():
            try:
                save(run_dir, 3, keep_last=3 if again else 2, warn=warnings.append)
            except RunError as raised:
                error = raised
        if not faults.failed:
            break
        if error is None:
            assert warnings, "a fault that is not raised is at least told"
        else:
            assert isinstance(error, NoSpaceError if code == errno.ENOSPC else ConfigError)
            assert str(run_dir) in str(error)
        _check_after_fault(run_dir, faults.committed, again)
    assert at > 20, faults.calls
    assert {"open", "write", "fsync", "mkdir", "rename", "replace", "unlink"} <= set(faults.calls)


def _check_after_fault(run_dir: Path, committed: bool, again: bool) -> None:
    found = newest(run_dir, lambda _: None)
    if committed:
        assert is_content_of(found, 3)
    elif again:
        assert found.step == 3 and found.state == {"step": 33}
        assert same_bits(found.tensors["model"]["w"], values_of(33)["model"]["w"])
    else:
        assert is_content_of(found, 2)
        assert is_content_of(load_checkpoint(run_dir / "checkpoints" / "step_00000001"), 1)
    assert is_content_of(load_checkpoint(run_dir / "checkpoints" / "step_00000002"), 2)
    with RunLock(run_dir):
        assert not [n for n in names_in(run_dir) if n.startswith((SAVING, REPLACED))]
        found_again = newest(run_dir, lambda _: None)
        assert found_again.step == found.step and found_again.state == found.state
        save(run_dir, 3)
        assert is_content_of(find_checkpoint(run_dir, "must", no_warning), 3)


def test_everything_is_on_the_disk_before_the_next_thing_relies_on_it(tmp_path, monkeypatch):
    """The order that survives a power cut, which no test can cause: contents, names, rename."""
    save(tmp_path, 1)
    events: list[tuple[str, object]] = []

    def record(name: str, real: Callable, key: Callable) -> None:
        def call(*args, **kwargs):
            events.append((name, key(args[0])))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    record("write", os.write, lambda fd: os.fstat(fd).st_ino)
    record("fsync", os.fsync, lambda fd: os.fstat(fd).st_ino)
    record("rename", os.rename, lambda path: Path(path).name)
    record("replace", os.replace, lambda path: Path(path).name)
    path = save(tmp_path, 2)
    monkeypatch.undo()

    renamed = events.index(("rename", SAVING + path.name))
    replaced = events.index(("replace", SAVING + "latest"))
    before, between, after = events[:renamed], events[renamed:replaced], events[replaced:]
    files = [path / name for name in [*FILES[:3], "manifest.json"]]
    last_writes = []
    for file in files:
        inode = file.stat().st_ino
        writes = [i for i, event in enumerate(before) if event == ("write", inode)]
        assert writes[-1] < before.index(("fsync", inode)), file.name
        last_writes.append(writes[-1])
    assert last_writes[-1] == max(last_writes), "the manifest is written last"
    assert before[-1] == ("fsync", path.stat().st_ino)
    assert between[1] == ("fsync", path.parent.stat().st_ino)
    latest = (path.parent / "latest").stat().st_ino
    assert between[2:] == [("write", latest), ("fsync", latest)]
    assert after[1:] == [("fsync", path.parent.stat().st_ino)]


def test_ctrl_c_in_the_middle_of_a_save_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert names_in(tmp_path) == {"step_00000001", "latest"}


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(os, "write", lambda *args: pytest.fail("nothing may be written"))
    megabytes = {"model": {"w": torch.ones(3 << 18)}, "optimizer": {"w:step": torch.ones(1 << 18)}}
    with pytest.raises(NoSpaceError) as error:
        save_checkpoint(tmp_path, 2, megabytes, {}, keep_last=1)
    assert "step 2 needs 4.0 MiB and 1.0 MiB to spare, 1000 B are free" in str(error.value)
    assert error.value.exit_code == 7 and str(tmp_path) in str(error.value)
    assert names_in(tmp_path) == {"step_00000001", "latest"}


def test_a_disk_that_fills_up_during_a_save_keeps_the_old_checkpoints(small_disk, monkeypatch):
    save(small_disk, 1)
    monkeypatch.setattr("train.checkpoint._SPARE_BYTES", -(1 << 30))
    big = {"model": {"w": torch.ones(1 << 20)}}
    with pytest.raises(NoSpaceError, match="No space left on device") as error:
        save_checkpoint(small_disk, 2, big, {}, keep_last=1)
    # With what the cut-off save had taken given back.
    free = re.search(r"model\.safetensors: .* \([0-9.]+ [KM]iB are free\)", str(error.value))
    assert free and "step 2 takes 4.0 MiB; complete ones are intact" in str(error.value)
    assert names_in(small_disk) == {"step_00000001", "latest"}
    assert is_content_of(find_checkpoint(small_disk, "must", no_warning), 1)
    save(small_disk, 3)
    assert is_content_of(find_checkpoint(small_disk, "must", no_warning), 3)


def test_a_file_size_limit_counts_as_no_space(tmp_path):
    """The kernel itself refuses the write here, on every machine and without privileges."""
    save(tmp_path, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(NoSpaceError, match="File too large") as error:
            save_checkpoint(tmp_path, 2, {"model": {"w": torch.ones(50_000)}}, {}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "model.safetensors" in str(error.value)
    assert names_in(tmp_path) == {"step_00000001", "latest"}
    assert is_content_of(find_checkpoint(tmp_path, "must", no_warning), 1)


def saves(run_dir: Path) -> None:
    save(run_dir, 2)


def starts(run_dir: Path) -> None:
    with RunLock(run_dir):
        pass


@pytest.mark.parametrize("action", [saves, starts])
def test_a_run_directory_below_a_file_is_one_clear_line(tmp_path, action):
    # Root may write anywhere, so a directory without write permission would prove nothing.
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose an output_dir that can be written") as error:
        action(tmp_path / "file" / "run")
    assert str(tmp_path / "file") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("action", [saves, starts])
def test_a_read_only_run_directory_is_one_clear_line(tmp_path, monkeypatch, action):
    save(tmp_path, 1)
    real_open = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real_open(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(ConfigError, match="Read-only file system: choose an") as error:
            action(tmp_path)
    assert str(tmp_path) in str(error.value) and error.value.exit_code == 2
    assert is_content_of(find_checkpoint(tmp_path, "must", no_warning), 1)


# ---- kill -9

SAVER = """
import sys, torch
from pathlib import Path
from train.checkpoint import RunLock, find_checkpoint, save_checkpoint
torch.set_num_threads(1)
run_dir, size = Path(sys.argv[1]), int(sys.argv[2])
with RunLock(run_dir):
    left = [p.name for p in (run_dir / "checkpoints").glob(".*")] if run_dir.exists() else []
    assert not left, left
    found = find_checkpoint(run_dir, "auto", lambda message: None)
    step = found.step if found else 0
    print("ready", step, flush=True)
    while True:
        # The odd steps are saved twice, so that kills also land in the exchange of directories.
        step += 1
        for _ in range(1 + step % 2):
            generator = torch.Generator().manual_seed(step)
            w, m = (torch.randn(size, generator=generator) for _ in range(2))
            tensors = {"model": {"w": w}, "optimizer": {"w.m": m, "step": torch.tensor(step)}}
            save_checkpoint(run_dir, step, tensors, {"step": step}, keep_last=3)
            print("saved", step, flush=True)
"""


def kill_while_saving(run_dir: Path, delay: float, size: int, *, first_save: bool) -> int:
    """Start the saver and kill it after `delay` seconds; the last step it announced.

    Args:
        first_save: count the delay from the start, so that the very first save can be hit; else
            from the first completed save, so that each kill finds some progress however slow the
            machine is.
    """
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(run_dir), str(size)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline().split()
        assert first[:1] == ["ready"], first
        lines = [] if first_save else [process.stdout.readline()]
        time.sleep(delay)
        assert process.poll() is None, "the saver ended by itself"
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
    # The last line may be cut off in the middle of its number.
    announced = [int(line.split()[1]) for line in lines if line.endswith("\n")]
    return max([int(first[1]), *announced])


def kill_repeatedly(run_dir: Path, kills: int, seed: int, size: int = 1 << 19) -> int:
    """Kill `kills` savers one after another and check each time; kills that landed mid-save."""
    delays = random.Random(seed)
    mid_save = 0
    for kill in range(kills):
        delay = delays.uniform(0.0, 0.35)
        announced = kill_while_saving(run_dir, delay, size, first_save=kill % 2 == 0)
        directory = run_dir / "checkpoints"
        names = names_in(run_dir) if directory.exists() else set()
        mid_save += any(name.startswith((SAVING, REPLACED)) for name in names)
        if announced == 0 and not any(name.startswith("step_") for name in names):
            continue
        found = newest(run_dir, lambda _: None)
        assert found.step >= announced
        assert is_content_of(found, found.step, size)
        for path in directory.glob("step_*"):
            # A kill while the oldest was being deleted leaves it without its manifest.
            if (path / "manifest.json").exists():
                assert is_content_of(load_checkpoint(path), int(path.name[5:]), size)
            else:
                assert int(path.name[5:]) <= found.step - 3
    assert announced >= kills // 2, "each second kill waits for a save"
    return mid_save


def test_kill_9_while_saving_always_resumes(tmp_path):
    kill_repeatedly(tmp_path, kills=5, seed=0)


@pytest.mark.slow
def test_kill_9_while_saving_always_resumes_20_times(tmp_path):
    assert kill_repeatedly(tmp_path, kills=20, seed=1) >= 1, "no kill landed inside a save"
