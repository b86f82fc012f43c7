"""Is bad text, a missing domain or a full disk one clear line?"""

import errno
import io
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from data_cases import BYTES, prepare, write_texts
from pydantic import ValidationError

from train import sources, token_files
from train.data import DataConfig, describe, prepare_data
from train.errors import DataError, NoSpaceError


def _parquet_without_rows() -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"data\.domains\.0\.files \(.*none\.txt\) matches no file; needs"),
        ("empty.txt", b"", r"data\.domains\.0 \(d0\) holds no text.*1 empty"),
        ("empty.jsonl", b"", r"data\.domains\.0 \(d0\) holds no text"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', r"cut\.jsonl cannot be read.*JSON"),
        ("bad.parquet", b"PAR1 and no more", r"bad\.parquet cannot be read"),
        ("rows.parquet", _parquet_without_rows(), r"data\.domains\.0 \(d0\) holds no text"),
        ("bad.txt.gz", b"\x1f\x8b\x00", r"bad\.txt\.gz cannot be read"),
        ("body.jsonl", b'{"body": "a"}\n', r"no column text; it has body: set text_field"),
        ("number.jsonl", b'{"text": 1}\n', r"holds int, needs text"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_for_files_gets_advice(tmp_path):
    with pytest.raises(DataError, match=r"names a folder: add /\*\*/\*\.txt"):
        prepare(tmp_path, tmp_path)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    files = write_texts(tmp_path / "in", ["a", "b"])
    with pytest.raises(DataError, match=r"data\.cache_dir \(.*cache\) cannot be used"):
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


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"name": "a"}, "exactly one source of corpus, files and hub; found none"),
        ({"name": "a", "corpus": "cpp", "files": "x"}, "found corpus and files"),
        ({"corpus": "pyton"}, r"corpus \(pyton\) must be one of python"),
        ({"name": "a", "files": "x", "subset": "b"}, "subset and split have no effect"),
        ({"corpus": "cpp", "text_field": "b"}, "text_field has no effect"),
        ({"corpus": "cpp", "weight": 0}, "greater than 0"),
        ({"name": "a/b", "files": "x"}, "pattern"),
    ],
)
def test_a_domain_that_makes_no_sense_is_refused(domain, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(domains=[domain])


def test_two_domains_of_one_name_are_refused():
    with pytest.raises(ValidationError, match="two of the name cpp"):
        DataConfig(domains=[{"corpus": "cpp"}, {"corpus": "cpp"}])
