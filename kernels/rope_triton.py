"""Triton kernel of `kernels.rope`: queries and keys turn in one launch, forward and backward.

A program turns BLOCK_TOKENS neighbouring tokens of one sequence in BLOCK_HEADS heads, so that cos
and sin are read once for those heads. The first programs do q, the others k. Backward is the same
kernel with the sine negated.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotCase
from kernels.launch import MATMUL_DTYPES, on_device_of
from kernels.tiles import Tile

# Pairs of elements of the block of one program: 8 a thread, so that a half is read in 16 bytes.
BLOCK_PAIRS = 1024
MAX_HEADS = 8


@triton.jit
def _rotate(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    program,
    stride_batch,
    stride_token,
    stride_head,
    seq_len,
    num_heads,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    head_blocks = tl.cdiv(num_heads, BLOCK_HEADS)
    token_blocks = tl.cdiv(seq_len, BLOCK_TOKENS)
    head = (program % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    rest = program // head_blocks
    token = (rest % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    batch = (rest // token_blocks).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)

    at = token[:, None].to(tl.int64) * HALF + column[None, :]  # (tokens, P/2)
    inside = (token < seq_len)[:, None] & (column < HALF)[None, :]
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)[:, None, :]
    if INVERSE:
        sin = -sin

    inside = inside[:, None, :] & (head < num_heads)[None, :, None]  # (tokens, heads, P/2)
    token = token[:, None, None].to(tl.int64)
    head = head[None, :, None].to(tl.int64)
    column = column[None, None, :]
    at = batch * stride_batch + token * stride_token + head * stride_head + column
    # In float32: bfloat16 would lose the small angles between neighbours.
    x1 = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    at = ((batch * seq_len + token) * num_heads + head) * (2 * HALF) + column
    tl.store(y_ptr + at, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + at + HALF, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    q_programs,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    seq_len,
    q_heads,
    k_heads,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    Q_TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_HEADS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < q_programs:
        _rotate(
            q_ptr,
            q_out_ptr,
            cos_ptr,
            sin_ptr,
            program,
            q_batch,
            q_token,
            q_head,
            seq_len,
            q_heads,
            INVERSE,
            HALF,
            Q_TOKENS,
            Q_HEADS,
            BLOCK_HALF,
        )
    else:
        _rotate(
            k_ptr,
            k_out_ptr,
            cos_ptr,
            sin_ptr,
            program - q_programs,
            k_batch,
            k_token,
            k_head,
            seq_len,
            k_heads,
            INVERSE,
            HALF,
            K_TOKENS,
            K_HEADS,
            BLOCK_HALF,
        )


def _tile(head_dim: int, q_heads: int, k_heads: int) -> Tile:
    block_half = triton.next_power_of_2(head_dim // 2)
    blocks = {"BLOCK_HALF": block_half}
    for name, heads in (("Q", q_heads), ("K", k_heads)):
        block_heads = min(MAX_HEADS, triton.next_power_of_2(heads))
        blocks[f"{name}_HEADS"] = block_heads
        blocks[f"{name}_TOKENS"] = max(1, BLOCK_PAIRS // (block_half * block_heads))
    return Tile(blocks)


def _rows(x: Tensor) -> Tensor:
    """`x` itself if its vectors lie whole in memory, whatever the other strides; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("sparse_moe_lm::rope", mutates_args=())
def rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q (B, S, H, P) and k (B, S, G, P) turned by the angles of cos, sin (S, P/2), or back."""
    batch, seq_len, q_heads, head_dim = q.shape
    k_heads = k.shape[2]
    q, k = _rows(q), _rows(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    tile = _tile(head_dim, q_heads, k_heads)
    q_programs, k_programs = (
        batch
        * triton.cdiv(seq_len, tile.blocks[f"{name}_TOKENS"])
        * triton.cdiv(heads, tile.blocks[f"{name}_HEADS"])
        for name, heads in (("Q", q_heads), ("K", k_heads))
    )
    if q_programs + k_programs:
        tensors = q, k, q_out, k_out, cos, sin
        strides = *q.stride()[:3], *k.stride()[:3]
        sizes = seq_len, q_heads, k_heads
        constants = {"INVERSE": inverse, "HALF": head_dim // 2, **tile.options()}
        with on_device_of(q):
            _rope_kernel[(q_programs + k_programs,)](
                *tensors, q_programs, *strides, *sizes, **constants
            )
    return q_out, k_out


@rope_op.register_fake
def _(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    _, _, cos, sin, inverse = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _backward(ctx, grad_q, grad_k):
    grads = rope_op(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse)
    return *grads, None, None, None


rope_op.register_autograd(_backward, setup_context=_save)


def aot_cases() -> list[AotCase]:
    """Many heads over few and over one, forward and backward; and a head size off 16."""
    cases = []
    for head_dim, q_heads, k_heads in ((64, 16, 4), (128, 16, 16), (128, 12, 1), (80, 8, 2)):
        for dtype in MATMUL_DTYPES:
            arguments: dict[str, Any] = dict.fromkeys(
                ("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), dtype
            )
            arguments |= {"cos_ptr": torch.float32, "sin_ptr": torch.float32}
            strides = [f"{x}_{stride}" for x in "qk" for stride in ("batch", "token", "head")]
            sizes = ["q_programs", "seq_len", "q_heads", "k_heads"]
            arguments |= dict.fromkeys(strides + sizes, int)
            for inverse in (False, True):
                cases.append(
                    AotCase(
                        _rope_kernel,
                        arguments,
                        _tile(head_dim, q_heads, k_heads),
                        constants={"INVERSE": inverse, "HALF": head_dim // 2},
                        divisible=tuple(strides),
                    )
                )
    return cases
