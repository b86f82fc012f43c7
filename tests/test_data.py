"""Which documents are read, on which side are they, and what is known about them?"""

import math
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_cases import BYTES, documents_of, equal, prepare, stream_of, write_texts

from train import data as data_module
from train import token_files
from train.corpus import DOMAINS, NO_DOWNLOAD_DOMAINS
from train.data import DataConfig, describe, prepare_data
from train.documents import select_documents
from train.sources import Source
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
    assert sorted("".join(train + validation).splitlines()) == sorted(text.splitlines())


def test_empty_repeated_and_broken_documents_are_counted_and_named(tmp_path):
    texts = ["one", "", " \n", "two", "one", "three"]
    files = write_texts(tmp_path / "in", texts)
    files[3].write_bytes(b"tw\xffo \xea\xb0")
    data = prepare(tmp_path, files)
    documents = documents_of(data, "d0", "train") + documents_of(data, "d0", "validation")
    assert sorted(documents) == ["one", "three", "tw\ufffdo \ufffd"]
    assert "d0: skipped 2 empty documents" in data.notes
    assert "d0: skipped 1 repeated documents" in data.notes
    assert f"d0: replaced invalid UTF-8 in 1 files: {files[3]}" in data.notes


def test_invalid_utf8_in_json_is_replaced_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xff"}\n{"text": "b"}\n')
    data = prepare(tmp_path, path)
    documents = documents_of(data, "d0", "train") + documents_of(data, "d0", "validation")
    assert sorted(documents) == ["a\ufffd", "b"]
    assert f"d0: replaced invalid UTF-8 in 1 files: {path}" in data.notes


def test_a_name_with_brackets_is_a_name(tmp_path):
    path = tmp_path / "a[1].txt"
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
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "a", None]}), path)
    source = Source("s", "data.domains.0", (path,), "text", "0")
    selection = select_documents(source, tmp_path, None, 0.5, progress=False)
    assert len(selection.train) == len(selection.validation) == 1
    assert set(selection.notes) == {
        "s: skipped 1 empty documents",
        "s: skipped 1 repeated documents",
    }
