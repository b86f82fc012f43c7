"""Which experts does a model need? Its loss with one expert at a time switched off."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.model import MoETransformer
from moe.routing import stack_layers
from train.analysis_text import HeldOutText, num_labels, progress, read, sum_by_domain
from train.packing import Batch


class Ablation(NamedTuple):
    """L routed layers, E experts, the most that a layer has; what is said of others is 0.

    rise: (domains, L, E) float64 nats per token that the loss of a domain rises by without the
    expert. loss: (domains,) with all experts. labels: (domains,) tokens that were predicted, 0
    where there is no text. assignments: (L, E) int64 of the text.
    """

    rise: Tensor
    loss: Tensor
    labels: Tensor
    assignments: Tensor

    @property
    def mean_rise(self) -> Tensor:
        """(L, E) mean over domains with text, each counting the same."""
        return self.rise[self.labels > 0].mean(0)


def ablate_experts(model: MoETransformer, text: HeldOutText) -> Ablation:
    """Switch off one expert of one layer at a time, and read the text again.

    The expert's assignments are taken away; the other experts of those tokens stay, their weights
    as the router computes them without it (with `normalize`, they share out its weight). Later
    layers choose anew. A capacity (`eval_capacity_factor`) is that of the assignments left.

    Raises:
        ValueError: if the model's router cannot take routes.
    """
    config = model.config
    num_domains = len(text.data.domain_names)
    layers, num_experts = len(config.moe_layers), config.choices_of_layers
    loss, labels = torch.zeros(2, num_domains, dtype=torch.float64)
    assignments = torch.zeros(layers, config.num_choices, dtype=torch.int64)
    whole = []
    for batch in text.mixed_batches():
        reading = read(model, batch)
        # Not the logits: those of all layers and tokens would not be bounded.
        routes = [routing.chosen_indices for routing in reading.routings]
        whole.append((batch, reading.losses, routes))
        loss += sum_by_domain(reading.losses, batch.domain_ids, num_domains)
        labels += num_labels(batch, num_domains)
        counts = [routing.demand for routing in reading.routings]
        assignments += stack_layers(counts, fill=0).cpu()
    rise = torch.zeros(num_domains, *assignments.shape, dtype=torch.float64)
    with progress("ablation", sum(num_experts), "experts") as done:
        for layer in range(layers):
            for expert in range(num_experts[layer]):
                # Without a token, its absence cannot be noticed.
                for batch, losses, routes in whole if assignments[layer, expert] else ():
                    without = read(model, batch, _routes_without(batch, routes, layer, expert))
                    difference = without.losses.double() - losses
                    rise[:, layer, expert] += sum_by_domain(
                        difference, batch.domain_ids, num_domains
                    )
                done(1)
    each = labels.clamp(min=1)
    return Ablation(rise / each[:, None, None], loss / each, labels, assignments)


def _routes_without(
    batch: Batch, routes: list[Tensor], layer: int, expert: int
) -> list[Tensor | None]:
    """The routes (T, K) of one layer with -1 in the place of an expert; the others are free."""
    chosen = routes[layer].view(*batch.input_ids.shape, -1)  # (B, S, K)
    without: list[Tensor | None] = [None] * len(routes)
    without[layer] = chosen.masked_fill(chosen == expert, -1)
    return without
