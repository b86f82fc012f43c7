"""How is a tensor read whose numbers lie in several files of a checkpoint?

A file has a tensor whole, under its name, or a fragment of it: `NAME@START`, the numbers from START
on of the flattened tensor. A group knows where all of its tensors lie and reads what it is asked
for, so that a rank needs memory for its own part alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from train.errors import CheckpointError

# Names of dtypes in safetensors files.
DTYPES = {
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
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class Kind(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size


class Piece(NamedTuple):
    """Numbers `start` to `stop` of the flattened tensor `name`: `key` of an open file."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype
    file: Any
    key: str

    def numbers(self, start: int, stop: int) -> Tensor:
        """Some of these numbers, (stop - start,), counted as in the whole tensor."""
        if (start, stop) == (self.start, self.stop):
            return self.file.get_tensor(self.key).reshape(-1)
        part = self.file.get_slice(self.key)
        # A file gives whole rows.
        row = torch.Size(part.get_shape()[1:]).numel()
        first, end = start - self.start, stop - self.start
        rows = part[first // row : -(-end // row)].reshape(-1)
        return rows[first % row :][: stop - start]


class StoredGroup(Mapping[str, Tensor]):
    """The tensors of one group, each read from the disk when it is asked for.

    Attributes:
        kinds: dtype and shape of each, by name.
    """

    def __init__(self, kinds: dict[str, Kind], pieces: Mapping[str, list[Piece]]):
        self.kinds = kinds
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        return name in self.kinds

    def __getitem__(self, name: str) -> Tensor:
        shape = self.kinds[name].shape
        return self.read(name, 0, shape.numel()).view(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of a flattened tensor, a copy of what the files hold."""
        values = torch.empty(stop - start, dtype=self.kinds[name].dtype)
        for piece in self._pieces[name]:
            first, end = max(start, piece.start), min(stop, piece.stop)
            if first < end:
                values[first - start : end - start] = piece.numbers(first, end)
        return values

    def renamed(self, names: Mapping[str, str]) -> "StoredGroup":
        """Some of these tensors under other names. Args: names: new -> old."""
        return StoredGroup(
            {new: self.kinds[old] for new, old in names.items()},
            {new: self._pieces[old] for new, old in names.items()},
        )

    def stream(self, name: str) -> Iterator[Tensor]:
        """A flattened tensor in one piece or several, in their order."""
        for piece in self._pieces[name]:
            yield piece.numbers(piece.start, piece.stop)


def open_file(
    path: Path, shape_of_whole: Callable[[str], torch.Size]
) -> tuple[list[Piece], dict[str, Kind]]:
    """What a file has: pieces of tensors, and the kinds of these tensors.

    Args: shape_of_whole: of a tensor of which there are fragments.
    Raises:
        KeyError, OSError, ValueError, safetensors.SafetensorError: if the file is not what it
            should be; and what `shape_of_whole` raises.
    """
    pieces, kinds = [], {}
    file = safe_open(path, "pt")  # mapped for as long as pieces of it are in use
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        part = file.get_slice(key)
        shape, dtype = torch.Size(part.get_shape()), _BY_NAME[part.get_dtype()]
        name, is_fragment, at = key.rpartition("@")
        start = int(at) if is_fragment else 0
        if not is_fragment:
            name = key
        pieces.append(Piece(name, start, start + shape.numel(), dtype, file, key))
        kinds[name] = Kind(dtype, shape_of_whole(name) if is_fragment else shape)
    return pieces, kinds


def join_pieces(pieces: Iterable[Piece], kinds: dict[str, Kind]) -> StoredGroup:
    """The group of these tensors.

    Raises:
        CheckpointError: if the pieces of a tensor differ in dtype, or do not cover it exactly once.
    """
    by_name: dict[str, list[Piece]] = {name: [] for name in kinds}
    for piece in pieces:
        by_name[piece.name].append(piece)
    for name, found in by_name.items():
        found.sort(key=lambda piece: (piece.start, piece.stop))
        if len({piece.dtype for piece in found}) > 1:
            raise CheckpointError(f"{name} has fragments of different dtypes")
        check_cover(name, [(p.start, p.stop) for p in found], kinds[name].shape.numel())
    return StoredGroup(kinds, by_name)


def check_cover(name: str, spans: Iterable[tuple[int, int]], size: int) -> None:
    """Refuse spans (start, stop) that do not cover 0 to `size` exactly once.

    Raises:
        CheckpointError: saying what is missing or comes twice.
    """
    end = 0
    for start, stop in [*sorted(spans), (size, size)]:
        if start != end:
            problem = "are missing" if start > end else "come twice"
            between = f"{min(start, end)} to {max(start, end)}"
            raise CheckpointError(f"{name}: numbers {between} {problem}")
        end = stop


def numbers_of(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Numbers `start` to `stop` of a flattened tensor, no more than these read from a disk."""
    if isinstance(tensors, StoredGroup):
        return tensors.read(name, start, stop)
    return tensors[name].reshape(-1)[start:stop]


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of a tensor, without reading it."""
    return tensors.kinds[name].shape if isinstance(tensors, StoredGroup) else tensors[name].shape


def moments_by_key(named: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """The `optimizer` group of a checkpoint, `WEIGHT:KEY`, as key -> weight -> tensor."""
    names: dict[str, dict[str, str]] = {}
    for name in named:
        weight, _, key = name.rpartition(":")
        names.setdefault(key, {})[weight] = name
    if isinstance(named, StoredGroup):
        return {key: named.renamed(each) for key, each in names.items()}
    return {key: {new: named[old] for new, old in each.items()} for key, each in names.items()}
