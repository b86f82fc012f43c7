"""Does the config tell in what layers differ, and are their sizes counted layer by layer?"""

import pytest
import torch
from mixed_cases import CHOICES, EXPERTS, LAYERS, MOE, WIDTHS, mixed_config, mixed_model
from model_cases import tiny_config
from pydantic import ValidationError
from training_cases import MIXED, make_config

from moe.config import ModelConfig, dense_equivalent
from moe.interop.olmoe import state_dict_to_hf
from moe.model import MoETransformer, flops_per_token, num_parameters
from train.errors import ConfigError
from train.layouts import plan_layouts
from train.plan import make_plan
from train.ranks import Ranks, check_layout


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
    "model.moe.layers.0.router.target (2.0) must be less than model.moe.layers.0.num_experts (2)": [
        {"layers": [1], "num_experts": 2, "router": {"name": "relu"}}
    ],
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


def test_a_loss_of_noise_needs_a_router_that_draws_it_in_each_layer():
    noisy = {"router": {"name": "noisy_topk"}, "losses": [{"name": "load"}]}
    tiny_config(moe=noisy | {"layers": [{"layers": [1], "num_experts": 4}]})
    told = (
        r"names load, which .*; model\.moe\.layers\.0\.router\.name \(topk\) does not: take noisy_"
    )
    with pytest.raises(ValidationError, match=told):
        tiny_config(moe=noisy | {"layers": [{"layers": [1], "router": {"name": "topk"}}]})


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
