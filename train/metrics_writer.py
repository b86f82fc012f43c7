"""Under which TensorBoard tag does each number, picture and text appear?

Tags live here and nowhere else; `moe/GLOSSARY.md` explains each. `health/` comes first in
TensorBoard's alphabetical order: its page answers whether the run is well. A measure by layer is
`GROUP/MEASURE/layerNN`, over all layers `GROUP/MEASURE/all_layers` or in `health/`.
"""

import textwrap
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moe.measures import (
    co_activation,
    coefficient_of_variation,
    dead_experts,
    effective_experts,
    gini,
    max_violation,
    starved_experts,
)
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
from train.validation import Evaluation

# Tokens of each expert, and experts of each layer, in a table of the tokens that experts like.
_TOP_TOKENS, _TOP_EXPERTS = 8, 64

# How a measure by layer becomes one number of all layers, and its tag where that is in `health/`.
_OVER_LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "load/max_violation": (torch.max, "health/max_violation"),
    "load/max_violation_window": (torch.max, "health/max_violation_window"),
    "load/effective_experts": (torch.min, "health/effective_experts"),
    "load/dead_experts": (torch.sum, "health/dead_experts"),
    "load/starved_experts": (torch.sum, "health/starved_experts"),
    "load/dropped_percent": (torch.max, "health/dropped_percent"),
    "load/tokens_per_expert_min": (torch.min, None),
    "load/tokens_per_expert_max": (torch.max, None),
    "load/coefficient_of_variation": (torch.max, None),
    "load/gini": (torch.max, None),
    "router/entropy": (torch.mean, "health/router_entropy"),
    "router/confidence": (torch.mean, None),
    "router/margin": (torch.mean, None),
    "router/logit_norm": (torch.mean, None),
    "router/logsumexp": (torch.mean, None),
    "router/logit_max": (torch.max, "health/logit_max"),
    "router/bias_range": (torch.max, None),
    "router/overlap_with_last_evaluation": (torch.mean, None),
    "specialisation/domain_information": (torch.mean, None),
    "specialisation/domain_information_shuffled": (torch.mean, None),
    "specialisation/domain_divergence": (torch.mean, None),
    "specialisation/repeat_rate": (torch.mean, None),
}


# What decides what is learnt; where it is written, and how often one looks, does not.
_HYPER_PARAMETERS = {"model", "optimizer", "parallel", "schedule", "seed", "training"}
# TensorBoard cuts longer lines off.
_WRAPPER = textwrap.TextWrapper(
    120,
    subsequent_indent="      ",
    drop_whitespace=False,
    replace_whitespace=False,
    expand_tabs=False,
)


class StepFacts(NamedTuple):
    """What is logged of a step beside its StepMetrics.

    window: (L, E) assignments, `LoadWindow`. seconds: of the step. mfu: None where the peak is not
    known. bias: (L, E) of the routers, None where they have none. alarms: raised at the step.
    """

    window: Tensor
    seconds: float
    mfu: float | None = None
    bias: Tensor | None = None
    alarms: tuple[Alarm, ...] = ()


def load_measures(tokens_per_expert: Tensor, num_dropped: Tensor, window: Tensor) -> dict:
    """Tensors (L,) by name, of (L, E) assignments of a step and of a window, (L,) dropped ones."""
    offered = (tokens_per_expert.sum(-1) + num_dropped).clamp(min=1)
    return {
        "max_violation": max_violation(tokens_per_expert),
        "max_violation_window": max_violation(window),
        "coefficient_of_variation": coefficient_of_variation(tokens_per_expert),
        "gini": gini(tokens_per_expert),
        "effective_experts": effective_experts(tokens_per_expert),
        "dead_experts": dead_experts(window),
        "starved_experts": starved_experts(window),
        "tokens_per_expert_min": tokens_per_expert.amin(-1),
        "tokens_per_expert_max": tokens_per_expert.amax(-1),
        "dropped_percent": 100 * num_dropped / offered,
    }


class MetricsWriter:
    """Writes scalars, images, histograms and text; a failing disk stops nothing but this.

    A folder that has vanished is begun again.

    Args:
        run_dir: of the run; events are in its `tensorboard`. config: its vocab_size known.
        first_step: where a resumed run goes on; what an earlier process wrote from there on is
            hidden. warn: told if writing fails.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, first_step: int, warn: Callable[[str], None]
    ):
        self.layers = config.model.moe_layers
        self._config, self._warn = config, warn
        self._directory = run_dir / "tensorboard"
        self._probe = ProbeRoutes(run_dir / "probe_routes")
        self._writer: SummaryWriter | None = None
        self._excepthook = threading.excepthook
        self._guard(lambda: self._open(first_step))

    def _open(self, first_step: int) -> None:
        # Without purge_step the curves of a resumed run double back.
        purge_step = first_step if first_step > 0 else None
        threading.excepthook = self._on_thread_error
        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step, flush_secs=20)
        self._writer.add_custom_scalars(self._layout())
        self._add_text("config", dump_config(self._config), first_step)
        self._add_hyper_parameters()

    def _add_hyper_parameters(self) -> None:
        """The run's row in the tab HParams, with its latest validation loss."""
        assert self._writer is not None
        # A run is one row: `add_hparams` would write a second one.
        values = hyper_parameters(self._config.model_dump(mode="json", include=_HYPER_PARAMETERS))
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

    def _close_quietly(self) -> None:
        try:
            assert self._writer is not None
            self._writer.close()
        except OSError:
            return

    def _layout(self) -> dict:
        """The page "custom scalars": all layers of one measure in a chart."""
        if not self.layers:
            return {}

        def chart(measure: str) -> list:
            return ["Multiline", [f"{measure}/{_layer_tag(layer)}" for layer in self.layers]]

        pages: dict[str, dict[str, list]] = {"load": {}, "router": {}, "specialisation": {}}
        for measure in _OVER_LAYERS:
            group, name = measure.split("/")
            if not name.endswith("_shuffled"):
                pages[group][f"{name.replace('_', ' ')} by layer"] = chart(measure)
        return pages

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        """All in one event: an event each would take ten times as long."""
        assert self._writer is not None
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer._get_file_writer().add_summary(Summary(value=entries), step)

    def _by_layer(self, measures: dict[str, Tensor]) -> dict[str, float]:
        """Scalars of measures `GROUP/MEASURE` (L,): by layer and over layers."""
        values = {}
        for measure, by_layer in measures.items():
            reduce, tag = _OVER_LAYERS[measure]
            over = reduce(by_layer.double()) if len(by_layer) else torch.zeros(())
            values[tag or f"{measure}/all_layers"] = float(over)
            for layer, value in zip(self.layers, by_layer.tolist(), strict=True):
                values[f"{measure}/{_layer_tag(layer)}"] = value
        return values

    def write_step(self, metrics: StepMetrics, facts: StepFacts) -> None:
        """Scalars of one step."""
        values = {
            "health/lm_loss": metrics.lm_loss,
            "health/gradient_norm": metrics.gradient_norm,
            "health/alarms": len(facts.alarms),
            "optimizer/learning_rate": metrics.learning_rate,
            "speed/tokens_per_second": metrics.num_tokens / facts.seconds,
            "speed/step_time_ms": facts.seconds * 1e3,
        }
        if facts.mfu is not None:
            values["speed/mfu"] = facts.mfu
        for name, value in metrics.aux_losses.items():
            values[f"loss/{name}"] = value
            values[f"loss/{name}_coefficient"] = metrics.aux_coefficients[name]
        measures: dict[str, Tensor] = {}
        if self.layers:
            load = load_measures(metrics.tokens_per_expert, metrics.num_dropped, facts.window)
            measures = {f"load/{name}": value for name, value in load.items()}
        if facts.bias is not None:
            measures["router/bias_range"] = facts.bias.amax(-1) - facts.bias.amin(-1)
        if metrics.detail is not None:
            detail = metrics.detail
            values["speed/memory_gib"] = detail.memory_gib
            for group, norm in detail.gradient_norms.items():
                values[f"norm/gradient_{group}"] = norm
            for group, norm in detail.weight_norms.items():
                values[f"norm/weight_{group}"] = norm
            if self.layers:
                means = detail.routers._asdict().items()
                measures |= {f"router/{name}": value for name, value in means}
        values |= self._by_layer(measures)
        if len(metrics.work_seconds) > 1:
            work = metrics.work_seconds
            values["speed/slowest_rank_share"] = float(work.max() / work.mean().clamp(min=1e-9))
        self._guarded(metrics.step, lambda: self._add_scalars(values, metrics.step))

    def write_alarms(self, alarms: Iterable[Alarm]) -> None:
        """The text of alarms, at their step."""
        for alarm in alarms:
            self.write_text("alarms", alarm.text, alarm.step)

    def write_load(self, facts: StepFacts, metrics: StepMetrics) -> None:
        """The layer x expert heat map and the routers' biases; how load and logits are spread."""

        def write() -> None:
            assert self._writer is not None
            step = metrics.step
            self._add_figure("load/heat_map", load_heat_map(facts.window, self.layers), step)
            if facts.bias is not None:
                self._add_figure("router/bias", bias_map(facts.bias, self.layers), step)
            for index, layer in enumerate(self.layers):
                share = facts.window[index] / facts.window[index].float().mean().clamp(min=1e-9)
                self._writer.add_histogram(f"load/share/{_layer_tag(layer)}", share, step)
                if metrics.detail is not None:
                    counts = metrics.detail.logit_counts[index]
                    self._add_logits(f"router/logits/{_layer_tag(layer)}", counts, step)

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
        try:
            overlap = self._probe.exchange(step, evaluation.probe_routes)
        except OSError as error:
            self._warn(f"{self._probe.folder}: {error}; the routes of step {step} are not kept")
        values = {"validation/mean_loss": evaluation.mean_loss}
        values |= {f"validation/{domain}": loss for domain, loss in evaluation.loss.items()}
        if self.layers:
            measures = {
                "specialisation/domain_information": evaluation.information,
                "specialisation/domain_information_shuffled": evaluation.shuffled_information,
                "specialisation/domain_divergence": evaluation.divergence,
                "specialisation/repeat_rate": evaluation.repeat_rate,
            }
            if overlap is not None:
                measures["router/overlap_with_last_evaluation"] = overlap
            values |= self._by_layer(measures)

        def write() -> None:
            assert self._writer is not None
            self._add_scalars(values, step)
            for index, layer in enumerate(self.layers):
                self._add_pictures(evaluation, data, history, index, step)
                text = token_table(evaluation.vocabulary, index, data)
                self._add_text(f"specialisation/top_tokens/{_layer_tag(layer)}", text, step)
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
        layer, model = self.layers[index], self._config.model
        tag = _layer_tag(layer)
        counts = evaluation.tokens_per_expert[:, index : index + 1]
        domains = domain_expert_map(counts, data.domain_names, (layer,))
        self._add_figure(f"specialisation/domains/{tag}", domains, step)
        if model.top_k > 1:
            pairs = co_activation(evaluation.co_activation[index])
            together = co_activation_map(pairs, layer, top_k=model.top_k)
            self._add_figure(f"specialisation/co_activation/{tag}", together, step)
        if history.counts:
            load = torch.stack([interval[index] for interval in history.counts])  # (N, E)
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


def _layer_tag(layer: int) -> str:
    return f"layer{layer:02d}"


def hyper_parameters(settings: Any, path: str = "") -> dict[str, bool | int | float | str]:
    """Every setting that is no list, by its dotted path; null is `none`."""
    if isinstance(settings, dict):
        values: dict[str, bool | int | float | str] = {}
        for key, value in settings.items():
            values |= hyper_parameters(value, f"{path}.{key}" if path else key)
        return values
    if isinstance(settings, list):
        return {}
    return {path: "none" if settings is None else settings}


def token_table(vocabulary: VocabularyCounts, index: int, data: PreparedData) -> str:
    """The tokens that the experts of a layer like best, an expert a line."""
    _, num_experts, _ = vocabulary.assignments.shape
    lines = ["expert  tokens of which it got the largest share (of all their occurrences)"]
    for expert in range(min(num_experts, _TOP_EXPERTS)):
        tokens = vocabulary.top_tokens(index, expert, _TOP_TOKENS)
        shown = [f"{data.tokenizer.decode([t.token_id])!r} {t.share:.0%}" for t in tokens]
        lines.append(f"{expert:>6}  {', '.join(shown) or 'none'}")
    if num_experts > _TOP_EXPERTS:
        lines.append(f"... and {num_experts - _TOP_EXPERTS} more: python -m train.analyze")
    return "\n".join(lines)
