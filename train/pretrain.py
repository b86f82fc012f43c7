"""The main program: a config in, a trained model out. `python -m train.pretrain --config FILE`."""

import contextlib
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.config import ModelConfig
from train.arguments import parse_arguments
from train.checkpoint import (
    Checkpoint,
    RunLock,
    changed_settings,
    find_checkpoint,
    refuse_changes,
    save_checkpoint,
)
from train.config import RunConfig, dump_config, load_config
from train.data import PreparedData, describe, prepare_data
from train.engine import PlainEngine, bfloat16_is_faster, build_engine, choose_device
from train.errors import ConfigError, NonFiniteError
from train.figures import domain_expert_map, save_figure
from train.generate import sample_text
from train.loop import Loop, Position, StopRequest
from train.metrics import MetricsWriter
from train.plan import check_memory, describe_plan, make_plan
from train.program import guarded
from train.random_state import get_random_state, seed_all, set_random_state
from train.run_directory import replace_file, storage_errors
from train.status import StatusLine
from train.summary import render_summary, summarize
from train.tokenizer import ByteTokenizer, TokenizerConfig, load_tokenizer
from train.validation import Evaluation, evaluate


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code (README, exit codes)."""
    options, overrides = parse_arguments(argv, __doc__ or "")
    return guarded(lambda: _main(options, overrides))


def _main(options: Any, overrides: list[str]) -> int:
    refuse_foreign_kernels()
    config = load_config(options.config, overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    if options.dry_run:
        model = with_vocab_size(config.model, planned_vocab_size(config.tokenizer))
        device = choose_device(config.training.device)
        auto = config.training.precision == "auto" and bfloat16_is_faster(device)
        half = auto or config.training.precision == "bfloat16"
        print(describe_plan(make_plan(config, model, 2 if half else 4)))
        return 0
    with RunLock(Path(config.output_dir)):
        return run(config)


def refuse_foreign_kernels() -> None:
    """Stop if another package named `kernels` stands before ours on the import path.

    Raises:
        ConfigError: with what to uninstall.
    """
    spec = importlib.util.find_spec("kernels")
    ours = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != ours:
        found = spec.origin if spec else "nothing"
        raise ConfigError(
            f"`import kernels` finds {found}, not this project's: the Hugging Face package of that "
            f"name must not be in the same environment (pip uninstall kernels)"
        )


def planned_vocab_size(tokenizer: TokenizerConfig) -> int:
    """The vocabulary that the tokenizer will have; a BPE of little text may end up smaller."""
    if tokenizer.kind == "bytes":
        return ByteTokenizer.vocab_size
    if tokenizer.file is not None:
        return load_tokenizer(Path(tokenizer.file).expanduser()).vocab_size
    return tokenizer.vocab_size


def with_vocab_size(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """The model with a vocabulary: where it names none, the tokenizer's, in full multiples of 64.

    Raises:
        ConfigError: if it names a smaller one than the tokenizer has.
    """
    if model.vocab_size is None:
        return model.model_copy(update={"vocab_size": -(-vocab_size // 64) * 64})
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size ({model.vocab_size}) must be at least the tokenizer's "
            f"({vocab_size}); leave it out to take that"
        )
    return model


def identity(config: RunConfig, model: ModelConfig, data: PreparedData) -> dict[str, Any]:
    """What must not change between the parts of a run."""
    return {
        "model": model.model_dump(mode="json"),
        "data": {
            "fingerprint": data.fingerprint,
            "domains": list(data.domain_names),
            "weights": list(data.weights),
        },
        "tokenizer": {"sha256": data.tokenizer.sha256},
        "training": {
            "seq_len": config.training.seq_len,
            "batch_size": config.training.batch_size,
        },
        "seed": config.seed,
    }


def run(config: RunConfig) -> int:
    """Prepare, resume or begin, train, summarise. The run directory is locked by the caller."""
    run_dir = Path(config.output_dir)
    status = StatusLine()

    def warn(text: str) -> None:
        status.message(f"warning: {text}")

    # Refused before minutes are spent on the data, and before anything is written.
    found = find_checkpoint(run_dir, config.checkpoint.resume, warn)
    data = prepare_data(config.data, config.tokenizer, progress=sys.stderr.isatty())
    status.message(describe(data))
    model_config = with_vocab_size(config.model, data.tokenizer.vocab_size)
    facts = identity(config, model_config, data)
    if found is not None:
        refuse_changes(found.state["identity"], facts)
    check_memory(make_plan(config, model_config, 2), choose_device(config.training.device))
    seed_all(config.seed)
    engine = build_engine(
        config, model_config, precision=found.state["precision"] if found else None
    )
    position = restore(engine, found) if found else Position()
    if position.step > config.num_steps:
        raise ConfigError(
            f"training.steps ({config.num_steps}) is below the checkpoint's step "
            f"({position.step}); raise it, or begin anew in another output_dir"
        )
    if found is not None:
        for line in changed_settings(found.state["config"], config.model_dump(mode="json")):
            status.message(f"note: from here on {line}")
    save_description(run_dir, config, data)
    plan = make_plan(config, model_config, 2 if engine.precision == "bfloat16" else 4)
    status.message(describe_plan(plan))
    status.message(
        f"{'resuming at step ' + str(position.step) if found else 'starting'} on {engine.device} "
        f"in {engine.precision}, kernels: torch, output in {run_dir}"
    )
    first_step = position.step + 1 if found else 0
    earlier, began = found.state["seconds"] if found else 0.0, time.monotonic()
    first = position.step
    with open_writer(run_dir, config, model_config, first_step, warn) as writer:

        def save(at: Position) -> None:
            if writer is not None:
                writer.flush()
            if broken := engine.nonfinite_weights():
                raise NonFiniteError(
                    f"step {at.step}: the weight {broken[0]} is inf or NaN, so this step is not "
                    f"saved; lower optimizer.learning_rate and go on from the checkpoint before"
                )
            state = {
                "step": at.step,
                "evaluated": at.evaluated,
                "seconds": earlier + time.monotonic() - began,
                "precision": engine.precision,
                "identity": facts,
                "config": config.model_dump(mode="json"),
            }
            tensors = {
                **engine.state_tensors(),
                "random": get_random_state(),
                "metrics": {"load_window": loop.window.tensor()},
            }
            keep = config.checkpoint.keep_last
            save_checkpoint(run_dir, at.step, tensors, state, keep_last=keep, warn=warn)

        loop = Loop(
            engine,
            data,
            config.model_copy(update={"model": model_config}),
            writer=writer,
            status=status,
            save=save,
            sample=lambda stop: "\n".join(samples(engine, data, config, stop)) or None,
        )
        if found is not None:
            loop.window.restore(found.tensors["metrics"]["load_window"])
        with StopRequest() as stop:
            position, evaluation = loop.run(position, stop)
    # A run that was finished before has only been looked at.
    seconds = earlier + (time.monotonic() - began if position.step > first else 0)
    if stop.exit_code:
        status.message(f"stopped by a signal; saved at step {position.step}: run again to go on")
        return stop.exit_code
    evaluation = evaluation or evaluate(
        engine, data, config.evaluation.batch_size, config.training.seq_len
    )
    assert evaluation is not None
    tokens = config.num_steps * config.tokens_per_step
    summary = summarize(evaluation, model_config, tokens, seconds)
    summary["samples"] = samples(engine, data, config)
    finish(run_dir, config, summary, evaluation, data.domain_names, status)
    return 0


def open_writer(
    run_dir: Path,
    config: RunConfig,
    model: ModelConfig,
    first_step: int,
    warn: Callable[[str], None],
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """The writer of the curves, closed however the run ends: they are what explains it."""
    if not config.logging.tensorboard:
        return contextlib.nullcontext()
    writer = MetricsWriter(run_dir / "tensorboard", model, first_step, warn)
    writer.write_text("config", dump_config(config), first_step)
    return contextlib.closing(writer)


def restore(engine: PlainEngine, checkpoint: Checkpoint) -> Position:
    """Continue from a checkpoint: weights, moments, router biases, random streams, position."""
    engine.load_state_tensors(checkpoint.tensors)
    set_random_state(checkpoint.tensors["random"])
    return Position(checkpoint.state["step"], checkpoint.state["evaluated"])


def save_description(run_dir: Path, config: RunConfig, data: PreparedData) -> None:
    """The config and the tokenizer beside the checkpoints: what `train.generate` needs."""
    with storage_errors(run_dir):
        replace_file(run_dir / "config.yaml", dump_config(config))
        data.tokenizer.save(run_dir / "tokenizer.json")


def samples(
    engine: PlainEngine,
    data: PreparedData,
    config: RunConfig,
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """What the model writes after each of `evaluation.sample_prompts`, as far as `stop` lets it."""
    texts: list[str] = []
    for prompt in config.evaluation.sample_prompts:
        if stop():
            break
        text = sample_text(
            engine.model,
            data.tokenizer,
            prompt,
            max_new_tokens=config.evaluation.sample_tokens,
            temperature=0.8,
            seed=config.seed,
        )
        texts.append(f"sample: {text!r}")
    return texts


def finish(
    run_dir: Path,
    config: RunConfig,
    summary: dict[str, Any],
    evaluation: Evaluation,
    domain_names: tuple[str, ...],
    status: StatusLine,
) -> None:
    """Write and print the summary, and where to look next."""
    with storage_errors(run_dir):
        replace_file(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    status.message("\n" + render_summary(summary, config.model.moe.num_experts) + "\n")
    if summary["layers"]:
        layers = tuple(row["layer"] for row in summary["layers"])
        figure = domain_expert_map(evaluation.tokens_per_expert, domain_names, layers)
        with storage_errors(run_dir):
            save_figure(figure, run_dir / "domain_expert_map.png")
        status.message(f"which experts read which domain:  {run_dir / 'domain_expert_map.png'}")
    programs = Path(sys.executable).parent
    here = f"{os.path.relpath(programs)}/" if programs.is_relative_to(Path.cwd()) else ""
    if config.logging.tensorboard:
        status.message(
            f"the curves:                        {here}tensorboard --logdir "
            f"{shlex.quote(str(run_dir / 'tensorboard'))}"
        )
    status.message(
        f"let it write:                      {here}python -m train.generate "
        f"{shlex.quote(str(run_dir))} --prompt 'def '"
    )


if __name__ == "__main__":
    sys.exit(main())
