"""The main program: a config in, a trained model out. `python -m train.pretrain --config FILE`."""

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import ModelConfig
from train.arguments import parse_arguments
from train.changed_settings import changed_settings, refuse_changes, with_allowed_changes
from train.checkpoint import Checkpoint, RunLock, find_checkpoint, save_checkpoint
from train.config import ParallelConfig, RunConfig, dump_config, load_config
from train.data import PreparedData, check_sources, describe, prepare_data
from train.deepspeed_config import check_user_settings
from train.device import choose_device, choose_kernels, choose_precision
from train.engine import Engine, build_engine
from train.errors import ConfigError, NonFiniteError
from train.figures import domain_expert_map, save_figure
from train.generate import sample_text
from train.loop import Loop, Position, StopRequest
from train.metrics_writer import MetricsWriter
from train.plan import Plan, check_memory, describe_plan, make_plan, memory_errors
from train.program import guarded
from train.random_state import seed_all
from train.ranks import (
    Ranks,
    agreeing,
    check_layout,
    first_rank_first,
    gather,
    launched_ranks,
)
from train.routes import RunRoutes, check_routes, open_routes
from train.run_directory import replace_file, storage_errors
from train.run_state import identity, restore, run_state
from train.status import StatusLine, format_layers
from train.summary import render_summary, summarize
from train.tokenizer import planned_vocab_size, with_vocab_size
from train.validation import Evaluation, evaluate
from train.watchdog import Watchdog, exit_recorded


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code (README, exit codes)."""
    options, overrides = parse_arguments(argv, __doc__ or "")
    return guarded(lambda: _main(options, overrides))


def _main(options: Any, overrides: list[str]) -> int:
    with first_rank_first():
        refuse_foreign_kernels()
        config = load_config(options.config, overrides)
        ranks = launched_ranks()
        check_user_settings(config)
        check_routes(config)
        if ranks is not None:
            check_layout(config, ranks)
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    if options.dry_run:
        check_sources(config.data, config.tokenizer)
        model = with_vocab_size(config.model, planned_vocab_size(config.tokenizer))
        device = choose_device(config.training.device)
        choose_kernels(config.model.kernel_backend, device)
        half = choose_precision(config.training.precision, device) == "bfloat16"
        print(describe_plan(make_plan(config, model, 2 if half else 4)))
        return 0
    if ranks is None:
        with RunLock(Path(config.output_dir)):
            return run(config)
    return run_as_rank(config, ranks)


def run_as_rank(config: RunConfig, ranks: Ranks) -> int:
    """`run` in one of the processes that a launcher has started; rank 0 alone locks and prints.

    Raises:
        ConfigError: if the ranks were started with different settings.
    """
    # Not at the head: one process needs no DeepSpeed, whose import takes seconds.
    from train.expert_parallel import connect, disconnect, peer_errors

    run_dir, rank = Path(config.output_dir), ranks.rank
    lost_peers = partial(peer_errors, rank, config.parallel.timeout_minutes)
    with lost_peers(), contextlib.ExitStack() as stack:
        connect(choose_device(config.training.device), ranks, config.parallel.timeout_minutes)
        settings = gather(config.model_dump(mode="json"))
        with first_rank_first():
            for number, other in enumerate(settings):
                labels = "on rank 0", f"on rank {number}"
                if lines := changed_settings(settings[0], other, labels):
                    raise ConfigError(
                        f"the ranks were started with different settings: {lines[0]}; start all "
                        f"of them with the same config and overrides"
                    )
        with agreeing(gather):
            if rank == 0:
                stack.enter_context(RunLock(run_dir))
        with exit_recorded(run_dir, rank) as codes, lost_peers():
            codes.append(run(config, ranks))
        # The launcher ends the others as soon as one has stopped with a signal's exit code.
        gather(None)
    disconnect()
    return codes[-1]


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


class Job(NamedTuple):
    """A run that is ready to go on from `position`.

    model: the config's, with its vocab_size known. identity: see there. found: the checkpoint that
    it goes on from, None for a new run. routes: which it records and replays.
    """

    config: RunConfig
    model: ModelConfig
    data: PreparedData
    engine: Engine
    plan: Plan
    identity: dict[str, Any]
    found: Checkpoint | None
    position: Position
    routes: RunRoutes


def run(config: RunConfig, ranks: Ranks | None = None) -> int:
    """Prepare, resume or begin, train, summarise. The run directory is locked by the caller."""
    run_dir = Path(config.output_dir)
    speaks = ranks is None or ranks.rank == 0
    # One rank speaks for all.
    status = StatusLine() if speaks else StatusLine(open(os.devnull, "w"))  # noqa: SIM115
    with first_rank_first():
        job = prepare(config, status, ranks)
    with agreeing(job.engine.gather):
        if speaks:
            save_description(run_dir, config, job.data)
            if job.routes.target is not None:
                job.routes.target.begin(job.position.step)
    announce(job, status)
    clock = RunClock(job.found.state["seconds"] if job.found else 0.0)
    with memory_errors(job.plan, config, job.model):
        position, evaluation, signalled = train(job, clock, status)
    # A run that was finished before has only been looked at.
    seconds = clock.seconds() if position.step > job.position.step else clock.earlier
    if signalled:
        status.message(f"stopped by a signal; saved at step {position.step}: run again to go on")
        return signalled
    evaluation = evaluation or evaluate(
        job.engine, job.data, config.evaluation.batch_size, config.training.seq_len
    )
    assert evaluation is not None
    tokens = config.num_steps * config.tokens_per_step
    summary = summarize(evaluation, job.model, tokens, seconds)
    summary["samples"] = samples(job.engine, job.data, config)
    with agreeing(job.engine.gather):
        if speaks:
            finish(run_dir, config, summary, evaluation, job.data.domain_names, status)
    return 0


def prepare(config: RunConfig, status: StatusLine, ranks: Ranks | None = None) -> Job:
    """Data, engine and position of a run; what cannot work is refused before anything is written.

    Raises:
        ConfigError: if the run cannot go on from its checkpoint with this config.
    """
    # Before minutes are spent on the data.
    run_dir = Path(config.output_dir)
    found = find_checkpoint(run_dir, config.checkpoint.resume, warner(status), ranks)
    if config.model.kernel_backend == "torch_compile":
        status.message("trying to compile kernels: up to half a minute on a new machine")
    choose_kernels(config.model.kernel_backend, choose_device(config.training.device))
    data = prepare_data(config.data, config.tokenizer, progress=sys.stderr.isatty())
    status.message(describe(data))
    model = with_vocab_size(config.model, data.tokenizer.vocab_size)
    facts = identity(config, model, data)
    if found is not None:
        saved = found.state["identity"]
        refuse_changes(with_allowed_changes(saved, facts), facts)
    done = found.state["step"] if found else 0
    routes = open_routes(config, model, facts, done, ranks)
    plan = make_plan(config, model, 2, ranks)
    check_memory(plan, choose_device(config.training.device))
    seed_all(config.seed, ranks.rank if ranks else 0)
    earlier = found.state["precision"] if found else None
    with memory_errors(plan, config, model):
        engine = build_engine(config, model, ranks=ranks, precision=earlier)
        position = restore(engine, found, config.seed) if found else Position()
    if found is not None:
        # The rest of the tensors is as large as the model and its moments.
        found = found._replace(tensors={"metrics": dict(found.tensors["metrics"])})
    if engine.precision == "float32":
        plan = make_plan(config, model, 4, ranks)
    if position.step > config.num_steps:
        raise ConfigError(
            f"training.steps ({config.num_steps}) is below the checkpoint's step "
            f"({position.step}); raise it, or begin anew in another output_dir"
        )
    return Job(config, model, data, engine, plan, facts, found, position, routes)


def warner(status: StatusLine) -> Callable[[str], None]:
    """What prints a warning without breaking the status line."""
    return lambda text: status.message(f"warning: {text}")


def announce(job: Job, status: StatusLine) -> None:
    """Say what runs where: the plan at the beginning, what changed since where it goes on."""
    config, engine, found = job.config, job.engine, job.found
    if found is None:
        status.message(describe_plan(job.plan))
    else:
        for line in changed_settings(found.state["config"], config.model_dump(mode="json")):
            status.message(f"note: from here on {line}")
    # Asked of all ranks, though one prints it.
    description = engine.describe()
    if engine.shared_out:
        status.message(description)
    elif config.parallel != ParallelConfig() or config.deepspeed:
        status.message("note: parallel and deepspeed have no effect in one process")
    for line in job.routes.describe(job.position.step, config.num_steps):
        status.message(line)
    status.message(
        f"{'resuming at step ' + str(job.position.step) if found else 'starting'} on "
        f"{engine.device} in {engine.precision}, kernels: {engine.kernels}, output in "
        f"{config.output_dir}"
    )


class RunClock:
    """Wall-clock seconds of a run, those of its earlier parts included."""

    def __init__(self, earlier: float):
        self.earlier, self._began = earlier, time.monotonic()

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self._began


def train(job: Job, clock: RunClock, status: StatusLine) -> tuple[Position, Evaluation | None, int]:
    """Run the loop from the job's position to its end, or until a signal, whose exit code is the
    last of the three; 0 without one."""
    config, engine, found = job.config, job.engine, job.found
    run_dir, warn = Path(config.output_dir), warner(status)
    minutes = config.training.stall_minutes
    watchdog = Watchdog(run_dir, engine.rank, None if minutes is None else 60 * minutes)
    first_step = job.position.step + 1 if found else 0
    known = config.model_copy(update={"model": job.model})
    with open_writer(run_dir, known, engine.rank, first_step, warn) as writer:

        def save(at: Position) -> None:
            if writer is not None:
                writer.flush()
            if job.routes.target is not None:
                with agreeing(engine.gather):
                    job.routes.target.sync()
            if broken := engine.nonfinite_weights():
                raise NonFiniteError(
                    f"step {at.step}: the weight {broken[0]} is inf or NaN, so this step is not "
                    f"saved; lower optimizer.learning_rate and go on from the checkpoint before"
                )
            tensors, state = run_state(
                engine,
                at,
                config,
                job.identity,
                seconds=clock.seconds(),
                metrics=loop.memory(),
            )
            save_checkpoint(
                run_dir,
                at.step,
                tensors,
                state,
                keep_last=config.checkpoint.keep_last,
                warn=warn,
                rank=engine.rank,
                gather=engine.gather,
            )

        loop = Loop(
            engine,
            job.data,
            known,
            writer=writer,
            status=status,
            save=save,
            sample=lambda stop: "\n".join(samples(engine, job.data, config, stop)) or None,
            beat=watchdog.beat,
            flops=job.plan.flops_per_token,
            routes=job.routes,
        )
        if found is not None:
            loop.remember(found.tensors["metrics"])
        with StopRequest(launched=engine.shared_out) as stop, watchdog:
            position, evaluation = loop.run(job.position, stop)
            stopped = engine.any_rank(stop())
            if stopped and engine.shared_out:
                # The launcher's own signal, after the first rank has ended, has nothing to add.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return position, evaluation, (stop.exit_code or 143) if stopped else 0


def open_writer(
    run_dir: Path,
    config: RunConfig,
    rank: int,
    first_step: int,
    warn: Callable[[str], None],
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """The writer of the curves, closed however the run ends: they are what explains it."""
    if not config.logging.tensorboard or rank > 0:
        return contextlib.nullcontext()
    writer = MetricsWriter(run_dir, config, first_step, warn)
    return contextlib.closing(writer)


def save_description(run_dir: Path, config: RunConfig, data: PreparedData) -> None:
    """The config and the tokenizer beside the checkpoints: what `train.generate` needs."""
    with storage_errors(run_dir):
        replace_file(run_dir / "config.yaml", dump_config(config))
        data.tokenizer.save(run_dir / "tokenizer.json")


def samples(
    engine: Engine,
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
            stop=stop,
            agree=engine.from_rank_0,
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
    num_experts = format_layers(config.model.choices_of_layers)
    status.message("\n" + render_summary(summary, num_experts) + "\n")
    if summary["layers"]:
        layers = tuple(row["layer"] for row in summary["layers"])
        figure = domain_expert_map(evaluation.tokens_per_expert, domain_names, layers)
        with storage_errors(run_dir):
            save_figure(figure, run_dir / "domain_expert_map.png")
        status.message(f"which experts read which domain:  {run_dir / 'domain_expert_map.png'}")
    programs = Path(sys.executable).parent
    here = f"{os.path.relpath(programs)}/" if programs.is_relative_to(Path.cwd()) else ""
    if summary["layers"]:
        status.message(
            f"what the experts learnt:           {here}python -m train.analyze "
            f"{shlex.quote(str(run_dir))}"
        )
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
    exit_code = main()
    if "RANK" in os.environ:
        # Threads of process groups may end the process with SIGABRT while Python winds down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
