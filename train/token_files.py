"""How do a domain's documents become flat token files, and when may those be trusted?

`CACHE/tokens/NAME-KEY/train.bin` and `validation.bin`: token ids one after another, end of text
after each document, little-endian uint16 (uint32 from 65,537 ids up). The key is a hash of the
tokenizer, of the source text and of what was chosen from it, so any change of those makes new
files; the manifest holds each file's SHA-256, which is verified when the files are opened.
"""

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from train.documents import Selection, read_selected
from train.errors import DataError
from train.readers import Source
from train.store import new_entry, read_entry
from train.tokenizer import Tokenizer, parallel_tokenizers

SPLITS = ("train", "validation")
# Enough text for every thread, little enough that a kill loses nothing worth keeping.
_BATCH_CHARS = 1_000_000


class DomainTokens(NamedTuple):
    """A domain on disk: tokens of each split (memory-mapped, one-dimensional) and its manifest.

    The manifest has, for each split, its `documents`, `bytes` and `tokens`; `notes`; and `files`,
    the SHA-256 of each file.
    """

    train: np.ndarray
    validation: np.ndarray
    manifest: dict[str, Any]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def open_tokens(entry: Path, key: str) -> DomainTokens | None:
    """The tokens of a sound entry made for `key`; None if they have to be made."""
    manifest = read_entry(entry)
    if manifest is None or manifest.get("key") != key:
        return None
    dtype = np.dtype(manifest["dtype"])
    train, validation = (_map(entry / f"{split}.bin", dtype) for split in SPLITS)
    return DomainTokens(train, validation, manifest)


def write_tokens(
    entry: Path,
    key: str,
    source: Source,
    selection: Selection,
    tokenizer: Tokenizer,
    *,
    progress: bool,
) -> None:
    """Tokenise the selected documents of a source into a new entry, complete or not at all."""
    sizes = {split: getattr(selection, split) for split in SPLITS}
    total = sum(sum(part.values()) for part in sizes.values())
    bar = tqdm(
        total=total,
        desc=f"tokenise {source.name}",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    )
    with new_entry(entry) as (folder, facts), bar, parallel_tokenizers():
        files = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
        counts = dict.fromkeys(SPLITS, 0)
        pending: dict[str, list[str]] = {split: [] for split in SPLITS}
        chars = 0

        def flush() -> None:
            for split, texts in pending.items():
                counts[split] += _write_batch(files[split], texts, tokenizer)
                texts.clear()

        wanted = sizes["train"].keys() | sizes["validation"].keys()
        num_read = 0
        for digest, text in read_selected(source, wanted):
            split = "validation" if digest in sizes["validation"] else "train"
            pending[split].append(text)
            num_read += 1
            chars += len(text)
            bar.update(sizes[split][digest])
            if chars >= _BATCH_CHARS:
                flush()
                chars = 0
        flush()
        if num_read != len(wanted):
            raise DataError(
                f"{source}: {len(wanted) - num_read} of {len(wanted)} documents were changed while "
                f"they were read; run again when nothing writes to the files"
            )
        for file in files.values():
            file.close()
        facts |= {"key": key, "domain": source.name, "dtype": token_dtype(tokenizer.vocab_size).str}
        for split in SPLITS:
            part = sizes[split]
            facts[split] = {"documents": len(part), "bytes": sum(part.values())}
            facts[split]["tokens"] = counts[split]
        facts["notes"] = list(selection.notes)


def _write_batch(file: BinaryIO, texts: list[str], tokenizer: Tokenizer) -> int:
    if not texts:
        return 0
    end = np.array([tokenizer.end_of_text])
    parts = [part for ids in tokenizer.encode_batch(texts) for part in (ids, end)]
    tokens = np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size))
    file.write(tokens.tobytes())
    return len(tokens)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
