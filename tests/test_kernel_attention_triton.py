"""Do the Triton kernels of attention hold at every shape, mask and layout, and bit for bit?"""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BFLOAT16_FLOOR,
    TOLERANCE,
    assert_equals,
    gradients,
    leaves,
    randn,
    relative_error,
    seeds,
)

from kernels.attention import fused_attention

triton = pytest.importorskip("kernels.attention_triton")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def visible_keys(q, k, document_ids, window):
    """(1 or B, 1, S, S_k), by the definition."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    query = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)
    visible = (key <= query) & (key > query - (window or num_keys))  # (S, S_k)
    if document_ids is not None:
        ids = document_ids.cpu()
        visible = visible & (ids[:, num_keys - num_queries :, None] == ids[:, None])
    return visible.to(q.device).view(-1, 1, num_queries, num_keys)


def oracle(q, k, v, document_ids=None, window=None, scale=None):
    """Plain softmax over all keys, each head with keys of its own."""
    visible = visible_keys(q, k, document_ids, window)
    shared = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(shared, 2) for t in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", q, k) * (scale or q.shape[-1] ** -0.5)
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhp->bihp", probs, v)


def library(q, k, v, document_ids=None, window=None, scale=None):
    """PyTorch's own."""
    visible = visible_keys(q, k, document_ids, window)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=scale, enable_gqa=True
    ).transpose(1, 2)


def make(shape, device, dtype=torch.float32, seed=1):
    """q, k, v of (B, S, S_k, H, G, P)."""
    batch, num_queries, num_keys, heads, groups, head_dim = shape
    sizes = [(num_queries, heads), (num_keys, groups), (num_keys, groups)]
    return [
        randn(batch, rows, count, head_dim, seed=seed + i, device=device).to(dtype)
        for i, (rows, count) in enumerate(sizes)
    ]


def make_documents(batch, num_keys, device, rate=0.05, ascending=True):
    """Documents of about 1 / rate tokens; not ascending: ids come back after other documents."""
    generator = torch.Generator().manual_seed(4)
    ids = (torch.rand(batch, num_keys, generator=generator) < rate).cumsum(-1)
    return (ids.int() if ascending else ids % 3).to(device)


def attend(*tensors, **options):
    return fused_attention(*tensors, backend="triton", **options)


def check(tensors, deterministic=True, **options):
    """Output and gradients against float64; in bfloat16 beside PyTorch's own error."""

    def run(function, inputs):
        out = function(*inputs, **options)
        grad = randn(*out.shape, seed=9, device=out.device).to(tensors[0].dtype)
        return out, *gradients(out, grad, *inputs)

    results = run(partial(attend, deterministic=deterministic), leaves(*tensors))
    expected = run(oracle, leaves(*tensors, dtype=torch.float64))
    narrow = tensors[0].dtype == torch.bfloat16
    theirs = run(library, leaves(*tensors)) if narrow else expected
    bound = BFLOAT16_FLOOR if narrow else TOLERANCE[tensors[0].dtype]
    # dS is a small difference where a query sees few keys, and 0 where it sees one: an element of
    # dQ is measured against a tenth of what it would be without the difference.
    head_dim = tensors[0].shape[-1]
    size = 0.1 * (options.get("scale") or head_dim**-0.5) * head_dim**0.5
    names = "output", *"qkv"
    for name, actual, right, other in zip(names, results, expected, theirs, strict=True):
        least = size * right.numel() ** 0.5 if name in "qk" else 1e-30
        error = relative_error(actual, right, least=least)
        allowed = max(bound, 2 * relative_error(other, right, least=least))
        assert error <= allowed, f"{name}: relative error {error:.2e}, bound {allowed:.2e}"


SHAPES = [
    # (B, S, S_k, H, G, P), window, documents
    ((1, 1, 1, 2, 1, 8), None, False),
    ((2, 17, 17, 2, 1, 40), 7, True),
    ((1, 63, 63, 4, 1, 24), None, True),
    ((1, 128, 128, 1, 1, 128), None, False),
    ((1, 128, 200, 2, 2, 64), 7, True),
    ((1, 200, 200, 2, 1, 64), None, False),
    ((1, 200, 200, 1, 1, 8), 1, False),
    ((2, 200, 200, 1, 1, 24), None, True),
    ((1, 200, 200, 2, 2, 40), 300, True),
    ((1, 63, 200, 2, 1, 128), 100, False),
    ((1, 1, 128, 4, 2, 64), 70, True),
    ((1, 17, 128, 1, 1, 13), None, True),
    pytest.param((1, 130, 200, 2, 1, 256), 90, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "window", "documents"), SHAPES)
def test_attention_and_its_gradients_equal_float64(device, shape, window, documents):
    ids = make_documents(shape[0], shape[2], device) if documents else None
    check(make(shape, device), window=window, document_ids=ids)


@pytest.mark.parametrize(("shape", "window", "documents"), SHAPES[4:8])
def test_gradient_by_atomics_equals_float64(device, shape, window, documents):
    ids = make_documents(shape[0], shape[2], device) if documents else None
    check(make(shape, device), window=window, document_ids=ids, deterministic=False)


@pytest.mark.parametrize("blocks", [(128, 32), (32, 128), (16, 64)])
@pytest.mark.parametrize(
    ("window", "documents"),
    [pytest.param(None, False, marks=pytest.mark.slow), (40, False), (None, True)],
)
def test_blocks_of_every_shape_visit_what_is_visible(
    device, monkeypatch, blocks, window, documents
):
    tile = triton.Tile({"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "BLOCK_P": 16})
    monkeypatch.setattr(triton, "_tile", lambda kernel, x: tile)
    ids = make_documents(1, 230, device) if documents else None
    for num_queries in (230, 150):
        tensors = make((1, num_queries, 230, 1, 1, 16), device)
        deterministic = num_queries == 230
        check(tensors, deterministic, window=window, document_ids=ids)


def test_gradient_by_atomics_of_few_queries_and_many_keys_equals_float64(device, monkeypatch):
    """Such blocks, as GPUs have them, form it transposed."""
    tile = triton.Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_P": 64})
    monkeypatch.setattr(triton, "_tile", lambda kernel, x: tile)
    ids = torch.arange(100, device=device).repeat(2, 1) // 60
    check(make((2, 70, 100, 2, 1, 40), device), False, window=30, document_ids=ids)


@pytest.mark.parametrize("deterministic", [True, False])
def test_documents_in_pieces_are_joined(device, deterministic):
    ids = make_documents(1, 200, device, ascending=False).long() * 2**40
    check(make((1, 150, 200, 1, 1, 16), device), document_ids=ids, deterministic=deterministic)


def test_borders_of_documents_by_hand():
    ids = torch.tensor([[3, 3, 5, 9, 9, 9], [0, 1, 0, 0, 2, 2]])
    starts, ends = triton.document_borders(ids)
    assert starts.tolist() == [[0, 0, 2, 3, 3, 3], [-1] * 6]
    assert ends.tolist() == [[2, 2, 3, 6, 6, 6], [-1] * 6]


def test_later_tokens_change_no_bit_of_earlier_rows(device):
    q, k, v = make((1, 150, 150, 2, 1, 16), device)
    before = attend(q, k, v)
    for t in (q, k, v):
        t[:, 100:] += 1
    after = attend(q, k, v)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100], after[:, 100])


@pytest.mark.parametrize("ascending", [True, False])
def test_other_documents_change_no_bit(device, ascending):
    q, k, v = make((1, 150, 150, 2, 1, 16), device)
    ids = torch.zeros(1, 150, dtype=torch.int32, device=device)
    ids[:, 40:110] = 1
    ids[:, 110:] = 2 if ascending else -1
    before = attend(q, k, v, document_ids=ids)
    for t in (q, k, v):
        t[:, :40] += 1
        t[:, 110:] -= 3
    after = attend(q, k, v, document_ids=ids)
    assert torch.equal(before[:, 40:110], after[:, 40:110])
    assert relative_error(after[:, 110:], before[:, 110:]) > 1e-2


def test_hidden_tokens_get_no_gradient(device):
    tensors = leaves(*make((1, 150, 150, 1, 1, 16), device))
    ids = make_documents(1, 150, device)
    out = attend(*tensors, document_ids=ids, window=30)
    row = 100
    _, grad_k, grad_v = torch.autograd.grad(out[:, row].sum(), tensors)
    position = torch.arange(150, device=device)
    visible = (position <= row) & (position > row - 30) & (ids[0] == ids[0, row])
    for grad in (grad_k, grad_v):
        assert (grad[0, ~visible] == 0).all()
        assert (grad[0, visible] != 0).any()


def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(device):
    q, k, v = make((2, 150, 150, 4, 2, 16), device)
    whole = attend(q, k, v)
    assert torch.equal(attend(q[1:], k[1:], v[1:]), whole[1:])
    for rows in (1, 64, 70):
        assert torch.equal(attend(q[:, :rows], k[:, :rows], v[:, :rows]), whole[:, :rows])
    heads = attend(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:])
    assert torch.equal(heads, whole[:, :, 2:])


def guarded(t):
    """The same values in the middle of NaN, on all sides."""
    room = t.new_full([size + 2 for size in t.shape], torch.nan)
    inner = room[1:-1, 1:-1, 1:-1, 1:-1]
    inner.copy_(t)
    return inner


@pytest.mark.parametrize(
    ("shape", "deterministic"),
    [
        ((2, 17, 70, 4, 2, 24), True),
        ((1, 130, 130, 2, 1, 16), False),
        pytest.param((2, 17, 70, 4, 2, 24), False, marks=pytest.mark.slow),
        pytest.param((1, 130, 130, 2, 1, 16), True, marks=pytest.mark.slow),
    ],
)
def test_nothing_beyond_the_tensors_is_read(device, shape, deterministic):
    tensors = make(shape, device)
    ids = make_documents(shape[0], shape[2], device)
    results = []
    for wrap in (torch.clone, guarded):
        inputs = [wrap(t).requires_grad_() for t in tensors]
        out = attend(*inputs, document_ids=ids, window=50, deterministic=deterministic)
        grad = wrap(randn(*out.shape, seed=9, device=device))
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for plain, inside in zip(*results, strict=True):
        assert_equals(inside, plain)


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_launched_on_the_device_of_q(device, monkeypatch, deterministic):
    tensors = leaves(*make((1, 17, 17, 2, 1, 8), device))
    entered = []
    monkeypatch.setattr(triton, "on_device_of", lambda t: entered.append(t) or nullcontext())
    attend(*tensors, deterministic=deterministic).sum().backward()
    assert [t.data_ptr() for t in entered] == [tensors[0].data_ptr()] * 2


def test_views_are_read_in_place(device, monkeypatch):
    fused = randn(2, 33, 8, 16, seed=1, device=device)
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    expected = attend(q.contiguous(), k.contiguous(), v.contiguous())
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    assert torch.equal(attend(q, k, v), expected)


def test_offsets_beyond_32_bits(device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # 4 GiB of address space, of which two pages are touched.
    room = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)
    far = room.as_strided((2, 8, 1, 16), (2**31 + 64, 16, 16, 1))
    q, k, v = make((2, 8, 8, 1, 1, 16), device, torch.bfloat16)
    expected = attend(q, k, v)
    for index in range(3):
        tensors = [q, k, v]
        tensors[index] = far.copy_(tensors[index])
        assert torch.equal(attend(*tensors), expected)


def test_addresses_are_formed_in_64_bits(device):
    assert triton.MAX_ROW_STRIDE * 256 <= 2**31
    x = torch.zeros(1, 2, 1, 16, device=device)
    # Rows too far apart for 32-bit offsets within a tile are brought together.
    room = torch.zeros(triton.MAX_ROW_STRIDE + 16, device=device)
    far = room.as_strided((1, 2, 1, 16), (1, triton.MAX_ROW_STRIDE, 1, 1))
    assert torch.equal(attend(far, x, x), x)
    assert triton._with_dense_rows(far)[0].is_contiguous()


def operands(device):
    q, k, v = leaves(*make((1, 9, 20, 2, 1, 8), device))
    ids = make_documents(1, 20, device)
    return q, k, v, ids, *triton.document_borders(ids), 5, 0.3


@pytest.mark.parametrize("documents", [False, True])
def test_operators_are_registered_soundly(device, documents):
    q, k, v, *masks, window, scale = operands(device)
    masks = masks if documents else [None] * 3
    torch.library.opcheck(triton.attention_op, (q, k, v, *masks, window, scale, True))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = triton.attention_op(q, k, v, *masks, window, scale, True)
    grad = randn(*out.shape, seed=5, device=device)
    arguments = grad, q, k, v, out, lse, *masks, window, scale
    torch.library.opcheck(triton.attention_backward_op, (*arguments, True))
    # Compiled and eager passes may differ in the last bits here.
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(triton.attention_backward_op, (*arguments, False), test_utils=checks)


@pytest.mark.parametrize("deterministic", [True, False])
def test_compiled_graphs_hold_the_kernels_whole(device, deterministic):
    q, k, v, ids, *_ = operands(device)

    def attention(q, k, v):
        return attend(q, k, v, document_ids=ids, window=5, deterministic=deterministic)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attention, compiled):
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for eager, graph in zip(*results, strict=True):
        assert_equals(graph, eager.double())


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_passes_give_equal_bits(device, count):
    ids = make_documents(2, 80, device)
    results = []
    for _ in range(count):
        tensors = leaves(*make((2, 80, 80, 2, 1, 16), device))
        out = attend(*tensors, document_ids=ids, window=50)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_keys_without_queries_get_zero_gradients(device):
    tensors = leaves(*make((1, 0, 70, 2, 1, 8), device))
    grads = torch.autograd.grad(attend(*tensors).sum(), tensors)
    assert all((grad == 0).all() for grad in grads)
    tensors = leaves(*make((1, 3, 150, 2, 1, 8), device))
    _, grad_k, grad_v = torch.autograd.grad(attend(*tensors, window=4).sum(), tensors)
    assert (grad_k[:, :144] == 0).all() and (grad_v[:, :144] == 0).all()


# Those that are quick in the interpreter; 0 is without a fixed order of sums.
@pytest.mark.parametrize("seed", seeds(120, quick=(0, 2, 3, 9, 11, 14)))
def test_random_cases_equal_float64(device, seed):
    rng = np.random.default_rng(seed)
    shared, groups, batch = (int(rng.choice(sizes)) for sizes in ((1, 2, 4), (1, 2), (1, 2)))
    num_queries = int(rng.choice([1, 2, 17, 63, 64, 65, 128, 200]))
    num_keys = num_queries + int(rng.choice([0, 0, 1, 30, 64, 100]))
    head_dim = int(rng.choice([8, 16, 24, 40, 64, 80, 128]))
    window = None if rng.random() < 0.4 else int(rng.choice([1, 7, 64, 100, 1000]))
    ids = None
    if rng.random() < 0.6:
        rate = float(rng.choice([0.01, 0.1, 0.5]))
        ids = make_documents(batch, num_keys, device, rate, ascending=bool(rng.random() < 0.7))
    shape = batch, num_queries, num_keys, groups * shared, groups, head_dim
    tensors = make(shape, device, torch.float32 if seed % 3 else torch.bfloat16, seed)
    scale = float(rng.choice([0.1, 0.5, head_dim**-0.5]))
    options = {"window": window, "document_ids": ids, "scale": scale}
    check(tensors, deterministic=seed % 4 > 0, **options)
