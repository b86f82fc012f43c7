"""Which held-out text is an analysis made on, and what does a model make of it?"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moe.model import MoETransformer
from moe.routing import Routing
from train.config import RunConfig
from train.data import PreparedData
from train.errors import NonFiniteError
from train.packing import IGNORE, Batch
from train.status import format_duration

# Logits held at a time: 128 MiB, and about as much again for the loss.
MAX_LOGITS = 1 << 25


class HeldOutText:
    """Validation text, the same at every call: at most `tokens` of each domain, evenly spread.

    Attributes:
        data: what it is read from. seq_len: of its sequences (a short domain's may be shorter).
    """

    def __init__(self, data: PreparedData, config: RunConfig, tokens: int, *, shorten: bool):
        """Args:
        tokens: of each domain. shorten: rather than take a sequence with more than `tokens`.
        """
        seq_len = config.training.seq_len
        self.data, self.tokens = data, tokens
        self.seq_len = min(seq_len, tokens) if shorten else seq_len
        assert config.model.vocab_size is not None
        self._size = sequences_per_forward(config, self.seq_len)

    def batches(self) -> Iterator[Batch]:
        """Each of one domain, in the order of the domains."""
        for name in self.data.domain_names:
            yield from self.data.validation_batches(
                name, self._size, self.seq_len, max_tokens=self.tokens
            )

    def mixed_batches(self) -> Iterator[Batch]:
        """The same sequences in as few batches as possible, which may be of several domains."""
        waiting: list[Batch] = []
        for batch in self.batches():
            same = waiting and waiting[0].input_ids.shape[1] == batch.input_ids.shape[1]
            number = sum(len(b.input_ids) for b in waiting) + len(batch.input_ids)
            if waiting and (not same or number > self._size):
                yield _joined(waiting)
                waiting = []
            waiting.append(batch)
        if waiting:
            yield _joined(waiting)


def sequences_per_forward(config: RunConfig, seq_len: int) -> int:
    """As many as in an evaluation of the run, but no more than `MAX_LOGITS` allows."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    return max(1, min(config.evaluation.batch_size, MAX_LOGITS // (seq_len * vocab_size)))


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all sequences, which are of one length."""
    columns = zip(*(batch[:4] for batch in batches), strict=True)
    return Batch(*(torch.cat(column) for column in columns))


class Reading(NamedTuple):
    """What a model makes of a batch.

    losses: (B, S) float32 nats of each next token, 0 where there is none. predicted: (B, S) int64
    likeliest next token, -1 where there is none to compare it with. routings: one a routed layer.
    """

    losses: Tensor
    predicted: Tensor
    routings: tuple[Routing, ...]


@torch.no_grad()
def read(
    model: MoETransformer, batch: Batch, routes: Sequence[Tensor | None] | None = None
) -> Reading:
    """One forward pass, in float32.

    Args: routes: as in `MoETransformer.forward`.
    Raises:
        NonFiniteError: if a loss is inf or NaN.
    """
    device = model.embedding.weight.device
    labels = batch.labels.to(device)
    output = model(
        batch.input_ids.to(device), document_ids=batch.document_ids.to(device), routes=routes
    )
    assert output.logits is not None
    flat = output.logits.flatten(0, 1)  # (T, V)
    losses = F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORE)
    if not torch.isfinite(losses).all():
        raise NonFiniteError(
            "the loss of held-out text is inf or NaN, so there is nothing to analyse; give an "
            "earlier checkpoint with --step"
        )
    predicted = output.logits.argmax(-1).masked_fill(labels == IGNORE, -1)
    return Reading(losses.view_as(labels), predicted, output.routings)


def sum_by_domain(values: Tensor, domain_ids: Tensor, num_domains: int) -> Tensor:
    """(B, S) numbers of sequences, (B,) their domains -> (domains,) float64 sums, on the CPU."""
    # There in a fixed order; on a GPU, atomics would add them up in any.
    by_sequence = values.double().sum(-1).cpu()
    return by_sequence.new_zeros(num_domains).index_add_(0, domain_ids, by_sequence)


def num_labels(batch: Batch, num_domains: int) -> Tensor:
    """(domains,) float64 next tokens that a loss counts."""
    return sum_by_domain(batch.labels != IGNORE, batch.domain_ids, num_domains)


# Between two lines about work that goes on.
_SAY_SECONDS = 60.0


@contextlib.contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """On a terminal a bar with the time left, elsewhere a line each minute and at the end; call it
    with what is done."""
    began = said = time.monotonic()
    done = 0
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None) as bar:

        def update(more: int) -> None:
            nonlocal done, said
            bar.update(more)
            done += more
            now = time.monotonic()
            if bar.disable and now - said > _SAY_SECONDS:
                said = now
                left = format_duration((now - began) / done * (total - done))
                print(f"{what}: {done:,} of {total:,} {unit}, left {left}", file=sys.stderr)

        yield update
        if bar.disable:
            took = format_duration(time.monotonic() - began)
            print(f"{what}: {total:,} {unit} in {took}", file=sys.stderr)
