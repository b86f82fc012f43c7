"""Do experts help? MoE against a dense model of equal active FLOPs, over paired seeds.

    python -m train.compare --config configs/ablations/moe_vs_dense.yaml --seeds 5

The config is the MoE arm; the dense arm is the same with `model.feed_forward: dense`. Both see the
same tokens in the same order. Each finished arm is kept in output_dir, so a study that was stopped
goes on with the next one. Speed-up at equal loss: how much sooner the MoE passes the dense model's
final validation loss, in steps, FLOPs and seconds (below 1: the dense model passes the MoE's).
Seconds are steps times the arm's median step, since a shared machine stalls now and then.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats

from moe.config import ModelConfig, dense_equivalent
from moe.model import MoETransformer, flops_per_token, num_parameters
from train.arguments import parse_arguments
from train.config import RoutesConfig, RunConfig, dump_config, load_config
from train.data import PreparedData, prepare_data
from train.device import choose_device, choose_precision
from train.engine import build_engine
from train.errors import ConfigError, DataError
from train.loop import Loop, Position, StopRequest
from train.plan import describe_plan, make_plan
from train.program import guarded
from train.random_state import seed_all
from train.run_directory import RunLock, make_directory, replace_file, storage_errors
from train.run_state import identity
from train.status import StatusLine
from train.tokenizer import planned_vocab_size, with_vocab_size

ARMS = ("moe", "dense")


class HistoryPoint(NamedTuple):
    """Validation loss after a step, and the seconds of training up to it."""

    step: int
    loss: float
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Run or continue the study and print its table; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", type=int, default=5, metavar="N", help="paired seeds")

    options, overrides = parse_arguments(argv, __doc__ or "", add_options)

    def program() -> int:
        if options.seeds < 2:
            raise ConfigError(f"--seeds ({options.seeds}) must be at least 2 for an interval")
        config = load_config(options.config, overrides)
        if config.model.feed_forward != "moe":
            raise ConfigError("model.feed_forward (dense) must be moe: the dense arm is derived")
        if not 0 < config.evaluation.every < config.num_steps:
            raise ConfigError(
                f"evaluation.every ({config.evaluation.every}) must lie between 0 and the run's "
                f"steps ({config.num_steps}): speed-up is read off the validation curve"
            )
        if config.routes != RoutesConfig():
            raise ConfigError("routes has no effect in a comparison; leave it out")
        if options.print_config:
            print(dump_config(config), end="")
            return 0
        if options.dry_run:
            print(describe_study(config, options.seeds))
            return 0
        with RunLock(Path(config.output_dir)):
            return run_study(config, options.seeds)

    return guarded(program)


def describe_study(config: RunConfig, num_seeds: int) -> str:
    """What each arm costs, and how many there are."""
    moe_model = with_vocab_size(config.model, planned_vocab_size(config.tokenizer))
    parts = [f"{num_seeds} seeds of two arms"]
    for arm, model in (("moe", moe_model), ("dense", dense_equivalent(moe_model))):
        parts += ["", f"arm {arm}", describe_plan(make_plan(config, model, 2))]
    return "\n".join(parts)


def run_study(config: RunConfig, num_seeds: int) -> int:
    """Train what is missing, seed by seed, then report."""
    status = StatusLine()
    data = prepare_data(config.data, config.tokenizer, progress=sys.stderr.isatty())
    if not any(data.validation_tokens.values()):
        raise DataError("no domain has validation text; raise data.validation_fraction")
    if config.training.precision == "auto":
        # Measured once: all arms of a study must take the same.
        precision = choose_precision("auto", choose_device(config.training.device))
        training = config.training.model_copy(update={"precision": precision})
        config = config.model_copy(update={"training": training})
    moe_model = with_vocab_size(config.model, data.tokenizer.vocab_size)
    models = {"moe": moe_model, "dense": dense_equivalent(moe_model)}
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with StopRequest() as stop:
        for index in range(num_seeds):
            for arm in ARMS:
                seeded = config.model_copy(
                    update={"seed": config.seed + index, "model": models[arm]}
                )
                result = run_arm(seeded, data, arm, status, stop)
                if result is None:
                    status.message("stopped; finished arms are kept, run again to go on")
                    return stop.exit_code
                results[arm].append(result)
    report = study_report(results, models, config)
    directory = Path(config.output_dir)
    with storage_errors(directory):
        replace_file(directory / "report.json", json.dumps(report, indent=2) + "\n")
    status.message("\n" + render_report(report))
    return 0


def run_arm(
    config: RunConfig, data: PreparedData, arm: str, status: StatusLine, stop: StopRequest
) -> dict[str, Any] | None:
    """One model, one seed; its kept result where there is one. None if it was stopped.

    Raises:
        ConfigError: if the kept result is of another setting.
    """
    path = Path(config.output_dir) / f"seed_{config.seed}" / f"{arm}.json"
    settings = {
        **identity(config, config.model, data),
        "optimizer": config.optimizer.model_dump(mode="json"),
        "schedule": config.schedule.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
    }
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] != settings:
            raise ConfigError(
                f"{path} is of other settings; choose another output_dir, or delete it"
            )
        return kept
    status.message(f"seed {config.seed}, {arm}")
    seed_all(config.seed)
    engine = build_engine(config, config.model)
    loop = Loop(engine, data, config, writer=None, status=status, save=lambda position: None)
    loop.run(Position(), stop)
    if stop():
        return None
    pace = statistics.median(loop.step_seconds)
    points = [HistoryPoint(step, loss, step * pace) for step, loss in loop.history]
    result = {
        "settings": settings,
        "precision": engine.precision,
        "threads": torch.get_num_threads(),
        "history": [point._asdict() for point in points],
    }
    with storage_errors(path.parent):
        make_directory(path.parent)
        replace_file(path, json.dumps(result, indent=2) + "\n")
    return result


def crossing(history: list[HistoryPoint], loss: float) -> tuple[float, float] | None:
    """(step, seconds) at which a validation curve first reaches `loss`, linear between points."""
    for before, after in zip([None, *history], history, strict=False):
        if after.loss <= loss:
            if before is None:
                return float(after.step), after.seconds
            part = (before.loss - loss) / (before.loss - after.loss)
            return (
                before.step + part * (after.step - before.step),
                before.seconds + part * (after.seconds - before.seconds),
            )
    return None


def speed_up(
    moe: list[HistoryPoint], dense: list[HistoryPoint], flops_ratio: float
) -> dict[str, float]:
    """At equal loss, dense over MoE, in steps, FLOPs and seconds.

    Args:
        flops_ratio: FLOPs of a dense token over those of a MoE token.
    """
    slow, fast, sign = (dense, moe, 1) if moe[-1].loss <= dense[-1].loss else (moe, dense, -1)
    reached = crossing(fast, slow[-1].loss)
    assert reached is not None
    step, seconds = reached
    ratios = {
        "steps": (slow[-1].step / step) ** sign,
        "seconds": (slow[-1].seconds / seconds) ** sign,
    }
    return {**ratios, "flops": ratios["steps"] * flops_ratio}


def study_report(
    results: dict[str, list[dict[str, Any]]], models: dict[str, ModelConfig], config: RunConfig
) -> dict[str, Any]:
    """Losses, the paired difference with its 95 % interval, and speed-ups, as JSON values."""
    curves = {
        arm: [[HistoryPoint(**point) for point in result["history"]] for result in results[arm]]
        for arm in ARMS
    }
    final = {arm: [curve[-1].loss for curve in curves[arm]] for arm in ARMS}
    pairs = list(zip(final["moe"], final["dense"], strict=True))
    differences = [moe - dense for moe, dense in pairs]
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences)
    half /= math.sqrt(len(differences))
    mean = statistics.mean(differences)
    cost: dict[str, dict[str, int]] = {}
    for arm, model_config in models.items():
        with torch.device("meta"):
            model = MoETransformer(model_config)
        count = num_parameters(model)
        flops = flops_per_token(model, config.training.seq_len)
        cost[arm] = {"total": count.total, "active": count.active, "flops_per_token": flops}
    flops_ratio = cost["dense"]["flops_per_token"] / cost["moe"]["flops_per_token"]
    ratios = [
        speed_up(moe, dense, flops_ratio)
        for moe, dense in zip(curves["moe"], curves["dense"], strict=True)
    ]
    return {
        "tokens": config.num_steps * config.tokens_per_step,
        "seeds": [config.seed + index for index in range(len(differences))],
        "arms": {
            arm: {
                **cost[arm],
                "loss": final[arm],
                "mean_loss": statistics.mean(final[arm]),
                "standard_deviation": statistics.stdev(final[arm]),
                "seconds": statistics.mean(curve[-1].seconds for curve in curves[arm]),
            }
            for arm in ARMS
        },
        "difference": {"mean": mean, "low": mean - half, "high": mean + half, "each": differences},
        "speed_up": {
            unit: {
                "mean": statistics.mean(ratio[unit] for ratio in ratios),
                "each": [ratio[unit] for ratio in ratios],
            }
            for unit in ("steps", "flops", "seconds")
        },
    }


def render_report(report: dict[str, Any]) -> str:
    """The study as a Markdown table and three sentences."""
    lines = [
        f"Validation loss (nats/token, mean over domains) after {report['tokens']:,} tokens:",
        "",
        "| arm | parameters, total | active | MFLOPs/token | "
        + " | ".join(f"seed {seed}" for seed in report["seeds"])
        + " | mean | SD | training s |",
        "|---" * (7 + len(report["seeds"])) + "|",
    ]
    for arm in ARMS:
        row = report["arms"][arm]
        losses = " | ".join(f"{loss:.4f}" for loss in row["loss"])
        lines.append(
            f"| {arm} | {row['total'] / 1e6:.2f} M | {row['active'] / 1e6:.2f} M | "
            f"{row['flops_per_token'] / 1e6:.2f} | {losses} | {row['mean_loss']:.4f} | "
            f"{row['standard_deviation']:.4f} | {row['seconds']:.0f} |"
        )
    difference, ratios = report["difference"], report["speed_up"]
    lines += [
        "",
        f"Paired difference MoE - dense: {difference['mean']:+.4f}, 95 % interval "
        f"[{difference['low']:+.4f}, {difference['high']:+.4f}], {len(report['seeds'])} seeds.",
        "Speed-up at equal loss, mean over seeds: "
        + ", ".join(f"{ratios[unit]['mean']:.2f}x in {unit}" for unit in ratios)
        + ".",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
