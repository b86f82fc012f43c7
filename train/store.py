"""How does a cached result become trusted? As a folder that appears whole, with a hash of every
file.

An entry is written under a temporary name and renamed when it is complete, so a killed process
leaves nothing that a reader would take for finished. `manifest.json` holds the facts about the
entry and the SHA-256 of each of its files; a reader verifies them, and a damaged entry is made
again.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import DataError, NoSpaceError, RunError
from train.run_directory import MANIFEST, remove_tree

_TEMPORARY = ".tmp-"
log = logging.getLogger(__name__)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold: the name of what is made from them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def disk_is_full(error: BaseException) -> bool:
    """Whether an error is a full disk, a used-up quota or a limit on a file's size."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return getattr(error, "errno", None) in full or "No space left" in str(error)


@contextmanager
def new_entry(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write an entry: yields a temporary folder and the dict of its facts; complete on a clean
    exit.

    An older entry at `path` (a damaged one) is replaced.
    """
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    facts: dict[str, Any] = {}
    try:
        yield temporary, facts
        files = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        text = json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
        # It may also be a file, or a link to nothing.
        if os.path.lexists(path):
            remove_tree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_entry(path: Path) -> dict[str, Any] | None:
    """The manifest of a sound entry; None if there is none, or (with a warning) if it is
    damaged."""
    if not path.exists():
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, sha256 in manifest["files"].items():
            if file_sha256(path / name) != sha256:
                raise ValueError(f"{name} does not have the SHA-256 of its manifest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged and is made again: %s", path, error)
        return None
    return manifest


@contextmanager
def locked(cache_dir: Path) -> Iterator[None]:
    """Let one process at a time fill the cache; the others wait, then find its entries.

    A cache that cannot be written (a shared one) is used without a lock. Temporary folders of
    killed processes are removed.
    """
    try:
        lock = (cache_dir / "lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache_dir.glob(f"*/{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def opened_cache(cache_dir: Path) -> Iterator[None]:
    """The cache for us alone, made if need be, and the disk errors of the block as one line.

    Raises:
        NoSpaceError: if the disk is full.
        DataError: any other OSError, blamed on the cache only if it is about a path in it.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir):
            yield
    except OSError as error:
        raise _explain(error, cache_dir) from error


def _explain(error: OSError, cache_dir: Path) -> RunError:
    if disk_is_full(error):
        return NoSpaceError(
            f"data.cache_dir ({cache_dir}): no space left on the disk; free some, or point it to "
            f"another disk"
        )
    reason = error.strerror or str(error)
    if isinstance(error.filename, str | os.PathLike):
        failed, cache = Path(os.path.abspath(error.filename)), Path(os.path.abspath(cache_dir))
        if not failed.is_relative_to(cache) and not cache.is_relative_to(failed):
            return DataError(
                f"{failed} cannot be used for the data: {reason}; make it readable, or leave out "
                f"the domain that needs it"
            )
        reason = f"{error.filename}: {reason}"
    return DataError(
        f"data.cache_dir ({cache_dir}) cannot be used: {reason}; needs a folder that can be written"
    )
