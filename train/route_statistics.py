"""What were experts chosen for? Counts over many forward passes, on the device that routed them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.measures import co_activation_counts, first_choice, repeats
from moe.routing import Routing, counts_by_sequence, zero_counts
from train.packing import Batch


class RouteStatistics:
    """Counts of the routes of a text, L routed layers, E experts, the most that a layer has.

    Attributes:
        load: (domains, L, E) int64 assignments, below 0 where a layer has no such expert.
        co_activation: (L, E, E) float64, as in `co_activation_counts`.
        repeats: (L, 2) int64, tokens that repeat the first choice before them, and pairs.
        vocabulary: by input token.
    Args:
        token_ids: (N,) the tokens whose experts are counted, such as the most frequent ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_domains: int,
        token_ids: Tensor,
        device: torch.device | str = "cpu",
    ):
        layers, experts = len(config.moe_layers), config.num_choices
        self._zero = zero_counts(config.choices_of_layers, device)  # (L, E)
        self.load = self._zero.repeat(num_domains, 1, 1)
        self.co_activation = torch.zeros(
            layers, experts, experts, dtype=torch.float64, device=device
        )
        self.repeats = torch.zeros(layers, 2, dtype=torch.int64, device=device)
        self.vocabulary = VocabularyCounts(config, token_ids, device)

    def add(self, batch: Batch, routings: Sequence[Routing]) -> Tensor:
        """Count the routes of a forward pass; returns the (B, L, E) assignments by sequence."""
        size, seq_len = batch.input_ids.shape
        device = self.load.device
        by_sequence = self._zero.repeat(size, 1, 1)
        documents = batch.document_ids.to(device)
        for layer, routing in enumerate(routings):
            num_experts = routing.router_logits.shape[-1]
            by_sequence[:, layer, :num_experts] = counts_by_sequence(routing, size)
            together = co_activation_counts(routing.chosen_indices, num_experts)
            self.co_activation[layer, :num_experts, :num_experts] += together
            chosen = first_choice(routing).view(size, seq_len)
            self.repeats[layer] += torch.stack(repeats(chosen, documents))
        self.load.index_add_(0, batch.domain_ids.to(device), by_sequence)
        self.vocabulary.add(batch.input_ids.flatten().to(device), routings)
        return by_sequence

    def all_reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks; `reduce` sums one tensor."""
        self.load, self.co_activation = reduce(self.load), reduce(self.co_activation)
        self.repeats = reduce(self.repeats)
        self.vocabulary.all_reduce(reduce)

    @property
    def repeat_rate(self) -> Tensor:
        """(L,) P(first choice = that of the token before, in the same document)."""
        same, pairs = self.repeats.double().unbind(-1)
        return same / pairs.clamp(min=1)


class TopToken(NamedTuple):
    """A token that an expert is fond of: its id, the share of its occurrences that went to the
    expert (K / E by chance), and how often it occurred."""

    token_id: int
    share: float
    occurrences: int


class VocabularyCounts:
    """How the occurrences of chosen tokens spread over the experts of each layer.

    Attributes:
        token_ids: (N,) the tokens. occurrences: (N,) int64 of each. assignments: (L, E, N) int64,
            0 where a layer has no such expert. num_experts: of each layer.
    """

    def __init__(self, config: ModelConfig, token_ids: Tensor, device: torch.device | str = "cpu"):
        number = len(token_ids)
        self.num_experts = config.choices_of_layers
        shape = len(config.moe_layers), config.num_choices, number
        self.token_ids = token_ids.to(device)
        self.occurrences = torch.zeros(number, dtype=torch.int64, device=device)
        self.assignments = torch.zeros(shape, dtype=torch.int64, device=device)
        # Place of each token among `token_ids`; the last one is of all that are not counted.
        assert config.vocab_size is not None
        self._place = torch.full((config.vocab_size,), number, device=device)
        self._place[self.token_ids] = torch.arange(number, device=device)

    def add(self, ids: Tensor, routings: Sequence[Routing]) -> None:
        """Count (T,) tokens and the experts chosen for each; ids below 0 count nowhere."""
        self.add_routes(ids, [routing.chosen_indices for routing in routings])

    def add_routes(self, ids: Tensor, routes: Sequence[Tensor]) -> None:
        """As `add`, from the (T, K) experts of each layer, -1 for none."""
        number = len(self.token_ids)
        place = torch.where(ids < 0, number, self._place[ids.clamp(min=0)])  # (T,)
        counts = self.occurrences.new_zeros(number + 1)
        self.occurrences += counts.index_add_(0, place, torch.ones_like(place))[:-1]
        num_experts = self.assignments.shape[1]
        for layer, expert in enumerate(routes):
            expert = torch.where(expert < 0, num_experts, expert)  # (T, K)
            cell = (expert * (number + 1) + place.unsqueeze(-1)).flatten()
            flat = counts.new_zeros((num_experts + 1) * (number + 1))
            flat.index_add_(0, cell, torch.ones_like(cell))
            self.assignments[layer] += flat.view(num_experts + 1, number + 1)[:-1, :-1]

    def all_reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks; `reduce` sums one tensor."""
        self.occurrences, self.assignments = reduce(self.occurrences), reduce(self.assignments)

    def to_cpu(self) -> None:
        """Bring the counts from the device, where they are looked at one by one."""
        self.token_ids, self.occurrences = self.token_ids.cpu(), self.occurrences.cpu()
        self.assignments, self._place = self.assignments.cpu(), self._place.cpu()

    def top_tokens(
        self, layer: int, expert: int, number: int, least: int = 8
    ) -> tuple[TopToken, ...]:
        """The tokens with the largest share in an expert, of those that occur `least` times; ties
        go to the more frequent, then to the lower id."""
        got = self.assignments[layer, expert].tolist()
        rows = zip(self.token_ids.tolist(), got, self.occurrences.tolist(), strict=True)
        known = [TopToken(i, n / all_of, all_of) for i, n, all_of in rows if n and all_of >= least]
        known.sort(key=lambda token: (-token.share, -token.occurrences, token.token_id))
        return tuple(known[:number])


def frequent_tokens(counts: Tensor, number: int) -> Tensor:
    """Ids of the `number` most frequent tokens that occur at all, in falling order.

    Args: counts: (V,) occurrences; ties go to the lower id.
    """
    order = counts.argsort(descending=True, stable=True)[:number]
    return order[counts[order] > 0]
