"""How many bytes does the forward pass keep for the backward pass? By the parts of a block."""

import torch

from kernels.attention import BLOCK_QUERIES, SHORT_KEYS
from kernels.grouped_matmul import expected_padding
from kernels.swiglu_experts_torch import NARROW
from moe.config import SHARED_GATE_WIDTHS, ModelConfig
from train.config import RunConfig

_FLOAT32 = 4
# Rows of (F,) that `kernels.swiglu_experts_torch` keeps for each assignment, by its `save`.
_KEPT_WIDTHS = {"x": 0, "xh": 2, "xha": 2}


def _kept_by_autograd(model: ModelConfig) -> int:
    """Rows of (F,) that a network of the experts' kind keeps where each step keeps what it takes:
    w1 x and w3 x, clamped where a clamp is set, the activation, and its product with w3 x."""
    experts = model.moe.experts
    if not experts.has_gate:
        return 2
    return 4 if getattr(experts, "clamp", None) is None else 6


def _kept_widths(model: ModelConfig) -> tuple[int, int]:
    """Rows of (F,) and of (D,) or (l,) that experts keep for each assignment.

    Those of `moe.expert_rows` keep the rows and their outputs.
    """
    experts = model.moe.experts
    if hasattr(experts, "save"):
        return _KEPT_WIDTHS[experts.save], 0
    return _kept_by_autograd(model), 2


def exchanged_rows(model: ModelConfig) -> int:
    """Rows of (D,) or (l,) that are kept besides for each assignment where ranks share experts: as
    they come back, and those that arrive, which `moe.expert_rows` keeps anyway."""
    return 2 if hasattr(model.moe.experts, "save") else 1


def activation_bytes(
    config: RunConfig, model: ModelConfig, compute_bytes: int, *, shares: int = 1
) -> int:
    """Bytes that the forward pass of one micro-batch keeps for its backward pass, on a CPU.

    shares: ranks that share the experts, each of which has an even part of the rows.
    The residual stream is in float32; what enters a matmul in `compute_bytes`, the weights
    included, of which bfloat16 needs copies. Within 6 % of what PyTorch saves, in bfloat16 10 %, as
    tests hold; but each token is taken to have `top_k` rows of a router with logits. Where fewer
    run (relu, top_p, experts that cost nothing, a capacity) or there are no logits (hash), this is
    an upper bound: in small models of float32 by oneDNN, 1 to 48 % above. Without it float32 has no
    padding, and buffers keep the rows that do not run as well.
    """
    training, hidden = config.training, model.hidden_size
    tokens = config.micro_batch_size * training.seq_len
    blocks = [
        tokens * _attention_bytes(here, training.seq_len, compute_bytes)
        + tokens * _feed_forward_bytes(here, layer, compute_bytes, shares)
        + _weight_copy_bytes(here, layer, compute_bytes, shares)
        + _padding_bytes(here, layer, tokens, compute_bytes)
        for layer, here in enumerate(map(model.at, range(model.num_layers)))
    ]
    kept = sum(blocks)
    if training.activation_checkpointing:
        # Each block keeps its input; one block at a time is computed again.
        kept = tokens * _FLOAT32 * hidden * model.num_layers + max(blocks)
    # The final norm's input, and the gradients that the fused cross entropy computes ahead.
    assert model.vocab_size is not None
    return (
        kept + tokens * (_FLOAT32 + compute_bytes) * hidden + _FLOAT32 * model.vocab_size * hidden
    )


def _attention_bytes(model: ModelConfig, seq_len: int, c: int) -> int:
    """Bytes a token of the norm and the attention of a block, c bytes a number in the matmuls."""
    num_heads, num_kv_heads = model.attention.num_heads, model.num_kv_heads
    q_size, kv_size = num_heads * model.head_dim, num_kv_heads * model.head_dim
    # The norm's input and output; q, k, v and the output of the attention.
    kept = (_FLOAT32 + c) * model.hidden_size + c * (2 * q_size + 2 * kv_size)
    if model.attention.qk_norm != "none":
        # Their inputs, and the inverse of each norm.
        norms = num_heads + num_kv_heads if model.attention.qk_norm == "head" else 2
        kept += c * (q_size + kv_size) + _FLOAT32 * norms
    if seq_len > SHORT_KEYS:
        # The flash kernel keeps a sum a head, and the mask of packed documents.
        return kept + _FLOAT32 * num_heads + c * seq_len
    # Probabilities, by blocks of queries that see the keys up to the block's end.
    ends = range(BLOCK_QUERIES, seq_len + BLOCK_QUERIES, BLOCK_QUERIES)
    seen = sum(min(end, seq_len) * (min(end, seq_len) - end + BLOCK_QUERIES) for end in ends)
    return kept + c * num_heads * seen // seq_len


def _feed_forward_bytes(model: ModelConfig, layer: int, c: int, shares: int) -> int:
    """Bytes a token of the norm and the feed-forward part of a block, whose experts `shares` ranks
    share."""
    kept = (_FLOAT32 + c) * model.hidden_size
    if not model.is_moe_layer(layer):
        return kept + c * _kept_by_autograd(model) * model.dense_intermediate_size
    moe = model.moe
    inner, outer = _kept_widths(model)
    if shares > 1:
        outer += exchanged_rows(model)
    kept += c * (inner * moe.intermediate_size + outer * model.expert_hidden_size) * model.top_k
    # What a gate multiplies: the sum of the shared experts, and that of the routed ones.
    kept += c * SHARED_GATE_WIDTHS[moe.shared_gate] * model.hidden_size
    # What latent experts read, where they do not gather rows of it first, and their sum.
    kept += c * (1 + hasattr(moe.experts, "save")) * (moe.latent_size or 0)
    shared_width = moe.num_shared_experts * model.shared_intermediate_size
    kept += c * _kept_by_autograd(model) * shared_width
    # The router's: its input in float32, that times the noise and the noise, logits and
    # probabilities; indices and two versions of the weights of the chosen, and the dispatch plan.
    copies = (c < _FLOAT32) + 2 * (getattr(moe.router, "jitter", 0) > 0)
    kept += copies * _FLOAT32 * model.hidden_size + 2 * _FLOAT32 * moe.num_choices
    return kept + (3 * 8 + 2 * _FLOAT32) * model.top_k


def _weight_copy_bytes(model: ModelConfig, layer: int, c: int, shares: int) -> int:
    """Copies of weights that a block keeps: all that are multiplied in bfloat16; in float32, w1 and
    w3 where they are stacked. Of experts one of `shares`."""
    moe = model.moe
    num_experts = moe.num_experts // shares
    if c == _FLOAT32:
        narrow = hasattr(moe.experts, "save") and moe.intermediate_size < NARROW
        stacked = model.is_moe_layer(layer) and narrow
        return 2 * c * model.expert_hidden_size * num_experts * moe.intermediate_size * stacked
    heads = 2 * model.attention.num_heads + 2 * model.num_kv_heads
    matrices = 3 if moe.experts.has_gate else 2
    if not model.is_moe_layer(layer):
        widths, experts = matrices * model.dense_intermediate_size, 0
    else:
        shared = moe.num_shared_experts * model.shared_intermediate_size
        widths = matrices * shared + 2 * (moe.latent_size or 0)
        experts = matrices * num_experts * moe.intermediate_size
    return c * (
        model.hidden_size * (heads * model.head_dim + widths) + model.expert_hidden_size * experts
    )


def _padding_bytes(model: ModelConfig, layer: int, tokens: int, c: int) -> int:
    """Of the rows that pad each expert's."""
    if not model.is_moe_layer(layer):
        return 0
    moe = model.moe
    factor = torch.empty(0, dtype=torch.float32 if c == _FLOAT32 else torch.bfloat16)
    padding = expected_padding(tokens * model.top_k, moe.num_experts, factor)
    inner, outer = _kept_widths(model)
    return c * padding * (inner * moe.intermediate_size + outer * model.expert_hidden_size)
