"""Does the fused expert layer equal its formula, forward and every gradient, whatever is routed?"""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NUM_TOKENS,
    ROUTINGS,
    assert_bfloat16,
    assert_equals,
    assignments,
    gradients,
    leaves,
    randn,
    random_tokens,
    relative_error,
    seeds,
)

from kernels.dispatch import permute, plan_dispatch, unpermute
from kernels.swiglu_experts import swiglu_experts, swiglu_experts_sorted
from kernels.swiglu_experts_torch import NARROW

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D, WIDTH = 17, 11
NAMES = ("x", "w1", "w2", "w3", "topk_weights")

# In the interpreter many tokens take long.
BODIES = [("torch", n) for n in NUM_TOKENS]
BODIES += [("triton", n) for n in NUM_TOKENS if n <= 63]
BODIES += [pytest.param("triton", n, marks=pytest.mark.slow) for n in NUM_TOKENS if n > 63]


def inputs(case, num_tokens, device, hidden=D, width=WIDTH):
    """(topk_indices, plan, (x, w1, w2, w3, topk_weights))."""
    indices, weights, num_experts = assignments(case, num_tokens, device)
    shape = (num_experts, width, hidden)
    tensors = (
        randn(num_tokens, hidden, seed=1, device=device),
        randn(*shape, seed=2, device=device) * hidden**-0.5 * 2,
        randn(num_experts, hidden, width, seed=3, device=device) * width**-0.5,
        randn(*shape, seed=4, device=device) * hidden**-0.5 * 2,
        weights,
    )
    return indices, plan_dispatch(indices, num_experts), tensors


def oracle(x, w1, w2, w3, weights, indices, clamp=None):
    """Each assignment with its own copy of its expert: no rows, no sorting, no plan."""
    chosen = indices.clamp(min=0)
    gate = torch.einsum("tkfd,td->tkf", w1[chosen], x)
    up = torch.einsum("tkfd,td->tkf", w3[chosen], x)
    if clamp is not None:
        bound = torch.full_like(gate, clamp)
        gate, up = torch.minimum(gate, bound), torch.maximum(torch.minimum(up, bound), -bound)
    y = torch.einsum("tkdf,tkf->tkd", w2[chosen], gate / (1 + torch.exp(-gate)) * up)
    return (y * (weights * (indices >= 0)).unsqueeze(-1)).sum(1)


def eager(x, w1, w2, w3, weights, indices):
    """The usual PyTorch loop over experts, as Hugging Face writes it."""
    out = torch.zeros_like(x, dtype=torch.bfloat16)
    for e in range(len(w1)):
        token, slot = (indices == e).nonzero(as_tuple=True)
        y = F.linear(F.silu(F.linear(x[token], w1[e])) * F.linear(x[token], w3[e]), w2[e])
        out = out.index_add(0, token, (y * weights[token, slot].unsqueeze(-1)).to(out.dtype))
    return out


def check(device, backend, case, num_tokens, clamp=None, save="xh", hidden=D, width=WIDTH):
    indices, plan, tensors = inputs(case, num_tokens, device, hidden, width)
    exact_in, ours_in = leaves(*tensors, dtype=torch.float64), leaves(*tensors)
    exact = oracle(*exact_in, indices, clamp)
    options = {"clamp": clamp, "save": save, "backend": backend}
    ours = swiglu_experts(*ours_in[:4], plan, ours_in[4], **options)
    assert_equals(ours, exact, "output")
    grad = randn(*ours.shape, seed=5, device=device)
    for name, actual, expected in zip(
        NAMES, gradients(ours, grad, *ours_in), gradients(exact, grad, *exact_in), strict=True
    ):
        assert_equals(actual, expected, name)


@pytest.mark.parametrize(("backend", "num_tokens"), BODIES)
@pytest.mark.parametrize("case", ROUTINGS)
def test_layer_and_its_gradients_equal_float64(device, backend, case, num_tokens):
    if backend == "triton":
        pytest.importorskip("triton")
    check(device, backend, case, num_tokens)


def test_more_columns_than_a_block(device, backend):
    check(device, backend, "all to one expert", 40, 0.7, "xh", 150, 70)


@pytest.mark.parametrize("case", ["random", "dropped", "idle experts"])
@pytest.mark.parametrize("save", ["x", "xh", "xha"])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_clamp_and_save_modes_equal_float64(device, case, save, clamp):
    check(device, "torch", case, 63, clamp, save)


@pytest.mark.parametrize("case", ["random", "dropped", "idle experts", "nothing assigned"])
@pytest.mark.parametrize("width", [WIDTH, NARROW + 4])
@pytest.mark.parametrize("way", ["always_onednn", "always_batched"])
def test_padded_rows_by_each_library_equal_float64(request, device, way, case, width):
    request.getfixturevalue(way)
    check(device, "torch", case, 63, 0.5, width=width)


@pytest.mark.parametrize("case", ["random", "dropped", "idle experts"])
@pytest.mark.parametrize(("save", "width"), [("x", NARROW + 4), ("xh", WIDTH), ("xh", NARROW + 4)])
def test_several_groups_of_experts_equal_float64(monkeypatch, case, save, width):
    """As where the rows of all experts would take too much memory at once."""
    monkeypatch.setattr("kernels.swiglu_experts_torch.GROUP_ELEMENTS", 20 * width)
    monkeypatch.setattr("kernels.swiglu_experts_torch.CACHED_ELEMENTS", 20 * width)
    check("cpu", "torch", case, 63, 0.5, save, width=width)


# Two clamps: a compiled kernel that is found on disk must not bring the other's along.
@pytest.mark.parametrize("clamp", [None, 0.5, 0.8])
@pytest.mark.parametrize("width", [WIDTH, pytest.param(NARROW + 4, marks=pytest.mark.slow)])
def test_compiled_gradients_equal_float64(compiler, width, clamp):
    check("cpu", "torch_compile", "dropped", 63, clamp, width=width)


@pytest.mark.slow
@pytest.mark.parametrize("width", [WIDTH, NARROW + 4])
@pytest.mark.parametrize("rows", [1, 20])
def test_compiled_gradients_of_several_groups_equal_float64(compiler, monkeypatch, rows, width):
    """Whose parts of a kept H begin anywhere, and have a single row too."""
    monkeypatch.setattr("kernels.swiglu_experts_torch.GROUP_ELEMENTS", rows * width)
    monkeypatch.setattr("kernels.swiglu_experts_torch.CACHED_ELEMENTS", rows * width)
    for num_tokens in (2, 63):
        check("cpu", "torch_compile", "random", num_tokens, 0.5, width=width)


def test_compiled_gradients_of_sorted_rows_are_those_of_the_layer(compiler):
    _, plan, tensors = inputs("random", 63, "cpu")
    grad, results = randn(63, D, seed=5, device="cpu"), []
    for _ in range(2):
        ours_in = leaves(*tensors)
        x, w1, w2, w3, weights = ours_in
        rows = swiglu_experts_sorted(
            permute(x, plan), w1, w2, w3, plan.expert_offsets, backend="torch_compile"
        )
        results.append(gradients(unpermute(rows, plan, weights), grad, *ours_in))
    fused_in = leaves(*tensors)
    fused = swiglu_experts(*fused_in[:4], plan, fused_in[4], backend="torch_compile")
    for once, again, expected in zip(*results, gradients(fused, grad, *fused_in), strict=True):
        assert torch.equal(once, again)
        assert_equals(once, expected)


def test_what_is_not_finite_stays_with_its_own_experts(always_batched):
    """Padding has a token too, and a batch several experts."""
    indices, plan, tensors = inputs("random", 63, "cpu")
    for poisoned in (0, 62):
        ours_in = leaves(*tensors)
        with torch.no_grad():
            ours_in[0][poisoned] = torch.nan
        out = swiglu_experts(*ours_in[:4], plan, ours_in[4])
        assert out.isfinite().all(1).tolist() == [t != poisoned for t in range(63)]
        grads = gradients(out, torch.ones_like(out), *ours_in)
        hit = set(indices[poisoned].tolist())
        for name, grad in zip(NAMES[1:4], grads[1:4], strict=True):
            finite = grad.flatten(1).isfinite().all(1).tolist()
            assert finite == [e not in hit for e in range(len(grad))], name


@pytest.mark.parametrize(("save", "clamp"), [("x", 0.5), ("xh", 0.5), ("xha", None)])
def test_clamp_and_save_modes_of_the_kernels_equal_float64(device, save, clamp):
    pytest.importorskip("triton")
    check(device, "triton", "dropped", 30, clamp, save)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_save_modes_agree_to_the_bit(device, backend, clamp):
    case, num_tokens = ("dropped", 63) if backend == "torch" else ("all to one expert", 20)
    _, plan, tensors = inputs(case, num_tokens, device)
    results = []
    for save in ("x", "xh", "xha"):
        ours_in = leaves(*tensors)
        options = {"clamp": clamp, "save": save, "backend": backend}
        out = swiglu_experts(*ours_in[:4], plan, ours_in[4], **options)
        grad = randn(num_tokens, D, seed=5, device=device)
        results.append((out, *gradients(out, grad, *ours_in)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_clamp_bounds_gate_from_above_and_up_on_both_sides():
    # One expert, D = F = 1: gate = 3 x, up = -4 x, and y = silu(gate) * up.
    w1, w2, w3 = torch.full((1, 1, 1), 3.0), torch.ones(1, 1, 1), torch.full((1, 1, 1), -4.0)
    plan = plan_dispatch(torch.zeros(2, 1, dtype=torch.int64), 1)
    x = torch.tensor([[1.0], [-1.0]])
    out = swiglu_experts(x, w1, w2, w3, plan, torch.ones(2, 1), clamp=1.0)
    # silu(1) * -1 = -0.7310586; silu(-3) * 1 = -3 / (1 + e^3) = -0.1422776
    assert out.flatten().tolist() == pytest.approx([-0.7310586, -0.1422776], abs=1e-6)


@pytest.mark.parametrize("case", ["random", "dropped", "idle experts"])
@pytest.mark.parametrize("save", ["x", "xh", "xha"])
def test_gradcheck(case, save):
    _, plan, _ = inputs(case, 4, "cpu")
    num_experts = len(plan.tokens_per_expert)
    # Normal values leave a clamp at 1 far from both its corners.
    x, w1, w2, w3 = leaves(
        randn(4, 3, seed=1),
        randn(num_experts, 2, 3, seed=2),
        randn(num_experts, 3, 2, seed=3),
        randn(num_experts, 2, 3, seed=4),
        dtype=torch.float64,
    )
    (weights,) = leaves(assignments(case, 4)[1], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: swiglu_experts(*t[:4], plan, t[4], clamp=1.0, save=save),
        [x, w1, w2, w3, weights],
        fast_mode=True,
    )


def test_zero_weights_give_zero_weight_gradients_of_dropped_assignments(device, backend):
    indices, plan, tensors = inputs("dropped", 63, device)
    ours_in = leaves(*tensors)
    out = swiglu_experts(*ours_in[:4], plan, ours_in[4], backend=backend)
    grad = gradients(out, torch.ones_like(out), *ours_in)[-1]
    assert (grad[indices < 0] == 0).all()
    assert (grad[indices >= 0] != 0).all()


@pytest.mark.parametrize("case", ["random", "dropped", "idle experts", "all to one expert"])
@pytest.mark.parametrize("with_scale", [True, False])
def test_sorted_rows_equal_float64_and_ignore_unused_rows(device, backend, case, with_scale):
    indices, plan, (_, w1, w2, w3, _) = inputs(case, 63, device)
    used = int(plan.expert_offsets[-1])
    rows = randn(plan.num_rows, D, seed=6, device=device)
    scale = randn(plan.num_rows, seed=7, device=device)
    grad = randn(plan.num_rows, D, seed=8, device=device)
    expert = indices.flatten()[indices.flatten() >= 0].sort().values.unsqueeze(-1)  # (used, 1)
    exact_in = leaves(rows, w1, w2, w3, scale, dtype=torch.float64)
    factor = exact_in[4][:used].unsqueeze(-1)
    exact = oracle(
        exact_in[0][:used],
        *exact_in[1:4],
        factor if with_scale else torch.ones_like(factor),
        expert,
    )
    wanted = 5 if with_scale else 4
    expected = gradients(exact, grad[:used], *exact_in[:wanted])
    for tensor in (rows, scale, grad):
        tensor[used:] = torch.nan
    ours_in = leaves(rows, w1, w2, w3, scale)
    for save in ("x", "xh", "xha") if backend == "torch" else ("xh",):
        ours = swiglu_experts_sorted(
            *ours_in[:4],
            plan.expert_offsets,
            scale=ours_in[4] if with_scale else None,
            save=save,
            backend=backend,
        )
        assert_equals(ours[:used], exact, "output")
        assert torch.count_nonzero(ours[used:]) == 0
        for name, actual, right in zip(
            ("rows", "w1", "w2", "w3", "scale"),
            gradients(ours, grad, *ours_in[:wanted]),
            expected,
            strict=False,
        ):
            assert_equals(actual, right, name)


@pytest.mark.parametrize("case", ["random", "dropped"])
def test_sorted_rows_between_permute_and_unpermute_are_the_fused_layer(device, case):
    _, plan, tensors = inputs(case, 63, device)
    x, w1, w2, w3, weights = leaves(*tensors, dtype=torch.float64)
    fused = swiglu_experts(x, w1, w2, w3, plan, weights)
    rows = swiglu_experts_sorted(permute(x, plan), w1, w2, w3, plan.expert_offsets)
    parts = unpermute(rows, plan, weights)
    assert_equals(parts, fused)
    grad = randn(63, D, seed=5, device=device)
    for a, b in zip(
        gradients(parts, grad, x, w1, w2, w3, weights),
        gradients(fused, grad, x, w1, w2, w3, weights),
        strict=True,
    ):
        assert_equals(a, b)


BFLOAT16 = [
    ("torch", case, save)
    for case in ("random", "dropped", "idle experts")
    for save in ("x", "xh", "xha")
]


@pytest.mark.parametrize(
    ("backend", "case", "save"), [*BFLOAT16, ("triton", "dropped", "x"), ("triton", "random", "xh")]
)
def test_bfloat16_by_autocast_is_as_exact_as_eager(device, backend, case, save):
    if backend == "triton":
        pytest.importorskip("triton")
    check_bfloat16(device, backend, case, save)


def test_compiled_bfloat16_by_autocast_is_as_exact_as_eager(compiler):
    check_bfloat16("cpu", "torch_compile", "dropped", "x")


def check_bfloat16(device, backend, case, save, num_tokens=128, hidden=64, width=96):
    indices, plan, tensors = inputs(case, num_tokens, device, hidden, width)
    ours_in, eager_in = leaves(*tensors), leaves(*tensors)
    exact_in = leaves(*tensors, dtype=torch.float64)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        ours = swiglu_experts(*ours_in[:4], plan, ours_in[4], save=save, backend=backend)
        theirs = eager(*eager_in, indices)
    exact = oracle(*exact_in, indices)
    assert ours.dtype == torch.bfloat16
    assert_bfloat16(ours, theirs, exact, "output")
    grad = randn(num_tokens, hidden, seed=5, device=device).bfloat16()
    ours_grads = gradients(ours, grad, *ours_in)
    assert {g.dtype for g in ours_grads} == {torch.float32}
    for name, *triple in zip(
        NAMES,
        ours_grads,
        gradients(theirs, grad, *eager_in),
        gradients(exact, grad, *exact_in),
        strict=True,
    ):
        assert_bfloat16(*triple, name)


def test_bfloat16_parameters_without_autocast(device, backend):
    indices, plan, tensors = inputs("random", 20, device)
    narrow = [t.bfloat16() for t in tensors[:4]]
    ours_in = leaves(*narrow, tensors[4])
    out = swiglu_experts(*ours_in[:4], plan, ours_in[4], backend=backend)
    grads = gradients(out, randn(20, D, seed=5, device=device), *ours_in)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 4 + [torch.float32]
    assert relative_error(out, oracle(*[t.double() for t in ours_in], indices)) < 1e-2


def test_a_graph_that_is_kept_can_be_walked_twice(device, backend):
    _, plan, tensors = inputs("all experts", 20, device)
    for save in ("x", "xh", "xha") if backend == "torch" else ("xh",):
        ours_in = leaves(*tensors)
        options = {"clamp": 1.0, "save": save, "backend": backend}
        total = swiglu_experts(*ours_in[:4], plan, ours_in[4], **options).sum()
        total.backward(retain_graph=True)
        once = [t.grad.clone() for t in ours_in]
        total.backward()
        assert all(torch.equal(t.grad, 2 * g) for t, g in zip(ours_in, once, strict=True))


def test_noncontiguous_inputs_and_expanded_gradient(device, backend):
    indices, plan, tensors = inputs("random", 20, device)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    ours_in = [t.requires_grad_() for t in strided]
    exact_in = leaves(*tensors, dtype=torch.float64)
    out = swiglu_experts(*ours_in[:4], plan, ours_in[4], backend=backend)
    exact = oracle(*exact_in, indices)
    assert_equals(out, exact)
    for actual, expected in zip(
        torch.autograd.grad(out.sum(), ours_in),
        torch.autograd.grad(exact.sum(), exact_in),
        strict=True,
    ):
        assert_equals(actual, expected)


@pytest.mark.parametrize("passes", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_calls_give_equal_bits(device, backend, passes):
    case, num_tokens = ("random", 128) if backend == "torch" else ("all experts", 20)
    _, plan, tensors = inputs(case, num_tokens, device)
    results = []
    for _ in range(passes):
        ours_in = leaves(*tensors)
        out = swiglu_experts(*ours_in[:4], plan, ours_in[4], backend=backend)
        results.append((out, *gradients(out, torch.ones_like(out), *ours_in)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_one_expert_is_the_dense_layer(device, backend):
    _, plan, (x, w1, w2, w3, _) = inputs("one expert", 128, device)
    ones = torch.ones(128, 1, device=device)
    dense = F.linear(F.silu(F.linear(x, w1[0])) * F.linear(x, w3[0]), w2[0])
    out = swiglu_experts(x, w1, w2, w3, plan, ones, backend=backend)
    assert relative_error(out, dense) <= 1e-6


def test_wrong_inputs_are_named():
    _, plan, (x, w1, w2, w3, weights) = inputs("random", 2, "cpu")
    op = "swiglu_experts"
    cases = [
        ((x, w1[0], w2, w3, plan, weights), {}, "w1 has shape (11, 17), needs (any, any, any)"),
        ((x, w1, w2, w2, plan, weights), {}, "w3 has shape (7, 17, 11), needs (7, 11, 17)"),
        ((x, w1, w1, w3, plan, weights), {}, "w2 has shape (7, 11, 17), needs (7, 17, 11)"),
        ((x[:, :5], w1, w2, w3, plan, weights), {}, "x has shape (2, 5), needs (any, 17)"),
        ((x[:1], w1, w2, w3, plan, weights), {}, "x has shape (1, 17), needs (2, any)"),
        (
            (x, w1, w2, w3, plan, weights[:1]),
            {},
            "plan.row_of has shape (2, 3), needs (1, 3)",
        ),
        (
            (x, w1[:5], w2[:5], w3[:5], plan, weights),
            {},
            "plan.expert_offsets has shape (8,), needs (6)",
        ),
        (
            (x, w1, w2, w3, plan, weights),
            {"save": "y"},
            "save ('y') must be one of x, xh, xha",
        ),
        (
            (x.bfloat16(), w1.bfloat16(), w2, w3.bfloat16(), plan, weights),
            {},
            "w1 (torch.bfloat16), w2 (torch.float32) and w3 (torch.bfloat16) must have one dtype",
        ),
        *(
            (
                (x, w1, w2, w3, plan, weights),
                {"clamp": clamp},
                f"clamp ({clamp}) must be above 0, or None for no clamp",
            )
            for clamp in (-1.0, 0.0, float("nan"))
        ),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError) as caught:
            swiglu_experts(*arguments, **options)
        assert str(caught.value) == f"{op}: {message}"
    with pytest.raises(ValueError) as caught:
        swiglu_experts_sorted(x, w1, w2, w3, plan.expert_offsets, scale=torch.ones(3))
    assert str(caught.value) == "swiglu_experts_sorted: scale has shape (3,), needs (2)"


def test_tensors_of_another_device_are_named():
    _, plan, (x, w1, w2, w3, weights) = inputs("random", 2, "cpu")
    offsets = plan.expert_offsets
    calls = {
        "topk_weights": lambda far: swiglu_experts(x, w1, w2, w3, plan, far(weights)),
        "plan.token_of_row": lambda far: swiglu_experts(
            x, w1, w2, w3, plan._replace(token_of_row=far(plan.token_of_row)), weights
        ),
        "expert_offsets": lambda far: swiglu_experts_sorted(x, w1, w2, w3, far(offsets)),
        "scale": lambda far: swiglu_experts_sorted(
            x, w1, w2, w3, offsets, scale=far(torch.ones(2))
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"tensors on different devices: .*\b{name} on meta"):
            call(lambda tensor: tensor.to("meta"))


def sorted_layer(x, w1, w2, w3, weights, plan, backend):
    """`swiglu_experts_sorted` of the same arguments, in the order of `NAMES`."""
    rows, scale = x[plan.token_of_row], weights.flatten()
    return swiglu_experts_sorted(
        rows, w1, w2, w3, plan.expert_offsets, scale=scale, backend=backend
    )


def fused_layer(x, w1, w2, w3, weights, plan, backend):
    return swiglu_experts(x, w1, w2, w3, plan, weights, backend=backend)


@pytest.mark.parametrize("layer", [fused_layer, sorted_layer])
def test_second_derivatives_are_refused(device, backend, layer):
    _, plan, tensors = inputs("random", 9, device)
    ours_in = leaves(*tensors)
    out = layer(*ours_in, plan, backend)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.sum(), ours_in, create_graph=True)


@pytest.mark.parametrize("layer", [fused_layer, sorted_layer])
@pytest.mark.parametrize("way", ["torch", "always_batched", "torch_compile", "triton"])
def test_gradients_where_combine_weights_vanish(request, device, layer, way):
    backend = "torch" if way == "always_batched" else way
    if way == "torch_compile":
        device = torch.device("cpu")
        request.getfixturevalue("compiler")
    elif way == "triton":
        pytest.importorskip("triton")
    elif way == "always_batched":
        # Which pads the rows.
        request.getfixturevalue(way)
    _, _, (x, w1, w2, w3, _) = inputs("random", 63, device)
    # Ascending, so that rows that are sorted lie as their tokens.
    indices = (torch.arange(63, device=device) // 9 % len(w1)).unsqueeze(-1)
    plan, weights = plan_dispatch(indices, len(w1)), torch.ones(63, 1, device=device)
    weights[::3], weights[1::3] = 0, 1e-30
    exact_in, ours_in = (
        leaves(x, w1, w2, w3, weights, dtype=dtype) for dtype in (torch.float64, None)
    )
    grad = randn(63, D, seed=5, device=device)
    actual = gradients(layer(*ours_in, plan, backend), grad, *ours_in)
    expected = gradients(oracle(*exact_in, indices), grad, *exact_in)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_equals(a, b, name)
    assert (actual[0][::3] == 0).all() and (expected[4][::3] != 0).all()
    assert_equals(actual[0][1::3], expected[0][1::3])
    # Products of a weight of 1e-30 with this gradient underflow.
    grad = grad * 1e-13
    (tiny,) = gradients(layer(*ours_in, plan, backend), grad, ours_in[4])
    (expected_tiny,) = gradients(oracle(*exact_in, indices), grad, exact_in[4])
    assert_equals(tiny, expected_tiny)


@pytest.mark.parametrize("backend", ["torch", "torch_compile"])
def test_float16_holds_gradients_whose_combine_weights_are_small(request, backend):
    if backend == "torch_compile":
        request.getfixturevalue("compiler")
    _, plan, (x, w1, w2, w3, weights) = inputs("random", 63, "cpu", 256, 32)
    tensors = [t.half() for t in (x, w1, w2 * 16, w3)]
    ours_in = leaves(*tensors, torch.full_like(weights, 1e-3))
    out = swiglu_experts(*ours_in[:4], plan, ours_in[4], backend=backend)
    # Without its weight, the gradient of a would be above 65504, which float16 cannot hold.
    grad = randn(*out.shape, seed=5).half() * 1e4
    assert (grad.double().norm(dim=1).max() * tensors[2].double().norm(dim=1).max()) > 65504
    assert all(g.isfinite().all() for g in gradients(out, grad, *ours_in)[:4])


FROZEN = [("w3",), ("w1",), ("w1", "w2", "w3"), ("x", "topk_weights"), ("x", "w1", "w3")]


@pytest.mark.parametrize("layer", [fused_layer, sorted_layer])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("width", [WIDTH, NARROW + 4])
def test_frozen_tensors_leave_the_other_gradients_as_they_are(
    device, backend, layer, frozen, width
):
    if backend == "triton" and width > NARROW:
        pytest.skip("the kernels have one layout")
    _, plan, tensors = inputs("idle experts", 9, device, width=width)
    ours_in = leaves(*tensors)
    whole, some = {}, {}
    for results, free in ((whole, NAMES), (some, [n for n in NAMES if n not in frozen])):
        for name, tensor in zip(NAMES, ours_in, strict=True):
            tensor.requires_grad_(name in free)
        out = layer(*ours_in, plan, backend)
        grad = randn(*out.shape, seed=5, device=device)
        wanted = [t for t in ours_in if t.requires_grad]
        results.update(zip(free, gradients(out, grad, *wanted), strict=True))
    for name, actual in some.items():
        assert_equals(actual, whole[name], name)


@pytest.mark.parametrize("frozen", ["w1", "w3"])
def test_half_a_stack_of_frozen_experts_goes_to_onednn(device, always_onednn, frozen):
    _, plan, tensors = inputs("idle experts", 63, device)
    ours_in = leaves(*tensors)
    out = fused_layer(*ours_in, plan, "torch")
    grad = randn(*out.shape, seed=5, device=device)
    whole = gradients(out, grad, *ours_in)
    ours_in[NAMES.index(frozen)].requires_grad_(False)
    out = fused_layer(*ours_in, plan, "torch")
    free = [t for t in ours_in if t.requires_grad]
    for tensor, actual in zip(free, gradients(out, grad, *free), strict=True):
        expected = next(g for t, g in zip(ours_in, whole, strict=True) if t is tensor)
        assert_equals(actual, expected)


@pytest.mark.parametrize("layer", [fused_layer, sorted_layer])
@pytest.mark.parametrize("width", [WIDTH, NARROW + 4])
def test_no_product_is_made_for_what_is_frozen(layer, width, monkeypatch):
    from kernels import grouped_matmul as module

    _, plan, tensors = inputs("all experts", 9, "cpu", width=width)
    results, matmul = [], module.matmul

    def record(a, b, out=None):
        results.append((a.shape[0], b.shape[1]))
        return matmul(a, b, out=out)

    monkeypatch.setattr(module, "matmul", record)
    w1, w2, w3 = (width, D), (D, width), (width, D)
    for frozen, made in (
        ((), {w1, w2} if width > NARROW else {(2 * width, D), w2}),
        (("w3",), {w1, w2}),
        (("w2",), {w3} if width > NARROW else {(2 * width, D)}),
        (("w1", "w2", "w3"), set()),
    ):
        ours_in = leaves(*tensors)
        for name, tensor in zip(NAMES, ours_in, strict=True):
            tensor.requires_grad_(name not in frozen)
        out = layer(*ours_in, plan, "torch")
        results.clear()
        out.sum().backward()
        # 9 rows each; the others are gradients of matrices.
        assert {shape for shape in results if shape[0] != 9} == made


def test_kernels_make_no_gradient_of_frozen_experts(device, monkeypatch):
    triton = pytest.importorskip("kernels.swiglu_experts_triton")
    monkeypatch.setattr(triton, "weight_grads", None)
    _, plan, (x, w1, w2, w3, weights) = inputs("random", 9, device)
    (x,) = leaves(x)
    swiglu_experts(x, w1, w2, w3, plan, weights, backend="triton").sum().backward()
    assert x.grad.isfinite().all()


def as_op(tensors, plan, clamp, keep, casts=()):
    """Arguments of the operator of the kernels, with a plan."""
    x, w1, w2, w3, weights = tensors
    rows = plan.expert_offsets, plan.token_of_row, plan.row_of
    return x, w1, w2, w3, weights, list(casts), *rows, clamp, keep


def test_operators_are_registered_soundly(device):
    triton = pytest.importorskip("kernels.swiglu_experts_triton")
    # Nothing dropped: what H holds in unused rows is undefined, and opcheck compares it.
    _, plan, tensors = inputs("one expert", 5, device)
    ours_in = leaves(*tensors)
    torch.library.opcheck(triton.swiglu_experts_op, as_op(ours_in, plan, 0.5, "h"))
    x, w1, w2, w3, weights = tensors
    out, h, a = triton.swiglu_experts_op(*as_op(tensors, plan, None, "ha"))
    rows = plan.expert_offsets, plan.token_of_row, plan.row_of
    backward = out, x, w1, w2, w3, weights, *rows, h, a, None, torch.float32
    for needs in ([True] * 5, [False, True, False, False, True], [True, False, True, False, False]):
        torch.library.opcheck(triton.swiglu_experts_backward_op, (*backward, needs))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_graphs_hold_the_kernels_whole(device, autocast):
    pytest.importorskip("triton")
    _, plan, tensors = inputs("dropped", 9, device)
    ours_in = leaves(*tensors)

    def layer(x, w1, w2, w3, weights):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            return swiglu_experts(x, w1, w2, w3, plan, weights, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(*ours_in), layer(*ours_in)
    assert torch.equal(ours, plain)
    grad = randn(9, D, seed=5, device=device)
    for a, b in zip(gradients(ours, grad, *ours_in), gradients(plain, grad, *ours_in), strict=True):
        assert torch.equal(a, b)


def test_bits_of_a_token_do_not_depend_on_the_number_of_tokens(device):
    pytest.importorskip("triton")
    indices, plan, (x, w1, w2, w3, weights) = inputs("random", 40, device)
    whole = swiglu_experts(x, w1, w2, w3, plan, weights, backend="triton")
    # From the first token on: NumPy's matmul, in the interpreter, rounds by the place in a block.
    for count in (1, 23):
        plan = plan_dispatch(indices[:count], len(w1))
        part = swiglu_experts(x[:count], w1, w2, w3, plan, weights[:count], backend="triton")
        assert torch.equal(part, whole[:count])


@pytest.mark.parametrize("save", ["x", "xh", "xha"])
def test_backward_keeps_the_bytes_that_save_names(device, save):
    pytest.importorskip("triton")
    _, plan, tensors = inputs("random", 32, device, hidden=48, width=16)
    ours_in = leaves(*(t.bfloat16() for t in tensors[:4]), tensors[4])
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr() if tensor.numel() else 0] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu_experts(*ours_in[:4], plan, ours_in[4], save=save, backend="triton")
    floats = [t for t in saved.values() if t.dtype == torch.bfloat16 and t.dim() == 2]
    # 2 bytes each of D of x, and for each of 3 assignments of 2 F of H and F of a.
    per_token = 2 * 48 + 2 * 3 * 16 * {"x": 0, "xh": 2, "xha": 3}[save]
    assert sum(t.numel() * t.element_size() for t in floats) == 32 * per_token
    others = [t for t in saved.values() if t.dim() not in (2, 3)] + [saved[ours_in[4].data_ptr()]]
    # float32 weights, int64 indices: a token's weights, its rows' tokens, its rows; offsets.
    assert {t.dtype for t in others} <= {torch.float32, torch.int64, torch.bfloat16}
    wide = [t for t in saved.values() if t.dtype != torch.bfloat16]
    assert sum(t.numel() * t.element_size() for t in wide) == 32 * 3 * (4 + 8 + 8) + 8 * 8


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("save", ["x", "xh", "xha"])
def test_pytorch_keeps_gate_and_up_alone_beside_its_inputs(is_sorted, save):
    _, plan, (x, w1, w2, w3, weights) = inputs("random", 32, "cpu", width=NARROW)
    if is_sorted:
        x, weights = x[plan.token_of_row], torch.rand(plan.num_rows)
    ours_in, kept = leaves(x, w1, w2, w3, weights), {}
    known = {t.data_ptr() for t in ours_in}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    options = {"save": save, "backend": "torch"}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if is_sorted:
            swiglu_experts_sorted(*ours_in[:4], plan.expert_offsets, scale=ours_in[4], **options)
        else:
            swiglu_experts(*ours_in[:4], plan, ours_in[4], **options)
    # 4 bytes of 2 F, for each of 3 assignments of 32 tokens; a is computed anew.
    assert sum(kept.values()) == (0 if save == "x" else 32 * 3 * 2 * NARROW * 4)


def test_nothing_is_kept_without_gradients(device):
    triton = pytest.importorskip("kernels.swiglu_experts_triton")
    _, plan, tensors = inputs("random", 9, device)
    _, h, a = triton.swiglu_experts_op(*as_op(tensors, plan, None, ""))
    assert h.numel() == a.numel() == 0


def test_tensors_between_guards_of_nan(device, backend):
    _, plan, tensors = inputs("random", 20, device)

    def guarded(tensor):
        nan = torch.full_like(tensor[:1], torch.nan)
        return torch.cat([nan, tensor, nan])[1:-1]

    ours_in = [guarded(t).requires_grad_() for t in tensors]
    out = swiglu_experts(*ours_in[:4], plan, ours_in[4], backend=backend)
    grad = guarded(randn(20, D, seed=5, device=device))
    assert all(t.isfinite().all() for t in (out, *gradients(out, grad, *ours_in)))


def test_a_row_that_is_not_finite_spoils_its_token_alone(device, backend):
    _, plan, (x, w1, w2, w3, weights) = inputs("random", 20, device)
    x[7] = torch.nan
    out = swiglu_experts(x, w1, w2, w3, plan, weights, clamp=1.0, backend=backend)
    assert out[7].isnan().all()
    assert out[torch.arange(20, device=device) != 7].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_never_wait_for_the_gpu(device):
    _, plan, tensors = inputs("dropped", 63, device)
    ours_in = leaves(*tensors)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = swiglu_experts(*ours_in[:4], plan, ours_in[4], backend="triton")
            gradients(out, torch.ones_like(out), *ours_in)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seed", seeds(100))
def test_random_layers_equal_float64(device, backend, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, width, clamped = torch.randint(1, 140, (3,), generator=generator).tolist()
    num_tokens, save = random_tokens(seed), ("x", "xh", "xha")[seed % 3]
    if seed % 5 == 2 and num_tokens > 1:
        check_bfloat16(device, backend, seed, save, num_tokens, hidden, width)
    else:
        clamp = (None, 0.8)[clamped % 2]
        check(device, backend, seed, num_tokens, clamp, save, hidden, width)
