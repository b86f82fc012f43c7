"""Does a model whose layers differ in experts, choices, widths and routers add up, layer by layer?

Three layers of 4, 8 and 6 experts, of which a token has 1, 2 and 3; the second one's are hashed.
Oracles look at each layer alone, as NumPy has it from the chosen experts.
"""

import io
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from model_cases import tiny_config, tiny_model, tokens
from PIL import Image
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import CHROMIUM, SECTIONS, page_in_browser
from training_cases import (
    MIXED,
    NUM_STEPS,
    Recorder,
    bits,
    checkpoint,
    different,
    make_config,
    make_engine,
    micro_batches,
    run,
    same_steps,
)

import train.loop
from moe.config import ModelConfig, dense_equivalent
from moe.generate import generate
from moe.interop.olmoe import state_dict_to_hf
from moe.layer import MoELayer
from moe.model import MoETransformer, flops_per_token, num_parameters
from train.alarms import SPIKE_LEAST, Alarms
from train.analyze import main as analyze
from train.errors import ConfigError
from train.layouts import plan_layouts
from train.metrics import WINDOW_STEPS, LoadWindow, StepMetrics
from train.plan import make_plan
from train.ranks import Ranks, check_layout
from train.report import describe
from train.route_files import open_recording
from train.scalars import StepFacts, load_measures, step_scalars
from train.step import router_biases, train_step

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


# ---- the config


def test_each_block_has_what_the_config_says_of_it():
    config = mixed_config()
    seen = [config.at(layer) for layer in range(3)]
    assert tuple(each.moe.num_experts for each in seen) == EXPERTS == config.experts_of_layers
    assert tuple(each.top_k for each in seen) == CHOICES
    assert tuple(each.moe.intermediate_size for each in seen) == WIDTHS
    assert [each.moe.router.name for each in seen] == ["topk", "hash", "topk"]
    assert (config.num_choices, config.top_k) == (8, 3)
    assert config.experts_per_token == 2 and config.causal
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config
    alike = tiny_config()
    assert alike.at(0) is alike and alike.experts_of_layers == (6, 6)
    for block, experts, width in zip(mixed_model().blocks, EXPERTS, WIDTHS, strict=True):
        assert block.feed_forward.experts.w1.shape == (experts, width, 24)
    hashed, learned = (mixed_model().blocks[layer].feed_forward.router for layer in (1, 2))
    assert not hashed.learned and learned.weight.shape == (6, 24)


MISTAKES = {
    "model.moe.layers.0.layers (2) must be a block with routed experts; there are: 0, 1": [
        {"layers": [2], "num_experts": 4}
    ],
    "model.moe.layers.1.layers (1) names a block for the second time; keep one": [
        {"layers": [0, 1], "num_experts": 4},
        {"layers": [1], "intermediate_size": 4},
    ],
    "model.moe.layers.0 has no effect: it sets none of num_experts, intermediate_size and router; "
    "remove it": [{"layers": [0]}],
    "model.moe.layers.0.num_experts (6) has no effect: model.moe.num_experts is the same; remove "
    "it": [{"layers": [0], "num_experts": 6, "intermediate_size": 3}],
    "model.moe.layers.0.router has no effect: model.moe.router is the same; remove it": [
        {"layers": [0], "router": {"name": "topk", "top_k": 2}}
    ],
    "model.moe.router.top_k (2) must not exceed model.moe.layers.0.num_experts (1)": [
        {"layers": [0], "num_experts": 1}
    ],
    "model.moe.layers.1.router.top_k (7) must not exceed model.moe.num_experts (6)": [
        {"layers": [0], "num_experts": 3},
        {"layers": [1], "router": {"name": "topk", "top_k": 7}},
    ],
    "model.moe.layers.0.router.target_k (2.0) must be less than model.moe.layers.0.num_experts "
    "(2)": [{"layers": [1], "num_experts": 2, "router": {"name": "relu"}}],
    "model.moe.layers.0.router.name (expert_choice) lets a token see later ones, which spoils "
    "language modelling; set model.moe.allow_non_causal: true to use it anyway": [
        {"layers": [1], "router": {"name": "expert_choice"}}
    ],
    "Input should be greater than or equal to 1": [{"layers": [1], "num_experts": 0}],
    "Extra inputs are not permitted": [{"layers": [1], "losses": []}],
    "Tuple should have at least 1 item after validation, not 0": [{"layers": [], "num_experts": 4}],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_each_mistake_in_what_layers_differ_is_named(message):
    with pytest.raises(ValidationError) as caught:
        tiny_config(moe={"layers": MISTAKES[message]})
    assert [e["msg"].removeprefix("Value error, ") for e in caught.value.errors()] == [message]


def test_a_dense_block_has_no_experts_to_differ_in():
    layers = [{"layers": [0], "num_experts": 4}]
    told = r"layers \(0\) must be a block with routed experts; there are: 1 "
    with pytest.raises(ValidationError, match=told):
        tiny_config(moe={"num_dense_layers": 1, "layers": layers})


def test_a_file_with_a_mistake_is_told_with_its_place(tmp_path):
    layers = {"model.moe.layers": [{"layers": [0], "router": {"name": "topk", "topk": 3}}]}
    with pytest.raises(ConfigError) as caught:
        make_config(tmp_path, layers)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("config: model.moe.layers.0.router.topk: unknown key (did you mean")


def test_olmoe_has_no_place_for_layers_that_differ():
    alike = {"attention": {"qk_norm": "projection", "num_heads": 4}}
    others = tiny_config(**alike, moe={"layers": [{"layers": [0], "num_experts": 4}]})
    with pytest.raises(ValueError, match=r"model\.moe\.layers \("):
        state_dict_to_hf({}, others)


# ---- sizes


def test_parameters_are_those_of_each_layer():
    with torch.device("meta"):
        model = MoETransformer(mixed_config())
    count = num_parameters(model)
    experts = [number * 3 * 24 * width for number, width in zip(EXPERTS, WIDTHS, strict=True)]
    active = [chosen * 3 * 24 * width for chosen, width in zip(CHOICES, WIDTHS, strict=True)]
    assert count.experts == sum(experts)
    assert count.total == sum(p.numel() for p in model.parameters())
    others = count.total - sum(experts)
    assert count.active == others + sum(active) - 67 * 24


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_the_dense_baseline_has_the_flops_of_the_mean_layer(dense_layers):
    # Rounding to whole widths is a small part of these.
    wide = {**MOE, "num_dense_layers": dense_layers, "intermediate_size": 200}
    config = mixed_config(num_layers=3 + dense_layers, moe=wide)
    if dense_layers:
        moved = [{**each, "layers": [each["layers"][0] + 1]} for each in LAYERS]
        config = mixed_config(num_layers=4, moe={**wide, "layers": moved})
    # Weights that a token is multiplied with, over D: K * 3 F, and E where the router has weights.
    layers = [1 * 3 * 200 + 4, 2 * 3 * 24 + 8, 3 * 3 * 8 + 6]
    assert config.dense_intermediate_size == pytest.approx(sum(layers) / 3 / 3, abs=1)
    dense = dense_equivalent(config)
    assert ModelConfig.model_validate(dense.model_dump(mode="json")) == dense
    assert dense.moe_layers == dense.experts_of_layers == ()
    with torch.device("meta"):
        ours, baseline = MoETransformer(config), MoETransformer(dense)
    assert flops_per_token(baseline, 8) / flops_per_token(ours, 8) == pytest.approx(1, abs=0.01)


def test_layouts_send_the_choices_of_each_layer_and_divide_all_experts(tmp_path):
    config = make_config(tmp_path, MIXED | {"training.micro_batch_size": 1})
    count = make_plan(config, config.model, 4).parameters
    layouts = plan_layouts(config, config.model, count, world_size=4, compute_bytes=4)
    # Of 4, 8 and 6 experts: 4 does not divide the last.
    assert sorted({layout.expert_parallel_size for layout in layouts}) == [1, 2]
    (shared,) = (at for at in layouts if at[:2] == (2, 1))
    # 16 tokens a rank; rows of 16 numbers there and back, forward and backward, half of them away.
    assert shared.all_to_all_bytes == 16 * sum(CHOICES) * 4 * 16 * 4 // 2
    wrong = {"parallel.expert_parallel_size": 4, "training.batch_size": 8}
    with pytest.raises(ConfigError) as caught:
        check_layout(make_config(tmp_path, MIXED | wrong), Ranks(0, 0, 4))
    assert "must divide model.moe.layers.1.num_experts (6)" in str(caught.value)
    assert "model.moe.num_experts" not in str(caught.value)


# ---- one forward pass


def test_losses_are_the_mean_of_each_layer_with_its_own_experts():
    model = mixed_model(dtype=torch.float64)
    out = model(tokens(2, 8), tokens(2, 8, seed=2))
    balance, z = [], []
    for routing, experts, chosen in zip(out.routings, EXPERTS, CHOICES, strict=True):
        logits = routing.router_logits.detach().numpy()
        assert routing.topk_indices.shape == (16, chosen) and logits.shape == (16, experts)
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        frequency = choices(routing.topk_indices, experts) / (16 * chosen)
        balance.append(experts * (frequency * probs.mean(0)).sum())
        z.append((np.log(np.exp(logits).sum(1)) ** 2).mean())
    found = [value.item() for value in out.aux_losses]
    assert found == pytest.approx([np.mean(balance), np.mean(z)], rel=1e-9)


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = mixed_model(dtype=torch.float64)
        model.activation_checkpointing = recompute
        model(tokens(2, 8), tokens(2, 8, seed=2)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-10, atol=1e-12)


def test_generation_with_a_cache_continues_as_a_forward_pass_would():
    model = mixed_model(dtype=torch.float64).eval()
    prompt = tokens(1, 5)
    (continued,) = generate(model, prompt, 4, temperature=0)  # the prompt and what follows
    ids = prompt
    for _ in range(4):
        following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    assert continued.tolist() == ids[0].tolist()


def test_routes_of_a_layer_have_its_own_choices():
    model = mixed_model()
    ids = tokens(2, 8)
    own = [routing.topk_indices.view(2, 8, -1) for routing in model(ids).routings]
    taken = [(each + 1) % number for each, number in zip(own, EXPERTS, strict=True)]
    given = model(ids, routes=taken).routings
    for routing, wanted in zip(given, taken, strict=True):
        assert torch.equal(routing.topk_indices.view(2, 8, -1), wanted)
    taken[1] = torch.cat([taken[1], taken[1]], -1)
    with pytest.raises(ValueError, match=r"layer 1 are \(2, 8, 4\), need \(2, 8, 2\)"):
        model(ids, routes=taken)


def test_a_layer_whose_router_cannot_replay_chooses_freely_beside_others():
    layers = [{"layers": [1], "router": {"name": "relu"}}]
    model, ids = tiny_model(moe={"layers": layers}), tokens(2, 8)
    given = torch.arange(2).expand(2, 8, 2)
    routing = model(ids, routes=[given, None]).routings[0]
    assert torch.equal(routing.topk_indices.view(2, 8, 2), given)
    with pytest.raises(ValueError, match=r"model\.moe\.layers\.0\.router\.name \(relu\) cannot"):
        model(ids, routes=[None, given])


def test_a_run_whose_layers_cannot_all_replay_is_refused(tmp_path, capsys):
    changes = {"model.moe.layers": [{"layers": [1], "router": {"name": "relu"}}]}
    assert run(tmp_path / "run", changes | {"routes.replay": str(tmp_path / "routes")}) == 2
    assert "model.moe.layers.0.router.name (relu) cannot take routes" in capsys.readouterr().err


# ---- routers with and without something of their own


def test_each_router_is_told_of_its_own_layer(tmp_path):
    routers = [
        {"name": "topk", "bias_update_rate": 0.5},
        {"name": "relu", "factor": 1.5, "initial_lambda": 0.01},
        {"name": "hash"},
        {"name": "quantile", "decay": 0.0},
    ]
    experts = (4, 6, 8, 5)
    changes = {
        "model.num_layers": 4,
        "model.moe.router": routers[0],
        "model.moe.layers": [
            {"layers": [layer], "num_experts": experts[layer], "router": routers[layer]}
            for layer in (1, 2, 3)
        ],
    }
    config = make_config(tmp_path, changes)
    engine = make_engine(config)
    collected: list = []
    metrics = train_step(
        engine, micro_batches(config), 0, config, seen=collected.append, detail=True
    )
    layers = [m for m in engine.model.modules() if isinstance(m, MoELayer)]
    # The loss-free bias: half up where an expert had less than the mean, half down for more.
    load = sum(choices(routings[0].topk_indices, 4) for routings in collected)
    moved = 0.5 * np.sign(load.mean() - load)
    assert layers[0].router.expert_bias.tolist() == pytest.approx(moved.tolist())
    # ReLU's lambda: up where tokens have more than two experts on average.
    taken = sum(choices(routings[1].topk_indices, 6) for routings in collected).sum() / 64
    expected = 0.01 * 1.5 ** np.sign(taken - 2)
    assert float(layers[1].router.penalty_weight) == pytest.approx(expected)
    # The quantile router's prices: minus the mean of what its passes found.
    prices = -np.mean([routings[3].feedback.numpy() for routings in collected], 0)
    assert layers[3].router.expert_bias.tolist() == pytest.approx(prices.tolist(), abs=1e-6)
    # A layer's penalty counts as much as if the others had one.
    penalties = [routings[1].penalty.item() for routings in collected]
    assert metrics.aux_losses["router_penalty"] == pytest.approx(np.mean(penalties) / 4)
    bias = router_biases(engine.model)
    assert bias.isfinite().sum(-1).tolist() == [4, 0, 0, 5]
    values = step_scalars(metrics, StepFacts(metrics.tokens_per_expert, 1.0, bias=bias), range(4))
    ranges = {tag: value for tag, value in values.items() if tag.startswith("router/bias_range")}
    spread = [float(np.ptp(moved)), float(np.ptp(prices))]
    assert ranges == pytest.approx(
        {
            "router/bias_range/layer00": spread[0],
            "router/bias_range/layer03": spread[1],
            "router/bias_range/all_layers": max(spread),
        },
        abs=1e-6,
    )


# ---- metrics and alarms


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
    assert measures["dropped_percent"].tolist() == pytest.approx([20, 20, 40])
    (text,) = watched(load, SPIKE_LEAST + 1, dropped=10)
    assert "drop spike: layer 0 dropped 20.0% of its assignments" in text


# ---- whole runs

LOGGED = {
    "logging.tensorboard": True,
    "logging.heatmap_every": 4,
    "evaluation.sample_prompts": ["moss"],
    "evaluation.sample_tokens": 3,
    "checkpoint.every": 4,
    "checkpoint.keep_last": 2,
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A run with pictures, two evaluations and a recording of its routes."""
    run_dir = tmp_path_factory.mktemp("mixed") / "run"
    recording = {"routes.record": str(run_dir.parent / "routes")}
    assert run(run_dir, MIXED | LOGGED | recording) == 0
    return run_dir


def test_pictures_and_histograms_are_of_real_experts(logged):
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(logged / "tensorboard"), size_guidance=dict.fromkeys(kinds, 0))
    events.Reload()
    for layer, number in enumerate(EXPERTS):
        shares = events.Histograms(f"load/share/layer{layer:02d}")
        assert [each.histogram_value.num for each in shares] == [number] * 2
        logits = events.Histograms(f"router/logits/layer{layer:02d}")[-1].histogram_value
        assert logits.num == number * 64
    # One expert a token has no pairs.
    pictures = {tag for tag in events.Tags()["images"] if "co_activation" in tag}
    assert pictures == {f"specialisation/co_activation/layer{layer:02d}" for layer in (1, 2)}
    for tag in events.Tags()["images"]:
        for image in events.Images(tag):
            assert Image.open(io.BytesIO(image.encoded_image_string)).size[0] > 100
    for layer, number in enumerate(EXPERTS):
        tag = f"specialisation/top_tokens/layer{layer:02d}/text_summary"
        (text,) = events.Tensors(tag)[-1].tensor_proto.string_val
        numbers = [line.split()[0] for line in text.decode().splitlines()[1:] if line.strip()]
        assert [each for each in numbers if each.isdigit()] == [str(e) for e in range(number)]
    assert events.Scalars("health/dead_experts")[-1].value <= sum(EXPERTS)
    assert (logged / "domain_expert_map.png").stat().st_size > 0
    summary = json.loads((logged / "summary.json").read_text())
    for row, number in zip(summary["layers"], EXPERTS, strict=True):
        assert 1 <= row["effective_experts"] <= number + 1e-4 and row["dead_experts"] < number


def test_before_any_step_has_counted_the_dead_are_the_experts_that_there_are(tmp_path, monkeypatch):
    real_step = train.loop.train_step

    def first_is_skipped(*arguments, **options):
        metrics = real_step(*arguments, **options)
        return metrics._replace(skipped=metrics.step == 1)

    monkeypatch.setattr(train.loop, "train_step", first_is_skipped)
    changes = MIXED | {"logging.tensorboard": True, "training.steps": 2, "evaluation.every": 0}
    assert run(tmp_path / "run", changes) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Scalars("health/dead_experts")[0].value == sum(EXPERTS)
    assert events.Scalars("health/dead_experts")[1].value < sum(EXPERTS)


def test_recorded_routes_are_replayed_bit_by_bit(logged, tmp_path):
    routes = logged.parent / "routes"
    recording = open_recording(routes, "routes.replay")
    assert recording.header.routes["model"]["num_experts"] == list(EXPERTS)
    assert recording.header.routes["model"]["top_k"] == list(CHOICES)
    stored = recording.read(0, 0, 4)  # (B, L, S, K)
    for layer, (number, chosen) in enumerate(zip(EXPERTS, CHOICES, strict=True)):
        assert (stored[:, layer, :, chosen:] == -1).all()
        own = stored[:, layer, :, :chosen]
        assert own.min() >= 0 and own.max() < number
    with Recorder() as recorder:
        assert run(tmp_path / "free", MIXED) == 0
    with Recorder() as replayed:
        assert run(tmp_path / "replayed", MIXED | {"routes.replay": str(routes)}) == 0
    assert len(recorder.steps) == NUM_STEPS and same_steps(recorder.steps, replayed.steps)
    a, b = (bits(checkpoint(tmp_path / name).tensors) for name in ("free", "replayed"))
    assert different(a, b) == []


def test_a_recording_that_names_another_layers_experts_is_refused(logged, tmp_path, capsys):
    folder = shutil.copytree(logged.parent / "routes", tmp_path / "foreign")
    recording = open_recording(folder, "routes.replay")
    share = recording.read(0, 0, 4).copy()
    share[0, 0, 0, 0] = 5
    recording.write(0, 0, share)
    assert run(tmp_path / "run", MIXED | {"routes.replay": str(folder)}) == 3
    assert "layer 0, names experts from" in capsys.readouterr().err


def test_experts_that_cost_nothing_are_counted_behind_each_layers_own(tmp_path):
    """Evaluated and logged too."""
    costless = {f"model.moe.num_{kind}_experts": 1 for kind in ("zero", "copy", "constant")}
    running = {"model.moe.losses": [{"name": "load_balancing", "accumulation": "running"}]}
    changes = MIXED | LOGGED | costless | running | {"routes.record": str(tmp_path / "routes")}
    with Recorder() as recorder:
        assert run(tmp_path / "run", changes) == 0
    recording = open_recording(tmp_path / "routes", "routes.replay")
    assert recording.header.routes["model"]["num_experts"] == [each + 3 for each in EXPERTS]
    beyond = 0
    for step, metrics in enumerate(recorder.steps):
        stored = recording.read(step, 0, 4)  # (B, L, S, K)
        for layer, number in enumerate(EXPERTS):
            chosen = torch.from_numpy(stored[:, layer].astype(np.int64))
            load = choices(chosen, number + 3)
            absent = [-2] * (max(EXPERTS) - number)  # -1 of each of two passes
            assert metrics.tokens_per_expert[layer].tolist() == [*load, *absent]
            beyond += load[number:].sum()
    assert beyond > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for row, number in zip(summary["layers"], EXPERTS, strict=True):
        assert 1 <= row["effective_experts"] <= number + 3 + 1e-4


@pytest.fixture(scope="module")
def analysed(logged) -> Path:
    """The folder of an analysis of the run."""
    output = logged.parent / "analysis"
    arguments = [str(logged), "--output", str(output), "--against", "4"]
    assert analyze([*arguments, "--ablation-tokens", "64"]) == 0
    return output


def test_an_analysis_has_each_layers_own_experts(analysed):
    found = json.loads((analysed / "analysis.json").read_text())
    assert "4 / 8 / 6 experts, top-1 / 2 / 3" in describe(found)
    rows = pq.read_table(analysed / "routes.parquet").to_pylist()
    for layer, (number, chosen) in enumerate(zip(EXPERTS, CHOICES, strict=True)):
        mine = [row for row in rows if row["layer"] == layer]
        assert all(row["experts"][chosen:] == [-1] * (3 - chosen) for row in mine)
        assert all(row["weights"][chosen:] == [0.0] * (3 - chosen) for row in mine)
        taken = np.array([row["experts"][:chosen] for row in mine])
        load = np.bincount(taken.ravel(), minlength=number)
        assert np.sum([domain[layer] for domain in found["load"]], 0).tolist() == load.tolist()
        numbers = found["layers"][layer]
        assert (numbers["num_experts"], numbers["top_k"]) == (number, chosen)
        expected = scalars_by_hand([load])
        for measure in expected.keys() & numbers.keys():
            assert numbers[measure] == pytest.approx(expected[measure][0], rel=1e-6, abs=1e-9)
        pairs = found["co_activation_counts"][layer]
        if chosen == 1:
            assert pairs is None
        else:
            together = np.zeros((number, number), int)
            for experts in taken:
                for i, j in itertools.product(experts, experts):
                    together[i, j] += 1
            assert pairs == together.tolist()
        for role in ("input", "next", "predicted"):
            assert len(found["vocabulary"]["top_tokens"][role][layer]) == number
        assert len(found["ablation"]["rise"][layer]) == number
        assert len(found["ablation"]["assignments"][layer]) == number
    for top in found["ablation"]["top_experts"]:
        rise = found["ablation"]["rise"][top["layer"]][top["expert"]]
        assert top["rise"] == rise
    ranked = sorted(itertools.chain(*found["ablation"]["rise"]), reverse=True)
    assert [top["rise"] for top in found["ablation"]["top_experts"]] == ranked[:10]
    assert found["saturation"]["training"]["overlap"][-1] == [1.0] * 3


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_report_draws_every_section(analysed, tmp_path):
    seen = page_in_browser(tmp_path, (analysed / "report.html").read_text(encoding="utf-8"))
    assert seen.count("<section") == SECTIONS
    assert "4 / 8 / 6, top-1 / 2 / 3" in seen and "topk / hash / topk" in seen
    drawn = seen.split("<section", 1)[1].split("<script", 1)[0]
    assert "NaN" not in drawn and "undefined" not in drawn
    assert '<div class="reading"><span' in seen
