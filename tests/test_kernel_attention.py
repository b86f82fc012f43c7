"""Does attention see the keys it may see, and no others, on every code path?"""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    HAS_TRITON,
    assert_bfloat16,
    assert_equals,
    gradients,
    leaves,
    randn,
    relative_error,
)

from kernels import attention
from kernels.attention import fused_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["short path", "flash path", "triton"])
def attend(request, monkeypatch):
    """`fused_attention` by each code path whatever the length; on a GPU two may be one."""
    if request.param == "triton":
        if not HAS_TRITON:
            pytest.skip("triton is not installed")
        return partial(fused_attention, backend="triton")
    if request.param == "flash path":
        monkeypatch.setattr(attention, "SHORT_KEYS", -1)
    return partial(fused_attention, backend="torch")


def oracle(q, k, v, document_ids=None, window=None, scale=None):
    """float64, one query at a time, with an explicit list of the keys that it sees."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, groups = k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    out = []
    for b in range(batch):
        for i in range(num_queries):
            at = i + num_keys - num_queries
            keys = [
                j
                for j in range(at + 1)
                if (window is None or at - j < window)
                and (document_ids is None or document_ids[b, j] == document_ids[b, at])
            ]
            for h in range(num_heads):
                g = h // (num_heads // groups)
                probs = torch.softmax(scale * (k[b, keys, g] @ q[b, i, h]), 0)
                out.append(probs @ v[b, keys, g])
    return torch.stack(out).view(q.shape) if out else q * 0


def qkv(batch, num_queries, num_heads, head_dim, device, num_keys=None, groups=None):
    keys = (batch, num_keys or num_queries, groups or num_heads, head_dim)
    return (
        randn(batch, num_queries, num_heads, head_dim, seed=1, device=device),
        randn(*keys, seed=2, device=device),
        randn(*keys, seed=3, device=device),
    )


def documents(batch, seq_len, device):
    """Documents of 1 to 9 tokens, other borders in each row."""
    generator = torch.Generator().manual_seed(4)
    starts = torch.rand(batch, seq_len, generator=generator) < 0.25
    return starts.cumsum(-1).int().to(device)


def check(attend, tensors, **options):
    exact_in, ours_in = leaves(*tensors, dtype=torch.float64), leaves(*tensors)
    exact, ours = oracle(*exact_in, **options), attend(*ours_in, **options)
    assert_equals(ours, exact, "output")
    grad = randn(*ours.shape, seed=5, device=ours.device)
    for name, actual, expected in zip(
        "qkv", gradients(ours, grad, *ours_in), gradients(exact, grad, *exact_in), strict=True
    ):
        # Of a single visible key the gradient of q is 0.
        assert_equals(actual, expected, name, least=1.0)


def cases(quick, *lists):
    """All combinations, of which those that are not `quick` are slow."""
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.slow)
        for case in product(*lists)
    ]


# Every window with and without documents, and every way to share heads.
QUICK = [
    *product([(4, 2)], [None, 1, 5, 100], [False, True]),
    *(((2, 2), None, True), ((2, 2), 5, False), ((3, 1), 5, True), ((3, 1), None, False)),
]


@pytest.mark.parametrize(
    ("heads", "window", "with_documents"),
    cases(QUICK, [(2, 2), (4, 2), (3, 1)], [None, 1, 5, 100], [False, True]),
)
def test_attention_and_its_gradients_equal_float64(device, attend, heads, window, with_documents):
    tensors = qkv(2, 19, heads[0], 10, device, groups=heads[1])
    document_ids = documents(2, 19, device) if with_documents else None
    check(attend, tensors, window=window, document_ids=document_ids)


@pytest.mark.parametrize("num_queries", [1, 18])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("with_documents", [False, True])
def test_last_query_meets_last_key_of_a_cache(device, attend, num_queries, window, with_documents):
    tensors = qkv(2, num_queries, 2, 6, device, num_keys=19, groups=1)
    document_ids = documents(2, 19, device) if with_documents else None
    check(attend, tensors, window=window, document_ids=document_ids)


@pytest.mark.parametrize("attend", ["short path", "flash path"], indirect=True)
@pytest.mark.parametrize("num_queries", [1, 63, 127, 128, 129, 300])
def test_blocks_of_queries_equal_sdpa_in_float64(device, attend, num_queries):
    tensors = qkv(2, num_queries, 4, 9, device, groups=2)
    exact_in, ours_in = leaves(*tensors, dtype=torch.float64), leaves(*tensors)
    document_ids = documents(2, num_queries, device)
    together = document_ids.unsqueeze(-1) == document_ids.unsqueeze(1)
    for mask in (None, together.tril()):
        q, k, v = (t.transpose(1, 2) for t in exact_in)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        visible = {"is_causal": True} if mask is None else {"attn_mask": mask.unsqueeze(1)}
        exact = F.scaled_dot_product_attention(q, k, v, **visible).transpose(1, 2)
        ours = attend(*ours_in, document_ids=None if mask is None else document_ids)
        assert_equals(ours, exact, "output")
        grad = randn(*ours.shape, seed=5, device=device)
        for name, actual, expected in zip(
            "qkv", gradients(ours, grad, *ours_in), gradients(exact, grad, *exact_in), strict=True
        ):
            assert_equals(actual, expected, name, least=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("attend", ["short path", "flash path"], indirect=True)
@pytest.mark.parametrize("num_queries", [1000, 1025, 1500])
def test_long_sequences_equal_sdpa_in_float64(device, attend, num_queries):
    tensors = qkv(1, num_queries, 2, 16, device)
    exact_in, ours_in = leaves(*tensors, dtype=torch.float64), leaves(*tensors)
    q, k, v = (t.transpose(1, 2) for t in exact_in)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    ours = attend(*ours_in)
    assert_equals(ours, exact, "output")
    grad = randn(*ours.shape, seed=5, device=device)
    for name, actual, expected in zip(
        "qkv", gradients(ours, grad, *ours_in), gradients(exact, grad, *exact_in), strict=True
    ):
        # Of a single visible key the gradient of q is 0.
        assert_equals(actual, expected, name, least=1.0)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.01, 0.7, None])
def test_scale_multiplies_the_scores(device, attend, scale):
    check(attend, qkv(1, 9, 2, 4, device), scale=scale)


def test_empty_batches_and_sequences(device, attend):
    for shape in ((0, 5), (2, 0)):
        tensors = leaves(*qkv(*shape, 2, 4, device))
        out = attend(*tensors)
        assert out.shape == (*shape, 2, 4)
        out.sum().backward()


@pytest.mark.parametrize("attend", ["short path", "flash path"], indirect=True)
def test_gradcheck(attend):
    tensors = leaves(*qkv(1, 4, 4, 2, "cpu", num_keys=6, groups=2), dtype=torch.float64)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda *t: attend(*t, document_ids=document_ids, window=3), tensors
    )


@pytest.mark.parametrize("attend", ["short path", "triton"], indirect=True)
def test_a_second_derivative_raises(device, attend):
    tensors = leaves(*qkv(1, 5, 2, 4, device))
    out = attend(*tensors).square().sum()
    with pytest.raises(RuntimeError, match=r"differentiated again|no autograd formula"):
        torch.autograd.grad(out, tensors, create_graph=True)[0].square().sum().backward()


def test_tokens_of_other_documents_change_no_bit(device, attend):
    q, k, v = qkv(1, 32, 2, 8, device)
    document_ids = torch.tensor([[0] * 10 + [1] * 12 + [2] * 10], device=device)
    before = attend(q, k, v, document_ids=document_ids)
    for t in (q, k, v):
        t[:, :10] += 1
        t[:, 22:] -= 3
    after = attend(q, k, v, document_ids=document_ids)
    assert torch.equal(before[:, 10:22], after[:, 10:22])
    assert relative_error(after[:, 22:], before[:, 22:]) > 1e-2
    # Each document alone is the same as packed.
    alone = attend(q[:, 10:22], k[:, 10:22], v[:, 10:22])
    assert_equals(after[:, 10:22], alone)


def test_window_of_one_is_the_value_itself(device, attend):
    q, k, v = qkv(2, 17, 2, 4, device)
    assert_equals(attend(q, k, v, window=1), v)


def test_large_scores_do_not_overflow(device, attend):
    q, k, v = qkv(1, 17, 2, 4, device)
    ours = leaves(q * 100, k * 100, v)
    out = attend(*ours)
    # Scores of 10^4 have an absolute error of 10^-3 in float32.
    assert relative_error(out, oracle(*[t.double() for t in ours])) < 1e-3
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), ours))


@pytest.mark.parametrize("num_queries", [64, 200])
def test_bfloat16_by_autocast_is_as_exact_as_eager(device, attend, num_queries):
    tensors = qkv(1, num_queries, 4, 32, device, groups=2)
    ours_in, eager_in = leaves(*tensors), leaves(*tensors)
    exact_in = leaves(*tensors, dtype=torch.float64)

    def eager(q, k, v):
        k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        scores = torch.einsum("bihp,bjhp->bhij", q, k) * 32**-0.5
        hidden = torch.ones(num_queries, num_queries, dtype=torch.bool, device=device).triu(1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhp->bihp", probs, v)

    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, theirs = attend(*ours_in), eager(*eager_in)
    exact = eager(*exact_in)
    assert ours.dtype == torch.bfloat16
    assert_bfloat16(ours, theirs, exact, "output")
    grad = randn(*ours.shape, seed=5, device=device).bfloat16()
    for name, *triple in zip(
        "qkv",
        gradients(ours, grad, *ours_in),
        gradients(theirs, grad, *eager_in),
        gradients(exact, grad, *exact_in),
        strict=True,
    ):
        assert_bfloat16(*triple, name)


@pytest.mark.parametrize(("batch", "groups"), cases([(1, 4), (2, 1), (1, 2)], [1, 2], [1, 2, 4]))
def test_noncontiguous_inputs_and_expanded_gradient(device, attend, batch, groups):
    tensors = qkv(batch, 33, 4, 6, device, groups=groups)
    strided = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in tensors]
    ours_in = [t.requires_grad_() for t in strided]
    exact_in = leaves(*tensors, dtype=torch.float64)
    out, exact = attend(*ours_in, window=7), oracle(*exact_in, window=7)
    assert_equals(out, exact)
    once = torch.autograd.grad(out.sum(), ours_in, retain_graph=True)
    again = torch.autograd.grad(out.sum(), ours_in)
    for a, b, expected in zip(once, again, torch.autograd.grad(exact.sum(), exact_in), strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, expected) < 1e-4


@pytest.mark.parametrize("attend", ["short path", "flash path"], indirect=True)
def test_equal_calls_give_equal_bits(device, attend):
    results = []
    for _ in range(3):
        tensors = leaves(*qkv(2, 130, 4, 8, device, groups=2))
        out = attend(*tensors, window=50)
        results.append((out, *gradients(out, randn(*out.shape, seed=5, device=device), *tensors)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_wrong_inputs_are_named():
    q, k, v = qkv(2, 5, 4, 6, "cpu")
    cases = [
        ((q[0], k, v), {}, "q has shape (5, 4, 6), needs (any, any, any, any)"),
        ((q, k[:1], v), {}, "k has shape (1, 5, 4, 6), needs (2, any, any, 6)"),
        ((q, k, v[:, :4]), {}, "v has shape (2, 4, 4, 6), needs (2, 5, 4, 6)"),
        (
            (q, k[:, :, :3], v[:, :, :3]),
            {},
            "q has 4 heads, must be a multiple of those of k (3)",
        ),
        ((q, k[:, :, :0], v[:, :, :0]), {}, "k has 0 heads of size 6, needs one at least"),
        ((q, k[:, :4], v[:, :4]), {}, "q has 5 positions, must have at most those of k (4)"),
        ((q, k, v), {"window": 0}, "window (0) must be an integer of at least 1, or None"),
        ((q, k, v), {"window": 2.5}, "window (2.5) must be an integer of at least 1, or None"),
        (
            (q, k, v),
            {"document_ids": torch.zeros(2, 4)},
            "document_ids has shape (2, 4), needs (2, 5)",
        ),
        (
            (q, k, v),
            {"document_ids": torch.zeros(2, 5)},
            "document_ids is torch.float32, needs integers",
        ),
        (
            (q, k, v.to("meta")),
            {},
            "tensors on different devices: q on cpu, k on cpu, v on meta",
        ),
        (
            [torch.zeros(1, 2, 1, 264)] * 3,
            {"backend": "triton"},
            "backend 'triton' takes heads of 256 at most, got 264; use 'auto' or 'torch'",
        ),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError) as caught:
            fused_attention(*arguments, **options)
        assert str(caught.value) == f"fused_attention: {message}"
