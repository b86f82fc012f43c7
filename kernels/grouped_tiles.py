"""Which expert and which rows does a program of a grouped kernel have?

The rows of each expert are cut into tiles of BLOCK_M. How many there are only the GPU knows, so a
grid has room for as many as there could be, and a map made on the GPU says which expert and rows a
tile has. Rows behind the last offset are those of one more expert without a matrix.

    tile_map (3, tiles) int32: expert, first row, end of the expert's rows

Sizes come in UNITs, of 8 where they are multiples of it: the compiler then knows that rows begin at
16 bytes (Triton itself looks for multiples of 16), and loads 16 at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import ARCHITECTURES, AotCase
from kernels.tiles import Tile, choose_tile, tiles_of

# Elements that a program of the map compares: tiles times experts.
MAP_ELEMENTS = 16384


@triton.jit
def _tile_map_kernel(
    offset_ptr,
    tile_map_ptr,
    num_rows,
    num_experts,
    num_tiles,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.arange(0, EXPERTS)
    first = tl.load(offset_ptr + group, mask=group <= num_experts, other=0).to(tl.int32)
    end = tl.load(offset_ptr + group + 1, mask=group < num_experts, other=0).to(tl.int32)
    end = tl.where(group == num_experts, num_rows, end)
    tiles = tl.where(group <= num_experts, (end - first + BLOCK_M - 1) // BLOCK_M, 0)
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = ends[None, :] <= tile[:, None]  # (BLOCK, EXPERTS): experts whose tiles come earlier
    expert = tl.sum(before.to(tl.int32), 1)
    earlier = tl.sum(tl.where(before, tiles[None, :], 0), 1)
    # Tiles that are left over have no rows.
    exists = expert <= num_experts
    expert = tl.minimum(expert, num_experts)
    start = tl.load(offset_ptr + expert).to(tl.int32) + (tile - earlier) * BLOCK_M
    start = tl.where(exists, start, num_rows)
    stop = tl.load(offset_ptr + expert + 1, mask=expert < num_experts, other=0).to(tl.int32)
    stop = tl.where(expert < num_experts, stop, num_rows)
    inside = tile < num_tiles
    tl.store(tile_map_ptr + tile, expert, mask=inside)
    tl.store(tile_map_ptr + num_tiles + tile, start, mask=inside)
    tl.store(tile_map_ptr + 2 * num_tiles + tile, stop, mask=inside)


@triton.jit
def swizzle(program, num_m, num_n, GROUP_M: tl.constexpr):
    """(block of M, block of N) of a program: GROUP_M blocks of M share what they read in the L2."""
    group = program // (GROUP_M * num_n)
    first = group * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    within = program - group * GROUP_M * num_n
    return first + within % size, within // size


@triton.jit
def rows_of_tile(tile_map_ptr, num_tiles, tile):
    """(expert, first row, end of the expert's rows) in 64 bits, for addresses."""
    expert = tl.load(tile_map_ptr + tile).to(tl.int64)
    first = tl.load(tile_map_ptr + num_tiles + tile).to(tl.int64)
    end = tl.load(tile_map_ptr + 2 * num_tiles + tile).to(tl.int64)
    return expert, first, end


def in_units(*sizes: int) -> tuple[int, ...]:
    """The UNIT of some sizes, and each of them in it."""
    unit = 1 if any(size % 8 for size in sizes) else 8
    return unit, *(size // unit for size in sizes)


def map_blocks(num_experts: int) -> dict[str, int]:
    """Constants of a launch of the map."""
    experts = triton.next_power_of_2(num_experts + 1)
    return {"EXPERTS": experts, "BLOCK": max(1, min(64, MAP_ELEMENTS // experts))}


class Groups:
    """Rows of each expert, and their cuts into tiles, made once for each size of a tile."""

    def __init__(self, expert_offsets: Tensor, num_rows: int):
        self.offsets = expert_offsets
        self.num_rows = num_rows
        self.num_experts = expert_offsets.numel() - 1
        self._maps: dict[int, Tensor] = {}

    @property
    def rows_per_expert(self) -> int:
        """On average; the size that tiles are chosen by."""
        return self.num_rows // max(self.num_experts, 1)

    def num_tiles(self, block_m: int) -> int:
        """No routing cuts the rows into more tiles: one at most of each group is not full."""
        return triton.cdiv(self.num_rows, block_m) + min(self.num_experts + 1, self.num_rows)

    def tile_map(self, block_m: int) -> Tensor:
        """(3, tiles), see above."""
        if block_m not in self._maps:
            num_tiles = self.num_tiles(block_m)
            tile_map = self.offsets.new_empty(3, num_tiles, dtype=torch.int32)
            blocks = map_blocks(self.num_experts)
            numbers = self.num_rows, self.num_experts, num_tiles
            grid = (triton.cdiv(num_tiles, blocks["BLOCK"]),)
            _tile_map_kernel[grid](self.offsets, tile_map, *numbers, BLOCK_M=block_m, **blocks)
            self._maps[block_m] = tile_map
        return self._maps[block_m]

    def tile(self, kernel: str, rows: Tensor) -> Tile:
        """The tile of `kernel` for these rows on their device."""
        return choose_tile(kernel, rows.device, rows.dtype, self.rows_per_expert)


def shipped_tiles(kernel: str) -> Iterator[tuple[str, torch.dtype, Tile]]:
    """(architecture, dtype, tile) of every entry of the table that a chip runs."""
    for arch in ARCHITECTURES:
        for name, by_size in tiles_of(kernel, arch).items():
            for tile in by_size.values():
                yield arch, getattr(torch, name), tile


def matmul_cases(
    name: str, kernel: Any, types: dict[str, Any], constants: dict[str, Any]
) -> Iterator[AotCase]:
    """A matmul kernel in every tile of its name, at sizes that are multiples of 8 and at others.

    types: name of an argument -> its dtype, None if it is absent; the others are pointers to the
    dtype of the tile, or integers.
    """
    for arch, dtype, tile in shipped_tiles(name):
        known: dict[str, Any] = dict.fromkeys(kernel.arg_names, int)
        known |= {arg: dtype for arg in known if arg.endswith("_ptr")}
        known |= {"tile_map_ptr": torch.int32} if "tile_map_ptr" in known else {}
        for constant in {*tile.blocks, *constants, "UNIT"}:
            del known[constant]
        is_bfloat16 = dtype == torch.bfloat16
        case = AotCase(kernel, known | types, tile, constants | {"UNIT": 8}, (), (arch,))
        yield case._replace(spills=not is_bfloat16)
        odd = case._replace(constants=constants | {"UNIT": 1}, spills=True)
        yield odd._replace(rare=not is_bfloat16)


def matmul_variant(
    variant: str, name: str, kernel: Any, types: dict[str, Any], constants: dict[str, Any]
) -> Iterator[AotCase]:
    """As `matmul_cases`, but only in bfloat16 at multiples of 8: other operands, called so."""
    for case in matmul_cases(name, kernel, types, constants):
        if not case.spills:
            yield case._replace(name=variant, rare=True)


def map_cases() -> list[AotCase]:
    """The map for few experts and for many."""
    types: dict[str, Any] = {"offset_ptr": torch.int64, "tile_map_ptr": torch.int32}
    types |= dict.fromkeys(("num_rows", "num_experts", "num_tiles"), int)
    tile = Tile({"BLOCK_M": 128})
    return [AotCase(_tile_map_kernel, types, tile, map_blocks(n)) for n in (8, 256)]
