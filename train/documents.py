"""Which documents does a domain consist of, and which of them are validation?

A source is a list of text, JSON-lines or Parquet files read through Hugging Face `datasets`, one
document after another; the default corpus and Hub data sets become such files first. What happens
to a document follows from its own text alone: one hash places it in training or validation, another
gives its turn under `max_bytes_per_domain`. So no document changes sides when the cap, the order of
files or the rest of the text changes, and a capped domain is a fair sample of the whole.
"""

import codecs
import glob
import hashlib
from collections.abc import Iterator, Set
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from moe.config import Real, Section
from train.corpus import DOMAINS, Corpus, DomainUnavailable
from train.errors import DataError
from train.store import file_sha256, key_of, new_entry, read_entry

# Changes when the same files would give other documents: part of the cache's keys.
_READER_VERSION = 1
# A source with one document only (one big text file) is cut into pieces of about this many
# characters.
_PIECE_CHARS = 16_384
_READ_BATCH = 64


class DomainConfig(Section):
    """One part of the mixture: a name, a share of the tokens, and exactly one source.

    weight: share of the tokens, relative to the other domains. corpus: a name of the default
    corpus, and then `name` may be left out. files: paths or patterns; .parquet, .json and .jsonl by
    their ending, everything else is text with one document a file; .gz is unpacked. hub: a Hub data
    set.
    text_field: the column of the text in JSON, Parquet and Hub data.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    weight: Real = Field(default=1.0, gt=0)
    corpus: str | None = None
    files: str | tuple[str, ...] | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"

    @model_validator(mode="before")
    @classmethod
    def _name_from_corpus(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" not in value and value.get("corpus"):
            return {**value, "name": value["corpus"]}
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "DomainConfig":
        given = [key for key in ("corpus", "files", "hub") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"needs exactly one source of corpus, files and hub; found {found}")
        if self.corpus and self.corpus not in DOMAINS:
            raise ValueError(f"corpus ({self.corpus}) must be one of {', '.join(DOMAINS)}")
        if not self.hub and (self.subset or self.split != "train"):
            raise ValueError(f"subset and split have no effect with {given[0]}; remove them")
        if self.corpus and self.text_field != "text":
            raise ValueError("text_field has no effect with corpus; remove it")
        return self


class Source(NamedTuple):
    """Files on disk that hold one domain's documents. `setting` is what a message points to."""

    name: str
    setting: str
    files: tuple[Path, ...]
    text_field: str
    sha256: str


class Selection(NamedTuple):
    """The documents that a domain consists of, by digest of their text, and what was left out.

    train, validation: digests of 16 bytes with the size of the text in bytes.
    notes: lines for the user about empty, repeated and broken documents.
    """

    train: dict[bytes, int]
    validation: dict[bytes, int]
    notes: tuple[str, ...]


# --- from a config to files -----------------------------------------------------------------------


def find_source(domain: DomainConfig, index: int, corpus: Corpus, max_bytes: int | None) -> Source:
    """The files of a domain, fetched where needed.

    Raises:
        DomainUnavailable: if it has to be fetched and cannot be.
        DataError: if local files are missing.
    """
    setting = f"data.domains.{index}"
    files: tuple[Path, ...]
    if domain.corpus:
        files, field = (corpus.documents(domain.corpus),), "text"
        setting += f".corpus ({domain.corpus})"
    elif domain.hub:
        setting += f".hub ({domain.hub})"
        files, field = (_fetch_hub(domain, setting, corpus, max_bytes),), "text"
    else:
        files, field = _find_files(domain, f"{setting}.files"), domain.text_field
        setting += f" ({domain.name})"
    content = key_of(_READER_VERSION, field, [(_kind(file), file_sha256(file)) for file in files])
    return Source(domain.name, setting, files, field, content)


def _find_files(domain: DomainConfig, setting: str) -> tuple[Path, ...]:
    patterns = (domain.files,) if isinstance(domain.files, str) else domain.files or ()
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        files = [Path(match) for match in sorted(matches) if Path(match).is_file()]
        if not files:
            folder = " names a folder: add /**/*.txt" if matches else " matches no file"
            raise DataError(
                f"{setting} ({pattern}){folder}; needs the path of a file or a pattern, as seen "
                f"from {Path.cwd()}"
            )
        found |= dict.fromkeys(files)
    return tuple(found)


def _fetch_hub(domain: DomainConfig, setting: str, corpus: Corpus, max_bytes: int | None) -> Path:
    """Texts of a Hub data set in a local file. With a cap only that much is read, through a shuffle
    buffer: the sample is as fair as reading a part of the data allows."""
    import pyarrow
    import pyarrow.parquet

    key = key_of(domain.hub, domain.subset, domain.split, domain.text_field, max_bytes)
    entry = corpus.cache_dir / "hub" / f"{domain.name}-{key[:16]}"
    file = entry / "documents.parquet"
    if read_entry(entry) is not None:
        return file
    limit = max_bytes or float("inf")
    num_bytes, texts = 0, []
    try:
        datasets = _datasets()
        cache = str(corpus.cache_dir / "datasets")
        rows = datasets.load_dataset(
            domain.hub, domain.subset, split=domain.split, streaming=True, cache_dir=cache
        )
        if max_bytes:
            rows = rows.shuffle(seed=0, buffer_size=1000)
        bar = tqdm(rows, f"fetch {domain.name}", disable=None if corpus.progress else True)
        for row in bar:
            texts.append(row[domain.text_field])
            num_bytes += len(texts[-1].encode())
            if num_bytes >= limit:
                break
    except KeyError as error:
        raise DataError(f"{setting} has no column {error}; set text_field to one it has") from error
    # Hub errors come from a dozen libraries; all of them mean that the data cannot be had now.
    except Exception as error:
        raise DomainUnavailable(
            f"{setting} cannot be read: {_first_line(error)}; check the name and the network, or "
            f"give local files"
        ) from error
    with new_entry(entry) as (folder, facts):
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / file.name, compression="zstd")
        facts |= {"source": domain.hub, "bytes": num_bytes, "documents": len(texts)}
    return file


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
    plain = [file for file in source.files if _kind(file) == "text"]
    # Text cannot be malformed, so its files are read together, which is quicker for thousands of
    # them; the others one by one, so that a message can name the file.
    for files in ([plain] if plain else []) + [[f] for f in source.files if f not in set(plain)]:
        kind = _kind(files[0])
        options: dict[str, Any] = {"encoding_errors": "replace"}
        if kind == "text":
            options["sample_by"] = "document"
        if kind == "parquet":
            options = {"columns": [source.text_field]}
        named = str(files[0]) if len(files) == 1 else f"one of {len(files)} text files"
        try:
            rows = _datasets().load_dataset(
                kind,
                data_files=[str(file) for file in files],
                split="train",
                streaming=True,
                cache_dir=str(cache_dir / "datasets"),
                **options,
            )
            field = "text" if kind == "text" else source.text_field
            for batch in rows.with_format("arrow").iter(batch_size=_READ_BATCH):
                if field not in batch.column_names:
                    raise DataError(
                        f"{source.setting}: {named} has no column {field}; it has "
                        f"{', '.join(batch.column_names)}: set text_field to one of them"
                    )
                for text in batch.column(field).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise DataError(
                            f"{source.setting}: column {field} of {named} holds "
                            f"{type(text).__name__}, needs text"
                        )
                    yield text or ""
        except DataError:
            raise
        # Parquet, JSON and gzip each raise their own errors for a damaged file.
        except Exception as error:
            raise DataError(
                f"{source.setting}: {named} cannot be read ({_first_line(error)}); repair it or "
                f"leave it out"
            ) from error


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


def _kind(file: Path) -> str:
    ending = [suffix for suffix in file.suffixes if suffix != ".gz"][-1:]
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
    return kinds.get(ending[0].lower(), "text") if ending else "text"


def _datasets() -> Any:
    """The library, imported late: it takes a second, and reading a config does not need it."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = str(cause).splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


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
            f"{source.setting} holds no text: {len(source.files)} files, {empty} empty documents; "
            f"give files with text or remove the domain"
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
    if _kind(file) == "parquet" or file.suffix == ".gz":
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
