"""What will a run cost? Sizes, FLOPs and memory of a config, computed without training."""

import os
from typing import NamedTuple

import torch

from moe.config import ModelConfig
from moe.model import MoETransformer, ParameterCount, flops_per_token, num_parameters
from train.config import RunConfig

_FLOAT32 = 4


class Plan(NamedTuple):
    """parameters as counted by `moe.model`; bytes by part; tokens over the whole run."""

    parameters: ParameterCount
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    tokens_per_step: int
    num_steps: int

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
    tokens = config.micro_batch_size * config.training.seq_len
    return Plan(
        parameters=count,
        flops_per_token=flops_per_token(model, config.training.seq_len),
        weight_bytes=_FLOAT32 * count.total,
        gradient_bytes=_FLOAT32 * count.total,
        optimizer_bytes=2 * _FLOAT32 * count.total,
        activation_bytes=activation_bytes(config, model_config, compute_bytes, tokens),
        checkpoint_bytes=3 * _FLOAT32 * count.total,
        tokens_per_step=config.tokens_per_step,
        num_steps=config.num_steps,
    )


def check_memory(plan: Plan, device: str) -> None:
    """Refuse what cannot fit: the system would end a run that outgrows it without a word.

    Raises:
        MemoryError: if weights, gradients and moments alone need more than the machine has.
    """
    if device == "cuda":
        available = torch.cuda.mem_get_info()[1]
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = plan.weight_bytes + plan.gradient_bytes + plan.optimizer_bytes
    if needed > available:
        raise MemoryError(
            f"weights, gradients and optimizer need {format_bytes(needed)}, {device} has "
            f"{format_bytes(available)}"
        )


def activation_bytes(config: RunConfig, model: ModelConfig, compute_bytes: int, tokens: int) -> int:
    """Bytes that the forward pass of one micro-batch keeps for its backward pass.

    The residual stream is in float32; what enters a matmul in `compute_bytes`; attention keeps its
    probabilities up to 1,024 keys (`kernels.attention`), of which a causal row has about half.
    """
    wide, c, hidden = _FLOAT32, compute_bytes, model.hidden_size
    q_size = model.attention.num_heads * model.head_dim
    kv_size = model.num_kv_heads * model.head_dim
    # Two norms keep their input; the matmuls after them keep their output.
    per_token = 2 * (wide + c) * hidden
    # q, k, v, the attention's output, and the inputs of the QK-norms.
    per_token += c * (2 * q_size + 2 * kv_size)
    if model.attention.qk_norm != "none":
        per_token += c * (q_size + kv_size)
    if config.training.seq_len <= 1024:
        per_token += c * model.attention.num_heads * config.training.seq_len * 5 // 8
    total = 0
    for layer in range(model.num_layers):
        total += tokens * (per_token + _feed_forward_bytes(model, layer, c))
    if config.training.activation_checkpointing:
        # Each block keeps its input; one block at a time is computed again.
        total = total // model.num_layers + tokens * wide * hidden * model.num_layers
    # The final norm, and the gradients that the fused cross entropy computes in its forward pass.
    assert model.vocab_size is not None
    return total + tokens * (wide + 2 * c) * hidden + wide * model.vocab_size * hidden


def _feed_forward_bytes(model: ModelConfig, layer: int, c: int) -> int:
    """Bytes a token that the feed-forward part of a block keeps beside its input."""
    if not model.is_moe_layer(layer):
        return c * 4 * model.dense_intermediate_size
    moe = model.moe
    kept = {"x": 0, "xh": 2, "xha": 3}[getattr(moe.experts, "save", "xh")]
    routed = c * kept * moe.intermediate_size * model.top_k
    shared = c * 4 * moe.num_shared_experts * model.shared_intermediate_size
    # Logits and probabilities, in float32.
    return routed + shared + 2 * _FLOAT32 * moe.num_experts


def format_bytes(count: float) -> str:
    """In powers of 1,024: `3.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


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
    in_use = plan.weight_bytes + plan.gradient_bytes + plan.optimizer_bytes + plan.activation_bytes
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
        ("memory: together", format_bytes(in_use)),
        ("disk a checkpoint", format_bytes(plan.checkpoint_bytes)),
        ("tokens a step", f"{plan.tokens_per_step:,}"),
        ("steps", f"{plan.num_steps:,}"),
        ("tokens", format_count(plan.tokens)),
        ("tokens an active parameter", f"{plan.tokens / parameters.active:.2f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
