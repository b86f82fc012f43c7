"""How does text become token ids, and back without loss?

A byte-level BPE trained on the run's own training text, any `tokenizer.json`, or plain bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from moe.config import Count, ModelConfig, Section
from train.errors import ConfigError, DataError
from train.run_directory import replace_file
from train.store import key_of, new_entry, read_entry

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# Names under which published tokenizers keep their end of text, tried in this order when no
# tokenizer_config.json beside the file says which one it is.
_KNOWN_ENDS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|im_end|>",
)
_DEFAULT_VOCAB_SIZE = 4096
_SMALLEST_VOCAB_SIZE = 258
# Changes when the same text and settings would train another tokenizer: part of the cache's keys.
_TRAINER_VERSION = 1


class TokenizerConfig(Section):
    """file: any tokenizer.json; without it a byte-level BPE of `vocab_size` is trained on the
    training text. kind `bytes`: the 256 bytes and two special tokens, nothing to train.

    vocab_size null is the default: what a command line says that changes the kind of a file which
    has a vocab_size."""

    file: Annotated[str, Field(min_length=1)] | None = None
    vocab_size: Annotated[Count, Field(ge=_SMALLEST_VOCAB_SIZE, le=1_000_000)] = _DEFAULT_VOCAB_SIZE
    kind: Literal["bpe", "bytes"] = "bpe"

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("vocab_size", 0) is None:
            return {key: value for key, value in values.items() if key != "vocab_size"}
        return values

    @model_validator(mode="after")
    def _every_setting_counts(self) -> "TokenizerConfig":
        if self.kind == "bytes" and self.file:
            raise ValueError(
                f"tokenizer.file ({self.file}) has no effect with tokenizer.kind: bytes; leave one "
                f"of them out"
            )
        if (self.file or self.kind == "bytes") and self.vocab_size != _DEFAULT_VOCAB_SIZE:
            cause = "tokenizer.file" if self.file else "tokenizer.kind: bytes"
            raise ValueError(
                f"tokenizer.vocab_size ({self.vocab_size}) has no effect with {cause}; leave it "
                f"out or set it to null"
            )
        return self


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer. `sha256` identifies it in caches."""

    vocab_size: int
    end_of_text: int
    pad: int
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in the text are text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, on several threads where the implementation can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""

    def token_bytes(self, token: int) -> bytes | None:
        """What one token stands for, which may be a part of a character's UTF-8; None for a special
        token and for an id without one."""

    def save(self, path: Path) -> None:
        """Write what `load_tokenizer` reads."""


class ByteTokenizer:
    """The bytes of UTF-8 as ids 0 to 255, then end of text (256) and padding (257)."""

    vocab_size = 258
    end_of_text = 256
    pad = 257
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes | None:
        return bytes([token]) if token < 256 else None

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps({"kind": "bytes"}) + "\n")


class FileTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library.

    Raises:
        DataError: if the text is no tokenizer, or has no token that ends a text.
    """

    def __init__(self, text: str, name: str, specials: dict[str, str] | None = None):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # The library raises a bare Exception; a broken file can also panic below it.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{name} is not a tokenizer.json that can be read ({reason}); give a sound file, "
                f"or leave tokenizer.file out to train one"
            ) from error
        # The caller cuts texts to length, and "<|endoftext|>" in a text is no end of a document.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        if not vocabulary:
            raise DataError(f"{name} has an empty vocabulary; give a sound file")
        self.vocab_size = max(vocabulary.values()) + 1
        specials = specials or {}
        ends = [e for e in (specials.get("eos_token"), *_KNOWN_ENDS) if e in vocabulary]
        if not ends:
            raise DataError(
                f"{name} has no token that ends a text; needs one of {', '.join(_KNOWN_ENDS)}, or "
                f"a tokenizer_config.json beside it that names the eos_token"
            )
        self.end_of_text = vocabulary[ends[0]]
        pads = [p for p in (specials.get("pad_token"), PAD, "<pad>") if p in vocabulary]
        self.pad = vocabulary[pads[0]] if pads else self.end_of_text
        self._text = text
        decoder = json.dumps(json.loads(text).get("decoder"))
        self._byte_of = _byte_level_alphabet() if '"ByteLevel"' in decoder else {}
        identity = f"{text}\0{self.end_of_text}\0{self.pad}"
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()
        self._specials = {"eos_token": ends[0]} | ({"pad_token": pads[0]} if pads else {})

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes | None:
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token == self.end_of_text:
            return None
        added = self._tokenizer.get_added_tokens_decoder().get(token)
        if added is not None:
            return None if added.special else added.content.encode()
        if self._byte_of and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        # How SentencePiece writes a space.
        return piece.replace("▁", " ").encode()

    def save(self, path: Path) -> None:
        """Write tokenizer.json at `path` and tokenizer_config.json beside it."""
        replace_file(path, self._text)
        config = json.dumps(self._specials, ensure_ascii=False, indent=1)
        replace_file(path.with_name("tokenizer_config.json"), config + "\n")


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character stands for in a byte-level vocabulary: the printable ones of
    Latin-1 for themselves, the others from U+0100 on (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = {chr(byte): byte for byte in printable}
    return pairs | {chr(256 + place): byte for place, byte in enumerate(others)}


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from its file; special tokens from the tokenizer_config.json beside it, if any.

    Raises:
        DataError: one line that names the file.
    """
    try:
        # Never a pipe: opening one waits for its writer.
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        text = path.read_text(encoding="utf-8")
    # A path with a NUL and bytes that are not UTF-8 are ValueErrors.
    except (OSError, ValueError) as error:
        raise DataError(
            f"tokenizer.file ({path}) cannot be read ({error}); give a tokenizer.json, or leave it "
            f"out to train one"
        ) from error
    if text.strip() == json.dumps({"kind": "bytes"}):
        return ByteTokenizer()
    return FileTokenizer(text, f"tokenizer.file ({path})", _specials_beside(path))


def _specials_beside(path: Path) -> dict[str, str]:
    """`eos_token` and `pad_token` of a tokenizer_config.json; either may be text or {content:
    text}."""
    config = path.with_name("tokenizer_config.json")
    try:
        values: Any = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    found = {key: values.get(key) for key in ("eos_token", "pad_token")}
    named = {key: v.get("content") if isinstance(v, dict) else v for key, v in found.items()}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def train_bpe(texts: Iterator[str], vocab_size: int, *, progress: bool) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's split; any text survives encode and decode unchanged."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    # mypy takes the setters of the compiled class for read-only.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, PAD],
        show_progress=progress,
    )
    with parallel_tokenizers():
        tokenizer.train_from_iterator(texts, trainer)
    return FileTokenizer(tokenizer.to_str(), "the trained tokenizer")


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Several threads while we tokenise, one afterwards: the library's threads do not survive a
    fork, and it warns about that at every later one. A setting of the user's stays."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ and os.environ[name] != "false":
        yield
        return
    chosen = os.environ.get(name)
    os.environ[name] = chosen or "true"
    try:
        yield
    finally:
        os.environ[name] = "false"


def tokenizer_for(
    config: TokenizerConfig,
    cache_dir: Path,
    sample_key: Any,
    sample: Callable[[], Iterator[str]],
    *,
    progress: bool,
) -> Tokenizer:
    """The tokenizer that the config asks for.

    Args:
        sample_key: identifies the text of `sample`; with the settings, the key of the cache.
        sample: gives training text; called only when a BPE has to be trained.
    Raises:
        DataError: if `tokenizer.file` is missing or corrupt.
    """
    if config.file:
        return load_tokenizer(Path(os.path.expanduser(config.file)))
    if config.kind == "bytes":
        return ByteTokenizer()
    key = key_of("bpe", _TRAINER_VERSION, config.vocab_size, sample_key)
    entry = cache_dir / "tokenizers" / key[:16]
    manifest = read_entry(entry)
    if manifest is None or manifest.get("key") != key:
        trained = train_bpe(sample(), config.vocab_size, progress=progress)
        with new_entry(entry) as (folder, facts):
            trained.save(folder / "tokenizer.json")
            facts |= {"key": key, "vocab_size": trained.vocab_size}
    return load_tokenizer(entry / "tokenizer.json")


def planned_vocab_size(tokenizer: TokenizerConfig) -> int:
    """The vocabulary that the tokenizer will have; a BPE of little text may end up smaller."""
    if tokenizer.kind == "bytes":
        return ByteTokenizer.vocab_size
    if tokenizer.file is not None:
        return load_tokenizer(Path(os.path.expanduser(tokenizer.file))).vocab_size
    return tokenizer.vocab_size


def with_vocab_size(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """The model with a vocabulary: where it names none, the tokenizer's, in full multiples of 64.

    Raises:
        ConfigError: if it names a smaller one than the tokenizer has.
    """
    if model.vocab_size is None:
        return model.model_copy(update={"vocab_size": -(-vocab_size // 64) * 64})
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size ({model.vocab_size}) must be at least the tokenizer's "
            f"({vocab_size}); leave it out to take that"
        )
    return model
