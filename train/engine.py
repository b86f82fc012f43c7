"""Who runs the model, its gradients and its optimizer? `build_engine`, one interface for all.

`Engine` is what the rest of `train` may ask of it, whether one process or many run the model;
`PlainEngine` is the one for a single process on a CPU or one GPU.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

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
from train.fragments import local_shape
from train.metrics import NORM_GROUPS, norm_group
from train.packing import Batch
from train.ranks import Ranks, gather
from train.stored_tensors import moments_by_key, shape_of
from train.work_clock import WorkClock

TensorGroups = dict[str, dict[str, Tensor]]


class Engine(Protocol):
    """The model, its gradients and its optimizer, in one process or over many ranks.

    Every rank calls every method, in the same order: those that return one value for all ranks
    communicate.

    Attributes:
        model: this rank's MoETransformer. device: where it lives. precision: `float32` or
        `bfloat16`. kernels: `triton`, `torch` or `torch_compile`. rank, world_size: 0 and 1 without
        a launcher. shared_out: whether each rank has fragments of the state, and not the whole.
        clock: of this rank's work.
    """

    model: MoETransformer
    device: torch.device
    precision: str
    kernels: str
    rank: int
    world_size: int
    shared_out: bool
    clock: WorkClock

    def __call__(self, batch: Batch, totals: BatchTotals | None = None) -> ModelOutput:
        """One forward pass over a micro-batch of this rank, on the engine's device."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the step's loss.

        Args: last: whether the step has no further micro-batch.
        """

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients of all parameters on all ranks, () float32."""

    def norms(self, *, gradients: bool) -> Tensor:
        """L2 norms of the gradients, or of the weights, of each of NORM_GROUPS: (3,) float64."""

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Clip to `optimizer.gradient_clip` and update the weights; the gradients are gone then."""

    def zero_grad(self) -> None:
        """Forget the gradients, those of a dropped step too."""

    def all_reduce(self, x: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum, or maximum, over ranks."""

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is True on any rank, the same answer on all."""

    def from_rank_0(self, x: Tensor) -> Tensor:
        """What rank 0 has there, on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in their order, on every rank."""

    def nonfinite_weights(self) -> list[str]:
        """Names of the weights, on any rank, that hold inf or NaN, in the order of the forward."""

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds inf or NaN, in the same order."""

    def describe(self) -> str:
        """What runs where, for a person."""

    def state_shapes(self) -> dict[str, torch.Size]:
        """Shapes of all weights of the whole model, in the order of the forward pass."""

    def state_tensors(self) -> TensorGroups:
        """Weights, buffers and moments under names that do not depend on the layout of ranks; of
        many ranks each has its fragments, `NAME@START` of the flattened tensor."""

    def load_state_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore from whole tensors; every name must be there, and no other.

        Raises:
            CheckpointError: if names or shapes differ.
        """


class PlainEngine:
    """One process, one device: autocast, float32 weights, fused AdamW. See `Engine`."""

    rank = 0
    world_size = 1
    shared_out = False

    def __init__(
        self, model: MoETransformer, config: RunConfig, device: str, precision: str, kernels: str
    ):
        self.model, self.device = model, torch.device(device)
        self.precision, self.kernels = precision, kernels
        self.clock = WorkClock(device)
        self.gradient_clip = config.optimizer.gradient_clip
        model.activation_checkpointing = config.training.activation_checkpointing
        groups = parameter_groups(model, config.optimizer)
        self.optimizer = build_optimizer(groups, config.optimizer)

    def describe(self) -> str:
        """What runs where, for a person."""
        return f"one process on {self.device}"

    def __call__(self, batch: Batch, totals: BatchTotals | None = None) -> ModelOutput:
        """One forward pass over a micro-batch, on the engine's device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.model(
                batch.input_ids.to(self.device, non_blocking=True),
                batch.labels.to(self.device, non_blocking=True),
                batch.document_ids.to(self.device, non_blocking=True),
                totals=totals,
                routes=routes_of(batch, self.model.config, self.device),
                noise_seeds=batch.noise_seeds,
            )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the step's loss."""
        loss.backward()

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients, () float32."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def norms(self, *, gradients: bool) -> Tensor:
        """L2 norms of the gradients, or of the weights, of each of NORM_GROUPS: (3,) float64."""
        grouped: dict[str, list[Tensor]] = {group: [] for group in NORM_GROUPS}
        for name, parameter in self.model.named_parameters():
            value = parameter.grad if gradients else parameter.detach()
            if value is not None:
                grouped[norm_group(name)].append(value)
        zero = torch.zeros((), device=self.device)
        norms = [torch.nn.utils.get_total_norm(each) if each else zero for each in grouped.values()]
        return torch.stack(norms).double()

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

    def all_reduce(self, x: Tensor, *, maximum: bool = False) -> Tensor:
        """Of one rank, the tensor itself."""
        return x

    def any_rank(self, flag: bool) -> bool:
        """The flag itself: there is one rank."""
        return flag

    def from_rank_0(self, x: Tensor) -> Tensor:
        """The tensor itself: there is one rank."""
        return x

    def gather(self, value: Any) -> list[Any]:
        """The value alone: there is one rank."""
        return [value]

    def nonfinite_weights(self) -> list[str]:
        """Names of the weights that hold inf or NaN, in the order of the forward pass."""
        return nonfinite_names((name, p) for name, p in self.model.named_parameters())

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds inf or NaN, in the same order."""
        named = self.model.named_parameters()
        return nonfinite_names((name, p.grad) for name, p in named if p.grad is not None)

    def state_shapes(self) -> dict[str, torch.Size]:
        """Shapes of all weights of the model, in the order of the forward pass."""
        return {
            name: part.shape
            for whole, parameter in self.model.named_parameters()
            for name, part in split_experts(whole, parameter).items()
        }

    def state_tensors(self) -> TensorGroups:
        """Weights, buffers and moments under names that do not depend on the layout of ranks."""
        moments: dict[str, Tensor] = {}
        for parameter_name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                parts = split_experts(parameter_name, value) if value.dim() else {}
                for name, part in (parts or {parameter_name: value}).items():
                    moments[f"{name}:{key}"] = part
        weights: dict[str, Tensor] = {}
        for name, value in model_state(self.model).items():
            weights.update(split_experts(name, value))
        return {"model": weights, "optimizer": moments}

    def load_state_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_tensors` returned; every name must be there, and no other.

        Raises:
            CheckpointError: if names or shapes differ.
        """
        load_model(self.model, groups["model"])
        moments = moments_by_key(groups["optimizer"])
        joined = {key: join_experts(by_name) for key, by_name in moments.items()}
        parameters = dict(self.model.named_parameters())
        # A moment that is missing or too short would be read beyond its end by the fused kernel.
        for key, by_name in joined.items():
            shapes = {
                name: torch.Size() if key == "step" else parameter.shape
                for name, parameter in parameters.items()
            }
            refuse_misfits(by_name, shapes, f"optimizer state {key}")
        for key, by_name in joined.items():
            for name, value in by_name.items():
                # The fused AdamW keeps its step count, too, on the weights' device.
                self.optimizer.state[parameters[name]][key] = value.clone().to(self.device)


def routes_of(batch: Batch, model: ModelConfig, device: torch.device) -> tuple[Tensor, ...] | None:
    """The routes that a batch asks to replay, one (B, S, K) a routed layer, of its own K."""
    if batch.routes is None:
        return None
    routes = batch.routes.to(device, non_blocking=True)  # (L, B, S, K), the largest K
    return tuple(
        chosen[..., : model.at(layer).top_k]
        for layer, chosen in zip(model.moe_layers, routes, strict=True)
    )


def refuse_misfits(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], what: str
) -> None:
    """Refuse tensors that are not exactly those of `shapes`.

    Raises:
        CheckpointError: naming the first few that differ.
    """
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is unknown to this model" for name in tensors if name not in shapes]
    for name in shapes.keys() & tensors.keys():
        if (found := shape_of(tensors, name)) != shapes[name]:
            problems.append(f"{name} is {tuple(found)}, needs {tuple(shapes[name])}")
    if problems:
        raise CheckpointError(f"{what}: " + "; ".join(sorted(problems)[:5]))


def nonfinite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold inf or NaN; each expert of a stack has its own."""
    return [
        part_name
        for name, value in tensors
        if not torch.isfinite(value).all()
        for part_name, part in split_experts(name, value).items()
        if not torch.isfinite(part).all()
    ]


def model_state(model: MoETransformer) -> dict[str, Tensor]:
    """What a checkpoint has of a model: parameters, tied ones once, and persistent buffers."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def load_model(model: MoETransformer, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model from the `model` group of a checkpoint.

    Raises:
        CheckpointError: if a name is missing, unknown, or has another shape or dtype.
    """
    state = join_experts(tensors)
    current = model_state(model)
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
    model.load_state_dict(state, strict=False)


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over groups of parameters."""
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def parameter_groups(model: MoETransformer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors (norm weights), which do not."""
    dims = [(p, len(local_shape(p))) for p in model.parameters()]
    return [
        {"params": [p for p, dim in dims if dim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p, dim in dims if dim < 2], "weight_decay": 0.0},
    ]


def build_engine(
    config: RunConfig,
    model_config: ModelConfig,
    *,
    ranks: Ranks | None = None,
    precision: str | None = None,
) -> Engine:
    """The engine for this process: DeepSpeed's where a launcher started us, else the plain one.

    Args:
        model_config: with its vocab_size known.
        ranks: what the launcher said, the process group joined (`train.expert_parallel.connect`).
        precision: of an earlier part of the same run, which `auto` then keeps.
    Raises:
        ConfigError: if `training.device` or `model.kernel_backend` asks for what is not there, or
            the settings do not fit the number of ranks.
    """
    tune_allocator()
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    device = choose_device(config.training.device)
    kernels = choose_kernels(model_config.kernel_backend, device)
    precision = choose_precision(config.training.precision, device, earlier=precision)
    if ranks is not None:
        # Not at the head: one process needs no DeepSpeed, whose import takes seconds.
        from train.deepspeed_engine import build_deepspeed_engine

        # `auto` measures, and ranks that share their cores may measure differently.
        precision = gather(precision)[0]
        return build_deepspeed_engine(config, model_config, ranks, device, precision, kernels)
    with torch.device(device):
        model = MoETransformer(model_config, moe_layer=MoELayer)
    init_weights(model, config.seed)
    return PlainEngine(model, config, device, precision, kernels)
