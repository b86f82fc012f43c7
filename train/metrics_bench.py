"""What do the metrics cost? `python -m train.metrics_bench [--config FILE]`

Training steps of random tokens in one process and in turns: without metrics; with what every step
does for the window, the history and the alarms; with the numbers of a logged step, written to
TensorBoard; with the pictures on top. A run's share follows from `logging.every` and
`logging.heatmap_every`.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from kernels.machine import seconds_of
from train.alarms import Alarms
from train.config import RunConfig, load_config
from train.engine import build_engine
from train.errors import ConfigError
from train.metrics import LoadHistory, LoadWindow, StepMetrics
from train.metrics_writer import MetricsWriter
from train.packing import TrainLoader
from train.program import guarded
from train.random_state import seed_all
from train.rank_bench import RandomTokens
from train.scalars import StepFacts
from train.status import format_layers
from train.step import read_step, router_biases, train_step
from train.tokenizer import planned_vocab_size, with_vocab_size


class Contestants:
    """The same step with more and more metrics, each one call of a method."""

    def __init__(self, config: RunConfig, folder: Path):
        seed_all(config.seed)
        self.config = config
        self.engine = build_engine(config, config.model)
        vocab_size = config.model.vocab_size
        assert vocab_size is not None
        loader = TrainLoader(RandomTokens(config, vocab_size), config.training.seq_len, config.seed)
        self.batches = read_step(loader, 0, config, self.engine)
        self.window, self.history, self.alarms = LoadWindow(), LoadHistory(), Alarms(config.model)
        self.writer = MetricsWriter(folder, config, 0, self._fail)
        self.steps = 0

    @staticmethod
    def _fail(warning: str) -> None:
        raise ConfigError(f"the events could not be written: {warning}")

    def _step(self, *, detail: bool) -> StepMetrics:
        metrics = train_step(self.engine, self.batches, self.steps, self.config, detail=detail)
        self.steps += 1
        assert metrics is not None
        return metrics

    def off(self) -> None:
        """No metrics: the losses, the flags and the counts that routers and errors need."""
        self._step(detail=False)

    def every_step(self, *, detail: bool = False) -> tuple[StepMetrics, StepFacts]:
        """Window, history and alarms."""
        metrics = self._step(detail=detail)
        load = self.window.add(metrics.tokens_per_expert)
        self.history.add(metrics.tokens_per_expert, metrics.step)
        alarms = tuple(self.alarms.check(metrics, self.window))
        return metrics, StepFacts(load, 1.0, alarms=alarms)

    def logged(self) -> tuple[StepMetrics, StepFacts]:
        """And what routers are like, norms, all scalars."""
        metrics, facts = self.every_step(detail=True)
        facts = facts._replace(bias=router_biases(self.engine.model))
        self.writer.write_step(metrics, facts)
        return metrics, facts

    def pictured(self) -> None:
        """And the pictures and histograms."""
        metrics, facts = self.logged()
        self.writer.write_load(facts, metrics)


def report(config: RunConfig, repeats: int) -> str:
    """A Markdown table, and the share of a run's step."""
    with tempfile.TemporaryDirectory() as folder:
        each = Contestants(config, Path(folder))
        names = ("off", "every_step", "logged", "pictured")
        times = seconds_of({name: getattr(each, name) for name in names}, repeats)
        each.writer.close()
    off, every_step, logged, pictured = (statistics.median(times[name]) for name in names)
    every, heatmap_every = config.logging.every, config.logging.heatmap_every
    extra = every_step - off + (logged - every_step) / every
    if heatmap_every:
        extra += (pictured - logged) / heatmap_every
    model, tokens = config.model, config.tokens_per_step
    lines = [
        f"One training step of {tokens:,} tokens: {model.num_layers} layers, "
        f"D {model.hidden_size}, {format_layers(model.experts_of_layers)} experts, "
        f"top-{format_layers(model.top_k_of_layers)}; "
        f"{each.engine.precision} on {each.engine.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}. "
        f"Medians of {repeats} steps in turns.",
        "",
        "| metrics | ms a step | over none |",
        "|---|---|---|",
        f"| none | {off * 1e3:.1f} | |",
        f"| of every step | {every_step * 1e3:.1f} | {every_step / off - 1:+.1%} |",
        f"| of a logged step | {logged * 1e3:.1f} | {logged / off - 1:+.1%} |",
        f"| with pictures | {pictured * 1e3:.1f} | {pictured / off - 1:+.1%} |",
        "",
        f"With logging.every {every} and logging.heatmap_every {heatmap_every} metrics cost "
        f"{extra / off:.1%} of a step.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.metrics_bench", description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, help="of PyTorch; by default its own choice")
    options = parser.parse_args(argv)

    def program() -> int:
        for name in ("repeats", "threads"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} ({value}) must be at least 1")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        config = load_config(options.config)
        model = with_vocab_size(config.model, planned_vocab_size(config.tokenizer))
        if not model.moe_layers:
            raise ConfigError("model.feed_forward (dense) has no experts to measure")
        print(report(config.model_copy(update={"model": model}), options.repeats))
        return 0

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
