"""Do zero, copy and constant experts add what their formulas say, and cost nothing?"""

import numpy as np
import pytest
import torch
from conftest import assert_equals, randn, relative_error
from model_cases import tiny_config, tiny_model, tokens
from pydantic import ValidationError

from moe.layer import MoELayer, init_feed_forward
from moe.model import MoETransformer, flops_per_token, num_parameters
from moe.routing import RouterContext

D, E, T = 10, 4, 32
KINDS = {"num_zero_experts": 2, "num_copy_experts": 1, "num_constant_experts": 2}
CHOICES = E + sum(KINDS.values())


def context(training=True):
    return RouterContext(torch.zeros(T, dtype=torch.int64), None, None, (4, 8), training)


def layer(**changes):
    moe = {"num_experts": E, "intermediate_size": 6, "router": {"name": "topk", "top_k": 3}}
    config = tiny_config(
        hidden_size=D, attention={"num_heads": 1, "num_kv_heads": 1}, moe=moe | KINDS | changes
    )
    out = MoELayer(config)
    init_feed_forward(out, 0.5, 0.5, lambda name: torch.Generator().manual_seed(len(name)))
    return out.double()


def by_hand(module, x, routing, kinds=KINDS):
    """(T, D), a token and an expert at a time; kinds: how many of each there are."""
    zero, copy, _ = kinds.values()
    weights = {k: v.detach().numpy() for k, v in module.named_parameters()}
    out = np.zeros((T, D))
    for token in range(T):
        row = x[token].numpy()
        for weight, expert in zip(
            routing.topk_weights[token].tolist(), routing.topk_indices[token].tolist(), strict=True
        ):
            if expert < E:
                w1, w2, w3 = (weights[f"experts.w{i}"][expert] for i in (1, 2, 3))
                gate = w1 @ row
                y = w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ row))
            elif expert < E + zero:
                y = np.zeros(D)
            elif expert < E + zero + copy:
                y = row
            else:
                number = expert - E - zero - copy
                mix = np.exp(weights["zero_computation.weight"][2 * number : 2 * number + 2] @ row)
                a_1, a_2 = mix / mix.sum()
                y = a_1 * row + a_2 * weights["zero_computation.vectors"][number]
            out[token] += weight * y
    return out


def test_a_layer_is_the_sum_of_its_formulas():
    module, x = layer(), randn(T, D, seed=1, dtype=torch.float64)
    out, routing = module(x, context())
    assert routing.tokens_per_expert.shape == (CHOICES,)
    assert (routing.tokens_per_expert > 0).all()
    assert relative_error(out, torch.tensor(by_hand(module, x, routing))) < 1e-10


def test_gradients_are_those_of_the_formulas():
    module = layer()
    x = randn(T, D, seed=1, dtype=torch.float64).requires_grad_()
    chosen = module.router(x, context()).topk_indices
    given = context()._replace(topk_indices=chosen)
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x, given)
        )[0]

    # Along random directions: one number after the other would take minutes.
    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind):
    kinds = dict.fromkeys(KINDS, 0) | {kind: 3}
    module, x = layer(**kinds), randn(T, D, seed=1, dtype=torch.float64)
    out, routing = module(x, context())
    parameters = {n for n, _ in module.named_parameters() if n.startswith("zero_computation")}
    assert bool(parameters) == (kind == "num_constant_experts")
    assert (routing.tokens_per_expert[E:] > 0).all()
    assert relative_error(out, torch.tensor(by_hand(module, x, routing, kinds))) < 1e-10


def test_a_token_that_only_takes_zero_experts_passes_by():
    module = layer(router={"name": "topk", "top_k": 2})
    x = randn(T, D, seed=1, dtype=torch.float64)
    everywhere = torch.tensor([E, E + 1]).expand(T, 2)
    out, routing = module(x, context()._replace(topk_indices=everywhere))
    assert (out == 0).all()
    assert routing.tokens_per_expert.tolist() == [0] * E + [T, T, 0, 0, 0]
    copied, _ = module(x, context()._replace(topk_indices=everywhere + 1))
    weights = module.router(x, context()._replace(topk_indices=everywhere + 1)).topk_weights
    assert_equals(copied, weights[:, 1:] * x)


def test_a_capacity_bounds_networks_alone():
    module = layer(capacity_factor=0.2)
    _, routing = module(randn(T, D, seed=1, dtype=torch.float64), context())
    assert (routing.num_dropped[:E] > 0).all() and (routing.num_dropped[E:] == 0).all()
    assert routing.demand.sum() == 3 * T


def test_in_bfloat16_copies_and_constants_are_summed_before_they_are_rounded():
    narrow, x = layer().bfloat16(), randn(T, D, seed=1).bfloat16()
    costless = torch.tensor([E + 2, E + 3, E + 4]).expand(T, 3)
    out, routing = narrow(x, context()._replace(topk_indices=costless))
    assert out.dtype == torch.bfloat16
    exact_module = layer()
    exact_module.load_state_dict(narrow.state_dict())
    terms = [
        torch.tensor(by_hand(exact_module, x.double(), routing._replace(topk_weights=weights)))
        for weights in (routing.topk_weights.unsqueeze(-1) * torch.eye(3)).unbind(-1)
    ]
    exact = sum(terms)
    rounded_once = relative_error(exact.bfloat16(), exact)
    assert relative_error(out, exact) < 1.01 * rounded_once
    # As a sum in bfloat16 would not be.
    assert relative_error(sum(term.bfloat16() for term in terms), exact) > 1.2 * rounded_once


def test_they_count_as_choices_and_cost_no_flops():
    plain = tiny_config(moe={"num_experts": 4, "router": {"name": "topk", "top_k": 3}})
    config = tiny_config(moe={"num_experts": 4, "router": {"name": "topk", "top_k": 3}} | KINDS)
    assert config.moe.num_choices == CHOICES and config.experts_per_token == 3 * 4 / CHOICES
    with torch.device("meta"):
        model, other = MoETransformer(config), MoETransformer(plain)
    ours, theirs = num_parameters(model), num_parameters(other)
    assert ours.experts == theirs.experts
    expert, layers = 3 * 24 * 14, 2
    router = (CHOICES - 4) * 24
    constants = 3 * 2 * 24
    fewer = round(expert * 3) - round(expert * 3 * 4 / CHOICES)
    assert theirs.active - ours.active == layers * (fewer - router - constants)
    saved = flops_per_token(other, 8) - flops_per_token(model, 8)
    assert abs(saved - 6 * (theirs.active - ours.active)) <= 6


def test_an_error_of_a_router_says_which_of_its_choices_cost_nothing():
    moe = {"num_experts": 6, "num_zero_experts": 3, "router": {"name": "relu", "target": 9}}
    with pytest.raises(ValidationError, match=r"num_experts \(9\); 3 of these 9 cost nothing"):
        tiny_config(moe=moe)


def test_a_balanced_router_gives_a_token_the_networks_that_were_asked_for():
    """Under a skewed score, steered by the loss-free bias: K E / (E + Z) to 2 %."""
    router = {"name": "topk", "top_k": 3, "score": "sigmoid", "bias_update_rate": 0.01}
    module = layer(router=router)
    with torch.no_grad():
        module.router.weight[0] += 1.0  # most tokens want the first network, or none of them
    draw = torch.Generator().manual_seed(0)
    per_token = []
    for _ in range(300):
        x = torch.randn(T, D, generator=draw, dtype=torch.float64) + 0.3
        routing = module.router(x, context())
        module.router.after_step(routing.demand)
        per_token.append(float(routing.demand[:E].sum()) / T)
    start, end = np.mean(per_token[:5]), np.mean(per_token[100:])
    wanted = 3 * E / CHOICES
    assert abs(end - wanted) < 0.02 * wanted < abs(start - wanted)


def test_a_model_with_them_generates_as_it_evaluates():
    model = tiny_model(dtype=torch.float64, moe=KINDS).eval()
    ids = tokens(1, 9)
    whole = model(ids)
    caches, rows = None, []
    for place in range(9):
        out = model(ids[:, place : place + 1], caches=caches)
        caches = out.caches
        rows.append(out.logits[:, 0])
    assert relative_error(torch.stack(rows, 1), whole.logits) < 1e-10
    assert all(routing.tokens_per_expert[E:].sum() > 0 for routing in whole.routings)
