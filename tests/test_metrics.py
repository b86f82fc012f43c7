"""What stands in TensorBoard of each step, read back and computed again another way."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_cases import LAYERS, LOGGED, tag_of, values
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from training_cases import NUM_STEPS, ROOT, make_config, make_engine, micro_batches

from train.checkpoint import load_checkpoint
from train.engine import load_model

pytest_plugins = ["metrics_fixtures"]

# By layer; over layers in `health/` under the second name, else as `.../all_layers`.
BY_LAYER = {
    "load/max_violation": "health/max_violation",
    "load/max_violation_window": "health/max_violation_window",
    "load/max_violation_validation": None,
    "load/dead_experts_validation": None,
    "load/max_violation_sequence": None,
    "load/effective_experts": "health/effective_experts",
    "load/dead_experts": "health/dead_experts",
    "load/starved_experts": "health/starved_experts",
    "load/dropped_percent": "health/dropped_percent",
    "load/tokens_per_expert_min": None,
    "load/tokens_per_expert_max": None,
    "load/coefficient_of_variation": None,
    "load/gini": None,
    "router/entropy": "health/router_entropy",
    "router/confidence": None,
    "router/margin": None,
    "router/logit_norm": None,
    "router/logsumexp": None,
    "router/logit_max": "health/logit_max",
    "router/bias_range": None,
    "router/overlap_with_last_evaluation": None,
    "specialisation/domain_information": None,
    "specialisation/domain_information_shuffled": None,
    "specialisation/domain_divergence": None,
    "specialisation/repeat_rate": None,
}


def test_the_tags_are_these_and_no_others(logged):
    _, events, _ = logged
    tags = events.Tags()
    layered = {tag_of(measure, layer) for measure in BY_LAYER for layer in LAYERS}
    over_layers = {tag or f"{measure}/all_layers" for measure, tag in BY_LAYER.items()}
    assert set(tags["scalars"]) == layered | over_layers | {
        "health/alarms",
        "health/gradient_norm",
        "health/lm_loss",
        "loss/load_balancing",
        "loss/load_balancing_coefficient",
        "loss/router_z_loss",
        "loss/router_z_loss_coefficient",
        "norm/gradient_dense",
        "norm/gradient_experts",
        "norm/gradient_router",
        "norm/weight_dense",
        "norm/weight_experts",
        "norm/weight_router",
        "optimizer/learning_rate",
        "speed/memory_gib",
        "speed/step_time_ms",
        "speed/tokens_per_second",
        "validation/mean_loss",
        "validation/domain/prose",
        "validation/domain/sums",
    }
    pictures = ("load/history", "specialisation/domains", "specialisation/co_activation")
    by_layer = {tag_of(name, layer) for name in pictures for layer in LAYERS}
    assert set(tags["images"]) == {"load/heat_map", "router/bias"} | by_layer
    spreads = ("load/share", "router/logits")
    assert set(tags["histograms"]) == {tag_of(name, layer) for name in spreads for layer in LAYERS}
    texts = {tag for tag in tags["tensors"] if tag.endswith("/text_summary")}
    assert texts == {"config/text_summary", "samples/text_summary"} | {
        f"{tag_of('specialisation/top_tokens', layer)}/text_summary" for layer in LAYERS
    }


def test_the_glossary_explains_each_tag_and_no_other(logged):
    _, events, _ = logged
    glossary = (ROOT / "moe" / "GLOSSARY.md").read_text()
    cells = [line.split("|")[1] for line in glossary.splitlines() if line.startswith("| `")]
    rows = [name for cell in cells for name in re.findall("`(.*?)`", cell)]
    # Written only with an alarm, on a GPU, over ranks.
    elsewhere = {"alarms", "speed/mfu", "speed/slowest_rank_share"}
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]]
    tags += [
        tag.removesuffix("/text_summary")
        for tag in events.Tags()["tensors"]
        if not tag.startswith("custom_scalars")
    ]
    plain = {re.sub(r"/(layer\d+|all_layers)$", "", tag) for tag in tags}
    plain = {"loss/NAME_coefficient" if t.endswith("_coefficient") else t for t in plain}
    plain = {
        "loss/NAME" if t in ("loss/load_balancing", "loss/router_z_loss") else t for t in plain
    }
    domains = {"validation/domain/prose", "validation/domain/sums"}
    plain = {"validation/domain/DOMAIN" if tag in domains else tag for tag in plain}
    assert sorted(rows) == sorted(plain | elsewhere)
    assert "moe/GLOSSARY.md" in (ROOT / "README.md").read_text()


def test_scalars_of_a_step_are_what_the_step_returned(logged):
    _, events, steps = logged
    config = make_config(Path("unused"), LOGGED)
    loss_weights = {loss.name: loss.weight for loss in config.model.moe.losses}
    for metrics in steps:
        for tag, expected in {
            "health/lm_loss": metrics.lm_loss,
            "optimizer/learning_rate": metrics.learning_rate,
            "health/gradient_norm": metrics.gradient_norm,
            **{f"loss/{name}": value for name, value in metrics.aux_losses.items()},
            **{f"loss/{name}_coefficient": weight for name, weight in loss_weights.items()},
        }.items():
            assert values(events, tag)[metrics.step] == pytest.approx(expected, rel=1e-6), tag
    assert loss_weights == {"load_balancing": 0.01, "router_z_loss": 0.001}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def load_by_hand(load, window):
    """Measures of one layer's counts in plain Python, exact where they are counts."""
    mean = sum(load) / len(load)
    shares = [count / sum(load) for count in load]
    differences = sum(abs(a - b) for a in load for b in load)
    return {
        "load/max_violation": max(load) / mean - 1,
        "load/max_violation_window": max(window) / (sum(window) / len(window)) - 1,
        "load/effective_experts": math.exp(-sum(p * math.log(p) for p in shares if p)),
        "load/dead_experts": window.count(0),
        "load/starved_experts": sum(c < 0.1 * sum(window) / len(window) for c in window),
        "load/dropped_percent": 0,
        "load/tokens_per_expert_min": min(load),
        "load/tokens_per_expert_max": max(load),
        "load/coefficient_of_variation": math.sqrt(sum((c - mean) ** 2 for c in load) / 4) / mean,
        "load/gini": differences / (2 * len(load) ** 2 * mean),
    }


def router_by_hand(logits):
    """Measures of one layer's (T, E) logits, top-2, softmax."""
    p = softmax(logits)
    ranked = np.sort(p, -1)[:, ::-1]
    return {
        "router/entropy": -(p * np.log(p)).sum(-1).mean() / math.log(p.shape[-1]),
        "router/confidence": ranked[:, 0].mean(),
        "router/margin": (ranked[:, 1] - ranked[:, 2]).mean(),
        "router/logit_norm": np.sqrt((logits**2).sum(-1)).mean(),
        "router/logsumexp": np.log(np.exp(logits).sum(-1)).mean(),
        "router/logit_max": np.abs(logits).max(),
    }


EXACT = {
    "load/dead_experts",
    "load/starved_experts",
    "load/tokens_per_expert_min",
    "load/tokens_per_expert_max",
}
OVER = {"min": min, "max": max, "sum": sum, "mean": lambda v: sum(v) / len(v)}
OVER_LAYERS = {
    "load/effective_experts": "min",
    "load/tokens_per_expert_min": "min",
    "load/dead_experts": "sum",
    "load/starved_experts": "sum",
    "router/entropy": "mean",
    "router/confidence": "mean",
    "router/margin": "mean",
    "router/logit_norm": "mean",
    "router/logsumexp": "mean",
}


def test_measures_are_those_of_the_routes_computed_again_from_checkpoints(logged):
    run_dir, events, _ = logged
    config = make_config(run_dir, LOGGED)
    engine = make_engine(config)
    loads = []
    for step in range(NUM_STEPS):
        if step:
            found = load_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
            load_model(engine.model, found.tensors["model"])
        outputs = [engine(batch) for batch in micro_batches(config, step)]
        routes = [torch.cat([o.routings[i].topk_indices for o in outputs]) for i in (0, 1)]
        loads.append([[int((r == e).sum()) for e in range(4)] for r in routes])
        by_layer = []
        for index in (0, 1):
            logits = torch.cat([o.routings[index].router_logits for o in outputs]).detach()
            window = [sum(load[index][e] for load in loads) for e in range(4)]
            measures = load_by_hand(loads[-1][index], window)
            by_layer.append(measures | router_by_hand(logits.double().numpy()))
        assert sum(loads[-1][0]) == 4 * 16 * 2
        for name in by_layer[0]:
            exact = name in EXACT
            for index, layer in enumerate(LAYERS):
                expected, got = by_layer[index][name], values(events, tag_of(name, layer))[step + 1]
                assert got == (expected if exact else pytest.approx(expected, rel=1e-4, abs=1e-6))
            over = OVER[OVER_LAYERS.get(name, "max")]([each[name] for each in by_layer])
            tag = BY_LAYER[name] or f"{name}/all_layers"
            assert values(events, tag)[step + 1] == pytest.approx(over, rel=1e-4, abs=1e-6), tag


def test_biases_and_norms_are_those_of_the_checkpoints(logged):
    run_dir, events, _ = logged
    for step in range(1, NUM_STEPS):
        weights = load_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}").tensors["model"]
        squares = dict.fromkeys(("router", "experts", "dense"), 0.0)
        for name, value in weights.items():
            if "expert_bias" in name:
                continue
            group = (
                "experts" if ".experts." in name else "router" if ".router." in name else "dense"
            )
            squares[group] += float(value.double().square().sum())
        for group, square in squares.items():
            # The weights of step n + 1 are those that step n has left.
            logged_norm = values(events, f"norm/weight_{group}")[step + 1]
            assert logged_norm == pytest.approx(math.sqrt(square), rel=1e-5), group
        parts = [values(events, f"norm/gradient_{group}")[step] ** 2 for group in squares]
        whole = values(events, "health/gradient_norm")[step]
        assert math.sqrt(sum(parts)) == pytest.approx(whole, rel=1e-5)
        for layer in LAYERS:
            bias = weights[f"blocks.{layer}.feed_forward.router.expert_bias"]
            spread = float(bias.max() - bias.min())
            assert values(events, tag_of("router/bias_range", layer))[step] == pytest.approx(spread)


def test_speed_and_time_belong_together(logged):
    _, events, _ = logged
    times = values(events, "speed/step_time_ms")
    for step, speed in values(events, "speed/tokens_per_second").items():
        assert speed * times[step] / 1e3 == pytest.approx(4 * 16, rel=1e-5)
    assert all(0.01 < gib < 1000 for gib in values(events, "speed/memory_gib").values())


def test_hyper_parameters_stand_beside_the_validation_loss(logged):
    _, events, _ = logged
    contents = events.PluginTagToContent("hparams")
    assert set(contents) == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    start = HParamsPluginData.FromString(contents["_hparams_/session_start_info"])
    found = start.session_start_info.hparams
    assert found["optimizer.learning_rate"].number_value == 0.02
    assert found["model.moe.router.name"].string_value == "topk"
    assert found["model.attention.window"].string_value == "none"
    assert found["model.moe.losses.load_balancing.weight"].number_value == 0.01
    assert found["optimizer.betas.1"].number_value == 0.95
    experiment = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["validation/mean_loss"]
