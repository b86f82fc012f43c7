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
    random_tokens,
    relative_error,
    seeds,
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
    check_bfloat16(device, backend, 63, 65)


def check_bfloat16(device, backend, num_tokens, size, eps=1e-5):
    x = randn(num_tokens, size, seed=1, device=device).bfloat16()
    weight = randn(size, seed=2, device=device)
    ours_in, eager_in = leaves(x, weight), leaves(x, weight)
    exact_in = leaves(x, weight, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = rms_norm(*ours_in, eps, backend=backend)
        theirs = torch.nn.functional.rms_norm(eager_in[0], (size,), eager_in[1].bfloat16(), eps)
    exact = oracle(*exact_in, eps)
    assert ours.dtype == torch.bfloat16
    assert_bfloat16(ours, theirs, exact, "output")
    grad = randn(num_tokens, size, seed=3, device=device).bfloat16()
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


def bits(x, weight, grad, backend="triton"):
    """Output and gradients."""
    ours_in = x.requires_grad_(), weight.requires_grad_()
    out = rms_norm(*ours_in, backend=backend)
    return out, *gradients(out, grad, *ours_in)


def guarded(tensor):
    """The same tensor, with rows of NaN in memory before and behind it."""
    nan = torch.full_like(tensor[:9], torch.nan)
    return torch.cat([nan, tensor, nan])[len(nan) : len(nan) + len(tensor)]


def test_tensors_between_guards_of_nan(device, backend):
    sizes = (21, 33), (33,), (21, 33)
    plain = [randn(*size, seed=i, device=device) for i, size in enumerate(sizes)]
    between = [guarded(tensor) for tensor in plain]
    for a, b in zip(bits(*plain, backend), bits(*between, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_passes_give_equal_bits(device, backend, count):
    # Several programs: a sum of their partial sums.
    sizes = (70, 33), (33,), (70, 33)

    def once():
        return bits(*(randn(*s, seed=i, device=device) for i, s in enumerate(sizes)), backend)

    first, *others = [once() for _ in range(count)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_addresses_beyond_two_to_the_31(device, monkeypatch):
    triton = pytest.importorskip("kernels.rms_norm_triton")
    torch.use_deterministic_algorithms(False)
    # 4 GiB each of x, y and their gradients, of which a few pages are touched.
    size, num_rows = 512, 2**22 + 4
    block = triton._tile(size).blocks["BLOCK_ROWS"]
    rows, weight, grad_rows = (
        randn(*shape, seed=i, device=device).bfloat16()
        for i, shape in enumerate(((block, size), (size,), (block, size)))
    )
    far, far_grad = (torch.empty(num_rows, size, dtype=rows.dtype, device=device) for _ in range(2))
    for whole, part in ((far, rows), (far_grad, grad_rows)):
        if device.type == "cuda":
            whole.zero_()
        whole[:block], whole[-block:] = 0, part
    if device.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        # Of the many programs that the interpreter would run one by one, the last; on the way back
        # one, whose second block is the last.
        last, get = num_rows // block - 1, Builder.create_get_program_id
        count = Builder.create_get_num_programs
        monkeypatch.setattr(triton.triton, "cdiv", lambda *_: 1)

        def shifted(read, by):
            def read_shifted(self, axis):
                handle = read(self, axis)
                handle.data = handle.data + np.int32(by)
                return handle

            return read_shifted

        monkeypatch.setattr(Builder, "create_get_program_id", shifted(get, last))
    y, inverse = triton.rms_norm_op(far, weight, 1e-5, rows.dtype)
    if device.type == "cpu":
        monkeypatch.setattr(Builder, "create_get_program_id", get)
        monkeypatch.setattr(Builder, "create_get_num_programs", shifted(count, last - 1))
        inverse[:block] = 1
    grad_x, grad_weight = triton.rms_norm_backward_op(far_grad, far, weight, inverse)
    monkeypatch.undo()
    expected, inverses = triton.rms_norm_op(rows, weight, 1e-5, rows.dtype)
    assert torch.equal(y[-block:], expected)
    right = triton.rms_norm_backward_op(grad_rows, rows, weight, inverses)
    assert torch.equal(grad_x[-block:], right[0])
    assert torch.equal(grad_weight, right[1])


# Long vectors take long in the interpreter.
@pytest.mark.parametrize("seed", seeds(80, quick=(0, 1, 2, 3, 4, 6)))
def test_random_sizes_equal_float64(device, backend, seed):
    rng = np.random.default_rng(seed)
    size, eps = int(rng.integers(2, (20, 200, 3000)[seed % 3])), float(rng.choice([1e-6, 0.1]))
    num_tokens = random_tokens(seed)
    if seed % 4 == 2 and num_tokens > 1:
        check_bfloat16(device, backend, num_tokens, size, eps)
        return
    x = randn(num_tokens, size, seed=seed, device=device) * float(rng.choice([0.01, 1, 100]))
    weight, grad = (randn(*s, seed=seed + 1, device=device) for s in ((size,), x.shape))
    if seed % 4 == 1:
        # Columns far apart, and every second row.
        x, grad = x.T.contiguous().T, torch.stack([grad, grad], 1).flatten(0, 1)[::2]
    exact_in, ours_in = leaves(x, weight, dtype=torch.float64), (x, weight)
    exact = oracle(*exact_in, eps)
    ours = rms_norm(*(t.requires_grad_() for t in ours_in), eps, backend=backend)
    assert_equals(ours, exact, "output")
    for name, actual, right in zip(
        ("x", "weight"),
        gradients(ours, grad, *ours_in),
        gradients(exact, grad, *exact_in),
        strict=True,
    ):
        assert_equals(actual, right, name)
