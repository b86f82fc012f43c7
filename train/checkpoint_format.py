"""What a checkpoint directory holds, how its bytes are laid out, and how they are checked.

    step_00000120/
        model.safetensors ...    one file per group of tensors
        state.json               everything that is not a tensor
        manifest.json            size and SHA-256 of each file above, and of itself

Nothing here is pickled, and reading never unpickles: a checkpoint from a stranger can be wrong, but
cannot run code.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from train.errors import CheckpointError
from train.ranks import Gather, gather
from train.run_directory import MANIFEST, REPLACED
from train.stored_tensors import DTYPES, Kind, Piece, join_pieces, open_file

FORMAT = 1
# Groups that ranks share out in fragments of their tensors.
FRAGMENTED = ("model", "optimizer")
STATE = "state.json"
_STEP_NAME = re.compile(r"step_(\d{8,})", re.ASCII)
# A group of which each rank has written its own part.
_RANK_PART = re.compile(r"(\w+)_rank_(\d{5})", re.ASCII)
_GROUP_NAME = re.compile(r"[A-Za-z0-9_]{1,64}", re.ASCII)
# What reading a file raises that is not what it should be.
_UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)
_FILE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}\.safetensors|state\.json", re.ASCII)


class Checkpoint(NamedTuple):
    """What `save_checkpoint` was given, on the CPU; tuples of the state have become lists.

    What ranks wrote in fragments is whole again. A group whose tensors belong to one rank each
    keeps that rank's number in its name, see `rank_group`.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


# ---- reading


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint after every byte of it has been checked against its manifest.

    Raises:
        CheckpointError: if it is damaged; the message names the files.
    """
    checkpoint = open_checkpoint(path)
    return checkpoint._replace(
        tensors={group: dict(stored) for group, stored in checkpoint.tensors.items()}
    )


def open_checkpoint(path: Path, rank: int = 0, gather: Gather = gather) -> Checkpoint:
    """As `load_checkpoint`, but tensors are read from the disk when they are asked for.

    Of many ranks each calls this; every byte is checked by one of them.

    Raises:
        CheckpointError: on all ranks if one finds it damaged, or cannot read it; the message names
            the files.
    """
    path = Path(path)
    problems = verify_together(path, rank, gather)
    opened = None
    if not problems:
        found = []
        try:
            opened = _open(path)
        except CheckpointError as error:
            found = [str(error)]
        problems = _together(found, gather)
    if problems or opened is None:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
    return opened


def _open(path: Path) -> Checkpoint:
    """A checkpoint whose bytes are those of its manifest."""
    file_name = STATE
    try:
        manifest = _read_manifest(path)
        state = parse_json((path / STATE).read_bytes())
        shapes = {name: torch.Size(shape) for name, shape in state.get("shapes", {}).items()}
        pieces: dict[str, list[Piece]] = {}
        kinds: dict[str, dict[str, Kind]] = {}
        for file_name in sorted(manifest["files"].keys() - {STATE}):
            part = file_name.removesuffix(".safetensors")
            whole = whole_group(part)
            group = whole if whole in FRAGMENTED else part
            found, theirs = open_file(path / file_name, partial(_shape_of_whole, shapes, group))
            pieces.setdefault(group, []).extend(found)
            kinds.setdefault(group, {}).update(theirs)
    except _UNREADABLE as error:
        raise CheckpointError(f"{file_name}: {error}") from error
    groups = {group: join_pieces(pieces[group], kinds[group]) for group in pieces}
    if missing := sorted(shapes.keys() - groups.get("model", {}).keys()):
        raise CheckpointError(f"{missing[0]}: no file has it")
    return Checkpoint(path, manifest["step"], groups, state)


def _shape_of_whole(shapes: Mapping[str, torch.Size], group: str, name: str) -> torch.Size:
    """Shape of the whole tensor of which there are fragments; moments have that of their weight."""
    weight = name.rpartition(":")[0] if group == "optimizer" else name
    if weight not in shapes:
        raise CheckpointError(f"{name} is unknown to this model")
    return shapes[weight]


def rank_group(group: str, rank: int) -> str:
    """Name of one rank's part of a group."""
    return f"{group}_rank_{rank:05d}"


def whole_group(part: str) -> str:
    """Name of the group that `part` is, or is one rank's part of."""
    match = _RANK_PART.fullmatch(part)
    return part if match is None else match[1]


def verify_checkpoint(path: Path, rank: int = 0, num_ranks: int = 1) -> list[str]:
    """Say what is wrong with a checkpoint, one line per file, `file: problem`; [] if it is sound.

    Found are missing, unreadable, unknown and resized files and any changed bit. Of `num_ranks`
    each checks its share of the files.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        present = set(os.listdir(path)) - {MANIFEST}
    except OSError as error:
        where = MANIFEST if path.is_dir() else path.name
        return [f"{where}: {error.strerror}"]
    except (ValueError, RecursionError) as error:
        return [f"{MANIFEST}: {error}"]
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(manifest["files"]))]
    for name, expected in sorted(manifest["files"].items())[rank::num_ranks]:
        try:
            problem = _compare(path / name, expected)
        except OSError as error:
            problem = error.strerror
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def verify_together(path: Path, rank: int, gather: Gather) -> list[str]:
    """`verify_checkpoint` by all ranks, each of which reads a part; the same answer on all."""
    num_ranks = len(gather(None))
    return _together(verify_checkpoint(path, rank, num_ranks), gather)


def _together(problems: list[str], gather: Gather) -> list[str]:
    """What any rank has found, once."""
    return list(dict.fromkeys(line for lines in gather(problems) for line in lines))


def _compare(path: Path, expected: Mapping[str, Any]) -> str | None:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return "not a plain file"
    if found.st_size != expected["bytes"]:
        return f"{found.st_size} bytes, the manifest says {expected['bytes']}"
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == expected["sha256"] else "its SHA-256 is not the manifest's"


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raise ValueError unless each byte is as `render_manifest` wrote it and the fields fit."""
    text = (path / MANIFEST).read_bytes()
    manifest = parse_json(text)
    if _seal(manifest) != text:
        raise ValueError("changed since it was written")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"format {manifest.get('format')}, this program reads {FORMAT}")
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(step, int) or not isinstance(files, dict) or STATE not in files:
        raise ValueError("not a checkpoint's manifest")
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"names a file {name!r}, which no checkpoint has")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise ValueError(f"no size and SHA-256 for {name}")
    if step_of(path) not in (None, step):
        raise ValueError(f"belongs to step {step}")
    return manifest


def step_of(path: Path) -> int | None:
    """Step that a checkpoint's directory is named for, also where it was moved aside; else None."""
    name = path.name.removeprefix(REPLACED)
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and name == f"step_{int(match[1]):08d}" else None


# ---- writing


def check_groups(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError for what cannot be stored; a group's name can lead to no other place."""
    for group, named in tensors.items():
        if not isinstance(group, str) or not _GROUP_NAME.fullmatch(group):
            raise ValueError(f"group {group!r} must be letters, digits and _, it names a file")
        for name, tensor in named.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise ValueError(f"{group}: tensor name {name!r} must be text, not __metadata__")
            if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
                raise ValueError(f"{group}: {name} must be a dense tensor that holds values")
            if tensor.dtype not in DTYPES:
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise ValueError(f"{group}: {name} is {tensor.dtype}, must be one of {allowed}")


def safetensors_parts(named: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield a safetensors file of these tensors piece by piece."""
    kinds = {name: Kind(tensor.dtype, tensor.shape) for name, tensor in named.items()}
    return stream_safetensors(kinds, lambda name: [named[name]])


def stream_safetensors(
    kinds: Mapping[str, Kind], read: Callable[[str], Iterable[Tensor]]
) -> Iterator[Any]:
    """Yield a safetensors file piece by piece: header length (8 bytes), JSON header, raw tensors.

    Not `safetensors.save_file`: its errors carry no errno, and it needs all tensors contiguous and
    unshared at once, where here one at a time is copied. Widest dtypes first keeps each aligned.

    Args:
        kinds: dtype and shape of each tensor. read: the values of one, in one piece or several.
    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    ordered = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header, end = {}, 0
    for name in ordered:
        dtype, shape = kinds[name]
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        for tensor in read(name):
            values = tensor.detach().cpu().contiguous().resolve_neg()
            yield values.reshape(-1).view(torch.uint8).numpy()


def render_manifest(step: int, files: Mapping[str, tuple[int, str]]) -> bytes:
    """Text of the manifest: one form only, so that any other byte in it is damage."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return _seal({"format": FORMAT, "step": step, "files": listed})


def _seal(manifest: Mapping[str, Any]) -> bytes:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


# ---- JSON


def dump_state(state: Mapping[str, Any]) -> bytes:
    """Text of state.json. Raises ValueError where JSON would lose something."""
    _check_json(dict(state), "state")
    return (json.dumps(dict(state), allow_nan=False, indent=1, sort_keys=True) + "\n").encode()


def _check_json(value: Any, where: str) -> None:
    """Raise ValueError where JSON would lose something: NaN, keys that are no text, objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keys must be text")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON cannot hold: store None or leave it out")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: no NaN, no key twice. Raises ValueError or RecursionError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"has the key {twice!r} twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is not JSON")
