"""Which rank is this process, among how many, and how do ranks agree?

`deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without
them the program is the only process.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from train.config import RunConfig
from train.errors import ConfigError, PeerError, RunError

# Brings a value of each rank to all of them, in their order.
Gather = Callable[[Any], list[Any]]
_PATIENCE_SECONDS = 5.0
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks(NamedTuple):
    """This process among all: `rank` of `world_size`, the `local_rank`-th of `local_world_size` on
    its machine."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1


def launched_ranks(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What the launcher that started this process says; None without one.

    Raises:
        ConfigError: if it says only a part of it, or no numbers.
    """
    found = [name for name in _VARIABLES if environment.get(name)]
    # A shell may hold WORLD_SIZE or MASTER_ADDR for other reasons; a launcher sets these two.
    if "RANK" not in found and "LOCAL_RANK" not in found:
        return None
    missing = [name for name in _VARIABLES if name not in found]
    if missing:
        raise ConfigError(
            f"the environment has {', '.join(found)} but not {', '.join(missing)}: start with "
            f"`deepspeed --module` or `torchrun`, or unset them to run one process"
        )
    values = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environment[name].isascii() or not environment[name].isdigit():
            raise ConfigError(f"the environment's {name} ({environment[name]!r}) is no number")
        values[name] = int(environment[name])
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ConfigError(
            f"the environment's RANK ({values['RANK']}) must be below WORLD_SIZE "
            f"({values['WORLD_SIZE']})"
        )
    # As torchrun calls it, and as DeepSpeed's launcher does.
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE", "")
    local_world_size = int(local) if local.isascii() and local.isdigit() and int(local) else 1
    return Ranks(values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"], local_world_size)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """A block that fails on every rank alike: rank 0 says it, and the launcher ends the others,
    which speak after a while if there is none."""
    try:
        yield
    except PeerError:
        raise
    except RunError:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE_SECONDS)
        raise


def gather(value: Any) -> list[Any]:
    """The picklable values of all ranks, in their order, on every rank; of one process, its own."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def agreeing(gather: Gather) -> Iterator[None]:
    """A block that all ranks go through: where one fails, all do, and none waits for it.

    Raises:
        PeerError: on the ranks that did not fail themselves.
    """
    error = None
    try:
        yield
    except Exception as own:
        error = own
    told = None if error is None else (str(error), getattr(error, "exit_code", 1))
    others = gather(told)
    if error is not None:
        raise error
    for number, said in enumerate(others):
        if said is not None:
            raise PeerError(f"rank {number}: {said[0]}", said[1])


def check_layout(config: RunConfig, ranks: Ranks) -> None:
    """Refuse what cannot be shared out over these ranks.

    Raises:
        ConfigError: naming the settings.
    """
    size, model = config.parallel.expert_parallel_size, config.model
    problems = []
    if ranks.world_size % size:
        problems.append(
            f"parallel.expert_parallel_size ({size}) must divide the number of ranks "
            f"({ranks.world_size}); lower it, or start a multiple of {size} ranks"
        )
    # Layers that share a setting are told of once.
    num_experts = {
        model.setting("num_experts", layer): model.at(layer).moe.num_experts
        for layer in model.moe_layers
    }
    problems += [
        f"parallel.expert_parallel_size ({size}) must divide {setting} ({number}); change one of "
        f"them"
        for setting, number in num_experts.items()
        if number % size
    ]
    if size > 1 and not model.moe_layers:
        problems.append(
            f"parallel.expert_parallel_size ({size}) has no effect without routed experts "
            f"(model.feed_forward: dense); leave it out"
        )
    try:
        config.micro_batches_per_rank(ranks.world_size)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
