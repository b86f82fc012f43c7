"""How does a cached result become trusted? As a folder that appears whole, with a hash of every
file.

An entry is written under a temporary name and renamed when it is complete, so a killed process
leaves nothing that a reader would take for finished. `manifest.json` holds the facts about the
entry and the SHA-256 of each of its files; a reader verifies them, and a damaged entry is made
again.
"""

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

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
log = logging.getLogger(__name__)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold: the name of what is made from them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
        if path.exists():
            shutil.rmtree(path)
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
