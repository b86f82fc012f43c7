"""Does Triton's interpreter compute in bfloat16 as PyTorch does, bit for bit?

What `interpreter.install` puts in place of the interpreter's own operations, which compute on the
raw bit patterns.
"""

import pytest
import torch
from conftest import randn

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU"),
    # NumPy's, of infinity and NaN.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]
BFLOAT16 = torch.bfloat16
SIZE = 64


@triton.jit
def _pairs_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "div":
        out = a / b
    elif OP == "neg":
        out = -a
    elif OP == "maximum":
        out = tl.maximum(a, b)
    elif OP == "minimum":
        out = tl.minimum(a, b)
    elif OP == "where":
        out = tl.where(a < b, a, b)
    tl.store(out_ptr + at, out)


@triton.jit
def _rows_kernel(x_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    x = tl.load(x_ptr + row[:, None] * SIZE + row[None, :])
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "max":
        out = tl.max(x, 1)
    elif OP == "min":
        out = tl.min(x, 1)
    tl.store(out_ptr + row, out)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    at = row[:, None] * SIZE + row[None, :]
    total = tl.full([SIZE, SIZE], 1.0, dtype=tl.float32)
    total = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), total, input_precision="ieee")
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


def assert_same_bits(actual, expected):
    """NaN where the other is, whatever its payload; else equal with the sign of zeros."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    whole = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    known = ~expected.isnan()
    assert torch.equal(actual[known].view(whole), expected[known].view(whole))


def whole_numbers(seed):
    """(SIZE, SIZE) of -63 to 63: float32 adds up their products exactly, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-63, 64, (SIZE, SIZE), generator=generator).to(BFLOAT16)


PAIRS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": lambda a, b: -a,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a < b, a, b),
}


@pytest.mark.parametrize("op", PAIRS)
def test_operations_on_pairs_round_as_pytorch_does(op):
    a, b = (randn(SIZE, seed=seed).to(BFLOAT16) for seed in (1, 2))
    # Sums between two neighbours, which go to the even one; far apart, overflowing, tiny, infinite.
    a[:9] = torch.tensor([1.0, 257.0, 1.0, -1.0, 3.3e38, 1e-40, torch.inf, -0.0, -3e38])
    b[:9] = torch.tensor([2.0**-8, 1.0, 3 * 2.0**-8, 2.0**-9, 3.3e38, 2e-40, -2.0, 3.0, -3e38])
    out = torch.full((SIZE,), torch.nan, dtype=BFLOAT16)
    _pairs_kernel[(1,)](a, b, out, OP=op, SIZE=SIZE)
    assert_same_bits(out, PAIRS[op](a, b))


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
def test_reductions_of_rows_round_once(op, dtype):
    x = whole_numbers(1)
    # Negative alone, of which the raw patterns are the wrong way round.
    x[:9] = -x[:9].abs() - 1
    out = torch.full((SIZE,), torch.nan, dtype=dtype)
    _rows_kernel[(1,)](x, out, OP=op, SIZE=SIZE)
    expected = x.sum(1) if op == "sum" else getattr(x, f"a{op}")(1)
    # The sum of a row of bfloat16 is one, also where it is stored as float32.
    assert_same_bits(out, expected.to(dtype))
    if op == "sum":
        assert not torch.equal(expected.double(), x.double().sum(1)), "nothing had to be rounded"


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
def test_products_of_matrices_accumulate_in_float32(dtype):
    a, b = whole_numbers(1), whole_numbers(2)
    out = torch.full((SIZE, SIZE), torch.nan, dtype=dtype)
    _dot_kernel[(1,)](a, b, out, SIZE=SIZE)
    exact = a.double() @ b.double() + 1
    assert_same_bits(out, exact.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(out.double(), exact)
    else:
        # Without the accumulator: the bits of PyTorch's own product.
        assert_same_bits(a @ b, (exact - 1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_casts_from_and_to_bfloat16_are_those_of_pytorch(dtype):
    x = randn(SIZE, seed=1, dtype=torch.float64) * 100
    # Between two neighbours: to the even one.
    special = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 257.0, 259.0, -0.0, 0.0]
    x[:7] = torch.tensor(special, dtype=torch.float64)
    if dtype == torch.float32:
        # Just above a tie; to infinity; NaN; numbers without a leading one.
        x[7:13] = torch.tensor([1 + 2**-8 + 2**-23, 3.4e38, -3.4e38, torch.nan, 1e-40, torch.inf])
    x = x.to(dtype)
    narrow = torch.full((SIZE,), torch.nan, dtype=BFLOAT16)
    _cast_kernel[(1,)](x, narrow, SIZE=SIZE)
    assert_same_bits(narrow, x.to(BFLOAT16))
    wide = torch.zeros(SIZE, dtype=dtype)
    _cast_kernel[(1,)](narrow.nan_to_num(7.0), wide, SIZE=SIZE)
    assert torch.equal(wide, narrow.nan_to_num(7.0).to(dtype))
