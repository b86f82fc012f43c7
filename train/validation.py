"""How good is the model on each domain's held-out text, and which experts did it use there?"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.measures import domain_expert_information
from moe.routing import counts_by_sequence
from train.data import PreparedData
from train.engine import Engine

# Permutations of the labels that the shuffled control is the mean of.
NUM_SHUFFLES = 8


class Evaluation(NamedTuple):
    """One pass over the validation text.

    loss: nats per token of each domain that has validation text; unigram_entropy, bits_per_byte,
    num_tokens (predicted ones): of the same. tokens_per_expert: (domains, L, E) assignments, L
    routed layers. information: (L,) I(domain; expert) / H(domain). shuffled_information: (L,) the
    same with the domains of the sequences permuted, what chance alone would give.
    """

    loss: dict[str, float]
    unigram_entropy: dict[str, float]
    bits_per_byte: dict[str, float]
    num_tokens: dict[str, int]
    tokens_per_expert: Tensor
    information: Tensor
    shuffled_information: Tensor

    @property
    def mean_loss(self) -> float:
        """Mean over domains, each counting the same; NaN without any validation text."""
        return _mean(list(self.loss.values()))

    @property
    def mean_gain(self) -> float:
        """Mean over domains of unigram entropy minus loss, nats per token."""
        return _mean([self.unigram_entropy[name] - loss for name, loss in self.loss.items()])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@torch.no_grad()
def evaluate(
    engine: Engine,
    data: PreparedData,
    batch_size: int,
    seq_len: int,
    *,
    stop=lambda: False,
) -> Evaluation | None:
    """Evaluate every domain; deterministic, and no random stream moves.

    Ranks share the batches out; every rank has the whole answer.

    Args:
        batch_size: sequences per forward. stop: asked before each forward, the same answer on all
            ranks; where it says True, the evaluation is given up.
    Returns:
        Evaluation, or None if it was given up.
    """
    was_training = engine.model.training
    engine.model.eval()
    try:
        return _evaluate(engine, data, batch_size, seq_len, stop)
    finally:
        engine.model.train(was_training)


def _evaluate(engine, data, batch_size, seq_len, stop) -> Evaluation | None:
    config = engine.model.config
    names = data.domain_names
    loss_sums = torch.zeros(len(names), dtype=torch.float64)
    labels = torch.zeros(len(names), dtype=torch.int64)
    counts: list[Tensor] = []  # (B, L, E) each, zero for the batches of other ranks
    domains: list[Tensor] = []
    each = (
        (place, batch)
        for place, name in enumerate(names)
        for batch in data.validation_batches(name, batch_size, seq_len)
    )
    shape = len(config.moe_layers), config.moe.num_experts
    # One batch for each rank and round; where the last round has too few, some run one for nothing,
    # as all must run the same number of forwards.
    while turn := list(itertools.islice(each, engine.world_size)):
        if stop():
            return None
        place, batch = turn[engine.rank % len(turn)]
        output = engine(batch)
        for number, (_, other) in enumerate(turn):
            size = len(other.domain_ids)
            domains.append(other.domain_ids)
            if number != engine.rank:
                counts.append(torch.zeros(size, *shape, dtype=torch.int64))
                continue
            loss_sums[place] += float(output.lm_loss) * int(output.num_labels)
            labels[place] += int(output.num_labels)
            per_layer = [counts_by_sequence(r, size) for r in output.routings]
            none = torch.zeros(size, 0, shape[1], dtype=torch.int64)
            counts.append(torch.stack(per_layer, 1).cpu() if per_layer else none)
    none = torch.zeros(0, *shape, dtype=torch.int64)
    by_sequence = torch.cat([none, *counts])  # (N, L, E)
    if engine.world_size > 1:
        loss_sums = engine.all_reduce(loss_sums.to(engine.device)).cpu()
        labels = engine.all_reduce(labels.to(engine.device)).cpu()
        by_sequence = engine.all_reduce(by_sequence.to(engine.device)).cpu()
    domain_of = torch.cat([torch.zeros(0, dtype=torch.int64), *domains])  # (N,)
    by_domain = sum_by_domain(by_sequence, domain_of, len(names))  # (domains, L, E)
    num_tokens = {name: int(n) for name, n in zip(names, labels, strict=True) if n}
    loss = {name: float(loss_sums[names.index(name)]) / n for name, n in num_tokens.items()}
    entropy = {name: data.unigram_entropy(name) for name in loss}
    return Evaluation(
        loss=loss,
        unigram_entropy=entropy,
        bits_per_byte={
            name: value / math.log(2) / data.bytes_per_token(name) for name, value in loss.items()
        },
        num_tokens=num_tokens,
        tokens_per_expert=by_domain,
        information=domain_expert_information(by_domain.transpose(0, 1)),
        shuffled_information=_shuffled_information(by_sequence, domain_of, by_domain.shape[0]),
    )


def sum_by_domain(by_sequence: Tensor, domain_of: Tensor, num_domains: int) -> Tensor:
    """(N, L, E) counts of sequences, (N,) their domains -> (domains, L, E)."""
    total = by_sequence.new_zeros(num_domains, *by_sequence.shape[1:])
    return total.index_add_(0, domain_of, by_sequence)


def _shuffled_information(by_sequence: Tensor, domain_of: Tensor, num_domains: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(NUM_SHUFFLES):
        order = torch.randperm(len(domain_of), generator=generator)
        shuffled = sum_by_domain(by_sequence, domain_of[order], num_domains)
        values.append(domain_expert_information(shuffled.transpose(0, 1)))
    return torch.stack(values).mean(0)
