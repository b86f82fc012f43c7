"""Who runs the model, its gradients and its optimizer? `build_engine`, one interface for all.

A plain engine for one process on a CPU or one GPU. A launcher's engine has the same methods:
`engine(batch, totals)`, `backward`, `gradient_norm`, `step`, `zero_grad`, `all_reduce`,
`state_tensors`, `load_state_tensors`.
"""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.launch import tune_allocator
from moe.config import ModelConfig
from moe.layer import MoELayer
from moe.model import BatchTotals, ModelOutput, MoETransformer, init_weights
from train.config import OptimizerConfig, RunConfig
from train.errors import CheckpointError, ConfigError
from train.expert_names import join_experts, split_experts
from train.packing import Batch

TensorGroups = dict[str, dict[str, Tensor]]


class PlainEngine:
    """One process, one device: autocast, float32 weights, fused AdamW.

    Attributes:
        model: the MoETransformer. device: where it lives. precision: `float32` or `bfloat16`.
        rank, world_size: 0 and 1 here.
    """

    rank = 0
    world_size = 1

    def __init__(self, model: MoETransformer, config: RunConfig, device: str, precision: str):
        self.model, self.device, self.precision = model, torch.device(device), precision
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
) -> PlainEngine:
    """The engine for this process: the plain one, as no launcher started us.

    Args:
        model_config: with its vocab_size known.
        precision: of an earlier part of the same run, which `auto` then keeps.
    Raises:
        ConfigError: if `training.device` is cuda and there is none.
    """
    tune_allocator()
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    device = choose_device(config.training.device)
    if config.training.precision != "auto":
        precision = config.training.precision
    elif precision is None:
        precision = "bfloat16" if bfloat16_is_faster(device) else "float32"
    with torch.device(device):
        model = MoETransformer(model_config, moe_layer=MoELayer)
    init_weights(model, config.seed)
    return PlainEngine(model, config, device, precision)


def choose_device(setting: str) -> str:
    """`cpu` or `cuda`; `auto` takes a GPU where there is one."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "training.device: cuda, but PyTorch sees no GPU; set training.device: auto, or install "
            "a CUDA build of torch (README, set-up)"
        )
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return setting


def bfloat16_is_faster(device: str) -> bool:
    """Whether matmuls in bfloat16 take at most 3/4 of the time of float32, measured (about 20 ms).

    Whether a CPU has the instructions is not enough: some emulate them and are slower.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    # On one thread: several wait for each other where another process has a core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < 0.75 * seconds[torch.float32]
