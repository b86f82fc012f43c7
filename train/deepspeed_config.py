"""What is DeepSpeed told? Its configuration, from ours and the user's `deepspeed:` beside it."""

import copy
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from train.config import RunConfig
from train.errors import ConfigError
from train.ranks import Ranks

# What follows from our own settings, and where the user says it instead.
DERIVED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "zero_allow_untested_optimizer": "optimizer",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "expert_parallel": "parallel.expert_parallel_size",
    "checkpoint": "checkpoint",
}
# What lays weights or gradients out in ways that our checkpoints and norms do not read.
REFUSED = (
    "zero_optimization.round_robin_gradients",
    "zero_optimization.module_granularity_threshold",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zenflow",
    "tensor_parallel",
    "use_data_before_expert_parallelism",
    "managed_gradient_accumulation",
)


# Old names of the next two.
DEPRECATED = ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")
# From which stage something can be offloaded, and what can be said of it. Not to NVMe: DeepSpeed
# keeps it there in files of its own, which our checkpoints do not read.
OFFLOAD = {"offload_optimizer": 1, "offload_param": 3}
OFFLOAD_SETTINGS = ("device", "pin_memory")
# Further sections that a user may set; what no one has tried may change the arithmetic.
ALLOWED = (
    "zero_optimization",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "tensorboard",
    "wall_clock_breakdown",
)


def derive_config(config: RunConfig, ranks: Ranks, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration: ours where we have a setting, the user's `deepspeed:` beside it.

    Raises:
        ConfigError: if `deepspeed:` sets what follows from our settings or cannot be, or the batch
            does not divide among the ranks.
    """
    check_user_settings(config)
    user = copy.deepcopy(config.deepspeed)
    passes = config.micro_batches_per_rank(ranks.world_size)
    stage, clip = config.parallel.zero_stage, config.optimizer.gradient_clip
    derived: dict[str, Any] = {
        "train_batch_size": config.training.batch_size,
        "train_micro_batch_size_per_gpu": config.training.batch_size // ranks.world_size // passes,
        "gradient_accumulation_steps": passes,
        # At stage 0 DeepSpeed's norm counts one rank's experts for all: there we clip ourselves.
        "gradient_clipping": clip if clip is not None and stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        # Offloaded, PyTorch's optimizer stays too: DeepSpeed's would be compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": precision == "bfloat16",
            "dtype": "bfloat16",
            # None: gradients travel in float32.
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the device in every pass.
        "timers": {"throughput": {"enabled": False}},
    }
    zero = {"stage": stage, **user.pop("zero_optimization", {})}
    return {**derived, "zero_optimization": zero, **user}


def check_user_settings(config: RunConfig) -> None:
    """Refuse settings of `deepspeed:` that we make ourselves, or that it cannot have here.

    Raises:
        ConfigError: with a line for each.
    """
    user = config.deepspeed
    zero = user.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f"deepspeed.zero_optimization ({zero!r}) must be a mapping of settings; the stage is "
            f"parallel.zero_stage"
        )
    problems = []
    known = {*ALLOWED, *(path for path in (*DERIVED, *REFUSED) if "." not in path)}
    for key in user.keys() - known:
        near = get_close_matches(str(key), ALLOWED, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(f"deepspeed.{key} is not passed on; {hint}there are {', '.join(ALLOWED)}")
    for path in (*DERIVED, *REFUSED):
        *above, key = path.split(".")
        place = zero if above else user
        if key not in place:
            continue
        found = f"deepspeed.{path} ({place[key]})"
        if path in DERIVED:
            setting = DERIVED[path]
            problems.append(f"{found} follows from {setting}: leave it out, and set {setting}")
        else:
            problems.append(f"{found} does not work with this program's checkpoints: leave it out")
    problems += _offload_problems(zero, config.parallel.zero_stage)
    if problems:
        raise ConfigError("\n".join(problems))


def offloaded_parts(config: RunConfig, stage: int) -> set[str]:
    """Which of `offload_optimizer` and `offload_param` a ZeRO stage would keep on the host."""
    zero = config.deepspeed.get("zero_optimization", {})
    return {
        section
        for section, first_stage in OFFLOAD.items()
        if stage >= first_stage and zero.get(section, {}).get("device") == "cpu"
    }


def _offload_problems(zero: dict[str, Any], stage: int) -> Iterator[str]:
    for key in DEPRECATED:
        if key in zero:
            yield (
                f"deepspeed.zero_optimization.{key} ({zero[key]}) is an old name: set "
                f"{' or '.join(f'{section}.device' for section in OFFLOAD)} instead"
            )
    for section, first_stage in OFFLOAD.items():
        if section not in zero:
            continue
        found, where = zero[section], f"deepspeed.zero_optimization.{section}"
        if not isinstance(found, dict):
            yield f"{where} ({found!r}) must be a mapping, such as {{device: cpu}}"
            continue
        for key in found.keys() - set(OFFLOAD_SETTINGS):
            yield f"{where}.{key} is not passed on; there are {', '.join(OFFLOAD_SETTINGS)}"
        if found.get("device") not in ("cpu", "none"):
            yield f"{where}.device ({found.get('device')}) must be cpu or none"
        elif found["device"] == "cpu" and stage < first_stage:
            yield f"{where} needs parallel.zero_stage {first_stage} or more, it is {stage}"
