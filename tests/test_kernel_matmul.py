"""Is a product by the faster library the same product, and does each go where it should?"""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_bfloat16, assert_equals, gradients, leaves, randn

from kernels import matmul as matmul_file
from kernels.grouped_matmul import PADDED_ROWS, row_quantum
from kernels.matmul import (
    add_matmul,
    can_use_onednn,
    goes_to_onednn,
    linear,
    matmul,
    prefers_onednn,
)

# Around the number of multiplications and the size of a gradient from which oneDNN is asked.
SIZES = [(1, 1, 1), (3, 5, 7), (64, 128, 256), (130, 300, 257), (512, 256, 128), (2048, 16, 256)]


@pytest.fixture
def products(monkeypatch):
    """The shapes of the factors that oneDNN was given, in order."""
    seen = []
    given = matmul_file._onednn

    def record(x, weight):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return given(x, weight)

    monkeypatch.setattr(matmul_file, "_onednn", record)
    return seen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("layout", ["rows", "a transposed", "b transposed", "both", "columns"])
def test_product_equals_float64_in_every_layout(request, size, always, layout):
    if always:
        request.getfixturevalue("always_onednn")
    m, n, k = size
    a, b = randn(m, k, seed=1), randn(k, n, seed=2)
    if layout in ("a transposed", "both"):
        a = a.T.contiguous().T
    if layout in ("b transposed", "both"):
        b = b.T.contiguous().T
    if layout == "columns":
        a, b = randn(m, 2 * k, seed=1)[:, k:], randn(k, 2 * n, seed=2)[:, n:]
    expected = a.double() @ b.double()
    assert_equals(matmul(a, b), expected)
    for dtype in (torch.float32, torch.float64):
        out = torch.full((m, 2 * n), torch.nan, dtype=dtype)
        result = matmul(a, b, out=out[:, n:])
        assert result.data_ptr() == out[:, n:].data_ptr()
        assert_equals(out[:, n:].float(), expected)
        assert out[:, :n].isnan().all()
    assert torch.equal(matmul(a, b), matmul(a, b))


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("shape", [(300,), (0,), (3, 100), (2, 3, 5)])
def test_linear_and_its_gradients_equal_float64(request, always, shape):
    if always:
        request.getfixturevalue("always_onednn")
    tensors = randn(*shape, 128, seed=1), randn(256, 128, seed=2)
    grad = randn(*shape, 256, seed=3)
    ours_in, exact_in = leaves(*tensors), leaves(*tensors, dtype=torch.float64)
    ours, exact = linear(*ours_in), F.linear(*exact_in)
    assert_equals(ours, exact)
    for actual, expected in zip(
        gradients(ours, grad, *ours_in), gradients(exact, grad, *exact_in), strict=True
    ):
        assert_equals(actual, expected)


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_in_pairs_are_multiplied_and_added(request, by_onednn, batch, dtype):
    if by_onednn:
        request.getfixturevalue("always_onednn")
    sizes = ((9, 7), (7, 6), (9, 6))
    a, b, c = (randn(*batch, *size, seed=i).to(dtype) for i, size in enumerate(sizes))
    exact = a.double() @ b.double()
    wide = torch.full((*batch, 9, 6), torch.nan)
    for transposed in (a, a.mT.contiguous().mT):
        product = matmul(transposed, b)
        total = add_matmul(c.clone(), transposed, b)
        matmul(transposed, b, out=wide)
        assert product.dtype == total.dtype == dtype
        if dtype == torch.float32:
            assert_equals(product, exact)
            assert_equals(wide, exact)
            assert_equals(total, exact + c.double())
        else:
            assert_bfloat16(product, a @ b, exact)
            assert torch.equal(wide, product.float())
            assert_bfloat16(total, c + a @ b, exact + c.double())


def test_float32_stays_with_mkl_on_intel_and_where_the_chip_is_not_known(monkeypatch):
    for text, able, expected in (
        ("vendor_id: GenuineIntel", True, False),
        ("vendor_id: AuthenticAMD", True, True),
        ("vendor_id: AuthenticAMD", False, False),
        (None, True, False),
    ):

        def read(path, text=text):
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(matmul_file.Path, "read_text", read)
        monkeypatch.setattr(matmul_file, "can_use_onednn", lambda able=able: able)
        assert prefers_onednn.__wrapped__() is expected


def test_onednn_needs_avx512_and_the_operator(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert can_use_onednn() == torch.backends.mkldnn.is_available()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "mkldnn", object())
        assert not can_use_onednn()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not can_use_onednn()


def test_linear_takes_one_vector_and_a_frozen_weight(always_onednn):
    x, weight = leaves(randn(128, seed=1))[0], randn(256, 128, seed=2)
    y = linear(x, weight)
    assert y.shape == (256,)
    (grad,) = torch.autograd.grad(y.sum(), [x])
    assert_equals(grad, weight.double().sum(0))


def test_only_large_float32_products_go_to_onednn(onednn, products):
    large, weight = randn(512, 256, seed=1), randn(128, 256, seed=2)
    matmul(large, weight.T)
    assert products == [((512, 256), (128, 256))]
    # A gradient of the weight: the smaller factor is the one that is transposed.
    matmul(randn(512, 128, seed=3).T, large)
    assert products.pop() == ((128, 512), (256, 512))
    matmul(large.T, randn(512, 128, seed=3))
    assert products.pop() == ((128, 512), (256, 512))
    products.clear()
    matmul(large[:8], weight.T)
    matmul(randn(2048, 64, seed=3).T, randn(2048, 64, seed=4))
    for dtype in (torch.bfloat16, torch.float64):
        matmul(large.to(dtype), weight.T.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(large, weight).dtype == torch.bfloat16
    assert products == []


def test_where_onednn_is_not_preferred_products_stay_with_pytorch(products, monkeypatch):
    monkeypatch.setattr(matmul_file, "prefers_onednn", lambda: False)
    x, weight = randn(512, 256, seed=1), randn(128, 256, seed=2)
    assert not goes_to_onednn(x)
    assert torch.equal(matmul(x, weight.T), x @ weight.T)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert products == []


def test_rows_are_padded_where_shapes_are_compiled_and_would_not_repeat(onednn):
    x = torch.zeros(1)
    assert row_quantum(4 * PADDED_ROWS, 4, x) == PADDED_ROWS
    assert row_quantum(4 * PADDED_ROWS, 4, x.bfloat16()) == PADDED_ROWS
    assert row_quantum(4 * PADDED_ROWS - 1, 4, x) == 1
    assert row_quantum(4 * PADDED_ROWS, 4, x.double()) == 1
    assert row_quantum(4 * PADDED_ROWS, 4, torch.zeros(1, device="meta")) == 1


def test_compiled_models_get_a_plain_linear_layer():
    x, weight = randn(512, 256, seed=1), randn(128, 256, seed=2)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert_equals(compiled(x, weight), F.linear(x.double(), weight.double()))


def test_a_second_derivative_is_refused(always_onednn):
    x, weight = leaves(randn(512, 256, seed=1), randn(128, 256, seed=2))
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(linear(x, weight).square().sum(), [x], create_graph=True)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((3, 4), (2, 5), r"linear: x has shape \(3, 4\), needs \(\.\.\., 5\)"),
        ((), (2, 5), r"linear: x has shape \(\), needs \(\.\.\., 5\)"),
        ((3, 5), (2, 5, 1), r"linear: weight has shape \(2, 5, 1\), needs \(any, any\)"),
    ],
)
def test_wrong_shapes_are_named(x, weight, message):
    with pytest.raises(ValueError, match=message):
        linear(torch.ones(x), torch.ones(weight))
