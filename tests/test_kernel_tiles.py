"""Which tiles does a chip get, its own or those of another?"""

import json

import pytest
import torch

from kernels import tiles
from kernels.aot import ARCHITECTURES, SHARED_MEMORY
from kernels.tiles import (
    ROW_ORDER,
    Tile,
    choose_tile,
    fallbacks,
    has_old_triton,
    load_tiles,
    same_row_order,
    save_tile,
    tiles_of,
)

# What each may use of shared memory in a program, from the CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability".
KIB = {
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99),
    "sm_80": 163,
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), 227),
}
UNKNOWN = ("sm_75", "sm_130", "gfx90a", "gfx1201")
BFLOAT16 = torch.bfloat16


@pytest.fixture
def write_tiles(tmp_path, monkeypatch):
    """Writes a table of one kernel: architecture -> stages of its only tile, in bfloat16."""
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")

    def write(stages_of):
        table = {
            arch: {"bfloat16": {"any": Tile({"BLOCK": 16}, num_stages=stages)._asdict()}}
            for arch, stages in stages_of.items()
        }
        tiles.TABLE.write_text(json.dumps({"kernel": table}))
        load_tiles.cache_clear()

    yield write
    load_tiles.cache_clear()


@pytest.fixture
def on_chip(monkeypatch):
    """Stages of the tile that a chip gets for `kernel`."""

    def stages(arch):
        monkeypatch.setattr(tiles, "architecture", lambda device: arch)
        return choose_tile("kernel", torch.device("cpu"), BFLOAT16, 100).num_stages

    return stages


@pytest.mark.parametrize(
    "chain",
    [
        "sm_80",
        "sm_90 sm_80",
        "sm_100 sm_90 sm_80",
        "sm_103 sm_100 sm_90 sm_80",
        "sm_89 sm_80",
        "sm_86 sm_89 sm_80",
        "sm_121 sm_120 sm_89 sm_80",
        "sm_130 sm_89 sm_80",
        "gfx942",
        "gfx1201 gfx942",
        "interpreter",
    ],
)
def test_a_chip_falls_back_step_by_step(chain):
    assert fallbacks(chain.split()[0]) == chain.split()


def test_the_nearest_chip_that_has_tiles_gives_them(write_tiles, on_chip):
    write_tiles({"sm_80": 1, "sm_90": 2, "gfx942": 3})
    expected = {"sm_80": 1, "sm_86": 1, "sm_121": 1, "sm_130": 1, "sm_103": 2, "gfx950": 3}
    assert {arch: on_chip(arch) for arch in expected} == expected
    write_tiles({"sm_80": 1, "sm_90": 2, "gfx942": 3, "sm_89": 4, "sm_120": 5, "sm_100": 6})
    expected |= {"sm_86": 4, "sm_89": 4, "sm_130": 4, "sm_120": 5, "sm_121": 5, "sm_103": 6}
    assert {arch: on_chip(arch) for arch in expected} == expected


@pytest.fixture
def on_triton(monkeypatch):
    """Sets the version of Triton that is installed."""

    def set_version(version):
        monkeypatch.setattr(triton, "__version__", version)
        has_old_triton.cache_clear()

    triton = pytest.importorskip("triton")
    yield set_version
    has_old_triton.cache_clear()


def test_an_old_triton_takes_its_own_tiles_where_there_are_any(write_tiles, on_chip, on_triton):
    write_tiles({"sm_80": 1, "sm_90": 2, "sm_90 triton 3.6": 3})
    for version, own in {"3.6.0": 3, "3.7.1": 2, "3.60.0": 2}.items():
        on_triton(version)
        expected = {"sm_80": 1, "sm_90": own, "sm_100": own}
        assert {arch: on_chip(arch) for arch in expected} == expected


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("version", "other"), [("3.6.0", "3.7.1"), ("3.7.1", "3.6.0")])
def test_what_one_triton_is_given_the_other_does_not_take(
    arch, version, other, write_tiles, on_chip, on_triton
):
    write_tiles({"sm_80": 1, "sm_90": 2, "sm_90 triton 3.6": 3})
    on_triton(other)
    before = on_chip(arch)
    on_triton(version)
    save_tile("kernel", arch, "bfloat16", "any", Tile({"BLOCK": 16}, num_stages=7))
    assert on_chip(arch) == 7
    on_triton(other)
    # Where both took the same entries, the newer Triton's go on serving the old one.
    assert on_chip(arch) == (7 if (arch, version) == ("sm_80", "3.7.1") else before)


def test_a_kernel_without_tiles_for_such_a_chip_is_an_error(write_tiles, on_chip):
    write_tiles({"gfx942": 3})
    with pytest.raises(KeyError, match="sm_90"):
        on_chip("sm_90")
    with pytest.raises(KeyError, match="other"):
        choose_tile("other", torch.device("cpu"), BFLOAT16, 100)


def test_rows_are_summed_in_one_order_however_many_their_expert_got():
    """A row's bits do not depend on the number of rows of its expert, which chooses the tile."""
    by_rows = {kernel for kernel in load_tiles() if kernel.startswith(("grouped_", "swiglu_"))}
    assert by_rows == {*ROW_ORDER, "grouped_weight_grad"}
    for kernel in ROW_ORDER:
        for arch, by_dtype in load_tiles()[kernel].items():
            for dtype, by_size in by_dtype.items():
                first, *others = by_size.values()
                assert all(same_row_order(kernel, first, t) for t in others), (kernel, arch, dtype)


def test_the_order_of_a_rows_sums_is_that_of_blocks_and_of_the_matrix_instruction():
    tile = Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4)
    for name, changed, alike in (
        ("BLOCK_K", 32, {"grouped_weight_grad"}),
        ("BLOCK_N", 32, {"grouped_weight_grad", "grouped_linear"}),
        ("BLOCK_M", 32, {"grouped_weight_grad"}),
        ("BLOCK_M", 128, {"grouped_weight_grad", "grouped_linear", "swiglu_backward"}),
    ):
        other = tile._replace(blocks=tile.blocks | {name: changed})
        kernels = ("grouped_weight_grad", "grouped_linear", "swiglu_backward")
        assert {k for k in kernels if same_row_order(k, tile, other)} == alike


@pytest.mark.parametrize("arch", [*KIB, *UNKNOWN])
def test_every_chip_gets_tiles_for_every_kernel_dtype_and_size(arch):
    for kernel in load_tiles():
        by_dtype = tiles_of(kernel, arch)
        assert {"float32", "bfloat16"} <= by_dtype.keys()
        assert all("any" in by_size for by_size in by_dtype.values())


def test_tiles_come_from_a_chip_with_no_more_shared_memory():
    """Of those that are compiled ahead of time: what fits them fits the chip."""
    for arch, kib in KIB.items():
        compiled = next(other for other in fallbacks(arch) if other in ARCHITECTURES)
        assert SHARED_MEMORY[compiled] <= kib * 1024


def test_a_chip_without_tiles_keeps_what_it_took_when_one_is_saved(write_tiles, on_chip):
    write_tiles({"sm_80": 1, "sm_89": 4})
    save_tile("kernel", "sm_120", "bfloat16", "64", Tile({"BLOCK": 16}, num_stages=5))
    save_tile("kernel", "sm_120", "float32", "64", Tile({"BLOCK": 16}, num_stages=6))
    kept = {
        dtype: {size: tile.num_stages for size, tile in by_size.items()}
        for dtype, by_size in tiles_of("kernel", "sm_120").items()
    }
    assert kept == {"bfloat16": {"64": 5, "any": 4}, "float32": {"64": 6, "any": 6}}
    assert on_chip("sm_121") == on_chip("sm_89") == 4
