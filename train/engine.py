"""Who runs the model, its gradients and its optimizer? `build_engine`, one interface for all.

`Engine` is what the rest of `train` may ask of it, whether one process or many run the model;
`PlainEngine` is the one for a single process on a CPU or one GPU.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from kernels.launch import tune_allocator
from moe.config import ModelConfig
from moe.layer import MoELayer
from moe.model import BatchTotals, ModelOutput, MoETransformer, init_weights
from train.config import OptimizerConfig, RunConfig
from train.device import choose_device, choose_kernels, choose_precision
from train.errors import CheckpointError
from train.expert_names import join_experts, split_experts
from train.packing import Batch

TensorGroups = dict[str, dict[str, Tensor]]


class Engine(Protocol):
    """The model, its gradients and its optimizer, in one process or over many ranks.

    Every rank calls every method, in the same order: those that return one value for all ranks
    communicate.

    Attributes:
        model: this rank's MoETransformer. device: where it lives. precision: `float32` or
        `bfloat16`. kernels: `triton` or `torch`. rank, world_size: 0 and 1 without a launcher.
    """

    model: MoETransformer
    device: torch.device
    precision: str
    kernels: str
    rank: int
    world_size: int

    def __call__(self, batch: Batch, totals: BatchTotals | None = None) -> ModelOutput:
        """One forward pass over a micro-batch of this rank, on the engine's device."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the step's loss."""

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients of all parameters on all ranks, () float32."""

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Clip to `optimizer.gradient_clip` and update the weights."""

    def zero_grad(self) -> None:
        """Forget the gradients, those of a dropped step too."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is True on any rank, the same answer on all."""

    def nonfinite_weights(self) -> list[str]:
        """Names of the weights, on any rank, that hold inf or NaN, in the order of the forward."""

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds inf or NaN, in the same order."""

    def state_tensors(self) -> TensorGroups:
        """Weights, buffers and moments under names that do not depend on the layout of ranks."""

    def load_state_tensors(self, groups: TensorGroups) -> None:
        """Restore what `state_tensors` returned; every name must be there, and no other.

        Raises:
            CheckpointError: if names or shapes differ.
        """


class PlainEngine:
    """One process, one device: autocast, float32 weights, fused AdamW. See `Engine`."""

    rank = 0
    world_size = 1

    def __init__(
        self, model: MoETransformer, config: RunConfig, device: str, precision: str, kernels: str
    ):
        self.model, self.device = model, torch.device(device)
        self.precision, self.kernels = precision, kernels
        self.gradient_clip = config.optimizer.gradient_clip
        model.activation_checkpointing = config.training.activation_checkpointing
        self.optimizer = build_optimizer(model, config.optimizer)

    def __call__(self, batch: Batch, totals: BatchTotals | None = None) -> ModelOutput:
        """One forward pass over a micro-batch, on the engine's device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.model(
                batch.input_ids.to(self.device, non_blocking=True),
                batch.labels.to(self.device, non_blocking=True),
                batch.document_ids.to(self.device, non_blocking=True),
                totals=totals,
            )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the step's loss."""
        loss.backward()

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients, () float32."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Clip to `optimizer.gradient_clip` and update the weights."""
        if self.gradient_clip is not None and float(gradient_norm) > self.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.gradient_clip, gradient_norm
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients, those of a dropped step too."""
        self.optimizer.zero_grad(set_to_none=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks: of one, the tensor itself."""
        return x

    def any_rank(self, flag: bool) -> bool:
        """The flag itself: there is one rank."""
        return flag

    def nonfinite_weights(self) -> list[str]:
        """Names of the weights that hold inf or NaN, in the order of the forward pass."""
        return nonfinite_names((name, p) for name, p in self.model.named_parameters())

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds inf or NaN, in the same order."""
        named = self.model.named_parameters()
        return nonfinite_names((name, p.grad) for name, p in named if p.grad is not None)

    def state_tensors(self) -> TensorGroups:
        """Weights, buffers and moments under names that do not depend on the layout of ranks."""
        moments: dict[str, Tensor] = {}
        for parameter_name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                parts = split_experts(parameter_name, value) if value.dim() else {}
                for name, part in (parts or {parameter_name: value}).items():
                    moments[f"{name}:{key}"] = part
        weights: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            weights.update(split_experts(name, value))
        return {"model": weights, "optimizer": moments}

    def load_state_tensors(self, groups: TensorGroups) -> None:
        """Restore what `state_tensors` returned; every name must be there, and no other.

        Raises:
            CheckpointError: if names or shapes differ.
        """
        load_model(self.model, groups["model"])
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in groups["optimizer"].items():
            parameter, _, key = name.rpartition(":")
            moments.setdefault(key, {})[parameter] = value
        joined = {key: join_experts(by_name) for key, by_name in moments.items()}
        parameters = dict(self.model.named_parameters())
        # A moment that is missing or too short would be read beyond its end by the fused kernel.
        for key, by_name in joined.items():
            if problem := _misfit(by_name, parameters, scalar=key == "step"):
                raise CheckpointError(f"optimizer state {key}: {problem}")
        for key, by_name in joined.items():
            for name, value in by_name.items():
                # The fused AdamW keeps its step count, too, on the weights' device.
                self.optimizer.state[parameters[name]][key] = value.clone().to(self.device)


def _misfit(
    tensors: dict[str, Tensor], parameters: dict[str, torch.nn.Parameter], *, scalar: bool
) -> str | None:
    """Which weight has no tensor, or one of another shape; None if all fit."""
    for name, parameter in parameters.items():
        if name not in tensors:
            return f"{name} is missing"
        want = torch.Size() if scalar else parameter.shape
        if tensors[name].shape != want:
            return f"{name} is {tuple(tensors[name].shape)}, needs {tuple(want)}"
    unknown = tensors.keys() - parameters.keys()
    return f"{min(unknown)} is no weight of this model" if unknown else None


def nonfinite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold inf or NaN; each expert of a stack has its own."""
    return [
        part_name
        for name, value in tensors
        if not torch.isfinite(value).all()
        for part_name, part in split_experts(name, value).items()
        if not torch.isfinite(part).all()
    ]


def load_model(model: MoETransformer, tensors: dict[str, Tensor]) -> None:
    """Fill a model from the `model` group of a checkpoint.

    Raises:
        CheckpointError: if a name is missing, unknown, or has another shape or dtype.
    """
    state = join_experts(tensors)
    current = model.state_dict()
    problems = [f"{name} is missing" for name in current if name not in state]
    problems += [f"{name} is unknown to this model" for name in state if name not in current]
    for name in current.keys() & state.keys():
        have, want = state[name], current[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"{name} is {tuple(have.shape)} {have.dtype}, "
                f"needs {tuple(want.shape)} {want.dtype}"
            )
    if problems:
        raise CheckpointError("checkpoint does not fit the model: " + "; ".join(problems[:5]))
    model.load_state_dict(state)


def build_optimizer(model: MoETransformer, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (norm weights) alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def build_engine(
    config: RunConfig, model_config: ModelConfig, *, precision: str | None = None
) -> Engine:
    """The engine for this process: the plain one, as no launcher started us.

    Args:
        model_config: with its vocab_size known.
        precision: of an earlier part of the same run, which `auto` then keeps.
    Raises:
        ConfigError: if `training.device` or `model.kernel_backend` asks for what is not there.
    """
    tune_allocator()
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    device = choose_device(config.training.device)
    kernels = choose_kernels(model_config.kernel_backend, device)
    precision = choose_precision(config.training.precision, device, earlier=precision)
    with torch.device(device):
        model = MoETransformer(model_config, moe_layer=MoELayer)
    init_weights(model, config.seed)
    return PlainEngine(model, config, device, precision, kernels)
