"""Who may write in a run directory, and how a file gets there whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from train.errors import ConfigError, NoSpaceError, RunError

# A name with this prefix is still being written, and belongs to nobody once its writer is gone.
SAVING = ".saving_"
# The old directory of a name, moved aside for the moment in which a new one takes the name.
REPLACED = ".replaced_"

# Deleted first, so that a half-deleted checkpoint can never pass for a sound one.
MANIFEST = "manifest.json"

# Small enough that the bytes just hashed are still in the cache when they are written.
_CHUNK_BYTES = 1 << 20

# EFBIG is what `ulimit -f` and file systems with a limit on a file's size answer.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunLock:
    """One process at a time may write `run_dir`; what a killed one left unfinished is removed.

    An flock on RUN/lock, so the kernel frees it however the process ends, kill -9 included. The
    file holds the owner's process id and host, for the message only: it is not itself the lock,
    and stays behind empty.

        with RunLock(run_dir):
            ...

    Raises:
        ConfigError: on entry, if another process holds the lock, or if the directory or its
            `checkpoints` is something else or cannot be written.
        NoSpaceError: on entry, if the disk is full.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self._fd: int | None = None

    def __enter__(self) -> "RunLock":
        checkpoints = self.run_dir / "checkpoints"
        with storage_errors(self.run_dir):
            check_directory(self.run_dir, "output_dir")
            make_directory(self.run_dir)
            fd = os.open(self.run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._lock(fd)
                # Noticed now, and not at the first save, which may be hours away.
                check_directory(checkpoints, "the place of the checkpoints")
                remove_leftovers(checkpoints)
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd
        # A forked child shares the lock; one that outlives us (a data worker) must not keep it.
        lock = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(lock()))
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Already closed where a forked child leaves the block.
        if self._fd is None:
            return
        # The disk may be full or gone by now; the lock is freed by closing all the same.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        self._close()

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir {self.run_dir} is in use by {_read_owner(fd)}: wait until that run "
                "has ended, stop it, or choose another output_dir"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _close_in_child(lock: RunLock | None) -> None:
    if lock is not None:
        lock._close()


def _read_owner(fd: int) -> str:
    """Name the owner; it may have locked an instant ago and not have written its name yet."""
    for _ in range(20):
        owner = os.pread(fd, 200, 0).decode(errors="replace").strip()
        if owner:
            return owner
        time.sleep(0.05)
    return "another process"


@contextlib.contextmanager
def storage_errors(path: Path, advice: str = "", *, setting: str = "output_dir") -> Iterator[None]:
    """Turn an OSError of the block into a RunError that names the path and the way out.

    Args:
        path: named when the OSError itself names no file.
        advice: a sentence to end the message of a full disk with.
        setting: the one that names the place, to choose another by.
    Raises:
        NoSpaceError: disk or quota full, or a file larger than the system allows.
        ConfigError: anything else (read-only, not permitted, a file in the way, a failing disk).
    """
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(path)
        raise _explain(error, where, advice, setting) from error


def format_bytes(count: float) -> str:
    """In powers of 1,024: `3.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _explain(error: OSError, where: str, advice: str, setting: str) -> RunError:
    reason = error.strerror or str(error)
    if error.errno in FULL:
        way_out = f"free some space or choose another {setting}. {advice}".rstrip()
        return NoSpaceError(f"{where}: {reason}{_free_space(error, Path(where))}: {way_out}")
    if error.errno == errno.EIO:
        return ConfigError(
            f"{where}: {reason}: the disk fails; choose {_a(setting)} on another one"
        )
    return ConfigError(
        f"{where}: {reason}: choose {_a(setting)} that can be written, or allow writing there"
    )


def _a(setting: str) -> str:
    return f"{'an' if setting[0] in 'aeiou' else 'a'} {setting}"


def _free_space(error: OSError, path: Path) -> str:
    """How much there is on a full disk; a quota or a limit on files does not follow from that."""
    if error.errno != errno.ENOSPC:
        return ""
    place = next(place for place in (path, *path.parents, Path()) if place.exists())
    try:
        return f" ({format_bytes(shutil.disk_usage(place).free)} are free)"
    except OSError:
        return ""


def write_durably(path: Path, parts: Iterable[Any]) -> tuple[int, str]:
    """Write a new file and wait until it is on the disk; the directory entry is the caller's.

    Args:
        path: must not exist yet.
        parts: objects with the buffer protocol, contiguous, written one after another.
    Returns:
        Size in bytes and SHA-256 (hex) of what was handed in: a later difference is the disk's.
    Raises:
        OSError: as the system reports it; the file may then be there in part.
    """
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                _write_all(fd, chunk, path)
            size += len(view)
        _sync(fd, path)
    finally:
        os.close(fd)
    return size, digest.hexdigest()


def _write_all(fd: int, chunk: memoryview, path: Path) -> None:
    # A nearly full disk takes a part and reports the error only on the next call.
    while len(chunk):
        with _naming(path):
            chunk = chunk[os.write(fd, chunk) :]


def _sync(fd: int, path: Path) -> None:
    with _naming(path):
        os.fsync(fd)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Calls on a file descriptor know no file name; give their errors one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def check_directory(
    path: Path, role: str, *, writable: bool = True, setting: str = "output_dir"
) -> None:
    """Refuse a `path` that is no directory and cannot become one; nothing is created.

    Args:
        role: what the path is to the user, such as the name of its setting.
        writable: also ask whether it, or what it will be made in, may be written.
        setting: as in `storage_errors`.
    Raises:
        ConfigError: a file or a dangling link stands there or above, or writing is not allowed.
    """
    place = next(place for place in (path, *path.parents, Path()) if os.path.lexists(place))
    where = f"{role} ({path})" if place == path else f"{role} ({path}): {place}"
    if place.is_symlink() and not place.exists():
        raise ConfigError(
            f"{where} is a link to {os.readlink(place)}, which is not there; make that directory, "
            f"remove the link, or choose {_a(setting)} that can be written"
        )
    if not place.is_dir():
        raise ConfigError(
            f"{where} is a file; move it away, or choose {_a(setting)} that can be written"
        )
    if writable and not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{where} cannot be written by this user; allow writing there, or choose "
            f"{_a(setting)} that can be written"
        )


def sync_directory(path: Path) -> None:
    """Wait until the directory's entries (created, renamed, removed) are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(fd, path)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each durably; nothing happens where it exists."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    sync_directory(path.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a small file as a whole: a reader, or a crash, finds the old text or the new."""
    temporary = path.with_name(SAVING + path.name)
    temporary.unlink(missing_ok=True)
    write_durably(temporary, [content.encode() if isinstance(content, str) else content])
    os.replace(temporary, path)
    sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a directory, manifest first; a plain file or a link goes as such."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if (path / MANIFEST).is_file():
        (path / MANIFEST).unlink()
        sync_directory(path)
    shutil.rmtree(path)


def remove_leftovers(directory: Path, warn: Callable[[str], None] | None = None) -> None:
    """Clear away what killed saves left in `directory`; only for who may write there.

    What was being saved goes. What was moved aside comes back if its replacement never arrived.

    Args:
        warn: told what could not be cleared; without it that is an OSError.
    """
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        try:
            if path.name.startswith(REPLACED):
                target = directory / path.name.removeprefix(REPLACED)
                if not os.path.lexists(target):
                    os.rename(path, target)
                    continue
            if path.name.startswith((SAVING, REPLACED)):
                remove_tree(path)
        except OSError as error:
            if warn is None:
                raise
            warn(f"cannot remove {path}, left over from a save that was cut off: {error.strerror}")
