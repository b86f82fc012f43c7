"""Which documents are read, on which side are they, and what is known about them?"""

import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_cases import BYTES, all_documents, documents_of, equal, prepare, stream_of, write_texts

from train import data as data_module
from train import readers, token_files
from train.corpus import DOMAINS, NO_DOWNLOAD_DOMAINS
from train.data import DataConfig, describe, prepare_data
from train.documents import select_documents
from train.readers import Source, read_files
from train.tokenizer import ByteTokenizer, TokenizerConfig

pytest_plugins = ["data_fixtures"]


def test_documents_come_back_byte_for_byte_from_each_tokenizer_of_one_cache(tmp_path):
    texts = [f"글 {i}: 한글\t탭과 <|endoftext|>\n  spaces 🧪 {i}\n" for i in range(40)]
    files = write_texts(tmp_path / "in", texts)
    for tokenizer in (BYTES, TokenizerConfig(vocab_size=300), TokenizerConfig(vocab_size=310)):
        data = prepare(tmp_path, files, tokenizer=tokenizer)
        train, validation = (documents_of(data, "d0", split) for split in token_files.SPLITS)
        assert train and validation
        assert sorted(train + validation) == sorted(texts)
        facts = [data.facts("d0", split) for split in token_files.SPLITS]
        assert [f["documents"] for f in facts] == [len(train), len(validation)]
        assert sum(f["bytes"] for f in facts) == sum(len(text.encode()) for text in texts)


def test_text_json_and_parquet_give_the_same_documents(tmp_path):
    texts = [f"document {i}\nwith a second line" for i in range(30)]
    plain = write_texts(tmp_path / "in", texts)
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"n": {i}, "body": "document {i}\\nwith a second line"}}\n' for i in range(30)),
        encoding="utf-8",
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    domains = [
        {"name": "text", "files": str(plain[0].parent / "*.txt")},
        {"name": "json", "files": str(tmp_path / "a.jsonl"), "text_field": "body"},
        {"name": "parquet", "files": str(tmp_path / "a.parquet")},
    ]
    config = DataConfig(cache_dir=str(tmp_path / "cache"), domains=domains)
    data = prepare_data(config, BYTES, progress=False)
    for split in ("train", "validation"):
        documents = [sorted(documents_of(data, name, split)) for name in data.domain_names]
        assert documents[0] and documents[0] == documents[1] == documents[2]


def test_a_document_keeps_its_side_when_the_cap_changes(tmp_path):
    texts = [f"{i} " + "word " * (i % 50 + 20) for i in range(400)]
    files = write_texts(tmp_path / "in", texts)
    caps = [5_000, 20_000, None]
    data = [prepare(tmp_path, files, max_bytes_per_domain=cap) for cap in caps]
    for split in ("train", "validation"):
        small, middle, whole = (set(documents_of(part, "d0", split)) for part in data)
        assert small < middle < whole
    whole_train, whole_validation = (
        set(documents_of(data[2], "d0", s)) for s in token_files.SPLITS
    )
    assert whole_train | whole_validation == set(texts) and not whole_train & whole_validation
    # Binomial(400, 0.05) has mean 20 and deviation 4.4.
    assert 5 <= len(whole_validation) <= 40


def test_a_cap_takes_whole_documents_from_all_over_a_domain(tmp_path):
    texts = [f"{i:04d} " + "x" * 95 for i in range(1000)]
    data = prepare(tmp_path, write_texts(tmp_path / "in", texts), max_bytes_per_domain=20_000)
    documents = documents_of(data, "d0", "train") + documents_of(data, "d0", "validation")
    assert set(documents) <= set(texts)
    # Each side may be over by less than one document.
    assert 20_000 <= sum(map(len, documents)) < 20_000 + 2 * 100
    positions = [int(text[:4]) for text in documents]
    # The mean of 200 draws from 0 ... 999 has a deviation of 20.
    assert 400 < np.mean(positions) < 600


def test_the_order_of_files_changes_nothing_about_the_split(tmp_path):
    texts = [f"text {i}" for i in range(60)]
    first = prepare(tmp_path, write_texts(tmp_path / "a", texts))
    second = prepare(tmp_path, write_texts(tmp_path / "b", texts[::-1]))
    for split in token_files.SPLITS:
        one, other = (documents_of(data, "d0", split) for data in (first, second))
        assert one and set(one) == set(other)


def test_the_tokenizer_never_sees_validation_text(tmp_path, monkeypatch):
    texts = [f"text {i} " + "word " * i for i in range(60)]
    seen = []

    def spy(config, cache_dir, key, sample, *, progress):
        seen.extend(sample())
        return ByteTokenizer()

    monkeypatch.setattr(data_module, "tokenizer_for", spy)
    data = prepare(tmp_path, write_texts(tmp_path / "in", texts))
    assert sorted(seen) == sorted(documents_of(data, "d0", "train"))
    assert documents_of(data, "d0", "validation")


def test_the_tokenizer_sample_is_bounded_and_balanced(tmp_path, monkeypatch):
    seen = []

    def spy(config, cache_dir, key, sample, *, progress):
        seen.extend(sample())
        return ByteTokenizer()

    monkeypatch.setattr(data_module, "tokenizer_for", spy)
    monkeypatch.setattr(data_module, "_TOKENIZER_SAMPLE_BYTES", 4000)
    parts = [
        write_texts(tmp_path / name, [f"{name}{i:03d}" + "x" * 96 for i in range(count)])
        for name, count in (("a", 300), ("b", 60))
    ]
    prepare(tmp_path, *parts)
    assert Counter(text[0] for text in seen) == {"a": 20, "b": 20}


def test_one_big_text_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of a long file\n" for i in range(10_000))
    (tmp_path / "big.txt").write_text(text, encoding="utf-8")
    data = prepare(tmp_path, tmp_path / "big.txt")
    train, validation = (documents_of(data, "d0", split) for split in token_files.SPLITS)
    assert train and validation
    assert all(piece.endswith("\n") and len(piece) < 40_000 for piece in train + validation)
    # An empty file beside it does not make it two documents.
    (tmp_path / "empty.txt").touch()
    beside = prepare(tmp_path, [tmp_path / "big.txt", tmp_path / "empty.txt"])
    assert documents_of(beside, "d0", "validation") == validation
    assert sorted("".join(train + validation).splitlines()) == sorted(text.splitlines())


def test_empty_and_repeated_documents_are_counted_and_named(tmp_path):
    files = write_texts(tmp_path / "in", ["one", "", " \n", "two", "one", "three"])
    data = prepare(tmp_path, files)
    assert all_documents(data) == ["one", "three", "two"]
    assert data.notes == ("d0: skipped 2 empty documents", "d0: skipped 1 repeated documents")


def test_invalid_utf8_is_replaced_and_named_where_the_config_allows_it(tmp_path):
    plain = write_texts(tmp_path / "in", ["one", "two words"])
    plain[1].write_bytes(b"two\xff words \xea\xb0")
    lines, packed = tmp_path / "a.jsonl", tmp_path / "a.txt.gz"
    lines.write_bytes(b'{"text": "a text \xff"}\n{"text": "half: \\ud800"}\n')
    packed.write_bytes(gzip.compress(b"caf\xe9 au lait"))
    for files, expected, broken in (
        (plain, ["one", "two\ufffd words \ufffd"], plain[1]),
        (lines, ["a text \ufffd", "half: \ufffd"], lines),
        (packed, ["caf\ufffd au lait"], packed),
    ):
        data = prepare(tmp_path, files, invalid_utf8="replace")
        assert all_documents(data) == expected
        assert f"d0: replaced invalid UTF-8 in 1 files: {broken}" in data.notes


def test_a_character_that_stands_for_a_broken_one_is_no_damage(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufffd\ufffd", encoding="utf-8")
    data = prepare(tmp_path, path, invalid_utf8="replace")
    assert all_documents(data) == ["\ufffd\ufffd"] and "replaced" not in "".join(data.notes)


def test_rows_without_text_are_left_out_and_named_as_what_they_are(tmp_path):
    rows = ["good", "also", None, 3, ["x"], "more", None, "rest", "last"]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": 1, "text": row}) for row in rows]
    path.write_text("\n".join([*lines, "", '{"id": 2}', '{"text": "end"}']), encoding="utf-8")
    data = prepare(tmp_path, path)
    assert all_documents(data) == ["also", "end", "good", "last", "more", "rest"]
    assert data.notes == (
        f"d0: left out rows of {path} without text in text: 3 with nothing (first: line 3), "
        "1 with a number (first: line 4), 1 with a list (first: line 5)",
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    (note,) = prepare(tmp_path, tmp_path / "a.parquet").notes
    assert note.endswith("1 with nothing (first: row 2)")


def test_text_that_begins_late_in_a_file_is_found(tmp_path):
    # A reader that takes the columns from the first rows would see none.
    rows = [{"id": i} for i in range(20)] + [{"text": f"text {i}"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert len(all_documents(prepare(tmp_path, tmp_path / "a.jsonl"))) == 30


def test_a_text_that_looks_like_a_time_or_a_number_stays_text(tmp_path):
    texts = ["2020-01-01 00:00:00", "2021-02-03", "12"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert all_documents(prepare(tmp_path, tmp_path / "a.jsonl")) == sorted(texts)


def test_a_json_file_may_be_one_list(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}, {"text": None}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    data = prepare(tmp_path, tmp_path / "a.json")
    assert all_documents(data) == ["a", "b"]
    assert data.notes[0].endswith("1 with nothing (first: entry 3)")


def test_line_ends_become_newlines_and_a_byte_order_mark_goes(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "a.txt").write_bytes(mark + b"a\r\nb\r\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(mark + b"c\r\nd"))
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "e\\r\\nf"}\r\n{"text": "g"}\r\n')
    data = prepare(tmp_path, [tmp_path / name for name in ("a.txt", "a.txt.gz", "a.jsonl")])
    assert all_documents(data) == ["a\nb\n", "c\nd", "e\r\nf", "g"]


def test_all_kinds_of_text_and_other_columns_of_parquet_are_read(tmp_path):
    string, number = pyarrow.string(), pyarrow.int32()
    kinds = [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(number, string)]
    others = pyarrow.array([[("a", 1)], None], pyarrow.map_(string, number))
    for index, kind in enumerate(kinds):
        columns = {"a.b": pyarrow.array([f"one {index}", f"two {index}"], kind), "other": others}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{index}.parquet")
    domain = {"name": "d0", "files": str(tmp_path / "*.parquet"), "text_field": "a.b"}
    config = DataConfig(cache_dir=str(tmp_path / "cache"), domains=[domain])
    data = prepare_data(config, BYTES, progress=False)
    assert all_documents(data) == [f"{word} {i}" for word in ("one", "two") for i in range(3)]


def test_the_files_of_a_domain_are_read_in_their_order_whatever_their_size(tmp_path, monkeypatch):
    texts = [f"{i} \ufeffé\u2028" + "long\r\n" * (i % 3 * 100) for i in range(20)]
    files = write_texts(tmp_path / "in", texts)
    packed = files[7].with_suffix(".txt.gz")
    packed.write_bytes(gzip.compress(texts[7].encode()))
    files[7] = packed
    source = Source("s", "data.domains.0", tuple(files), "text", "0", tmp_path / "cache")
    expected = [text.replace("\r\n", "\n") for text in texts]
    assert list(read_files(source)) == expected
    monkeypatch.setattr(readers, "_LARGEST_DATASETS_TEXT", 300)
    assert list(read_files(source)) == expected


def test_long_files_of_lines_are_read_as_python_reads_them(tmp_path):
    # More than one block of 10 million characters, with a line across its end.
    path = tmp_path / "a.jsonl"
    texts = [f"{i} é\u2028\x85 " + "x" * 9_993 for i in range(1500)]
    path.write_bytes("\r\n".join(json.dumps({"text": text}) for text in texts).encode())
    source = Source("s", "data.domains.0", (path,), "text", "0", tmp_path / "cache")
    assert list(read_files(source)) == texts


ALONE = """
import socket, sys
from pathlib import Path
from train.readers import Source, read_files

def never(*arguments, **options):
    raise AssertionError("network")

socket.socket.connect = socket.getaddrinfo = never
files = tuple(map(Path, sys.argv[2:]))
source = Source("s", "data.domains.0", files, "text", "0", Path(sys.argv[1]))
print(ascii(list(read_files(source))))
"""


def test_local_files_need_no_network_no_home_and_no_locale(tmp_path):
    texts = tmp_path / "a.txt"
    texts.write_text("text é", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("packed é".encode()))
    (tmp_path / "c.jsonl").write_text('{"text": "line é"}', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row é"]}), tmp_path / "d.parquet")
    files = sorted(str(path) for path in tmp_path.iterdir())
    home = tmp_path / "home"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # Without Python's own remedies this locale is ASCII.
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "cache"), *files],
        env={**environment, **ascii_only, "HOME": str(home), "XDG_CACHE_HOME": str(home)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == ascii(["text é", "packed é", "line é", "row é"])
    assert not home.exists()


def test_a_file_that_is_reached_twice_is_read_once(tmp_path):
    (path,) = write_texts(tmp_path / "in", ["text"])
    (tmp_path / "in" / "link.txt").symlink_to(path)
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    data = prepare(tmp_path, [tmp_path / "in" / "**" / "*.txt", path])
    assert all_documents(data) == ["text"]
    assert data.notes == ("d0: one short document only, all of it for training",)


@pytest.mark.parametrize(
    "name", ["a[1].txt", "http:b#?.txt", "한글 *.txt", "README.md", "a.jsonl.txt", ".hidden"]
)
def test_a_name_is_a_name_and_no_pattern_or_address(tmp_path, name):
    path = tmp_path / name
    path.write_text("text", encoding="utf-8")
    assert documents_of(prepare(tmp_path, path), "d0", "train") == ["text"]


def test_validation_batches_are_the_same_spread_set_every_time(tmp_path):
    texts = [f"{i} " + "x" * 30 for i in range(400)]
    files = write_texts(tmp_path / "in", texts)
    settings = {"validation_fraction": 0.5, "validation_tokens": 1000}
    data = prepare(tmp_path, files, **settings)
    stream = np.asarray(stream_of(data, "d0", "validation"))
    batches = list(data.validation_batches("d0", 4, 64))
    # 1,000 tokens are 15 sequences of 64: three batches of 4 and one of 3.
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(4, 64)] * 3 + [(3, 64)]
    assert all(map(equal, batches, data.validation_batches("d0", 4, 64)))
    rows = torch.cat([batch.input_ids for batch in batches]).numpy()
    chunks = stream[: (len(stream) - 1) // 64 * 64].reshape(-1, 64)
    found = [int(np.flatnonzero((chunks == row).all(axis=1))[0]) for row in rows]
    assert found == sorted(set(found)) and found[0] == 0
    assert max(np.diff([*found, len(chunks)])) <= len(chunks) / 15 + 1
    smaller = torch.cat([batch.input_ids for batch in data.validation_batches("d0", 7, 64)])
    assert np.array_equal(smaller.numpy(), rows)


def test_little_validation_text_gives_one_short_row_and_none_gives_nothing(tmp_path):
    data = prepare(tmp_path, write_texts(tmp_path / "in", ["hello", "world"]))
    (batch,) = data.validation_batches("d0", 4, 64)
    assert tuple(batch.input_ids.shape) == (1, 5)
    (tmp_path / "one.txt").write_text("alone", encoding="utf-8")
    alone = prepare(tmp_path, tmp_path / "one.txt")
    assert list(alone.validation_batches("d0", 4, 64)) == []
    assert math.isnan(alone.unigram_entropy("d0")) and math.isnan(alone.bytes_per_token("d0"))
    assert "d0: one short document only, all of it for training" in alone.notes


def test_unigram_entropy_and_bytes_per_token(corpus):
    for name in corpus.domain_names:
        tokens = np.asarray(stream_of(corpus, name, "validation")).tolist()
        counts = Counter(tokens)
        expected = -sum(c / len(tokens) * math.log(c / len(tokens)) for c in counts.values())
        assert corpus.unigram_entropy(name) == pytest.approx(expected, rel=1e-12)
        num_bytes = sum(len(text.encode()) for text in documents_of(corpus, name, "validation"))
        assert corpus.bytes_per_token(name) == pytest.approx(num_bytes / len(tokens), rel=1e-12)
        assert corpus.validation_tokens[name] == len(tokens)


def test_the_tier_without_downloads_is_as_big_as_asked(corpus):
    # Some distributions of Python come without its tests.
    present = tuple(name for name in NO_DOWNLOAD_DOMAINS if DOMAINS[name].root())
    assert corpus.domain_names == present and present[:3] == ("python", "cpp", "sympy")
    assert corpus.weights == (1 / len(present),) * len(present)
    assert len(corpus.skipped) == len(NO_DOWNLOAD_DOMAINS) - len(present)
    assert corpus.tokenizer.vocab_size == 512
    for name in corpus.domain_names:
        assert corpus.facts(name, "train")["bytes"] >= 190_000
        assert corpus.train_tokens[name] == len(corpus.train_stream(name)) > 40_000
        assert corpus.train_stream(name).dtype == np.uint16
        assert name in describe(corpus)


def test_a_big_vocabulary_takes_four_bytes():
    assert token_files.token_dtype(65_536) == np.uint16
    assert token_files.token_dtype(65_537) == np.uint32


def test_selection_counts_each_text_once(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "a", " "]}), path)
    source = Source("s", "data.domains.0", (path,), "text", "0", tmp_path / "cache")
    selection = select_documents(source, None, 0.5, progress=False)
    assert len(selection.train) == len(selection.validation) == 1
    assert set(selection.notes) == {
        "s: skipped 1 empty documents",
        "s: skipped 1 repeated documents",
    }
