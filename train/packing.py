"""Which tokens are in global sequence j, and what does a batch of them look like?

A domain's tokens, documents one after another, are cut into chunks of `seq_len`. Global sequence j
is a pure function of (data, seed, j): which domain comes from the mixture, which of its chunks from
a shuffle of each pass over the domain. A position in the data is therefore one number, and any
division of a range of j over ranks and accumulation steps reads the same sequences. So is the seed
of the routers' noise in it: any division trains with the same noise.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from train.errors import DataError

IGNORE = -100
# The mixture repeats in cycles of this many sequences: shares are exact to half of 1 / CYCLE.
CYCLE = 4096


class Batch(NamedTuple):
    """Packed sequences on the CPU.

    input_ids: (B, S) int64. labels: (B, S) int64, the next token, -100 where it belongs to another
    document (after an end of text). document_ids: (B, S) int32, rising from 0 within a sequence.
    domain_ids: (B,) int64, index into the data's `domain_names`. routes: (L, B, S, K) experts to
    replay in each routed layer, None where the routers choose. noise_seeds: (B,) int64, of the
    routers' noise in each sequence, None where they draw it from PyTorch's stream, if at all.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    domain_ids: Tensor
    routes: Tensor | None = None
    noise_seeds: Tensor | None = None


def pack(rows: np.ndarray, domain_ids: np.ndarray, end_of_text: int) -> Batch:
    """A batch from rows of S + 1 consecutive tokens, (B, S + 1) int64."""
    inputs, labels = rows[:, :-1], rows[:, 1:].copy()  # (B, S) each
    ends = inputs == end_of_text
    labels[ends] = IGNORE
    # An end of text still belongs to the document that it ends.
    documents = np.cumsum(ends, axis=1, dtype=np.int32) - ends  # (B, S)
    return Batch(
        torch.from_numpy(np.ascontiguousarray(inputs)),
        torch.from_numpy(labels),
        torch.from_numpy(documents),
        torch.from_numpy(domain_ids),
    )


class TokenSource(Protocol):
    """What the loader needs of prepared data."""

    domain_names: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def end_of_text(self) -> int:
        """Id of the token that ends a document."""

    def train_stream(self, domain: str) -> np.ndarray:
        """All training tokens of a domain, one-dimensional."""


class TrainLoader:
    """Reads any range of the endless sequence of training sequences.

    Within a pass over a domain every chunk comes once, in an order of (seed, domain, pass); the
    next pass begins when the domain is exhausted. The last tokens of a domain that fill no chunk
    are unused.

    Raises:
        DataError: if a domain has fewer than seq_len + 1 training tokens.
    """

    def __init__(self, data: TokenSource, seq_len: int, seed: int):
        self.seq_len = seq_len
        self.seed = seed
        self.domain_names = data.domain_names
        self._end_of_text = data.end_of_text
        self._tokens = [data.train_stream(name) for name in data.domain_names]
        # A chunk needs one token more than it has inputs: its last label.
        self._num_chunks = [(len(tokens) - 1) // seq_len for tokens in self._tokens]
        for name, tokens, chunks in zip(
            self.domain_names, self._tokens, self._num_chunks, strict=True
        ):
            if chunks < 1:
                raise DataError(
                    f"data.domains: domain {name} has {len(tokens)} training tokens, one sequence "
                    f"needs {seq_len + 1} (training.seq_len + 1); lower training.seq_len, raise "
                    f"data.max_bytes_per_domain, give more text or remove the domain"
                )
        self._quotas = _quotas(data.weights)
        self._cycle = lru_cache(maxsize=4)(self._make_cycle)
        self._order = lru_cache(maxsize=2 * len(self._tokens))(self._make_order)

    @property
    def chunks_per_pass(self) -> dict[str, int]:
        """Sequences in one pass over each domain."""
        return dict(zip(self.domain_names, self._num_chunks, strict=True))

    def batch(self, first_sequence: int, num_sequences: int) -> Batch:
        """Global sequences first_sequence ... first_sequence + num_sequences - 1."""
        length = self.seq_len
        rows = np.empty((num_sequences, length + 1), dtype=np.int64)
        domain_ids = np.empty(num_sequences, dtype=np.int64)
        for row in range(num_sequences):
            domain, chunk = self.locate(first_sequence + row)
            domain_ids[row] = domain
            rows[row] = self._tokens[domain][chunk * length : (chunk + 1) * length + 1]
        seeds = [_key(self.seed, "noise", first_sequence + row) for row in range(num_sequences)]
        # A bit less: PyTorch has no unsigned integers of 64.
        noise_seeds = torch.from_numpy((np.array(seeds) >> np.uint64(1)).astype(np.int64))
        return pack(rows, domain_ids, self._end_of_text)._replace(noise_seeds=noise_seeds)

    def locate(self, sequence: int) -> tuple[int, int]:
        """(index of the domain, chunk within the domain) of a global sequence."""
        cycle, slot = divmod(sequence, CYCLE)
        domains, ranks = self._cycle(cycle)
        domain = int(domains[slot])
        turn = cycle * int(self._quotas[domain]) + int(ranks[slot])
        pass_number, position = divmod(turn, self._num_chunks[domain])
        return domain, int(self._order(domain, pass_number)[position])

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(CYCLE,) domain of each slot, and how many slots of that domain come before it.

        A domain's i-th slot of q falls at a random place in its own i-th q-th of the cycle, so that
        every stretch of the cycle, not only the whole, has the shares of the mixture.
        """
        places, domains, ranks = [], [], []
        for domain, quota in enumerate(self._quotas):
            rank = np.arange(quota)
            key = _key(self.seed, "mixture", self.domain_names[domain], cycle)
            # 53 bits fill the mantissa of a float64 in [0, 1).
            noise = (_mixed(quota, key) >> np.uint64(11)) * 2.0**-53
            places.append((rank + noise) / quota)
            domains.append(np.full(quota, domain))
            ranks.append(rank)
        order = np.argsort(np.concatenate(places), kind="stable")
        return np.concatenate(domains)[order], np.concatenate(ranks)[order]

    def _make_order(self, domain: int, pass_number: int) -> np.ndarray:
        """A permutation of the domain's chunks for one pass."""
        key = _key(self.seed, "order", self.domain_names[domain], pass_number)
        return np.argsort(_mixed(self._num_chunks[domain], key), kind="stable")


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Slots of each domain in a cycle: largest remainders, but at least one."""
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum() * CYCLE
    quotas = np.maximum(np.floor(shares).astype(np.int64), 1)
    missing = CYCLE - int(quotas.sum())
    if missing > 0:
        quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    while missing < 0:
        quotas[np.argmax(quotas)] -= 1
        missing += 1
    return quotas


def _key(*parts: object) -> np.uint64:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest))


def _mixed(count: int, key: np.uint64) -> np.ndarray:
    """`count` distinct pseudo-random uint64 of a key (SplitMix64: Steele et al., OOPSLA 2014).

    NumPy's own generators may change their streams between versions; a resumed run must not.
    """
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
