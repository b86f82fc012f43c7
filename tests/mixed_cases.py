"""A model whose layers differ, and what is known of them without it: three layers of 4, 8 and 6
experts, of which a token has 1, 2 and 3; the second one's are hashed."""

import math

import numpy as np
import torch
from model_cases import tiny_config, tiny_model

from moe.config import ModelConfig
from moe.model import MoETransformer

EXPERTS, CHOICES, WIDTHS = (4, 8, 6), (1, 2, 3), (16, 24, 8)
LAYERS = [
    {"layers": [1], "num_experts": 8, "intermediate_size": 24, "router": {"name": "hash"}},
    {
        "layers": [2],
        "num_experts": 6,
        "intermediate_size": 8,
        "router": {"name": "topk", "top_k": 3},
    },
]
MOE = {
    "num_experts": 4,
    "intermediate_size": 16,
    "router": {"name": "topk", "top_k": 1, "normalize": False},
    "layers": LAYERS,
}


def mixed_config(**changes) -> ModelConfig:
    return tiny_config(**{"num_layers": 3, "moe": MOE, **changes})


def mixed_model(**changes) -> MoETransformer:
    return tiny_model(**{"num_layers": 3, "moe": MOE, **changes})


def choices(indices: torch.Tensor, num_experts: int) -> np.ndarray:
    """How often each expert of a layer was chosen."""
    chosen = indices.numpy().ravel()
    return np.bincount(chosen[chosen >= 0], minlength=num_experts)


def scalars_by_hand(loads: list[np.ndarray]) -> dict[str, list[float]]:
    """By measure, a number a layer."""
    found: dict[str, list[float]] = {}
    for load in loads:
        mean, share = load.mean(), load[load > 0] / load.sum()
        differences = np.abs(np.subtract.outer(load, load)).sum()
        each = {
            "max_violation": load.max() / mean - 1,
            "effective_experts": math.exp(-(share * np.log(share)).sum()),
            "dead_experts": (load == 0).sum(),
            "starved_experts": (load < 0.1 * mean).sum(),
            "coefficient_of_variation": load.std() / mean,
            "gini": differences / (2 * len(load) ** 2 * mean),
            "tokens_per_expert_min": load.min(),
            "tokens_per_expert_max": load.max(),
            "dropped_percent": 0.0,
        }
        for measure, value in each.items():
            found.setdefault(measure, []).append(float(value))
    return found
