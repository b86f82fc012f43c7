"""What is a run made of? The frozen schema of a run's YAML, and how a file becomes a `RunConfig`.

Defaults live in these classes alone; a YAML lists only what differs from them.
"""

import math
import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from moe.config import ModelConfig, Section
from moe.rules import broken_rules
from moe.variants import Count, Natural, Real, Whole, no_boolean
from train.arguments import apply_overrides
from train.config_errors import Origin, explain, show
from train.config_limits import MAX_COUNT, MAX_LAYERS, MAX_TOTAL, out_of_range
from train.data import DataConfig
from train.errors import ConfigError
from train.tokenizer import TokenizerConfig
from train.yaml_text import YAMLTextError, read_yaml, write_yaml

Fraction = Annotated[Real, Field(ge=0, le=1)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).

    weight_decay acts on matrices only. gradient_clip: largest global gradient norm; null switches
    clipping off.
    """

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[Real, Field(gt=0)] = 1e-3
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    gradient_clip: Annotated[Real, Field(gt=0)] | None = 1.0


class ScheduleConfig(Section):
    """The learning rate over the steps: a linear warm-up, then `name`.

    cosine falls to final_fraction * learning_rate at the last step; constant stays; wsd stays and
    falls linearly over the last decay_fraction of the steps (Hu et al., MiniCPM, arXiv 2404.06395).
    warmup_steps null: a tenth of the steps, at most 100.
    """

    name: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: Natural | None = None
    decay_fraction: Fraction = 0.2
    final_fraction: Fraction = 0.1

    @model_validator(mode="after")
    def _without_effect(self) -> "ScheduleConfig":
        default = ScheduleConfig.model_fields
        problems = []
        for key, used_by in {
            "decay_fraction": ("wsd",),
            "final_fraction": ("wsd", "cosine"),
        }.items():
            value = getattr(self, key)
            if self.name not in used_by and value != default[key].default:
                problems.append(
                    f"schedule.{key} ({value}) has no effect with schedule.name {self.name};"
                    f" leave it out or use {' or '.join(used_by)}"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class TrainingConfig(Section):
    """How long, on what, and in which portions.

    steps or tokens: optimizer steps, or training tokens (rounded up to whole steps); one of the
    two, 1000 steps if neither is given. batch_size: sequences of seq_len tokens per optimizer step,
    over all ranks. micro_batch_size: sequences per forward and rank; null takes all at once.
    precision `auto` takes bfloat16 autocast where it is faster; weights are float32 always.
    threads: of PyTorch on the CPU, at most its cores; null leaves PyTorch's choice. nonfinite: what
    a loss or gradient of inf or NaN does, `stop` or `skip` the step; neither touches the weights.
    stall_minutes: a run that stands still for so long ends with its stacks; null waits for ever.
    debug looks for inf and NaN at once, where they arise.
    """

    steps: Count | None = None
    tokens: Count | None = None
    seq_len: Count = 256
    batch_size: Count = 16
    micro_batch_size: Count | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None
    nonfinite: Literal["skip", "stop"] = "stop"
    stall_minutes: Annotated[Real, Field(gt=0)] | None = 60.0
    debug: bool = False

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is None is values.get("tokens"):
            return {**values, "steps": 1000}
        return values

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        problems = []
        if self.steps is not None and self.tokens is not None:
            problems.append(
                f"training.steps ({self.steps}) and training.tokens ({self.tokens}) both set the"
                " length; give one and leave the other out or null"
            )
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            problems.append(
                f"training.batch_size ({self.batch_size}) must be a multiple of"
                f" training.micro_batch_size ({micro})"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class EvaluationConfig(Section):
    """Validation loss per domain, and sample text.

    every: optimizer steps between evaluations; 0 evaluates only at the end. batch_size: sequences
    per forward. sample_tokens: new tokens for each of sample_prompts.
    """

    every: Natural = 0
    batch_size: Count = 16
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: Count = 64


class CheckpointConfig(Section):
    """every: optimizer steps between checkpoints; 0 saves only at the end and when stopped.

    keep_last: checkpoints kept. resume: `auto` goes on from the newest sound checkpoint if there is
    one, `must` fails without one, `never` fails with one.
    """

    every: Natural = 500
    keep_last: Count = 2
    resume: Literal["auto", "never", "must"] = "auto"


class LoggingConfig(Section):
    """every, heatmap_every: optimizer steps between lines, and between load heat maps (0: none)."""

    every: Count = 10
    tensorboard: bool = True
    heatmap_every: Natural = 100


class RoutesConfig(Section):
    """Which experts the tokens choose in training, written down or given (`train.routes`).

    record: folder for the chosen experts of every step. replay: folder of another run's, which the
    routers take in place of their own choice; evaluation and samples choose freely.
    """

    record: Folder | None = None
    replay: Folder | None = None

    @model_validator(mode="after")
    def _two_folders(self) -> "RoutesConfig":
        both = self.record, self.replay
        if None not in both and len({os.path.realpath(str(folder)) for folder in both}) == 1:
            raise ValueError(
                f"routes.record ({self.record}) and routes.replay ({self.replay}) must be two "
                f"folders; a run cannot write over what it replays"
            )
        return self


class ParallelConfig(Section):
    """How many ranks share the model; they come from the launcher (`deepspeed --module`, torchrun).

    expert_parallel_size: ranks over which the experts of each layer are shared out, must divide
    the ranks and the experts. zero_stage: what of the optimizer's work is shared out: 0 nothing,
    1 its state, 2 the gradients too, 3 the weights too (Rajbhandari et al., ZeRO, arXiv
    1910.02054). timeout_minutes: of every operation between ranks.
    """

    expert_parallel_size: Count = 1
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(no_boolean)] = 1
    timeout_minutes: Annotated[Real, Field(ge=0.05, le=24 * 60)] = 10.0


class RunConfig(Section):
    """Everything that decides a run's result, and where it is written."""

    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    output_dir: Folder = "runs/default"
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    routes: RoutesConfig = RoutesConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks and micro-batches."""
        return self.training.batch_size * self.training.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; `training.tokens` is rounded up to whole steps."""
        if self.training.tokens is not None:
            return math.ceil(self.training.tokens / self.tokens_per_step)
        assert self.training.steps is not None
        return self.training.steps

    @property
    def num_warmup_steps(self) -> int:
        """Optimizer steps of the linear warm-up."""
        if self.schedule.warmup_steps is None:
            return min(100, self.num_steps // 10)
        return self.schedule.warmup_steps

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward when one rank reads the whole batch."""
        return self.training.micro_batch_size or self.training.batch_size

    def exact_counts_needed(self, num_micro_batches: int) -> bool:
        """Whether a loss needs the whole step's counts before its first backward pass, which then
        takes a forward pass of each micro-batch for itself."""
        losses = self.model.moe.losses
        return num_micro_batches > 1 and any(loss.needs_batch_counts for loss in losses)

    def micro_batches_per_rank(self, world_size: int) -> int:
        """Forward passes of each rank in one optimizer step.

        Args:
            world_size: number of ranks, which share each batch in equal parts.
        Raises:
            ConfigError: if the batch cannot be shared so.
        """
        training = self.training
        micro, passes = training.micro_batch_size, 1
        if micro is not None:
            passes = training.batch_size // (micro * world_size)
        share = world_size if micro is None else micro * world_size
        if training.batch_size % share == 0:
            return passes
        parts = "" if micro is None else f"training.micro_batch_size ({micro}) times "
        nearest = max(share, round(training.batch_size / share) * share)
        raise ConfigError(
            f"training.batch_size ({training.batch_size}) must be a multiple of {parts}the number "
            f"of ranks ({world_size}); set training.batch_size to {nearest}, "
            f"{'' if micro is None else 'lower training.micro_batch_size '}or start another number "
            f"of ranks"
        )

    @model_validator(mode="before")
    @classmethod
    def _layers_can_be_listed(cls, values: Any) -> Any:
        # Asked before the model's own checks, which go through all of its layers.
        model = values.get("model") if isinstance(values, dict) else None
        layers = model.get("num_layers") if isinstance(model, dict) else None
        if isinstance(layers, int | float) and layers > MAX_LAYERS:
            found = f"{layers:.0f}" if isinstance(layers, float) else show(layers)
            raise ValueError(f"model.num_layers ({found}) must be at most {MAX_LAYERS:,}")
        return values

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        problems = [*out_of_range(self.model_dump(mode="json"))]
        if not problems:
            problems = [*self._length_problems(), *self._warmup_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _length_problems(self) -> Iterator[str]:
        training, seq_len = self.training, self.training.seq_len
        micro = "micro_batch_size" if training.micro_batch_size is not None else "batch_size"
        sizes = {f"training.{micro}": self.micro_batch_size}
        sizes["evaluation.batch_size"] = self.evaluation.batch_size
        for name, size in sizes.items():
            if size * seq_len > MAX_COUNT:
                yield (
                    f"{name} ({size}) times training.seq_len ({seq_len}) is {size * seq_len:,} "
                    f"tokens a forward, must be at most {MAX_COUNT:,}; lower one of them"
                )
        if training.tokens is not None and self.num_steps > MAX_COUNT:
            yield (
                f"training.tokens ({training.tokens}) is {self.num_steps:,} steps of "
                f"{self.tokens_per_step:,} tokens, must be at most {MAX_COUNT:,} steps; lower it "
                f"or raise training.batch_size ({training.batch_size})"
            )
        elif self.num_steps * self.tokens_per_step > MAX_TOTAL:
            yield (
                f"training.steps ({training.steps}) of training.batch_size ({training.batch_size}) "
                f"times training.seq_len ({seq_len}) tokens is beyond {MAX_TOTAL:,} tokens; lower "
                f"one of them"
            )

    def _warmup_problems(self) -> Iterator[str]:
        length = "training.steps" if self.training.tokens is None else "steps of training.tokens"
        if self.num_warmup_steps >= self.num_steps:
            yield (
                f"schedule.warmup_steps ({self.num_warmup_steps}) must be below {length}"
                f" ({self.num_steps}); null takes a tenth of the steps"
            )
        elif self.schedule.name == "wsd":
            decay_steps = math.ceil(self.schedule.decay_fraction * self.num_steps)
            if self.num_warmup_steps + decay_steps > self.num_steps:
                yield (
                    f"schedule.warmup_steps ({self.num_warmup_steps}) and"
                    f" schedule.decay_fraction ({self.schedule.decay_fraction},"
                    f" {decay_steps} steps) must fit into {length} ({self.num_steps})"
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply overrides in their order, and validate the result.

    An override is `section.key=value` with a YAML value; a number in the path is a place in a list
    (`model.moe.losses.0.weight=0.02`), also in a default list that the file does not mention.

    An override of a variant's `name` keeps the settings that the file gave the old variant. If the
    new one lacks some of them, the run is refused with an error that writes out the replacement: a
    setting dropped in silence would change what the run compares.

    Args:
        path: a YAML file.
        overrides: as on the command line; `--local_rank=N` of a launcher is ignored.
    Raises:
        ConfigError: with one line for each mistake, `SOURCE: dotted.path: what was found, what is
            allowed`; SOURCE is the file as given, or `command line`.
    """
    values, problems = read_settings(Path(path))
    return config_from_settings(values, overrides, str(path), problems)


def config_from_settings(
    values: dict[str, Any], overrides: Sequence[str], source: str, problems: Sequence[str] = ()
) -> RunConfig:
    """What `load_config` makes of settings that were read before; `values` are changed in place.

    Args:
        source: what errors name as the place of `values`. problems: found in reading them.
    Raises:
        ConfigError: as `load_config`, `problems` included.
    """
    origin, refused = apply_overrides(values, overrides, RunConfig, source)
    if problems or refused:
        raise ConfigError("\n".join([*problems, *refused]))
    config = _validate(values, origin)
    # Not in the schema: a checkpoint may be read on a smaller machine than it was trained on.
    threads, cores = config.training.threads, os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise ConfigError(
            f"{origin.of(('training', 'threads'))}: training.threads ({threads}) must be at most "
            f"the CPU cores of this machine ({cores}); lower it, or leave it out"
        )
    return config


def config_from_dict(values: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate settings that were read before, such as those saved in a checkpoint.

    Raises:
        ConfigError: with one line for each mistake, opening with `source`.
    """
    return _validate(values, Origin(source))


def dump_config(config: RunConfig) -> str:
    """The YAML of every setting, defaults included; loading it gives an equal `RunConfig`.

    Comments at its head say which rules of routing (`moe.router.RULES`) are broken by what.
    """
    notes = [
        f"# {setting} breaks these rules of moe/router.py: {', '.join(rules)}\n"
        for setting, rules in broken_rules(config.model).items()
    ]
    return "".join(notes) + write_yaml(config.model_dump(mode="json"))


def _validate(values: dict[str, Any], origin: Origin) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = explain(error, RunConfig, values, origin)
    raise ConfigError("\n".join(lines))


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings in the file, or {} and what is wrong with it."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return {}, [f"{path}: no such file{_nearest_file(path)}"]
    except IsADirectoryError:
        return {}, [f"{path}: a directory; give one YAML file in it"]
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        return {}, [f"{path}: not UTF-8 text ({found}); save the file as UTF-8"]
    except OSError as error:
        return {}, [f"{path}: cannot be read: {error.strerror}"]
    try:
        values = read_yaml(text)
    except YAMLTextError as error:
        return {}, [f"{path}: {problem}" for problem in error.problems]
    if values is None:
        return {}, [f"{path}: empty; a run's YAML has sections such as `model:` and `data:`"]
    if not isinstance(values, dict):
        return {}, [f"{path}: got {show(values)} at the top; needs sections such as `model:`"]
    return values, []


def _nearest_file(path: Path) -> str:
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".yaml"]
    except OSError:
        return ""
    near = get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {path.with_name(near[0])}?)" if near else ""
