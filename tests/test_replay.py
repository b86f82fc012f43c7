"""Do routes that were chosen elsewhere give the same model, with routers that still learn?"""

import pytest
import torch
from conftest import assert_equals, randn
from model_cases import tiny_config, tiny_model, tokens

from kernels.routing import fused_topk, weights_of
from moe.model import MoETransformer
from moe.routing import RouterContext
from moe.variants import load_variant, variant_names


def route_of(output):
    """(B, S, K) a layer, of a batch of 2."""
    return [routing.topk_indices.view(2, -1, 2) for routing in output.routings]


def step(model, routes=None):
    """Output and gradients of one forward and backward pass."""
    model.zero_grad()
    input_ids = tokens(2, 20)
    output = model(input_ids, input_ids.roll(-1, 1), routes=routes)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_of_chosen_experts_are_those_of_the_choice(score, normalize):
    logits = randn(50, 7, seed=1, dtype=torch.float64).requires_grad_()
    chosen = fused_topk(logits, 3, score=score, normalize=normalize, backend="torch")
    again = weights_of(logits, chosen.topk_indices, score=score, normalize=normalize)
    for ours, theirs in zip(again, chosen, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.autograd.gradcheck(
        lambda x: weights_of(x, chosen.topk_indices, score=score, normalize=normalize)[0], logits
    )


def test_an_expert_that_was_taken_away_weighs_nothing():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    taken = weights_of(logits, torch.tensor([[2, -1]]))
    assert taken.topk_weights.tolist() == [[1, 0]]
    raw = weights_of(logits, torch.tensor([[-1, 0]]), normalize=False)
    assert raw.topk_weights[0].tolist() == pytest.approx([0, float(logits.softmax(-1)[0, 0])])
    assert weights_of(logits, torch.tensor([[-1, -1]])).topk_weights.tolist() == [[0, 0]]


def test_replayed_routes_give_the_same_loss_and_gradients():
    model = tiny_model()
    free, free_grads = step(model)
    replayed, grads = step(model, route_of(free))
    assert torch.equal(replayed.loss, free.loss)
    assert all(torch.equal(grads[name], grad) for name, grad in free_grads.items())


def test_foreign_routes_are_taken_and_the_router_still_learns():
    model = tiny_model()
    free, _ = step(model)
    foreign = [(indices + 1) % 6 for indices in route_of(free)]
    output, grads = step(model, foreign)
    for routing, wanted in zip(output.routings, foreign, strict=True):
        assert torch.equal(routing.topk_indices.view(2, -1, 2), wanted)
        assert routing.tokens_per_expert.sum() == 2 * 20 * 2
    assert not torch.equal(output.loss, free.loss)
    for name, grad in grads.items():
        assert grad.abs().sum() > 0, name


def test_layers_may_choose_for_themselves_beside_replayed_ones():
    model = tiny_model()
    free, _ = step(model)
    first = route_of(free)[0]
    output, _ = step(model, [(first + 1) % 6, None])
    assert not torch.equal(output.routings[0].topk_indices, free.routings[0].topk_indices)
    own, _ = step(model, [first, None])
    assert torch.equal(own.loss, free.loss)


def test_recomputation_replays_too():
    model = tiny_model()
    free, _ = step(model)
    foreign = [(indices + 1) % 6 for indices in route_of(free)]
    _, kept = step(model, foreign)
    model.activation_checkpointing = True
    _, recomputed = step(model, foreign)
    for name, grad in kept.items():
        assert_equals(recomputed[name], grad)


def test_padding_has_no_route():
    model = tiny_model()
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[:, 15:] = False
    input_ids = tokens(2, 20)
    routes = [torch.zeros(2, 20, 2).long() + torch.arange(2)] * 2
    output = model(input_ids, valid=valid, routes=routes)
    for routing in output.routings:
        assert routing.tokens_per_expert.tolist() == [30, 30, 0, 0, 0, 0]


@pytest.mark.parametrize("name", variant_names("routers"))
def test_a_router_that_says_so_takes_the_routes_that_it_is_given(name):
    module = load_variant("routers", name)
    if not getattr(module.Router, "replays", False):
        pytest.skip("does not replay")
    router = module.Router(module.Config(name=name), 8, 5)
    with torch.no_grad():
        for seed, parameter in enumerate(router.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    x = randn(12, 8, seed=3)
    context = RouterContext(torch.arange(12), None, None, (1, 12), False)
    free = router(x, context)
    foreign = (free.topk_indices + 1) % 5
    routing = router(x, context._replace(topk_indices=foreign))
    assert torch.equal(routing.topk_indices, foreign)
    assert torch.equal(routing.router_logits, free.router_logits)
    own = router(x, context._replace(topk_indices=free.topk_indices))
    assert torch.equal(own.topk_weights, free.topk_weights)


def test_wrong_routes_are_refused():
    model = tiny_model()
    good = torch.zeros(2, 20, 2).long()
    with pytest.raises(ValueError, match="routes has 1 layers, needs 2"):
        model(tokens(2, 20), routes=[good])
    with pytest.raises(ValueError, match=r"routes of layer 1 are \(2, 20, 3\), need \(2, 20, 2\)"):
        model(tokens(2, 20), routes=[good, torch.zeros(2, 20, 3).long()])


def test_a_router_that_cannot_replay_is_named(monkeypatch):
    monkeypatch.setattr(load_variant("routers", "topk").Router, "replays", False)
    model = MoETransformer(tiny_config())
    with pytest.raises(ValueError, match=r"model.moe.router.name \(topk\) cannot replay"):
        model(tokens(2, 20), routes=[None, torch.zeros(2, 20, 2).long()])
