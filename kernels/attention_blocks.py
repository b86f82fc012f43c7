"""Which blocks of queries and keys meet in attention, and how is a tile of them read?

The Triton functions that the forward and the backward kernels of attention share. `key_blocks` and
`query_blocks` return the borders (first, full_first, full_end, end): outside of the causal range,
the window and the document, blocks are skipped; between full_first and full_end every query sees
every key and no mask is formed. The same arithmetic runs with and without a mask, so the bits of a
row depend on neither.
"""

import triton
import triton.language as tl

# Sizes change from call to call: their values are no reason to compile anew.
SIZES = ("num_queries", "num_keys", "window", "section")
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_and_block(num_sequences, num_heads, num_blocks, section):
    """This program's sequence and head, and its rank among their blocks, heaviest first.

    `section` heads at a time share the cache; within a section all first blocks come first.
    """
    program = tl.program_id(0)
    first = program // (section * num_blocks) * section
    heads = tl.minimum(section, num_sequences * num_heads - first)
    within = program - first * num_blocks
    index = first + within % heads
    sequence = (index // num_heads).to(tl.int64)
    head = (index % num_heads).to(tl.int64)
    return sequence, head, within // heads


@triton.jit
def address(base, row, stride):
    """Address of a row, formed in 64 bits."""
    return base + row.to(tl.int64) * stride


@triton.jit
def tile_offsets(stride, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Elements from the first of a tile (ROWS, BLOCK_P): in 32 bits, to save registers."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK_P)[None, :]


@triton.jit
def load_tile(at, inside, HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr):
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
def store_tile(at, tile, inside, HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr):
    mask = inside[:, None] & (tl.arange(0, BLOCK_P)[None, :] < HEAD_DIM)
    tl.store(at, tile.to(at.dtype.element_ty), mask=mask)


@triton.jit
def key_blocks(
    first_query,
    start_ptr,
    num_keys,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Blocks of keys that BLOCK_M queries meet, the first of which stands at key `first_query`.

    Keys after `end` come after all queries; those before `full_end` after none.
    """
    last_query = tl.minimum(first_query + BLOCK_M, num_keys) - 1
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
def query_blocks(
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
def documents_of(ids_ptr, position, inside, HAS_DOCUMENTS: tl.constexpr):
    """The document of the tokens at these positions; without documents, nothing of use."""
    document = position
    if HAS_DOCUMENTS:
        document = tl.load(ids_ptr + position, mask=inside, other=0)
    return document


@triton.jit
def is_visible(
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
def visible_keys(
    query,
    query_document,
    key,
    ids_ptr,
    num_keys,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Whether each query sees each key: (queries, keys)."""
    key_document = documents_of(ids_ptr, key, key < num_keys, HAS_DOCUMENTS)
    return is_visible(
        query[:, None],
        key[None, :],
        query_document[:, None],
        key_document[None, :],
        window,
        HAS_WINDOW,
        HAS_DOCUMENTS,
    )
