"""Do gated shared experts and latent experts compute what Hugging Face's layers compute?

The same weights in both: Qwen2-MoE has the gate, Nemotron-H latent experts of squared ReLU beside a
shared one of the full width.
"""

import torch
from conftest import assert_equals, randn
from model_cases import context, tiny_config
from transformers import NemotronHConfig, Qwen2MoeConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moe.layer import MoELayer

D, F, E, T = 24, 14, 6, 20
ALL, GATE, UP = slice(None), slice(0, F), slice(F, 2 * F)


def check(moe, theirs, places):
    """Outputs and every gradient are equal, with the same weights.

    Args: places: our name -> their name, and which rows of each matrix there.
    """
    ours = MoELayer(tiny_config(moe=moe))
    parameters, their_parameters = (dict(layer.named_parameters()) for layer in (ours, theirs))
    assert parameters.keys() == places.keys()
    assert their_parameters.keys() == {name for name, _ in places.values()}
    with torch.no_grad():
        # What they are by default would hardly move a gate.
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed) * 0.3)
        for name, (their_name, rows) in places.items():
            whole = their_parameters[their_name][..., rows, :]
            assert whole.shape == parameters[name].shape, name
            parameters[name].copy_(whole)
    results = []
    for layer in (ours, theirs):
        x = randn(T, D, seed=90).requires_grad_()
        out = ours(x, context(T))[0] if layer is ours else theirs(x.unsqueeze(0))[0]
        out.backward(randn(T, D, seed=91))
        results.append((out, x.grad))
    for ours_found, wanted in zip(*results, strict=True):
        assert_equals(ours_found, wanted)
    for name, (their_name, rows) in places.items():
        assert_equals(parameters[name].grad, their_parameters[their_name].grad[..., rows, :], name)


def test_a_gated_shared_expert_is_that_of_qwen2_moe():
    config = Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=10,
        num_experts=E,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    moe = {
        "num_shared_experts": 1,
        "shared_intermediate_size": 10,
        "shared_gate": "sigmoid",
        "router": {"name": "topk", "top_k": 2, "normalize": False},
    }
    places = {
        "router.weight": ("gate.weight", ALL),
        "experts.w1": ("experts.gate_up_proj", GATE),
        "experts.w3": ("experts.gate_up_proj", UP),
        "experts.w2": ("experts.down_proj", ALL),
        "shared_experts.w1.weight": ("shared_expert.gate_proj.weight", ALL),
        "shared_experts.w3.weight": ("shared_expert.up_proj.weight", ALL),
        "shared_experts.w2.weight": ("shared_expert.down_proj.weight", ALL),
        "shared_gate.weight": ("shared_expert_gate.weight", ALL),
    }
    check(moe, Qwen2MoeSparseMoeBlock(config), places)


def test_latent_experts_are_those_of_nemotron_h():
    config = NemotronHConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        moe_shared_expert_intermediate_size=F,
        moe_latent_size=7,
        n_routed_experts=E,
        num_experts_per_tok=2,
    )
    moe = {
        "num_shared_experts": 1,
        "latent_size": 7,
        "experts": {"name": "relu2"},
        "router": {"name": "topk", "top_k": 2, "score": "sigmoid"},
    }
    places = {
        "router.weight": ("gate.weight", ALL),
        "experts.w1": ("experts.up_proj", ALL),
        "experts.w2": ("experts.down_proj", ALL),
        "shared_experts.w1.weight": ("shared_experts.up_proj.weight", ALL),
        "shared_experts.w2.weight": ("shared_experts.down_proj.weight", ALL),
        "latent_down.weight": ("fc1_latent_proj.weight", ALL),
        "latent_up.weight": ("fc2_latent_proj.weight", ALL),
    }
    check(moe, NemotronHMoE(config), places)
