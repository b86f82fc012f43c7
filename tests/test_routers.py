"""Does every router keep the contract, and does top-k do what its papers say?"""

import pytest
import torch
from conftest import randn, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.routing import fused_topk
from moe.routing import RouterContext, make_routing
from moe.variants import load_variant, variant_names

T, D, E = 24, 10, 6
SHAPE = (3, 8)

# Settings to try of each router, beside its defaults.
SETTINGS = {
    "topk": [
        {"top_k": 3, "score": "sigmoid", "bias_update_rate": 0.01},
        {"top_k": 1, "normalize": False, "jitter": 0.3},
        {"top_k": E},
    ],
}
CASES = [
    pytest.param(name, settings, id=f"{name} {settings}")
    for name in variant_names("routers")
    for settings in ({}, *SETTINGS.get(name, []))
]


def build(name, settings, dtype=torch.float32):
    module = load_variant("routers", name)
    router = module.Router(module.Config(name=name, **settings), D, E)
    with torch.no_grad():
        for seed, parameter in enumerate(router.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return router.to(dtype)


def context(valid=None, training=False, generator=None, shape=SHAPE):
    num_tokens = shape[0] * shape[1]
    return RouterContext(
        token_ids=torch.arange(num_tokens) % 5,
        document_ids=torch.zeros(num_tokens, dtype=torch.int32),
        valid=valid,
        batch_shape=shape,
        training=training,
        generator=generator,
    )


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_record_is_complete_and_counts_what_it_holds(name, settings, with_padding, training):
    router = build(name, settings).train(training)
    valid = torch.arange(T) % 3 > 0 if with_padding else None
    routing = router(randn(T, D, seed=9), context(valid, training))
    top_k = routing.topk_indices.shape[1]
    assert routing.router_logits.shape == routing.router_probs.shape == (T, E)
    assert routing.topk_weights.shape == (T, top_k)
    floats = (routing.router_logits, routing.router_probs, routing.topk_weights)
    assert {t.dtype for t in floats} == {torch.float32}
    indices = routing.topk_indices
    assert indices.dtype == torch.int64
    assert ((indices >= -1) & (indices < E)).all()
    assert (routing.topk_weights[indices < 0] == 0).all()
    counts = [int((indices == e).sum()) for e in range(E)]
    assert routing.tokens_per_expert.tolist() == counts
    num_tokens = T if valid is None else int(valid.sum())
    assert int(routing.num_tokens) == num_tokens
    assert bool(routing.logits_finite)
    if router.fixed_k:
        assert sum(counts) == num_tokens * top_k
    if valid is not None:
        assert (indices[~valid] == -1).all()
    # No expert twice for one token.
    chosen = [[e for e in row if e >= 0] for row in indices.tolist()]
    assert all(len(set(row)) == len(row) for row in chosen)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradient_reaches_every_parameter_and_the_tokens(name, settings):
    router = build(name, settings)
    if not getattr(router, "learned", True):
        assert not list(router.parameters())
        pytest.skip("has no weights")
    x = randn(T, D, seed=9).requires_grad_()
    weights = router(x, context()).topk_weights
    (weights * randn(*weights.shape, seed=5)).sum().backward()
    for parameter_name, parameter in router.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 1e-4, parameter_name
    assert x.grad.abs().sum() > 1e-4


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_evaluation_is_deterministic_and_changes_no_state(name, settings):
    router = build(name, settings)
    before = {k: v.clone() for k, v in router.state_dict().items()}
    x = randn(T, D, seed=9)
    first, second = router(x, context()), router(x, context())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    router(x, context(training=True))
    assert all(torch.equal(v, before[k]) for k, v in router.state_dict().items())


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_noise_follows_the_generator(name, settings):
    router = build(name, settings)
    x = randn(T, D, seed=9)

    def route(seed):
        generator = torch.Generator().manual_seed(seed)
        return router(x, context(training=True, generator=generator)).router_logits

    assert torch.equal(route(1), route(1))
    if settings.get("jitter"):
        assert not torch.equal(route(1), route(2))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_causal_router_does_not_see_later_tokens(name, settings):
    router = build(name, settings, torch.float64)
    if not router.causal:
        pytest.skip("says that it is not causal")
    x = randn(T, D, seed=9, dtype=torch.float64)
    other = x.clone().view(*SHAPE, D)
    other[1, 5:] += randn(3, D, seed=10)
    first, second = router(x, context()), router(other.view(T, D), context())
    unchanged = torch.ones(SHAPE, dtype=torch.bool)
    unchanged[1, 5:] = False
    unchanged = unchanged.flatten()
    assert torch.equal(first.topk_indices[unchanged], second.topk_indices[unchanged])
    assert relative_error(second.topk_weights[unchanged], first.topk_weights[unchanged]) < 1e-10


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_padding_changes_no_other_token(name, settings):
    router = build(name, settings, torch.float64)
    valid = torch.arange(T) % 4 > 0
    x = randn(T, D, seed=9, dtype=torch.float64)
    other = torch.where(valid.unsqueeze(-1), x, 1e3)
    first, second = router(x, context(valid)), router(other, context(valid))
    assert torch.equal(first.topk_indices, second.topk_indices)
    assert relative_error(second.topk_weights, first.topk_weights) < 1e-10


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_router_is_in_float32_under_autocast_and_in_bfloat16(name, settings):
    x = randn(T, D, seed=9)
    router = build(name, settings)
    plain = router(x, context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x, context())
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    narrow = build(name, settings, torch.bfloat16)
    routing = narrow(x.bfloat16(), context())
    # The same float32 arithmetic on the rounded weights and tokens.
    wide = build(name, settings)
    wide.load_state_dict(narrow.state_dict())
    expected = wide(x.bfloat16().float(), context())
    assert all(torch.equal(a, b) for a, b in zip(routing, expected, strict=True))


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_non_finite_logits_are_flagged_unless_they_are_padding(name, settings, poison):
    router = build(name, settings)
    x = randn(T, D, seed=9)
    x[7, 2] = poison
    assert not bool(router(x, context()).logits_finite)
    valid = torch.arange(T) != 7
    assert bool(router(x, context(valid)).logits_finite)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_router_builds_on_meta_and_restores_its_state(name, settings):
    module = load_variant("routers", name)
    with torch.device("meta"):
        router = module.Router(module.Config(name=name, **settings), D, E)
    router = router.to_empty(device="cpu")
    source = build(name, settings)
    if hasattr(source, "after_step"):
        source.after_step(torch.arange(E))
    router.load_state_dict(source.state_dict())
    assert router.state_dict().keys() == source.state_dict().keys()
    x = randn(T, D, seed=9)
    for ours, expected in zip(router(x, context()), source(x, context()), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_no_tokens_is_fine(name, settings):
    routing = build(name, settings)(torch.zeros(0, D), context(shape=(0, 8)))
    assert routing.tokens_per_expert.tolist() == [0] * E
    assert bool(routing.logits_finite)


@pytest.mark.parametrize("with_padding", [False, True])
def test_record_is_the_same_whoever_looked_at_the_logits(with_padding):
    logits = randn(T, E, seed=1)
    logits[3, 2], logits[7, 1] = torch.nan, torch.inf
    chosen = fused_topk(logits, 2)
    valid = torch.arange(T) % 4 < 3 if with_padding else None
    arguments = logits, chosen.router_probs, chosen.topk_weights, chosen.topk_indices, valid
    theirs = make_routing(*arguments)
    ours = make_routing(*arguments, logits_finite=chosen.logits_finite)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    # Both broken tokens are padding.
    assert bool(ours.logits_finite) is with_padding


def test_counts_and_sums_need_no_value_on_the_host():
    # A fake tensor has none: to read one back, as bincount does for its size, raises.
    with FakeTensorMode():
        logits, valid = torch.empty(T, E), torch.empty(T, dtype=torch.bool)
        chosen = fused_topk(logits, 2, bias=torch.empty(E), groups=(3, 2))
        for mask in (None, valid):
            arguments = logits, chosen.router_probs, chosen.topk_weights, chosen.topk_indices
            assert make_routing(*arguments, mask).tokens_per_expert.shape == (E,)


# --- top-k ---


def test_topk_weights_by_hand():
    router = build("topk", {"top_k": 2})
    with torch.no_grad():
        router.weight.zero_()
        # logits log 1, log 2, log 3, log 4, 0, 0 of a token (1, 0, ...): probs 1/12 .. 4/12
        router.weight[:4, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    x = torch.zeros(1, D)
    x[0, 0] = 1
    routing = router(x, context(shape=(1, 1)))
    assert routing.topk_indices.tolist() == [[3, 2]]
    assert routing.topk_weights.tolist() == [pytest.approx([4 / 7, 3 / 7], rel=1e-6)]
    assert routing.router_probs[0, 1].item() == pytest.approx(2 / 12, rel=1e-6)


def test_bias_chooses_but_does_not_weigh():
    plain = build("topk", {"top_k": 2, "score": "sigmoid"})
    biased = build("topk", {"top_k": 2, "score": "sigmoid", "bias_update_rate": 0.01})
    x = randn(T, D, seed=9)
    biased.expert_bias[4] = 10
    routing = biased(x, context())
    assert (routing.topk_indices[:, 0] == 4).all()
    chosen = plain(x, context()).router_probs.gather(1, routing.topk_indices)
    expected = chosen / chosen.sum(-1, keepdim=True)
    assert relative_error(routing.topk_weights, expected) < 1e-6
    # An equal bias for all changes no bit, neither of weights nor of gradients.
    biased.expert_bias.fill_(0.5)
    grads = []
    for router in (plain, biased):
        weights = router(x, context()).topk_weights
        (weights * randn(T, 2, seed=5)).sum().backward()
        grads += [weights, router.weight.grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])
    # Without a rate the bias plays no part.
    plain.expert_bias[4] = 10
    assert not (plain(x, context()).topk_indices[:, 0] == 4).all()


def test_bias_update_by_hand():
    router = build("topk", {"bias_update_rate": 0.25})
    # mean 10: above it goes down, below it goes up, equal stays.
    router.after_step(torch.tensor([10, 0, 30, 11, 9, 0]))
    assert router.expert_bias.tolist() == [0, 0.25, -0.25, -0.25, 0.25, 0.25]
    router.after_step(torch.tensor([20, 10, 0, 10, 10, 10]))
    assert router.expert_bias.tolist() == [-0.25, 0.25, 0.0, -0.25, 0.25, 0.25]
    still = build("topk", {})
    still.after_step(torch.tensor([10, 0, 30, 11, 9, 0]))
    assert torch.count_nonzero(still.expert_bias) == 0


def test_bias_balances_a_skewed_load():
    router = build("topk", {"bias_update_rate": 0.02, "score": "sigmoid"})
    x = randn(T * 20, D, seed=9) + 0.5
    shape = (T * 20, 1)
    before = router(x, context(shape=shape)).tokens_per_expert
    for _ in range(200):
        router.after_step(router(x, context(shape=shape)).tokens_per_expert)
    after = router(x, context(shape=shape)).tokens_per_expert
    mean = T * 20 * 2 / E
    assert before.max() > 1.5 * mean
    assert after.max() < 1.1 * mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_stays_float32_to_the_bit_whatever_the_model_becomes(dtype):
    router = build("topk", {"bias_update_rate": 0.001})
    bias = 7 + 0.001 * torch.arange(E)
    router.expert_bias.copy_(bias)
    parent = torch.nn.Sequential(router).to(dtype)
    for _ in range(2):
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, bias)
        assert router.weight.dtype == dtype
        parent = parent.bfloat16().to(dtype)
    state = parent.state_dict()
    assert state["0.expert_bias"].dtype == torch.float32
    router.after_step(torch.tensor([10, 0, 0, 0, 0, 0]))
    # In bfloat16 a bias of 7 would not move by 0.001.
    assert float(router.expert_bias[0]) == pytest.approx(6.999, abs=1e-6)
    assert float(router.expert_bias[1]) == pytest.approx(7.002, abs=1e-6)


def test_jitter_scales_each_input_within_its_bounds():
    router = build("topk", {"jitter": 0.1})
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    x = torch.ones(4000, D)
    logits = router(x, context(training=True, shape=(4000, 1))).router_logits
    assert 0.9 <= logits.min() < 0.905
    assert 1.095 < logits.max() <= 1.1
    assert abs(logits.mean().item() - 1) < 0.005
    assert torch.equal(router(x, context(shape=(4000, 1))).router_logits, torch.ones(4000, E))


def test_top_1_with_normalised_weights_is_refused():
    config = load_variant("routers", "topk").Config
    with pytest.raises(ValueError, match=r"normalize \(True\) with top_k \(1\) makes every weight"):
        config(top_k=1)
    assert config(top_k=1, normalize=False).top_k == 1
    # The reason: with one normalised choice the router's gradient is 0.
    router = build("topk", {"top_k": 1, "normalize": False})
    router.config = router.config.model_copy(update={"normalize": True})
    router(randn(T, D, seed=9), context()).topk_weights.square().sum().backward()
    assert router.weight.grad.abs().max() < 1e-6
