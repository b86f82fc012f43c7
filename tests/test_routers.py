"""Do the record of a routing and top-k do what they say? What all routers keep:
`tests/test_router_contract.py`."""

import numpy as np
import pytest
import torch
from conftest import randn, relative_error
from model_cases import tiny_model
from router_cases import D, E, T, build, context
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.routing import fused_topk
from moe.routing import make_routing, noise_like
from moe.variants import load_variant


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
        assert a is b is None or torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
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


def test_a_logit_bias_enters_choice_and_weights():
    router = build("topk", {"top_k": 2, "logit_bias": True})
    x, bias = randn(T, D, seed=9), np.array([0.0, 3.0, 0.0, -3.0, 1.0, 0.0])
    with torch.no_grad():
        router.logit_bias.copy_(torch.from_numpy(bias))
    routing = router(x, context())
    logits = x.double().numpy() @ router.weight.detach().double().numpy().T + bias
    assert relative_error(routing.router_logits, torch.from_numpy(logits)) < 1e-5
    best = np.argsort(-logits, axis=-1)[:, :2]
    assert routing.topk_indices.tolist() == best.tolist()
    powers = np.exp(np.take_along_axis(logits, best, -1))
    expected = torch.from_numpy(powers / powers.sum(-1, keepdims=True))
    assert relative_error(routing.topk_weights, expected) < 1e-5
    assert not hasattr(build("topk", {}), "logit_bias")


def test_a_logit_bias_begins_at_0():
    router = (
        tiny_model(moe={"router": {"name": "topk", "logit_bias": True}})
        .blocks[0]
        .feed_forward.router
    )
    assert torch.count_nonzero(router.logit_bias) == 0
    assert router.weight.abs().max() > 0.1


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


@pytest.mark.parametrize("fill", [torch.Tensor.uniform_, torch.Tensor.normal_])
def test_noise_of_a_sequence_follows_from_its_seed_and_the_layer_alone(fill):
    seeds = torch.tensor([5, 2**63 - 1, 5])

    def drawn(rows: slice, layer: int = 0) -> torch.Tensor:
        shape = (len(seeds[rows]), 8)
        about = context(shape=shape)._replace(noise_seeds=seeds[rows], layer=layer)
        torch.rand(3)
        return noise_like(torch.zeros(shape[0] * shape[1], E), about, fill).view(*shape, E)

    whole = drawn(slice(3))
    assert torch.equal(drawn(slice(1, 3)), whole[1:])
    assert torch.equal(whole[0], whole[2]) and not torch.equal(whole[0], whole[1])
    assert not bool((drawn(slice(3), layer=1) == whole).any())
    # Numbers of the stream that the seed begins.
    expected = torch.empty(8, E)
    fill(expected, generator=torch.Generator().manual_seed(5))
    assert torch.equal(whole[0], expected)


def test_seeds_for_another_number_of_sequences_are_refused():
    about = context()._replace(noise_seeds=torch.zeros(2).long())
    with pytest.raises(ValueError, match="zip"):
        noise_like(torch.zeros(T, E), about, torch.Tensor.uniform_)


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
