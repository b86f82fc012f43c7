"""Where are the documents of a domain? From the config of a domain to files on disk.

A source is a list of text, JSON-lines or Parquet files. The default corpus and Hub data sets become
such files first, so that everything after this reads files only.
"""

import glob
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator
from tqdm import tqdm

from moe.config import Real, Section
from train.corpus import DOMAINS, Corpus, DomainUnavailable
from train.errors import DataError
from train.store import file_sha256, key_of, new_entry, read_entry

# Changes when the same files would give other documents: part of the cache's keys.
_READER_VERSION = 1


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
    content = key_of(
        _READER_VERSION, field, [(file_kind(file), file_sha256(file)) for file in files]
    )
    return Source(domain.name, setting, files, field, content)


def _find_files(domain: DomainConfig, setting: str) -> tuple[Path, ...]:
    patterns = (domain.files,) if isinstance(domain.files, str) else domain.files or ()
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        # A name that exists is meant as it stands, brackets and all.
        matches = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
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
        datasets = hf_datasets()
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
            f"{setting} cannot be read: {first_line(error)}; check the name and the network, or "
            f"give local files"
        ) from error
    with new_entry(entry) as (folder, facts):
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / file.name, compression="zstd")
        facts |= {"source": domain.hub, "bytes": num_bytes, "documents": len(texts)}
    return file


def file_kind(file: Path) -> str:
    """`parquet`, `json` or `text`: the `datasets` reader for a file, by its ending."""
    ending = [suffix for suffix in file.suffixes if suffix != ".gz"][-1:]
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
    return kinds.get(ending[0].lower(), "text") if ending else "text"


def hf_datasets() -> Any:
    """The library, imported late: it takes a second, and reading a config does not need it."""
    import datasets

    datasets.disable_progress_bars()
    # It logs what it also raises; the user gets one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def first_line(error: BaseException) -> str:
    """The cause of an error in one line."""
    cause = error.__cause__ or error
    lines = str(cause).splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
