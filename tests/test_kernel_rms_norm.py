"""Does RMS normalisation equal its formula, and its gradients?"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import (
    NUM_TOKENS,
    assert_bfloat16,
    assert_equals,
    gradients,
    leaves,
    randn,
    relative_error,
)

from kernels.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def oracle(x, weight, eps):
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5 * weight


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("size", [1, 17, 64])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_norm_and_its_gradients_equal_float64(device, backend, num_tokens, size, eps):
    x, weight = randn(num_tokens, size, seed=1, device=device), randn(size, seed=2, device=device)
    grad = randn(num_tokens, size, seed=3, device=device)
    exact_in, ours_in = leaves(x, weight, dtype=torch.float64), leaves(x, weight)
    exact, ours = oracle(*exact_in, eps), rms_norm(*ours_in, eps, backend=backend)
    assert_equals(ours, exact, "output")
    expected = gradients(exact, grad, *exact_in)
    for name, actual, right in zip(
        ("x", "weight"), gradients(ours, grad, *ours_in), expected, strict=True
    ):
        if size == 1 and name == "x":
            # y = x / sqrt(x^2 + eps): the gradient is a small difference of large terms.
            assert (actual - right).abs().max() < 1e-4 if num_tokens else True
        else:
            assert_equals(actual, right, name)


def test_norm_equals_numpy_by_hand():
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    out = rms_norm(torch.tensor(x), torch.tensor([1.0, 2.0], dtype=torch.float64), 0.5)
    # mean square 12.5, plus 0.5 is 13: 3 / sqrt(13), 2 * 4 / sqrt(13)
    assert out.tolist() == [pytest.approx([0.8320502943, 2.2188007849]), [0.0, 0.0]]


def test_any_leading_shape_and_strides(device, backend):
    x, weight = randn(6, 4, 5, seed=1, device=device), randn(6, seed=2, device=device)
    strided = x.permute(1, 2, 0)  # (4, 5, 6)
    exact_in = leaves(strided, weight, dtype=torch.float64)
    ours_in = strided.requires_grad_(), weight.requires_grad_()
    ours, exact = rms_norm(*ours_in, backend=backend), oracle(*exact_in, 1e-5)
    assert_equals(ours, exact)
    once = torch.autograd.grad(ours.sum(), ours_in, retain_graph=True)
    again = torch.autograd.grad(ours.sum(), ours_in)
    for a, b, expected in zip(once, again, torch.autograd.grad(exact.sum(), exact_in), strict=True):
        assert torch.equal(a, b)
        assert_equals(a, expected)


def test_gradcheck():
    x, weight = leaves(randn(4, 5, seed=1), randn(5, seed=2), dtype=torch.float64)
    assert torch.autograd.gradcheck(rms_norm, [x, weight])


def test_bfloat16_is_as_exact_as_eager(device, backend):
    x, weight = randn(63, 65, seed=1, device=device).bfloat16(), randn(65, seed=2, device=device)
    ours_in, eager_in = leaves(x, weight), leaves(x, weight)
    exact_in = leaves(x, weight, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = rms_norm(*ours_in, backend=backend)
        theirs = torch.nn.functional.rms_norm(eager_in[0], (65,), eager_in[1].bfloat16(), 1e-5)
    exact = oracle(*exact_in, 1e-5)
    assert ours.dtype == torch.bfloat16
    assert_bfloat16(ours, theirs, exact, "output")
    grad = randn(63, 65, seed=3, device=device).bfloat16()
    for name, *triple in zip(
        ("x", "weight"),
        gradients(ours, grad, *ours_in),
        gradients(theirs, grad, *eager_in),
        gradients(exact, grad, *exact_in),
        strict=True,
    ):
        assert_bfloat16(*triple, name)


def test_float32_input_under_autocast_is_normalised_in_float32(device, backend):
    x, weight = randn(63, 65, seed=1, device=device), randn(65, seed=2, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = rms_norm(x, weight, backend=backend)
    assert torch.equal(ours, rms_norm(x, weight, backend=backend).bfloat16())


def test_squares_of_large_bfloat16_values_do_not_overflow(device, backend):
    x = (randn(8, 33, seed=1, device=device) * 1e18).bfloat16()
    ones = torch.ones(33, device=device)
    ours = rms_norm(x, ones, backend=backend)
    assert relative_error(ours, oracle(x.double(), ones.double(), 1e-5)) < 4e-3


def test_wrong_shape_is_named():
    with pytest.raises(ValueError) as caught:
        rms_norm(torch.zeros(2, 4), torch.zeros(3))
    assert str(caught.value) == "rms_norm: weight has shape (3,), needs (4)"


def test_tensors_on_two_devices_are_named():
    with pytest.raises(ValueError) as caught:
        rms_norm(torch.zeros(2, 4), torch.zeros(4, device="meta"))
    message = "tensors on different devices: x on cpu, weight on meta"
    assert str(caught.value) == f"rms_norm: {message}"


def test_a_second_derivative_raises(device, backend):
    x, weight = leaves(randn(9, 17, seed=1, device=device), randn(17, seed=2, device=device))
    out = rms_norm(x, weight, backend=backend).square().sum()
    with pytest.raises(RuntimeError, match=r"differentiated again|no autograd formula"):
        torch.autograd.grad(out, [x, weight], create_graph=True)[0].square().sum().backward()


def test_kernels_are_launched_on_the_device_of_x(device, monkeypatch):
    triton = pytest.importorskip("kernels.rms_norm_triton")
    x, weight = leaves(randn(9, 17, seed=1, device=device), randn(17, seed=2, device=device))
    entered = []
    monkeypatch.setattr(triton, "on_device_of", lambda t: entered.append(t) or nullcontext())
    rms_norm(x, weight, backend="triton").sum().backward()
    assert [t.data_ptr() for t in entered] == [x.data_ptr()] * 2


def test_operators_are_registered_soundly(device):
    triton = pytest.importorskip("kernels.rms_norm_triton")
    x, weight = leaves(randn(9, 17, seed=1, device=device), randn(17, seed=2, device=device))
    torch.library.opcheck(triton.rms_norm_op, (x, weight, 1e-5, torch.float32))
    grad, inverse = randn(9, 17, seed=3, device=device), torch.ones(9, device=device)
    torch.library.opcheck(triton.rms_norm_backward_op, (grad, x.detach(), weight.detach(), inverse))


def test_compiled_graphs_hold_the_kernel_whole(device):
    pytest.importorskip("triton")
    x, weight = leaves(randn(9, 17, seed=1, device=device), randn(17, seed=2, device=device))

    def norm(x, weight):
        return rms_norm(x, weight, backend="triton")

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), norm(x, weight))


def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(device):
    pytest.importorskip("triton")
    x, weight = randn(70, 33, seed=1, device=device), randn(33, seed=2, device=device)
    whole = rms_norm(x, weight, backend="triton")
    for rows in (slice(0, 1), slice(5, 23), slice(69, 70)):
        assert torch.equal(rms_norm(x[rows], weight, backend="triton"), whole[rows])
