"""Do queries and keys turn by their positions, and only by those?"""

import numpy as np
import pytest
import torch
from conftest import TOLERANCE, assert_equals, leaves, randn, relative_error

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
def test_rotation_equals_complex_numbers(device, seq_len, head_dim, theta, first):
    positions = torch.arange(first, first + seq_len, device=device)
    q, k = qk(2, seq_len, 4, 2, head_dim, device)
    # The power of float32 differs by a bit between libraries, which the position multiplies.
    bound = TOLERANCE[torch.float32] * (10 if first else 1)
    for ours, x in zip(apply_rope(q, k, positions, theta=theta), (q, k), strict=True):
        assert relative_error(ours, oracle(x.cpu(), positions.cpu(), theta)) <= bound


def test_backward_is_the_rotation_back(device):
    positions = torch.arange(63, device=device)
    q, k = leaves(*qk(2, 63, 4, 2, 8, device))
    q_out, k_out = apply_rope(q, k, positions)
    # The gradient of |y|^2 / 2 is y, turned back: x itself.
    grads = torch.autograd.grad((q_out.square().sum() + k_out.square().sum()) / 2, [q, k])
    assert_equals(grads[0], q)
    assert_equals(grads[1], k)


def test_gradcheck():
    q, k = leaves(*qk(1, 3, 2, 1, 4, "cpu"), dtype=torch.float64)
    positions = torch.tensor([0, 5, 9])
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, positions), [q, k])


def test_scores_depend_on_the_distance_only(device):
    q, k = (t.double() for t in qk(1, 1, 1, 1, 16, device))

    def score(at_query, at_key):
        turned_q, _ = apply_rope(q, q, torch.tensor([at_query], device=device))
        turned_k, _ = apply_rope(k, k, torch.tensor([at_key], device=device))
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)


def test_bfloat16_is_rotated_in_float32(device):
    positions = torch.arange(1000, 1063, device=device)
    q, k = (t.bfloat16() for t in qk(2, 63, 4, 2, 8, device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = apply_rope(q, k, positions)
    expected = apply_rope(q.float(), k.float(), positions)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b.bfloat16())


def test_noncontiguous_inputs_and_expanded_gradient(device):
    positions = torch.arange(5, device=device)
    q, k = (
        t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in qk(2, 5, 4, 2, 8, device)
    )
    q.requires_grad_()
    q_out, k_out = apply_rope(q, k, positions)
    assert torch.equal(k_out, apply_rope(k.contiguous(), k.contiguous(), positions)[1])
    first = torch.autograd.grad(q_out.sum(), q, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(q_out.sum(), q)[0])
    (plain,) = leaves(q.detach().contiguous())
    total = apply_rope(plain, plain, positions)[0].sum()
    assert torch.equal(first, torch.autograd.grad(total, plain)[0])


def test_wrong_inputs_are_named():
    q, k = qk(2, 5, 4, 2, 8, "cpu")
    positions = torch.arange(5)
    cases = [
        ((q[0], k, positions), "q has shape (5, 4, 8), needs (any, any, any, any)"),
        ((q, k[:, :3], positions), "k has shape (2, 3, 2, 8), needs (2, 5, any, 8)"),
        ((q, k, positions[:3]), "positions has shape (3,), needs (5)"),
        ((q[..., :7], k[..., :7], positions), "head_dim (7) must be even"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            apply_rope(*arguments)
        assert str(caught.value) == f"apply_rope: {message}"
