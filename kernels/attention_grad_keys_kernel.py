"""How are the gradients of keys and values computed? Triton kernels.

With s and L as in `kernels.attention_forward_kernel`, P = 2^(s - L) is computed anew block by
block:

    delta_i = sum_p dO_ip O_ip                      delta_kernel
    dV = P^T dO,   dP = dO V^T,   dS = P (dP - delta)
    dK = scale dS^T Q                               grad_keys_kernel, a program per key block

A program of `grad_keys_kernel` goes through all query heads of its key-value head, so no two
programs add to one gradient. With ATOMIC it also adds its share of dQ in float32 by atomics, and
`kernels.attention_grad_queries_kernel` and two of its matmuls are not needed.
"""

import triton
import triton.language as tl

from kernels.attention_blocks import (
    LN_2,
    SIZES,
    address,
    documents_of,
    head_and_block,
    is_visible,
    load_tile,
    query_blocks,
    store_tile,
    tile_offsets,
)


@triton.jit
def delta_kernel(
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
    out_at = address(out_ptr, first_row, out_row) + tile_offsets(out_row, BLOCK_M, BLOCK_P)
    grad_at = address(grad_ptr, first_row, grad_row) + tile_offsets(grad_row, BLOCK_M, BLOCK_P)
    out = load_tile(out_at, inside, HEAD_DIM, BLOCK_P, True).to(tl.float32)
    grad = load_tile(grad_at, inside, HEAD_DIM, BLOCK_P, True).to(tl.float32)
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
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add what query blocks first .. end - 1 of one head contribute; all matrices transposed."""
    row = first * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = address(q_ptr, first * BLOCK_M, q_row)
    grad_ptr = address(grad_ptr, first * BLOCK_M, grad_row)
    q_offsets = tile_offsets(q_row, BLOCK_M, BLOCK_P)
    grad_offsets = tile_offsets(grad_row, BLOCK_M, BLOCK_P)
    if ATOMIC:
        grad_q_ptr = address(grad_q_ptr, first * BLOCK_M, grad_q_row)
        grad_q_offsets = tile_offsets(grad_q_row, BLOCK_M, BLOCK_P)
    for _ in range(first, end):
        inside = row < num_queries
        q = load_tile(q_ptr + q_offsets, inside, HEAD_DIM, BLOCK_P, MASKED)
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
            query_document = documents_of(ids_ptr, query, inside, HAS_DOCUMENTS)
            visible = is_visible(
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
        grad = load_tile(grad_ptr + grad_offsets, inside, HEAD_DIM, BLOCK_P, MASKED)
        grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_probs = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_scores = (probs * (grad_probs - delta[None, :])).to(q.dtype)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
        if ATOMIC:
            if 4 * BLOCK_M <= BLOCK_N and BLOCK_P >= 64 and BLOCK_P <= 128:
                # Transposed: Hopper's wgmma takes no fewer than 64 rows. Wide heads would spill.
                share = tl.trans(tl.dot(tl.trans(k), grad_scores, input_precision="ieee"))
            else:
                share = tl.dot(tl.trans(grad_scores), k, input_precision="ieee")
            at = grad_q_ptr + grad_q_offsets
            mask = inside[:, None] & (tl.arange(0, BLOCK_P)[None, :] < HEAD_DIM)
            tl.atomic_add(at, share * (scale * LN_2), mask=mask, sem="relaxed")
            grad_q_ptr += BLOCK_M * grad_q_row
        row += BLOCK_M
        q_ptr += BLOCK_M * q_row
        grad_ptr += BLOCK_M * grad_row
    return grad_k, grad_v


@triton.jit(do_not_specialize=SIZES)
def grad_keys_kernel(
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
    sequence, group, rank = head_and_block(num_sequences, groups, num_blocks, section)
    first_key = rank * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    inside = key < num_keys
    k_ptr = address(k_ptr + sequence * k_batch + group * k_head, first_key, k_row)
    v_ptr = address(v_ptr + sequence * v_batch + group * v_head, first_key, v_row)
    k_at = k_ptr + tile_offsets(k_row, BLOCK_N, BLOCK_P)
    v_at = v_ptr + tile_offsets(v_row, BLOCK_N, BLOCK_P)
    k = load_tile(k_at, inside, HEAD_DIM, BLOCK_P, True)
    v = load_tile(v_at, inside, HEAD_DIM, BLOCK_P, True)
    if HAS_DOCUMENTS:
        ids_ptr += sequence * num_keys
        ends_ptr += sequence * num_keys
    key_document = documents_of(ids_ptr, key, inside, HAS_DOCUMENTS)
    borders = query_blocks(
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
                BLOCK_N,
                BLOCK_P,
            )
    out_row = groups * HEAD_DIM
    out_base = (sequence * num_keys + first_key) * out_row + group * HEAD_DIM
    out_offsets = tile_offsets(out_row, BLOCK_N, BLOCK_P)
    # The scale holds log2(e) for exp2; the derivative of the scores does not.
    grad_k = grad_k * (scale * LN_2)
    store_tile(grad_k_ptr + out_base + out_offsets, grad_k, inside, HEAD_DIM, BLOCK_P)
    store_tile(grad_v_ptr + out_base + out_offsets, grad_v, inside, HEAD_DIM, BLOCK_P)
