"""What will a run cost? Sizes, FLOPs and memory of a config, computed without training."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kernels.attention import BLOCK_QUERIES, SHORT_KEYS
from kernels.grouped_matmul import row_quantum
from kernels.swiglu_experts import NARROW
from moe.config import ModelConfig
from moe.model import MoETransformer, ParameterCount, flops_per_token, num_parameters
from train.config import RunConfig
from train.errors import OutOfMemoryError
from train.program import first_line, is_out_of_memory
from train.run_directory import format_bytes

_FLOAT32 = 4
# Rows of (F,) that `kernels.swiglu_experts` keeps for each assignment, by its `save`.
_KEPT_WIDTHS = {"x": 0, "xh": 2, "xha": 3}


class Plan(NamedTuple):
    """parameters as counted by `moe.model`; bytes by part, and of one number in the matmuls."""

    parameters: ParameterCount
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    tokens_per_step: int
    num_steps: int
    compute_bytes: int

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and moments: however large the batch is."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.tokens_per_step * self.num_steps


def make_plan(config: RunConfig, model_config: ModelConfig, compute_bytes: int) -> Plan:
    """Plan a run.

    Args:
        model_config: with its vocab_size known. compute_bytes: of one number in the matmuls, 2 in
            bfloat16 and 4 in float32.
    """
    with torch.device("meta"):
        model = MoETransformer(model_config)
    count = num_parameters(model)
    return Plan(
        parameters=count,
        flops_per_token=flops_per_token(model, config.training.seq_len),
        weight_bytes=_FLOAT32 * count.total,
        gradient_bytes=_FLOAT32 * count.total,
        optimizer_bytes=2 * _FLOAT32 * count.total,
        activation_bytes=activation_bytes(config, model_config, compute_bytes),
        checkpoint_bytes=3 * _FLOAT32 * count.total,
        tokens_per_step=config.tokens_per_step,
        num_steps=config.num_steps,
        compute_bytes=compute_bytes,
    )


def check_memory(plan: Plan, device: str) -> None:
    """Refuse what cannot fit: the system would end a run that outgrows it without a word.

    Raises:
        OutOfMemoryError: if weights, gradients and moments alone need more than the machine has.
    """
    if device == "cuda":
        available = torch.cuda.mem_get_info()[1]
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if plan.state_bytes > available:
        raise OutOfMemoryError(
            f"out of memory (weights, gradients and optimizer need "
            f"{format_bytes(plan.state_bytes)}, {device} has {format_bytes(available)}); "
            f"{_smaller_model(plan)}; the batch does not matter"
        )


@contextmanager
def memory_errors(plan: Plan, config: RunConfig, model: ModelConfig) -> Iterator[None]:
    """Give an out-of-memory error of the block the plan's numbers, and the settings that decide.

    Args:
        model: the one of the plan, with its vocab_size known.
    Raises:
        OutOfMemoryError: in place of what Python, the system or PyTorch raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        needs = (
            f"by the plan, activations need {format_bytes(plan.activation_bytes)}, weights, "
            f"gradients and optimizer {format_bytes(plan.state_bytes)}"
        )
        # What is a fifth of all or less would not help; of the rest, the larger part first.
        parts = [
            (plan.activation_bytes, _fewer_activations(plan, config, model)),
            (plan.state_bytes, _smaller_model(plan)),
        ]
        total = sum(size for size, _ in parts)
        way_out = "; or ".join(way for size, way in sorted(parts, reverse=True) if 5 * size > total)
        cause = f"out of memory ({first_line(error)})"
        raise OutOfMemoryError(f"{cause}; {needs}: {way_out}") from error


def _smaller_model(plan: Plan) -> str:
    advice = (
        f"choose a smaller model than {format_count(plan.parameters.total)} parameters: lower "
        "model.hidden_size, model.num_layers, model.moe.num_experts or model.moe.intermediate_size"
    )
    if 2 * plan.parameters.embedding > plan.parameters.total:
        advice += ", or above all the vocabulary (tokenizer.vocab_size, model.tie_embeddings: true)"
    return advice


def _fewer_activations(plan: Plan, config: RunConfig, model: ModelConfig) -> str:
    training, size = config.training, config.micro_batch_size
    ways = []
    if size > 1:
        half = next(n for n in range(size // 2, 0, -1) if training.batch_size % n == 0)
        ways.append(f"lower training.micro_batch_size ({size}) to {half}, at the same batch")
    if not training.activation_checkpointing:
        again = training.model_copy(update={"activation_checkpointing": True})
        kept = activation_bytes(
            config.model_copy(update={"training": again}), model, plan.compute_bytes
        )
        ways.append(
            f"set training.activation_checkpointing: true, which keeps {format_bytes(kept)}"
        )
    ways.append(f"lower training.seq_len ({training.seq_len})")
    if config.evaluation.batch_size > size:
        ways.append(
            f"during an evaluation, lower evaluation.batch_size ({config.evaluation.batch_size})"
        )
    return "; or ".join(ways)


def activation_bytes(config: RunConfig, model: ModelConfig, compute_bytes: int) -> int:
    """Bytes that the forward pass of one micro-batch keeps for its backward pass, on a CPU.

    The residual stream is in float32; what enters a matmul in `compute_bytes`, the weights
    included, of which bfloat16 needs copies. A test holds this to what PyTorch saves.
    """
    training, hidden = config.training, model.hidden_size
    tokens = config.micro_batch_size * training.seq_len
    blocks = [
        tokens * _attention_bytes(model, training.seq_len, compute_bytes)
        + tokens * _feed_forward_bytes(model, layer, compute_bytes)
        + _weight_copy_bytes(model, layer, compute_bytes)
        + _padding_bytes(model, layer, tokens, compute_bytes)
        for layer in range(model.num_layers)
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


def _feed_forward_bytes(model: ModelConfig, layer: int, c: int) -> int:
    """Bytes a token of the norm and the feed-forward part of a block."""
    kept = (_FLOAT32 + c) * model.hidden_size
    if not model.is_moe_layer(layer):
        return kept + c * 4 * model.dense_intermediate_size
    moe = model.moe
    widths = _KEPT_WIDTHS[getattr(moe.experts, "save", "xh")]
    # What the experts keep, and their outputs.
    kept += c * (widths * moe.intermediate_size + model.hidden_size) * model.top_k
    kept += c * 4 * moe.num_shared_experts * model.shared_intermediate_size
    # The router's: its input in float32, that times the noise and the noise, logits and
    # probabilities; indices and two versions of the weights of the chosen, and the dispatch plan.
    copies = (c < _FLOAT32) + 2 * (getattr(moe.router, "jitter", 0) > 0)
    kept += copies * _FLOAT32 * model.hidden_size + 2 * _FLOAT32 * moe.num_experts
    return kept + (3 * 8 + 2 * _FLOAT32) * model.top_k


def _weight_copy_bytes(model: ModelConfig, layer: int, c: int) -> int:
    """Copies of weights that a block keeps: all that are multiplied in bfloat16; in float32, w1 and
    w3 where they are stacked."""
    moe = model.moe
    if c == _FLOAT32:
        stacked = model.is_moe_layer(layer) and moe.intermediate_size < NARROW
        return 2 * c * model.hidden_size * moe.num_experts * moe.intermediate_size * stacked
    heads = 2 * model.attention.num_heads + 2 * model.num_kv_heads
    widths = model.dense_intermediate_size
    if model.is_moe_layer(layer):
        widths = moe.num_experts * moe.intermediate_size
        widths += moe.num_shared_experts * model.shared_intermediate_size
    return c * model.hidden_size * (heads * model.head_dim + 3 * widths)


def _padding_bytes(model: ModelConfig, layer: int, tokens: int, c: int) -> int:
    """Of the rows that pad each expert's: half of `row_quantum` on average."""
    if not model.is_moe_layer(layer):
        return 0
    moe = model.moe
    factor = torch.empty(0, dtype=torch.float32 if c == _FLOAT32 else torch.bfloat16)
    quantum = row_quantum(tokens * model.top_k, moe.num_experts, factor)
    widths = _KEPT_WIDTHS[getattr(moe.experts, "save", "xh")] * moe.intermediate_size
    widths += model.hidden_size
    return c * (moe.num_experts * quantum // 2 * widths if quantum > 1 else 0)


def format_count(count: float) -> str:
    """`12.6 M`."""
    for unit in ("", " k", " M", " B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f} T"


def describe_plan(plan: Plan) -> str:
    """A table for a person."""
    parameters = plan.parameters
    rows = [
        ("parameters, total", format_count(parameters.total)),
        ("parameters, active a token", format_count(parameters.active)),
        ("parameters, embedding and head", format_count(parameters.embedding)),
        ("FLOPs a token, forward", format_count(plan.flops_per_token / 3)),
        ("FLOPs a token, training", format_count(plan.flops_per_token)),
        ("memory: weights (float32)", format_bytes(plan.weight_bytes)),
        ("memory: gradients", format_bytes(plan.gradient_bytes)),
        ("memory: optimizer", format_bytes(plan.optimizer_bytes)),
        ("memory: activations of a micro-batch", format_bytes(plan.activation_bytes)),
        ("memory: together", format_bytes(plan.state_bytes + plan.activation_bytes)),
        ("disk a checkpoint", format_bytes(plan.checkpoint_bytes)),
        ("tokens a step", f"{plan.tokens_per_step:,}"),
        ("steps", f"{plan.num_steps:,}"),
        ("tokens", format_count(plan.tokens)),
        ("tokens an active parameter", f"{plan.tokens / parameters.active:.2f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
