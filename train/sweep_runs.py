"""Which runs is a sweep made of, which of them are finished, and how long will the rest take?"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from train.changed_settings import changed_settings
from train.config import RunConfig
from train.data import PreparedData, prepare_data
from train.device import choose_device, choose_kernels, choose_precision
from train.errors import ConfigError, DataError
from train.plan import Plan, check_memory, make_plan
from train.run_state import identity
from train.status import StatusLine
from train.sweep_config import Sweep
from train.tokenizer import with_vocab_size


class Run(NamedTuple):
    """One arm with one seed; config: with its seed, precision and vocabulary known. settings: what
    a kept result must have been made with. path: of its result."""

    arm: str
    config: RunConfig
    settings: dict[str, Any]
    path: Path


class Study(NamedTuple):
    """A sweep that is ready to train: runs seed by seed, all arms of a seed one after the other."""

    runs: list[Run]
    data: PreparedData
    configs: dict[str, RunConfig]
    plans: dict[str, Plan]
    baseline: str
    directory: Path
    command: str
    report_name: str


def prepare(sweep: Sweep, num_seeds: int, command: str) -> Study:
    """Data and models of all arms; what cannot be trained is refused before anything is.

    Raises:
        ConfigError: if an arm cannot run here, or a kept result is of other settings.
        DataError: if there is no validation text.
    """
    shared, directory = sweep.shared, Path(sweep.shared.output_dir)
    data = prepare_data(shared.data, shared.tokenizer, progress=sys.stderr.isatty())
    if not any(data.validation_tokens.values()):
        raise DataError("no domain has validation text; raise data.validation_fraction")
    precision = _automatic_precision(sweep)
    configs, plans = {}, {}
    for name, config in sweep.arms.items():
        device = choose_device(config.training.device)
        model = with_vocab_size(config.model, data.tokenizer.vocab_size)
        choose_kernels(model.kernel_backend, device)
        training = config.training
        if training.precision == "auto":
            training = training.model_copy(update={"precision": precision})
        configs[name] = config.model_copy(update={"model": model, "training": training})
        plans[name] = make_plan(configs[name], model, 2 if training.precision == "bfloat16" else 4)
        check_memory(plans[name], device)
    runs = []
    for seed in range(shared.seed, shared.seed + num_seeds):
        for name, config in configs.items():
            seeded = config.model_copy(update={"seed": seed})
            settings = _settings(seeded, data)
            path = directory / f"seed_{seed}" / f"{name}.json"
            runs.append(Run(name, seeded, settings, path))
    # A part of the arms has a report of its own: that of all stays.
    report_name = "report" if sweep.whole else "report_of_some"
    study = Study(runs, data, configs, plans, sweep.baseline, directory, command, report_name)
    for run in runs:
        kept_result(run)
    return study


def _automatic_precision(sweep: Sweep) -> str:
    """Measured once, since all arms must take the same; of a sweep that goes on, what it had."""
    automatic = [name for name, each in sweep.arms.items() if each.training.precision == "auto"]
    finished = sorted(Path(sweep.shared.output_dir).glob("seed_*/*.json"))
    kept = next((path for path in finished if path.stem in automatic), None)
    earlier = _read_result(kept)["environment"]["precision"] if kept else None
    return choose_precision("auto", choose_device(sweep.shared.training.device), earlier=earlier)


def _settings(config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """What decides a run's result."""
    sections = {"optimizer", "schedule", "training", "evaluation"}
    return {
        **identity(config, config.model, data),
        **config.model_dump(mode="json", include=sections),
    }


def _read_result(path: Path) -> dict[str, Any]:
    """The result in a file.

    Raises:
        ConfigError: if it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = all(key in found for key in ("settings", "environment", "history"))
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise ConfigError(f"{path} is damaged: no result of a run; delete it to train it again")
    return found


def kept_result(run: Run) -> dict[str, Any] | None:
    """The result of a run that is finished, None of another.

    Raises:
        ConfigError: if it is of other settings, or damaged.
    """
    if not run.path.exists():
        return None
    kept = _read_result(run.path)
    changes = changed_settings(kept["settings"], run.settings, ("there", "now"))
    if changes:
        raise ConfigError(
            f"{run.path} is of other settings ({changes[0]}); choose another output_dir, or "
            f"delete it"
        )
    return kept


class Progress:
    """Which run of how many, and how long the rest will take: an arm takes as long as its earlier
    seeds, or where there are none, as the other arms' runs."""

    def __init__(self, runs: list[Run]):
        self._todo: list[Run] = []
        self._seconds: dict[str, list[float]] = {}
        for run in runs:
            kept = kept_result(run)
            if kept is None:
                self._todo.append(run)
            else:
                self.end(run, kept["wall_seconds"])
        self._number, self._total = len(runs) - len(self._todo), len(runs)

    def begin(self, run: Run, status: StatusLine) -> None:
        """Show this run, the next one, in every line."""
        self._number += 1
        self._todo.remove(run)
        status.label = f"run {self._number}/{self._total} {run.arm} seed {run.config.seed}"
        status.seconds_after = self.seconds_after

    def end(self, run: Run, seconds: float) -> None:
        """Count a finished run."""
        self._seconds.setdefault(run.arm, []).append(seconds)

    def seconds_after(self, this_run: float) -> float:
        """Of the runs that follow one of so many seconds."""
        known = {arm: statistics.mean(seconds) for arm, seconds in self._seconds.items()}
        otherwise = statistics.mean(known.values()) if known else this_run
        return sum(known.get(run.arm, otherwise) for run in self._todo)
