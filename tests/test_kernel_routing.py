"""Does `fused_topk` choose and weigh the experts that the formula names?"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import (
    BFLOAT16_FLOOR,
    NUM_TOKENS,
    assert_equals,
    gradients,
    leaves,
    randn,
    relative_error,
    seeds,
)

from kernels.routing import SCORES, fused_topk, lowest_index_topk

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy's, in the interpreter, where a test puts in NaN or infinity.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]


def oracle(logits, top_k, score, normalize, bias=None, groups=None):
    """NumPy float64: (weights, indices, probs), one token at a time, stable sorts."""
    logits = np.asarray(logits, dtype=np.float64)
    if score == "softmax":
        probs = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
        probs /= probs.sum(-1, keepdims=True)
    elif score == "sigmoid":
        probs = 1 / (1 + np.exp(-logits))
    else:
        probs = np.sqrt(np.logaddexp(0, logits))
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
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [True, False])
def test_topk_equals_the_numpy_oracle(
    device, backend, num_tokens, num_experts, top_k, score, normalize
):
    logits = randn(num_tokens, num_experts, seed=1, device=device)
    ours = fused_topk(logits, top_k, score=score, normalize=normalize, backend=backend)
    weights, indices, probs = oracle(logits.cpu(), top_k, score, normalize)
    assert ours.topk_indices.cpu().numpy().tolist() == indices.tolist()
    assert_equals(ours.topk_weights, torch.from_numpy(weights), "weights")
    assert_equals(ours.router_probs, torch.from_numpy(probs), "probs")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_topk_gradient_equals_that_of_float64_autograd(device, backend, score, normalize, top_k):
    logits = randn(63, 5, seed=2, device=device)
    grad_w, grad_p = randn(63, top_k, seed=3, device=device), randn(63, 5, seed=4, device=device)
    (ours_in,), (exact_in,) = leaves(logits), leaves(logits, dtype=torch.float64)
    ours = fused_topk(ours_in, top_k, score=score, normalize=normalize, backend=backend)
    probs = {
        "softmax": exact_in.softmax(-1),
        "sigmoid": 1 / (1 + (-exact_in).exp()),
        "sqrt_softplus": exact_in.exp().log1p().sqrt(),
    }[score]
    weights = torch.stack([p[i] for p, i in zip(probs, ours.topk_indices, strict=True)])
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad((weights * grad_w).sum() + (probs * grad_p).sum(), [exact_in])
    total = (ours.topk_weights * grad_w).sum() + (ours.router_probs * grad_p).sum()
    (actual,) = torch.autograd.grad(total, [ours_in])
    assert_equals(actual, expected)


def test_topk_passes_gradcheck():
    (logits,) = leaves(randn(6, 5, seed=1, dtype=torch.float64))
    for score in SCORES:
        for top_k in (2, 5):

            def call(x, score=score, top_k=top_k):
                out = fused_topk(x, top_k, score=score)
                return out.topk_weights, out.router_probs

            assert torch.autograd.gradcheck(call, [logits])


@pytest.mark.parametrize("num_experts", [8, 64])
def test_ties_go_to_the_lowest_index(device, backend, num_experts):
    for top_k in (1, 2, 7, min(num_experts, 20)):
        equal = fused_topk(torch.zeros(5, num_experts, device=device), top_k, backend=backend)
        assert equal.topk_indices.tolist() == [list(range(top_k))] * 5
    # Two levels, the higher one at 6, 2 and 4: those first, by index, then the rest by index.
    logits = torch.zeros(1, num_experts, device=device)
    logits[0, [6, 2, 4]] = 1.0
    assert fused_topk(logits, 5, backend=backend).topk_indices.tolist() == [[2, 4, 6, 0, 1]]
    assert lowest_index_topk(logits, num_experts)[0, :5].tolist() == [2, 4, 6, 0, 1]


def test_bias_enters_the_choice_only(device, backend):
    logits = randn(128, 8, seed=1, device=device)
    bias = torch.zeros(8, device=device)
    bias[5] = 10.0
    (plain_in,), (biased_in,) = leaves(logits), leaves(logits)
    for score in SCORES:
        biased = fused_topk(biased_in, 2, score=score, bias=bias, backend=backend)
        assert (biased.topk_indices[:, 0] == 5).all()
        weights, indices, _ = oracle(logits.cpu(), 2, score, True, bias.cpu())
        assert biased.topk_indices.tolist() == indices.tolist()
        assert_equals(biased.topk_weights, torch.from_numpy(weights))
    # One bias for all leaves the choice, and then weights and gradients to the bit.
    plain = fused_topk(plain_in, 2, backend=backend)
    shifted = fused_topk(biased_in, 2, bias=torch.full((8,), 0.25, device=device), backend=backend)
    assert torch.equal(plain.topk_weights, shifted.topk_weights)
    grad = randn(128, 2, seed=2, device=device)
    assert torch.equal(
        *gradients(plain.topk_weights, grad, plain_in),
        *gradients(shifted.topk_weights, grad, biased_in),
    )


@pytest.mark.parametrize("groups", [(4, 2), (2, 1), (8, 4), (1, 1)])
def test_groups_limit_the_choice(device, backend, groups):
    logits, bias = randn(63, 16, seed=1, device=device), randn(16, seed=2, device=device) / 10
    ours = fused_topk(logits, 4, score="sigmoid", bias=bias, groups=groups, backend=backend)
    weights, indices, _ = oracle(logits.cpu(), 4, "sigmoid", True, bias.cpu(), groups)
    assert ours.topk_indices.tolist() == indices.tolist()
    assert_equals(ours.topk_weights, torch.from_numpy(weights))
    size = 16 // groups[0]
    assert max(len({i // size for i in row}) for row in ours.topk_indices.tolist()) <= groups[1]


def test_groups_of_no_tokens_choose_nothing(device, backend):
    ours = fused_topk(torch.zeros(0, 16, device=device), 4, groups=(4, 2), backend=backend)
    assert ours.topk_indices.shape == ours.topk_weights.shape == (0, 4)
    assert ours.router_probs.shape == (0, 16)


def test_a_second_derivative_is_right_or_raises(device, backend):
    logits = randn(9, 5, seed=1, device=device)
    (exact_in,), (ours_in,) = leaves(logits, dtype=torch.float64), leaves(logits)

    def second(x, backend):
        out = fused_topk(x, 2, backend=backend).topk_weights
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    if backend == "triton":
        with pytest.raises(RuntimeError, match="no autograd formula"):
            second(ours_in, backend)
    else:
        assert_equals(second(ours_in, backend), second(exact_in, backend))


def test_kernels_are_launched_on_the_device_of_the_logits(device, monkeypatch):
    triton = pytest.importorskip("kernels.routing_triton")
    (logits,) = leaves(randn(9, 5, seed=1, device=device))
    entered = []
    monkeypatch.setattr(triton, "on_device_of", lambda t: entered.append(t) or nullcontext())
    fused_topk(logits, 2, backend="triton").topk_weights.sum().backward()
    assert [t.shape for t in entered] == [logits.shape] * 2


def test_router_stays_in_float32_under_autocast(device, backend):
    logits = randn(63, 8, seed=1, device=device)
    plain = fused_topk(logits, 2, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = fused_topk(logits, 2, backend=backend)
        half = fused_topk(logits.bfloat16(), 2, backend=backend)
    for ours, expected in zip(cast, plain, strict=True):
        assert torch.equal(ours, expected)
    assert half.topk_weights.dtype == half.router_probs.dtype == torch.float32
    assert relative_error(half.router_probs, logits.bfloat16().float().softmax(-1)) < 1e-6


def test_softmax_choice_ignores_a_constant(device):
    logits = randn(63, 8, seed=1, device=device, dtype=torch.float64)
    plain, shifted = fused_topk(logits, 2), fused_topk(logits + 30.0, 2)
    assert torch.equal(plain.topk_indices, shifted.topk_indices)
    assert_equals(shifted.topk_weights, plain.topk_weights)


def test_nan_logits_choose_distinct_experts(device, backend):
    logits = randn(4, 8, seed=1, device=device)
    logits[1] = torch.nan
    logits[2, 5] = torch.nan
    for score in SCORES:
        indices = fused_topk(logits, 3, score=score, backend=backend).topk_indices
        assert ((indices >= 0) & (indices < 8)).all()
        assert [len(set(row)) for row in indices.tolist()] == [3] * 4


def test_weights_of_underflowing_sigmoids_are_finite(device, backend):
    (logits,) = leaves(torch.full((3, 4), -200.0, device=device))
    weights = fused_topk(logits, 2, score="sigmoid", backend=backend).topk_weights
    (grad,) = gradients(weights, torch.ones_like(weights), logits)
    assert weights.isfinite().all()
    assert grad.isfinite().all()


def test_weights_of_a_sum_below_the_least_have_the_gradient_of_the_floor(device, backend):
    # p is about 2e-22: divided by the floor of 1e-20, not by their sum.
    (logits,) = leaves(torch.tensor([[-50.0, -49.5, -60.0]], device=device))
    weights = fused_topk(logits, 2, score="sigmoid", backend=backend).topk_weights
    expected = torch.tensor([[-49.5, -50.0]], device=device).double().exp() / 1e-20
    assert relative_error(weights, expected) < 1e-5
    (grad,) = gradients(weights, torch.tensor([[3.0, 7.0]], device=device), logits)
    right = [7 * expected[0, 1], 3 * expected[0, 0], 0.0]
    assert relative_error(grad, torch.tensor([right], dtype=torch.float64)) < 1e-5


def test_the_least_number_ties_with_minus_infinity_in_both_bodies(device, backend):
    logits = torch.tensor([[-torch.inf, -3.4028235e38, 0.0, -torch.inf]], device=device)
    for top_k in (2, 4):
        indices = fused_topk(logits, top_k, score="sigmoid", backend=backend).topk_indices
        assert indices.tolist() == [[2, 0, 1, 3][:top_k]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "fused_topk: top_k (9) must be an integer from 1 to num_experts (8)"),
        ({"top_k": 0}, "fused_topk: top_k (0) must be an integer from 1 to num_experts (8)"),
        (
            {"score": "relu"},
            "fused_topk: score ('relu') must be one of softmax, sigmoid, sqrt_softplus",
        ),
        (
            {"groups": (3, 1)},
            "fused_topk: groups (3, 1) must divide num_experts (8) and leave at least top_k (2) "
            "experts",
        ),
        (
            {"groups": (0, 2)},
            "fused_topk: groups (0, 2) must divide num_experts (8) and leave at least top_k (2) "
            "experts",
        ),
        (
            {"groups": (-2, 1)},
            "fused_topk: groups (-2, 1) must divide num_experts (8) and leave at least top_k (2) "
            "experts",
        ),
        (
            {"bias": torch.zeros(8, device="meta")},
            "fused_topk: tensors on different devices: router_logits on cpu, bias on meta",
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


@pytest.mark.parametrize("top_k", [1, 5, 8, 18])
def test_infinitely_bad_experts_are_chosen_last_and_once(device, backend, top_k):
    logits, bias = randn(6, 18, seed=1, device=device), torch.zeros(18, device=device)
    bias[3:] = -torch.inf
    logits[1, :4] = -torch.inf
    logits[2] = -torch.inf
    for score in SCORES:
        indices = fused_topk(logits, top_k, score=score, bias=bias, backend=backend).topk_indices
        assert [len(set(row)) for row in indices.tolist()] == [top_k] * 6
        # The three that may be chosen come first, the others by index.
        assert all(set(row[:3]) <= {0, 1, 2} for row in indices[[0, 3, 4, 5]].tolist())
        assert indices[3, 3:].tolist() == list(range(3, top_k))
        plain = fused_topk(logits, top_k, score=score, backend=backend).topk_indices
        assert [len(set(row)) for row in plain.tolist()] == [top_k] * 6
        assert plain[2].tolist() == list(range(top_k))


def test_groups_without_a_finite_score_give_distinct_experts(device, backend):
    logits, bias = randn(9, 12, seed=1, device=device), torch.zeros(12, device=device)
    bias[:10] = -torch.inf
    options = {"score": "sigmoid", "bias": bias, "backend": backend}
    indices = fused_topk(logits, 6, groups=(4, 2), **options).topk_indices
    assert ((indices >= 0) & (indices < 12)).all()
    assert [len(set(row)) for row in indices.tolist()] == [6] * 9
    # The last group is the only one with a score, ranked first; then ties go to the lowest.
    assert [set(row[:2]) for row in indices.tolist()] == [{10, 11}] * 9
    assert indices[:, 2:].tolist() == [[0, 1, 2, 3]] * 9


def test_probabilities_that_round_to_one_number_are_told_apart(device, backend):
    # Both are 1 in float32; the higher logit wins, at the higher index.
    logits = torch.tensor([[30.0, -1.0, 40.0, 20.0]], device=device)
    out = fused_topk(logits, 3, score="sigmoid", backend=backend)
    assert out.topk_indices.tolist() == [[2, 0, 3]]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("score", SCORES)
def test_tokens_with_broken_logits_are_flagged_and_stay_in_range(device, backend, score, poison):
    logits = randn(7, 11, seed=1, device=device)
    logits[2, 10] = logits[5, :] = poison
    for options in ({}, {"bias": randn(11, seed=2, device=device)}):
        out = fused_topk(logits, 4, score=score, backend=backend, **options)
        assert out.logits_finite.tolist() == [True, True, False, True, True, False, True]
        assert out.logits_finite.dtype == torch.bool
        assert ((out.topk_indices >= 0) & (out.topk_indices < 11)).all()
        assert [len(set(row)) for row in out.topk_indices.tolist()] == [4] * 7
        sound = [0, 1, 3, 4, 6]
        alone = fused_topk(logits[sound], 4, score=score, backend=backend, **options)
        for part, whole in zip(alone, out, strict=True):
            # PyTorch's vector code and that for the last few numbers round otherwise.
            rtol = 1e-6 if backend == "torch" else 0.0
            assert torch.allclose(part, whole[sound], rtol=rtol, atol=0.0)


def both(logits, top_k, **options):
    """The two bodies' results."""
    pytest.importorskip("triton")
    return [fused_topk(logits, top_k, backend=body, **options) for body in ("torch", "triton")]


@pytest.mark.parametrize("num_experts", [5, 64, 200])
def test_both_bodies_choose_alike_to_the_bit(device, num_experts):
    # Few bits: many logits tie.
    logits = (randn(300, num_experts, seed=1, device=device) * 4).round() / 4
    logits[3, 2:4], logits[4, 1], logits[5, 1:3] = torch.nan, torch.inf, -torch.inf
    logits[6] = torch.tensor([0.0, -0.0], device=device).repeat(num_experts)[:num_experts]
    top_k = min(num_experts, 8)
    options = [{}, {"score": "sigmoid"}, {"normalize": False}]
    if num_experts == 200:
        options += [{"groups": (8, 3), "score": "sigmoid"}, {"groups": (50, 7)}]
    for kind in options:
        theirs, ours = both(logits, top_k, **kind)
        assert torch.equal(theirs.topk_indices, ours.topk_indices)
        assert torch.equal(theirs.logits_finite, ours.logits_finite)
        # What follows NaN is NaN in both.
        a, b = theirs.topk_weights, ours.topk_weights
        assert torch.equal(a.isnan(), b.isnan())
        assert relative_error(a.nan_to_num(0.0), b.nan_to_num(0.0)) < 1e-6


def test_many_choices_of_many_experts(device, backend):
    logits = randn(5, 512, seed=1, device=device)
    for top_k in (16, 40):
        ours = fused_topk(logits, top_k, backend=backend)
        weights, indices, _ = oracle(logits.cpu(), top_k, "softmax", True)
        assert ours.topk_indices.tolist() == indices.tolist()
        assert_equals(ours.topk_weights, torch.from_numpy(weights))


def test_rows_around_the_inputs_are_not_read(device, backend):
    padded = torch.full((9, 11), torch.nan, device=device)
    padded[2:7] = randn(5, 11, seed=1, device=device)
    bias = torch.full((20,), torch.nan, device=device)
    bias[4:15] = 0.1
    logits = padded[2:7].detach().requires_grad_()
    ours = fused_topk(logits, 3, bias=bias[4:15], backend=backend)
    weights, indices, probs = oracle(logits.detach().cpu(), 3, "softmax", True)
    assert ours.topk_indices.tolist() == indices.tolist()
    assert_equals(ours.topk_weights, torch.from_numpy(weights))
    assert_equals(ours.router_probs, torch.from_numpy(probs))
    assert ours.logits_finite.all()
    (grad,) = torch.autograd.grad(ours.topk_weights[:, 0].sum(), [logits])
    assert grad.isfinite().all()


def test_columns_of_a_wider_matrix(device, backend):
    wide = torch.full((5, 20), torch.nan, device=device)
    wide[:, 4:15] = randn(5, 11, seed=1, device=device)
    ours = fused_topk(wide[:, 4:15], 3, backend=backend)
    for a, b in zip(ours, fused_topk(wide[:, 4:15].clone(), 3, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("num_experts", "groups"), [(8, None), (60, (5, 2)), (256, (8, 4))])
def test_tiles_of_real_chips_give_the_same_bits(device, monkeypatch, num_experts, groups):
    triton = pytest.importorskip("kernels.routing_triton")
    (logits,) = leaves(randn(40, num_experts, seed=1, device=device))

    def once():
        out = fused_topk(logits, 4, groups=groups, backend="triton")
        total = (out.topk_weights**2).sum() + (out.router_probs**2).sum()
        return *out, torch.autograd.grad(total, [logits])[0]

    expected, tile = once(), triton._tile(num_experts, "sm_90")
    assert tile.blocks["BLOCK_TOKENS"] == min(64, 1024 // tile.blocks["BLOCK_EXPERTS"])
    monkeypatch.setattr(triton, "_tile", lambda *_: tile)
    assert all(torch.equal(a, b) for a, b in zip(once(), expected, strict=True))


def test_gradient_of_bfloat16_logits_and_of_one_output_alone(device, backend):
    logits = randn(63, 9, seed=1, device=device).bfloat16()
    grad_of = {"topk_weights": randn(63, 3, seed=2), "router_probs": randn(63, 9, seed=3)}
    for score in SCORES:
        for name, grad in grad_of.items():
            (ours_in,), (wide,) = leaves(logits), leaves(logits, dtype=torch.float64)
            ours = fused_topk(ours_in, 3, score=score, backend=backend)
            exact = fused_topk(wide, 3, score=score, backend="torch")
            assert torch.equal(ours.topk_indices, exact.topk_indices)
            (actual,) = gradients(getattr(ours, name), grad.to(device), ours_in)
            (expected,) = gradients(getattr(exact, name), grad.to(device), wide)
            assert actual.dtype == torch.bfloat16
            assert relative_error(actual, expected) < BFLOAT16_FLOOR


def test_gradient_with_a_bias_and_groups_equals_the_torch_body(device, backend):
    logits, bias = randn(40, 12, seed=1, device=device), randn(12, seed=2, device=device) / 9
    options = {"score": "sigmoid", "bias": bias, "groups": (4, 2)}
    (ours_in,), (exact_in,) = leaves(logits), leaves(logits, dtype=torch.float64)
    ours = fused_topk(ours_in, 4, backend=backend, **options)
    exact = fused_topk(exact_in, 4, backend="torch", **options)
    assert torch.equal(ours.topk_indices, exact.topk_indices)
    # An expanded gradient, as a sum gives it.
    (actual,) = torch.autograd.grad(ours.topk_weights[:, 0].sum(), [ours_in])
    (expected,) = torch.autograd.grad(exact.topk_weights[:, 0].sum(), [exact_in])
    assert_equals(actual, expected)


def test_operators_are_registered_soundly(device):
    triton = pytest.importorskip("kernels.routing_triton")
    (logits,), bias = leaves(randn(5, 6, seed=1, device=device)), randn(6, seed=2, device=device)
    torch.library.opcheck(triton.topk_op, (logits, None, 2, True, True, 0, 0))
    torch.library.opcheck(triton.topk_op, (logits, bias, 2, False, False, 3, 2))
    out = fused_topk(logits.detach(), 2)
    grads = randn(5, 2, seed=3, device=device), randn(5, 6, seed=4, device=device)
    rest = out.router_probs, out.topk_indices, torch.float32, True, True
    torch.library.opcheck(triton.topk_backward_op, (*grads, *rest))
    torch.library.opcheck(triton.topk_backward_op, (grads[0], None, *rest))


@pytest.mark.parametrize("wants", ["weights", "both"])
def test_compiled_graphs_hold_the_kernel_whole(device, wants):
    pytest.importorskip("triton")
    (logits,) = leaves(randn(5, 6, seed=1, device=device))

    def route(logits):
        out = fused_topk(logits, 2, backend="triton")
        loss = (out.topk_weights * torch.arange(2, device=device)).sum()
        return out, loss + out.router_probs.square().sum() if wants == "both" else loss

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    eager, compiled = route(logits), compiled(logits)
    for a, b in zip(eager[0], compiled[0], strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(loss, [logits])[0] for _, loss in (eager, compiled)]
    assert torch.equal(*grads)


def test_bits_of_a_token_do_not_depend_on_the_number_of_tokens(device):
    pytest.importorskip("triton")
    logits = randn(300, 20, seed=1, device=device)

    def both_ways(logits):
        (logits,) = leaves(logits)
        out = fused_topk(logits, 3, backend="triton")
        total = (out.topk_weights**2).sum() + (out.router_probs**2).sum()
        return *out, torch.autograd.grad(total, [logits])[0]

    whole = both_ways(logits)
    for rows in (slice(0, 1), slice(5, 223), slice(299, 300)):
        for a, b in zip(both_ways(logits[rows]), whole, strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_passes_give_equal_bits(device, count):
    pytest.importorskip("triton")
    (logits,) = leaves(randn(150, 20, seed=1, device=device))

    def once():
        out = fused_topk(logits, 3, score="sigmoid", groups=(4, 2), backend="triton")
        total = (out.topk_weights**2).sum() + (out.router_probs**2).sum()
        return *out, torch.autograd.grad(total, [logits])[0]

    first, *others = [once() for _ in range(count)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def untouched(shape, dtype, device):
    """Zeros of which only the pages that are written cost memory, on a CPU."""
    zeros = np.zeros(shape, dtype={torch.bfloat16: np.int16}.get(dtype, np.int32))
    return torch.from_numpy(zeros).to(device).view(dtype)


def test_addresses_beyond_two_to_the_31(device, monkeypatch):
    triton = pytest.importorskip("kernels.routing_triton")
    num_experts, num_tokens = 512, 2**22 + 3
    logits = untouched((num_tokens, num_experts), torch.bfloat16, device)
    rows = randn(3, num_experts, seed=1, device=device).bfloat16()
    logits[-3:] = rows
    expected = fused_topk(rows, 2, backend="triton")
    if device.type == "cuda":
        ours = fused_topk(logits, 2, backend="triton")
    else:
        from triton.runtime.interpreter import InterpreterBuilder

        # The last program alone, of the many that the interpreter would run one by one.
        get = InterpreterBuilder.create_get_program_id
        last = num_tokens // triton.INTERPRETED_TOKENS

        def get_last(self, axis):
            handle = get(self, axis)
            handle.data = handle.data + np.int32(last)
            return handle

        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", get_last)
        monkeypatch.setattr(triton.triton, "cdiv", lambda *_: 1)
        monkeypatch.setattr(
            triton,
            "_empty",
            lambda logits, top_k: (
                torch.zeros(num_tokens, top_k),
                torch.zeros(num_tokens, top_k, dtype=torch.int64),
                untouched(logits.shape, torch.float32, device),
                torch.zeros(num_tokens, dtype=torch.bool),
            ),
        )
        ours = fused_topk(logits, 2, backend="triton")
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a[-3:], b)


@pytest.mark.parametrize("seed", seeds(80))
def test_random_cases_equal_the_oracle(device, backend, seed):
    rng = np.random.default_rng(seed)
    size, num_groups = int(rng.integers(1, 30)), int(rng.integers(1, 9))
    num_experts, num_tokens = size * num_groups, int(rng.integers(1, 200))
    if seed % 4 == 1:
        num_groups, num_experts = 1, int(rng.integers(1, 13))
        size = num_experts
    kept = int(rng.integers(1, num_groups + 1))
    top_k = int(rng.integers(1, min(24, size * kept) + 1))
    options = {"score": ("softmax", "sigmoid")[seed % 2], "normalize": bool(seed % 3)}
    num_tokens = {0: 0, 5: 1}.get(seed % 16, num_tokens)
    logits = randn(num_tokens, num_experts, seed=seed, device=device) * float(rng.choice([1, 5]))
    bias = randn(num_experts, seed=seed + 1, device=device) / 20 if seed % 4 else None
    groups = (num_groups, kept) if seed % 5 else None
    (ours_in,), (exact_in,) = leaves(logits), leaves(logits, dtype=torch.float64)
    ours = fused_topk(ours_in, top_k, bias=bias, groups=groups, backend=backend, **options)
    host_bias = None if bias is None else bias.cpu()
    expected = oracle(logits.cpu(), top_k, *options.values(), host_bias, groups)
    assert ours.topk_indices.tolist() == expected[1].tolist()
    assert_equals(ours.topk_weights, torch.from_numpy(expected[0]))
    assert_equals(ours.router_probs, torch.from_numpy(expected[2]))
    exact = fused_topk(exact_in, top_k, bias=bias, groups=groups, backend="torch", **options)
    grads = randn(num_tokens, top_k, seed=3, device=device), randn(*logits.shape, seed=4)
    sums = [
        (out.topk_weights * grads[0]).sum() + (out.router_probs * grads[1].to(device)).sum()
        for out in (ours, exact)
    ]
    (actual,) = torch.autograd.grad(sums[0], [ours_in])
    assert_equals(actual, torch.autograd.grad(sums[1], [exact_in])[0], "gradient")


@pytest.mark.parametrize("scale", [1, 30, 200])
def test_sqrt_softplus_is_finite_and_right_far_from_zero(device, backend, scale):
    """Its square underflows below -87, its root's slope would be infinite at 0."""
    logits = scale * randn(40, 9, seed=3, device=device)
    (ours_in,), (exact_in,) = leaves(logits), leaves(logits, dtype=torch.float64)
    ours = fused_topk(ours_in, 3, score="sqrt_softplus", normalize=False, backend=backend)
    exact = torch.logaddexp(exact_in, torch.zeros((), dtype=torch.float64)).sqrt()
    assert_equals(ours.router_probs, exact.clamp(min=1e-17), "probs")
    (grad,) = torch.autograd.grad(ours.router_probs.sum(), [ours_in])
    (expected,) = torch.autograd.grad(exact.sum(), [exact_in])
    assert grad.isfinite().all()
    assert_equals(grad, expected, "gradient")
