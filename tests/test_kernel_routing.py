"""Does `fused_topk` choose and weigh the experts that the formula names?"""

import numpy as np
import pytest
import torch
from conftest import NUM_TOKENS, assert_equals, gradients, leaves, randn

from kernels.routing import fused_topk, lowest_index_topk


def oracle(logits, top_k, score, normalize, bias=None, groups=None):
    """NumPy float64: (weights, indices, probs), one token at a time, stable sorts."""
    logits = np.asarray(logits, dtype=np.float64)
    if score == "softmax":
        probs = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
        probs /= probs.sum(-1, keepdims=True)
    else:
        probs = 1 / (1 + np.exp(-logits))
    weights, indices = [], []
    for p in probs:
        choice = p + (0 if bias is None else np.asarray(bias, dtype=np.float64))
        if groups is not None:
            by_group = choice.reshape(groups[0], -1)
            group_score = np.sort(by_group, -1)[:, -2:].sum(-1)
            kept = np.argsort(-group_score, kind="stable")[: groups[1]]
            choice = np.where(np.isin(np.arange(groups[0]), kept)[:, None], by_group, -np.inf)
            choice = choice.reshape(-1)
        best = np.argsort(-choice, kind="stable")[:top_k]
        w = p[best]
        weights.append(w / w.sum() if normalize else w)
        indices.append(best)
    shape = (len(probs), top_k)
    return np.array(weights).reshape(shape), np.array(indices, dtype=int).reshape(shape), probs


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (3, 2), (8, 2), (7, 7), (64, 8), (257, 20)]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_topk_equals_the_numpy_oracle(device, num_tokens, num_experts, top_k, score, normalize):
    logits = randn(num_tokens, num_experts, seed=1, device=device)
    ours = fused_topk(logits, top_k, score=score, normalize=normalize)
    weights, indices, probs = oracle(logits.cpu(), top_k, score, normalize)
    assert ours.topk_indices.cpu().numpy().tolist() == indices.tolist()
    assert_equals(ours.topk_weights, torch.from_numpy(weights), "weights")
    assert_equals(ours.router_probs, torch.from_numpy(probs), "probs")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_topk_gradient_equals_that_of_float64_autograd(device, score, normalize, top_k):
    logits = randn(63, 5, seed=2, device=device)
    grad_w, grad_p = randn(63, top_k, seed=3, device=device), randn(63, 5, seed=4, device=device)
    (ours_in,), (exact_in,) = leaves(logits), leaves(logits, dtype=torch.float64)
    ours = fused_topk(ours_in, top_k, score=score, normalize=normalize)
    probs = exact_in.softmax(-1) if score == "softmax" else 1 / (1 + (-exact_in).exp())
    weights = torch.stack([p[i] for p, i in zip(probs, ours.topk_indices, strict=True)])
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad((weights * grad_w).sum() + (probs * grad_p).sum(), [exact_in])
    total = (ours.topk_weights * grad_w).sum() + (ours.router_probs * grad_p).sum()
    (actual,) = torch.autograd.grad(total, [ours_in])
    assert_equals(actual, expected)


def test_topk_passes_gradcheck():
    (logits,) = leaves(randn(6, 5, seed=1, dtype=torch.float64))
    for score in ("softmax", "sigmoid"):
        for top_k in (2, 5):

            def call(x, score=score, top_k=top_k):
                out = fused_topk(x, top_k, score=score)
                return out.topk_weights, out.router_probs

            assert torch.autograd.gradcheck(call, [logits])


@pytest.mark.parametrize("num_experts", [8, 64])
def test_ties_go_to_the_lowest_index(device, num_experts):
    for top_k in (1, 2, 7, min(num_experts, 20)):
        equal = fused_topk(torch.zeros(5, num_experts, device=device), top_k)
        assert equal.topk_indices.tolist() == [list(range(top_k))] * 5
    # Two levels, the higher one at 6, 2 and 4: those first, by index, then the rest by index.
    logits = torch.zeros(1, num_experts, device=device)
    logits[0, [6, 2, 4]] = 1.0
    assert fused_topk(logits, 5).topk_indices.tolist() == [[2, 4, 6, 0, 1]]
    assert lowest_index_topk(logits, num_experts)[0, :5].tolist() == [2, 4, 6, 0, 1]


def test_bias_enters_the_choice_only(device):
    logits = randn(128, 8, seed=1, device=device)
    bias = torch.zeros(8, device=device)
    bias[5] = 10.0
    (plain_in,), (biased_in,) = leaves(logits), leaves(logits)
    for score in ("softmax", "sigmoid"):
        biased = fused_topk(biased_in, 2, score=score, bias=bias)
        assert (biased.topk_indices[:, 0] == 5).all()
        weights, indices, _ = oracle(logits.cpu(), 2, score, True, bias.cpu())
        assert biased.topk_indices.tolist() == indices.tolist()
        assert_equals(biased.topk_weights, torch.from_numpy(weights))
    # One bias for all leaves the choice, and then weights and gradients to the bit.
    plain = fused_topk(plain_in, 2)
    shifted = fused_topk(biased_in, 2, bias=torch.full((8,), 0.25, device=device))
    assert torch.equal(plain.topk_weights, shifted.topk_weights)
    grad = randn(128, 2, seed=2, device=device)
    assert torch.equal(
        *gradients(plain.topk_weights, grad, plain_in),
        *gradients(shifted.topk_weights, grad, biased_in),
    )


@pytest.mark.parametrize("groups", [(4, 2), (2, 1), (8, 4), (1, 1)])
def test_groups_limit_the_choice(device, groups):
    logits, bias = randn(63, 16, seed=1, device=device), randn(16, seed=2, device=device) / 10
    ours = fused_topk(logits, 4, score="sigmoid", bias=bias, groups=groups)
    weights, indices, _ = oracle(logits.cpu(), 4, "sigmoid", True, bias.cpu(), groups)
    assert ours.topk_indices.tolist() == indices.tolist()
    assert_equals(ours.topk_weights, torch.from_numpy(weights))
    size = 16 // groups[0]
    assert max(len({i // size for i in row}) for row in ours.topk_indices.tolist()) <= groups[1]


def test_router_stays_in_float32_under_autocast(device):
    logits = randn(63, 8, seed=1, device=device)
    plain = fused_topk(logits, 2)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = fused_topk(logits, 2)
        half = fused_topk(logits.bfloat16(), 2)
    for ours, expected in zip(cast, plain, strict=True):
        assert torch.equal(ours, expected)
    assert half.topk_weights.dtype == half.router_probs.dtype == torch.float32
    assert torch.equal(half.router_probs, logits.bfloat16().float().softmax(-1))


def test_softmax_choice_ignores_a_constant(device):
    logits = randn(63, 8, seed=1, device=device, dtype=torch.float64)
    plain, shifted = fused_topk(logits, 2), fused_topk(logits + 30.0, 2)
    assert torch.equal(plain.topk_indices, shifted.topk_indices)
    assert_equals(shifted.topk_weights, plain.topk_weights)


def test_nan_logits_choose_distinct_experts(device):
    logits = randn(4, 8, seed=1, device=device)
    logits[1] = torch.nan
    logits[2, 5] = torch.nan
    for score in ("softmax", "sigmoid"):
        indices = fused_topk(logits, 3, score=score).topk_indices
        assert ((indices >= 0) & (indices < 8)).all()
        assert [len(set(row)) for row in indices.tolist()] == [3] * 4


def test_weights_of_underflowing_sigmoids_are_finite(device):
    (logits,) = leaves(torch.full((3, 4), -200.0, device=device))
    weights = fused_topk(logits, 2, score="sigmoid").topk_weights
    (grad,) = gradients(weights, torch.ones_like(weights), logits)
    assert weights.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "fused_topk: top_k (9) must be from 1 to num_experts (8)"),
        ({"top_k": 0}, "fused_topk: top_k (0) must be from 1 to num_experts (8)"),
        ({"score": "relu"}, "fused_topk: score ('relu') must be one of softmax, sigmoid"),
        (
            {"groups": (3, 1)},
            "fused_topk: groups (3, 1) must divide num_experts (8) and leave at least top_k (2) "
            "experts",
        ),
        (
            {"groups": (8, 1)},
            "fused_topk: groups (8, 1) must divide num_experts (8) and leave at least top_k (2) "
            "experts",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as caught:
        fused_topk(torch.zeros(3, 8), **{"top_k": 2} | arguments)
    assert str(caught.value) == message


def test_wrong_shape_is_named():
    with pytest.raises(ValueError) as caught:
        fused_topk(torch.zeros(2, 3, 8), 2)
    assert str(caught.value) == "fused_topk: router_logits has shape (2, 3, 8), needs (any, any)"
