"""How does DeepSpeed run our model? The engine of many ranks, at ZeRO stages 0 to 3.

Every rank reads its share of the batch, and the loss of a pass is that pass's share of the whole
step's (`moe.model.BatchTotals`): so gradients are sums over ranks, whatever each rank holds.
DeepSpeed divides them by the number of ranks, which `backward` makes up for.
"""

import contextlib
import copy
import logging
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model import BatchTotals, ModelOutput, MoETransformer, init_weights
from train.config import RunConfig
from train.deepspeed_config import derive_config
from train.engine import (
    TensorGroups,
    build_optimizer,
    model_state,
    parameter_groups,
    refuse_misfits,
    routes_of,
)
from train.errors import CheckpointError, ConfigError
from train.expert_names import expert_name
from train.expert_parallel import (
    ExpertGroups,
    expert_parallel_layer,
    gathered,
    is_expert,
    split_expert_groups,
)
from train.fragments import (
    Part,
    fill,
    first_experts,
    gradient_of,
    held_parts,
    local_shape,
    moments_of,
    split_part,
)
from train.metrics import NORM_GROUPS, norm_group
from train.packing import Batch
from train.program import first_line
from train.ranks import Ranks, gather
from train.run_directory import format_bytes
from train.status import format_layers, format_table
from train.stored_tensors import moments_by_key
from train.work_clock import WorkClock

# What DeepSpeed raises over a setting of the user's, depending on where it notices.
_WRONG_SETTING = (ValidationError, ValueError, TypeError, AttributeError, AssertionError, OSError)
# Ranks that the table at the start lists.
_MOST_ROWS = 16


def build_deepspeed_engine(
    config: RunConfig,
    model_config: ModelConfig,
    ranks: Ranks,
    device: str,
    precision: str,
    kernels: str,
) -> "DeepSpeedEngine":
    """Model, groups and engine of this rank; the process group is joined already."""
    if device == "cuda":
        device = f"cuda:{ranks.local_rank}"
    parallel = config.parallel
    # Stage 3 gathers weights in the midst of a forward pass, where a slow rank slows all.
    clock = WorkClock(device, counts=parallel.zero_stage < 3)
    groups = ExpertGroups(parallel.expert_parallel_size, parallel.timeout_minutes, clock)
    derived = checked_config(config, ranks, precision)
    model = build_model(model_config, config.seed, groups, device, derived)
    return DeepSpeedEngine(
        model,
        config,
        ranks,
        groups,
        device=device,
        precision=precision,
        kernels=kernels,
        derived=derived,
    )


def build_model(
    config: ModelConfig, seed: int, groups: ExpertGroups, device: str, derived: dict[str, Any]
) -> MoETransformer:
    """This rank's model, initialised. At stage 3 each module is partitioned as soon as it is made,
    so that no rank needs room for the whole model."""
    import deepspeed

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.device(device))
        if derived["zero_optimization"]["stage"] == 3:
            # Without a dtype: on a CPU it takes any that is given for bfloat16.
            partition = deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(derived))
            stack.enter_context(partition)
        model = MoETransformer(config, moe_layer=expert_parallel_layer(groups))
    init_weights(model, seed, gathered)
    return model


def checked_config(config: RunConfig, ranks: Ranks, precision: str) -> dict[str, Any]:
    """What DeepSpeed is told, once it has looked at it.

    Raises:
        ConfigError: with what it says of a setting.
    """
    import deepspeed

    derived = derive_config(config, ranks, precision)
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(derived))
    except _WRONG_SETTING as error:
        raise ConfigError(f"deepspeed: {explain_settings(error)}") from error
    return derived


def explain_settings(error: Exception) -> str:
    """What DeepSpeed says of a setting that it does not take, in one line."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))} ({each['input']!r}): {each['msg']}"
        for each in error.errors()
    )


class DeepSpeedEngine:
    """Many ranks: ZeRO stages 0 to 3, experts shared out. See `train.engine.Engine`."""

    shared_out = True

    def __init__(
        self,
        model: MoETransformer,
        config: RunConfig,
        ranks: Ranks,
        groups: ExpertGroups,
        *,
        device: str,
        precision: str,
        kernels: str,
        derived: dict[str, Any],
    ):
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.model, self.device = model, torch.device(device)
        self.precision, self.kernels = precision, kernels
        self.groups, self.stage = groups, config.parallel.zero_stage
        self.clock = groups.clock
        self.gradient_clip = config.optimizer.gradient_clip
        model.activation_checkpointing = config.training.activation_checkpointing
        param_groups = split_expert_groups(parameter_groups(model, config.optimizer))
        optimizer = build_optimizer(param_groups, config.optimizer)
        try:
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=list(model.parameters()),
                config=derived,
                dist_init_required=False,
            )
            if "compile" in config.deepspeed:
                self.engine.compile()
        except _WRONG_SETTING as error:
            if not config.deepspeed:
                raise
            raise ConfigError(f"deepspeed: {explain_settings(error)}") from error
        if config.model.moe_layers and not self.engine.has_moe_layers:
            raise RuntimeError("DeepSpeed does not see the model's experts")

    def describe(self) -> str:
        """A table of the ranks: where each runs, which experts it holds, with whom it shares."""
        num_experts, size = self.model.config.experts_of_layers, self.groups.size
        held = sum(part.weights.numel() for part in held_parts(self.engine, self.stage))
        facts = self.gather((socket.gethostname(), str(self.device), held))
        rows = [("rank", "machine", "device", "experts", "tokens with", "optimizer's weights")]
        for rank, (machine, device, numbers) in enumerate(facts[:_MOST_ROWS]):
            firsts = [(self.groups.first_expert(n, rank), n // size) for n in num_experts]
            experts = format_layers(f"{first} to {first + n - 1}" for first, n in firsts) or "none"
            peers = rank - rank % size
            sharing = f"ranks {peers} to {peers + size - 1}" if size > 1 else "nobody"
            weights = format_bytes(4 * numbers)
            rows.append((str(rank), machine, device, experts, sharing, weights))
        more = "" if len(facts) <= _MOST_ROWS else f"\n... and {len(facts) - _MOST_ROWS} more"
        return f"{self.world_size} ranks, ZeRO stage {self.stage}:\n{format_table(rows)}{more}"

    def __call__(self, batch: Batch, totals: BatchTotals | None = None) -> ModelOutput:
        """One forward pass over a micro-batch of this rank."""
        return self.engine(
            batch.input_ids.to(self.device, non_blocking=True),
            batch.labels.to(self.device, non_blocking=True),
            batch.document_ids.to(self.device, non_blocking=True),
            totals=totals,
            routes=routes_of(batch, self.model.config, self.device),
            noise_seeds=batch.noise_seeds,
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the step's loss."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients of all parameters on all ranks, () float32."""
        return self.norms(gradients=True).square().sum().sqrt().float()

    def norms(self, *, gradients: bool) -> Tensor:
        """L2 norms of the gradients, or of the weights, of each of NORM_GROUPS: (3,) float64."""
        totals = torch.zeros(len(NORM_GROUPS), dtype=torch.float64, device=self.device)
        for part in held_parts(self.engine, self.stage):
            values = gradient_of(self.stage, part) if gradients else part.weights
            if values is None:
                continue
            # Stage 0 holds whole gradients: everything but experts on every rank, these on each
            # rank of an expert-data group. From stage 1 on each number is on one rank.
            copies = 1
            if self.stage == 0:
                copies = self.world_size // (self.groups.size if is_expert(part.parameter) else 1)
            place = NORM_GROUPS.index(norm_group(part.name))
            totals[place] += torch.linalg.vector_norm(values, dtype=torch.float64).square() / copies
        return self.all_reduce(totals).sqrt()

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Clip to `optimizer.gradient_clip` and update the weights."""
        clip = self.gradient_clip
        if self.stage == 0 and clip is not None and float(gradient_norm) > clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, gradient_norm)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def zero_grad(self) -> None:
        """Forget the gradients, those of a dropped step too."""
        optimizer = self.engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self.stage in (1, 2):
            for group in list(optimizer.averaged_gradients):
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = -1

    # The model calls it in its forward pass; whoever compiles that need not look into the clock.
    @torch.compiler.disable
    def all_reduce(self, x: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum, or maximum, over ranks."""
        x = x.clone()
        with self.clock.waiting():
            dist.all_reduce(x, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
        return x

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is True on any rank, the same answer on all."""
        flags = torch.tensor(int(flag), device=self.device)
        return bool(self.all_reduce(flags))

    def from_rank_0(self, x: Tensor) -> Tensor:
        """What rank 0 has there."""
        x = x.contiguous()
        dist.broadcast(x, 0)
        return x

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in their order, on every rank."""
        return gather(value)

    def nonfinite_weights(self) -> list[str]:
        """Names of the weights, on any rank, that hold inf or NaN, in the order of the forward."""
        parts = held_parts(self.engine, self.stage)
        return self._nonfinite((part, part.weights) for part in parts)

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds inf or NaN, in the same order."""
        parts = held_parts(self.engine, self.stage)
        return self._nonfinite((part, gradient_of(self.stage, part)) for part in parts)

    def _nonfinite(self, parts: Iterable[tuple[Part, Tensor | None]]) -> list[str]:
        here = [
            fragment.name
            for part, values in parts
            if values is not None and not torch.isfinite(values).all()
            for fragment in split_part(part, values)
            if not torch.isfinite(fragment.values).all()
        ]
        found = {name for names in self.gather(here) for name in names}
        return [name for name in self.state_shapes() if name in found]

    def state_shapes(self) -> dict[str, torch.Size]:
        """Shapes of all weights of the whole model, in the order of the forward pass."""
        shapes = {}
        for name, parameter in self.model.named_parameters():
            shape = local_shape(parameter)
            if expert_name(name, 0) is None:
                shapes[name] = shape
                continue
            for expert in range(shape[0] * self.groups.size):
                shapes[expert_name(name, expert) or name] = shape[1:]
        return shapes

    def state_tensors(self) -> TensorGroups:
        """This rank's fragments of weights and moments, `NAME@START`; rank 0's buffers too."""
        weights, moments = {}, {}
        for number, part in enumerate(held_parts(self.engine, self.stage)):
            if not self._writes(part, number):
                continue
            for name, start, values in split_part(part, part.weights):
                weights[f"{name}@{start}"] = values
            for key, value in moments_of(self._optimizer, part).items():
                if value.dim():
                    for name, start, values in split_part(part, value):
                        moments[f"{name}:{key}@{start}"] = values
                elif part.start == 0 and (self.groups.rank == 0 or not is_expert(part.parameter)):
                    moments[f"{part.name}:{key}"] = value
        if self.rank == 0:
            weights |= self._buffers()
        return {"model": weights, "optimizer": moments}

    def _buffers(self) -> dict[str, Tensor]:
        """Persistent buffers, such as router biases: the same on every rank."""
        parameters = dict(self.model.named_parameters())
        state = model_state(self.model).items()
        return {name: value for name, value in state if name not in parameters}

    def _writes(self, part: Part, number: int) -> bool:
        """Whether this rank writes a part. At stage 0 others hold the same one, and share it."""
        if self.stage > 0:
            return True
        if is_expert(part.parameter):
            size = self.groups.size
            return number % (self.world_size // size) == self.rank // size
        return number % self.world_size == self.rank

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """PyTorch's, inside DeepSpeed's."""
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def load_state_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore from whole tensors, whichever engine they are of.

        Raises:
            CheckpointError: if names or shapes differ.
        """
        weights = groups["model"]
        shapes = self.state_shapes()
        buffers = self._buffers()
        wanted = shapes | {name: value.shape for name, value in buffers.items()}
        refuse_misfits(weights, wanted, "checkpoint does not fit the model")
        moments = moments_by_key(groups["optimizer"])
        for key, by_name in moments.items():
            if key != "step":
                refuse_misfits(by_name, shapes, f"optimizer state {key}")
        with torch.no_grad():
            for name, value in buffers.items():
                value.copy_(weights[name])
            if self.stage in (1, 2):
                firsts = first_experts(self.model)
                for whole_name, parameter in self.model.named_parameters():
                    first = firsts.get(whole_name, 0)
                    whole = Part(whole_name, parameter, 0, parameter.view(-1), parameter, 0, first)
                    fill(whole, parameter.view(-1), weights)
            for part in held_parts(self.engine, self.stage):
                fill(part, part.weights, weights)
                if self.stage == 3:
                    held = part.parameter.ds_tensor.view(-1)[: part.weights.numel()]
                    held.copy_(part.weights)
                self._load_moments(part, moments)

    def _load_moments(self, part: Part, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        state = self._optimizer.state[part.flat]
        for key, by_name in moments.items():
            if key == "step":
                if part.name not in by_name:
                    raise CheckpointError(f"optimizer state step: {part.name} is missing")
                state[key] = by_name[part.name].clone().to(part.flat.device)
                continue
            if key not in state:
                state[key] = torch.zeros_like(part.flat, requires_grad=False)
            values = moments_of(self._optimizer, part)[key]
            fill(part, values, by_name)
