"""What will a run cost? Sizes, FLOPs and memory of a config, computed without training.

python -m train.plan --config FILE [section.key=value ...] [--world-size N] [--gpu-memory GIB]
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moe.config import ModelConfig
from moe.model import MoETransformer, ParameterCount, flops_per_token, num_parameters
from train.activation_memory import activation_bytes
from train.arguments import parse_arguments
from train.config import RunConfig, dump_config, load_config
from train.deepspeed_config import check_user_settings
from train.errors import ConfigError, OutOfMemoryError
from train.layouts import describe_layouts, plan_layouts
from train.program import first_line, guarded, is_out_of_memory
from train.ranks import Ranks
from train.routes import recording_bytes
from train.run_directory import format_bytes
from train.tokenizer import planned_vocab_size, with_vocab_size

_FLOAT32 = 4


class Plan(NamedTuple):
    """parameters as counted by `moe.model`; bytes by part, and of one number in the matmuls; ranks:
    of a launcher, whose memory each these bytes are; host_bytes: of these, off the device;
    routes_bytes: of a recording of all steps; is_upper_bound: active parameters and FLOPs are the
    most there can be, as nobody knows how many experts a token will have."""

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
    is_upper_bound: bool = False
    ranks: Ranks | None = None
    host_bytes: int = 0
    routes_bytes: int = 0

    @property
    def at_most(self) -> str:
        """What stands before active parameters and FLOPs."""
        return "at most " if self.is_upper_bound else ""

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and moments: however large the batch is."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of state and activations that are not offloaded."""
        return self.state_bytes - self.host_bytes + self.activation_bytes

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.tokens_per_step * self.num_steps


def make_plan(
    config: RunConfig, model_config: ModelConfig, compute_bytes: int, ranks: Ranks | None = None
) -> Plan:
    """Plan a run.

    Args:
        model_config: with its vocab_size known. compute_bytes: of one number in the matmuls, 2 in
            bfloat16 and 4 in float32. ranks: of a launcher; the memory is that of one rank then.
    """
    with torch.device("meta"):
        model = MoETransformer(model_config)
    count = num_parameters(model)
    plan = Plan(
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
        is_upper_bound=bool(model_config.moe_layers) and not model_config.knows_experts_per_token,
        ranks=ranks,
        routes_bytes=recording_bytes(config, model_config),
    )
    if ranks is None:
        return plan
    wanted = config.parallel.expert_parallel_size, config.parallel.zero_stage
    layouts = plan_layouts(config, model_config, count, ranks.world_size, compute_bytes)
    (layout,) = (at for at in layouts if at[:2] == wanted)
    return plan._replace(
        weight_bytes=layout.weight_bytes,
        gradient_bytes=layout.gradient_bytes,
        optimizer_bytes=layout.optimizer_bytes,
        activation_bytes=layout.activation_bytes,
        host_bytes=layout.host_bytes,
    )


def check_memory(plan: Plan, device: str) -> None:
    """Refuse what cannot fit: the system would end a run that outgrows it without a word.

    Raises:
        OutOfMemoryError: if weights, gradients and moments alone need more than the machine has.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if plan.ranks is not None:
        host //= plan.ranks.local_world_size
    needs = [("cpu", plan.state_bytes, host)]
    if device == "cuda":
        on_device = plan.state_bytes - plan.host_bytes
        needs = [
            (device, on_device, torch.cuda.mem_get_info()[1]),
            ("the host, for each rank,", plan.host_bytes, host),
        ]
    for place, needed, available in needs:
        if needed > available:
            raise OutOfMemoryError(
                f"out of memory (weights, gradients and optimizer need "
                f"{format_bytes(needed)}, {place} has {format_bytes(available)}); "
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
        state_bytes = plan.state_bytes - plan.host_bytes
        needs = (
            f"by the plan, activations need {format_bytes(plan.activation_bytes)}, weights, "
            f"gradients and optimizer {format_bytes(state_bytes)}"
        )
        # What is a fifth of all or less would not help; of the rest, the larger part first.
        parts = [
            (plan.activation_bytes, _fewer_activations(plan, config, model)),
            (state_bytes, _smaller_model(plan)),
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
        shares = 1 if plan.ranks is None else config.parallel.expert_parallel_size
        kept = activation_bytes(
            config.model_copy(update={"training": again}),
            model,
            plan.compute_bytes,
            shares=shares,
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
    each = "" if plan.ranks is None else " of a rank"
    most, least = plan.at_most, "at least " if plan.is_upper_bound else ""
    rows = [
        ("parameters, total", format_count(parameters.total)),
        ("parameters, active a token", most + format_count(parameters.active)),
        ("parameters, embedding and head", format_count(parameters.embedding)),
        ("FLOPs a token, forward", most + format_count(plan.flops_per_token / 3)),
        ("FLOPs a token, training", most + format_count(plan.flops_per_token)),
        (f"memory{each}: weights (float32)", format_bytes(plan.weight_bytes)),
        (f"memory{each}: gradients", format_bytes(plan.gradient_bytes)),
        (f"memory{each}: optimizer", format_bytes(plan.optimizer_bytes)),
        (f"memory{each}: activations of a micro-batch", format_bytes(plan.activation_bytes)),
        (f"memory{each}: together", format_bytes(plan.device_bytes)),
        *([("offloaded to the host", format_bytes(plan.host_bytes))] if plan.host_bytes else []),
        ("disk a checkpoint", format_bytes(plan.checkpoint_bytes)),
        *([("disk recorded routes", format_bytes(plan.routes_bytes))] if plan.routes_bytes else []),
        ("tokens a step", f"{plan.tokens_per_step:,}"),
        ("steps", f"{plan.num_steps:,}"),
        ("tokens", format_count(plan.tokens)),
        ("tokens an active parameter", f"{least}{plan.tokens / parameters.active:.2f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--world-size", type=int, metavar="N", help="ranks that share it")
        parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of a device")

    options, overrides = parse_arguments(argv, __doc__ or "", add_options)

    def program() -> int:
        config = load_config(options.config, overrides)
        if options.print_config:
            print(dump_config(config), end="")
            return 0
        for name, value in (
            ("--world-size", options.world_size),
            ("--gpu-memory", options.gpu_memory),
        ):
            if value is not None and not 0 < value < 2**20:
                raise ConfigError(f"{name} ({value}) must be above 0 and below {2**20}")
        check_user_settings(config)
        model = with_vocab_size(config.model, planned_vocab_size(config.tokenizer))
        compute_bytes = 4 if config.training.precision == "float32" else 2
        plan = make_plan(config, model, compute_bytes)
        print(describe_plan(plan))
        if options.world_size is not None:
            memory = None if options.gpu_memory is None else int(options.gpu_memory * 2**30)
            layouts = plan_layouts(
                config, model, plan.parameters, options.world_size, compute_bytes
            )
            print(f"\neach of {options.world_size} ranks:")
            print(describe_layouts(layouts, memory))
        return 0

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
