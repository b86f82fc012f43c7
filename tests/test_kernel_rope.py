"""Do queries and keys turn by their positions, and only by those?"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import (
    BFLOAT16_FLOOR,
    TOLERANCE,
    assert_bfloat16,
    assert_equals,
    leaves,
    randn,
    relative_error,
    seeds,
)

from kernels.rope import apply_rope

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def oracle(x, positions, theta):
    """NumPy: (x1 + i x2) exp(i angle), the angles in float32, as they are defined."""
    x, half = np.asarray(x, dtype=np.float64), x.shape[-1] // 2
    exponent = np.arange(half, dtype=np.float32) * 2 / np.float32(2 * half)
    frequency = np.power(np.float32(theta), -exponent)
    angle = np.asarray(positions, dtype=np.float32)[:, None] * frequency  # (S, P/2)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle.astype(np.float64))[:, None]
    return torch.from_numpy(np.concatenate([turned.real, turned.imag], -1))


def qk(batch, seq_len, heads, groups, head_dim, device):
    return (
        randn(batch, seq_len, heads, head_dim, seed=1, device=device),
        randn(batch, seq_len, groups, head_dim, seed=2, device=device),
    )


@pytest.mark.parametrize("seq_len", [0, 1, 63, 128])
@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize(("theta", "first"), [(10000.0, 0), (500.0, 1000)])
def test_rotation_equals_complex_numbers(device, backend, seq_len, head_dim, theta, first):
    positions = torch.arange(first, first + seq_len, device=device)
    q, k = qk(2, seq_len, 4, 2, head_dim, device)
    # The power of float32 differs by a bit between libraries, which the position multiplies.
    bound = TOLERANCE[torch.float32] * (10 if first else 1)
    outputs = apply_rope(q, k, positions, theta=theta, backend=backend)
    for ours, x in zip(outputs, (q, k), strict=True):
        assert relative_error(ours, oracle(x.cpu(), positions.cpu(), theta)) <= bound


def test_backward_is_the_rotation_back(device, backend):
    positions = torch.arange(63, device=device)
    q, k = leaves(*qk(2, 63, 4, 2, 8, device))
    q_out, k_out = apply_rope(q, k, positions, backend=backend)
    # The gradient of |y|^2 / 2 is y, turned back: x itself.
    grads = torch.autograd.grad((q_out.square().sum() + k_out.square().sum()) / 2, [q, k])
    assert_equals(grads[0], q)
    assert_equals(grads[1], k)


def test_gradcheck():
    q, k = leaves(*qk(1, 3, 2, 1, 4, "cpu"), dtype=torch.float64)
    positions = torch.tensor([0, 5, 9])
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, positions), [q, k])


def test_second_derivatives_are_right_in_both_bodies(device, backend):
    positions = torch.arange(5, device=device)
    (q,) = leaves(randn(1, 5, 2, 4, seed=1, device=device))
    k = randn(1, 5, 1, 4, seed=2, device=device)
    out, _ = apply_rope(q, k, positions, backend=backend)
    # The gradient of |y|^2 / 2 is x, and that of |x|^2 is 2 x.
    (grad,) = torch.autograd.grad(out.square().sum() / 2, q, create_graph=True)
    (again,) = torch.autograd.grad(grad.square().sum(), q)
    assert_equals(again, 2 * q)


def test_kernels_are_launched_on_the_device_of_q(device, monkeypatch):
    triton = pytest.importorskip("kernels.rope_triton")
    q, k = leaves(*qk(1, 5, 2, 1, 4, device))
    entered = []
    monkeypatch.setattr(triton, "on_device_of", lambda t: entered.append(t) or nullcontext())
    sum(apply_rope(q, k, torch.arange(5, device=device), backend="triton")).sum().backward()
    assert [t.shape for t in entered] == [q.shape] * 2


def test_scores_depend_on_the_distance_only(device):
    q, k = (t.double() for t in qk(1, 1, 1, 1, 16, device))

    def score(at_query, at_key):
        turned_q, _ = apply_rope(q, q, torch.tensor([at_query], device=device))
        turned_k, _ = apply_rope(k, k, torch.tensor([at_key], device=device))
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)


def test_bfloat16_is_rotated_in_float32(device, backend):
    positions = torch.arange(1000, 1063, device=device)
    q, k = (t.bfloat16() for t in qk(2, 63, 4, 2, 8, device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = apply_rope(q, k, positions, backend=backend)
    expected = apply_rope(q.float(), k.float(), positions, backend=backend)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b.bfloat16())


def test_noncontiguous_inputs_and_expanded_gradient(device, backend):
    positions = torch.arange(5, device=device)
    q, k = (
        t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in qk(2, 5, 4, 2, 8, device)
    )
    q.requires_grad_()
    q_out, k_out = apply_rope(q, k, positions, backend=backend)
    whole = k.contiguous()
    assert torch.equal(k_out, apply_rope(whole, whole, positions, backend=backend)[1])
    first = torch.autograd.grad(q_out.sum(), q, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(q_out.sum(), q)[0])
    (plain,) = leaves(q.detach().contiguous())
    total = apply_rope(plain, plain, positions, backend=backend)[0].sum()
    assert torch.equal(first, torch.autograd.grad(total, plain)[0])


def test_wrong_inputs_are_named():
    q, k = qk(2, 5, 4, 2, 8, "cpu")
    positions = torch.arange(5)
    cases = [
        ((q[0], k, positions), "q has shape (5, 4, 8), needs (any, any, any, any)"),
        ((q, k[:, :3], positions), "k has shape (2, 3, 2, 8), needs (2, 5, any, 8)"),
        ((q, k, positions[:3]), "positions has shape (3,), needs (5)"),
        ((q[..., :7], k[..., :7], positions), "head_dim (7) must be even"),
        (
            (q, k, positions.to("meta")),
            "tensors on different devices: q on cpu, k on cpu, positions on meta",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            apply_rope(*arguments)
        assert str(caught.value) == f"apply_rope: {message}"


def test_bfloat16_is_as_exact_as_eager(device, backend):
    positions = torch.arange(500, 563, device=device)
    narrow = [t.bfloat16() for t in qk(2, 63, 4, 2, 16, device)]
    for ours, x in zip(apply_rope(*narrow, positions, backend=backend), narrow, strict=True):
        expected = oracle(x.double().cpu(), positions.cpu(), 10000.0)
        assert_bfloat16(ours, expected.bfloat16(), expected)


@pytest.mark.parametrize(
    ("batch", "seq_len", "heads", "groups", "head_dim"),
    [(0, 5, 2, 1, 4), (1, 1, 9, 3, 2), (3, 7, 17, 1, 10), (2, 130, 1, 1, 6), (1, 3, 8, 8, 128)],
)
def test_odd_numbers_of_heads_and_tokens(device, backend, batch, seq_len, heads, groups, head_dim):
    q, k = qk(batch, seq_len, heads, groups, head_dim, device)
    positions = torch.arange(seq_len, device=device).flip(0) * 3
    for ours, x in zip(apply_rope(q, k, positions, backend=backend), (q, k), strict=True):
        expected = oracle(x.cpu(), positions.cpu(), 10000.0)
        bound = TOLERANCE[torch.float32] * 10
        assert relative_error(ours, expected) <= bound


def test_views_are_read_where_they_lie_and_never_beyond(device):
    triton = pytest.importorskip("kernels.rope_triton")
    # One projection gives q, k and v side by side; NaN stands around what belongs to q and k.
    rows = torch.full((2, 5, 9, 8), torch.nan, device=device)
    rows[:, :, 1:5], rows[:, :, 6:8] = qk(2, 5, 4, 2, 8, device)
    q, k = rows[:, :, 1:5], rows[:, :, 6:8]
    assert all(triton._rows(x) is x for x in (q, k))
    assert all(triton._rows(x.transpose(1, 2)).data_ptr() == x.data_ptr() for x in (q, k))
    positions = torch.arange(5, device=device)
    ours = apply_rope(q, k, positions, backend="triton")
    expected = apply_rope(q.contiguous(), k.contiguous(), positions, backend="triton")
    for a, b in zip(ours, expected, strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b)


def test_rows_beyond_two_to_the_31_elements_apart(device):
    pytest.importorskip("triton")
    # Each stride fits in 32 bits, what the last sequence is away does not.
    distance = 2**30 + 64
    # Untouched pages of zeros cost nothing on a CPU.
    far = torch.from_numpy(np.zeros(2 * distance + 64, dtype=np.int16)).to(device)
    q = far.view(torch.bfloat16).as_strided((3, 2, 2, 8), (distance, 16, 8, 1))
    q.copy_(randn(3, 2, 2, 8, seed=1))
    positions = torch.arange(2, device=device)
    ours = apply_rope(q, q, positions, backend="triton")[0]
    whole = q.contiguous()
    assert torch.equal(ours, apply_rope(whole, whole, positions, backend="triton")[0])


def test_both_bodies_turn_by_the_same_angles(device):
    pytest.importorskip("triton")
    q, k = qk(2, 63, 4, 2, 16, device)
    positions = torch.arange(63, device=device)
    for a, b in zip(
        apply_rope(q, k, positions, backend="triton"),
        apply_rope(q, k, positions, backend="torch"),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-7


def test_gradient_of_keys_alone(device, backend):
    q, k = qk(1, 5, 2, 1, 8, device)
    (k_in,), positions = leaves(k), torch.arange(5, device=device)
    out = apply_rope(q, k_in, positions, backend=backend)[1]
    (grad,) = torch.autograd.grad(out.square().sum() / 2, [k_in])
    assert_equals(grad, k)


def test_bits_of_a_token_do_not_depend_on_the_number_of_tokens(device):
    pytest.importorskip("triton")
    q, k = qk(3, 70, 4, 2, 12, device)
    positions = torch.arange(70, device=device)
    whole = apply_rope(q, k, positions, backend="triton")
    for batches, tokens in ((slice(0, 1), slice(69, 70)), (slice(1, 3), slice(5, 38))):
        part = q[batches, tokens], k[batches, tokens]
        ours = apply_rope(*part, positions[tokens], backend="triton")
        for a, b in zip(ours, whole, strict=True):
            assert torch.equal(a, b[batches, tokens])


def test_operator_is_registered_soundly(device):
    triton = pytest.importorskip("kernels.rope_triton")
    q, k = leaves(*qk(2, 5, 4, 2, 8, device))
    cos, sin = randn(5, 4, seed=3, device=device), randn(5, 4, seed=4, device=device)
    for inverse in (False, True):
        torch.library.opcheck(triton.rope_op, (q, k, cos, sin, inverse))


def test_compiled_graphs_hold_the_kernel_whole(device):
    pytest.importorskip("triton")
    q, k = leaves(*qk(2, 5, 4, 2, 8, device))
    positions = torch.arange(5, device=device)

    def rope(q, k):
        return apply_rope(q, k, positions, backend="triton")

    outputs = rope(q, k), torch.compile(rope, fullgraph=True, backend="aot_eager")(q, k)
    grads = [
        torch.autograd.grad(a.square().sum() + 2 * b.square().sum(), [q, k]) for a, b in outputs
    ]
    for a, b in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        assert torch.equal(a, b)


def passes(count, device):
    """Outputs and gradients of equal passes."""
    q, k = leaves(*qk(2, 33, 4, 2, 24, device))
    positions = torch.arange(33, device=device)
    for _ in range(count):
        out = apply_rope(q, k, positions, backend="triton")
        yield *out, *torch.autograd.grad(out[0].square().sum() + out[1].sum(), [q, k])


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_passes_give_equal_bits(device, count):
    pytest.importorskip("triton")
    first, *others = passes(count, device)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# Many heads take long in the interpreter.
@pytest.mark.parametrize("seed", seeds(60, quick=(0, 1, 2, 3, 5)))
def test_random_cases_equal_float64(device, backend, seed):
    rng = np.random.default_rng(seed)
    batch, seq_len, groups = (int(n) for n in rng.integers(1, (4, 80, 5)))
    heads, head_dim = groups * int(rng.integers(1, 6)), 2 * int(rng.integers(1, 70))
    theta = float(rng.choice([500.0, 10000.0, 1e6]))
    positions = torch.from_numpy(rng.integers(0, 300, seq_len)).to(device)
    dtype = torch.bfloat16 if seed % 3 == 0 else torch.float32
    inputs = [t.to(dtype) for t in qk(batch, seq_len, heads, groups, head_dim, device)]
    if seed % 2:
        inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    ours_in = leaves(*inputs)
    outputs = apply_rope(*ours_in, positions, theta=theta, backend=backend)
    grads = torch.autograd.grad(outputs, ours_in, inputs)
    for ours, grad, x in zip(outputs, grads, inputs, strict=True):
        wide = x.double().cpu()
        bound = BFLOAT16_FLOOR if dtype == torch.bfloat16 else 3 * TOLERANCE[torch.float32]
        assert relative_error(ours, oracle(wide, positions.cpu(), theta)) <= bound
        assert relative_error(grad, oracle(wide, -positions.cpu(), theta)) <= bound
