"""How do the Triton kernels of `kernels.attention` run, forward and backward?

The kernels stand in `kernels.attention_forward_kernel`, `kernels.attention_grad_keys_kernel` and
`kernels.attention_grad_queries_kernel`, with their formulas; here is what launches them: operators
that `torch.compile` keeps whole, their autograd, layouts and tiles.
"""

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.aot import ARCHITECTURES, AotCase
from kernels.attention_forward_kernel import forward_kernel
from kernels.attention_grad_keys_kernel import delta_kernel, grad_keys_kernel
from kernels.attention_grad_queries_kernel import grad_queries_kernel
from kernels.launch import MATMUL_DTYPES, on_device_of
from kernels.tiles import Tile, choose_tile, tiles_of

LOG2_E = 1.4426950408889634
# Elements from row to row; tiles have at most 256 rows.
MAX_ROW_STRIDE = 2**23
DELTA_TILE = Tile({"BLOCK_M": 64})
# Bytes of keys and values that neighbouring programs share: they stay in the second-level cache.
CACHE_BYTES = 32 * 2**20


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
    # Buckets of 63 and 127: the masks of padded heads take registers that those of 64 and 128 have.
    tile = choose_tile(f"attention_{kernel}", x.device, dtype, head_dim)
    return _padded(tile, head_dim)


def _padded(tile: Tile, head_dim: int) -> Tile:
    block = max(16, triton.next_power_of_2(head_dim))
    return tile._replace(blocks={**tile.blocks, "BLOCK_P": block})


def _section(k: Tensor) -> int:
    """Key-value heads whose keys and values fit the cache together."""
    _, num_keys, _, head_dim = k.shape
    return max(1, CACHE_BYTES // (2 * num_keys * head_dim * k.element_size()))


def _with_dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Last dimension contiguous, and rows so near that offsets in a tile fit 32 bits."""
    fits = [t.stride(-1) == 1 and t.stride(1) < MAX_ROW_STRIDE for t in tensors]
    return tuple(t if fit else t.contiguous() for t, fit in zip(tensors, fits, strict=True))


def _strides(*tensors: Tensor) -> list[int]:
    """Of the batch, the row and the head of each (B, rows, heads, P)."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def _grid(x: Tensor, rows_of_block: int) -> tuple[int]:
    """A program per block of rows of each head of x (B, rows, heads, P)."""
    batch, num_rows, num_heads, _ = x.shape
    return (triton.cdiv(num_rows, rows_of_block) * batch * num_heads,)


def _sizes(q: Tensor, k: Tensor, window: int, scale: float) -> dict[str, int | float]:
    """What all kernels but `delta_kernel` need to know of their tensors."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    return {
        "num_sequences": batch,
        "num_queries": num_queries,
        "num_keys": num_keys,
        "num_heads": num_heads,
        "shared": num_heads // num_kv_heads,
        "window": min(window, num_keys),
        "scale": scale * LOG2_E,
        "HAS_WINDOW": window < num_keys,
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
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    if q.numel():
        q, k, v = _with_dense_rows(q, k, v)
        tile = _tile("forward", q)
        with on_device_of(q):
            forward_kernel[_grid(q, tile.blocks["BLOCK_M"])](
                q,
                k,
                v,
                ids,
                starts,
                out,
                lse,
                *_strides(q, k, v),
                **_sizes(q, k, window, scale),
                section=_section(k) * (num_heads // k.shape[2]),
                HAS_DOCUMENTS=ids is not None,
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
    delta_kernel[_grid(out, tile.blocks["BLOCK_M"])](
        out,
        grad_out,
        delta,
        *_strides(grad_out),
        num_queries,
        num_heads,
        HEAD_DIM=head_dim,
        **tile.options(),
    )
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

    statistics: lse and delta. documents: ids and ends. The gradient of q is added to `grad_q`
    (float32) if it is given.
    """
    q, k, v, _ = tensors
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    tile = _tile("grad_keys" if grad_q is None else "grad_all", q)
    grad_keys_kernel[_grid(k, tile.blocks["BLOCK_N"])](
        *tensors,
        *documents,
        *statistics,
        grad_k if grad_q is None else grad_q,
        grad_k,
        grad_v,
        *_strides(*tensors),
        **_sizes(q, k, window, scale),
        section=_section(k),
        ATOMIC=grad_q is not None,
        HAS_DOCUMENTS=documents[0] is not None,
        **tile.options(),
    )
    return grad_k, grad_v


def _grad_queries(
    tensors: tuple[Tensor, ...],
    statistics: tuple[Tensor, Tensor],
    documents: tuple[Tensor | None, Tensor | None],
    window: int,
    scale: float,
) -> Tensor:
    """Gradient of q, as `_grad_keys`, but documents: ids and starts."""
    q, k, _, _ = tensors
    grad_q = q.new_empty(q.shape)
    tile = _tile("grad_queries", q)
    grad_queries_kernel[_grid(q, tile.blocks["BLOCK_M"])](
        *tensors,
        *documents,
        *statistics,
        grad_q,
        *_strides(*tensors),
        **_sizes(q, k, window, scale),
        section=_section(k) * (q.shape[2] // k.shape[2]),
        HAS_DOCUMENTS=documents[0] is not None,
        **tile.options(),
    )
    return grad_q


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
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    deterministic: equal calls give equal bits; else 5 matmuls do instead of 7, and the last bits of
    dQ vary.
    """
    if not q.numel():
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q, k, v, grad_out = tensors = _with_dense_rows(q, k, v, grad_out)
    with on_device_of(q):
        statistics = lse, _delta(grad_out, out)
        grad_q = None if deterministic else q.new_zeros(q.shape, dtype=torch.float32)
        grad_k, grad_v = _grad_keys(tensors, statistics, (ids, ends), window, scale, grad_q)
        if grad_q is None:
            grad_q = _grad_queries(tensors, statistics, (ids, starts), window, scale)
    return grad_q.to(q.dtype), grad_k, grad_v


@attention_backward_op.register_fake
def _(grad_out, q, k, v, out, lse, ids, starts, ends, window, scale, deterministic):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, ids, starts, ends, ctx.window, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, ids, starts, ends)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _grad_lse):
    options = ctx.window, ctx.scale, ctx.deterministic
    grads = attention_backward_op(grad_out, *ctx.saved_tensors, *options)
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
    by_size = tiles_of(f"attention_{kernel}", arch)[str(dtype).removeprefix("torch.")]
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
        function, others = forward_kernel, {"out_ptr": dtype}
    else:
        strides += ["grad_batch", "grad_row", "grad_head"]
        others = {"grad_ptr": dtype, "delta_ptr": torch.float32, "grad_q_ptr": dtype}
        function = grad_queries_kernel
        if kernel != "grad_queries":
            function = grad_keys_kernel
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
    """Every tile that ships: in bfloat16 with every mask, and with heads of every padded size.

    Heads of 40 stand for 48 and 56, those of 136 and 192 for all up to 256: they are padded alike.
    """
    cases = []
    common = {(64, True, True), (128, True, True), (128, False, False), (256, True, True)}
    common |= {(16, True, True), (40, True, True)}
    for kernel in ("forward", "grad_keys", "grad_queries", "grad_all"):
        for arch in ARCHITECTURES:
            for head_dim in (8, 16, 24, 32, 40, 64, 80, 96, 128, 136, 192, 256):
                for window, documents in itertools.product((True, False), repeat=2):
                    case = head_dim, window, documents
                    # Mostly both masks need the most registers, but not always.
                    none = not window and not documents and head_dim in (16, 24, 40, 80)
                    if head_dim in (64, 128) or (window and documents) or none:
                        compiled = _aot_case(kernel, arch, torch.bfloat16, *case)
                        cases.append(compiled._replace(rare=case not in common))
            for head_dim in (64, 256):
                cases.append(_aot_case(kernel, arch, torch.float32, head_dim, False, False))
    tile = _padded(DELTA_TILE, 128)
    for dtype in MATMUL_DTYPES:
        strides = ("grad_batch", "grad_row", "grad_head")
        arguments: dict[str, Any] = dict.fromkeys((*strides, "num_queries", "num_heads"), int)
        arguments |= {"out_ptr": dtype, "grad_ptr": dtype, "delta_ptr": torch.float32}
        constants = {"HEAD_DIM": 128}
        cases.append(AotCase(delta_kernel, arguments, tile, constants=constants, divisible=strides))
    return cases
