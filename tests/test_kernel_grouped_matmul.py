"""Does each row meet its own expert's matrix, and no other?"""

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
)

from kernels.dispatch import plan_dispatch
from kernels.grouped_matmul import grouped_matmul

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D_IN, D_OUT = 17, 11


def expert_of_row(case, num_tokens, device):
    """(expert of each row in use, offsets, rows allocated, E)."""
    indices, _, num_experts = assignments(case, num_tokens, device)
    plan = plan_dispatch(indices, num_experts)
    flat = indices.flatten()
    return flat[flat >= 0].sort().values, plan.expert_offsets, plan.num_rows, num_experts


def oracle(rows, weight, expert):
    """Each row's own copy of its matrix."""
    used = torch.einsum("roi,ri->ro", weight[expert], rows[: len(expert)])
    return torch.cat([used, used.new_zeros(len(rows) - len(expert), weight.shape[1])])


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("case", ROUTINGS)
def test_output_and_gradients_equal_float64(device, case, num_tokens):
    expert, offsets, num_rows, num_experts = expert_of_row(case, num_tokens, device)
    rows = randn(num_rows, D_IN, seed=1, device=device)
    weight = randn(num_experts, D_OUT, D_IN, seed=2, device=device)
    grad = randn(num_rows, D_OUT, seed=3, device=device)
    exact_in = leaves(rows, weight, dtype=torch.float64)
    exact = oracle(*exact_in, expert)
    expected = gradients(exact, grad, *exact_in)
    # Unused rows may hold anything, on the way back too.
    rows[len(expert) :], grad[len(expert) :] = torch.nan, torch.nan
    ours_in = leaves(rows, weight)
    ours = grouped_matmul(*ours_in, offsets)
    assert_equals(ours, exact, "output")
    grad_rows, grad_weight = gradients(ours, grad, *ours_in)
    assert_equals(grad_rows, expected[0], "rows")
    assert_equals(grad_weight, expected[1], "weight")


def test_gradcheck():
    _, offsets, num_rows, num_experts = expert_of_row("dropped", 4, "cpu")
    rows, weight = leaves(
        randn(num_rows, 3, seed=1), randn(num_experts, 2, 3, seed=2), dtype=torch.float64
    )
    assert torch.autograd.gradcheck(lambda r, w: grouped_matmul(r, w, offsets), [rows, weight])


def test_bfloat16_by_autocast_is_as_exact_as_eager(device):
    expert, offsets, num_rows, num_experts = expert_of_row("idle experts", 128, device)
    rows = randn(num_rows, 64, seed=1, device=device)
    weight = randn(num_experts, 48, 64, seed=2, device=device)
    grad = randn(num_rows, 48, seed=3, device=device)
    ours_in, eager_in = leaves(rows, weight), leaves(rows, weight)
    exact_in = leaves(rows, weight, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = grouped_matmul(*ours_in, offsets)
        eager = torch.cat([eager_in[0][expert == e] @ eager_in[1][e].T for e in range(num_experts)])
    exact = oracle(*exact_in, expert)
    assert ours.dtype == torch.bfloat16
    assert_bfloat16(ours, eager, exact, "output")
    ours_grad = gradients(ours, grad, *ours_in)
    assert [g.dtype for g in ours_grad] == [torch.float32] * 2
    for name, *triple in zip(
        ("rows", "weight"),
        ours_grad,
        gradients(eager, grad, *eager_in),
        gradients(exact, grad, *exact_in),
        strict=True,
    ):
        assert_bfloat16(*triple, name)


def test_noncontiguous_inputs_and_expanded_gradient(device):
    expert, offsets, num_rows, num_experts = expert_of_row("random", 63, device)
    rows = randn(D_IN, num_rows, seed=1, device=device).T
    weight = randn(num_experts, D_IN, D_OUT, seed=2, device=device).transpose(1, 2)
    ours_in = rows.requires_grad_(), weight.requires_grad_()
    exact_in = leaves(rows, weight, dtype=torch.float64)
    total = grouped_matmul(*ours_in, offsets).sum()
    expected = torch.autograd.grad(oracle(*exact_in, expert).sum(), exact_in)
    once = torch.autograd.grad(total, ours_in, retain_graph=True)
    for ours, exact, again in zip(once, expected, torch.autograd.grad(total, ours_in), strict=True):
        assert_equals(ours, exact)
        assert torch.equal(ours, again)


def test_wrong_shapes_are_named():
    rows, weight, offsets = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.tensor([0, 2, 4])
    cases = [
        ((rows, weight[0], offsets), "weight has shape (5, 3), needs (any, any, any)"),
        ((rows[:, :2], weight, offsets), "rows has shape (4, 2), needs (any, 3)"),
        ((rows, weight, offsets[:2]), "expert_offsets has shape (2,), needs (3)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            grouped_matmul(*arguments)
        assert str(caught.value) == f"grouped_matmul: {message}"
