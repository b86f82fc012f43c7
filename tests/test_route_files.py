"""Does a recording of routes hold what was written to it, and know what was not?"""

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

import train.route_files
from train.errors import ConfigError, DataError
from train.route_files import Header, Recording, checksum, index_dtype


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("routes.bin", "checks.bin")]


def empty_recording(folder: Path, num_experts: int = 300) -> Recording:
    """Of steps of 6 sequences, 2 layers, 5 tokens, 3 choices."""
    header = Header(
        num_steps=4, dtype=index_dtype(num_experts), shape=(6, 2, 5, 3), routes={}, run={}
    )
    recording = Recording(folder, header)
    recording.begin(0)
    return recording


def routes_of_step(step: int, num_experts: int = 300) -> np.ndarray:
    draw = np.random.default_rng(step)
    return draw.integers(-1, num_experts, (6, 2, 5, 3)).astype(index_dtype(num_experts))


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(1, "int8"), (128, "int8"), (129, "int16"), (2**15, "int16"), (2**15 + 1, "int32")],
)
def test_every_expert_has_a_number_in_the_file(num_experts, dtype, tmp_path):
    recording = empty_recording(tmp_path, num_experts)
    assert recording.header.dtype == dtype
    routes = routes_of_step(0, num_experts)
    routes[0, 0, 0] = -1, 0, num_experts - 1
    recording.write(0, 0, routes)
    assert np.array_equal(recording.read(0, 0, 6), routes)
    assert np.array_equal(np.fromfile(tmp_path / "routes.bin", dtype), routes.ravel())


def test_ranks_may_write_their_shares_in_any_order(tmp_path):
    whole, shared = empty_recording(tmp_path / "whole"), empty_recording(tmp_path / "shared")
    for step in range(3):
        whole.write(step, 0, routes_of_step(step))
    for step, first in ((2, 4), (0, 0), (1, 2), (2, 0), (1, 0), (0, 2), (0, 4), (2, 2)):
        # As a layer-major batch on a device hands them over.
        part = np.ascontiguousarray(routes_of_step(step)[first : first + 2].swapaxes(0, 1))
        shared.write(step, first, part.swapaxes(0, 1))
    assert shared.recorded(0, 4).tolist() == [True, False, True, False]
    assert shared.first_missing(0, 3) == 1 and shared.first_missing(2, 3) is None
    assert np.array_equal(shared.read(1, 1, 3), routes_of_step(1)[1:4])
    shared.write(1, 4, routes_of_step(1)[4:])
    assert files(tmp_path / "shared") == files(tmp_path / "whole")


def test_a_sequence_without_its_checksum_is_not_recorded(tmp_path, monkeypatch):
    """As after a kill between the two; what is written of it later takes its place."""
    recording = empty_recording(tmp_path)
    recording.write(0, 0, routes_of_step(0))
    real, sizes = os.pwrite, []

    def pwrite(fd, data, offset):
        sizes.append(len(data))
        # The disk takes a little at a time, and is gone before the checksums.
        if len(sizes) > 12:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, data[:30], offset)

    with monkeypatch.context() as patch, pytest.raises(ConfigError) as error:
        patch.setattr(os, "pwrite", pwrite)
        recording.write(1, 0, routes_of_step(1))
    assert sizes[:3] == [360, 330, 300]
    assert "the disk fails; choose a routes.record on another one" in str(error.value)
    assert recording.recorded(0, 2).tolist() == [True, False]
    with pytest.raises(DataError, match="routes of step 2 are damaged or missing"):
        recording.read(1, 0, 6)
    recording.write(1, 0, routes_of_step(1))
    assert np.array_equal(recording.read(1, 0, 6), routes_of_step(1))


def test_a_checksum_of_0_counts_as_written():
    # CRC-32 of these four bytes is 0.
    assert zlib.crc32(b"\x9d\x0a\xd9\x6d") == 0
    assert checksum(b"\x9d\x0a\xd9\x6d") == 1


def test_many_steps_are_looked_through_in_parts(tmp_path, monkeypatch):
    recording = empty_recording(tmp_path)
    for step in (0, 1, 2, 4, 5):
        recording.write(step, 0, routes_of_step(step))
    monkeypatch.setattr(train.route_files, "_CHUNK", 12)
    assert recording.recorded(1, 8).tolist() == [True, True, False, True, True, False, False]
    assert recording.num_steps() == 6
