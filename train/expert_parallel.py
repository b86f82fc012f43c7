"""How are experts shared out over ranks, and how does DeepSpeed know?

World W, expert parallelism N. Ranks r, r+1, ..., r+N-1 with r a multiple of N form an expert group:
each holds E/N experts of every layer, and they exchange tokens. Ranks with the same place in their
groups hold the same experts: their expert-data group sums these experts' gradients.

    W 4, N 2        rank 0           rank 1           rank 2           rank 3
    experts         0 .. E/2-1       E/2 .. E-1       0 .. E/2-1       E/2 .. E-1
    expert groups   [0 1] exchange tokens             [2 3]
    expert-data     [0 2] sum the gradients of the first half, [1 3] of the second
    data            [0 1 2 3] sum the gradients of everything else

DeepSpeed finds a layer by its class alone (`AutoEPMoELayer`), and its experts by attributes of
three parameters w1, w2, w3: what stands here follows deepspeed 0.19 and is held by
`tests/test_deepspeed_contract.py`.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.dispatcher import expert_parallel_dispatch
from moe.layer import MoELayer
from moe.routing import Routing
from moe.variants import load_variant
from train.errors import ConfigError, StalledError
from train.ranks import Ranks
from train.work_clock import WorkClock

# What gloo says of a peer that has ended, and of one that does not answer.
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_LOST = (*_CLOSED, "Timed out", "timed out")


def connect(device: str, ranks: Ranks, timeout_minutes: float) -> None:
    """Join the other ranks. On a CPU nothing is compiled for it.

    Args: timeout_minutes: of every operation between ranks.
    Raises:
        ConfigError: if there are more ranks on this machine than GPUs.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Of PyTorch's collectives that DeepSpeed calls by their older names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    # An all-reduce for inference, for which DeepSpeed would compile C++ at its first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device == "cpu" else "nccl"
    if device == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {ranks.local_rank} has no GPU: this machine has "
                f"{torch.cuda.device_count()}; start as many ranks on it at most"
            )
        torch.cuda.set_device(ranks.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def disconnect() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def peer_errors(rank: int, timeout_minutes: float) -> Iterator[None]:
    """What PyTorch raises where another rank is gone or does not answer, as one line.

    Raises:
        StalledError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, dist.DistError) or any(phrase in text for phrase in _LOST)
        if not lost:
            raise
        closed = any(phrase in text for phrase in _CLOSED)
        happened = (
            "another rank has ended"
            if closed
            else f"another rank has not answered within parallel.timeout_minutes "
            f"({timeout_minutes:g})"
        )
        raise StalledError(
            f"rank {rank}: {happened}; what it said may stand above, or in its exit_rank_N.json. "
            f"Run again to go on from the last checkpoint"
        ) from error


class ExpertGroups:
    """The expert and expert-data groups of this process; made once for each size.

    Attributes:
        size: N. name: DeepSpeed's. rank: this process's place in its expert group.
        group, data_group: its expert group and its expert-data group. clock: of this rank's work.
    """

    def __init__(self, size: int, timeout_minutes: float, clock: WorkClock):
        from deepspeed.utils import groups

        self.size, self.name, self.clock = size, f"ep_size_{size}", clock
        if self.name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(size)
        self.group = groups._get_expert_parallel_group(self.name)
        self.data_group = groups._get_expert_data_parallel_group(self.name)
        self.rank = groups._get_expert_parallel_rank(self.name)
        # DeepSpeed gives all but the world's the default, 30 minutes.
        for group in (self.group, self.data_group, groups._get_data_parallel_group()):
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)

    def first_expert(self, num_experts: int, rank: int) -> int:
        """Global number of the first expert of each layer on a rank."""
        return rank % self.size * (num_experts // self.size)


def expert_parallel_layer(groups: ExpertGroups) -> type[MoELayer]:
    """The MoELayer of a model whose experts are shared out over `groups`."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class ExpertParallelMoELayer(MoELayer, AutoEPMoELayer):
        """Routed experts, of which this process holds an equal share. DeepSpeed's own constructor
        and forward are not used."""

        def __init__(self, config: ModelConfig):
            MoELayer.__init__(self, config)
            self.num_experts = config.moe.num_experts
            self.ep_size, self.ep_rank = groups.size, groups.rank
            self.ep_group_name, self.ep_group = groups.name, groups.group
            others: list[Any] = [p for p in self.parameters() if not is_expert(p)]
            for parameter in others:
                parameter.allreduce, parameter.ds_zero_placement_family = True, "replicated"

        def build_experts(self, config: ModelConfig) -> nn.Module:
            moe = config.moe
            self.num_local_experts = moe.num_experts // groups.size
            self.first_expert = groups.first_expert(moe.num_experts, groups.rank)
            module = load_variant("experts", moe.experts.name)
            # As they are made: what DeepSpeed partitions at once it must know by then.
            with parameters_seen(partial(_mark_expert, groups)):
                return module.Experts(
                    moe.experts,
                    self.num_local_experts,
                    config.expert_hidden_size,
                    moe.intermediate_size,
                )

        def dispatch(
            self, x: Tensor, routing: Routing, shared: Callable[[], Tensor] | None
        ) -> tuple[Tensor, Tensor | None]:
            if groups.size == 1:
                return MoELayer.dispatch(self, x, routing, shared)
            return expert_parallel_dispatch(
                self.experts,
                x,
                routing,
                groups.group,
                backend=self.backend,
                meanwhile=shared,
                waiting=groups.clock.waiting,
            )

        def forward(self, x: Tensor, context: Any) -> tuple[Tensor, Routing]:
            return MoELayer.forward(self, x, context)

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """Called by the engine; the groups are known already."""

    return ExpertParallelMoELayer


def _mark_expert(groups: ExpertGroups, parameter: nn.Parameter) -> None:
    """Tell DeepSpeed that a parameter is one rank's experts."""
    marked: Any = parameter
    marked.allreduce, marked.group_name = False, groups.name
    marked.ds_zero_placement_family = "autoep_expert"
    marked.ds_zero_partition_group_name = groups.name
    marked.ds_zero_partition_process_group = groups.data_group


@contextlib.contextmanager
def parameters_seen(see: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """A block in which each parameter that a module gets is shown to `see` first."""

    def hook(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            see(parameter)

    handle = nn.modules.module.register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A block in which the parameters of a module are whole, also where stage 3 has partitioned
    them; what rank 0 of each group makes of them is theirs afterwards."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = list(module.parameters())
    # Each call takes parameters of one group.
    experts = [p for p in parameters if is_expert(p)]
    others = [p for p in parameters if not is_expert(p)]
    with contextlib.ExitStack() as stack:
        for each in (experts, others):
            if each:
                stack.enter_context(GatheredParameters(each, modifier_rank=0))
        yield


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether other ranks hold other experts in place of this parameter."""
    return not getattr(parameter, "allreduce", True)


def split_expert_groups(param_groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizer groups in which experts and everything else are apart, as DeepSpeed wants them."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    named = [{**group, "name": f"group_{i}"} for i, group in enumerate(param_groups)]
    split = split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in split if group["params"]]
