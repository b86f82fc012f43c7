"""Where are the documents of a domain? From the config of a domain to files on disk.

A source is a list of text, JSON-lines or Parquet files. The default corpus and Hub data sets become
such files first, so that everything after this reads files only.
"""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from tqdm import tqdm

from moe.config import Real, Section
from train.corpus import DOMAINS, Corpus, DomainUnavailable
from train.errors import ConfigError, DataError
from train.readers import (
    Census,
    Source,
    check_file,
    file_kind,
    first_line,
    hf_datasets,
    no_column,
)
from train.store import disk_is_full, file_sha256, key_of, new_entry, read_entry

# Changes when the same files would give other documents: part of the cache's keys.
_READER_VERSION = 2

# A pattern that finds one file more often than this runs in circles through links.
_MOST_WAYS_TO_A_FILE = 100
# Rows of a Hub data set after which one without text is given up.
_HUB_TRIAL_ROWS = 1000


def _domain_name(value: str) -> str:
    """A name that can be part of a file's."""
    if not value or len(value) > 100 or not set(value) <= _NAME_CHARACTERS:
        raise ValueError("needs 1 to 100 of the characters A-Z, a-z, 0-9, _, . and -")
    return value


_NAME_CHARACTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


def _path_text(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("needs a path: text that is not empty and has no NUL")
    return value


PathText = Annotated[str, AfterValidator(_path_text)]
# Told apart before they are validated: a mistake in a list is not reported as "no text" as well.
_Paths = Annotated[
    Annotated[PathText, Tag("text")] | Annotated[tuple[PathText, ...], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "text"),
]


class DomainConfig(Section):
    """One part of the mixture: a name, a share of the tokens, and exactly one source.

    weight: share of the tokens, relative to the other domains. corpus: a name of the default
    corpus, and then `name` may be left out. files: paths or patterns; .parquet, .json and .jsonl by
    their ending, everything else is text with one document a file; .gz is unpacked. hub: a Hub data
    set.
    text_field: the column of the text in JSON, Parquet and Hub data. invalid_utf8: what a byte that
    is not UTF-8 does in text and JSON files, `stop` the run or `replace` it by U+FFFD.
    """

    name: Annotated[str, AfterValidator(_domain_name)]
    weight: Real = Field(default=1.0, gt=0, le=1e6)
    corpus: str | None = None
    files: _Paths | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    invalid_utf8: Literal["stop", "replace"] = "stop"

    @model_validator(mode="before")
    @classmethod
    def _name_from_corpus(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" not in value and value.get("corpus"):
            return {**value, "name": value["corpus"]}
        return value

    def problems(self, setting: str) -> Iterator[str]:
        """One line for each thing that makes no sense; `setting` is the dotted path of this."""
        given = [key for key in ("corpus", "files", "hub") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            yield (
                f"{setting} ({self.name}) needs exactly one source of corpus, files and hub; "
                f"found {found}"
            )
            return
        if self.corpus and self.corpus not in DOMAINS:
            yield f"{setting}.corpus ({self.corpus}) must be one of {', '.join(DOMAINS)}"
        useless = {
            "subset": self.hub is None,
            "split": self.hub is None,
            "text_field": self.corpus is not None,
            "invalid_utf8": self.files is None,
        }
        for key, has_no_effect in useless.items():
            value = getattr(self, key)
            if has_no_effect and value != type(self).model_fields[key].default:
                yield f"{setting}.{key} ({value}) has no effect with {given[0]}; leave it out"


def find_source(domain: DomainConfig, index: int, corpus: Corpus, max_bytes: int | None) -> Source:
    """The files of a domain, fetched where needed.

    Raises:
        DomainUnavailable: if it has to be fetched and cannot be.
        DataError: if local files are missing.
    """
    setting = f"data.domains.{index}"
    files: tuple[Path, ...]
    field = "text"
    notes: tuple[str, ...] = ()
    if domain.corpus:
        files = (corpus.documents(domain.corpus),)
    elif domain.hub:
        file, notes = _fetch_hub(domain, setting, corpus, max_bytes)
        files = (file,)
    else:
        files, field = find_files(domain, setting), domain.text_field
    hashes = [(file_kind(file), _sha256_of(file, f"{setting} ({domain.name})")) for file in files]
    content = key_of(_READER_VERSION, field, domain.invalid_utf8, hashes)
    return Source(
        domain.name,
        setting,
        files,
        field,
        content,
        corpus.cache_dir,
        domain.invalid_utf8,
        notes,
    )


def check_local(domain: DomainConfig, setting: str, cache_dir: Path) -> None:
    """Look whether a domain's local files are there and begin as what they are by their names.

    Raises:
        DataError: if one is not, or if all are empty.
        ConfigError: if a setting has no effect on such files.
    """
    files = find_files(domain, setting)
    source = Source(
        domain.name, setting, files, domain.text_field, "", cache_dir, domain.invalid_utf8
    )
    # Every file is looked at, not only those before the first that holds something.
    full = [file for file in files if check_file(source, file)]
    if not full:
        raise DataError(
            f"{source} holds no text: {len(files)} files, all empty; give files with text or "
            f"remove the domain"
        )


def _sha256_of(file: Path, source: str) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise DataError(
            f"{source}: {file} cannot be read ({error.strerror}); give a file that can, or leave "
            f"it out"
        ) from error


def find_files(domain: DomainConfig, setting: str) -> tuple[Path, ...]:
    """The files that the patterns of a domain name, each once, found without opening any.

    Raises:
        DataError: if a pattern names no regular file.
        ConfigError: if a setting has no effect on such files.
    """
    patterns = (domain.files,) if isinstance(domain.files, str) else domain.files or ()
    found: dict[str, Path] = {}
    for pattern in patterns:
        what = f"{setting}.files ({pattern})"
        # By its real path, since a file may be reached through links as well.
        for match in _matches(os.path.expanduser(pattern), what):
            found.setdefault(os.path.realpath(match), Path(match))
    files = tuple(found.values())
    kinds = {file_kind(file) for file in files}
    for key, others in {"text_field": {"text"}, "invalid_utf8": {"parquet"}}.items():
        value = getattr(domain, key)
        if kinds <= others and value != DomainConfig.model_fields[key].default:
            raise ConfigError(
                f"{setting}.{key} ({value}) has no effect with {kinds.pop()} files such as "
                f"{files[0].name}; leave it out"
            )
    return files


def _matches(pattern: str, setting: str) -> list[str]:
    """The regular files that a path or a pattern names, sorted.

    Raises:
        DataError: if there is none.
    """
    # A name that exists is meant as it stands, brackets and all.
    matches = [pattern] if os.path.lexists(pattern) else glob.iglob(pattern, recursive=True)
    files, other = [], None
    ways: Counter[str] = Counter()
    for match in matches:
        if os.path.isfile(match):
            files.append(match)
            real = os.path.realpath(match)
            ways[real] += 1
            if ways[real] > _MOST_WAYS_TO_A_FILE:
                raise DataError(
                    f"{setting} finds {real} in over {_MOST_WAYS_TO_A_FILE} ways: links between "
                    f"its folders run in circles; remove them, or name the folders one by one"
                )
        else:
            other = match
    if not files:
        what = "matches no file" if other is None else _not_a_file(other)
        raise DataError(
            f"{setting} {what}; needs the path of a file or a pattern, as seen from {Path.cwd()}"
        )
    return sorted(files)


def _not_a_file(path: str) -> str:
    """What a path is that is no regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "names a folder: add /**/*.txt"
    kinds = {
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    kind = next((name for test, name in kinds.items() if test(mode)), "a special file")
    return f"names {kind}: files are read more than once, so write its text to one"


def _fetch_hub(
    domain: DomainConfig, setting: str, corpus: Corpus, max_bytes: int | None
) -> tuple[Path, tuple[str, ...]]:
    """Texts of a Hub data set in a local file, and lines about rows that were left out. With a cap
    only that much is read, through a shuffle buffer: the sample is as fair as reading a part of
    the data allows."""
    import pyarrow
    import pyarrow.parquet

    key = key_of(domain.hub, domain.subset, domain.split, domain.text_field, max_bytes)
    entry = corpus.cache_dir / "hub" / f"{domain.name}-{key[:16]}"
    file = entry / "documents.parquet"
    if (manifest := read_entry(entry)) is not None:
        return file, tuple(manifest.get("notes", ()))
    where = f"{setting}.hub ({domain.hub})"
    try:
        texts, notes = _hub_texts(domain, setting, corpus, max_bytes)
    except (DataError, MemoryError):
        raise
    # Hub errors come from a dozen libraries; all of them mean that the data cannot be had now.
    except Exception as error:
        if disk_is_full(error):
            raise
        raise DomainUnavailable(
            f"{where} cannot be read: {first_line(error)}; check the name and the network, or "
            f"give local files"
        ) from error
    with new_entry(entry) as (folder, facts):
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(table, folder / file.name, compression="zstd")
        num_bytes = sum(len(text.encode()) for text in texts)
        facts |= {"source": domain.hub, "bytes": num_bytes, "documents": len(texts), "notes": notes}
    return file, tuple(notes)


def _hub_texts(
    domain: DomainConfig, setting: str, corpus: Corpus, max_bytes: int | None
) -> tuple[list[str], list[str]]:
    """The texts, and a line about the rows without one."""
    rows = hf_datasets().load_dataset(
        domain.hub,
        domain.subset,
        split=domain.split,
        streaming=True,
        cache_dir=str(corpus.cache_dir / "datasets"),
    )
    if max_bytes:
        rows = rows.shuffle(seed=0, buffer_size=1000)
    column = domain.text_field
    census = Census(f"{setting}.text_field", column, str(domain.hub))
    texts: list[str] = []
    num_bytes = 0
    bar = tqdm(rows, f"fetch {domain.name}", disable=None if corpus.progress else True)
    for number, row in enumerate(bar, 1):
        if column not in row:
            raise no_column(f"{setting}.text_field", column, str(domain.hub), row)
        text = census.text_of(row, f"row {number}")
        if text is not None:
            texts.append(text)
            num_bytes += len(text.encode())
        if max_bytes and num_bytes >= max_bytes:
            break
        if number == _HUB_TRIAL_ROWS:
            census.finish()
    note = census.finish()
    return texts, [f"{domain.name}: {note}"] if note else []
