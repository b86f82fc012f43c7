"""Do metrics and alarms know the experts and choices of each layer?"""

import math

import numpy as np
import pytest
import torch
from mixed_cases import CHOICES, EXPERTS, choices, mixed_config, scalars_by_hand
from training_cases import MIXED, make_config, make_engine, micro_batches

from train.alarms import SPIKE_LEAST, Alarms
from train.metrics import WINDOW_STEPS, LoadWindow, StepMetrics
from train.scalars import StepFacts, load_measures, step_scalars
from train.step import train_step

WORST = {
    "max_violation": (max, "health/max_violation"),
    "effective_experts": (min, "health/effective_experts"),
    "dead_experts": (sum, "health/dead_experts"),
    "starved_experts": (sum, "health/starved_experts"),
    "coefficient_of_variation": (max, "load/coefficient_of_variation/all_layers"),
    "gini": (max, "load/gini/all_layers"),
    "tokens_per_expert_min": (min, "load/tokens_per_expert_min/all_layers"),
    "tokens_per_expert_max": (max, "load/tokens_per_expert_max/all_layers"),
    "dropped_percent": (max, "health/dropped_percent"),
}


def test_the_tags_of_a_step_are_those_of_each_layer_alone(tmp_path):
    # Few tokens, so that real experts go without one.
    changes = {"training.seq_len": 2, "training.batch_size": 2, "training.micro_batch_size": 1}
    config = make_config(tmp_path, MIXED | changes)
    engine, collected = make_engine(config), []
    metrics = train_step(
        engine, micro_batches(config), 0, config, seen=collected.append, detail=True
    )
    loads = [
        sum(choices(routings[layer].topk_indices, number) for routings in collected)
        for layer, number in enumerate(EXPERTS)
    ]
    assert [load.sum() for load in loads] == [4 * chosen for chosen in CHOICES]
    window = LoadWindow().add(metrics.tokens_per_expert)
    values = step_scalars(metrics, StepFacts(window, 1.0), (0, 1, 2))
    expected = scalars_by_hand(loads)
    assert sum(expected["dead_experts"]) > 0
    for measure, by_layer in expected.items():
        found = [values[f"load/{measure}/layer{layer:02d}"] for layer in range(3)]
        assert found == pytest.approx(by_layer, rel=1e-6, abs=1e-9), measure
        reduce, tag = WORST[measure]
        assert values[tag] == pytest.approx(reduce(by_layer), rel=1e-6, abs=1e-9), tag
    for layer, number in enumerate(EXPERTS):
        logits = np.concatenate([r[layer].router_logits.detach().numpy() for r in collected])
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        entropy = -(probs * np.log(probs)).sum(1).mean() / math.log(number)
        assert values[f"router/entropy/layer{layer:02d}"] == pytest.approx(entropy, rel=1e-5)
        assert metrics.detail.logit_counts[layer].sum() == 4 * number


def watched(load: torch.Tensor, steps: int, *, dropped: int = 0) -> list[str]:
    """The texts of the alarms of so many steps of the same load; the last one drops assignments."""
    model = mixed_config()
    alarms, window, texts = Alarms(model), LoadWindow(), []
    for step in range(1, steps + 1):
        window.add(load)
        lost = torch.tensor([dropped * (step == steps), 0, 0])
        metrics = StepMetrics(
            step, 4.0, {}, {}, 0.1, 1.0, load, lost, torch.zeros(1), num_tokens=80
        )
        texts += [alarm.text for alarm in alarms.check(metrics, window)]
        restored = Alarms(model)
        restored.restore(alarms.state())
        alarms = restored
    return texts


def test_alarms_know_each_layers_experts_and_choices():
    even = torch.tensor([[10] * 4 + [-1] * 4, [10] * 8, [10] * 6 + [-1] * 2])
    assert watched(even, WINDOW_STEPS + 1) == []
    dead = even.clone()
    dead[2, 5] = 0
    (text,) = watched(dead, WINDOW_STEPS + 1)
    assert "dead expert: layer 2, expert 5: no token" in text
    # Layer 0 has one expert a token: 1.3 of 4 are a collapse from 1 + 0.1 * 3 on.
    collapsed = even.clone()
    collapsed[0, :4] = torch.tensor([60, 0, 0, 0])
    # Three of six are what layer 2 has at the least, and within 3 + 0.1 * 3.
    collapsed[2, :6] = torch.tensor([30, 30, 30, 0, 0, 0])
    first, second = watched(collapsed, 25)
    assert "collapse: layer 0 uses 1.0 of 4 experts" in first and "expert 0 (100%" in first
    assert "collapse: layer 2 uses 3.0 of 6 experts" in second and "(100% of" in second


def test_dropped_assignments_are_a_share_of_those_that_were_made():
    load = torch.tensor([[10] * 4 + [-7] * 4, [10] * 8, [10] * 6 + [-7] * 2])
    measures = load_measures(load, torch.tensor([10, 20, 40]), load)
    assert measures["dropped_percent"].tolist() == pytest.approx([25, 25, 200 / 3])
    (text,) = watched(load, SPIKE_LEAST + 1, dropped=10)
    assert "drop spike: layer 0 dropped 25.0% of its assignments" in text
