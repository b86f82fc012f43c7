"""Which scalars do the numbers of a step, or of an evaluation, become?

Pure functions to {tag: value}; `moe/GLOSSARY.md` explains each tag. `health/` comes first in
TensorBoard's alphabetical order: its page answers whether the run is well. A measure by layer is
`GROUP/MEASURE/layerNN`, over all layers `GROUP/MEASURE/all_layers` or in `health/`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.measures import (
    coefficient_of_variation,
    dead_experts,
    effective_experts,
    gini,
    least_assignments,
    max_violation,
    starved_experts,
)
from train.alarms import Alarm
from train.metrics import StepMetrics
from train.validation import Evaluation

# How a measure by layer becomes one number of all layers, and its tag where that is in `health/`.
OVER_LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "load/max_violation": (torch.max, "health/max_violation"),
    "load/max_violation_window": (torch.max, "health/max_violation_window"),
    "load/max_violation_validation": (torch.max, None),
    "load/max_violation_sequence": (torch.max, None),
    "load/effective_experts": (torch.min, "health/effective_experts"),
    "load/dead_experts": (torch.sum, "health/dead_experts"),
    "load/dead_experts_validation": (torch.sum, None),
    "load/starved_experts": (torch.sum, "health/starved_experts"),
    "load/dropped_percent": (torch.max, "health/dropped_percent"),
    "load/tokens_per_expert_min": (torch.min, None),
    "load/tokens_per_expert_max": (torch.max, None),
    "load/coefficient_of_variation": (torch.max, None),
    "load/gini": (torch.max, None),
    "router/entropy": (torch.mean, "health/router_entropy"),
    "router/confidence": (torch.mean, None),
    "router/margin": (torch.mean, None),
    "router/logit_norm": (torch.mean, None),
    "router/logsumexp": (torch.mean, None),
    "router/logit_max": (torch.max, "health/logit_max"),
    "router/bias_range": (torch.max, None),
    "router/overlap_with_last_evaluation": (torch.mean, None),
    "specialisation/domain_information": (torch.mean, None),
    "specialisation/domain_information_shuffled": (torch.mean, None),
    "specialisation/domain_divergence": (torch.mean, None),
    "specialisation/repeat_rate": (torch.mean, None),
}


class StepFacts(NamedTuple):
    """What is logged of a step beside its StepMetrics.

    window: (L, E) assignments, `LoadWindow`. seconds: of the step. mfu: None where the peak is not
    known. bias: (L, E) of the routers, NaN where one has none, None where none has. alarms: raised
    at the step.
    """

    window: Tensor
    seconds: float
    mfu: float | None = None
    bias: Tensor | None = None
    alarms: tuple[Alarm, ...] = ()


def layer_tag(layer: int) -> str:
    """The end of the tags of a layer: TensorBoard sorts them as text."""
    return f"layer{layer:02d}"


def chart_layout(layers: tuple[int, ...]) -> dict:
    """The page "custom scalars": all layers of one measure in a chart."""
    if not layers:
        return {}
    pages: dict[str, dict[str, list]] = {"load": {}, "router": {}, "specialisation": {}}
    for measure in OVER_LAYERS:
        group, name = measure.split("/")
        if not name.endswith("_shuffled"):
            lines = [f"{measure}/{layer_tag(layer)}" for layer in layers]
            pages[group][f"{name.replace('_', ' ')} by layer"] = ["Multiline", lines]
    return pages


def by_layer(measures: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, float]:
    """Scalars of measures `GROUP/MEASURE` (L,): of each layer and over them."""
    values = {}
    for measure, each in measures.items():
        reduce, tag = OVER_LAYERS[measure]
        values[tag or f"{measure}/all_layers"] = float(reduce(each.double()))
        for layer, value in zip(layers, each.tolist(), strict=True):
            values[f"{measure}/{layer_tag(layer)}"] = value
    return values


def load_measures(
    tokens_per_expert: Tensor, num_dropped: Tensor, window: Tensor
) -> dict[str, Tensor]:
    """Tensors (L,) by name, of (L, E) assignments of a step and of a window, (L,) those of
    the step that were dropped."""
    made = tokens_per_expert.clamp(min=0).sum(-1).clamp(min=1)
    return {
        "max_violation": max_violation(tokens_per_expert),
        "max_violation_window": max_violation(window),
        "coefficient_of_variation": coefficient_of_variation(tokens_per_expert),
        "gini": gini(tokens_per_expert),
        "effective_experts": effective_experts(tokens_per_expert),
        "dead_experts": dead_experts(window),
        "starved_experts": starved_experts(window),
        "tokens_per_expert_min": least_assignments(tokens_per_expert),
        "tokens_per_expert_max": tokens_per_expert.amax(-1),
        "dropped_percent": 100 * num_dropped / made,
    }


def bias_scalars(bias: Tensor, layers: tuple[int, ...]) -> dict[str, float]:
    """Scalars of (L, E) biases of the routers, of the layers that have one."""
    present = ~bias.isnan()  # (L, E)
    having = present.any(-1)
    highest = bias.masked_fill(~present, -math.inf).amax(-1)
    lowest = bias.masked_fill(~present, math.inf).amin(-1)
    which = tuple(layer for layer, has in zip(layers, having.tolist(), strict=True) if has)
    return by_layer({"router/bias_range": (highest - lowest)[having]}, which)


def step_scalars(
    metrics: StepMetrics, facts: StepFacts, layers: tuple[int, ...]
) -> dict[str, float]:
    """Scalars of one step, of a model with these routed layers."""
    values = {
        "health/lm_loss": metrics.lm_loss,
        "health/gradient_norm": metrics.gradient_norm,
        "health/alarms": len(facts.alarms),
        "optimizer/learning_rate": metrics.learning_rate,
        "speed/tokens_per_second": metrics.num_tokens / facts.seconds,
        "speed/step_time_ms": facts.seconds * 1e3,
    }
    if facts.mfu is not None:
        values["speed/mfu"] = facts.mfu
    if len(metrics.work_seconds) > 1 and metrics.work_seconds.any():
        work = metrics.work_seconds
        values["speed/slowest_rank_share"] = float(work.max() / work.mean().clamp(min=1e-9))
    for name, value in metrics.aux_losses.items():
        values[f"loss/{name}"] = value
        values[f"loss/{name}_coefficient"] = metrics.aux_coefficients[name]
    measures: dict[str, Tensor] = {}
    if layers:
        load = load_measures(metrics.tokens_per_expert, metrics.num_dropped, facts.window)
        measures = {f"load/{name}": value for name, value in load.items()}
    if facts.bias is not None:
        values |= bias_scalars(facts.bias, layers)
    detail = metrics.detail
    if detail is not None:
        values["speed/memory_gib"] = detail.memory_gib
        for group, norm in detail.gradient_norms.items():
            values[f"norm/gradient_{group}"] = norm
        for group, norm in detail.weight_norms.items():
            values[f"norm/weight_{group}"] = norm
        if layers:
            means = detail.routers._asdict().items()
            measures |= {f"router/{name}": value for name, value in means}
    return values | by_layer(measures, layers)


def evaluation_scalars(
    evaluation: Evaluation, overlap: Tensor | None, layers: tuple[int, ...]
) -> dict[str, float]:
    """Scalars of one evaluation; overlap (L,) of its routes with those before, None without."""
    values = {"validation/mean_loss": evaluation.mean_loss}
    values |= {f"validation/domain/{name}": loss for name, loss in evaluation.loss.items()}
    if not layers:
        return values
    load = evaluation.tokens_per_expert.sum(0)  # (L, E)
    measures = {
        "load/max_violation_validation": max_violation(load),
        "load/dead_experts_validation": dead_experts(load),
        "load/max_violation_sequence": evaluation.sequence_violation,
        "specialisation/domain_information": evaluation.information,
        "specialisation/domain_information_shuffled": evaluation.shuffled_information,
        "specialisation/domain_divergence": evaluation.divergence,
        "specialisation/repeat_rate": evaluation.repeat_rate,
    }
    if overlap is not None:
        measures["router/overlap_with_last_evaluation"] = overlap
    return values | by_layer(measures, layers)
