"""How is the gradient of queries computed? One Triton kernel.

    dQ = scale dS K                                 grad_queries_kernel, a program per query block

with dS as in `kernels.attention_grad_keys_kernel`, computed anew.
"""

import triton
import triton.language as tl

from kernels.attention_blocks import (
    LN_2,
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
    k_ptr = address(k_ptr, first * BLOCK_N, k_row)
    v_ptr = address(v_ptr, first * BLOCK_N, v_row)
    k_offsets = tile_offsets(k_row, BLOCK_N, BLOCK_P)
    v_offsets = tile_offsets(v_row, BLOCK_N, BLOCK_P)
    for _ in range(first, end):
        k = load_tile(k_ptr + k_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        v = load_tile(v_ptr + v_offsets, key < num_keys, HEAD_DIM, BLOCK_P, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        exponent = scores * scale - lse[:, None]
        if MASKED:
            visible = visible_keys(
                query, query_document, key, ids_ptr, num_keys, window, HAS_WINDOW, HAS_DOCUMENTS
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


@triton.jit(do_not_specialize=SIZES)
def grad_queries_kernel(
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
    sequence, head, rank = head_and_block(num_sequences, num_heads, num_blocks, section)
    first_row = (num_blocks - 1 - rank) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < num_queries
    first_query = num_keys - num_queries + first_row
    q_ptr = address(q_ptr + sequence * q_batch + head * q_head, first_row, q_row)
    grad_ptr = address(grad_ptr + sequence * grad_batch + head * grad_head, first_row, grad_row)
    q_at = q_ptr + tile_offsets(q_row, BLOCK_M, BLOCK_P)
    grad_at = grad_ptr + tile_offsets(grad_row, BLOCK_M, BLOCK_P)
    q = load_tile(q_at, inside, HEAD_DIM, BLOCK_P, True)
    grad = load_tile(grad_at, inside, HEAD_DIM, BLOCK_P, True)
    statistics = (sequence * num_heads + head) * num_queries
    # Rows beyond the last query get probability 0.
    lse = tl.load(lse_ptr + statistics + row, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + statistics + row, mask=inside, other=0.0)
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
    grad_q_at = address(grad_q_ptr, first_row, out_row) + tile_offsets(out_row, BLOCK_M, BLOCK_P)
    store_tile(grad_q_at, grad_q * (scale * LN_2), inside, HEAD_DIM, BLOCK_P)
