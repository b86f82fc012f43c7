"""Which documents does a domain consist of, and which of them are validation?

Documents are read through Hugging Face `datasets`, one after another. What happens to one follows
from its own text: one hash places it in training or validation, another gives its turn under
`max_bytes_per_domain`. So no document changes sides when the cap or the order of files changes, and
a capped domain is a fair sample of the whole.
"""

import codecs
import glob
import hashlib
from collections.abc import Iterator, Set
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
from tqdm import tqdm

from train.errors import DataError
from train.sources import Source, file_kind, first_line, hf_datasets

# A source with one document only (one big text file) is cut into pieces of about this many
# characters.
_PIECE_CHARS = 16_384
_READ_BATCH = 64


class Selection(NamedTuple):
    """The documents that a domain consists of, by digest of their text, and what was left out.

    train, validation: digests of 16 bytes with the size of the text in bytes.
    notes: lines for the user about empty, repeated and broken documents.
    """

    train: dict[bytes, int]
    validation: dict[bytes, int]
    notes: tuple[str, ...]


# --- from files to documents ----------------------------------------------------------------------


def read_texts(source: Source, cache_dir: Path) -> Iterator[str]:
    """The documents of a source in the order of its files; a lone long one is cut at line ends.

    Invalid UTF-8 is replaced by U+FFFD.

    Raises:
        DataError: if a file cannot be read; names it.
    """
    texts = _read_files(source, cache_dir)
    first, second = next(texts, None), next(texts, None)
    if first is None:
        return
    if second is None:
        yield from _pieces(first)
    else:
        yield from chain((first, second), texts)


def _read_files(source: Source, cache_dir: Path) -> Iterator[str]:
    # Plain text cannot be malformed, so its files are read together, which is quicker for thousands
    # of them; the others one by one, so that a message can name the file.
    plain = [f for f in source.files if file_kind(f) == "text" and f.suffix != ".gz"]
    others = [[file] for file in source.files if file not in set(plain)]
    for files in ([plain] if plain else []) + others:
        named = str(files[0]) if len(files) == 1 else f"one of {len(files)} text files"
        if file_kind(files[0]) == "json" and files[0].stat().st_size == 0:
            yield ""
            continue
        try:
            yield from _read_column(source, files, named, str(cache_dir / "datasets"))
        except DataError:
            raise
        # Parquet, JSON and gzip each raise their own errors for a damaged file.
        except Exception as error:
            raise DataError(
                f"{source.setting}: {named} cannot be read ({first_line(error)}); repair it or "
                f"leave it out"
            ) from error


def _read_column(source: Source, files: list[Path], named: str, cache: str) -> Iterator[str]:
    kind = file_kind(files[0])
    options: dict[str, Any] = {
        "text": {"sample_by": "document", "encoding_errors": "replace"},
        # `datasets` replaces broken bytes in JSON only where the encoding is not spelt "utf-8".
        "json": {"encoding": "utf8", "encoding_errors": "replace"},
        "parquet": {},
    }[kind]
    # `datasets` cannot read a Parquet file without rows.
    if kind == "parquet" and pyarrow.parquet.read_metadata(files[0]).num_rows == 0:
        return
    # It takes every name for a pattern.
    names = [glob.escape(str(file)) for file in files]
    rows = hf_datasets().load_dataset(
        kind, data_files=names, split="train", streaming=True, cache_dir=cache, **options
    )
    field = "text" if kind == "text" else source.text_field
    if kind == "parquet" and field in (rows.column_names or ()):
        rows = rows.select_columns([field])
    for batch in rows.with_format("arrow").iter(batch_size=_READ_BATCH):
        if field not in batch.column_names:
            raise DataError(
                f"{source.setting}: {named} has no column {field}; it has "
                f"{', '.join(batch.column_names)}: set text_field to one of them"
            )
        for text in batch.column(field).to_pylist():
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"{source.setting}: column {field} of {named} holds {type(text).__name__}, "
                    f"needs text"
                )
            yield text or ""


def _pieces(text: str) -> Iterator[str]:
    """Cut one text into pieces of about _PIECE_CHARS that end at line ends."""
    start = 0
    while len(text) - start > 2 * _PIECE_CHARS:
        end = text.find("\n", start + _PIECE_CHARS) + 1
        # Without a line end nearby the piece ends where it ends.
        if end == 0 or end - start > 2 * _PIECE_CHARS:
            end = start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


# --- from documents to a selection ----------------------------------------------------------------


def digest_of(text: str) -> bytes:
    """16 bytes: the first 8 decide between training and validation, the others the turn."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def select_documents(
    source: Source,
    cache_dir: Path,
    max_bytes: int | None,
    validation_fraction: float,
    *,
    progress: bool,
) -> Selection:
    """Choose a domain's documents and split them; repeated texts count once, empty ones never.

    Of `max_bytes`, validation_fraction is for validation; each side takes whole documents in the
    order of their hashes until it is full, and at least one. A domain of two documents or more
    always has one of each.

    Raises:
        DataError: if the source holds no text at all.
    """
    sizes: dict[bytes, int] = {}
    empty = repeated = 0
    texts = read_texts(source, cache_dir)
    for text in tqdm(
        texts, f"read {source.name}", unit=" documents", disable=None if progress else True
    ):
        digest = digest_of(text)
        if not text.strip():
            empty += 1
        elif digest in sizes:
            repeated += 1
        else:
            sizes[digest] = len(text.encode())
    if not sizes:
        raise DataError(
            f"{source.setting} holds no text: {len(source.files)} files with {empty} empty "
            f"documents; give files with text or remove the domain"
        )
    validation = _validation_digests(sizes, validation_fraction)
    train = [digest for digest in sizes if digest not in validation]
    budget = max_bytes or float("inf")
    return Selection(
        take_documents(sizes, train, budget * (1 - validation_fraction)),
        take_documents(sizes, list(validation), budget * validation_fraction),
        tuple(_notes(source, empty, repeated, bool(validation))),
    )


def _validation_digests(sizes: dict[bytes, int], fraction: float) -> set[bytes]:
    threshold = int(fraction * 2**64)
    chosen = {digest for digest in sizes if int.from_bytes(digest[:8]) < threshold}
    if len(sizes) > 1:
        chosen.add(min(sizes))
        chosen.discard(max(sizes))
    else:
        chosen.clear()
    return chosen


def take_documents(
    sizes: dict[bytes, int], digests: list[bytes], budget: float
) -> dict[bytes, int]:
    """Whole documents in the order of their hashes until `budget` bytes are reached; at least
    one."""
    digests = sorted(digests, key=lambda digest: digest[8:])
    ends = np.cumsum([sizes[digest] for digest in digests])
    # The document that reaches the budget is the last one; so there is always one.
    count = int(np.searchsorted(ends, budget)) + 1
    return {digest: sizes[digest] for digest in digests[:count]}


def _notes(source: Source, empty: int, repeated: int, has_validation: bool) -> Iterator[str]:
    if empty:
        yield f"{source.name}: skipped {empty} empty documents"
    if repeated:
        yield f"{source.name}: skipped {repeated} repeated documents"
    if not has_validation:
        yield f"{source.name}: one short document only, all of it for training"
    broken = [file for file in source.files if _has_invalid_utf8(file)]
    if broken:
        names = ", ".join(str(file) for file in broken[:3]) + (", ..." if len(broken) > 3 else "")
        yield f"{source.name}: replaced invalid UTF-8 in {len(broken)} files: {names}"


def _has_invalid_utf8(file: Path) -> bool:
    if file_kind(file) == "parquet" or file.suffix == ".gz":
        return False
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    with file.open("rb") as stream:
        try:
            while block := stream.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return True
    return False


def read_selected(
    source: Source, cache_dir: Path, wanted: Set[bytes]
) -> Iterator[tuple[bytes, str]]:
    """(digest, text) of the wanted documents in the order of the files, each text once."""
    seen: set[bytes] = set()
    for text in read_texts(source, cache_dir):
        digest = digest_of(text)
        if digest in wanted and digest not in seen:
            seen.add(digest)
            yield digest, text
