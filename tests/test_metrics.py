"""What stands in TensorBoard, read back and computed again another way."""

import errno
import io
import math
import re
import shutil
import signal
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch._subclasses.fake_tensor import FakeTensorMode
from training_cases import (
    EVALUATE_EVERY,
    NUM_STEPS,
    ROOT,
    Recorder,
    at,
    checkpoint,
    data,
    launcher,
    make_config,
    make_engine,
    micro_batches,
    run,
    write_config,
)

import train.loop
import train.pretrain
from kernels.routing import fused_topk
from moe.routing import make_routing
from train import metrics_bench
from train.alarms import Alarm
from train.checkpoint import load_checkpoint
from train.engine import load_model
from train.figures import (
    bias_map,
    co_activation_map,
    domain_expert_map,
    load_heat_map,
    load_history,
    render,
)
from train.metrics import (
    HISTORY_INTERVALS,
    NORM_GROUPS,
    WINDOW_STEPS,
    LoadHistory,
    LoadWindow,
    norm_group,
    routing_sums,
)
from train.metrics_writer import MetricsWriter
from train.probe import ProbeRoutes
from train.scalars import StepFacts
from train.step import train_step
from train.validation import evaluate

# Without noise, so that a forward pass of the test chooses what the run chose.
LOGGED = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "model.moe.num_dense_layers": 1,
    "model.num_layers": 3,
    "logging.tensorboard": True,
    "logging.heatmap_every": 4,
    "evaluation.sample_prompts": ["moss"],
    "evaluation.sample_tokens": 3,
}
LAYERS = (1, 2)


def read(run_dir: Path) -> EventAccumulator:
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=dict.fromkeys(kinds, 0))
    return events.Reload()


def values(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Value by step; a step that is there twice is an error."""
    found = events.Scalars(tag)
    steps = [scalar.step for scalar in found]
    assert len(set(steps)) == len(steps), f"{tag} has steps twice: {steps}"
    return {scalar.step: scalar.value for scalar in found}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run with a checkpoint at each step, its events and what its steps returned."""
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    saving = {"checkpoint.every": 1, "checkpoint.keep_last": 100}
    with Recorder() as recorder:
        assert run(run_dir, LOGGED | saving) == 0
    return run_dir, read(run_dir), recorder.steps


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
EVALUATED = [*range(EVALUATE_EVERY, NUM_STEPS + 1, EVALUATE_EVERY), NUM_STEPS]


def tag_of(measure, layer):
    return f"{measure}/layer{layer:02d}"


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


def test_gradient_norms_tell_router_experts_and_the_rest_apart(tmp_path):
    config = make_config(tmp_path)
    engine = make_engine(config)
    for parameter in engine.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    layer = engine.model.blocks[0].feed_forward
    layer.router.weight.grad[0, 0] = 3.0
    layer.router.weight.grad[1, 0] = 4.0
    layer.experts.w2.grad[1, 0, 0] = 2.0
    engine.model.head.weight.grad[0, 0] = 7.0
    assert engine.norms(gradients=True).tolist() == pytest.approx([5, 2, 7])
    assert NORM_GROUPS == ("router", "experts", "dense")
    latent = ("latent_down", "latent_up")
    for outside in ("shared_experts.w1", "shared_gate", *latent, "zero_computation"):
        assert norm_group(f"blocks.0.feed_forward.{outside}.weight") == "dense"


def test_histograms_are_of_the_window_and_of_all_logits(logged):
    run_dir, events, steps = logged
    window = sum(metrics.tokens_per_expert for metrics in steps[:4]).numpy()
    config = make_config(run_dir, LOGGED)
    engine = make_engine(config)
    load_model(
        engine.model, load_checkpoint(run_dir / "checkpoints/step_00000003").tensors["model"]
    )
    outputs = [engine(batch) for batch in micro_batches(config, 3)]
    for index, layer in enumerate(LAYERS):
        first = events.Histograms(tag_of("load/share", layer))[0]
        share = window[index] / window[index].mean()
        assert first.step == 4 and first.histogram_value.num == 4
        assert first.histogram_value.sum == pytest.approx(4)
        assert first.histogram_value.max == pytest.approx(share.max(), rel=1e-6)
        assert first.histogram_value.min == pytest.approx(share.min(), rel=1e-6)
        logits = torch.cat([o.routings[index].router_logits for o in outputs]).detach().numpy()
        found = events.Histograms(tag_of("router/logits", layer))[0].histogram_value
        counts, edges = np.histogram(logits, bins=128, range=(-16, 16))
        assert list(found.bucket) == counts.tolist() and sum(counts) == 4 * 16 * 4
        assert list(found.bucket_limit) == pytest.approx(edges[1:].tolist())


def test_logits_beyond_the_bounds_and_padding_in_the_histogram():
    logits = torch.tensor([[-99.0, 99.0, 16.0], [0.1, -0.1, math.nan], [5.0, 5.0, 5.0]])
    valid = torch.tensor([True, True, False])
    routing = make_routing(logits, logits, torch.ones(3, 1), torch.zeros(3, 1).long(), valid)
    counts = routing_sums((routing,), torch.device("cpu"), detail=True).logit_counts[0]
    assert counts.sum() == 5
    assert (counts[0], counts[-1], counts[63], counts[64]) == (1, 2, 1, 1)


def test_evaluations_pictures_and_texts_are_at_their_steps(logged):
    _, events, _ = logged
    for tag in (
        "validation/mean_loss",
        "validation/domain/prose",
        "specialisation/repeat_rate/layer01",
    ):
        assert list(values(events, tag)) == EVALUATED
    mean = values(events, "validation/mean_loss")
    prose, sums = (
        values(events, "validation/domain/prose"),
        values(events, "validation/domain/sums"),
    )
    assert all(mean[s] == pytest.approx((prose[s] + sums[s]) / 2, rel=1e-6) for s in EVALUATED)
    for tag, steps in {
        "load/heat_map": [4, 8],
        "router/bias": [4, 8],
        "load/history/layer01": EVALUATED,
        "specialisation/domains/layer01": EVALUATED,
        "specialisation/co_activation/layer02": EVALUATED,
    }.items():
        pictures = events.Images(tag)
        assert [image.step for image in pictures] == steps
        assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in pictures)
    samples = events.Tensors("samples/text_summary")
    assert [sample.step for sample in samples] == EVALUATED
    assert b"sample: 'moss" in samples[0].tensor_proto.string_val[0]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.02" in config and "hidden_size: 16" in config
    tokens = events.Tensors("specialisation/top_tokens/layer01/text_summary")[-1]
    table = tokens.tensor_proto.string_val[0].decode()
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["0", "1", "2", "3"]


def test_specialisation_is_that_of_the_checkpoint_evaluated_again(logged):
    run_dir, events, _ = logged
    config = make_config(run_dir, LOGGED)
    engine = make_engine(config)
    for step in EVALUATED:
        found = load_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
        load_model(engine.model, found.tensors["model"])
        # Its numbers are computed another way in tests/test_validation.py.
        evaluation = evaluate(engine, data(), 4, config.training.seq_len)
        whole = evaluation.tokens_per_expert.sum(0).double()  # (L, E)
        for measure, expected in {
            "load/max_violation_validation": whole.amax(-1) / whole.mean(-1) - 1,
            "load/dead_experts_validation": (whole == 0).sum(-1),
            "load/max_violation_sequence": evaluation.sequence_violation,
            "specialisation/domain_information": evaluation.information,
            "specialisation/domain_information_shuffled": evaluation.shuffled_information,
            "specialisation/domain_divergence": evaluation.divergence,
            "specialisation/repeat_rate": evaluation.repeat_rate,
        }.items():
            for index, layer in enumerate(LAYERS):
                got = values(events, tag_of(measure, layer))[step]
                assert got == pytest.approx(float(expected[index]), rel=1e-5), (measure, step)
            over = values(events, f"{measure}/all_layers")[step]
            worst = expected.max() if measure.startswith("load/") else expected.mean()
            assert over == pytest.approx(float(worst), rel=1e-5)
        for name, loss in evaluation.loss.items():
            assert values(events, f"validation/domain/{name}")[step] == pytest.approx(
                loss, rel=1e-5
            )


def test_speed_and_time_belong_together(logged):
    _, events, _ = logged
    times = values(events, "speed/step_time_ms")
    for step, speed in values(events, "speed/tokens_per_second").items():
        assert speed * times[step] / 1e3 == pytest.approx(4 * 16, rel=1e-5)
    assert all(0.01 < gib < 1000 for gib in values(events, "speed/memory_gib").values())


def test_routes_of_the_probe_are_compared_between_evaluations(logged):
    run_dir, events, _ = logged
    probe = ProbeRoutes(run_dir / "probe_routes")
    assert probe.steps() == EVALUATED
    for before, step in pairwise(EVALUATED):
        old, new = probe.read(before).numpy(), probe.read(step).numpy()
        assert new.shape == old.shape and new.shape[1:] == (2, 2)
        for index, layer in enumerate(LAYERS):
            same = [len(set(a) & set(b)) for a, b in zip(old[:, index], new[:, index], strict=True)]
            tag = tag_of("router/overlap_with_last_evaluation", layer)
            assert values(events, tag)[step] == pytest.approx(sum(same) / (2 * len(same)))
    first = values(events, "router/overlap_with_last_evaluation/layer01")
    assert list(first) == EVALUATED[1:]


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


def test_dead_experts_are_those_without_a_token_in_the_window():
    window = LoadWindow()
    loads = torch.tensor([[[5, 0, 0, 3]], [[1, 0, 7, 0]]])
    assert (window.add(loads[0]) == 0).sum() == 2
    assert (window.add(loads[1]) == 0).sum() == 1
    for _ in range(WINDOW_STEPS - 1):
        total = window.add(torch.tensor([[2, 0, 0, 2]]))
    # The first step has left the window, the second has not.
    assert total.tolist() == [[1 + 2 * 99, 0, 7, 2 * 99]]
    assert window.add(torch.tensor([[2, 0, 0, 2]])).tolist() == [[200, 0, 0, 200]]


def test_the_history_has_every_step_in_a_bounded_number_of_equal_intervals():
    history, restored = LoadHistory(), LoadHistory()
    for step in range(1, 1001):
        history.add(torch.tensor([[step, 1]]), step)
        if step == 517:
            restored.restore(history.tensors())
        elif step > 517:
            restored.add(torch.tensor([[step, 1]]), step)
    for each in (history, restored):
        assert (
            len(each.counts) <= HISTORY_INTERVALS and each.edges[0] == 0 and each.edges[-1] == 1000
        )
        widths = {b - a for a, b in pairwise(each.edges[:-1])}
        assert widths == {16}
        for (first, last), counts in zip(pairwise(each.edges), each.counts, strict=True):
            assert counts.tolist() == [[sum(range(first + 1, last + 1)), last - first]]


def test_the_heat_map_is_of_the_window(tmp_path):
    config = make_config(tmp_path, LOGGED)
    window = torch.tensor([[30, 34, 31, 33], [20, 22, 64, 22]])
    writer = MetricsWriter(tmp_path, config, 0, pytest.fail)
    facts = StepFacts(window, 1.0)
    engine = make_engine(config)
    metrics = train_step(engine, micro_batches(config), 0, config, detail=True)
    writer.write_load(facts, metrics)
    writer.close()
    encoded = read(tmp_path).Images("load/heat_map")[0].encoded_image_string
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    # Which colour is where in it: tests/test_figures.py.
    assert np.array_equal(pixels, render(load_heat_map(window, LAYERS)))


def test_dropped_tokens_slow_ranks_and_mfu_have_their_numbers(tmp_path):
    config = make_config(tmp_path, LOGGED)
    engine = make_engine(config)
    metrics = train_step(engine, micro_batches(config), 0, config)
    metrics = metrics._replace(
        num_dropped=torch.tensor([0, 32]), work_seconds=torch.tensor([0.1, 0.4, 0.1, 0.2])
    )
    writer = MetricsWriter(tmp_path, config, 0, pytest.fail)
    writer.write_step(metrics, StepFacts(metrics.tokens_per_expert, 1.0, mfu=0.375))
    writer.close()
    events = read(tmp_path)
    # 128 were kept in each layer.
    assert values(events, "load/dropped_percent/layer01")[1] == 0
    assert values(events, "load/dropped_percent/layer02")[1] == pytest.approx(20)
    assert values(events, "health/dropped_percent")[1] == pytest.approx(20)
    assert values(events, "speed/slowest_rank_share")[1] == pytest.approx(2)
    assert values(events, "speed/mfu")[1] == 0.375


def test_pictures_of_an_evaluation_are_of_its_numbers(logged):
    run_dir, events, steps = logged
    config = make_config(run_dir, LOGGED)
    engine = make_engine(config)
    found = load_checkpoint(run_dir / "checkpoints" / "step_00000006")
    load_model(engine.model, found.tensors["model"])
    evaluation = evaluate(engine, data(), 4, config.training.seq_len)
    biases = torch.stack(
        [found.tensors["model"][f"blocks.{n}.feed_forward.router.expert_bias"] for n in LAYERS]
    )
    assert biases.abs().max() > 0

    def pixels(tag, step):
        (image,) = (each for each in events.Images(tag) if each.step == step)
        picture = Image.open(io.BytesIO(image.encoded_image_string))
        return np.asarray(picture.convert("RGB"))

    history = torch.stack([metrics.tokens_per_expert for metrics in steps[:6]])
    for index, layer in enumerate(LAYERS):
        counts = evaluation.tokens_per_expert[:, index : index + 1]
        for tag, figure in {
            "specialisation/domains": domain_expert_map(counts, data().domain_names, (layer,)),
            "specialisation/co_activation": co_activation_map(
                evaluation.co_activation[index], layer
            ),
            "load/history": load_history(history[:, index], tuple(range(7)), layer),
        }.items():
            # Which colour is where in them: tests/test_figures.py.
            assert np.array_equal(pixels(tag_of(tag, layer), 6), render(figure)), tag
    bias = load_checkpoint(run_dir / "checkpoints" / "step_00000004").tensors["model"]
    biases = [bias[f"blocks.{layer}.feed_forward.router.expert_bias"] for layer in LAYERS]
    expected = render(bias_map(torch.stack(biases), LAYERS))
    assert np.array_equal(pixels("router/bias", 4), expected)


def test_a_skipped_step_is_in_no_window(tmp_path, monkeypatch):
    real = train.loop.train_step

    def skip(engine, batches, step, *arguments, **options):
        metrics = real(engine, batches, step, *arguments, **options)
        return metrics._replace(skipped=step in (0, 3))

    monkeypatch.setattr(train.loop, "train_step", skip)
    assert run(tmp_path / "run", LOGGED | {"checkpoint.every": 8}) == 0
    window = checkpoint(tmp_path / "run").tensors["metrics"]["load_window"]
    assert len(window) == NUM_STEPS - 2


# ---- stopped, killed and resumed


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x93NUMPY\x01", b"#" * 100])
def test_a_run_that_goes_back_forgets_the_later_probe(damage, tmp_path):
    changes = LOGGED | {"checkpoint.every": 3, "checkpoint.keep_last": 9}
    assert run(tmp_path / "run", changes) == 0
    folder = tmp_path / "run" / "probe_routes"
    assert ProbeRoutes(folder).steps() == EVALUATED
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    (folder / "step_00000003.npy").write_bytes(damage)
    seen = []
    real = ProbeRoutes.exchange

    def exchange(probe, step, routes):
        seen.append((step, probe.steps()))
        return real(probe, step, routes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeRoutes, "exchange", exchange)
        next_second()
        assert run(tmp_path / "run", changes) == 0
    # A damaged file is compared with nothing, and stops nothing.
    assert seen == [(6, [3]), (8, [3, 6])]


def next_second() -> None:
    """TensorBoard reads the files in the order of the seconds in their names; a start takes more
    than one, but not in a test that has imported everything."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def test_a_resumed_run_has_each_step_once(tmp_path):
    with Recorder(before_step=at(3)) as first:
        assert run(tmp_path / "run", LOGGED) == 143
    next_second()
    with Recorder() as second:
        assert run(tmp_path / "run", LOGGED) == 0
    events = read(tmp_path / "run")
    losses = values(events, "health/lm_loss")
    steps = first.steps + second.steps
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    assert list(losses.values()) == pytest.approx([m.lm_loss for m in steps], rel=1e-6)
    assert list(values(events, "validation/mean_loss")) == [3, 6, 8]


def test_steps_after_the_last_checkpoint_of_a_killed_run_are_replaced(tmp_path):
    """They are done again, here with another rate: the curve is the second one's, without a gap."""
    steps = {"training.steps": 60, "evaluation.every": 0, "checkpoint.every": 10}
    steps |= {"schedule.name": "constant", "logging.tensorboard": True}
    config = write_config(tmp_path / "run", steps)
    process = launcher()
    process.start(config)
    process.wait_for("step 27/60")
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    next_second()
    saved = checkpoint(tmp_path / "run").step
    before = values(read(tmp_path / "run"), "health/lm_loss")
    assert 20 <= saved < 60 and set(range(1, saved + 1)) <= set(before), "flushed with each save"
    assert run(tmp_path / "run", steps | {"optimizer.learning_rate": 0.001}) == 0
    events = read(tmp_path / "run")
    assert list(values(events, "health/lm_loss")) == list(range(1, 61))
    rates = values(events, "optimizer/learning_rate")
    assert all(rates[step] == pytest.approx(0.001) for step in range(saved + 1, 61))
    assert rates[saved] == pytest.approx(0.02)


def test_a_checkpoint_comes_after_its_curves(tmp_path, monkeypatch):
    """A kill right after a save loses nothing that the resumed run does not do again."""
    real_write, real_save, seen = RecordWriter.write, train.pretrain.save_checkpoint, []

    def write(writer, data):
        time.sleep(0.002)
        real_write(writer, data)

    def save(run_dir, step, *arguments, **options):
        seen.append((step, max(values(read(run_dir), "router/entropy/layer02"))))
        return real_save(run_dir, step, *arguments, **options)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(train.pretrain, "save_checkpoint", save)
    assert run(tmp_path / "run", LOGGED | {"checkpoint.every": 2, "evaluation.every": 0}) == 0
    assert seen == [(2, 2), (4, 4), (6, 6), (8, 8)]


def test_what_a_start_without_a_checkpoint_wrote_is_moved_aside(tmp_path):
    process = launcher()
    process.start(write_config(tmp_path / "run", LOGGED | {"training.steps": 5000, "seed": 1}))
    process.wait_for("step 9/5000")
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for name in ("checkpoints", "config.yaml"):
        path = tmp_path / "run" / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    next_second()
    assert run(tmp_path / "run", LOGGED) == 0
    events = read(tmp_path / "run")
    assert list(values(events, "health/lm_loss")) == list(range(1, NUM_STEPS + 1))
    assert list(values(events, "validation/mean_loss")) == EVALUATED
    assert any((tmp_path / "run" / "tensorboard_abandoned").glob("events.out.*"))


def test_all_alarms_of_a_step_are_in_its_text(tmp_path):
    config = make_config(tmp_path, LOGGED)
    writer = MetricsWriter(tmp_path, config, 0, pytest.fail)
    writer.write_alarms([Alarm("collapse", 7, "one line"), Alarm("loss spike", 7, "another")])
    writer.write_alarms([])
    writer.close()
    (text,) = read(tmp_path).Tensors("alarms/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert text.step == 7 and [line.strip() for line in lines] == ["one line", "another"]


# ---- a directory that cannot be written


def a_file_in_its_place(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("")


def test_an_unwritable_directory_is_one_warning(tmp_path, capsys):
    a_file_in_its_place(tmp_path / "run")
    assert run(tmp_path / "run", LOGGED) == 0
    printed = capsys.readouterr()
    assert printed.out.count("warning: TensorBoard: ") == 1 and printed.err == ""
    assert "File exists" in printed.out and "going on without it" in printed.out
    assert checkpoint(tmp_path / "run").step == NUM_STEPS


@pytest.mark.parametrize("writes", [0, 1, 20, 45])
def test_a_disk_that_fills_up_is_one_warning(writes, tmp_path, capsys, monkeypatch):
    real, done = RecordWriter.write, []

    def write(writer, data):
        done.append(None)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer, data)

    hook = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", write)
    with Recorder() as recorder:
        assert run(tmp_path / "run", LOGGED) == 0
    assert len(recorder.steps) == NUM_STEPS and threading.excepthook is hook
    printed = capsys.readouterr()
    assert printed.out.count("warning: TensorBoard: [Errno 28] No space left on device") == 1
    # The writer's own thread would print its traceback.
    assert printed.err == ""


def test_a_disk_that_is_really_full_stops_only_the_curves(tmp_path, small_disk, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(small_disk)
    filler = small_disk / "filler"

    def fill(step: int) -> None:
        if step == 3:
            with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with Recorder(before_step=fill) as recorder:
        assert run(tmp_path / "run", LOGGED | {"training.steps": 8}) == 0
    assert len(recorder.steps) == NUM_STEPS
    assert capsys.readouterr().out.count("warning: TensorBoard: ") == 1
    assert checkpoint(tmp_path / "run").step == NUM_STEPS


def test_a_directory_that_vanishes_is_begun_again(tmp_path, capsys):
    def vanish(step: int) -> None:
        if step == 4:
            shutil.rmtree(tmp_path / "run" / "tensorboard")

    with Recorder(before_step=vanish):
        assert run(tmp_path / "run", LOGGED) == 0
    assert capsys.readouterr().out.count("has vanished; beginning it again") == 1
    events = read(tmp_path / "run")
    assert list(values(events, "health/lm_loss")) == [5, 6, 7, 8]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_probe_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "probe_routes").write_text("")
    assert run(tmp_path / "run", LOGGED) == 0
    assert capsys.readouterr().out.count("the routes of step") == len(EVALUATED)
    assert list(values(read(tmp_path / "run"), "validation/mean_loss")) == EVALUATED


def test_errors_of_other_threads_are_reported_as_ever(tmp_path, capsys):
    config = make_config(tmp_path, LOGGED)
    seen = []
    hook, threading.excepthook = threading.excepthook, seen.append
    try:
        writer = MetricsWriter(tmp_path, config, 0, lambda text: None)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        writer.close()
        assert len(seen) == 1 and threading.excepthook == seen.append
    finally:
        threading.excepthook = hook


def test_the_curves_up_to_a_failure_are_written(tmp_path, monkeypatch):
    def fail(step: int) -> None:
        if step == 5:
            raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"), Recorder(before_step=fail):
        run(tmp_path / "run", LOGGED)
    assert list(values(read(tmp_path / "run"), "health/lm_loss")) == [1, 2, 3, 4, 5]


def test_metrics_of_a_skipped_step_reach_the_curves(tmp_path):
    config = make_config(tmp_path, {"training.nonfinite": "skip"})
    engine = make_engine(config)
    engine.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    metrics = train_step(engine, micro_batches(config), 0, config)
    writer = MetricsWriter(tmp_path, config, 0, pytest.fail)
    writer.write_step(metrics, StepFacts(metrics.tokens_per_expert, 1.0))
    writer.close()
    events = read(tmp_path)
    assert math.isnan(values(events, "health/gradient_norm")[1])
    assert math.isfinite(values(events, "health/lm_loss")[1])


# ---- cost


def test_metrics_need_no_value_on_the_host():
    """A fake tensor has none: to read one back, which would wait for a GPU, raises."""
    with FakeTensorMode():
        logits, valid = torch.empty(20, 6), torch.empty(20, dtype=torch.bool)
        chosen = fused_topk(logits, 2)
        arguments = logits, chosen.router_probs, chosen.topk_weights, chosen.topk_indices, valid
        routings = (make_routing(*arguments), make_routing(*arguments))
        sums = routing_sums(routings, torch.device("cpu"), detail=True)
        both = sums.plus(routing_sums(routings, torch.device("cpu"), detail=True))
        assert both.tokens.shape == (6, 2) and both.logit_counts.shape == (2, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_the_gpu_as_often_with_more_layers(tmp_path):
    def waits(num_layers):
        changes = {"model.num_layers": num_layers, "training.device": "cuda"}
        config = make_config(tmp_path, changes)
        engine = make_engine(config)
        train_step(engine, micro_batches(config), 0, config, detail=True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_step(engine, micro_batches(config, 1), 1, config, detail=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in caught)

    assert waits(2) == waits(6)


def test_messages_of_a_step_do_not_grow_with_its_layers(tmp_path, monkeypatch):
    """What is summed over ranks: the same number of messages for 2 and for 4 routed layers."""

    def messages(num_layers, detail):
        config = make_config(tmp_path, {"model.num_layers": num_layers})
        engine, sent = make_engine(config), []
        monkeypatch.setattr(
            engine, "all_reduce", lambda x, maximum=False: sent.append(x.numel()) or x
        )
        train_step(engine, micro_batches(config), 0, config, detail=detail)
        return len(sent)

    assert messages(2, False) == messages(4, False)
    assert messages(2, True) == messages(4, True) == messages(2, False) + 1


def test_the_benchmark_of_metrics_adds_up(capsys, tmp_path):
    config = write_config(tmp_path / "run", LOGGED | {"logging.every": 10})
    assert metrics_bench.main(["--config", str(config), "--repeats", "2", "--threads", "1"]) == 0
    page = capsys.readouterr().out
    rows = [row.split("|")[2] for row in page.splitlines() if row.count("|") == 4]
    off, every_step, logged, pictured = map(float, rows[-4:])
    share = (every_step - off + (logged - every_step) / 10 + (pictured - logged) / 4) / off
    said = float(re.search(r"metrics cost (-?[\d.]+)% of a step", page)[1])
    assert said == pytest.approx(100 * share, abs=3)
    assert metrics_bench.main(["--config", str(config), "--repeats", "0"]) == 2
