"""Texts on disk, prepared data and synthetic data for the tests of `train.data`."""

import os
from pathlib import Path
from types import SimpleNamespace

# Local files must be read without asking the Hub; this counts only before `datasets` is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from train.corpus import NO_DOWNLOAD_DOMAINS
from train.data import DataConfig, PreparedData, prepare_data
from train.tokenizer import ByteTokenizer, TokenizerConfig

BYTES = TokenizerConfig(kind="bytes")
END = ByteTokenizer.end_of_text


def corpus_config(cache: Path, cap: int = 200_000) -> DataConfig:
    domains = [{"corpus": name} for name in NO_DOWNLOAD_DOMAINS]
    return DataConfig(cache_dir=str(cache), domains=domains, max_bytes_per_domain=cap)


def prepare(tmp_path, *files, tokenizer=BYTES, invalid_utf8="stop", **settings) -> PreparedData:
    """One domain per argument, each a path, or a list of paths."""
    domains = [
        {
            "name": f"d{index}",
            "files": [str(f) for f in (part if isinstance(part, list) else [part])],
            "invalid_utf8": invalid_utf8,
        }
        for index, part in enumerate(files)
    ]
    config = DataConfig(cache_dir=str(tmp_path / "cache"), domains=domains, **settings)
    return prepare_data(config, tokenizer, progress=False)


def write_texts(folder: Path, texts: list[str]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:04d}.txt" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return paths


def stream_of(data: PreparedData, domain: str, split: str) -> np.ndarray:
    return getattr(data._domains[domain], split)


def documents_of(data: PreparedData, domain: str, split: str) -> list[str]:
    """Texts of a token file, cut at the ends of text."""
    tokens = np.asarray(stream_of(data, domain, split))
    ends = np.flatnonzero(tokens == data.end_of_text)
    assert len(tokens) == 0 or ends[-1] == len(tokens) - 1
    parts = np.split(tokens, ends + 1)[:-1]
    return [data.tokenizer.decode(part.tolist()) for part in parts]


def all_documents(data: PreparedData, domain: str = "d0") -> list[str]:
    """Texts of both sides, sorted."""
    return sorted(documents_of(data, domain, "train") + documents_of(data, domain, "validation"))


def synthetic(lengths: dict[str, int], weights=None) -> SimpleNamespace:
    """Data whose token i is i: a sequence shows where it was read. No documents end."""
    streams = {name: np.arange(length, dtype=np.uint32) for name, length in lengths.items()}
    return SimpleNamespace(
        domain_names=tuple(lengths),
        weights=tuple(weights or [1 / len(lengths)] * len(lengths)),
        end_of_text=2**31,
        train_stream=streams.__getitem__,
    )


def tensors(batch) -> list[torch.Tensor]:
    """What was read: all but the routes, which there are none of."""
    return [tensor for tensor in batch if tensor is not None]


def equal(one, other) -> bool:
    """Whether two batches have the same tensors."""
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
