"""Does one step put its norms, histograms, drops and alarms into TensorBoard?"""

import math

import numpy as np
import pytest
import torch
from metrics_cases import LAYERS, LOGGED, read, tag_of, values
from training_cases import make_config, make_engine, micro_batches

from moe.routing import make_routing
from train.alarms import Alarm
from train.checkpoint import load_checkpoint
from train.engine import load_model
from train.metrics import NORM_GROUPS, norm_group, routing_sums
from train.metrics_writer import MetricsWriter
from train.scalars import StepFacts
from train.step import train_step

pytest_plugins = ["metrics_fixtures"]


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
    # 128 were made in each layer.
    assert values(events, "load/dropped_percent/layer01")[1] == 0
    assert values(events, "load/dropped_percent/layer02")[1] == pytest.approx(25)
    assert values(events, "health/dropped_percent")[1] == pytest.approx(25)
    assert values(events, "speed/slowest_rank_share")[1] == pytest.approx(2)
    assert values(events, "speed/mfu")[1] == 0.375


def test_all_alarms_of_a_step_are_in_its_text(tmp_path):
    config = make_config(tmp_path, LOGGED)
    writer = MetricsWriter(tmp_path, config, 0, pytest.fail)
    writer.write_alarms([Alarm("collapse", 7, "one line"), Alarm("loss spike", 7, "another")])
    writer.write_alarms([])
    writer.close()
    (text,) = read(tmp_path).Tensors("alarms/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert text.step == 7 and [line.strip() for line in lines] == ["one line", "another"]


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
