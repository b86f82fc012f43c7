"""Which way of sharing a model out over ranks fits, and what does it cost each rank?

Parameters that a rank holds, 4 bytes each, with P outside the experts, X in all experts, W ranks
and N that share the experts:

    stage   weights     gradients   optimizer
    0       P + X/N     P + X/N     2 (P + X/N)      two moments
    1       P + X/N     P + X/N     3 (P + X)/W      and a copy of the weights
    2       P + X/N     (P + X)/W   3 (P + X)/W
    3       (P + X)/W   (P + X)/W   3 (P + X)/W

What `deepspeed.zero_optimization` offloads (`offload_optimizer`, `offload_param`) is in the host's
memory. Buckets are left out, and what stage 3 gathers: by DeepSpeed's defaults it keeps up to 1e9
gathered numbers (`stage3_max_live_parameters`, `stage3_max_reuse_distance`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from moe.config import ModelConfig
from moe.model import ParameterCount
from train.activation_memory import activation_bytes
from train.config import RunConfig
from train.deepspeed_config import offloaded_parts
from train.run_directory import format_bytes
from train.status import format_table

_FLOAT32 = 4


class Layout(NamedTuple):
    """One way of sharing out, and the bytes of each rank; all_to_all_bytes: sent by one rank in
    one optimizer step; host_bytes: of weights and optimizer, offloaded from the device."""

    expert_parallel_size: int
    zero_stage: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    all_to_all_bytes: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        """On the device: weights, gradients, optimizer, activations of one micro-batch."""
        state = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return state + self.activation_bytes - self.host_bytes


def possible_sizes(num_experts: Sequence[int], world_size: int) -> list[int]:
    """Expert-parallel sizes that divide the experts of every layer and the ranks; 1 without
    experts."""
    common = math.gcd(world_size, *num_experts) if num_experts else 1
    return [size for size in range(1, common + 1) if common % size == 0]


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
    sizes = possible_sizes(model.experts_of_layers, world_size)
    share = -(-count.total // world_size)
    layouts = []
    for size in sizes:
        held = count.total - count.experts + count.experts // size
        sent = _all_to_all_bytes(here, model, size, passes, compute_bytes)
        kept = activation_bytes(here, model, compute_bytes, shares=size)
        for stage in (0, 1, 2, 3):
            weights = _FLOAT32 * (held if stage < 3 else share)
            # From stage 1 on the optimizer has a copy of its share of the weights.
            optimizer = _FLOAT32 * (2 * held if stage == 0 else 3 * share)
            offloaded = offloaded_parts(config, stage)
            layouts.append(
                Layout(
                    expert_parallel_size=size,
                    zero_stage=stage,
                    weight_bytes=weights,
                    gradient_bytes=_FLOAT32 * (held if stage < 2 else share),
                    optimizer_bytes=optimizer,
                    activation_bytes=kept,
                    all_to_all_bytes=sent,
                    host_bytes=weights * ("offload_param" in offloaded)
                    + optimizer * ("offload_optimizer" in offloaded),
                )
            )
    return layouts


def _all_to_all_bytes(
    config: RunConfig, model: ModelConfig, size: int, passes: int, compute_bytes: int
) -> int:
    """Rows there and back in each forward and backward pass, to other ranks; even routing.

    A row has D numbers, of latent experts l.
    """
    tokens = passes * config.micro_batch_size * config.training.seq_len
    rows = tokens * sum(model.top_k_of_layers)
    messages = 4
    messages += 2 * config.training.activation_checkpointing
    messages += 2 * config.exact_counts_needed(passes)
    return messages * rows * model.expert_hidden_size * compute_bytes * (size - 1) // size


def describe_layouts(layouts: list[Layout], memory: int | None) -> str:
    """A table for a person.

    Args: memory: bytes of one device, to say what fits; None leaves that out.
    """
    head: tuple[str, ...] = ("experts over", "ZeRO", "weights", "gradients", "optimizer")
    head += ("activations", "on the device", "on the host", "tokens sent a step")
    head += () if memory is None else ("fits",)
    rows: list[tuple[str, ...]] = [head]
    for at in layouts:
        parts = (
            at.weight_bytes,
            at.gradient_bytes,
            at.optimizer_bytes,
            at.activation_bytes,
            at.device_bytes,
            at.host_bytes,
            at.all_to_all_bytes,
        )
        row = (str(at.expert_parallel_size), str(at.zero_stage), *map(format_bytes, parts))
        fits = () if memory is None else ("yes" if at.device_bytes <= memory else "no",)
        rows.append((*row, *fits))
    return format_table(rows, str.rjust)
