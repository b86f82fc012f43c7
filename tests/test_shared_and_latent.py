"""Are shared experts' gates and latent experts the formulas of their papers, compiled too?"""

import math

import numpy as np
import pytest
import torch
from conftest import assert_equals, randn, relative_error
from model_cases import context, moe_layer


def test_residual_moe_weights_both_parts_by_a_softmax():
    """DeepSpeed's `use_residual`, arXiv 2201.05596, by hand."""
    layer = moe_layer(num_shared_experts=1, shared_gate="softmax")
    assert layer.shared_gate.weight.shape == (2, 24)
    x = randn(30, 24, seed=9, dtype=torch.float64)
    out, _ = layer(x, context(30))
    first, second = np.exp(layer.shared_gate.weight.detach().numpy() @ x.numpy().T)
    of_routed = torch.from_numpy(first / (first + second)).unsqueeze(-1)
    assert of_routed.min() < 0.3 and of_routed.max() > 0.7
    shared, layer.shared_experts = layer.shared_experts, None
    routed = layer(x, context(30))[0]
    assert_equals(out, of_routed * routed + (1 - of_routed) * shared(x))


@pytest.mark.parametrize("shared_gate", ["sigmoid", "softmax"])
def test_gates_of_shared_experts_are_in_the_dtype_of_the_matmuls(shared_gate):
    layer = moe_layer(num_shared_experts=1, shared_gate=shared_gate).float()
    x = randn(30, 24, seed=9)
    wide, _ = layer(x, context(30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, _ = layer(x, context(30))
    assert narrow.dtype == torch.bfloat16
    assert relative_error(narrow, wide) < 0.03
    assert layer.bfloat16()(x.bfloat16(), context(30))[0].dtype == torch.bfloat16


LAYERS = [
    {"shared_gate": "sigmoid", "num_shared_experts": 1},
    {"shared_gate": "softmax", "num_shared_experts": 2, "experts": {"name": "geglu", "clamp": 0.5}},
    {"shared_gate": "softmax", "num_shared_experts": 1, "latent_size": 7},
    {"latent_size": 7, "experts": {"name": "relu2"}},
]


@pytest.mark.parametrize("moe", LAYERS, ids=str)
def test_gradients_of_the_layer_are_those_of_differences(moe):
    layer = moe_layer(**moe)
    names, weights = zip(*layer.named_parameters(), strict=True)
    x = randn(5, 24, seed=9, dtype=torch.float64).requires_grad_()

    def call(x, *weights):
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x, context(5)))[0]

    assert torch.autograd.gradcheck(call, [x, *weights], fast_mode=True)


# Each takes seconds to compile.
@pytest.mark.parametrize("moe", LAYERS[1:3], ids=str)
def test_a_compiled_layer_computes_what_it_computes_otherwise(moe):
    layer = moe_layer(**moe)
    compiled = torch.compile(layer, backend="aot_eager")
    x = randn(30, 24, seed=9, dtype=torch.float64).requires_grad_()
    out, routing = layer(x, context(30))
    again, its_routing = compiled(x, context(30))
    assert_equals(again, out)
    assert torch.equal(its_routing.topk_indices, routing.topk_indices)
    inputs = [x, *layer.parameters()]
    grad = randn(30, 24, seed=10, dtype=torch.float64)
    expected = torch.autograd.grad(out, inputs, grad)
    for ours, theirs in zip(torch.autograd.grad(again, inputs, grad), expected, strict=True):
        assert_equals(ours, theirs)


@pytest.mark.parametrize("experts", [{"name": "swiglu"}, {"name": "gelu"}], ids=str)
def test_latent_experts_are_one_more_matrix_before_and_behind_them(experts):
    layer = moe_layer(experts=experts, latent_size=7, num_shared_experts=1)
    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    assert weights["latent_down.weight"].shape == (7, 24)
    assert weights["latent_up.weight"].shape == (24, 7)
    assert weights["experts.w1"].shape == (6, 14, 7) and weights["experts.w2"].shape == (6, 7, 14)
    assert weights["shared_experts.w1.weight"].shape == (14, 24)
    x = randn(30, 24, seed=9, dtype=torch.float64)
    shared = layer.shared_experts(x).detach().numpy()
    out, routing = layer(x, context(30))
    logits = x.numpy() @ weights["router.weight"].T
    assert_equals(routing.router_logits, torch.from_numpy(logits))
    expected = []
    for token, before in enumerate(x.numpy() @ weights["latent_down.weight"].T):
        latent = np.zeros(7)
        best = np.argsort(-logits[token])[:2]
        shares = np.exp(logits[token, best]) / np.exp(logits[token, best]).sum()
        for share, e in zip(shares, best, strict=True):
            hidden = weights["experts.w1"][e] @ before
            if experts["name"] == "swiglu":
                hidden = hidden / (1 + np.exp(-hidden)) * (weights["experts.w3"][e] @ before)
            else:
                hidden = hidden * [0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
            latent += share * (weights["experts.w2"][e] @ hidden)
        expected.append(weights["latent_up.weight"] @ latent + shared[token])
    assert_equals(out, torch.from_numpy(np.stack(expected)))
