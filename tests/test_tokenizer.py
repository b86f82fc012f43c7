"""Does text survive tokenisation, and is a broken tokenizer one clear line?"""

import json
import os

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from train.errors import DataError
from train.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    TokenizerConfig,
    load_tokenizer,
    tokenizer_for,
    train_bpe,
)

TEXTS = [
    "대한민국 국민 여러분, 안녕하십니까?\n\t들여쓰기",
    "def f(x):\n\treturn  x + 1\r\n\r\n",
    "  spaces   at both ends  ",
    "emoji 🧪 and a lone combining mark \u0301, null \x00, \ufffd",
    f"a text that writes {END_OF_TEXT} and <|pad|> out",
    "",
]
SENTENCE = "the router sends a token to the experts that the router likes best"


def _sample():
    yield from TEXTS
    for index in range(400):
        yield f"{SENTENCE[index % 7 :]} word{index % 90}"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(_sample(), 400, progress=False)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_unchanged(kind, text, bpe):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    # A special token written out in a text is text.
    assert not {tokenizer.end_of_text, tokenizer.pad} & set(ids)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_batch_gives_what_single_texts_give(kind, bpe):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [
        tokenizer.encode(text) for text in TEXTS
    ]


def test_decode_leaves_special_tokens_out(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = [tokenizer.pad, *tokenizer.encode("hi"), tokenizer.end_of_text]
        assert tokenizer.decode(ids) == "hi"


def test_training_gives_the_vocabulary_asked_for_and_the_same_one_twice(bpe):
    assert bpe.vocab_size == 400
    assert train_bpe(_sample(), 400, progress=False).sha256 == bpe.sha256
    assert len(bpe.encode(SENTENCE)) < len(SENTENCE) / 3


def _get(tmp_path, key="text", vocab_size=300, sample=_sample):
    config = TokenizerConfig(vocab_size=vocab_size)
    return tokenizer_for(config, tmp_path, key, sample, progress=False)


def _never():
    raise AssertionError("trained again")


def test_the_trained_tokenizer_is_cached_by_text_and_settings(tmp_path):
    first = _get(tmp_path)
    assert _get(tmp_path, sample=_never).sha256 == first.sha256
    with pytest.raises(AssertionError, match="trained again"):
        _get(tmp_path, key="other text", sample=_never)
    with pytest.raises(AssertionError, match="trained again"):
        _get(tmp_path, vocab_size=310, sample=_never)


def test_a_damaged_cached_tokenizer_is_trained_again(tmp_path, caplog):
    first = _get(tmp_path)
    (file,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    file.write_text(file.read_text(encoding="utf-8").replace("router", "rooter"), encoding="utf-8")
    assert _get(tmp_path).sha256 == first.sha256
    assert "is damaged" in caplog.text


def _write_tokenizer(path, end="</s>"):
    tokenizer = LibraryTokenizer(models.WordLevel({"hello": 0, "[UNK]": 1, end: 9}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(max_length=2)
    tokenizer.save(str(path))
    return path


def test_any_tokenizer_json_can_be_used(tmp_path):
    path = _write_tokenizer(tmp_path / "tokenizer.json")
    config = TokenizerConfig(file=str(path))
    tokenizer = tokenizer_for(config, tmp_path, None, _never, progress=False)
    # Ids have gaps in this file, and a length limit that is for its own users.
    assert tokenizer.vocab_size == 10 and tokenizer.end_of_text == 9 and tokenizer.pad == 9
    assert tokenizer.encode("hello hello hello") == [0, 0, 0]


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>"}])
def test_the_config_beside_a_tokenizer_names_its_end_of_text(tmp_path, eos):
    path = _write_tokenizer(tmp_path / "tokenizer.json", end="<stop>")
    with pytest.raises(DataError, match="no token that ends a text"):
        load_tokenizer(path)
    config = {"eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_tokenizer(path).end_of_text == 9


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path, bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0"', b"\xff\xfe\x00", b"[]", None])
def test_a_broken_tokenizer_file_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert "\n" not in message and f"tokenizer.file ({path})" in message


def test_a_pipe_for_a_tokenizer_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer\.file .*no regular file"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_null_vocab_size_is_the_default():
    assert TokenizerConfig(kind="bytes", vocab_size=None) == TokenizerConfig(kind="bytes")
    assert TokenizerConfig(vocab_size=None).vocab_size == TokenizerConfig().vocab_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "bytes", "file": "x.json"},
            r"tokenizer\.file \(x\.json\) has no effect with tokenizer\.kind: bytes; leave",
        ),
        (
            {"kind": "bytes", "vocab_size": 512},
            r"tokenizer\.vocab_size \(512\) has no effect with tokenizer\.kind: bytes; .* null",
        ),
        (
            {"file": "x.json", "vocab_size": 512},
            r"tokenizer\.vocab_size \(512\) has no effect with tokenizer\.file",
        ),
        ({"file": ""}, "at least 1 character"),
        ({"vocab_size": 100}, "258"),
        ({"vocabulary": 512}, "vocabulary"),
    ],
)
def test_a_setting_without_effect_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(**settings)
