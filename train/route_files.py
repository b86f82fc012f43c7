"""What is in a recording of routes on the disk? A header, records of one size, their checksums.

    FOLDER/routes.json   the header: shape and dtype of the records, what they belong to
    FOLDER/routes.bin    (steps, B, L, S, K) chosen experts, -1 for none, little-endian
    FOLDER/checks.bin    (steps, B) CRC-32 of each sequence's routes, uint32; 0: not written

B sequences of the global batch in their order in the data, L routed layers from the bottom up. Each
rank writes its own sequences at their offsets, the routes before their checksums: every layout of
ranks and micro-batches writes the same bytes, and a record without a checksum is none.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from moe.config import Section
from moe.variants import Count
from train.errors import ConfigError, DataError
from train.run_directory import make_directory, replace_file, storage_errors

SETTING = "routes.record"
CHECK_BYTES = 4
_CHECK = np.dtype("<u4")
# Checksums that are read at a time.
_CHUNK = 1 << 20


class Header(Section):
    """Of a whole recording.

    num_steps: optimizer steps of the run that records, of which some may be missing. shape: (B, L,
    S, K) of a step. routes: what a run must share to replay them; run: what the run must share that
    goes on recording. Both are nested settings, for `train.changed_settings`.
    """

    format: Literal[1] = 1
    num_steps: Count
    dtype: Literal["int8", "int16", "int32"]
    shape: tuple[Count, Count, Count, Count]
    routes: dict[str, Any]
    run: dict[str, Any]


def index_dtype(num_experts: int) -> Literal["int8", "int16", "int32"]:
    """The smallest type that holds -1 and every expert's number."""
    if num_experts <= 2**7:
        return "int8"
    return "int16" if num_experts <= 2**15 else "int32"


class Recording(NamedTuple):
    """A folder and the header that is in it, or will be. Steps are counted from 0.

    No file stays open: on a file system that machines share, what one has closed the others see.
    """

    folder: Path
    header: Header

    @property
    def routes_path(self) -> Path:
        return self.folder / "routes.bin"

    @property
    def checks_path(self) -> Path:
        return self.folder / "checks.bin"

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence's routes."""
        _, num_layers, seq_len, top_k = self.header.shape
        return num_layers * seq_len * top_k * np.dtype(self.header.dtype).itemsize

    def begin(self, step: int) -> None:
        """Make the folder and its header, and forget `step` and what comes after it: a run that
        goes on from an older checkpoint, or anew, may take another way from there.

        Raises:
            NoSpaceError, ConfigError: if it cannot be written.
        """
        text = self.header.model_dump_json(indent=1) + "\n"
        path = self.folder / "routes.json"
        with storage_errors(self.folder, setting=SETTING):
            make_directory(self.folder)
            if not path.exists() or path.read_text() != text:
                replace_file(path, text)
        batch_size = self.header.shape[0]
        for path, size in self._sizes():
            with _opened(path) as fd:
                os.ftruncate(fd, min(os.fstat(fd).st_size, step * batch_size * size))

    def _sizes(self) -> list[tuple[Path, int]]:
        """Each file, and what it has of one sequence, in bytes."""
        return [(self.checks_path, CHECK_BYTES), (self.routes_path, self.sequence_bytes)]

    def write(self, step: int, first: int, routes: np.ndarray) -> None:
        """Write the routes of some sequences of a step, (n, L, S, K), from sequence `first` on.

        Raises:
            NoSpaceError, ConfigError: if they cannot be written.
        """
        assert routes.shape[1:] == self.header.shape[1:] and routes.dtype == self.header.dtype
        # In the order of the shape, whatever the strides are.
        routes = np.ascontiguousarray(routes, np.dtype(self.header.dtype).newbyteorder("<"))
        checks = np.array([checksum(each) for each in routes], _CHECK)
        at = step * self.header.shape[0] + first
        for path, size, values in (
            (self.routes_path, self.sequence_bytes, routes.tobytes()),
            (self.checks_path, CHECK_BYTES, checks.tobytes()),
        ):
            with _opened(path) as fd:
                rest, place = memoryview(values), at * size
                # A nearly full disk takes a part, and reports the error on the next call only.
                while len(rest):
                    written = os.pwrite(fd, rest, place)
                    rest, place = rest[written:], place + written

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        for path, _ in self._sizes():
            with _opened(path) as fd:
                os.fsync(fd)

    def recorded(self, start: int, stop: int) -> np.ndarray:
        """Whether each of the steps from `start` to before `stop` is there whole, (stop - start,).

        Raises:
            DataError: if the checksums cannot be read.
        """
        batch_size, whole = self.header.shape[0], np.zeros(max(0, stop - start), bool)
        steps = max(1, _CHUNK // batch_size)
        for at in range(start, stop, steps):
            count = min(steps, stop - at) * batch_size
            checks = np.zeros(count, _CHECK)
            found = _read(self.checks_path, count * CHECK_BYTES, at * batch_size * CHECK_BYTES)
            # The end of the file may lie within a step, and within a number.
            found = found[: len(found) // CHECK_BYTES * CHECK_BYTES]
            checks[: len(found) // CHECK_BYTES] = np.frombuffer(found, _CHECK)
            complete = (checks.reshape(-1, batch_size) != 0).all(1)
            whole[at - start : at - start + steps] = complete
        return whole

    def first_missing(self, start: int, stop: int) -> int | None:
        """The first of these steps that is not there whole; None if all are."""
        missing = np.flatnonzero(~self.recorded(start, stop))
        return start + int(missing[0]) if len(missing) else None

    def num_steps(self) -> int:
        """Steps up to the end of the file, those that are missing in between included."""
        try:
            size = self.checks_path.stat().st_size
        except OSError as error:
            raise _unreadable(self.checks_path, error) from error
        return size // (self.header.shape[0] * CHECK_BYTES)

    def check_length(self, stop: int) -> None:
        """Refuse a file that ends before the routes of the steps before `stop`.

        Raises:
            DataError: if it does, or is not there.
        """
        needed = stop * self.header.shape[0] * self.sequence_bytes
        try:
            size = self.routes_path.stat().st_size
        except OSError as error:
            raise _unreadable(self.routes_path, error) from error
        if size < needed:
            raise DataError(
                f"{self.routes_path} is cut off: its first {stop} steps take {needed:,} bytes, it "
                f"has {size:,}; copy it again, or record again"
            )

    def read(self, step: int, first: int, count: int) -> np.ndarray:
        """The routes of `count` sequences of a step from sequence `first` on, (count, L, S, K).

        Raises:
            DataError: if they are missing, cut off, or not what was written.
        """
        at, size = step * self.header.shape[0] + first, self.sequence_bytes
        data = _read(self.routes_path, count * size, at * size)
        stored = _read(self.checks_path, count * CHECK_BYTES, at * CHECK_BYTES)
        parts = [memoryview(data)[i * size : (i + 1) * size] for i in range(count)]
        checks = np.array([checksum(part) for part in parts], _CHECK)
        if len(data) < count * size or stored != checks.tobytes():
            raise DataError(
                f"{self.routes_path}: the routes of step {step + 1} are damaged or missing (their "
                f"checksums are not those in {self.checks_path.name}); copy the folder again, or "
                f"record again"
            )
        dtype = np.dtype(self.header.dtype)
        routes = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False)
        return routes.reshape(count, *self.header.shape[1:])


def checksum(routes: Any) -> int:
    """CRC-32 of one sequence's routes; never 0, which stands for none."""
    return zlib.crc32(routes) or 1


def open_recording(folder: Path, setting: str) -> Recording:
    """The recording in a folder, its header read.

    Args: setting: what named the folder, for the errors.
    Raises:
        ConfigError: if there is none, or in a format of another version.
        DataError: if its header cannot be read.
    """
    recording = find_recording(folder)
    if recording is None:
        raise ConfigError(
            f"{setting} ({folder}) holds no recording of routes, there is no routes.json in it; "
            f"give the folder that routes.record of another run has named"
        )
    return recording


def find_recording(folder: Path) -> Recording | None:
    """The same, or None if the folder has none."""
    path = folder / "routes.json"
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return Recording(folder, Header.model_validate_json(text))
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["loc"] == ("format",):
            raise ConfigError(
                f"{path}: format {problem['input']!r} is not 1, the one that this version reads; "
                f"record again"
            ) from error
        where = ".".join(map(str, problem["loc"])) or "the text"
        raise DataError(
            f"{path} is no header of a recording ({where}: {problem['msg']}); copy it again, or "
            f"record again"
        ) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to write a file's parts, and what a user reads when that fails."""
    # Never without its name: calls on a descriptor know none.
    with storage_errors(path, setting=SETTING):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield fd
        finally:
            os.close(fd)


def _read(path: Path, size: int, offset: int) -> bytearray:
    """Bytes of a file, fewer where it ends."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < size and (count := os.preadv(fd, [view[done:]], offset + done)):
                done += count
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(path, error) from error
    view.release()
    del data[done:]
    return data


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror}; allow reading it, copy it again, or record again"
    )
