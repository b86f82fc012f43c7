"""Which of several ideas is better? Arms that differ in a few settings, over paired seeds.

    python -m train.sweep --config configs/ablations/routers.yaml --seeds 5

The config is an ordinary run's with a mapping `arms` of what each has in its place. All arms of a
seed see the same tokens in the same order, and are compared with the baseline by pairs. Each
finished run is one file, OUTPUT_DIR/seed_N/ARM.json: a sweep that was stopped, or killed, goes on
with the next one when it is started again, and seeds trained on another machine (`seed=3`) are
added by copying its folders seed_N. OUTPUT_DIR has report.json, report.md, report.png (with --arms,
report_of_some) and, for TensorBoard, a row in the tab HPARAMS for each run.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from train.arguments import parse_arguments
from train.config import dump_config
from train.data import check_sources
from train.drawing import save_figure
from train.engine import build_engine
from train.errors import ConfigError, NonFiniteError
from train.loop import Loop, Position, StopRequest
from train.metrics_writer import write_sweep_run
from train.plan import describe_plan, format_count, make_plan
from train.program import guarded
from train.random_state import seed_all
from train.run_directory import RunLock, make_directory, replace_file, storage_errors
from train.scalars import evaluation_scalars
from train.status import StatusLine, format_layers, format_table
from train.summary import summarize
from train.sweep_config import Sweep, load_sweep
from train.sweep_picture import sweep_picture
from train.sweep_report import render_sweep, sweep_report
from train.sweep_runs import Progress, Run, Study, kept_result, prepare
from train.sweep_statistics import HistoryPoint
from train.tokenizer import planned_vocab_size, with_vocab_size
from train.validation import Evaluation


def main(argv: list[str] | None = None) -> int:
    """Run or continue the sweep and print its report; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", type=int, default=5, metavar="N", help="paired seeds")
        parser.add_argument("--arms", metavar="A,B", help="these arms only, the baseline included")
        parser.add_argument(
            "--report",
            action="store_true",
            help="train nothing, report the seeds that are finished",
        )

    options, overrides = parse_arguments(argv, __doc__ or "", add_options)
    arguments = sys.argv[1:] if argv is None else argv

    def program() -> int:
        if options.seeds < 2:
            raise ConfigError(f"--seeds ({options.seeds}) must be at least 2 for an interval")
        only = [name.strip() for name in (options.arms or "").split(",") if name.strip()]
        sweep = load_sweep(options.config, overrides, only)
        if options.print_config:
            for name, config in sweep.arms.items():
                print(f"--- # {name}\n{dump_config(config)}", end="")
            return 0
        if options.dry_run:
            print(describe_sweep(sweep, options.seeds))
            return 0
        with RunLock(Path(sweep.shared.output_dir)):
            study = prepare(sweep, options.seeds, f"python -m train.sweep {shlex.join(arguments)}")
            return run_study(study, options.report)

    return guarded(program)


def describe_sweep(sweep: Sweep, num_seeds: int) -> str:
    """The baseline's plan, then each arm's size and FLOPs beside the baseline's."""
    check_sources(sweep.shared.data, sweep.shared.tokenizer)
    vocab_size = planned_vocab_size(sweep.shared.tokenizer)
    plans = {
        name: make_plan(config, with_vocab_size(config.model, vocab_size), 4)
        for name, config in sweep.arms.items()
    }
    flops = plans[sweep.baseline].flops_per_token
    rows = [("arm", "parameters", "active", "FLOPs a token", f"against {sweep.baseline}")]
    rows += [
        (
            name,
            format_count(plan.parameters.total),
            plan.at_most + format_count(plan.parameters.active),
            plan.at_most + format_count(plan.flops_per_token),
            f"{plan.flops_per_token / flops - 1:+.2%}",
        )
        for name, plan in plans.items()
    ]
    return "\n".join(
        [
            f"arm {sweep.baseline}, the baseline",
            describe_plan(plans[sweep.baseline]),
            "",
            format_table(rows),
            "",
            f"{num_seeds} seeds of {len(plans)} arms: {num_seeds * len(plans)} runs",
        ]
    )


def run_study(study: Study, report_only: bool) -> int:
    """Train what is missing, seed by seed, and report after each seed."""
    status, progress = StatusLine(), Progress(study.runs)
    exit_code = 0 if report_only else _train(study, status, progress)
    if exit_code:
        status.message("stopped; finished runs are kept, run again to go on")
        return exit_code
    report = write_report(study)
    if report is None:
        raise ConfigError(
            f"{study.directory}: fewer than two seeds are finished in all arms; run without "
            f"--report to go on"
        )
    status.message("\n" + render_sweep(report))
    status.message(f"as a picture: {study.directory / study.report_name}.png")
    return 0


def _train(study: Study, status: StatusLine, progress: Progress) -> int:
    """The exit code of the signal that stopped it, or 0."""
    with StopRequest() as stop:
        for run in study.runs:
            if kept_result(run) is not None:
                continue
            progress.begin(run, status)
            began = time.monotonic()
            if not train_run(run, study, status, stop):
                return stop.exit_code
            progress.end(run, time.monotonic() - began)
            if run.arm == list(study.configs)[-1]:
                write_report(study)
    return 0


def train_run(run: Run, study: Study, status: StatusLine, stop: StopRequest) -> bool:
    """Train one arm with one seed and keep its result; False if it was stopped before its end."""
    config, began = run.config, time.monotonic()
    status.message(status.label)
    seed_all(config.seed)
    engine = build_engine(config, config.model)
    loop = Loop(engine, study.data, config, writer=None, status=status, save=lambda position: None)
    try:
        _, evaluation = loop.run(Position(), stop)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"arm {run.arm}, seed {config.seed}: {error}; --arms goes on without this arm"
        ) from error
    if evaluation is None:
        return False
    # A median: a shared machine stalls now and then.
    pace = statistics.median(loop.step_seconds)
    tokens = config.tokens_per_step
    points = [HistoryPoint(step * tokens, loss, step * pace) for step, loss in loop.history]
    seconds = config.num_steps * pace
    result = {
        "arm": run.arm,
        "seed": config.seed,
        "settings": run.settings,
        "environment": {
            "precision": engine.precision,
            "threads": torch.get_num_threads(),
            "device": str(engine.device),
            "machine": platform.machine(),
            "torch": torch.__version__,
        },
        "history": [point._asdict() for point in points],
        "summary": summarize(evaluation, config.model, config.num_steps * tokens, seconds),
        "training_seconds": seconds,
        "wall_seconds": time.monotonic() - began,
        "tokens_per_second": tokens / pace,
        "skipped_steps": loop.num_skipped,
        "alarms": loop.num_alarms,
        "dropped_percent": 100 * loop.num_dropped / max(1, loop.num_assigned),
    }
    with storage_errors(study.directory):
        _write_events(run, study, dict(loop.history), evaluation, tokens / pace)
        make_directory(run.path.parent)
        replace_file(run.path, json.dumps(result, indent=2) + "\n")
    return True


def _write_events(
    run: Run, study: Study, curve: dict[int, float], evaluation: Evaluation, speed: float
) -> None:
    """The run's row in the tab HPARAMS."""
    model, plan = run.config.model, study.plans[run.arm]
    settings: dict[str, bool | int | float | str] = {"arm": run.arm, "seed": run.config.seed}
    routers = (model.at(layer).moe.router.name for layer in model.moe_layers)
    settings["router"] = format_layers(routers) or "none"
    if model.moe_layers:
        settings |= {
            "num_experts": statistics.mean(model.experts_of_layers),
            "experts_per_token": model.experts_per_token,
        }
    settings |= {
        "parameters": plan.parameters.total,
        "active_parameters": plan.parameters.active,
        "flops_per_token": plan.flops_per_token,
    }
    results = evaluation_scalars(evaluation, None, model.moe_layers)
    results["speed/tokens_per_second"] = speed
    folder = study.directory / "tensorboard" / run.arm / f"seed_{run.config.seed}"
    write_sweep_run(folder, settings, curve, results)


def write_report(study: Study) -> dict[str, Any] | None:
    """Report the seeds that all arms have finished, in three files; None of fewer than two."""
    kept = {(run.config.seed, run.arm): kept_result(run) for run in study.runs}
    seeds = sorted({run.config.seed for run in study.runs})
    whole = [seed for seed in seeds if all(kept[seed, arm] is not None for arm in study.configs)]
    if len(whole) < 2:
        return None
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in study.configs}
    for seed in whole:
        for arm, runs in results.items():
            result = kept[seed, arm]
            assert result is not None
            runs.append(result)
    report = sweep_report(results, study.configs, study.plans, study.baseline, study.command)
    with storage_errors(study.directory):
        path = study.directory / study.report_name
        replace_file(path.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
        replace_file(path.with_suffix(".md"), render_sweep(report))
        save_figure(sweep_picture(report), path.with_suffix(".png"))
    return report


if __name__ == "__main__":
    sys.exit(main())
