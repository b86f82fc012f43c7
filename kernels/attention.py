"""Causal attention with grouped queries, a window and packed documents.

    scores[i, j] = scale * q_i . k_j,   out_i = sum_j softmax_j(scores[i, :])_j v_j

over the keys j that query i may see: not after it, of its own document, and at most `window` - 1
before it. H query heads share G key-value heads: head h reads key-value head h // (H/G). With fewer
queries than keys (a KV cache), the last query is aligned with the last key.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    check_floating,
    check_integers,
    check_same_device,
    check_shape,
    compute_dtype,
    first_derivative_only,
    no_autocast,
    resolve_backend,
)

# Rows of queries per block of the short-sequence path; keys after a block are never computed.
BLOCK_QUERIES = 64
# Up to here the plain path beats the flash kernel on a CPU (1.1-1.4 times in float32, 1.8-2.8 in
# bfloat16, forward and backward); beyond, the probabilities it saves (H S^2 / 2 a row) grow large.
SHORT_KEYS = 1024
# The widest head of the Triton kernels.
TRITON_HEAD_DIM = 256


def key_mask(
    num_queries: int,
    num_keys: int,
    document_ids: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """True where a query may see a key: (1 or B, num_queries, num_keys)."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(-1)
    key = torch.arange(num_keys, device=device)
    visible = (key <= query).unsqueeze(0)  # (1, S, S_k)
    if window is not None:
        visible = visible & (key > query - window)
    if document_ids is not None:
        own = document_ids[:, num_keys - num_queries :].unsqueeze(-1) == document_ids.unsqueeze(1)
        visible = visible & own  # (B, S, S_k)
    return visible


class _ShortAttention(torch.autograd.Function):
    """Plain matmul, softmax, matmul by blocks of queries, keeping the probabilities.

    On a CPU and at short sequences this beats the flash kernel, whose backward pass is slow there.
    Scores are rounded to the matmuls' dtype before the softmax, as PyTorch's own plain path does;
    the error against float64 is held to the same table as every kernel's.
    q (B, H, S, P), k and v (B, G, S_k, P), visible (1 or B, S, S_k).
    """

    @staticmethod
    def forward(ctx, q, k, v, visible, scale):
        batch, num_heads, num_queries, head_dim = q.shape
        num_kv_heads, num_keys = k.shape[1:3]
        shared = num_heads // num_kv_heads
        # Heads that share keys are stacked along the queries: (B*G, shared, S, P).
        q = q.reshape(batch * num_kv_heads, shared, num_queries, head_dim)
        k = k.reshape(batch * num_kv_heads, num_keys, head_dim)
        v = v.reshape(batch * num_kv_heads, num_keys, head_dim)
        lag = num_keys - num_queries
        masked = ~visible
        out = torch.empty_like(q)
        saved = []
        for first in range(0, num_queries, BLOCK_QUERIES):
            end = min(first + BLOCK_QUERIES, num_queries)
            seen = end + lag
            q_block = q[:, :, first:end].flatten(1, 2)  # (B*G, shared * block, P)
            scores = torch.bmm(q_block, k[:, :seen].transpose(1, 2)).mul_(scale)
            by_head = scores.view(batch, num_heads, end - first, seen)
            by_head.masked_fill_(masked[:, first:end, :seen].unsqueeze(1), -torch.inf)
            probs = torch.softmax(scores, -1)  # (B*G, shared * block, seen)
            out[:, :, first:end] = torch.bmm(probs, v[:, :seen]).view(
                batch * num_kv_heads, shared, end - first, head_dim
            )
            saved.append(probs)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.scale, ctx.shape = scale, (batch, num_heads, num_kv_heads)
        return out.view(batch, num_heads, num_queries, head_dim)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_out):
        q, k, v, *saved = ctx.saved_tensors
        batch, num_heads, num_kv_heads = ctx.shape
        num_queries, head_dim = q.shape[2:]
        grad_out = grad_out.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, probs in zip(range(0, num_queries, BLOCK_QUERIES), saved, strict=True):
            end, seen = min(first + BLOCK_QUERIES, num_queries), probs.shape[-1]
            g = grad_out[:, :, first:end].flatten(1, 2)  # (B*G, shared * block, P)
            q_block = q[:, :, first:end].flatten(1, 2)
            # Not baddbmm_: into a slice it falls back to one small matmul a head.
            grad_v[:, :seen] += torch.bmm(probs.transpose(1, 2), g)
            grad_probs = torch.bmm(g, v[:, :seen].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_scores *= ctx.scale
            grad_q[:, :, first:end] = torch.bmm(grad_scores, k[:, :seen]).view(
                q[:, :, first:end].shape
            )
            grad_k[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), q_block)
        shape_kv = (batch, num_kv_heads, k.shape[1], head_dim)
        return (
            grad_q.view(batch, num_heads, num_queries, head_dim),
            grad_k.view(shape_kv),
            grad_v.view(shape_kv),
            None,
            None,
        )


def _prefers_short_path(q: Tensor, num_keys: int) -> bool:
    return q.device.type == "cpu" and num_keys <= SHORT_KEYS


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Causal attention that does not cross documents.

    Args:
        q: (B, S, H, P). k, v: (B, S_k, G, P) with G dividing H and S_k >= S; the last query is
            aligned with the last key.
        document_ids: (B, S_k) int, equal within a document; None: one document a row.
        window: keys that a query sees, itself included; None: all before it.
        scale: of the scores, by default 1/sqrt(P).
        deterministic: equal bits from equal calls of the Triton kernels. False lets their backward
            pass add dQ by atomics, with 5 matmuls instead of 7. The PyTorch body does not look at
            it: deterministic on a CPU, on a GPU as `scaled_dot_product_attention` is, whose
            backward pass may use atomics unless `torch.use_deterministic_algorithms` is on.
        backend: see `kernels.launch`.
    Returns:
        (B, S, H, P) in the dtype of the matmuls (autocast's, else that of `q`).
    Raises:
        ValueError: if shapes, dtypes or devices do not fit, `window` is no positive integer, or
            `triton` is asked for with P above 256.
    Source: Vaswani et al., arXiv 1706.03762; grouped queries: Ainslie et al., arXiv 2305.13245.
    """
    implementation = _check(q, k, v, document_ids, window, backend)
    num_queries, num_keys, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    dtype = compute_dtype(q)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if scale <= 0:
        # Flash kernels, PyTorch's too, take the highest score and hide keys before they scale.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if implementation == "triton":
        from kernels.attention_triton import attend

        return attend(q, k, v, document_ids, window, scale, deterministic)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, S, P)
    plain_causal = document_ids is None and window is None and num_keys == num_queries
    with no_autocast(q):
        if _prefers_short_path(q, num_keys):
            visible = key_mask(num_queries, num_keys, document_ids, window, q.device)
            out = _ShortAttention.apply(q, k, v, visible, scale)
        elif plain_causal:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            mask = key_mask(num_queries, num_keys, document_ids, window, q.device).unsqueeze(1)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
            )
    return out.transpose(1, 2)  # (B, S, H, P)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    window: int | None,
    backend: str,
) -> str:
    """Which implementation runs; ValueError if none can."""
    op = "fused_attention"
    check_shape(op, "q", q, (None, None, None, None))
    batch, num_queries, num_heads, head_dim = q.shape
    check_shape(op, "k", k, (batch, None, None, head_dim))
    check_shape(op, "v", v, tuple(k.shape))
    check_floating(op, q=q, k=k, v=v)
    num_keys, num_kv_heads = k.shape[1:3]
    if not num_kv_heads or not head_dim:
        raise ValueError(f"{op}: k has {num_kv_heads} heads of size {head_dim}, needs one at least")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{op}: q has {num_heads} heads, must be a multiple of those of k ({num_kv_heads})"
        )
    if num_keys < num_queries:
        raise ValueError(
            f"{op}: q has {num_queries} positions, must have at most those of k ({num_keys})"
        )
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ValueError(f"{op}: window ({window}) must be an integer of at least 1, or None")
    if document_ids is not None:
        check_shape(op, "document_ids", document_ids, (batch, num_keys))
        check_integers(op, document_ids=document_ids)
    check_same_device(op, q=q, k=k, v=v, document_ids=document_ids)
    if backend == "triton" and head_dim > TRITON_HEAD_DIM:
        raise ValueError(
            f"{op}: backend 'triton' takes heads of {TRITON_HEAD_DIM} at most, got {head_dim}; "
            "use 'auto' or 'torch'"
        )
    return resolve_backend(op, backend, q, has_triton=head_dim <= TRITON_HEAD_DIM)


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Against `scaled_dot_product_attention`, with its flash kernel where that can do it, and on a
    GPU FlexAttention: packed documents and plain causal; 16 thousand tokens there, queries in
    groups."""
    shapes = [(16, 256, 8, 8, 32), (8, 512, 8, 8, 64), (4, 1024, 8, 8, 64)]
    if device == "cuda":
        lengths = (512, 1024, 2048, 4096, 8192, 16384)
        shapes = [(16384 // n, n, 2048 // p, 2048 // p, p) for p in (64, 128) for n in lengths]
        shapes += [(4, 4096, 16, 4, 128), (1, 16384, 16, 4, 128)]
    builders = []
    for shape in shapes:
        for kind in ("causal", "packed"):
            name = f"{kind} {'B{} S{} H{} G{} P{}'.format(*shape)}"
            build = partial(_benchmark_case, name, kind, shape, dtype, device)
            builders.append(CaseBuilder(name, build))
    return builders


def _benchmark_case(
    name: str, kind: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> Case:
    batch, seq_len, num_heads, num_kv_heads, head_dim = shape
    torch.manual_seed(0)
    kv_shape = batch, seq_len, num_kv_heads, head_dim
    q = leaf(batch, seq_len, num_heads, head_dim, dtype=dtype, device=device)
    k, v = (leaf(*kv_shape, dtype=dtype, device=device) for _ in range(2))
    documents = None
    if kind == "packed":
        documents = (torch.rand(batch, seq_len, device=device) < 4 / seq_len).cumsum(1)

    def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if documents is not None:
            mask = key_mask(seq_len, seq_len, documents, None, q.device).unsqueeze(1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] < q.shape[1]
        ).transpose(1, 2)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return library(q, k, v)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Each query's own keys: with shared ones PyTorch would hold all scores in float32.
        shared = num_heads // num_kv_heads
        return library(q, *(x.repeat_interleave(shared, 2) for x in (k, v)))

    # On a GPU it takes neither a mask nor float32.
    has_flash = documents is None and (device == "cpu" or dtype != torch.float32)
    rivals = {
        "scaled_dot_product_attention": Contestant(flash if has_flash else library, (q, k, v))
    }
    if device == "cuda":
        rivals["FlexAttention"] = Contestant(_flex_attention(documents, seq_len), (q, k, v))

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str, deterministic: bool = True) -> Tensor:
        return fused_attention(
            q, k, v, document_ids=documents, deterministic=deterministic, backend=backend
        )

    if device == "cuda":
        fast = partial(ours, backend="triton", deterministic=False)
        rivals["atomic dQ (triton)"] = Contestant(fast, (q, k, v))
    # Causal: half of the pairs. With documents fewer, so that the rate is a lower bound's.
    flops = 2 * batch * num_heads * seq_len**2 * head_dim if kind == "causal" else 0.0
    return Case(
        name=name,
        ours=ours,
        leaves=(q, k, v),
        reference=reference,
        rivals=rivals,
        grad=torch.randn(*q.shape, device=device).to(dtype),
        tokens=batch * seq_len,
        flops=flops,
        # As in FlashAttention's own counts: five matmuls to two.
        backward_flops=2.5 * flops,
    )


def _flex_attention(documents: Tensor | None, seq_len: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, query, key):
        causal = query >= key
        return causal if documents is None else causal & (documents[b, query] == documents[b, key])

    batch = None if documents is None else documents.shape[0]
    mask = create_block_mask(visible, batch, None, seq_len, seq_len)
    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run
