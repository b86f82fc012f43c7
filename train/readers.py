"""Which documents does a file hold, and which of its rows hold none?

Text files are one document each. JSON (lines, or one list) and Parquet have a column of them; a row
without text there, or with a number or a list, is counted and left out, and a file where that is
the rule is refused. Bytes that are not UTF-8 text are refused with their place, unless
`invalid_utf8: replace` allows them.

Hugging Face `datasets` (5.2) reads the files, streaming, with two exceptions that are opened here:
    .gz                     it ignores `encoding` and `encoding_errors` there: the encoding is that
                            of the locale, and nothing is replaced
    a text file > 512 MiB   it makes one Arrow value of a document, which ends at 2 GiB
"""

import atexit
import codecs
import glob
import gzip
import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import pyarrow
import pyarrow.parquet

from train.errors import DataError

# Below this share of rows with text, the column is taken for the wrong one.
_SMALLEST_TEXT_SHARE = 0.5
# Above this share of undecodable characters, a file is not text at all: compressed files have 0.45.
_LARGEST_BROKEN_SHARE = 0.3
# A replaced byte becomes three: such a text has at most 1.5 GiB.
_LARGEST_DATASETS_TEXT = 1 << 29
_PARQUET_BATCH = 64
_ARROW_THREADS_END_S = 0.2
_LISTED_COLUMNS = 10
_BLOCK_BYTES = 1 << 20
# How much `check_file` reads of a file.
_SNIFFED_BYTES = 1 << 16
_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip (the name has to end in .gz)",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet (the name has to end in .parquet)",
}
_NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "{...}"}


class Source(NamedTuple):
    """Files on disk that hold one domain's documents.

    setting: the dotted path of the domain in the config, which messages begin with.
    cache_dir: `data.cache_dir`; `datasets` puts its lock files there.
    notes: lines about what was left out when the files were made.
    """

    name: str
    setting: str
    files: tuple[Path, ...]
    text_field: str
    sha256: str
    cache_dir: Path
    invalid_utf8: Literal["stop", "replace"] = "stop"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.setting} ({self.name})"


def file_kind(file: Path) -> Literal["parquet", "json", "text"]:
    """How a file is read, by its ending; `.gz` after it is unpacked."""
    ending = [suffix for suffix in file.suffixes if suffix != ".gz"][-1:]
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
    kind = kinds.get(ending[0].lower(), "text") if ending else "text"
    return cast(Literal["parquet", "json", "text"], kind)


# --- the documents of files -----------------------------------------------------------------------


def read_files(source: Source, notes: list[str] | None = None) -> Iterator[str]:
    """The documents of a source's files, blank ones included, in the order of the files.

    Line ends become "\\n", and a byte-order mark is dropped.

    Args:
        notes: gets a line for each file of which rows were left out.
    Raises:
        DataError: if a file cannot be read, or hardly any of its rows holds text; names it.
    """
    for together, group in groupby(source.files, _is_text_for_datasets):
        files = list(group)
        if together:
            # At once: to open each by itself takes twenty times as long.
            named = files[0] if len(files) == 1 else f"one of {len(files)} text files"
            with _naming(source, named):
                for row in _rows(source, files, "text", sample_by="document"):
                    yield row["text"]
            continue
        for file in files:
            with _naming(source, file):
                if file_kind(file) == "text":
                    with _open_text(source, file) as stream:
                        yield stream.read()
                else:
                    yield from _texts_of_rows(source, file, notes)


def _is_text_for_datasets(file: Path) -> bool:
    if file_kind(file) != "text" or file.suffix == ".gz":
        return False
    # A file that is gone is reported where it is opened.
    return not os.path.exists(file) or os.path.getsize(file) <= _LARGEST_DATASETS_TEXT


def _rows(source: Source, files: list[Path], kind: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows that `datasets` finds in local files; for "text", decoded as the source says."""
    if kind == "text":
        options |= {
            "keep_linebreaks": True,
            "encoding": "utf-8-sig",
            "encoding_errors": _decoding_errors(source),
        }
    yield from hf_datasets().load_dataset(
        kind,
        # It takes every name for a pattern.
        data_files=[glob.escape(_location(source, file)) for file in files],
        split="train",
        streaming=True,
        cache_dir=str(source.cache_dir / "datasets"),
        **options,
    )


def _location(source: Source, file: Path) -> str:
    """The absolute path of a file that `datasets` can open."""
    path = str(file.absolute())
    if "::" in path:
        raise DataError(
            f"{source}: {path} has :: in its path, which the `datasets` library takes for an "
            f"address; rename the file or its folder"
        )
    return path


@cache
def hf_datasets() -> Any:
    """The library, imported late: it takes a second, and reading a config does not need it."""
    import datasets

    # Arrow's threads end a moment after the last row of a streamed Parquet file; the end of the
    # interpreter in that moment aborts the process (github.com/apache/arrow/issues/45214).
    atexit.register(time.sleep, _ARROW_THREADS_END_S)
    datasets.disable_progress_bars()
    # It logs what it also raises; the user gets one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


@contextmanager
def _naming(source: Source, named: Path | str) -> Iterator[None]:
    """Any error of the block as a DataError that names the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    # The system, gzip, Parquet and `datasets` each raise their own errors.
    except Exception as error:
        raise DataError(
            f"{source}: {named} cannot be read ({first_line(error)}); repair it or leave it out"
        ) from error


def _texts_of_rows(source: Source, file: Path, notes: list[str] | None) -> Iterator[str]:
    columns: list[str] = []
    rows: Iterator[tuple[str, Any]]
    if file_kind(file) == "parquet":
        schema, _ = _parquet_schema(source, file)
        columns, rows = schema.names, _parquet_rows(source, file, schema)
    else:
        rows = _json_rows(source, file)
    census = Census(f"{source.setting}.text_field", source.text_field, str(file), columns)
    for place, row in rows:
        text = census.text_of(row, place)
        if text is not None:
            yield _whole(text, source, f"{file}, {place},")
    if census.num_rows == 0:
        yield ""
    note = census.finish()
    if note and notes is not None:
        notes.append(f"{source.name}: {note}")


def _json_rows(source: Source, file: Path) -> Iterator[tuple[str, Any]]:
    """(place, object) of each line, or of each entry of a list."""
    lines = _lines(source, file)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"line {number}"
        if line.lstrip().startswith("["):
            whole = line + "".join(lines)
            items = _parse_json(source, f"{file}, from {place} on,", whole)
            yield from ((f"entry {index}", item) for index, item in enumerate(items, 1))
            return
        yield place, _parse_json(source, f"{file}, {place},", line)


def _lines(source: Source, file: Path) -> Iterator[str]:
    if file.suffix == ".gz":
        with _open_text(source, file) as stream:
            yield from stream
    else:
        # Not as "json", which makes a time of a text that looks like one, and names no line.
        for row in _rows(source, [file], "text", sample_by="line"):
            yield row["text"]


def _parse_json(source: Source, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    # Deep nesting is a RecursionError, a number of 5,000 digits a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: {where} cannot be read as JSON ({first_line(error)}); needs one object in "
            f"each line, or one list of objects: repair it or leave it out"
        ) from error


def _parquet_rows(source: Source, file: Path, schema: pyarrow.Schema) -> Iterator[tuple[str, Any]]:
    column = source.text_field
    # Told the type of this one, `datasets` does not stop at types of others that it does not know.
    wanted = pyarrow.schema([(column, schema.field(column).type)])
    features = hf_datasets().Features.from_arrow_schema(wanted)
    options = {"columns": [column], "features": features, "batch_size": _PARQUET_BATCH}
    for number, row in enumerate(_rows(source, [file], "parquet", **options), 1):
        yield f"row {number}", row


def _parquet_schema(source: Source, file: Path) -> tuple[pyarrow.Schema, int]:
    """A file's columns, the one of the text among them, and how many rows it has."""
    with pyarrow.parquet.ParquetFile(file) as opened:
        schema, num_rows = opened.schema_arrow, opened.metadata.num_rows
    if source.text_field not in schema.names:
        raise no_column(f"{source.setting}.text_field", source.text_field, str(file), schema.names)
    return schema, num_rows


def _whole(text: str, source: Source, where: str) -> str:
    """`text` if it can be written as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if source.invalid_utf8 == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise DataError(
            f"{source}: {where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), "
            f"which is no text; repair it, or set {source.setting}.invalid_utf8: replace"
        ) from error


class Census:
    """Counts which rows of a table hold text, and what the others hold instead.

    Args:
        setting: the dotted setting that names the column.
        column: its value.
        table: what holds the rows, for messages.
        columns: those of the table, where they are known before its rows.
    """

    def __init__(self, setting: str, column: str, table: str, columns: Iterable[str] = ()):
        self.num_rows = 0
        self._setting, self._column, self._table = setting, column, table
        self._columns = dict.fromkeys(columns)
        # What a row holds instead -> how many, and where the first is.
        self._lacking: dict[str, tuple[int, str]] = {}

    def text_of(self, row: Any, place: str) -> str | None:
        """The text of a row (a dict, if the table is sound); None if it has none."""
        self.num_rows += 1
        if not isinstance(row, dict):
            what = "no columns"
        elif isinstance(value := row.get(self._column), str):
            return value
        else:
            what = "nothing" if value is None else _NAMES.get(type(value), type(value).__name__)
            if len(self._columns) < _LISTED_COLUMNS:
                self._columns |= dict.fromkeys(str(name) for name in row)
        count, first = self._lacking.get(what, (0, place))
        self._lacking[what] = (count + 1, first)
        return None

    def finish(self) -> str | None:
        """A line about the rows that were left out, if any.

        Raises:
            DataError: if fewer than half of the rows hold text.
        """
        if not self._lacking:
            return None
        lacking = ", ".join(
            f"{count} with {what} (first: {place})"
            for what, (count, place) in self._lacking.items()
        )
        texts = self.num_rows - sum(count for count, _ in self._lacking.values())
        if texts >= _SMALLEST_TEXT_SHARE * self.num_rows:
            return f"left out rows of {self._table} without text in {self._column}: {lacking}"
        if self._columns and self._column not in self._columns:
            raise no_column(self._setting, self._column, self._table, self._columns)
        others = [name for name in self._columns if name != self._column]
        named = f" (others are {_listed(others)})" if others else ""
        raise DataError(
            f"{self._setting} ({self._column}): of {self.num_rows} rows of {self._table} only "
            f"{texts} hold text, the others: {lacking}; needs text in half of them: set it to the "
            f"column of the text{named}, or repair the rows"
        )


def no_column(setting: str, column: str, table: str, columns: Iterable[str]) -> DataError:
    """The error for a table that lacks the column which a setting names."""
    return DataError(
        f"{setting} ({column}): {table} has no column {column}; it has {_listed(columns)}: set "
        f"it to one of them"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_LISTED_COLUMNS]) + (", ..." if len(names) > _LISTED_COLUMNS else "")


# --- is it text at all? ---------------------------------------------------------------------------


def check_file(source: Source, file: Path) -> bool:
    """Look at the beginning of a file, as the reading of it would; False if it is empty.

    Raises:
        DataError: if it cannot be opened, has no such column, or does not begin as text.
    """
    with _naming(source, file):
        _location(source, file)
        if file.stat().st_size == 0:
            return False
        if file_kind(file) == "parquet":
            return _parquet_schema(source, file)[1] > 0
        return _scan(source, file, _SNIFFED_BYTES)[0] > 0


def files_with_invalid_utf8(source: Source) -> list[Path]:
    """The text and JSON files in which bytes have to be replaced, read to their ends.

    Raises:
        DataError: if a file cannot be read or is not text; and, without `invalid_utf8: replace`,
            at the first byte that is not UTF-8 or is NUL.
    """
    broken = []
    for file in source.files:
        if file_kind(file) == "parquet":
            continue
        with _naming(source, file):
            if _scan(source, file)[1]:
                broken.append(file)
    return broken


def _scan(source: Source, file: Path, num_bytes: int | None = None) -> tuple[int, int]:
    """(characters, of them undecodable) of a file, or of its first `num_bytes`."""
    replace = source.invalid_utf8 == "replace"
    decoder = codecs.getincrementaldecoder("utf-8")(_decoding_errors(source))
    position = num_chars = broken = nulls = 0
    head = b""
    block_bytes = num_bytes or _BLOCK_BYTES
    with _open(file) as stream:
        while True:
            block = stream.read(block_bytes)
            at_end = len(block) < block_bytes
            head = head or block[:4]
            pending = len(decoder.getstate()[0])
            try:
                # The last character may be cut off where only the beginning is read.
                text = decoder.decode(block, final=at_end)
            except UnicodeDecodeError as error:
                where = position - pending + error.start
                what = f"byte 0x{error.object[error.start]:02x} at position {where}"
                _refuse_bytes(source, file, what, head)
            if not replace and b"\0" in block:
                where = position + block.index(b"\0")
                _refuse_bytes(source, file, f"a NUL byte at position {where}", head)
            num_chars += len(text)
            # One that the file spells out is no damage.
            broken += max(0, text.count("\ufffd") - block.count(b"\xef\xbf\xbd"))
            nulls += text.count("\0")
            position += len(block)
            if at_end or num_bytes:
                break
    if not num_bytes and broken + nulls > _LARGEST_BROKEN_SHARE * num_chars:
        what = f"{broken + nulls} of {num_chars} characters are undecodable or NUL"
        _refuse_bytes(source, file, what, head, way_out=False)
    return num_chars, broken


def _refuse_bytes(
    source: Source, file: Path, what: str, head: bytes, *, way_out: bool = True
) -> None:
    formats = [name for start, name in _OTHER_FORMATS.items() if head.startswith(start)]
    looks = f", it looks like {formats[0]}" if formats else ""
    setting = f", or set {source.setting}.invalid_utf8: replace" if way_out and not formats else ""
    raise DataError(
        f"{source}: {file} is not UTF-8 text ({what}{looks}); convert it or leave it out{setting}"
    )


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _open_text(source: Source, file: Path) -> IO[str]:
    return io.TextIOWrapper(_open(file), encoding="utf-8-sig", errors=_decoding_errors(source))


def _decoding_errors(source: Source) -> str:
    return "replace" if source.invalid_utf8 == "replace" else "strict"


def first_line(error: BaseException) -> str:
    """The cause of an error in one line."""
    cause = error.__cause__ or error
    lines = str(cause).splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
