"""How good is the model on each domain's held-out text, and which experts did it use there?"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.routing import counts_by_sequence, domain_expert_information
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

    Args:
        batch_size: sequences per forward. stop: asked before each forward; where it says True,
            the evaluation is given up.
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
    loss: dict[str, float] = {}
    num_tokens: dict[str, int] = {}
    counts: list[Tensor] = []  # (B, L, E) each
    domains: list[Tensor] = []
    for domain in data.domain_names:
        loss_sum, labels = 0.0, 0
        for batch in data.validation_batches(domain, batch_size, seq_len):
            if stop():
                return None
            output = engine(batch)
            loss_sum += float(output.lm_loss) * int(output.num_labels)
            labels += int(output.num_labels)
            if output.routings:
                size = len(batch.domain_ids)
                per_layer = [counts_by_sequence(r, size) for r in output.routings]
                counts.append(torch.stack(per_layer, 1).cpu())
                domains.append(batch.domain_ids)
        if labels:
            loss[domain], num_tokens[domain] = loss_sum / labels, labels
    config = engine.model.config
    none = torch.zeros(0, len(config.moe_layers), config.moe.num_experts, dtype=torch.long)
    by_sequence = torch.cat([none, *counts])  # (N, L, E)
    domain_of = torch.cat([none.new_zeros(0), *domains])  # (N,)
    by_domain = sum_by_domain(by_sequence, domain_of, len(data.domain_names))  # (domains, L, E)
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
