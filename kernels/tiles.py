"""Which block sizes does a Triton kernel run with? Made ahead of time, not tuned at run time.

`tiles.json` maps kernel -> architecture -> dtype -> largest rows per expert (or any other size that
the kernel is keyed by) -> block sizes and launch options. An architecture without entries for a
kernel takes those of another: `fallbacks`. `sm_90 triton 3.6` comes before `sm_90` on that Triton,
which needs more registers and would spill some; it goes when PyTorch 2.11 does. `python -m
kernels.bench OP --tune` adds entries; `kernels.aot` shows what each needs of its chip.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.launch import HAS_TRITON

TABLE = Path(__file__).with_name("tiles.json")
# Shared memory of a program decides: 99 KiB on sm_86, sm_89 and sm_12x, 163 on sm_80, 227 on sm_90
# and sm_10x. sm_89 goes on to sm_80 as long as those tiles fit it, which `kernels.aot` checks.
_FALLBACK = {
    "sm_86": "sm_89",
    "sm_89": "sm_80",
    "sm_90": "sm_80",
    "sm_100": "sm_90",
    "sm_103": "sm_100",
    "sm_120": "sm_89",
    "sm_121": "sm_120",
}
_LAST = ("sm_80", "gfx942", "interpreter")
_OLD_TRITON = "triton 3.6"
# Constants that say in which order a kernel adds up the terms of one number of a row: BLOCK_K cuts
# the inner size of a product, and the parts of the combine weights' gradients in swiglu_backward
# are sums over BLOCK_N columns. A gradient of matrices, and attention, have no rows per expert.
ROW_ORDER = {
    "grouped_linear": ("BLOCK_K",),
    "grouped_transposed": ("BLOCK_K",),
    "swiglu_up": ("BLOCK_K",),
    "swiglu_backward": ("BLOCK_K", "BLOCK_N"),
}
# Rows of the larger matrix instruction of NVIDIA's sm_90 and later; below, the smaller one is used,
# which may add in another order.
WIDE_ROWS = 64


class Tile(NamedTuple):
    """Constants of one launch: blocks (name -> size), warps of a program, stages of its loops."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def same_row_order(kernel: str, tile: Tile, other: Tile) -> bool:
    """Whether the kernel adds up the terms of a row in the same order with both.

    All tiles of a chip and dtype must, so that a row's bits do not depend on how many rows its
    expert got.
    """
    if kernel not in ROW_ORDER:
        return True
    wide, other_wide = (
        t.blocks["BLOCK_M"] >= WIDE_ROWS and t.num_warps % 4 == 0 for t in (tile, other)
    )
    same = all(tile.blocks[name] == other.blocks[name] for name in ROW_ORDER[kernel])
    return same and wide == other_wide


def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942`, ...; `interpreter` for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def fallbacks(arch: str) -> list[str]:
    """`arch`, then the architectures whose tiles it takes where it has none, nearest first.

    An NVIDIA chip that is not known here gets the tiles of the one with the least shared memory,
    an unknown one of AMD those of gfx942.
    """
    chain = [arch]
    while chain[-1] not in _LAST:
        unknown = "gfx942" if arch.startswith("gfx") else "sm_89"
        chain.append(_FALLBACK.get(chain[-1], unknown))
    return chain


@cache
def load_tiles() -> dict[str, dict[str, dict[str, dict[str, Tile]]]]:
    """The whole table: kernel -> architecture -> dtype -> largest size -> Tile."""
    raw = json.loads(TABLE.read_text())
    return {
        kernel: {
            arch: {
                dtype: {size: Tile(**entry) for size, entry in by_size.items()}
                for dtype, by_size in by_dtype.items()
            }
            for arch, by_dtype in by_arch.items()
        }
        for kernel, by_arch in raw.items()
    }


@cache
def has_old_triton() -> bool:
    """Whether the entries for Triton 3.6 come first."""
    if not HAS_TRITON:
        return False
    import triton

    return triton.__version__.startswith("3.6.")


def _nearest(by_arch: dict[str, Any], arch: str, *, old: bool) -> Any:
    """The entries that an architecture takes, on the old Triton or a newer one."""
    for candidate in fallbacks(arch):
        if old and (key := f"{candidate} {_OLD_TRITON}") in by_arch:
            return by_arch[key]
        if candidate in by_arch:
            return by_arch[candidate]
    raise KeyError(arch)


def tiles_of(kernel: str, arch: str) -> dict[str, dict[str, Tile]]:
    """dtype -> largest size -> Tile, of the first of the architecture's `fallbacks` with entries.

    Raises:
        KeyError: if the kernel is not in the table.
    """
    return _nearest(load_tiles()[kernel], arch, old=has_old_triton())


def choose_tile(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> Tile:
    """The entry for the smallest bucket that holds `size`; the largest bucket is called `any`.

    Raises:
        KeyError: if the kernel is not in the table.
    """
    if _trial is not None:
        return _trial.choose(kernel, device, dtype, size)
    return _from_table(kernel, device, dtype, size)


def _from_table(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> Tile:
    by_dtype = tiles_of(kernel, architecture(device))
    name = str(dtype).removeprefix("torch.")
    by_size = by_dtype[name if name in by_dtype else "float32"]
    fitting = [int(bucket) for bucket in by_size if bucket != "any" and size <= int(bucket)]
    return by_size[str(min(fitting)) if fitting else "any"]


class Launch(NamedTuple):
    """What a kernel was launched with; dtype by its name."""

    arch: str
    dtype: str
    size: int
    tile: Tile


class Trial:
    """Tiles on trial instead of the table's, for `kernels.tune`.

    instead: kernel -> Tile. latest: kernel -> its latest Launch.
    """

    def __init__(self) -> None:
        self.instead: dict[str, Tile] = {}
        self.latest: dict[str, Launch] = {}

    def choose(self, kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> Tile:
        """The tile on trial, else that of the table."""
        tile = self.instead.get(kernel) or _from_table(kernel, device, dtype, size)
        name = str(dtype).removeprefix("torch.")
        self.latest[kernel] = Launch(architecture(device), name, size, tile)
        return tile


_trial: Trial | None = None


@contextmanager
def on_trial() -> Iterator[Trial]:
    """Within the block `choose_tile` asks the Trial, in every thread of the process."""
    global _trial
    _trial = Trial()
    try:
        yield _trial
    finally:
        _trial = None


def save_tile(kernel: str, arch: str, dtype: str, bucket: str, tile: Tile) -> None:
    """Write an entry of the table; an architecture that had none keeps what it took so far.

    For a dtype that had none, the only entry is `any` too. Entries made on Triton 3.6 are for it
    alone; those made on a newer one replace what both took, and nothing else.
    """
    raw = json.loads(TABLE.read_text())
    by_arch = raw[kernel]
    new, old = (copy.deepcopy(_nearest(by_arch, arch, old=is_old)) for is_old in (False, True))
    # From now on it has entries of its own, which must serve every dtype and size.
    if has_old_triton():
        by_arch[f"{arch} {_OLD_TRITON}"] = own = old
    else:
        by_arch[arch] = own = new
        if _nearest(by_arch, arch, old=True) != old:
            by_arch[f"{arch} {_OLD_TRITON}"] = old
    by_size = own.setdefault(dtype, {})
    by_size[bucket] = tile._asdict()
    by_size.setdefault("any", tile._asdict())
    TABLE.write_text(json.dumps(raw, indent=1) + "\n")
    load_tiles.cache_clear()
