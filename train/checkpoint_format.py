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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from train.errors import CheckpointError
from train.fragments import Fragment, assemble
from train.run_directory import MANIFEST, REPLACED

FORMAT = 1
# Groups that ranks share out in fragments of their tensors.
FRAGMENTED = ("model", "optimizer")
STATE = "state.json"
_STEP_NAME = re.compile(r"step_(\d{8,})", re.ASCII)
# A group of which each rank has written its own part.
_RANK_PART = re.compile(r"(\w+)_rank_(\d{5})", re.ASCII)
_GROUP_NAME = re.compile(r"[A-Za-z0-9_]{1,64}", re.ASCII)
_FILE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}\.safetensors|state\.json", re.ASCII)

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Checkpoint(NamedTuple):
    """What `save_checkpoint` was given, on the CPU; tuples of the state have become lists.

    What ranks wrote in fragments is whole again. A group whose tensors belong to one rank each
    keeps that rank's number in its name, see `rank_group`.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


# ---- reading


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint after every byte of it has been checked against its manifest.

    Raises:
        CheckpointError: if it is damaged; the message names the files.
    """
    path = Path(path)
    manifest, problems = _inspect(path)
    if manifest is None:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in sorted(manifest["files"]):
        if name == STATE:
            continue
        try:
            # A clone, because `load_file` maps the file: the values would follow later changes.
            loaded = load_file(path / name)
            tensors[name.removesuffix(".safetensors")] = {k: t.clone() for k, t in loaded.items()}
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {name}: {error}") from error
    try:
        state = parse_json((path / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {STATE}: {error}") from error
    try:
        shapes = {name: torch.Size(shape) for name, shape in state.get("shapes", {}).items()}
        tensors = join_ranks(tensors, shapes)
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return Checkpoint(path, manifest["step"], tensors, state)


def rank_group(group: str, rank: int) -> str:
    """Name of one rank's part of a group."""
    return f"{group}_rank_{rank:05d}"


def whole_group(part: str) -> str:
    """Name of the group that `part` is, or is one rank's part of."""
    match = _RANK_PART.fullmatch(part)
    return part if match is None else match[1]


def join_ranks(
    tensors: dict[str, dict[str, Tensor]], shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    """The groups that ranks wrote in fragments, whole, under their own names.

    Args: shapes: of the weights; moments have those of theirs.
    Raises:
        CheckpointError: if the fragments of a tensor do not cover it exactly once.
    """
    joined: dict[str, dict[str, Tensor]] = {}
    fragments: dict[str, list[Fragment]] = {}
    for part, named in tensors.items():
        whole = whole_group(part)
        if part == whole or whole not in FRAGMENTED:
            joined[part] = named
            continue
        group = joined.setdefault(whole, {})
        for key, values in named.items():
            name, found, start = key.rpartition("@")
            if found:
                fragment = Fragment(name, int(start), values)
                fragments.setdefault(whole, []).append(fragment)
            else:
                group[key] = values
    for group_name, pieces in fragments.items():
        wanted = dict(shapes)
        if group_name == "optimizer":
            keys = {piece.name.rpartition(":")[2] for piece in pieces}
            wanted = {f"{name}:{key}": shape for name, shape in shapes.items() for key in keys}
        joined[group_name] |= assemble(pieces, wanted)
    return joined


def verify_checkpoint(path: Path) -> list[str]:
    """Say what is wrong with a checkpoint, one line per file, `file: problem`; [] if it is sound.

    Found are missing, unreadable, unknown and resized files and any changed bit.
    """
    return _inspect(Path(path))[1]


def _inspect(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest if the checkpoint is sound, else None; and the problems."""
    try:
        manifest = _read_manifest(path)
        present = set(os.listdir(path)) - {MANIFEST}
    except OSError as error:
        where = MANIFEST if path.is_dir() else path.name
        return None, [f"{where}: {error.strerror}"]
    except (ValueError, RecursionError) as error:
        return None, [f"{MANIFEST}: {error}"]
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(manifest["files"]))]
    for name, expected in sorted(manifest["files"].items()):
        try:
            problem = _compare(path / name, expected)
        except OSError as error:
            problem = error.strerror
        if problem:
            problems.append(f"{name}: {problem}")
    return (None if problems else manifest), problems


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
            if tensor.dtype not in _DTYPES:
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
                raise ValueError(f"{group}: {name} is {tensor.dtype}, must be one of {allowed}")


def safetensors_parts(named: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield a safetensors file of these tensors piece by piece."""
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in named.items()}
    return stream_safetensors(kinds, lambda name: [named[name]])


def stream_safetensors(
    kinds: Mapping[str, tuple[torch.dtype, torch.Size]], read: Callable[[str], Iterable[Tensor]]
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
            "dtype": _DTYPES[dtype],
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
