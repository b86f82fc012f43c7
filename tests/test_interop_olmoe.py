"""Is an OLMoE model of Hugging Face, weights copied, the same function here, gradients included?"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import assert_equals, relative_error
from model_cases import tokens

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import OlmoeConfig, OlmoeForCausalLM

from moe.interop.olmoe import config_from_hf, state_dict_from_hf, state_dict_to_hf
from moe.model import MoETransformer, init_weights, num_parameters
from train.bench import bench_model, hf_model
from train.config import load_config
from train.errors import ConfigError

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"
SHAPE = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.15,
}


def their_model(seed, **changes):
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(OlmoeConfig(**(SHAPE | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights of 1 would hide one that is not used.
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def our_model(theirs, losses=()):
    config = config_from_hf(theirs.config)
    config = config.model_copy(update={"moe": config.moe.model_copy(update={"losses": losses})})
    ours = MoETransformer(config)
    ours.load_state_dict(state_dict_from_hf(theirs.state_dict(), config))
    return ours


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"tie_word_embeddings": True},
        {"num_experts_per_tok": 1},
    ],
    ids=["plain", "normalised", "no shared keys", "theta", "tied", "top-1"],
)
def test_logits_and_gradients_equal_those_of_transformers(seed, changes):
    theirs = their_model(seed, **changes)
    ours = our_model(theirs)
    ids = tokens(3, 40, seed)
    assert_equals(ours(ids).logits, theirs(ids).logits, "logits")
    out = theirs(ids, labels=ids)
    out.loss.backward()
    # Theirs shifts the labels, ours takes them shifted.
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    loss = ours(ids, labels).loss
    loss.backward()
    assert_equals(loss, out.loss, "loss")
    expected = state_dict_from_hf(
        {name: p.grad for name, p in theirs.named_parameters()}, ours.config
    )
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_balance_loss_of_one_layer_equals_theirs(top_k):
    changes = {"num_hidden_layers": 1, "num_experts_per_tok": top_k, "output_router_logits": True}
    theirs = their_model(0, **changes)
    losses = config_from_hf(theirs.config).moe.losses
    assert [loss.weight for loss in losses] == [0.01 * top_k]
    ours = our_model(theirs, losses)
    ids = tokens(3, 40)
    out = theirs(ids, labels=ids)
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    assert_equals(ours(ids, labels).loss, out.loss)
    assert_equals(ours(ids, labels).aux_losses[0], out.aux_loss / top_k)


def test_cached_decoding_equals_that_of_transformers():
    from moe.generate import generate

    theirs = their_model(3)
    ids = tokens(2, 5)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(generate(our_model(theirs), ids, 12, temperature=0), expected)


def test_names_go_there_and_back_in_both_layouts(tmp_path):
    from safetensors.torch import load_file

    theirs = their_model(0)
    config = config_from_hf(theirs.config)
    in_memory = theirs.state_dict()
    theirs.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in on_disk
    # What `config.json` says is the same config.
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())) == config
    ours = state_dict_from_hf(in_memory, config)
    for source, fused in ((in_memory, True), (on_disk, False)):
        read = state_dict_from_hf(source, config)
        assert read.keys() == ours.keys() == MoETransformer(config).state_dict().keys()
        assert all(torch.equal(read[name], ours[name]) for name in ours)
        written = state_dict_to_hf(ours, config, fused=fused)
        assert written.keys() == source.keys()
        assert all(torch.equal(written[name], source[name]) for name in source)


def test_our_model_loads_into_transformers():
    config = config_from_hf(OlmoeConfig(**SHAPE))
    ours = MoETransformer(config)
    init_weights(ours, 5)
    theirs = OlmoeForCausalLM(OlmoeConfig(**SHAPE))
    theirs.load_state_dict(state_dict_to_hf(ours.state_dict(), config))
    ids = tokens(2, 16)
    assert_equals(theirs(ids).logits, ours(ids).logits)


def test_older_config_files_are_read():
    values = OlmoeConfig(**SHAPE).to_dict()
    expected = config_from_hf(values)
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    assert config_from_hf(values) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv (8.0) is not supported; this model needs None"),
        (
            {"attention_bias": True},
            "attention_bias (True) is not supported; this model needs False",
        ),
        ({"hidden_act": "gelu"}, "hidden_act ('gelu') is not supported; this model needs 'silu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type ('linear') is not supported; this model needs 'default'",
        ),
        ({"model_type": "mixtral"}, "model_type ('mixtral') must be 'olmoe'"),
    ],
)
def test_settings_that_would_be_lost_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        config_from_hf(OlmoeConfig(**SHAPE).to_dict() | changes)
    assert str(caught.value) == message


def test_missing_and_left_over_tensors_are_refused():
    theirs = their_model(0)
    config = config_from_hf(theirs.config)
    state = dict(theirs.state_dict())
    gate = state.pop("model.layers.1.mlp.gate.weight")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.gate\.weight$"):
        state_dict_from_hf(state, config)
    state |= {"model.layers.1.mlp.gate.weight": gate, "model.layers.1.mlp.gate.bias": gate}
    with pytest.raises(ValueError, match=r"no place here: model\.layers\.1\.mlp\.gate\.bias$"):
        state_dict_from_hf(state, config)


def test_a_model_that_is_no_olmoe_is_not_exported():
    config = config_from_hf(OlmoeConfig(**SHAPE))
    state = MoETransformer(config).state_dict()
    head = config.model_copy(
        update={"attention": config.attention.model_copy(update={"qk_norm": "head"})}
    )
    with pytest.raises(ValueError) as caught:
        state_dict_to_hf(state, head)
    assert (
        str(caught.value) == "model.attention.qk_norm (head) must be projection in an OLMoE model"
    )
    for name, value in (("scale", 2.5), ("num_groups", 3)):
        other = config.moe.router.model_copy(update={name: value})
        moe = config.moe.model_copy(update={"router": other})
        with pytest.raises(ValueError, match=rf"model\.moe\.router\.{name} \({value}\) must be"):
            state_dict_to_hf(state, config.model_copy(update={"moe": moe}))
    biased = state | {"blocks.0.feed_forward.router.logit_bias": torch.zeros(6)}
    with pytest.raises(
        ValueError, match=r"no place for blocks\.0\.feed_forward\.router\.logit_bias"
    ):
        state_dict_to_hf(biased, config)
    for change, line in (
        ({"latent_size": 8}, r"^model\.moe\.latent_size \(8\) must be None in an OLMoE model$"),
        ({"shared_gate": "sigmoid"}, r"^model\.moe\.shared_gate \(sigmoid\) must be none in"),
    ):
        other = config.model_copy(update={"moe": config.moe.model_copy(update=change)})
        with pytest.raises(ValueError, match=line):
            state_dict_to_hf(state, other)
    state["blocks.1.feed_forward.router.expert_bias"] += 1
    with pytest.raises(ValueError, match="expert_bias is not 0"):
        state_dict_to_hf(state, config)


def test_the_benchmark_refuses_a_model_that_olmoe_cannot_be():
    shape = bench_model(load_config(QUICKSTART))
    assert hf_model(shape, 16).num_parameters() == num_parameters(MoETransformer(shape)).total
    other = load_config(QUICKSTART, ["model.moe.num_shared_experts=1"])
    with pytest.raises(ConfigError) as caught:
        bench_model(other)
    assert str(caught.value) == (
        "model.moe.num_shared_experts (1) must be 0 in an OLMoE model, which this benchmark "
        "compares with"
    )
