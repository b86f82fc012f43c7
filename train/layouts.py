"""Which way of sharing a model out over ranks fits, and what does it cost each rank?

    P   parameters outside the experts, X  parameters of all experts, W  ranks, N  expert-parallel
    stage 0   weights, gradients, moments of P + X/N              4 + 4 + 8 bytes a parameter
    stage 1   ... and the optimizer's float32 copy and moments of (P + X)/W
    stage 2   gradients of (P + X)/W too; stage 3 weights too

All in float32, as DeepSpeed holds them; buckets and what stage 3 gathers for a moment left out.
"""

from typing import NamedTuple

from moe.config import ModelConfig
from moe.model import ParameterCount
from train.activation_memory import activation_bytes
from train.config import RunConfig
from train.run_directory import format_bytes

_FLOAT32 = 4


class Layout(NamedTuple):
    """One way of sharing out, and the bytes of each rank; all_to_all_bytes: sent by one rank in
    one optimizer step."""

    expert_parallel_size: int
    zero_stage: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    all_to_all_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of weights, gradients, optimizer and the activations of one micro-batch."""
        state = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return state + self.activation_bytes


def possible_sizes(num_experts: int, world_size: int) -> list[int]:
    """Expert-parallel sizes that divide both."""
    return [n for n in range(1, world_size + 1) if world_size % n == 0 == num_experts % n]


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of all experts of all layers."""
    each = 3 * model.hidden_size * model.moe.intermediate_size
    return len(model.moe_layers) * model.moe.num_experts * each


def plan_layouts(
    config: RunConfig,
    model: ModelConfig,
    count: ParameterCount,
    world_size: int,
    compute_bytes: int,
) -> list[Layout]:
    """Every way of sharing the model out over a number of ranks.

    Args:
        model: with its vocab_size known. count: its parameters.
        compute_bytes: of one number in the matmuls, 2 in bfloat16 and 4 in float32.
    Raises:
        ConfigError: if the batch does not divide among the ranks.
    """
    passes = config.micro_batches_per_rank(world_size)
    micro_batch = config.training.batch_size // world_size // passes
    training = config.training.model_copy(update={"micro_batch_size": micro_batch})
    here = config.model_copy(update={"training": training})
    sizes = possible_sizes(model.moe.num_experts, world_size) if model.moe_layers else [1]
    experts = expert_parameters(model)
    share = -(-count.total // world_size)
    layouts = []
    for size in sizes:
        held = count.total - experts + experts // size
        sent = _all_to_all_bytes(here, model, size, passes, compute_bytes)
        kept = activation_bytes(here, model, compute_bytes)
        for stage in (0, 1, 2, 3):
            layouts.append(
                Layout(
                    expert_parallel_size=size,
                    zero_stage=stage,
                    weight_bytes=_FLOAT32 * (held if stage < 3 else share),
                    gradient_bytes=_FLOAT32 * (held if stage < 2 else share),
                    # From stage 1 on the optimizer has a copy of its share of the weights.
                    optimizer_bytes=_FLOAT32 * (2 * held if stage == 0 else 3 * share),
                    activation_bytes=kept,
                    all_to_all_bytes=sent,
                )
            )
    return layouts


def _all_to_all_bytes(
    config: RunConfig, model: ModelConfig, size: int, passes: int, compute_bytes: int
) -> int:
    """Rows there and back in the forward and the backward pass, to other ranks; even routing."""
    tokens = passes * config.micro_batch_size * config.training.seq_len
    rows = tokens * model.top_k * len(model.moe_layers)
    messages = 6 if config.training.activation_checkpointing else 4
    return messages * rows * model.hidden_size * compute_bytes * (size - 1) // size


def describe_layouts(layouts: list[Layout], memory: int | None) -> str:
    """A table for a person.

    Args: memory: bytes of one device, to say what fits; None leaves that out.
    """
    head = ("experts over", "ZeRO", "weights", "gradients", "optimizer", "activations")
    head += ("together", "sent a step", *(() if memory is None else ("fits",)))
    rows = [head]
    for at in layouts:
        parts = (
            at.weight_bytes,
            at.gradient_bytes,
            at.optimizer_bytes,
            at.activation_bytes,
            at.total_bytes,
            at.all_to_all_bytes,
        )
        row = (str(at.expert_parallel_size), str(at.zero_stage), *map(format_bytes, parts))
        fits = () if memory is None else ("yes" if at.total_bytes <= memory else "no",)
        rows.append((*row, *fits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
