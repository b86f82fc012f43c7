"""Triton kernels of `kernels.routing`: one forward, one backward.

A program holds the scores of BLOCK_TOKENS tokens over all experts. To choose, each score becomes an
integer of the same order with the expert's number beneath it,

    rank = (ordered bits of the score) * 2^32 + (BLOCK_EXPERTS - 1 - expert),

so that no two are equal, one maximum gives the best expert with ties to the lowest, and what was
taken is struck out without a second look: not even -inf or NaN is chosen twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotCase
from kernels.launch import MATMUL_DTYPES, on_device_of
from kernels.tiles import Tile, architecture

# Scores of the block of one program; more of them in the interpreter, where each step costs alike.
BLOCK_SCORES = 1024
INTERPRETED_TOKENS = 128
# Below the rank of any score.
_TAKEN = tl.constexpr(-(2**63))
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)
# Below it the square root of softplus counts as constant: its square stays a normal float32.
LEAST_SOFTPLUS = tl.constexpr(-80.0)
LEAST_SQUARE = tl.constexpr(1.81e-35)
# Sigmoid scores can all underflow; softmax ones sum to at least 1/E.
LEAST_SUM = tl.constexpr(1e-20)


@triton.jit
def _rank(score, number, inside, BLOCK: tl.constexpr):
    """Ordered as the score, NaN above all, -inf as the least finite; ties to the lower number."""
    score = tl.where(score < _LEAST, _LEAST, score)
    # -0 and 0 are equal.
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    rank = (key.to(tl.int64) << 32) | (BLOCK - 1 - number).to(tl.int64)
    return tl.where(inside, rank, _TAKEN)


@triton.jit
def _number(rank, BLOCK: tl.constexpr):
    return BLOCK - 1 - (rank & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _best_groups(
    score,
    expert,
    inside,
    NUM_GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """Whether each expert is in one of its token's best groups; a group scores by its best two."""
    rank = _rank(score, expert, inside, BLOCK_EXPERTS)
    group = tl.arange(0, BLOCK_GROUPS)[None, :]
    group_score = tl.zeros([BLOCK_TOKENS, BLOCK_GROUPS], dtype=tl.float32)
    for this in range(NUM_GROUPS):
        member = inside & (expert // GROUP_SIZE == this)
        first = tl.max(tl.where(member, rank, _TAKEN), 1)[:, None]
        total = tl.sum(tl.where(rank == first, score, 0.0), 1)
        if GROUP_SIZE > 1:
            second = tl.max(tl.where(member & (rank != first), rank, _TAKEN), 1)[:, None]
            total += tl.sum(tl.where(rank == second, score, 0.0), 1)
        group_score = tl.where(group == this, total[:, None], group_score)
    group_rank = _rank(group_score, group, group < NUM_GROUPS, BLOCK_GROUPS)
    kept = tl.zeros([BLOCK_TOKENS, BLOCK_EXPERTS], dtype=tl.int1)
    for _ in range(GROUPS_KEPT):
        best = tl.max(group_rank, 1)[:, None]
        kept = kept | (expert // GROUP_SIZE == _number(best, BLOCK_GROUPS))
        group_rank = tl.where(group_rank == best, _TAKEN, group_rank)
    return kept


@triton.jit
def _forward_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    indices_ptr,
    probs_ptr,
    finite_ptr,
    num_tokens,
    num_experts,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    present = (token < num_tokens)[:, None]
    inside = present & (expert < num_experts)
    at = token[:, None] * num_experts + expert
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)  # (tokens, E)
    broken = (logits != logits) | (tl.abs(logits) == float("inf"))
    finite = tl.max(broken.to(tl.int32), 1) == 0
    tl.store(finite_ptr + token, finite, mask=token < num_tokens)

    if SCORE == 0:
        least = tl.where(expert < num_experts, logits, -float("inf"))
        probs = tl.exp(least - tl.max(least, 1)[:, None])
        probs = probs / tl.sum(probs, 1)[:, None]
    else:
        small = tl.exp(-tl.abs(logits))
        if SCORE == 1:
            probs = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
        else:
            bounded = tl.where(logits < LEAST_SOFTPLUS, LEAST_SOFTPLUS, logits)
            small = tl.exp(-tl.abs(bounded))
            # log(1 + small) is 0 where 1 + small rounds to 1.
            log1p = tl.where(small < 1e-3, small * (1.0 - 0.5 * small), tl.log(1.0 + small))
            probs = tl.sqrt_rn(tl.maximum(bounded, 0.0) + log1p)
        # A comparison with NaN is false.
        probs = tl.where(logits == logits, probs, logits)
    tl.store(probs_ptr + at, probs, mask=inside)

    # Probabilities are ordered as their logits, which do not depend on how exp is rounded.
    score = logits if bias_ptr is None and NUM_GROUPS == 0 else probs
    experts_in = (expert < num_experts) & (token >= 0)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert, mask=expert < num_experts, other=0.0)
        score = score + bias.to(tl.float32)
    if NUM_GROUPS > 0:
        kept = _best_groups(
            score,
            expert,
            experts_in,
            NUM_GROUPS,
            GROUPS_KEPT,
            GROUP_SIZE,
            BLOCK_TOKENS,
            BLOCK_EXPERTS,
            BLOCK_GROUPS,
        )
        score = tl.where(kept, score, -float("inf"))
    rank = _rank(score, expert, experts_in, BLOCK_EXPERTS)
    choice = tl.arange(0, BLOCK_K)[None, :]
    indices = tl.zeros([BLOCK_TOKENS, BLOCK_K], dtype=tl.int32)
    for k in range(TOP_K):
        best = tl.max(rank, 1)[:, None]
        indices = tl.where(choice == k, _number(best, BLOCK_EXPERTS), indices)
        rank = tl.where(rank == best, _TAKEN, rank)

    weights = tl.gather(probs, indices, 1)  # (tokens, K)
    if NORMALIZE:
        total = tl.sum(tl.where(choice < TOP_K, weights, 0.0), 1)
        weights = weights / tl.where(total < LEAST_SUM, LEAST_SUM, total)[:, None]
    at = token[:, None] * TOP_K + choice
    chosen = present & (choice < TOP_K)
    tl.store(weights_ptr + at, weights, mask=chosen)
    tl.store(indices_ptr + at, indices.to(tl.int64), mask=chosen)


@triton.jit
def _backward_kernel(
    grad_weights_ptr,
    grad_probs_ptr,
    probs_ptr,
    indices_ptr,
    grad_logits_ptr,
    num_tokens,
    num_experts,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < num_tokens
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    inside = present[:, None] & (expert < num_experts)
    at = token[:, None] * num_experts + expert
    probs = tl.load(probs_ptr + at, mask=inside, other=0.0)
    if grad_probs_ptr is None:
        grad = tl.zeros([BLOCK_TOKENS, BLOCK_EXPERTS], dtype=tl.float32)
    else:
        grad = tl.load(grad_probs_ptr + at, mask=inside, other=0.0)
    if grad_weights_ptr is not None:
        # Of w_k = p_k / s, s = sum_k p_k:  dp_k = (dw_k - sum_j dw_j w_j) / s.
        scale = tl.full([BLOCK_TOKENS], 1.0, dtype=tl.float32)
        mean = tl.zeros([BLOCK_TOKENS], dtype=tl.float32)
        if NORMALIZE:
            total = tl.zeros([BLOCK_TOKENS], dtype=tl.float32)
            for k in range(TOP_K):
                index = tl.load(indices_ptr + token * TOP_K + k, mask=present, other=0)
                prob = tl.load(probs_ptr + token * num_experts + index, mask=present, other=1.0)
                grad_weight = tl.load(grad_weights_ptr + token * TOP_K + k, mask=present, other=0.0)
                total += prob
                mean += prob * grad_weight
            scale = tl.where(total < LEAST_SUM, LEAST_SUM, total)
            mean = tl.where(total < LEAST_SUM, 0.0, mean / scale)
        for k in range(TOP_K):
            index = tl.load(indices_ptr + token * TOP_K + k, mask=present, other=0)
            grad_weight = tl.load(grad_weights_ptr + token * TOP_K + k, mask=present, other=0.0)
            share = (grad_weight - mean) / scale
            grad += tl.where(expert == index[:, None], share[:, None], 0.0)
    if SCORE == 0:
        grad = probs * (grad - tl.sum(probs * grad, 1)[:, None])
    elif SCORE == 1:
        grad = probs * (1.0 - probs) * grad
    else:
        # p = sqrt(softplus(x)):  dp/dx = sigmoid(x) / (2 p),  sigmoid(x) = 1 - exp(-p^2).
        square = probs * probs
        sigmoid = tl.where(square < 1e-3, square * (1.0 - 0.5 * square), 1.0 - tl.exp(-square))
        slope = tl.where(square <= LEAST_SQUARE, 0.0, sigmoid / (2.0 * probs))
        grad = slope * grad
    tl.store(grad_logits_ptr + at, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def _tile(num_experts: int, arch: str) -> Tile:
    block_experts = triton.next_power_of_2(num_experts)
    tokens = max(1, min(64, BLOCK_SCORES // block_experts))
    if arch == "interpreter":
        tokens = INTERPRETED_TOKENS
    return Tile({"BLOCK_TOKENS": tokens, "BLOCK_EXPERTS": block_experts}, num_stages=1)


def _groups(num_experts: int, num_groups: int, groups_kept: int) -> dict[str, int]:
    """Constants of the group limit; 0 groups are no limit."""
    return {
        "NUM_GROUPS": num_groups,
        "GROUPS_KEPT": groups_kept,
        "GROUP_SIZE": num_experts // max(1, num_groups),
        "BLOCK_GROUPS": triton.next_power_of_2(max(1, num_groups)),
    }


@torch.library.custom_op("sparse_moe_lm::topk", mutates_args=())
def topk_op(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: int,
    normalize: bool,
    num_groups: int,
    groups_kept: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """topk_weights, topk_indices (T, K), router_probs (T, E), logits_finite (T,)."""
    num_tokens, num_experts = logits.shape
    outputs = _empty(logits, top_k)
    if num_tokens:
        tile = _tile(num_experts, architecture(logits.device))
        constants = {"SCORE": score, "NORMALIZE": normalize, "TOP_K": top_k}
        constants |= _groups(num_experts, num_groups, groups_kept)
        constants |= {"BLOCK_K": triton.next_power_of_2(top_k), **tile.options()}
        grid = (triton.cdiv(num_tokens, tile.blocks["BLOCK_TOKENS"]),)
        with on_device_of(logits):
            _forward_kernel[grid](logits, bias, *outputs, num_tokens, num_experts, **constants)
    return outputs


def _empty(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens = logits.shape[0]
    return (
        logits.new_empty(num_tokens, top_k, dtype=torch.float32),
        logits.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits.new_empty(logits.shape, dtype=torch.float32),
        logits.new_empty(num_tokens, dtype=torch.bool),
    )


@topk_op.register_fake
def _(logits, bias, top_k, score, normalize, num_groups, groups_kept):
    return _empty(logits, top_k)


@torch.library.custom_op("sparse_moe_lm::topk_backward", mutates_args=())
def topk_backward_op(
    grad_weights: Tensor | None,
    grad_probs: Tensor | None,
    probs: Tensor,
    indices: Tensor,
    dtype: torch.dtype,
    score: int,
    normalize: bool,
) -> Tensor:
    """Gradient of the logits (T, E), in `dtype`."""
    num_tokens, num_experts = probs.shape
    grad_logits = torch.empty_like(probs, dtype=dtype)
    if num_tokens:
        grads = (None if grad is None else grad.contiguous() for grad in (grad_weights, grad_probs))
        tile = _tile(num_experts, architecture(probs.device))
        constants = {"SCORE": score, "NORMALIZE": normalize, "TOP_K": indices.shape[1]}
        constants |= tile.options()
        grid = (triton.cdiv(num_tokens, tile.blocks["BLOCK_TOKENS"]),)
        tensors = *grads, probs, indices, grad_logits
        with on_device_of(probs):
            _backward_kernel[grid](*tensors, num_tokens, num_experts, **constants)
    return grad_logits


@topk_backward_op.register_fake
def _(grad_weights, grad_probs, probs, indices, dtype, score, normalize):
    return torch.empty_like(probs, dtype=dtype)


def _save(ctx, inputs, output):
    logits, _, _, score, normalize, _, _ = inputs
    _, indices, probs, finite = output
    ctx.save_for_backward(probs, indices)
    ctx.options = logits.dtype, score, normalize
    ctx.mark_non_differentiable(indices, finite)
    # Without a balancing loss no (T, E) gradient comes: none is made up.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_weights, _grad_indices, grad_probs, _grad_finite):
    grad = None
    if grad_weights is not None or grad_probs is not None:
        grad = topk_backward_op(grad_weights, grad_probs, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None, None, None, None


topk_op.register_autograd(_backward, setup_context=_save)


def aot_cases() -> list[AotCase]:
    """Few and many experts, a number off the powers of two, and the limit of DeepSeek-V3."""
    cases = []
    float32 = torch.float32
    sizes = {"num_tokens": int, "num_experts": int}
    # (E, K, groups, groups kept, score)
    shapes = [(8, 2, 0, 0, 0), (64, 8, 0, 0, 0), (128, 8, 0, 0, 0)]
    shapes += [(60, 4, 0, 0, 0), (256, 8, 8, 4, 1), (512, 16, 0, 0, 0), (384, 6, 0, 0, 2)]
    for num_experts, top_k, num_groups, groups_kept, score in shapes:
        tile = _tile(num_experts, "sm_90")
        divisible = ("num_experts",) if num_experts % 16 == 0 else ()
        shared = {"SCORE": score, "NORMALIZE": True, "TOP_K": top_k}
        constants = shared | {"BLOCK_K": triton.next_power_of_2(top_k)}
        constants |= _groups(num_experts, num_groups, groups_kept)
        for dtype in MATMUL_DTYPES:
            forward: dict[str, Any] = {"logits_ptr": dtype}
            forward |= {"bias_ptr": None if score == 0 else float32}
            forward |= {"weights_ptr": float32, "indices_ptr": torch.int64, "probs_ptr": float32}
            forward |= {"finite_ptr": torch.bool, **sizes}
            cases.append(AotCase(_forward_kernel, forward, tile, constants, divisible))
            backward: dict[str, Any] = {"grad_logits_ptr": dtype, "grad_weights_ptr": float32}
            backward |= {"grad_probs_ptr": float32, "probs_ptr": float32}
            backward |= {"indices_ptr": torch.int64, **sizes}
            cases.append(AotCase(_backward_kernel, backward, tile, shared, divisible))
    return cases
