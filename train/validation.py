"""How good is the model on each domain's held-out text, and which experts did it use there?"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.measures import domain_divergence, domain_expert_information, max_violation
from moe.routing import Routing, stack_layers
from train.data import PreparedData
from train.engine import Engine
from train.packing import Batch
from train.probe import PROBE_TOKENS
from train.route_statistics import RouteStatistics, VocabularyCounts, frequent_tokens

# Permutations of the labels that the shuffled control is the mean of.
NUM_SHUFFLES = 8
# Tokens whose experts are counted.
VOCABULARY = 1024


class Evaluation(NamedTuple):
    """One pass over the validation text; L routed layers, E experts.

    loss: nats per token of each domain that has validation text; unigram_entropy, bits_per_byte,
    num_tokens (predicted ones): of the same. tokens_per_expert: (domains, L, E) assignments that
    the routers made, below 0 where a layer has no such expert. information: (L,) I(domain; expert)
    / H(domain). shuffled_information: (L,) the same with the domains of the sequences permuted,
    what chance alone would give. divergence: (L,) Jensen-Shannon, nats. sequence_violation: (L,)
    MaxVio of a sequence, the mean over sequences. co_activation: (L, E, E) counts. repeat_rate:
    (L,). vocabulary: of the VOCABULARY most frequent tokens. probe_routes: (N, L, K) of the same N
    tokens each time.
    """

    loss: dict[str, float]
    unigram_entropy: dict[str, float]
    bits_per_byte: dict[str, float]
    num_tokens: dict[str, int]
    tokens_per_expert: Tensor
    information: Tensor
    shuffled_information: Tensor
    divergence: Tensor
    sequence_violation: Tensor
    co_activation: Tensor
    repeat_rate: Tensor
    vocabulary: VocabularyCounts
    probe_routes: Tensor

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
    config, device = engine.model.config, engine.device
    names = data.domain_names
    token_ids = frequent_tokens(torch.from_numpy(data.validation_token_counts), VOCABULARY)
    statistics = RouteStatistics(config, len(names), token_ids, device)
    loss_sums = torch.zeros(len(names), dtype=torch.float64)
    labels = torch.zeros(len(names), dtype=torch.int64)
    counts: list[Tensor] = []  # (B, L, E) each, zero for the batches of other ranks
    domains: list[Tensor] = []
    probe = _Probe(len(names), seq_len)
    each = (
        (place, batch)
        for place, name in enumerate(names)
        for batch in data.validation_batches(name, batch_size, seq_len)
    )
    shape = statistics.load.shape[1:]
    # One batch for each rank and round; where the last round has too few, some run one for nothing,
    # as all must run the same number of forwards.
    while turn := list(itertools.islice(each, engine.world_size)):
        if stop():
            return None
        place, batch = turn[engine.rank % len(turn)]
        output = engine(batch)
        for number, (_, other) in enumerate(turn):
            domains.append(other.domain_ids)
            if number != engine.rank:
                counts.append(torch.zeros(len(other.domain_ids), *shape, dtype=torch.int64))
                probe.skip(other, len(config.moe_layers), config.top_k)
                continue
            loss_sums[place] += float(output.lm_loss) * int(output.num_labels)
            labels[place] += int(output.num_labels)
            counts.append(statistics.add(batch, output.routings).cpu())
            probe.add(batch, output.routings)
    none = torch.zeros(0, *shape, dtype=torch.int64)
    by_sequence = torch.cat([none, *counts])  # (N, L, E)
    probe_routes = probe.routes(len(config.moe_layers), config.top_k)
    if engine.world_size > 1:

        def total(x: Tensor) -> Tensor:
            return engine.all_reduce(x.to(device)).cpu()

        loss_sums, labels, by_sequence = total(loss_sums), total(labels), total(by_sequence)
        probe_routes = total(probe_routes)
        statistics.all_reduce(engine.all_reduce)
    statistics.vocabulary.to_cpu()
    domain_of = torch.cat([torch.zeros(0, dtype=torch.int64), *domains])  # (N,)
    by_domain = statistics.load.cpu()  # (domains, L, E)
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
        divergence=domain_divergence(by_domain.transpose(0, 1)),
        sequence_violation=max_violation(by_sequence).double().mean(0),
        co_activation=statistics.co_activation.cpu(),
        repeat_rate=statistics.repeat_rate.cpu(),
        vocabulary=statistics.vocabulary,
        probe_routes=probe_routes,
    )


class _Probe:
    """Routes of the first sequences of each domain, PROBE_TOKENS at most, at least one sequence."""

    def __init__(self, num_domains: int, seq_len: int):
        self._each = max(1, PROBE_TOKENS // (num_domains * seq_len))
        self._taken: Counter[int] = Counter()
        self._parts: list[Tensor] = []

    def _take(self, batch: Batch) -> int:
        """How many sequences of a batch, which are all of one domain, still belong to the probe."""
        domain = int(batch.domain_ids[0])
        taken = min(len(batch.domain_ids), self._each - self._taken[domain])
        self._taken[domain] += taken
        return taken

    def skip(self, batch: Batch, num_layers: int, top_k: int) -> None:
        """Leave the place of another rank's batch, to be summed over ranks."""
        rows = self._take(batch) * batch.input_ids.shape[1]
        self._parts.append(torch.zeros(rows, num_layers, top_k, dtype=torch.int64))

    def add(self, batch: Batch, routings: Sequence[Routing]) -> None:
        rows = self._take(batch) * batch.input_ids.shape[1]
        if routings and rows:
            chosen = [routing.chosen_indices[:rows] for routing in routings]
            self._parts.append(stack_layers(chosen, 1).cpu())

    def routes(self, num_layers: int, top_k: int) -> Tensor:
        """(N, L, K), of one rank's batches."""
        return torch.cat([torch.zeros(0, num_layers, top_k, dtype=torch.int64), *self._parts])


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
