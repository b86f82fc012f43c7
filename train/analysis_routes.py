"""Where did a model send a text? One pass over it: routes into a table, and all that is counted."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.measures import (
    coefficient_of_variation,
    dead_experts,
    domain_divergence,
    domain_expert_information,
    effective_experts,
    gini,
    max_violation,
    router_sums,
    starved_experts,
    vocabulary_specialisation,
)
from moe.model import MoETransformer
from moe.routing import stack_layers
from moe.zero_computation import ZERO_COMPUTATION_KINDS
from train.analysis_text import HeldOutText, Reading, num_labels, progress, read, sum_by_domain
from train.packing import Batch
from train.route_statistics import RouteStatistics, VocabularyCounts, frequent_tokens
from train.route_table import RouteTable, read_blocks
from train.validation import NUM_SHUFFLES

# The tokens whose experts are counted, and what each is to the router that chooses them.
NUM_FREQUENT = 2048
ROLES = ("input", "next", "predicted")
# Rarer ones say nothing of an expert.
LEAST_OCCURRENCES = 8
NUM_TOP_TOKENS = 8


class Survey(NamedTuple):
    """What is known of a text before any model reads it.

    frequent: (N,) the most frequent tokens. domain_of: (sequences,) domains. tokens: (domains,) of
    each.
    """

    frequent: Tensor
    domain_of: Tensor
    tokens: Tensor


def survey(text: HeldOutText, vocab_size: int) -> Survey:
    """Count the tokens of a text."""
    num_domains = len(text.data.domain_names)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    tokens = torch.zeros(num_domains, dtype=torch.int64)
    domain_of = [torch.zeros(0, dtype=torch.int64)]
    for batch in text.batches():
        counts += torch.bincount(batch.input_ids.flatten(), minlength=vocab_size)
        seq_len = batch.input_ids.shape[1]
        tokens += torch.bincount(batch.domain_ids, minlength=num_domains) * seq_len
        domain_of.append(batch.domain_ids)
    return Survey(frequent_tokens(counts, NUM_FREQUENT), torch.cat(domain_of), tokens)


class RouteCounts:
    """All that one pass counts; L routed layers, E experts.

    Attributes:
        statistics: load, co-activation, repeats. vocabulary: by role of the token, see ROLES.
        shuffled: (NUM_SHUFFLES, D, L, E) loads with the domains of the sequences permuted.
        router: (L, 3) sums of entropy, confidence and margin. losses, labels: (domains,) sums.
    """

    def __init__(self, config: ModelConfig, surveyed: Survey, device: torch.device):
        self.config, self.tokens = config, surveyed.tokens
        num_domains = len(surveyed.tokens)
        self.statistics = RouteStatistics(config, num_domains, surveyed.frequent, device)
        self.vocabulary = {
            "input": self.statistics.vocabulary,
            "next": VocabularyCounts(config, surveyed.frequent, device),
            "predicted": VocabularyCounts(config, surveyed.frequent, device),
        }
        self.shuffled = self.statistics.load.new_zeros(NUM_SHUFFLES, *self.statistics.load.shape)
        generator = torch.Generator().manual_seed(0)
        number = len(surveyed.domain_of)
        orders = [torch.randperm(number, generator=generator) for _ in range(NUM_SHUFFLES)]
        self._permuted = [surveyed.domain_of[order].to(device) for order in orders]
        layers = len(config.moe_layers)
        self.router = torch.zeros(layers, 3, dtype=torch.float64, device=device)
        self.losses = torch.zeros(num_domains, dtype=torch.float64)
        self.labels = torch.zeros(num_domains, dtype=torch.float64)
        self._sequences = 0

    def add(self, batch: Batch, reading: Reading) -> None:
        """Count a batch, the next one of the text."""
        by_sequence = self.statistics.add(batch, reading.routings)  # (B, L, E)
        span = slice(self._sequences, self._sequences + len(by_sequence))
        self._sequences = span.stop
        for load, domain_of in zip(self.shuffled, self._permuted, strict=True):
            load.index_add_(0, domain_of[span], by_sequence)
        labels = batch.labels.flatten().to(reading.predicted.device)
        self.vocabulary["next"].add(labels, reading.routings)
        self.vocabulary["predicted"].add(reading.predicted.flatten(), reading.routings)
        for layer, routing in enumerate(reading.routings):
            sums = router_sums(routing)
            self.router[layer] += torch.stack([sums.entropy, sums.confidence, sums.margin])
        self.losses += sum_by_domain(reading.losses, batch.domain_ids, len(self.losses))
        self.labels += num_labels(batch, len(self.labels))


class TextSample:
    """The first tokens of each domain with their experts, for reading.

    Args: number: of tokens a domain.
    """

    def __init__(self, domains: tuple[str, ...], number: int = 300):
        self.domains, self._number = domains, number
        self._parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, batch: Batch, reading: Reading) -> None:
        """Take from a batch what is still wanted."""
        size, seq_len = batch.input_ids.shape
        experts = stack_layers([r.chosen_indices for r in reading.routings], 1).cpu()  # (T, L, K)
        weights = stack_layers([r.chosen_weights for r in reading.routings], 1, fill=0).cpu()
        for row in range(size):
            parts = self._parts.setdefault(int(batch.domain_ids[row]), [])
            wanted = min(seq_len, self._number - sum(len(ids) for ids, _, _ in parts))
            if wanted > 0:
                span = slice(row * seq_len, row * seq_len + wanted)
                parts.append((batch.input_ids[row, :wanted], experts[span], weights[span]))

    def numbers(self) -> list[dict[str, Any]]:
        """For each domain its `domain`; `starts`, where a sequence begins; `token_ids` (T);
        `experts` and `weights` (L, T, K), each weight the shortest number that is that float32."""
        found = []
        for domain, parts in sorted(self._parts.items()):
            lengths = [len(ids) for ids, _, _ in parts]
            experts = torch.cat([part[1] for part in parts]).transpose(0, 1)
            weights = torch.cat([part[2] for part in parts]).transpose(0, 1).numpy()
            found.append(
                {
                    "domain": self.domains[domain],
                    "starts": np.cumsum([0, *lengths[:-1]]).tolist(),
                    "token_ids": torch.cat([part[0] for part in parts]).tolist(),
                    "experts": experts.tolist(),
                    "weights": [
                        [[float(str(w)) for w in token] for token in layer] for layer in weights
                    ],
                }
            )
        return found


def count_routes(
    model: MoETransformer, text: HeldOutText, table: RouteTable
) -> tuple[RouteCounts, TextSample]:
    """Read the text once; every route goes into the table."""
    config = model.config
    assert config.vocab_size is not None
    surveyed = survey(text, config.vocab_size)
    counts = RouteCounts(config, surveyed, model.embedding.weight.device)
    sample = TextSample(text.data.domain_names)
    with progress("routes", int(surveyed.tokens.sum()), "tokens") as done:
        for batch in text.batches():
            reading = read(model, batch)
            table.add(batch, reading)
            counts.add(batch, reading)
            sample.add(batch, reading)
            done(batch.input_ids.numel())
    return counts, sample


def permuted_vocabulary(
    path: Path, config: ModelConfig, token_ids: Tensor, num_tokens: int
) -> dict[str, VocabularyCounts]:
    """The control of `RouteCounts.vocabulary`: the same routes, dealt out to the tokens at random.

    Reads the table twice; of the text it holds three int32 a token.

    Args: token_ids: (N,) those that are counted. num_tokens: of the table.
    """
    layers = len(config.moe_layers)
    columns = np.empty((len(ROLES), num_tokens), np.int32)
    at = 0
    for block in read_blocks(path, layers):
        columns[:, at : at + len(block.token_id)] = block[: len(ROLES)]
        at += len(block.token_id)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0)).numpy()
    columns = columns[:, order]
    control = {role: VocabularyCounts(config, token_ids.cpu()) for role in ROLES}
    at = 0
    for block in read_blocks(path, layers):
        routes = torch.from_numpy(block.experts.astype(np.int64)).unbind(1)  # L of (T, K)
        for column, role in zip(columns, ROLES, strict=True):
            ids = torch.from_numpy(column[at : at + len(block.token_id)].astype(np.int64))
            control[role].add_routes(ids, routes)
        at += len(block.token_id)
    return control


# ---- as numbers of analysis.json


def layer_numbers(
    counts: RouteCounts, control: dict[str, VocabularyCounts]
) -> list[dict[str, Any]]:
    """One mapping a routed layer: its experts, its router, and all that is said in one number."""
    statistics = counts.statistics
    load = statistics.load.sum(0)  # (L, E)
    by_layer = statistics.load.transpose(0, 1)  # (L, D, E)
    shuffled = domain_expert_information(counts.shuffled.transpose(1, 2)).mean(0)
    entropy, confidence, margin = (counts.router / counts.tokens.sum()).unbind(-1)
    columns = {
        "choices_per_token": load.clamp(min=0).sum(-1).double() / counts.tokens.sum(),
        "max_violation": max_violation(load),
        "effective_experts": effective_experts(load),
        "dead_experts": dead_experts(load),
        "starved_experts": starved_experts(load),
        "gini": gini(load),
        "coefficient_of_variation": coefficient_of_variation(load),
        "router_entropy": entropy,
        "router_confidence": confidence,
        "router_margin": margin,
        "domain_information": domain_expert_information(by_layer),
        "domain_information_shuffled": shuffled,
        "domain_divergence": domain_divergence(by_layer),
        "repeat_rate": statistics.repeat_rate,
    }
    for role, found in counts.vocabulary.items():
        for suffix, vocabulary in (("", found), ("_permuted", control[role])):
            columns[f"vocabulary_{role}{suffix}"] = vocabulary_specialisation(
                vocabulary.assignments, vocabulary.occurrences, LEAST_OCCURRENCES
            )
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    numbers = []
    for layer, row in zip(counts.config.moe_layers, rows, strict=True):
        here = counts.config.at(layer)
        costless = zip(ZERO_COMPUTATION_KINDS, here.moe.zero_computation, strict=True)
        of_layer = {
            "layer": layer,
            "num_experts": here.moe.num_choices,
            # The kinds of the last of them, where any cost nothing.
            "zero_computation": [kind for kind, number in costless for _ in range(number)],
            "top_k": here.top_k,
            "router": here.moe.router.name,
        }
        numbers.append(of_layer | dict(zip(columns, row, strict=True)))
    return numbers


def top_tokens(counts: RouteCounts) -> dict[str, list[list[list[dict[str, Any]]]]]:
    """By role, layer and expert: the tokens with the largest share of their occurrences there."""
    return {
        role: [
            [
                [
                    token._asdict()
                    for token in found.top_tokens(layer, expert, NUM_TOP_TOKENS, LEAST_OCCURRENCES)
                ]
                for expert in range(number)
            ]
            for layer, number in enumerate(found.num_experts)
        ]
        for role, found in counts.vocabulary.items()
    }
