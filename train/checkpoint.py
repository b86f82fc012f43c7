"""When checkpoints are written, found, kept and refused; `train.checkpoint_format` knows the bytes.

    RUN/lock                             held by the one process that may write (RunLock)
    RUN/checkpoints/latest               name of the newest checkpoint, for people and scripts
    RUN/checkpoints/step_00000120/       one checkpoint

A checkpoint is written under a temporary name beside its place, each file and directory fsynced,
and renamed; so under `step_...` there is only what was once complete.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from train.checkpoint_format import (
    STATE,
    Checkpoint,
    check_groups,
    dump_state,
    load_checkpoint,
    open_checkpoint,
    rank_group,
    render_manifest,
    safetensors_parts,
    step_of,
    verify_checkpoint,
    verify_together,
)
from train.errors import CheckpointError, ConfigError, NoSpaceError
from train.ranks import Gather, Ranks, agreeing, gather
from train.run_directory import (
    MANIFEST,
    REPLACED,
    SAVING,
    RunLock,
    check_directory,
    format_bytes,
    make_directory,
    remove_leftovers,
    remove_tree,
    replace_file,
    storage_errors,
    sync_directory,
    write_durably,
)

__all__ = [
    "Checkpoint",
    "RunLock",
    "find_checkpoint",
    "listed_checkpoints",
    "load_checkpoint",
    "newest_checkpoint",
    "open_checkpoint",
    "rank_group",
    "save_checkpoint",
    "verify_checkpoint",
]

# Size and SHA-256 of each file written.
Files = dict[str, tuple[int, str]]
T = TypeVar("T")
# Room beyond the tensors themselves: headers, JSON and what the file system adds.
_SPARE_BYTES = 1 << 20


# ---- saving


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep_last: int,
    warn: Callable[[str], None] = warnings.warn,
    rank: int = 0,
    gather: Gather = gather,
) -> Path:
    """Store one checkpoint durably, then delete older ones beyond the newest `keep_last`.

    Of many ranks each calls this with groups of its own (`rank_group`); rank 0 makes the directory
    and commits what all have written.

    When this returns, the checkpoint survives kill -9 and a power cut. When it raises, the
    checkpoints that were there before are untouched. A checkpoint of the same step is replaced.
    A checkpoint is deleted only while a newer one is kept that reads back with its checksums.

    Args:
        step: optimizer steps done, >= 0.
        tensors: {group: {name: tensor}}; any device, stride and sharing; those dtypes
            that `train.stored_tensors.DTYPES` has.
        state: what JSON can hold without loss: str keys, finite numbers, no NaN.
        keep_last: checkpoints to keep, >= 1.
        warn: told when old files could not be deleted, which does not spoil the new checkpoint.
        rank, gather: this rank's number, and what brings a value of each rank to all of them.
    Returns:
        RUN/checkpoints/step_XXXXXXXX.
    Raises:
        ValueError: for values that cannot be stored as they are; the message names the place.
        NoSpaceError: the disk is full, or too full to begin.
        ConfigError: the directory cannot be written.
        PeerError: one of these happened to another rank.
    """
    if step < 0 or keep_last < 1:
        raise ValueError(f"step ({step}) must be >= 0 and keep_last ({keep_last}) >= 1")
    directory = Path(run_dir) / "checkpoints"
    target = directory / f"step_{step:08d}"
    temporary = directory / (SAVING + target.name)
    with agreeing(gather):
        check_groups(tensors)
        state_text = dump_state(state)
    size = sum(gather(_size_of(tensors))) + len(state_text)
    takes = f"The checkpoint of step {step} takes {format_bytes(size)}; complete ones are intact."
    try:
        with agreeing(gather), storage_errors(directory, takes):
            if rank == 0:
                make_directory(directory)
                remove_leftovers(directory, warn)
                _check_free_space(directory, step, size)
                os.mkdir(temporary)
        with agreeing(gather), storage_errors(directory, takes):
            files = _write_groups(temporary, tensors)
        everyone = gather(files)
        with agreeing(gather), storage_errors(directory, takes):
            if rank == 0:
                _commit(temporary, target, step, state_text, everyone, warn)
        _prune(directory, keep_last, warn, rank, gather)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _size_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    each = (tensor for named in tensors.values() for tensor in named.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in each)


def _check_free_space(directory: Path, step: int, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size + _SPARE_BYTES:
        raise NoSpaceError(
            f"{directory}: the checkpoint of step {step} needs {format_bytes(size)} and "
            f"{format_bytes(_SPARE_BYTES)} to spare, {format_bytes(free)} are free: free some "
            "space, choose another output_dir, or lower checkpoint.keep_last or the model. "
            "Complete checkpoints are intact."
        )


def _write_groups(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> Files:
    files = {}
    try:
        for group, named in tensors.items():
            name = f"{group}.safetensors"
            files[name] = write_durably(directory / name, safetensors_parts(named))
    except OSError:
        # Before the error is explained, which says how much is free.
        for group in tensors:
            (directory / f"{group}.safetensors").unlink(missing_ok=True)
        raise
    return files


def _commit(
    temporary: Path,
    target: Path,
    step: int,
    state_text: bytes,
    written: Iterable[Files],
    warn: Callable[[str], None],
) -> None:
    files = {name: facts for each in written for name, facts in each.items()}
    files[STATE] = write_durably(temporary / STATE, [state_text])
    write_durably(temporary / MANIFEST, [render_manifest(step, files)])
    sync_directory(temporary)
    _put_in_place(temporary, target, warn)
    latest = target.parent / "latest"
    try:
        replace_file(latest, target.name + "\n")
    except IsADirectoryError:
        warn(f"{latest} is a folder, it should name {target.name}: remove it")


def _put_in_place(temporary: Path, target: Path, warn: Callable[[str], None]) -> None:
    """Rename to `target`; a directory cannot be renamed over another, so an old one steps aside.

    A kill or a fault in between leaves the old one under its other name, where readers still find
    it and `remove_leftovers` brings it back.
    """
    aside = target.with_name(REPLACED + target.name)
    replaces = os.path.lexists(target)
    if replaces:
        os.rename(target, aside)
    os.rename(temporary, target)
    sync_directory(target.parent)
    if replaces:
        _remove_or_warn(aside, warn)


def _prune(
    directory: Path, keep_last: int, warn: Callable[[str], None], rank: int, gather: Gather
) -> None:
    """Delete the oldest beyond `keep_last`, but never the newest one that is sound.

    Usually that is the one just written, and reading it back costs one hash of it, which the ranks
    share; only where all that would be kept are damaged are older ones looked at.
    """
    with agreeing(gather), storage_errors(directory):
        listed = [path for _, path in _list_checkpoints(directory)] if rank == 0 else []
    listed = gather(listed)[0]
    surplus = listed[keep_last:]
    if not surplus:
        return
    sound = next((path for path in listed if not verify_together(path, rank, gather)), None)
    if rank == 0:
        for path in reversed(surplus):
            if path != sound:
                _remove_or_warn(path, warn)


def _remove_or_warn(path: Path, warn: Callable[[str], None]) -> None:
    try:
        remove_tree(path)
    except OSError as error:
        warn(f"cannot remove {path}: {error.strerror}; it is no longer needed")


def listed_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of a run's checkpoints, sound or not, newest first.

    Raises:
        ConfigError: where something else is in their place.
    """
    directory = Path(run_dir) / "checkpoints"
    check_directory(directory, "the place of the checkpoints", writable=False)
    with storage_errors(directory):
        return _list_checkpoints(directory)


def _list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of what stands under a checkpoint's name, sound or not, newest first."""
    found: dict[int, Path] = {}
    if directory.is_dir():
        # REPLACED sorts before step_, so what is in its place wins over what was moved aside.
        for path in sorted(directory.iterdir()):
            step = step_of(path)
            if step is not None and path.is_dir() and not path.is_symlink():
                found[step] = path
    return sorted(found.items(), reverse=True)


# ---- reading


def find_checkpoint(
    run_dir: Path,
    resume: Literal["auto", "never", "must"],
    warn: Callable[[str], None],
    ranks: Ranks | None = None,
) -> Checkpoint | None:
    """The newest sound checkpoint of a run, see `newest_checkpoint`.

    Read whole by one process; of many ranks (`ranks`), opened by each, which reads its own part.
    """
    if ranks is None:
        return newest_checkpoint(run_dir, resume, warn, load_checkpoint)
    with agreeing(gather):
        names_here = [path.name for _, path in listed_checkpoints(run_dir)]
    places = gather(names_here)
    for number, names in enumerate(places):
        if names != places[0]:
            raise ConfigError(
                f"rank {number} finds the checkpoints {names or 'none'}, rank 0 "
                f"{places[0] or 'none'}: output_dir ({run_dir}) must be one directory for all "
                f"ranks, on a file system that they share"
            )
    opened = partial(open_checkpoint, rank=ranks.rank, gather=gather)
    return newest_checkpoint(run_dir, resume, warn, opened)


def newest_checkpoint(
    run_dir: Path,
    resume: Literal["auto", "never", "must"],
    warn: Callable[[str], None],
    load: Callable[[Path], T],
) -> T | None:
    """`load` the newest sound checkpoint of a run, an older one where the newest is damaged.

    It only reads, so it may look into the directory of a run that is under way.

    Args:
        resume: `auto` begins anew when there is none; `must` refuses that; `never` refuses a
            directory that already has checkpoints.
        warn: told of each damaged checkpoint passed over, and of a wrong `latest`.
        load: raises CheckpointError where a checkpoint is damaged.
    Returns:
        None when the run begins anew.
    Raises:
        ConfigError: `must` without a checkpoint, `never` with one, a directory that is unreadable,
            or something else in its place.
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    directory = Path(run_dir) / "checkpoints"
    listed = listed_checkpoints(run_dir)
    if not listed:
        if resume == "must":
            raise ConfigError(
                f"resume: must, but {directory} has no checkpoint: check output_dir, or set "
                "resume: auto to begin anew"
            )
        return None
    if resume == "never":
        raise ConfigError(
            f"resume: never, but {directory} has checkpoints up to step {listed[0][0]}: choose "
            "another output_dir, or set resume: auto to go on from there"
        )
    damaged = []
    for step, path in listed:
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            damaged.append(str(error))
            if path != listed[-1][1]:
                warn(f"{error}; trying the one before step {step}")
            continue
        _check_latest(directory, listed[0][1].name, warn)
        return checkpoint
    raise CheckpointError(
        "\n".join(
            [*damaged, "no sound checkpoint is left: choose another output_dir to begin anew"]
        )
    )


def _check_latest(directory: Path, newest: str, warn: Callable[[str], None]) -> None:
    """`latest` decides nothing here, so a wrong one cannot mislead; it is only reported."""
    try:
        found = (directory / "latest").read_bytes()
    except OSError as error:
        warn(f"{directory / 'latest'}: {error.strerror}; it should name {newest}")
        return
    if found != (newest.removeprefix(REPLACED) + "\n").encode():
        text = found[:100].decode(errors="backslashreplace").strip()
        warn(f"{directory / 'latest'} names {text!r}, but the newest checkpoint is {newest}")
