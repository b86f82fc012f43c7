"""Does every assignment get its own row, and does each token get its own rows back?"""

import numpy as np
import pytest
import torch
from conftest import (
    NUM_TOKENS,
    ROUTINGS,
    assert_bfloat16,
    assert_equals,
    assignments,
    gradients,
    leaves,
    randn,
    seeds,
)

from kernels.dispatch import permute, plan_dispatch, unpermute

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WIDTH = 17


def used_rows(plan) -> int:
    return int(plan.expert_offsets[-1])


def skip_float64_on_triton(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is PyTorch's alone")


def unpermute_oracle(rows, indices, weights, num_experts):
    """float64, by walking the experts in order: no plan and no kernel."""
    out = rows.new_zeros(len(indices), rows.shape[1])
    row = 0
    for expert in range(num_experts):
        for token, slot in (indices == expert).nonzero().tolist():
            out[token] = out[token] + weights[token, slot] * rows[row]
            row += 1
    return out


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("case", ROUTINGS)
def test_plan_sorts_assignments_by_expert_then_token(device, backend, case, num_tokens):
    indices, _, num_experts = assignments(case, num_tokens, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    flat = indices.cpu().numpy().reshape(-1)
    counts = np.bincount(flat[flat >= 0], minlength=num_experts)
    assert plan.tokens_per_expert.tolist() == counts.tolist()
    assert plan.expert_offsets.tolist() == [0, *np.cumsum(counts)]
    assert plan.num_rows == flat.size
    order = np.argsort(np.where(flat < 0, num_experts, flat), kind="stable")[: counts.sum()]
    top_k = indices.shape[1]
    assert plan.token_of_row[: counts.sum()].tolist() == (order // top_k).tolist()
    row_of = np.full(flat.size, -1)
    row_of[order] = np.arange(order.size)
    assert plan.row_of.tolist() == row_of.reshape(num_tokens, top_k).tolist()
    if num_tokens:
        assert plan.token_of_row.min() >= 0
        assert plan.token_of_row.max() < num_tokens


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_plan_accepts_any_integers(device, backend, dtype):
    indices, _, num_experts = assignments("dropped", 63, device)
    for ours, expected in zip(
        plan_dispatch(indices.to(dtype), num_experts, backend=backend),
        plan_dispatch(indices, num_experts),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("num_experts", [32766, 32767, 32768, 70000])
def test_plan_of_more_experts_than_int16_holds(num_experts):
    indices = torch.tensor([[num_experts - 1, 0], [-1, num_experts - 2]])
    plan = plan_dispatch(indices, num_experts)
    assert plan.row_of.tolist() == [[2, 0], [-1, 1]]
    assert plan.tokens_per_expert.shape == (num_experts,)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_plan_of_more_experts_than_the_indices_dtype_holds(device, backend, dtype):
    drops = dtype.is_signed
    indices = torch.tensor([[1, -1 if drops else 2], [0, 1]], device=device).to(dtype)
    plan = plan_dispatch(indices, 300, backend=backend)
    assert plan.row_of.tolist() == [[1, -1 if drops else 3], [0, 2]]
    assert plan.tokens_per_expert.tolist() == [1, 2, 0 if drops else 1] + [0] * 297


def test_plan_of_noncontiguous_indices(device, backend):
    indices, _, num_experts = assignments("random", 63, device)
    strided = torch.stack([indices, indices.flip(0)], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(
        plan_dispatch(strided, num_experts, backend=backend).row_of,
        plan_dispatch(indices, num_experts).row_of,
    )


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("case", ["random", "idle experts", "one expert", "all experts"])
def test_permute_then_unpermute_by_equal_weights_is_the_identity(device, backend, case, num_tokens):
    indices, weights, num_experts = assignments(case, num_tokens, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    assert int(plan.tokens_per_expert.sum()) == indices.numel()
    x = randn(num_tokens, WIDTH, seed=1, device=device)
    weights = torch.full_like(weights, 1 / indices.shape[1])
    assert_equals(unpermute(permute(x, plan, backend=backend), plan, weights, backend=backend), x)


@pytest.mark.parametrize("num_tokens", [0, 1, 63])
@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unpermute_and_its_gradients_equal_float64(device, backend, case, num_tokens, dtype):
    skip_float64_on_triton(backend, dtype)
    indices, weights, num_experts = assignments(case, num_tokens, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    rows = randn(plan.num_rows, WIDTH, seed=1, device=device, dtype=torch.float64)
    exact_in = leaves(rows, weights, dtype=torch.float64)
    exact = unpermute_oracle(exact_in[0], indices, exact_in[1], num_experts)
    grad = randn(num_tokens, WIDTH, seed=2, device=device)
    # Of an empty sum no gradient flows at all.
    expected = [torch.zeros_like(t) for t in exact_in]
    if exact.requires_grad:
        expected = list(gradients(exact, grad, *exact_in))
    rows[used_rows(plan) :] = torch.nan
    ours_in = leaves(rows, weights, dtype=dtype)
    ours = unpermute(ours_in[0], plan, ours_in[1], backend=backend)
    assert ours.dtype == dtype
    assert_equals(ours, exact, "output")
    grad_rows, grad_weights = gradients(ours, grad, *ours_in)
    assert_equals(grad_rows, expected[0], "rows")
    assert_equals(grad_weights, expected[1], "weights")


@pytest.mark.parametrize("num_tokens", [0, 1, 63])
@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permute_and_its_gradient_ignore_unused_rows(device, backend, case, num_tokens, dtype):
    skip_float64_on_triton(backend, dtype)
    indices, _, num_experts = assignments(case, num_tokens, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    (x,) = leaves(randn(num_tokens, WIDTH, seed=1, device=device), dtype=dtype)
    rows = permute(x, plan, backend=backend)
    order = [t for e in range(num_experts) for t, _ in (indices == e).nonzero().tolist()]
    assert torch.equal(rows[: used_rows(plan)], x[order])
    grad_rows = randn(*rows.shape, seed=2, device=device, dtype=torch.float64)
    expected = torch.zeros_like(x, dtype=torch.float64)
    for row, token in enumerate(order):
        expected[token] += grad_rows[row]
    grad_rows[used_rows(plan) :] = torch.nan
    assert_equals(*gradients(rows, grad_rows, x), expected)


def test_unpermute_leaves_dropped_tokens_zero(device, backend):
    indices, weights, num_experts = assignments("dropped", 128, device)
    indices[5], weights[5] = -1, 0
    plan = plan_dispatch(indices, num_experts, backend=backend)
    rows = torch.full((plan.num_rows, WIDTH), torch.nan, device=device)
    rows[: used_rows(plan)] = 1
    out = unpermute(rows, plan, weights, backend=backend)
    assert_equals(out, weights.sum(-1, keepdim=True).expand(-1, WIDTH))
    assert torch.count_nonzero(out[5]) == 0


@pytest.mark.parametrize("case", ["random", "dropped"])
def test_gradcheck(case):
    indices, weights, num_experts = assignments(case, 5)
    plan = plan_dispatch(indices, num_experts)
    x, rows, weights = leaves(
        randn(5, 3, seed=1), randn(plan.num_rows, 3, seed=2), weights, dtype=torch.float64
    )
    used = used_rows(plan)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan)[:used], [x])
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, plan, w), [rows, weights])
    assert torch.autograd.gradgradcheck(lambda x: permute(x, plan)[:used], [x])
    assert torch.autograd.gradgradcheck(lambda r, w: unpermute(r, plan, w), [rows, weights])


def test_second_derivatives_by_the_kernels_are_refused(device):
    pytest.importorskip("triton")
    _, weights, plan = triton_plan("random", 9, device)
    x, weights = leaves(randn(9, WIDTH, seed=1, device=device), weights)
    rows = permute(x, plan, backend="triton")
    (grad,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.square().sum(), x)
    out = unpermute(rows.detach(), plan, weights, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.square().sum(), weights)


@pytest.mark.parametrize("frozen", [0, 1])
def test_unpermute_makes_no_gradient_of_what_is_frozen(device, backend, frozen, monkeypatch):
    indices, weights, num_experts = assignments("dropped", 20, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    ours_in = leaves(randn(plan.num_rows, WIDTH, seed=1, device=device), weights)
    grad = randn(20, WIDTH, seed=2, device=device)
    out = unpermute(ours_in[0], plan, ours_in[1], backend=backend)
    whole = gradients(out, grad, *ours_in)
    ours_in[frozen].requires_grad_(False)
    out = unpermute(ours_in[0], plan, ours_in[1], backend=backend)
    # What would make the frozen one's gradient in PyTorch's body.
    monkeypatch.setattr(f"kernels.dispatch.{('weights_by_row', '_grad_weights')[frozen]}", None)
    assert torch.equal(*gradients(out, grad, ours_in[1 - frozen]), whole[1 - frozen])


@pytest.mark.parametrize("case", ["random", "dropped"])
def test_unpermute_in_bfloat16_is_as_exact_as_eager(device, backend, case):
    indices, weights, num_experts = assignments(case, 128, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    rows = randn(plan.num_rows, WIDTH, seed=1, device=device).bfloat16()
    ours_in, eager_in = leaves(rows, weights), leaves(rows, weights)
    exact_in = leaves(rows, weights, dtype=torch.float64)
    grad = randn(128, WIDTH, seed=2, device=device)

    def eager(rows, weights):
        gathered = rows[plan.row_of.clamp(min=0)] * weights.to(rows.dtype).unsqueeze(-1)
        return gathered.masked_fill(plan.row_of.unsqueeze(-1) < 0, 0).sum(1)

    ours, theirs = unpermute(ours_in[0], plan, ours_in[1], backend=backend), eager(*eager_in)
    exact = eager(*exact_in)
    assert ours.dtype == torch.bfloat16
    assert_bfloat16(ours, theirs, exact, "output")
    for name, *triple in zip(
        ("rows", "weights"),
        gradients(ours, grad, *ours_in),
        gradients(theirs, grad, *eager_in),
        gradients(exact, grad.bfloat16(), *exact_in),
        strict=True,
    ):
        assert_bfloat16(*triple, name)


def test_a_graph_that_is_kept_can_be_walked_twice(device, backend):
    indices, weights, num_experts = assignments("dropped", 63, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    x, weights = leaves(randn(63, WIDTH, seed=1, device=device), weights)
    # An expanded gradient, as `sum` gives it, has strides of 0.
    total = unpermute(permute(x, plan, backend=backend) * 2, plan, weights, backend=backend).sum()
    total.backward(retain_graph=True)
    once = x.grad.clone(), weights.grad.clone()
    total.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(weights.grad, 2 * once[1])


def test_noncontiguous_rows_and_weights(device, backend):
    indices, weights, num_experts = assignments("random", 63, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    x = randn(WIDTH, 63, seed=1, device=device).T
    rows = permute(x, plan, backend=backend)
    assert torch.equal(rows, permute(x.contiguous(), plan, backend=backend))
    spread = torch.stack([rows, rows], -1)[..., 0]
    other = weights.T.contiguous().T
    assert not spread.is_contiguous()
    ours = unpermute(spread, plan, other, backend=backend)
    assert_equals(ours, unpermute(rows, plan, weights, backend=backend))


def test_wrong_inputs_are_named():
    plan = plan_dispatch(torch.tensor([[0, 1], [1, 2]]), 3)
    cases = [
        (
            lambda: plan_dispatch(torch.tensor([0, 1]), 2),
            "plan_dispatch: topk_indices has shape (2,), needs (any, any)",
        ),
        (
            lambda: plan_dispatch(torch.zeros(2, 2), 2),
            "plan_dispatch: topk_indices is torch.float32, needs integers",
        ),
        (
            lambda: plan_dispatch(torch.zeros(2, 2, dtype=torch.bool), 2),
            "plan_dispatch: topk_indices is torch.bool, needs integers",
        ),
        (
            lambda: plan_dispatch(torch.tensor([[0, 1]]), 0),
            "plan_dispatch: num_experts (0) must be at least 1",
        ),
        (
            lambda: plan_dispatch(torch.tensor([[0, -2]]), 3, debug=True),
            "plan_dispatch: topk_indices holds -2, must be from 0 to num_experts - 1 (2), or -1 "
            "for no assignment",
        ),
        (
            lambda: plan_dispatch(torch.tensor([[0, 3]]), 3, debug=True),
            "plan_dispatch: topk_indices holds 3, must be from 0 to num_experts - 1 (2), or -1 "
            "for no assignment",
        ),
        (lambda: permute(torch.zeros(3, 4), plan), "permute: x has shape (3, 4), needs (2, any)"),
        (
            lambda: unpermute(torch.zeros(3, 4), plan, torch.zeros(2, 2)),
            "unpermute: rows has shape (3, 4), needs (4, any)",
        ),
        (
            lambda: unpermute(torch.zeros(4, 4), plan, torch.zeros(2, 1)),
            "unpermute: topk_weights has shape (2, 1), needs (2, 2)",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == message


def test_tensors_of_another_device_are_named():
    plan = plan_dispatch(torch.tensor([[0, 1], [1, 2]]), 3)
    ours, far = torch.zeros(4, 4), torch.zeros(4, 4, device="meta")
    weights = torch.zeros(2, 2)
    cases = [
        (lambda: permute(far[:2], plan), "permute: tensors on different devices: x on meta, plan."),
        (
            lambda: permute(ours[:2], plan._replace(row_of=plan.row_of.to("meta"))),
            "permute: tensors on different devices: x on cpu, plan.",
        ),
        (
            lambda: unpermute(far, plan, weights),
            "unpermute: tensors on different devices: rows on meta, topk_weights on cpu, plan.",
        ),
        (
            lambda: unpermute(ours, plan, weights.to("meta")),
            "unpermute: tensors on different devices: rows on cpu, topk_weights on meta, plan.",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_expert_kernels_launch_on_the_device_of_their_tensors(device, monkeypatch):
    pytest.importorskip("triton")
    from contextlib import nullcontext

    from kernels import dispatch_triton, grouped_matmul_triton, swiglu_experts_triton
    from kernels.grouped_matmul import grouped_matmul
    from kernels.swiglu_experts import swiglu_experts

    entered = []

    def record(x):
        entered.append(x.device)
        return nullcontext()

    for module in (dispatch_triton, grouped_matmul_triton, swiglu_experts_triton):
        monkeypatch.setattr(module, "on_device_of", record)
    _, weights, plan = triton_plan("random", 4, device)
    assert entered == [plan.row_of.device]
    x, stack, down = (
        randn(*shape, seed=1, device=device).requires_grad_()
        for shape in ((4, 8), (7, 8, 8), (7, 8, 8))
    )
    calls = [
        lambda: permute(x, plan, backend="triton"),
        lambda: unpermute(x[plan.token_of_row], plan, weights, backend="triton"),
        lambda: grouped_matmul(x[plan.token_of_row], stack, plan.expert_offsets, backend="triton"),
        lambda: swiglu_experts(x, stack, down, stack, plan, weights, backend="triton"),
    ]
    for call in calls:
        entered.clear()
        call().sum().backward()
        # Once forward, once backward.
        assert entered == [x.device] * 2


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_passes_give_equal_bits(device, backend, count):
    indices, weights, num_experts = assignments("dropped", 63, device)
    x, weights = leaves(randn(63, WIDTH, seed=1, device=device), weights)
    grad = randn(63, WIDTH, seed=2, device=device)

    def once():
        plan = plan_dispatch(indices, num_experts, backend=backend)
        rows = permute(x, plan, backend=backend)
        # The plan does not say what unused rows hold.
        used = rows[: used_rows(plan)]
        out = unpermute(rows, plan, weights, backend=backend)
        return *plan, used, out, *gradients(out, grad, x, weights)

    first, *others = [once() for _ in range(count)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def triton_plan(case, num_tokens, device):
    """(indices, weights, plan) by the kernels."""
    indices, weights, num_experts = assignments(case, num_tokens, device)
    return indices, weights, plan_dispatch(indices, num_experts, backend="triton")


def test_more_experts_than_the_triton_plan_counts_are_refused(device):
    pytest.importorskip("triton")
    indices = torch.tensor([[8192, 0]], device=device)
    with pytest.raises(ValueError) as caught:
        plan_dispatch(indices, 8193, backend="triton")
    assert str(caught.value) == (
        "plan_dispatch: backend 'triton' counts at most 8192 experts, got 8193; "
        "use 'auto' or 'torch'"
    )
    assert plan_dispatch(indices, 8193).row_of.tolist() == [[1, 0]]


def test_plan_across_tiles_is_stable(device):
    pytest.importorskip("triton")
    # 2000 assignments of an expert reach over several tiles of the counting sort.
    indices = randn(1000, 6, seed=1, device=device).argsort(-1)[:, :4]
    indices[randn(1000, 4, seed=2, device=device) > 1] = -1
    for ours, expected in zip(
        plan_dispatch(indices, 6, backend="triton"),
        plan_dispatch(indices, 6, backend="torch"),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_operators_are_registered_soundly(device):
    triton = pytest.importorskip("kernels.dispatch_triton")
    indices, weights, plan = triton_plan("dropped", 9, device)
    check = torch.library.opcheck
    check(triton.plan_dispatch_op, (indices, 7))
    (x,) = leaves(randn(9, WIDTH, seed=1, device=device))
    check(triton.permute_op, (x, plan.token_of_row, plan.row_of))
    rows, weights = leaves(randn(plan.num_rows, WIDTH, seed=2, device=device), weights)
    check(triton.permute_backward_op, (rows.detach(), plan.row_of))
    check(triton.unpermute_op, (rows, weights, *plan[1:]))
    check(triton.unpermute_backward_op, (x.detach(), rows.detach(), weights.detach(), *plan[1:]))


def test_compiled_graphs_hold_the_kernels_whole(device):
    pytest.importorskip("triton")
    indices, weights, num_experts = assignments("dropped", 9, device)
    x, weights = leaves(randn(9, WIDTH, seed=1, device=device), weights)

    def there_and_back(x, indices, weights):
        plan = plan_dispatch(indices, num_experts, backend="triton")
        rows = permute(x, plan, backend="triton")
        return unpermute(rows, plan, weights, backend="triton")

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(x, indices, weights), there_and_back(x, indices, weights)
    assert torch.equal(ours, plain)
    grad = randn(9, WIDTH, seed=2, device=device)
    for a, b in zip(
        gradients(ours, grad, x, weights), gradients(plain, grad, x, weights), strict=True
    ):
        assert torch.equal(a, b)


def test_bits_of_a_token_do_not_depend_on_the_number_of_tokens(device):
    pytest.importorskip("triton")
    indices, weights, num_experts = assignments("random", 70, device)
    x = randn(70, WIDTH, seed=1, device=device)

    def there_and_back(part):
        plan = plan_dispatch(indices[part], num_experts, backend="triton")
        rows = permute(x[part], plan, backend="triton")
        return unpermute(rows, plan, weights[part], backend="triton")

    whole = there_and_back(slice(None))
    for part in (slice(0, 1), slice(5, 23), slice(69, 70)):
        assert torch.equal(there_and_back(part), whole[part])


def test_tensors_between_guards_of_nan(device, backend):
    indices, weights, num_experts = assignments("random", 63, device)
    plan = plan_dispatch(indices, num_experts, backend=backend)

    def guarded(tensor):
        nan = torch.full_like(tensor[:2], torch.nan)
        return torch.cat([nan, tensor, nan])[2:-2]

    x, weights = guarded(randn(63, WIDTH, seed=1, device=device)), guarded(weights)
    ours_in = [t.requires_grad_() for t in (x, weights)]
    rows = permute(x, plan, backend=backend)
    out = unpermute(guarded(rows), plan, weights, backend=backend)
    results = out, *gradients(out, guarded(randn(63, WIDTH, seed=2, device=device)), *ours_in)
    assert all(t.isfinite().all() for t in results)


def test_addresses_beyond_32_bits(device):
    triton = pytest.importorskip("kernels.dispatch_triton")
    torch.use_deterministic_algorithms(False)
    # 4 GiB of which a few pages are touched.
    far = torch.empty(2**27 + 8, 16, dtype=torch.bfloat16, device=device)
    far[-2:], far[3] = torch.tensor([[1.0], [2.0]]), 4.0
    tokens = torch.tensor([len(far) - 1, 3, len(far) - 2], device=device)
    rows = triton.permute_op(far, tokens, tokens.view(3, 1))
    assert rows[:, 5].tolist() == [2, 4, 1]
    total = triton.gather_sum(far, tokens.view(1, 3), torch.tensor([[1.0, 0.5, 3]], device=device))
    assert total[0].tolist() == [7] * 16


def test_pytorch_bodies_never_ask_another_device_for_a_value():
    # A tensor without values raises where one is read, or a size that depends on values.
    indices = torch.empty(9, 3, dtype=torch.int64, device="meta")
    x, weights = leaves(torch.empty(9, WIDTH, device="meta"), torch.empty(9, 3, device="meta"))
    plan = plan_dispatch(indices, 7, backend="torch")
    out = unpermute(permute(x, plan, backend="torch"), plan, weights, backend="torch")
    assert [g.shape for g in gradients(out, torch.empty_like(out), x, weights)] == [(9, 17), (9, 3)]
    with pytest.raises((RuntimeError, NotImplementedError)):
        int(plan.expert_offsets[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_body_waits_for_the_gpu(device, backend):
    indices, weights, num_experts = assignments("dropped", 63, device)
    x, weights = leaves(randn(63, WIDTH, seed=1, device=device), weights)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            plan = plan_dispatch(indices, num_experts, backend=backend)
            rows = permute(x, plan, backend=backend)
            unpermute(rows, plan, weights, backend=backend).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seed", seeds(60))
def test_random_plans_and_sums_equal_float64(device, backend, seed):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    num_experts = number(1, 40)
    top_k, num_tokens, width = number(1, min(num_experts, 9) + 1), number(0, 300), number(1, 90)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores[:, : number(0, num_experts)] -= number(0, 2)
    indices = scores.argsort(-1, descending=True)[:, :top_k]
    indices[torch.rand(indices.shape, generator=generator) < number(0, 3) / 4] = -1
    weights = torch.rand(indices.shape, generator=generator)
    indices, weights = indices.to(device), weights.masked_fill(indices < 0, 0).to(device)
    plan = plan_dispatch(indices, num_experts, backend=backend)
    for ours, expected in zip(
        plan, plan_dispatch(indices, num_experts, backend="torch"), strict=True
    ):
        assert torch.equal(ours, expected)
    rows = randn(plan.num_rows, width, seed=seed, device=device)
    exact_in = leaves(rows, weights, dtype=torch.float64)
    exact = unpermute_oracle(exact_in[0], indices, exact_in[1], num_experts)
    rows[used_rows(plan) :] = torch.nan
    ours_in = leaves(rows, weights)
    ours = unpermute(ours_in[0], plan, ours_in[1], backend=backend)
    assert_equals(ours, exact, "output")
    if exact.requires_grad:
        grad = randn(num_tokens, width, seed=seed + 1, device=device)
        for actual, right in zip(
            gradients(ours, grad, *ours_in), gradients(exact, grad, *exact_in), strict=True
        ):
            assert_equals(actual, right)
