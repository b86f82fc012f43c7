"""Do five families of `transformers` choose and weigh experts as our `topk` does, weights copied?

Theirs is the code of transformers 5.23 (`models/mixtral`, `olmoe`, `qwen3_moe`, `deepseek_v3`,
`gpt_oss`), with the experts of the first four; gpt-oss has experts of
its own kind, so of it the router is compared.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import assert_equals, randn, relative_error
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe.config import ModelConfig
from moe.layer import MoELayer
from moe.routing import RouterContext, Routing

B, S, D, F, E, K = 3, 40, 24, 14, 8, 3
NUM_SHARED = 2


class Family(NamedTuple):
    """Their config, their block (or router alone), and our settings of `model.moe`."""

    config: Any
    block: Callable[[Any], nn.Module]
    router: dict[str, Any]
    num_shared_experts: int = 0


def deepseek(groups: int, kept: int, *, normalize: bool, scale: float) -> Family:
    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_shared_experts=NUM_SHARED,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=normalize,
        routed_scaling_factor=scale,
    )
    # A rate switches the bias on; nothing moves it here.
    router = {"score": "sigmoid", "normalize": normalize, "scale": scale, "bias_update_rate": 1e-3}
    if kept < groups:
        router |= {"num_groups": groups, "groups_per_token": kept}
    return Family(config, DeepseekV3MoE, router, NUM_SHARED)


def softmax_family(kind: Any, block: Any, size: str, **settings: Any) -> Family:
    config = kind(hidden_size=D, **{size: F}, num_experts_per_tok=K, **settings)
    return Family(config, block, {"normalize": settings.get("norm_topk_prob", True)})


FAMILIES = {
    "Mixtral": softmax_family(
        MixtralConfig, MixtralSparseMoeBlock, "intermediate_size", num_local_experts=E
    ),
    "OLMoE": softmax_family(
        OlmoeConfig,
        OlmoeSparseMoeBlock,
        "intermediate_size",
        num_experts=E,
        norm_topk_prob=False,
    ),
    "Qwen3-MoE": softmax_family(
        Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
        "moe_intermediate_size",
        num_experts=E,
        norm_topk_prob=True,
    ),
    "Qwen3-MoE raw": softmax_family(
        Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
        "moe_intermediate_size",
        num_experts=E,
        norm_topk_prob=False,
    ),
    "DeepSeek-V3": deepseek(4, 2, normalize=True, scale=2.5),
    "DeepSeek-V3 large groups": deepseek(2, 1, normalize=True, scale=1.0),
    "DeepSeek-V3 raw": deepseek(4, 3, normalize=False, scale=2.5),
    "DeepSeek-V3 without groups": deepseek(1, 1, normalize=True, scale=2.5),
    "gpt-oss": Family(
        GptOssConfig(
            hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
        ),
        GptOssTopKRouter,
        {"logit_bias": True},
    ),
}
WITH_SWIGLU = [name for name in FAMILIES if name != "gpt-oss"]


def their_block(family: Family, seed: int) -> nn.Module:
    """Their code with weights that matter, biases included."""
    block = family.block(family.config).eval()
    with torch.no_grad():
        for number, (name, tensor) in enumerate(block.state_dict(keep_vars=True).items()):
            router = "gate.weight" in name or tensor.dim() == 1 or family.block is GptOssTopKRouter
            values = randn(*tensor.shape, seed=100 * seed + number)
            # Scores of neither 0 nor 1; of the sigmoid, a bias is a tenth.
            size = 0.1 if "correction" in name else 0.3 if router else D**-0.5
            tensor.copy_(size * values)
    return block


def our_layer(family: Family, theirs: nn.Module) -> MoELayer:
    """Our layer with their weights."""
    layer = MoELayer(
        ModelConfig.model_validate(
            {
                "vocab_size": 32,
                "hidden_size": D,
                "moe": {
                    "num_experts": E,
                    "intermediate_size": F,
                    "num_shared_experts": family.num_shared_experts,
                    "router": {"name": "topk", "top_k": K, **family.router},
                },
            }
        )
    )
    given = theirs.state_dict()
    if family.block is GptOssTopKRouter:
        state = {"router.weight": given["weight"], "router.logit_bias": given["bias"]}
        layer.load_state_dict(state, strict=False)
        return layer
    gate, up = given["experts.gate_up_proj"].chunk(2, dim=1)  # (E, F, D) each
    state = {
        "router.weight": given["gate.weight"],
        "router.expert_bias": given.get("gate.e_score_correction_bias", torch.zeros(E)),
        "experts.w1": gate,
        "experts.w3": up,
        "experts.w2": given["experts.down_proj"],
    }
    for ours, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        if family.num_shared_experts:
            state[f"shared_experts.{ours}.weight"] = given[f"shared_experts.{name}.weight"]
    layer.load_state_dict(state)
    return layer


def context() -> RouterContext:
    return RouterContext(torch.zeros(B * S).long(), None, None, (B, S), False)


def their_routing(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) experts by rising number, and their weights in that order."""
    router: Any = getattr(block, "gate", block)
    _, weights, indices = router(x)
    order = indices.argsort(-1)
    return indices.gather(-1, order), weights.gather(-1, order)


def sorted_routing(routing: Routing) -> tuple[Tensor, Tensor]:
    order = routing.topk_indices.argsort(-1)
    return routing.topk_indices.gather(-1, order), routing.topk_weights.gather(-1, order)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_weights_equal_those_of(name, seed):
    family = FAMILIES[name]
    theirs = their_block(family, seed)
    layer = our_layer(family, theirs)
    x = randn(B * S, D, seed=seed + 50)
    ids, weights = sorted_routing(layer.router(x, context()))
    expected_ids, expected = their_routing(theirs, x)
    assert torch.equal(ids, expected_ids)
    assert len(ids.unique()) == E, "every expert is chosen by somebody"
    assert float((weights - expected).detach().abs().max()) <= 1e-6
    assert relative_error(weights, expected) <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_weights_equal_those_of(name):
    family = FAMILIES[name]
    theirs = their_block(family, 3)
    layer = our_layer(family, theirs)
    router: Any = getattr(theirs, "gate", theirs)
    x, grad = randn(B * S, D, seed=53), randn(B * S, K, seed=54)
    ours, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (sorted_routing(layer.router(ours, context()))[1] * grad).sum().backward()
    (their_routing(theirs, other)[1] * grad).sum().backward()
    assert relative_error(ours.grad, other.grad) < 1e-5
    assert relative_error(layer.router.weight.grad, router.weight.grad) < 1e-5
    if name == "gpt-oss":
        assert relative_error(layer.router.logit_bias.grad, router.bias.grad) < 1e-5


@pytest.mark.parametrize("name", WITH_SWIGLU)
def test_output_of_the_layer_equals_that_of(name):
    family = FAMILIES[name]
    theirs = their_block(family, 4)
    layer = our_layer(family, theirs)
    x = randn(B, S, D, seed=55)
    ours, other = (x.clone().requires_grad_() for _ in range(2))
    out, _ = layer(ours.flatten(0, 1), context())
    expected = theirs(other)
    assert_equals(out.view(B, S, D), expected)
    grad = randn(B, S, D, seed=56)
    (out.view(B, S, D) * grad).sum().backward()
    (expected * grad).sum().backward()
    assert_equals(ours.grad, other.grad, "gradient of the hidden states")


# What each family has beside plain top-k: without it, the comparison must fail.
LOST = {
    "group limit": ("DeepSeek-V3", {"num_groups": None, "groups_per_token": None}),
    "fewer groups": ("DeepSeek-V3", {"groups_per_token": 3}),
    "choice without its bias": ("DeepSeek-V3", {"bias_update_rate": 0.0}),
    "scale": ("DeepSeek-V3", {"scale": 1.0}),
    "sigmoid": ("DeepSeek-V3 without groups", {"score": "softmax"}),
    "normalisation": ("Qwen3-MoE", {"normalize": False}),
    "raw weights": ("OLMoE", {"normalize": True}),
    "logit bias": ("gpt-oss", {"logit_bias": False}),
}


@pytest.mark.parametrize("lost", LOST)
def test_the_comparison_notices_the_loss_of(lost):
    name, changes = LOST[lost]
    family = FAMILIES[name]
    theirs = their_block(family, 0)
    router = our_layer(family, theirs).router
    router.config = router.config.model_copy(update=changes)
    x = randn(B * S, D, seed=50)
    ids, weights = sorted_routing(router(x, context()))
    expected_ids, expected = their_routing(theirs, x)
    same = torch.equal(ids, expected_ids) and relative_error(weights, expected) <= 1e-3
    assert not same
