"""Is bad text, a missing domain or a full disk one clear line?"""

import errno
import gzip
import io
import os
import random
import re
from functools import partial
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from data_cases import BYTES, all_documents, prepare, write_texts

from train import data as data_module
from train import sources, token_files
from train.config import config_from_dict
from train.corpus import DOMAINS
from train.data import DataConfig, check_sources, describe, prepare_data
from train.errors import ConfigError, DataError, NoSpaceError
from train.tokenizer import TokenizerConfig


def _parquet(values: list, kind: pyarrow.DataType | None = None, name: str = "text") -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, kind)}), buffer)
    return buffer.getvalue()


# What the message begins with; after it comes the path.
_D0 = r"^data\.domains\.0 \(d0\): .*"
_FIELD = r"^data\.domains\.0\.text_field \(text\): .*"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"^data\.domains\.0\.files \(.*none\.txt\) matches no file; needs"),
        ("empty.txt", b"", r"^data\.domains\.0 \(d0\) holds no text: 1 files"),
        ("blank.txt", b" \n", r"^data\.domains\.0 \(d0\) holds no text: 1 files with 1 empty"),
        ("empty.jsonl", b"", r"^data\.domains\.0 \(d0\) holds no text"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', _D0 + r"cut\.jsonl, line 2, .* as JSON"),
        ("deep.jsonl", b"[" * 100_000, _D0 + r"deep\.jsonl, from line 1 on, .* as JSON"),
        ("bad.parquet", b"PAR1 and no more", _D0 + r"bad\.parquet cannot be read"),
        ("rows.parquet", _parquet([], pyarrow.string()), r"^data\.domains\.0 \(d0\) holds no text"),
        ("bad.txt.gz", b"\x1f\x8b\x00", _D0 + r"bad\.txt\.gz cannot be read"),
        (
            "cut.txt.gz",
            gzip.compress(b"text" * 99, mtime=0)[:-9],
            _D0 + r"cut\.txt\.gz cannot be read",
        ),
        ("body.jsonl", b'{"body": "a"}\n', _FIELD + "no column text; it has body: set it to one"),
        ("body.parquet", _parquet(["a"], name="body"), _FIELD + "no column text; it has body: set"),
        (
            "number.jsonl",
            b'{"text": 1}\n',
            _FIELD + r"only 0 hold text.* 1 with a number \(first: ",
        ),
        ("number.parquet", _parquet([1]), _FIELD + r"1 with a number \(first: row 1\)"),
        ("bytes.parquet", _parquet([b"a"]), _FIELD + r"1 with bytes \(first: row 1\)"),
        (
            "null.jsonl",
            b'{"text": null, "b": 1}\n' * 3,
            _FIELD + r"3 with nothing .*others are b\)",
        ),
        ("null.parquet", _parquet(["a", None, None]), _FIELD + r"of 3 rows .* only 1 hold text"),
        (
            "mixed.jsonl",
            b'{"text": "a"}\n{"text": [1]}\n\n{"text": true}\n',
            _FIELD
            + r"1 with a list \(first: line 2\), 1 with true or false \(first: line 4\); needs",
        ),
        ("items.jsonl", b'"text"\n1\n', _FIELD + r"2 with no columns \(first: line 1\)"),
        (
            "half.jsonl",
            b'{"text": "\\ud800"}\n',
            _D0 + r"half of a surrogate .*invalid_utf8: replace",
        ),
        (
            "latin.txt",
            b"some text \n" * 100_000 + b"caf\xe9",
            _D0 + r"latin\.txt is not UTF-8 text \(byte 0xe9 at position 1100003\); convert it or "
            r"leave it out, or set data\.domains\.0\.invalid_utf8: replace$",
        ),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', _D0 + r"byte 0xe9 at position 13"),
        ("latin.txt.gz", gzip.compress(b"caf\xe9", mtime=0), _D0 + r"byte 0xe9 at position 3"),
        ("cut.txt", "é".encode()[:1], _D0 + r"byte 0xc3 at position 0"),
        ("null.txt", b"text\0", _D0 + r"a NUL byte at position 4"),
        ("wide.txt", "text".encode("utf-16"), _D0 + r"looks like UTF-16\); convert it or leave it"),
        (
            "packed.txt",
            gzip.compress(b"text", mtime=0),
            _D0 + r"looks like gzip \(the name has to end in \.gz",
        ),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, tmp_path / name)
    assert "\n" not in str(caught.value)
    # A domain without text is not one file's fault.
    assert name in str(caught.value) or "holds no text" in message


def test_a_file_that_is_mostly_broken_is_refused_even_with_replacement(tmp_path):
    (tmp_path / "noise.txt").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(
        DataError, match=r"noise\.txt is not UTF-8 text \(\d+ of \d+ characters are"
    ):
        prepare(tmp_path, tmp_path / "noise.txt", invalid_utf8="replace")


def test_a_bad_row_late_in_one_of_many_files_is_found(tmp_path):
    files = write_texts(tmp_path / "in", [f"text {i}" for i in range(30)])
    files[17].write_bytes(b"text \xff")
    with pytest.raises(DataError, match=r"0017\.txt is not UTF-8 text \(byte 0xff at position 5\)"):
        prepare(tmp_path, files)


def test_a_folder_for_files_gets_advice(tmp_path):
    with pytest.raises(DataError, match=r"names a folder: add /\*\*/\*\.txt"):
        prepare(tmp_path, tmp_path)


def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "lost.txt").symlink_to("nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    for path, message in {
        "/dev/null": r"data\.domains\.0\.files \(/dev/null\) names a device",
        tmp_path / "pipe.txt": "names a pipe: files are read more than once",
        tmp_path / "pip*.txt": "names a pipe",
        tmp_path / "lost.txt": "cannot be opened .No such file",
        tmp_path / "round.txt": "cannot be opened .Too many levels of symbolic links",
        "~no_such_user/a.txt": "matches no file",
        "x" * 5000: "matches no file",
    }.items():
        with pytest.raises(DataError, match=message):
            prepare(tmp_path, path)


@pytest.mark.parametrize("name", ["a::b/c.txt", "a::b.jsonl", "a::b.parquet"])
def test_a_path_with_two_colons_has_to_be_renamed(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(_parquet(["a", "b"]) if name.endswith("t") else b"[]")
    with pytest.raises(DataError, match=_D0 + ".* has :: in its path.*; rename the file or its"):
        prepare(tmp_path, path)


def test_links_in_circles_end_in_a_message(tmp_path):
    write_texts(tmp_path / "in", ["text"])
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(".")
    with pytest.raises(
        DataError, match=r"data\.domains\.0\.files .* links between its folders run"
    ):
        prepare(tmp_path, tmp_path / "in" / "**" / "*.txt")


@pytest.mark.parametrize(
    ("setting", "name", "kind"),
    [("text_field", "a.txt", "text"), ("invalid_utf8", "a.parquet", "parquet")],
)
def test_a_setting_without_effect_on_the_files_is_refused(tmp_path, setting, name, kind):
    (tmp_path / name).write_bytes(_parquet(["a", "b"]) if kind == "parquet" else b"text")
    domain = {"name": "a", "files": str(tmp_path / name), setting: "replace"}
    config = DataConfig(cache_dir=str(tmp_path / "cache"), domains=[domain])
    message = (
        rf"^data\.domains\.0\.{setting} \(replace\) has no effect with {kind} files such as {name}"
    )
    for attempt in (check_sources, partial(prepare_data, progress=False)):
        with pytest.raises(ConfigError, match=message):
            attempt(config, BYTES)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    files = write_texts(tmp_path / "in", ["a", "b"])
    with pytest.raises(DataError, match=r"data\.cache_dir \(.*cache\) cannot be used"):
        prepare(tmp_path, files)


@pytest.mark.parametrize(
    ("path", "code", "error", "message"),
    [
        (
            "in/0000.txt",
            errno.EACCES,
            DataError,
            r"^data\.domains\.0 \(d0\): .*0000\.txt cannot be re",
        ),
        ("cache/tokens", errno.EROFS, DataError, r"^data\.cache_dir \(.*cache/tokens: Read-only"),
        (
            "lib/x.py",
            errno.EACCES,
            DataError,
            r"^\S*/lib/x\.py cannot be used for the data: Permission",
        ),
        ("cache/tokens", errno.EDQUOT, NoSpaceError, r"^data\.cache_dir .*no space"),
    ],
)
def test_an_error_of_the_system_is_blamed_on_what_failed(
    tmp_path, monkeypatch, path, code, error, message
):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code), str(tmp_path / path))

    where = (sources, "file_sha256") if path.startswith("in/") else (data_module, "write_tokens")
    monkeypatch.setattr(*where, fail)
    with pytest.raises(error, match=message):
        prepare(tmp_path, write_texts(tmp_path / "in", ["a", "b"]))


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    files = write_texts(tmp_path / "in", ["a", "b", "c"])
    write = data_module.write_tokens

    def change(*arguments, **options):
        files[1].write_text("other", encoding="utf-8")
        write(*arguments, **options)

    monkeypatch.setattr(data_module, "write_tokens", change)
    with pytest.raises(DataError, match="1 of 3 documents were changed while they were read"):
        prepare(tmp_path, files)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_file_that_vanishes_while_it_is_needed_is_one_line(tmp_path, monkeypatch):
    files = write_texts(tmp_path / "in", ["a", "b", "c"])
    write = data_module.write_tokens

    def vanish(*arguments, **options):
        files[1].unlink()
        write(*arguments, **options)

    monkeypatch.setattr(data_module, "write_tokens", vanish)
    with pytest.raises(DataError, match=r"data\.domains\.0 \(d0\): .*cannot be read .*0001\.txt"):
        prepare(tmp_path, files)


def test_a_full_disk_leaves_no_token_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_files, "_write_batch", full)
    with pytest.raises(NoSpaceError, match=r"data\.cache_dir"):
        prepare(tmp_path, write_texts(tmp_path / "in", ["a", "b"]))
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_domain_that_cannot_be_fetched_is_skipped_or_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    domains = [
        {"name": "far", "hub": "nobody/nothing", "weight": 3},
        {"name": "near", "files": str(tmp_path / "a.txt")},
    ]
    config = DataConfig(cache_dir=str(tmp_path / "cache"), domains=domains)
    data = prepare_data(config, BYTES, progress=False)
    assert data.domain_names == ("near",) and data.weights == (1.0,)
    assert "skipped domain far: data.domains.0.hub (nobody/nothing)" in data.skipped[0]
    assert data.skipped[0] in describe(data)
    with pytest.raises(DataError, match="nobody/nothing"):
        prepare_data(config.model_copy(update={"skip_missing": False}), BYTES, progress=False)
    alone = config.model_copy(update={"domains": config.domains[:1]})
    with pytest.raises(DataError, match=r"none of data\.domains could be had"):
        prepare_data(alone, BYTES, progress=False)


def test_a_hub_data_set_is_read_up_to_the_cap_and_kept(tmp_path, monkeypatch):
    read = []

    class Rows:
        def shuffle(self, seed, buffer_size):
            return self

        def __iter__(self):
            for index in range(10_000):
                read.append(index)
                yield {"body": f"row {index:05d}"}

    library = SimpleNamespace(load_dataset=lambda *a, **k: Rows())
    domain = {"name": "hub", "hub": "some/set", "subset": "x", "text_field": "body"}
    config = DataConfig(
        cache_dir=str(tmp_path), domains=[domain], max_bytes_per_domain=1000
    ).domains[0]
    corpus = SimpleNamespace(cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(sources, "hf_datasets", lambda: library)
    source = sources.find_source(config, 0, corpus, 1000)
    # 1,000 bytes in rows of 9.
    assert len(read) == 112
    assert pyarrow.parquet.read_table(source.files[0])["text"].to_pylist()[0] == "row 00000"
    assert sources.find_source(config, 0, corpus, 1000) == source and len(read) == 112


class HubRows(list):
    """Stands in for a data set of the Hub."""

    def shuffle(self, seed, buffer_size):
        return self


def _hub(tmp_path, monkeypatch, rows: list, **settings):
    library = SimpleNamespace(load_dataset=lambda *a, **k: HubRows(rows))
    monkeypatch.setattr(sources, "hf_datasets", lambda: library)
    domain = {"name": "hub", "hub": "some/set", **settings}
    config = DataConfig(cache_dir=str(tmp_path), domains=[domain])
    return prepare_data(config, BYTES, progress=False)


def test_rows_of_a_hub_data_set_without_text_are_left_out_and_named(tmp_path, monkeypatch):
    rows = [{"body": "a", "id": 1}, {"body": None, "id": 2}, {"body": "b", "id": 3}]
    for _ in range(2):
        data = _hub(tmp_path, monkeypatch, rows, text_field="body")
        assert all_documents(data, "hub") == ["a", "b"]
        assert data.notes == (
            "hub: left out rows of some/set without text in body: 1 with nothing (first: row 2)",
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1}], "some/set has no column text; it has id: set it to one of them"),
        (
            [{"text": 3, "id": 1}] * 2000,
            r"of 1000 rows .*1000 with a number \(first: row 1\).* are id",
        ),
        ([{"text": None}], r"1 with nothing \(first: row 1\)"),
    ],
)
def test_a_hub_data_set_without_text_stops_the_run(tmp_path, monkeypatch, rows, message):
    with pytest.raises(DataError, match=r"^data\.domains\.0\.text_field \(text\): .*" + message):
        _hub(tmp_path, monkeypatch, rows)


def test_a_hub_data_set_without_rows_holds_no_text(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"data\.domains\.0 \(hub\) holds no text"):
        _hub(tmp_path, monkeypatch, [])


def test_a_disk_that_fills_up_during_a_fetch_is_no_missing_domain(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "hf_datasets", lambda: SimpleNamespace(load_dataset=full))
    domains = [{"name": "hub", "hub": "some/set"}, {"corpus": "python"}]
    config = DataConfig(cache_dir=str(tmp_path), domains=domains)
    with pytest.raises(NoSpaceError, match=r"data\.cache_dir"):
        prepare_data(config, BYTES, progress=False)


def _lines_of(**data) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"data": data}, "x.yaml")
    return str(caught.value).splitlines()


NAME_NEEDS = "needs 1 to 100 of the characters A-Z, a-z, 0-9, _, . and -"


@pytest.mark.parametrize(
    ("domain", "line"),
    [
        ({"name": "a"}, " (a) needs exactly one source of corpus, files and hub; found none"),
        (
            {"name": "a", "corpus": "cpp", "files": "x"},
            " (a) needs exactly one source of corpus, files and hub; found corpus and files",
        ),
        ({"corpus": "pyton"}, f".corpus (pyton) must be one of {', '.join(DOMAINS)}"),
        (
            {"name": "a", "files": "x", "subset": "b"},
            ".subset (b) has no effect with files; leave it out",
        ),
        (
            {"name": "a", "files": "x", "split": "b"},
            ".split (b) has no effect with files; leave it out",
        ),
        (
            {"corpus": "cpp", "text_field": "b"},
            ".text_field (b) has no effect with corpus; leave it out",
        ),
        (
            {"name": "a", "hub": "x/y", "invalid_utf8": "replace"},
            ".invalid_utf8 (replace) has no effect with hub; leave it out",
        ),
        ({"corpus": "cpp", "weight": 0}, ".weight: got 0; needs more than 0.0"),
        ({"corpus": "cpp", "weight": -1.5}, ".weight: got -1.5; needs more than 0.0"),
        ({"corpus": "cpp", "weight": float("nan")}, ".weight: got nan; needs a finite number"),
        ({"corpus": "cpp", "weight": 1e300}, ".weight: got 1e+300; needs at most 1000000.0"),
        ({"name": "a/b", "files": "x"}, f".name: got 'a/b'; {NAME_NEEDS}"),
        ({"name": "", "files": "x"}, f".name: got ''; {NAME_NEEDS}"),
        ({"name": "n" * 101, "files": "x"}, f".name: got '{'n' * 56}...; {NAME_NEEDS}"),
        ({"name": "a", "files": 3}, ".files: got 3; needs text (put it in quotes)"),
        ({"name": "a", "files": ["x", 3]}, ".files.1: got 3; needs text (put it in quotes)"),
        (
            {"name": "a", "files": ["x\0"]},
            ".files.0: got 'x\\x00'; needs a path: text that is not empty and has no NUL",
        ),
        (
            {"name": "a", "files": "x", "invalid_utf8": "skip"},
            ".invalid_utf8: got 'skip'; allowed: 'stop', 'replace'",
        ),
    ],
)
def test_a_domain_that_makes_no_sense_is_one_line_with_the_whole_setting(domain, line):
    # A sound domain before it, so that the number in the path counts.
    (found,) = _lines_of(domains=[{"corpus": "python"}, domain])
    assert re.sub(r"^(x\.yaml): data\.domains\.1", "", found) == line
    assert found.startswith("x.yaml: data.domains.1")


def test_every_domain_that_makes_no_sense_has_its_line():
    domains = [{"corpus": "cpp"}, {"corpus": "cpp"}, {"name": "a"}]
    assert _lines_of(domains=domains) == [
        "x.yaml: data.domains.1.name (cpp) is that of data.domains.0 too; rename one of them",
        "x.yaml: data.domains.2 (a) needs exactly one source of corpus, files and hub; found none",
    ]
    assert _lines_of(domains=[]) == ["x.yaml: data.domains (0) needs 1 to 4096 domains"]


# --- looking without reading ----------------------------------------------------------------------


def _check(tmp_path, *domains, tokenizer=BYTES, **settings):
    check_sources(DataConfig(cache_dir=str(tmp_path / "c"), domains=domains, **settings), tokenizer)


def test_sources_that_can_be_had_pass_and_nothing_is_written(tmp_path):
    (tmp_path / "a.parquet").write_bytes(_parquet(["a"]))
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    before = sorted(tmp_path.iterdir())
    _check(
        tmp_path,
        {"name": "a", "files": [str(tmp_path / "*.txt"), str(tmp_path / "a.parquet")]},
        {"corpus": "python"},
        # Only the network knows.
        {"corpus": "drama"},
        {"name": "far", "hub": "nobody/nothing"},
    )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "matches no file"),
        ("empty.txt", b"", "holds no text"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), "holds no text"),
        ("rows.parquet", _parquet([], pyarrow.string()), "holds no text"),
        ("latin.txt", b"caf\xe9", r"byte 0xe9 at position 3"),
        ("bad.parquet", b"PAR1 and no more", r"bad\.parquet cannot be read"),
        ("body.parquet", _parquet(["a"], name="body"), "has no column text; it has body"),
    ],
)
def test_the_look_finds_what_the_preparation_would(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _check(tmp_path, {"corpus": "python"}, {"name": "a", "files": str(tmp_path / name)})


def test_the_look_finds_a_missing_tokenizer_cache_or_domain(tmp_path, monkeypatch):
    python = {"corpus": "python"}
    absent = TokenizerConfig(file=str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match=r"tokenizer\.file \(.*absent\.json\) cannot be read"):
        _check(tmp_path, python, tokenizer=absent)
    (tmp_path / "c").touch()
    with pytest.raises(
        DataError, match=r"data\.cache_dir \(.*/c\) cannot be used: .*/c is no folder"
    ):
        _check(tmp_path, python)
    (tmp_path / "c").unlink()
    monkeypatch.setitem(DOMAINS, "python", DOMAINS["python"]._replace(root=lambda: None))
    with pytest.raises(DataError, match=r"none of data\.domains could be had: corpus python"):
        _check(tmp_path, python)
    _check(tmp_path, python, {"corpus": "cpp"})
    with pytest.raises(DataError, match="corpus python: this Python comes without"):
        _check(tmp_path, python, {"corpus": "cpp"}, skip_missing=False)


def test_a_mistake_in_the_last_domain_is_told_before_the_first_is_fetched(tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("fetched")

    monkeypatch.setattr(sources, "_fetch_hub", never)
    domains = [{"name": "far", "hub": "a/b"}, {"name": "near", "files": str(tmp_path / "no.txt")}]
    config = DataConfig(cache_dir=str(tmp_path / "cache"), domains=domains)
    with pytest.raises(DataError, match=r"data\.domains\.1\.files .* matches no file"):
        prepare_data(config, BYTES, progress=False)
