"""How is attention's output computed? One Triton kernel, a program per block of queries and head.

With s = scale * log2(e) * q k^T in base 2, it keeps the output O (B, S, H, P) and
L_i = log2(sum_j 2^s_ij) (B, H, S): sum and weighted values of the key blocks, one after the other,
rescaled as the highest score grows.
"""

import triton
import triton.language as tl

from kernels.attention_blocks import (
    SIZES,
    address,
    documents_of,
    head_and_block,
    key_blocks,
    load_tile,
    store_tile,
    tile_offsets,
    visible_keys,
)


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
    k_ptr = address(k_ptr, first * BLOCK_N, k_row)
    v_ptr = address(v_ptr, first * BLOCK_N, v_row)
    k_offsets = tile_offsets(k_row, BLOCK_N, BLOCK_P)
    v_offsets = tile_offsets(v_row, BLOCK_N, BLOCK_P)
    for _ in range(first, end):
        k = load_tile(k_ptr + k_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            visible = visible_keys(
                query, query_document, key, ids_ptr, num_keys, window, HAS_WINDOW, HAS_DOCUMENTS
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
        v = load_tile(v_ptr + v_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")
        highest = new
        key += BLOCK_N
        k_ptr += BLOCK_N * k_row
        v_ptr += BLOCK_N * v_row
    return acc, total, highest


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
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
    sequence, head, rank = head_and_block(num_sequences, num_heads, num_blocks, section)
    first_row = (num_blocks - 1 - rank) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < num_queries
    first_query = num_keys - num_queries + first_row
    q_ptr = address(q_ptr + sequence * q_batch + head * q_head, first_row, q_row)
    q = load_tile(q_ptr + tile_offsets(q_row, BLOCK_M, BLOCK_P), inside, HEAD_DIM, BLOCK_P, True)
    k_ptr += sequence * k_batch + head // shared * k_head
    v_ptr += sequence * v_batch + head // shared * v_head
    query = first_query + tl.arange(0, BLOCK_M)
    if HAS_DOCUMENTS:
        ids_ptr += sequence * num_keys
        starts_ptr += sequence * num_keys
    query_document = documents_of(ids_ptr, query, inside, HAS_DOCUMENTS)
    borders = key_blocks(
        first_query,
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
    out_at = address(out_ptr, first_row, out_row) + tile_offsets(out_row, BLOCK_M, BLOCK_P)
    store_tile(out_at, acc / total[:, None], inside, HEAD_DIM, BLOCK_P)
    lse_ptr += (sequence * num_heads + head) * num_queries
    tl.store(lse_ptr + row, highest + tl.log2(total), mask=inside)
