"""How do scalars, pictures, histograms and text reach TensorBoard, and what if they cannot?

Tags live here (pictures, histograms, text) and in `train/scalars.py`; `moe/GLOSSARY.md` explains
each.
"""

import contextlib
import shutil
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from train.alarms import Alarm
from train.config import RunConfig, dump_config
from train.data import PreparedData
from train.figures import (
    bias_map,
    co_activation_map,
    domain_expert_map,
    load_heat_map,
    load_history,
    render,
)
from train.metrics import LOGIT_BINS, LOGIT_BOUND, LoadHistory, StepMetrics
from train.probe import ProbeRoutes
from train.route_statistics import VocabularyCounts
from train.scalars import (
    StepFacts,
    chart_layout,
    evaluation_scalars,
    layer_tag,
    step_scalars,
)
from train.token_text import token_name
from train.validation import Evaluation

# Tokens of each expert, and experts of each layer, in a table of the tokens that experts like.
_TOP_TOKENS, _TOP_EXPERTS = 8, 64

# What decides what is learnt; where it is written, and how often one looks, does not.
_SECTIONS = ("data", "model", "optimizer", "parallel", "schedule", "seed", "tokenizer", "training")
# TensorBoard cuts longer lines off.
_WRAPPER = textwrap.TextWrapper(
    120,
    subsequent_indent="      ",
    drop_whitespace=False,
    replace_whitespace=False,
    expand_tabs=False,
)


class MetricsWriter:
    """Writes scalars, images, histograms and text; a failing disk stops nothing but this.

    A folder that has vanished is begun again.

    Args:
        run_dir: of the run; events are in its `tensorboard`. config: its vocab_size known.
        first_step: where a resumed run goes on, 0 where it begins. What an earlier process wrote
            from there on is replaced as it is written again; what was never saved is moved aside.
        warn: told if writing fails.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, first_step: int, warn: Callable[[str], None]
    ):
        self.layers = config.model.moe_layers
        self._num_experts = config.model.choices_of_layers
        self._config, self._warn = config, warn
        self._directory = run_dir / "tensorboard"
        self._probe = ProbeRoutes(run_dir / "probe_routes")
        self._writer: SummaryWriter | None = None
        self._excepthook = threading.excepthook
        self._guard(lambda: self._open(first_step))
        with self._keeping_routes(first_step):
            self._probe.begin(max(0, first_step - 1))

    def _open(self, first_step: int) -> None:
        if first_step == 0 and any(self._directory.glob("events.out.*")):
            # Of a start that has left no checkpoint: points of it would stand among this one's.
            aside = self._directory.with_name("tensorboard_abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            self._directory.rename(aside)
        # Without purge_step the curves of a resumed run double back.
        purge_step = first_step if first_step > 0 else None
        threading.excepthook = self._on_thread_error
        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step, flush_secs=20)
        self._writer.add_custom_scalars(chart_layout(self.layers))
        self._add_text("config", dump_config(self._config), first_step)
        self._add_hyper_parameters()

    def _add_hyper_parameters(self) -> None:
        """The run's row in the tab HParams, with its latest validation loss."""
        assert self._writer is not None
        # A run is one row: `add_hparams` would write a second one.
        settings = self._config.model_dump(mode="json", include=set(_SECTIONS))
        values = hyper_parameters(settings)
        for summary in hparams(values, {"validation/mean_loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary)

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        # The event file is written by a thread, whose error the next call raises to us again.
        if type(error.thread).__name__ != "_AsyncWriterThread":
            self._excepthook(error)

    def _guard(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._warn(f"TensorBoard: {error}; going on without it")
            self._writer = None

    def _guarded(self, step: int, write: Callable[[], None]) -> None:
        """Write something of a step, into a folder that is there."""

        def checked() -> None:
            if not any(self._directory.glob("events.out.*")):
                self._warn(f"TensorBoard: {self._directory} has vanished; beginning it again")
                self._close_quietly()
                self._open(step)
            write()

        if self._writer is not None:
            self._guard(checked)

    @contextlib.contextmanager
    def _keeping_routes(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(f"{self._probe.folder}: {error}; the routes of step {step} are not kept")

    def _close_quietly(self) -> None:
        try:
            assert self._writer is not None
            self._writer.close()
        except OSError:
            return

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        """All in one event: an event each would take ten times as long."""
        assert self._writer is not None
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer._get_file_writer().add_summary(Summary(value=entries), step)

    def write_step(self, metrics: StepMetrics, facts: StepFacts) -> None:
        """Scalars of one step."""
        values = step_scalars(metrics, facts, self.layers)
        self._guarded(metrics.step, lambda: self._add_scalars(values, metrics.step))

    def write_alarms(self, alarms: Sequence[Alarm]) -> None:
        """The text of a step's alarms; in one, as TensorBoard keeps one text a step."""
        lines = [alarm.text for alarm in alarms]
        if lines:
            self.write_text("alarms", "\n".join(lines), next(iter(alarms)).step)

    def write_load(self, facts: StepFacts, metrics: StepMetrics) -> None:
        """The layer x expert heat map and the routers' biases; how load and logits are spread."""

        def write() -> None:
            assert self._writer is not None
            step = metrics.step
            self._add_figure("load/heat_map", load_heat_map(facts.window, self.layers), step)
            if facts.bias is not None:
                self._add_figure("router/bias", bias_map(facts.bias, self.layers), step)
            for index, layer in enumerate(self.layers):
                load = facts.window[index, : self._num_experts[index]]
                share = load / load.float().mean().clamp(min=1e-9)
                self._writer.add_histogram(f"load/share/{layer_tag(layer)}", share, step)
                if metrics.detail is not None:
                    counts = metrics.detail.logit_counts[index]
                    self._add_logits(f"router/logits/{layer_tag(layer)}", counts, step)

        if self.layers:
            self._guarded(metrics.step, write)

    def _add_logits(self, tag: str, counts: Tensor, step: int) -> None:
        """A histogram of (LOGIT_BINS,) counts."""
        assert self._writer is not None
        edges = torch.linspace(-LOGIT_BOUND, LOGIT_BOUND, LOGIT_BINS + 1, dtype=torch.float64)
        centres = (edges[:-1] + edges[1:]) / 2
        used = counts.nonzero().flatten()
        if not len(used):
            return
        number = counts.double()
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[used[0]]),
            max=float(edges[used[-1] + 1]),
            num=int(counts.sum()),
            sum=float((number * centres).sum()),
            sum_squares=float((number * centres.square()).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def write_evaluation(
        self, evaluation: Evaluation, data: PreparedData, history: LoadHistory, step: int
    ) -> None:
        """Validation loss by domain; what experts specialise in, in numbers, maps and tokens."""
        overlap = None
        with self._keeping_routes(step):
            overlap = self._probe.exchange(step, evaluation.probe_routes)
        values = evaluation_scalars(evaluation, overlap, self.layers)

        def write() -> None:
            assert self._writer is not None
            self._add_scalars(values, step)
            for index, layer in enumerate(self.layers):
                self._add_pictures(evaluation, data, history, index, step)
                text = token_table(evaluation.vocabulary, index, data)
                self._add_text(f"specialisation/top_tokens/{layer_tag(layer)}", text, step)
            self._writer.flush()

        self._guarded(step, write)

    def _add_pictures(
        self,
        evaluation: Evaluation,
        data: PreparedData,
        history: LoadHistory,
        index: int,
        step: int,
    ) -> None:
        """A picture a layer: cards are narrow, and text in one of all would be unreadable."""
        layer, number = self.layers[index], self._num_experts[index]
        tag = layer_tag(layer)
        counts = evaluation.tokens_per_expert[:, index : index + 1, :number]
        domains = domain_expert_map(counts, data.domain_names, (layer,))
        self._add_figure(f"specialisation/domains/{tag}", domains, step)
        if self._config.model.at(layer).top_k > 1:
            pairs = evaluation.co_activation[index, :number, :number]
            together = co_activation_map(pairs, layer)
            self._add_figure(f"specialisation/co_activation/{tag}", together, step)
        if history.counts:
            load = torch.stack([interval[index, :number] for interval in history.counts])  # (N, E)
            over_time = load_history(load, tuple(history.edges), layer)
            self._add_figure(f"load/history/{tag}", over_time, step)

    def _add_figure(self, tag: str, figure: Figure, step: int) -> None:
        assert self._writer is not None
        self._writer.add_image(tag, render(figure), step, dataformats="HWC")

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Text as it stands, such as samples (`samples`)."""
        self._guarded(step, lambda: self._add_text(tag, text, step))

    def _add_text(self, tag: str, text: str, step: int) -> None:
        assert self._writer is not None
        lines = [part for line in text.splitlines() for part in _WRAPPER.wrap(line) or [""]]
        self._writer.add_text(tag, "\n".join("    " + line for line in lines), step)

    def flush(self) -> None:
        """Write what is buffered; before a checkpoint, lest a resumed run's curves have a gap."""
        if self._writer is not None:
            self._guard(self._writer.flush)

    def close(self) -> None:
        """Write what is buffered, and end."""
        if self._writer is not None:
            self._guard(self._writer.close)
            self._writer = None
        threading.excepthook = self._excepthook


def write_sweep_run(
    directory: Path,
    settings: dict[str, bool | int | float | str],
    curve: Mapping[int, float],
    results: Mapping[str, float],
) -> None:
    """A finished run of a sweep: its row in the tab HParams, its curve of validation loss, and its
    last scalars; in place of what was there.

    Args: settings: columns of the row. curve: mean validation loss by step. results: by tag, of the
        last step; columns too, but for those of single layers and domains.
    """
    shutil.rmtree(directory, ignore_errors=True)
    columns = [tag for tag in results if tag.count("/") == 1 or tag.endswith("/all_layers")]
    with contextlib.closing(SummaryWriter(str(directory))) as writer:
        for summary in hparams(settings, dict.fromkeys(columns, 0.0)):
            writer._get_file_writer().add_summary(summary)
        for step, loss in curve.items():
            writer.add_scalar("validation/mean_loss", loss, step)
        for tag in results.keys() - {"validation/mean_loss"}:
            writer.add_scalar(tag, results[tag], max(curve))


def hyper_parameters(settings: Any, path: str = "") -> dict[str, bool | int | float | str]:
    """Every setting by its dotted path; null is `none`. What stands in a list has the name that it
    says, or its place: `model.moe.losses.load_balancing.weight`, `optimizer.betas.1`."""
    if isinstance(settings, dict):
        values: dict[str, bool | int | float | str] = {}
        for key, value in settings.items():
            values |= hyper_parameters(value, f"{path}.{key}" if path else key)
        return values
    if isinstance(settings, list):
        names = [each.get("name") if isinstance(each, dict) else None for each in settings]
        named = {
            str(name or place): each
            for place, (name, each) in enumerate(zip(names, settings, strict=True))
        }
        return hyper_parameters(named, path)
    return {path: "none" if settings is None else settings}


def token_table(vocabulary: VocabularyCounts, index: int, data: PreparedData) -> str:
    """The tokens that the experts of a layer like best, an expert a line."""
    num_experts = vocabulary.num_experts[index]
    lines = ["expert  tokens of which it got the largest share (of all their occurrences)"]
    for expert in range(min(num_experts, _TOP_EXPERTS)):
        tokens = vocabulary.top_tokens(index, expert, _TOP_TOKENS)
        shown = [f"{token_name(data.tokenizer, t.token_id)} {t.share:.0%}" for t in tokens]
        lines.append(f"{expert:>6}  {', '.join(shown) or 'none'}")
    if num_experts > _TOP_EXPERTS:
        lines.append(f"... and {num_experts - _TOP_EXPERTS} more: python -m train.analyze")
    return "\n".join(lines)
