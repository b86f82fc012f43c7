"""Triton kernels of `kernels.attention`, forward and backward.

With s = scale * log2(e) * q k^T in base 2 and L_i = log2(sum_j 2^s_ij), the forward pass keeps the
output O and L (B, H, S); the backward pass recomputes P = 2^(s - L) block by block:

    delta_i = sum_p dO_ip O_ip                      _delta_kernel
    dV = P^T dO,   dP = dO V^T,   dS = P (dP - delta)
    dK = scale dS^T Q                               _grad_keys_kernel, a program per key block
    dQ = scale dS K                                 _grad_queries_kernel, a program per query block

A program of `_grad_keys_kernel` goes through all query heads of its key-value head, so no two
programs add to one gradient. With `deterministic=False` it also adds its share of dQ in float32 by
atomics, and the third kernel and two of its matmuls are not needed.

Which blocks of keys a block of queries meets (first, full_first, full_end, end): outside of the
causal range, the window and the document, blocks are skipped; between full_first and full_end every
query sees every key and no mask is formed. The same arithmetic runs with and without a mask, so the
bits of a row depend on neither.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import ARCHITECTURES, AotCase
from kernels.launch import MATMUL_DTYPES
from kernels.tiles import Tile, choose_tile, load_tiles

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# Elements from row to row; tiles have at most 256 rows.
MAX_ROW_STRIDE = 2**23
DELTA_TILE = Tile({"BLOCK_M": 64})
# Bytes of keys and values that neighbouring programs share: they stay in the second-level cache.
CACHE_BYTES = 32 * 2**20
# Sizes change from call to call: their values are no reason to compile anew.
_SIZES = ("num_queries", "num_keys", "window", "section")


@triton.jit
def _head_and_block(num_heads, num_blocks, section):
    """This program's head, and its rank among the blocks of that head, heaviest first.

    `section` heads at a time share the cache; within a section all first blocks come first.
    """
    program = tl.program_id(0)
    first = program // (section * num_blocks) * section
    heads = tl.minimum(section, num_heads - first)
    within = program - first * num_blocks
    return first + within % heads, within // heads


@triton.jit
def _first(base, row, stride):
    """Address of a row, formed in 64 bits."""
    return base + row.to(tl.int64) * stride


@triton.jit
def _offsets(stride, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Elements from the first of a tile (ROWS, BLOCK_P): in 32 bits, to save registers."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK_P)[None, :]


@triton.jit
def _load(at, inside, HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr):
    """A tile (rows, BLOCK_P), 0 beyond HEAD_DIM and, with ROWS, where a row is not `inside`."""
    column = tl.arange(0, BLOCK_P)[None, :] < HEAD_DIM
    if ROWS:
        if HEAD_DIM < BLOCK_P:
            tile = tl.load(at, mask=inside[:, None] & column, other=0.0)
        else:
            tile = tl.load(at, mask=inside[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_P:
        tile = tl.load(at, mask=column, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _store(at, tile, inside, HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr):
    mask = inside[:, None] & (tl.arange(0, BLOCK_P)[None, :] < HEAD_DIM)
    tl.store(at, tile.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _key_blocks(
    first_query,
    last_query,
    start_ptr,
    num_keys,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Blocks of keys that queries first_query .. last_query (positions among the keys) meet.

    Keys after `end` come after all queries; those before `full_end` after none.
    """
    end = tl.cdiv(last_query + 1, BLOCK_N)
    full_end = (first_query + 1) // BLOCK_N
    first = full_end * 0
    full_first = first
    if HAS_WINDOW:
        first = tl.maximum(first_query - window + 1, 0) // BLOCK_N
        full_first = tl.cdiv(tl.maximum(first_query + BLOCK_M - window, 0), BLOCK_N)
    if HAS_DOCUMENTS:
        # Ids that do not ascend have -1 here: nothing is skipped, and every block masked.
        start = tl.load(start_ptr + first_query)
        first = tl.maximum(first, tl.maximum(start, 0) // BLOCK_N)
        start = tl.load(start_ptr + last_query)
        start = tl.where(start < 0, num_keys, start)
        full_first = tl.maximum(full_first, tl.cdiv(start, BLOCK_N))
    full_end = tl.maximum(full_end, first)
    full_first = tl.minimum(tl.maximum(full_first, first), full_end)
    return first, full_first, full_end, end


@triton.jit
def _query_blocks(
    first_key,
    end_ptr,
    num_queries,
    num_keys,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Blocks of queries that keys first_key .. first_key + BLOCK_N - 1 meet."""
    lag = num_keys - num_queries
    last_key = tl.minimum(first_key + BLOCK_N, num_keys) - 1
    first = tl.maximum(first_key - lag, 0) // BLOCK_M
    full_first = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - lag, 0), BLOCK_M)
    end = tl.cdiv(num_queries, BLOCK_M)
    full_end = num_queries // BLOCK_M
    if HAS_WINDOW:
        end = tl.minimum(end, tl.cdiv(tl.maximum(last_key + window - lag, 0), BLOCK_M))
        full_end = tl.minimum(full_end, tl.maximum(first_key + window - lag, 0) // BLOCK_M)
    if HAS_DOCUMENTS:
        limit = tl.load(end_ptr + last_key)
        limit = tl.where(limit < 0, num_keys, limit)
        end = tl.minimum(end, tl.cdiv(tl.maximum(limit - lag, 0), BLOCK_M))
        limit = tl.load(end_ptr + first_key)
        full_end = tl.minimum(full_end, tl.maximum(limit - lag, 0) // BLOCK_M)
    end = tl.maximum(end, first)
    full_first = tl.minimum(full_first, end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_first)
    return first, full_first, full_end, end


@triton.jit
def _visible(
    query,
    key,
    query_document,
    key_document,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Whether each query sees each key; all are positions, broadcast against each other."""
    visible = key <= query
    if HAS_WINDOW:
        # 0 <= query - key < window in one comparison: without a sign, later keys are far away.
        visible = (query - key).to(tl.uint32) < window.to(tl.uint32)
    if HAS_DOCUMENTS:
        visible = visible & (key_document == query_document)
    return visible


@triton.jit
def _attend(
    acc,
    total,
    highest,
    q,
    query,
    query_document,
    k_ptr,
    v_ptr,
    ids_ptr,
    k_row,
    v_row,
    first,
    end,
    num_keys,
    window,
    scale,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add key blocks first .. end - 1 to the weighted sum, rescaled as the highest score grows."""
    key = first * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr = _first(k_ptr, first * BLOCK_N, k_row)
    v_ptr = _first(v_ptr, first * BLOCK_N, v_row)
    k_offsets = _offsets(k_row, BLOCK_N, BLOCK_P)
    v_offsets = _offsets(v_row, BLOCK_N, BLOCK_P)
    for _ in range(first, end):
        k = _load(k_ptr + k_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            key_document = key
            if HAS_DOCUMENTS:
                key_document = tl.load(ids_ptr + key, mask=key < num_keys, other=0)
            visible = _visible(
                query[:, None],
                key[None, :],
                query_document[:, None],
                key_document[None, :],
                window,
                HAS_WINDOW,
                HAS_DOCUMENTS,
            )
            top = tl.max(tl.where(visible, scores * scale, -float("inf")), 1)
            new = tl.maximum(highest, top)
            # A query that has seen no key yet: any shift keeps its sums 0.
            shift = tl.where(new == -float("inf"), 0.0, new)
            exponent = tl.where(visible, scores * scale - shift[:, None], -float("inf"))
        else:
            new = tl.maximum(highest, tl.max(scores, 1) * scale)
            shift = new
            exponent = scores * scale - shift[:, None]
        probs = tl.exp2(exponent)
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(probs, 1)
        acc = acc * shrink[:, None]
        v = _load(v_ptr + v_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")
        highest = new
        key += BLOCK_N
        k_ptr += BLOCK_N * k_row
        v_ptr += BLOCK_N * v_row
    return acc, total, highest


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    ids_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    num_sequences,
    num_queries,
    num_keys,
    num_heads,
    shared,
    window,
    section,
    scale,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    index, rank = _head_and_block(num_sequences * num_heads, num_blocks, section)
    sequence = (index // num_heads).to(tl.int64)
    head = (index % num_heads).to(tl.int64)
    first_row = (num_blocks - 1 - rank) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    lag = num_keys - num_queries
    first_query = lag + first_row
    last_query = tl.minimum(first_query + BLOCK_M, num_keys) - 1
    q_ptr = _first(q_ptr + sequence * q_batch + head * q_head, first_row, q_row)
    q = _load(q_ptr + _offsets(q_row, BLOCK_M, BLOCK_P), row < num_queries, HEAD_DIM, BLOCK_P, True)
    k_ptr += sequence * k_batch + head // shared * k_head
    v_ptr += sequence * v_batch + head // shared * v_head
    query = lag + row
    query_document = query
    if HAS_DOCUMENTS:
        ids_ptr += sequence * num_keys
        starts_ptr += sequence * num_keys
        query_document = tl.load(ids_ptr + query, mask=row < num_queries, other=0)
    borders = _key_blocks(
        first_query,
        last_query,
        starts_ptr,
        num_keys,
        window,
        BLOCK_M,
        BLOCK_N,
        HAS_WINDOW,
        HAS_DOCUMENTS,
    )
    acc = tl.zeros([BLOCK_M, BLOCK_P], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    highest = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    # Without a window or documents, nothing is hidden at the far end.
    FIRST_PART: tl.constexpr = 0 if HAS_WINDOW or HAS_DOCUMENTS else 1
    for part in tl.static_range(FIRST_PART, 3):
        acc, total, highest = _attend(
            acc,
            total,
            highest,
            q,
            query,
            query_document,
            k_ptr,
            v_ptr,
            ids_ptr,
            k_row,
            v_row,
            borders[part],
            borders[part + 1],
            num_keys,
            window,
            scale,
            part != 1,
            HAS_WINDOW,
            HAS_DOCUMENTS,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_P,
        )
    # Rows beyond the last query may have seen nothing; they are not stored.
    total = tl.where(total == 0.0, 1.0, total)
    out_row = num_heads * HEAD_DIM
    out_ptr += sequence * num_queries * out_row + head * HEAD_DIM
    out_at = _first(out_ptr, first_row, out_row) + _offsets(out_row, BLOCK_M, BLOCK_P)
    _store(out_at, acc / total[:, None], row < num_queries, HEAD_DIM, BLOCK_P)
    lse_ptr += (sequence * num_heads + head) * num_queries
    tl.store(lse_ptr + row, highest + tl.log2(total), mask=row < num_queries)


@triton.jit
def _delta_kernel(
    out_ptr,
    grad_ptr,
    delta_ptr,
    grad_batch,
    grad_row,
    grad_head,
    num_queries,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    index = tl.program_id(0) // num_blocks
    first_row = tl.program_id(0) % num_blocks * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    sequence = (index // num_heads).to(tl.int64)
    head = (index % num_heads).to(tl.int64)
    out_row = num_heads * HEAD_DIM
    out_ptr += sequence * num_queries * out_row + head * HEAD_DIM
    grad_ptr += sequence * grad_batch + head * grad_head
    inside = row < num_queries
    out_at = _first(out_ptr, first_row, out_row) + _offsets(out_row, BLOCK_M, BLOCK_P)
    grad_at = _first(grad_ptr, first_row, grad_row) + _offsets(grad_row, BLOCK_M, BLOCK_P)
    out = _load(out_at, inside, HEAD_DIM, BLOCK_P, True).to(tl.float32)
    grad = _load(grad_at, inside, HEAD_DIM, BLOCK_P, True).to(tl.float32)
    delta_ptr += (sequence * num_heads + head) * num_queries
    tl.store(delta_ptr + row, tl.sum(out * grad, 1), mask=inside)


@triton.jit
def _add_key_gradients(
    grad_k,
    grad_v,
    k,
    v,
    key,
    key_document,
    q_ptr,
    grad_ptr,
    grad_q_ptr,
    ids_ptr,
    lse_ptr,
    delta_ptr,
    q_row,
    grad_row,
    grad_q_row,
    first,
    end,
    num_queries,
    num_keys,
    window,
    scale,
    MASKED: tl.constexpr,
    ATOMIC: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add what query blocks first .. end - 1 of one head contribute; all matrices transposed."""
    row = first * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = _first(q_ptr, first * BLOCK_M, q_row)
    grad_ptr = _first(grad_ptr, first * BLOCK_M, grad_row)
    q_offsets = _offsets(q_row, BLOCK_M, BLOCK_P)
    grad_offsets = _offsets(grad_row, BLOCK_M, BLOCK_P)
    if ATOMIC:
        grad_q_ptr = _first(grad_q_ptr, first * BLOCK_M, grad_q_row)
        grad_q_offsets = _offsets(grad_q_row, BLOCK_M, BLOCK_P)
    for _ in range(first, end):
        inside = row < num_queries
        q = _load(q_ptr + q_offsets, inside, HEAD_DIM, BLOCK_P, MASKED)
        if MASKED:
            # Rows beyond the last query get probability 0.
            lse = tl.load(lse_ptr + row, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        else:
            lse = tl.load(lse_ptr + row)
            delta = tl.load(delta_ptr + row)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        exponent = scores * scale - lse[None, :]
        if MASKED:
            query = num_keys - num_queries + row
            query_document = query
            if HAS_DOCUMENTS:
                query_document = tl.load(ids_ptr + query, mask=inside, other=0)
            visible = _visible(
                query[None, :],
                key[:, None],
                query_document[None, :],
                key_document[:, None],
                window,
                HAS_WINDOW,
                HAS_DOCUMENTS,
            )
            exponent = tl.where(visible, exponent, -float("inf"))
        probs = tl.exp2(exponent)
        grad = _load(grad_ptr + grad_offsets, inside, HEAD_DIM, BLOCK_P, MASKED)
        grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_probs = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_scores = (probs * (grad_probs - delta[None, :])).to(q.dtype)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
        if ATOMIC:
            share = tl.dot(tl.trans(grad_scores), k, input_precision="ieee")
            at = grad_q_ptr + grad_q_offsets
            mask = inside[:, None] & (tl.arange(0, BLOCK_P)[None, :] < HEAD_DIM)
            tl.atomic_add(at, share * (scale * LN_2), mask=mask, sem="relaxed")
            grad_q_ptr += BLOCK_M * grad_q_row
        row += BLOCK_M
        q_ptr += BLOCK_M * q_row
        grad_ptr += BLOCK_M * grad_row
    return grad_k, grad_v


@triton.jit(do_not_specialize=_SIZES)
def _grad_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    ids_ptr,
    ends_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    grad_batch,
    grad_row,
    grad_head,
    num_sequences,
    num_queries,
    num_keys,
    num_heads,
    shared,
    window,
    section,
    scale,
    ATOMIC: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    groups = num_heads // shared
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    index, rank = _head_and_block(num_sequences * groups, num_blocks, section)
    sequence = (index // groups).to(tl.int64)
    group = (index % groups).to(tl.int64)
    first_key = rank * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    inside = key < num_keys
    k_ptr = _first(k_ptr + sequence * k_batch + group * k_head, first_key, k_row)
    v_ptr = _first(v_ptr + sequence * v_batch + group * v_head, first_key, v_row)
    k_at = k_ptr + _offsets(k_row, BLOCK_N, BLOCK_P)
    v_at = v_ptr + _offsets(v_row, BLOCK_N, BLOCK_P)
    k = _load(k_at, inside, HEAD_DIM, BLOCK_P, True)
    v = _load(v_at, inside, HEAD_DIM, BLOCK_P, True)
    key_document = key
    if HAS_DOCUMENTS:
        ids_ptr += sequence * num_keys
        ends_ptr += sequence * num_keys
        key_document = tl.load(ids_ptr + key, mask=inside, other=0)
    borders = _query_blocks(
        first_key,
        ends_ptr,
        num_queries,
        num_keys,
        window,
        BLOCK_M,
        BLOCK_N,
        HAS_WINDOW,
        HAS_DOCUMENTS,
    )
    grad_k = tl.zeros([BLOCK_N, BLOCK_P], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_P], dtype=tl.float32)
    grad_q_row = num_heads * HEAD_DIM
    # The parts outside, the heads inside: fewer addresses live at a time.
    for part in tl.static_range(3):
        for head in range(group * shared, (group + 1) * shared):
            statistics = (sequence * num_heads + head) * num_queries
            grad_k, grad_v = _add_key_gradients(
                grad_k,
                grad_v,
                k,
                v,
                key,
                key_document,
                q_ptr + sequence * q_batch + head * q_head,
                grad_ptr + sequence * grad_batch + head * grad_head,
                grad_q_ptr + sequence * num_queries * grad_q_row + head * HEAD_DIM,
                ids_ptr,
                lse_ptr + statistics,
                delta_ptr + statistics,
                q_row,
                grad_row,
                grad_q_row,
                borders[part],
                borders[part + 1],
                num_queries,
                num_keys,
                window,
                scale,
                part != 1,
                ATOMIC,
                HAS_WINDOW,
                HAS_DOCUMENTS,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_P,
            )
    out_row = groups * HEAD_DIM
    out_base = (sequence * num_keys + first_key) * out_row + group * HEAD_DIM
    out_offsets = _offsets(out_row, BLOCK_N, BLOCK_P)
    # The scale holds log2(e) for exp2; the derivative of the scores does not.
    _store(grad_k_ptr + out_base + out_offsets, grad_k * (scale * LN_2), inside, HEAD_DIM, BLOCK_P)
    _store(grad_v_ptr + out_base + out_offsets, grad_v, inside, HEAD_DIM, BLOCK_P)


@triton.jit
def _add_query_gradients(
    grad_q,
    q,
    grad,
    lse,
    delta,
    query,
    query_document,
    k_ptr,
    v_ptr,
    ids_ptr,
    k_row,
    v_row,
    first,
    end,
    num_keys,
    window,
    scale,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add what key blocks first .. end - 1 contribute."""
    key = first * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr = _first(k_ptr, first * BLOCK_N, k_row)
    v_ptr = _first(v_ptr, first * BLOCK_N, v_row)
    k_offsets = _offsets(k_row, BLOCK_N, BLOCK_P)
    v_offsets = _offsets(v_row, BLOCK_N, BLOCK_P)
    for _ in range(first, end):
        k = _load(k_ptr + k_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        v = _load(v_ptr + v_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        exponent = scores * scale - lse[:, None]
        if MASKED:
            key_document = key
            if HAS_DOCUMENTS:
                key_document = tl.load(ids_ptr + key, mask=key < num_keys, other=0)
            visible = _visible(
                query[:, None],
                key[None, :],
                query_document[:, None],
                key_document[None, :],
                window,
                HAS_WINDOW,
                HAS_DOCUMENTS,
            )
            exponent = tl.where(visible, exponent, -float("inf"))
        probs = tl.exp2(exponent)
        grad_probs = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = (probs * (grad_probs - delta[:, None])).to(k.dtype)
        grad_q = tl.dot(grad_scores, k, grad_q, input_precision="ieee")
        key += BLOCK_N
        k_ptr += BLOCK_N * k_row
        v_ptr += BLOCK_N * v_row
    return grad_q


@triton.jit(do_not_specialize=_SIZES)
def _grad_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    ids_ptr,
    starts_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    grad_batch,
    grad_row,
    grad_head,
    num_sequences,
    num_queries,
    num_keys,
    num_heads,
    shared,
    window,
    section,
    scale,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    index, rank = _head_and_block(num_sequences * num_heads, num_blocks, section)
    sequence = (index // num_heads).to(tl.int64)
    head = (index % num_heads).to(tl.int64)
    first_row = (num_blocks - 1 - rank) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < num_queries
    lag = num_keys - num_queries
    first_query = lag + first_row
    last_query = tl.minimum(first_query + BLOCK_M, num_keys) - 1
    q_ptr = _first(q_ptr + sequence * q_batch + head * q_head, first_row, q_row)
    grad_ptr = _first(grad_ptr + sequence * grad_batch + head * grad_head, first_row, grad_row)
    q_at = q_ptr + _offsets(q_row, BLOCK_M, BLOCK_P)
    grad_at = grad_ptr + _offsets(grad_row, BLOCK_M, BLOCK_P)
    q = _load(q_at, inside, HEAD_DIM, BLOCK_P, True)
    grad = _load(grad_at, inside, HEAD_DIM, BLOCK_P, True)
    statistics = (sequence * num_heads + head) * num_queries
    # Rows beyond the last query get probability 0.
    lse = tl.load(lse_ptr + statistics + row, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + statistics + row, mask=inside, other=0.0)
    k_ptr += sequence * k_batch + head // shared * k_head
    v_ptr += sequence * v_batch + head // shared * v_head
    query = lag + row
    query_document = query
    if HAS_DOCUMENTS:
        ids_ptr += sequence * num_keys
        starts_ptr += sequence * num_keys
        query_document = tl.load(ids_ptr + query, mask=inside, other=0)
    borders = _key_blocks(
        first_query,
        last_query,
        starts_ptr,
        num_keys,
        window,
        BLOCK_M,
        BLOCK_N,
        HAS_WINDOW,
        HAS_DOCUMENTS,
    )
    grad_q = tl.zeros([BLOCK_M, BLOCK_P], dtype=tl.float32)
    FIRST_PART: tl.constexpr = 0 if HAS_WINDOW or HAS_DOCUMENTS else 1
    for part in tl.static_range(FIRST_PART, 3):
        grad_q = _add_query_gradients(
            grad_q,
            q,
            grad,
            lse,
            delta,
            query,
            query_document,
            k_ptr,
            v_ptr,
            ids_ptr,
            k_row,
            v_row,
            borders[part],
            borders[part + 1],
            num_keys,
            window,
            scale,
            part != 1,
            HAS_WINDOW,
            HAS_DOCUMENTS,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_P,
        )
    out_row = num_heads * HEAD_DIM
    grad_q_ptr += sequence * num_queries * out_row + head * HEAD_DIM
    grad_q_at = _first(grad_q_ptr, first_row, out_row) + _offsets(out_row, BLOCK_M, BLOCK_P)
    _store(grad_q_at, grad_q * (scale * LN_2), inside, HEAD_DIM, BLOCK_P)


def document_borders(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each token starts, and where it ends: (B, S_k) int32 each.

    -1 throughout a row whose ids do not ascend: its documents may lie in pieces.
    """
    ascending = (document_ids[:, 1:] >= document_ids[:, :-1]).all(1, keepdim=True)  # (B, 1)
    starts = torch.searchsorted(document_ids, document_ids, out_int32=True)
    ends = torch.searchsorted(document_ids, document_ids, out_int32=True, right=True)
    return torch.where(ascending, starts, -1), torch.where(ascending, ends, -1)


def _tile(kernel: str, x: Tensor) -> Tile:
    head_dim = x.shape[-1]
    # float16 has the size of bfloat16, and so its tiles.
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    tile = choose_tile(f"attention_{kernel}", x.device, dtype, head_dim)
    return _padded(tile, head_dim)


def _padded(tile: Tile, head_dim: int) -> Tile:
    block = max(16, triton.next_power_of_2(head_dim))
    return tile._replace(blocks={**tile.blocks, "BLOCK_P": block})


def _section(x: Tensor, num_keys: int) -> int:
    """Key-value heads whose keys and values fit the cache together."""
    return max(1, CACHE_BYTES // (2 * num_keys * x.shape[-1] * x.element_size()))


def _with_dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Last dimension contiguous, and rows so near that offsets in a tile fit 32 bits."""
    fits = [t.stride(-1) == 1 and t.stride(1) < MAX_ROW_STRIDE for t in tensors]
    return tuple(t if fit else t.contiguous() for t, fit in zip(tensors, fits, strict=True))


def _strides(*tensors: Tensor) -> list[int]:
    """Of the batch, the row and the head of each (B, rows, heads, P)."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def _constants(k: Tensor, ids: Tensor | None, window: int) -> dict[str, int | bool]:
    return {
        "HAS_WINDOW": window < k.shape[1],
        "HAS_DOCUMENTS": ids is not None,
        "HEAD_DIM": k.shape[-1],
    }


@torch.library.custom_op("sparse_moe_lm::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    window: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Output (B, S, H, P), and log2 of each row's sum of 2^score (B, H, S) float32.

    starts, ends: `document_borders(ids)`. window: at least S_k for none. scale: positive.
    """
    batch, num_queries, num_heads, _ = q.shape
    num_keys, groups = k.shape[1:3]
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    if q.numel():
        q, k, v = _with_dense_rows(q, k, v)
        shared = num_heads // groups
        tile = _tile("forward", q)
        grid = (triton.cdiv(num_queries, tile.blocks["BLOCK_M"]) * batch * num_heads,)
        _forward_kernel[grid](
            q,
            k,
            v,
            ids,
            starts,
            out,
            lse,
            *_strides(q, k, v),
            batch,
            num_queries,
            num_keys,
            num_heads,
            shared,
            min(window, num_keys),
            _section(k, num_keys) * shared,
            scale * LOG2_E,
            **_constants(k, ids, window),
            **tile.options(),
        )
    return out, lse


@attention_op.register_fake
def _(q, k, v, ids, starts, ends, window, scale, deterministic):
    batch, num_queries, num_heads, _ = q.shape
    lse = q.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """sum_p dO O of each row: (B, H, S) float32."""
    batch, num_queries, num_heads, head_dim = out.shape
    delta = out.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    tile = _padded(DELTA_TILE, head_dim)
    grid = (triton.cdiv(num_queries, tile.blocks["BLOCK_M"]) * batch * num_heads,)
    strides = _strides(grad_out)
    sizes = num_queries, num_heads
    _delta_kernel[grid](out, grad_out, delta, *strides, *sizes, HEAD_DIM=head_dim, **tile.options())
    return delta


def _grad_keys(
    tensors: tuple[Tensor, ...],
    statistics: tuple[Tensor, Tensor],
    documents: tuple[Tensor | None, Tensor | None],
    window: int,
    scale: float,
    grad_q: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, from q, k, v and the output's gradient.

    That of q is added to `grad_q` (float32) if it is given.
    """
    q, k, v, _ = tensors
    batch, num_queries, num_heads, _ = q.shape
    num_keys, groups = k.shape[1:3]
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    tile = _tile("grad_keys" if grad_q is None else "grad_all", q)
    grid = (triton.cdiv(num_keys, tile.blocks["BLOCK_N"]) * batch * groups,)
    _grad_keys_kernel[grid](
        *tensors,
        *documents,
        *statistics,
        grad_k if grad_q is None else grad_q,
        grad_k,
        grad_v,
        *_strides(*tensors),
        batch,
        num_queries,
        num_keys,
        num_heads,
        num_heads // groups,
        min(window, num_keys),
        _section(k, num_keys),
        scale * LOG2_E,
        ATOMIC=grad_q is not None,
        **_constants(k, documents[0], window),
        **tile.options(),
    )
    return grad_k, grad_v


@torch.library.custom_op("sparse_moe_lm::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ids: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; equal calls give equal bits."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys, groups = k.shape[1:3]
    if not q.numel():
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q, k, v, grad_out = tensors = _with_dense_rows(q, k, v, grad_out)
    statistics = lse, _delta(grad_out, out)
    grad_k, grad_v = _grad_keys(tensors, statistics, (ids, ends), window, scale, None)
    grad_q = q.new_empty(q.shape)
    shared = num_heads // groups
    tile = _tile("grad_queries", q)
    grid = (triton.cdiv(num_queries, tile.blocks["BLOCK_M"]) * batch * num_heads,)
    _grad_queries_kernel[grid](
        *tensors,
        ids,
        starts,
        *statistics,
        grad_q,
        *_strides(*tensors),
        batch,
        num_queries,
        num_keys,
        num_heads,
        shared,
        min(window, num_keys),
        _section(k, num_keys) * shared,
        scale * LOG2_E,
        **_constants(k, ids, window),
        **tile.options(),
    )
    return grad_q, grad_k, grad_v


@attention_backward_op.register_fake
def _(grad_out, q, k, v, out, lse, ids, starts, ends, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("sparse_moe_lm::attention_backward_atomic", mutates_args=())
def attention_backward_atomic_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ids: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_backward_op` with 5 matmuls instead of 7; the last bits of dQ vary."""
    if not q.numel():
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q, k, v, grad_out = tensors = _with_dense_rows(q, k, v, grad_out)
    statistics = lse, _delta(grad_out, out)
    grad_q = q.new_zeros(q.shape, dtype=torch.float32)
    grad_k, grad_v = _grad_keys(tensors, statistics, (ids, ends), window, scale, grad_q)
    return grad_q.to(q.dtype), grad_k, grad_v


@attention_backward_atomic_op.register_fake
def _(grad_out, q, k, v, out, lse, ids, starts, ends, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, ids, starts, ends, ctx.window, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, ids, starts, ends)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _grad_lse):
    backward = attention_backward_op if ctx.deterministic else attention_backward_atomic_op
    grads = backward(grad_out, *ctx.saved_tensors, ctx.window, ctx.scale)
    return *grads, None, None, None, None, None, None


attention_op.register_autograd(_backward, setup_context=_save)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    window: int | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """`kernels.attention.fused_attention` of checked arguments in the dtype of the matmuls."""
    starts = ends = None
    if document_ids is not None:
        document_ids = document_ids.contiguous()
        starts, ends = document_borders(document_ids)
    num_keys = k.shape[1]
    window = num_keys if window is None else min(window, num_keys)
    return attention_op(q, k, v, document_ids, starts, ends, window, scale, deterministic)[0]


def _aot_case(
    kernel: str, arch: str, dtype: torch.dtype, head_dim: int, window: bool, documents: bool
) -> AotCase:
    """A kernel with the tile that it ships. Spills are allowed in float32 and for wide heads."""
    by_size = load_tiles()[f"attention_{kernel}"][arch][str(dtype).removeprefix("torch.")]
    bucket = min(
        (int(size) for size in by_size if size != "any" and head_dim <= int(size)), default="any"
    )
    tile = _padded(by_size[str(bucket)], head_dim)
    strides = [f"{name}_{part}" for name in "qkv" for part in ("batch", "row", "head")]
    arguments: dict[str, Any] = {"q_ptr": dtype, "k_ptr": dtype, "v_ptr": dtype}
    borders = torch.int32 if documents else None
    arguments["ids_ptr"] = borders
    arguments["ends_ptr" if kernel in ("grad_keys", "grad_all") else "starts_ptr"] = borders
    arguments |= {"lse_ptr": torch.float32, "scale": float}
    constants = {"HAS_WINDOW": window, "HAS_DOCUMENTS": documents, "HEAD_DIM": head_dim}
    if kernel == "forward":
        function, others = _forward_kernel, {"out_ptr": dtype}
    else:
        strides += ["grad_batch", "grad_row", "grad_head"]
        others = {"grad_ptr": dtype, "delta_ptr": torch.float32, "grad_q_ptr": dtype}
        function = _grad_queries_kernel
        if kernel != "grad_queries":
            function = _grad_keys_kernel
            others |= {"grad_k_ptr": dtype, "grad_v_ptr": dtype}
            constants["ATOMIC"] = kernel == "grad_all"
            if kernel == "grad_all":
                others["grad_q_ptr"] = torch.float32
    sizes = ("num_sequences", "num_queries", "num_keys", "num_heads", "shared", "window", "section")
    arguments |= others | dict.fromkeys((*strides, *sizes), int)
    return AotCase(
        function,
        arguments,
        tile,
        constants=constants,
        divisible=tuple(strides),
        architectures=(arch,),
        spills=dtype == torch.float32 or head_dim > 128,
        name="window" * window + "documents" * documents,
    )


def aot_cases() -> list[AotCase]:
    """Every tile that ships, in bfloat16 with every mask."""
    cases = []
    for kernel in ("forward", "grad_keys", "grad_queries", "grad_all"):
        for arch in ARCHITECTURES:
            for head_dim in (64, 128, 256):
                every = kernel, arch, torch.bfloat16, head_dim
                cases.append(_aot_case(*every, True, True))
                if head_dim == 128:
                    cases.append(_aot_case(*every, False, False))
                else:
                    cases.append(_aot_case(kernel, arch, torch.float32, head_dim, False, False))
    tile = _padded(DELTA_TILE, 128)
    for dtype in MATMUL_DTYPES:
        strides = ("grad_batch", "grad_row", "grad_head")
        arguments: dict[str, Any] = dict.fromkeys((*strides, "num_queries", "num_heads"), int)
        arguments |= {"out_ptr": dtype, "grad_ptr": dtype, "delta_ptr": torch.float32}
        constants = {"HEAD_DIM": 128}
        cases.append(
            AotCase(_delta_kernel, arguments, tile, constants=constants, divisible=strides)
        )
    return cases
