"""Which documents does a domain consist of, and which of them are validation?

Documents are read one after another (readers.py). What happens to one follows from its own text:
one hash places it in training or validation, another gives its turn under `max_bytes_per_domain`.
So no document changes sides when the cap or the order of files changes, and a capped domain is a
fair sample of the whole. Only the text of a domain of a single document is cut, and then its pieces
are placed like documents.
"""

import hashlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from train.errors import DataError
from train.readers import Source, files_with_invalid_utf8, read_files

# A source with one document only (one big text file) is cut into pieces of about this many
# characters.
_PIECE_CHARS = 16_384


class Selection(NamedTuple):
    """The documents that a domain consists of, by digest of their text, and what was left out.

    train, validation: digests of 16 bytes with the size of the text in bytes.
    notes: lines for the user about empty, repeated and broken documents.
    """

    train: dict[bytes, int]
    validation: dict[bytes, int]
    notes: tuple[str, ...]


# --- from files to documents ----------------------------------------------------------------------


def read_texts(source: Source, notes: list[str] | None = None) -> Iterator[str]:
    """The documents of a source in the order of its files; a lone long one is cut at line ends.

    Args:
        notes: gets a line for each file of which rows were left out.
    Raises:
        DataError: if a file cannot be read; names it.
    """
    texts = read_files(source, notes)
    lone = None
    for text in texts:
        if not text.strip():
            yield text
        elif lone is None:
            lone = text
        else:
            yield lone
            yield text
            yield from texts
            return
    if lone is not None:
        yield from _pieces(lone)


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
    broken = files_with_invalid_utf8(source)
    sizes: dict[bytes, int] = {}
    empty = repeated = 0
    left_out: list[str] = []
    texts = read_texts(source, left_out)
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
            f"{source} holds no text: {len(source.files)} files with {empty} empty documents; "
            f"give files with text or remove the domain"
        )
    validation = _validation_digests(sizes, validation_fraction)
    train = [digest for digest in sizes if digest not in validation]
    budget = max_bytes or float("inf")
    return Selection(
        take_documents(sizes, train, budget * (1 - validation_fraction)),
        take_documents(sizes, list(validation), budget * validation_fraction),
        (
            *source.notes,
            *_shortened(left_out),
            *_notes(source, empty, repeated, broken, bool(validation)),
        ),
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


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - 3
    return lines if more <= 0 else [*lines[:3], f"... and the like of {more} files more"]


def _notes(
    source: Source, empty: int, repeated: int, broken: list[Path], has_validation: bool
) -> Iterator[str]:
    if empty:
        yield f"{source.name}: skipped {empty} empty documents"
    if repeated:
        yield f"{source.name}: skipped {repeated} repeated documents"
    if not has_validation:
        yield f"{source.name}: one short document only, all of it for training"
    if broken:
        names = ", ".join(str(file) for file in broken[:3]) + (", ..." if len(broken) > 3 else "")
        yield f"{source.name}: replaced invalid UTF-8 in {len(broken)} files: {names}"


def read_selected(source: Source, wanted: Set[bytes]) -> Iterator[tuple[bytes, str]]:
    """(digest, text) of the wanted documents in the order of the files, each text once."""
    seen: set[bytes] = set()
    for text in read_texts(source):
        digest = digest_of(text)
        if digest in wanted and digest not in seen:
            seen.add(digest)
            yield digest, text
