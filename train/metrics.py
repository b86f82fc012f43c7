"""What is measured at a step, and under which TensorBoard tag does it appear?

Tags live here and nowhere else. Definitions: `moe.routing`.
"""

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from moe.config import ModelConfig
from moe.measures import dead_experts, max_violation, router_sums
from moe.routing import Routing
from train.figures import domain_expert_map, load_heat_map
from train.validation import Evaluation

# A dead expert got nothing over this many optimizer steps.
WINDOW_STEPS = 100


class StepMetrics(NamedTuple):
    """One optimizer step, summed over ranks and accumulation.

    lm_loss nats per token; aux_losses unweighted, by name; gradient_norm before clipping;
    tokens_per_expert (L, E) and router_entropy (L,), L routed layers; skipped: the step was not
    applied since something was inf or NaN.
    """

    step: int
    lm_loss: float
    aux_losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens_per_expert: Tensor
    router_entropy: Tensor
    num_tokens: int
    skipped: bool = False


def expert_usage(routings: tuple[Routing, ...]) -> tuple[Tensor, Tensor]:
    """(L, E) assignments and (L,) mean router entropy (of log E) of one forward pass."""
    if not routings:
        return torch.zeros(0, 1, dtype=torch.long), torch.zeros(0)
    counts = torch.stack([r.tokens_per_expert for r in routings])
    sums = [router_sums(routing) for routing in routings]
    return counts, torch.stack([each.entropy / each.num_tokens.clamp(min=1) for each in sums])


def loss_weights(model: ModelConfig) -> dict[str, float]:
    """The weight of each term beside the language-model loss, by its name in logs."""
    weights = {}
    if model.moe_layers:
        weights = {loss.label: loss.weight for loss in model.moe.losses}  # type: ignore[attr-defined]
    if model.lm_z_loss_weight:
        weights["lm_z_loss"] = model.lm_z_loss_weight
    return weights


class LoadWindow:
    """Assignments over the last WINDOW_STEPS optimizer steps, for dead experts."""

    def __init__(self) -> None:
        self._steps: deque[Tensor] = deque(maxlen=WINDOW_STEPS)

    def tensor(self) -> Tensor:
        """(steps, L, E), for a checkpoint."""
        return torch.stack(list(self._steps)) if self._steps else torch.zeros(0, 0, 0).long()

    def restore(self, steps: Tensor) -> None:
        """Continue the window that `tensor` returned."""
        self._steps.extend(steps.unbind(0))

    def add(self, tokens_per_expert: Tensor) -> Tensor:
        """Add one step's (L, E) counts and return the window's sum."""
        self._steps.append(tokens_per_expert.cpu())
        return torch.stack(list(self._steps)).sum(0)


def _layer_tag(layer: int) -> str:
    return f"layer{layer:02d}"


class MetricsWriter:
    """Writes scalars, images and text for TensorBoard; a failing disk stops nothing but this.

    Args:
        directory: of the event files. first_step: where a resumed run goes on; what an earlier
            process wrote from there on is hidden. warn: told once if writing fails.
    """

    def __init__(
        self, directory: Path, model: ModelConfig, first_step: int, warn: Callable[[str], None]
    ):
        self.layers = model.moe_layers
        self.loss_weights = loss_weights(model)
        self._warn = warn
        self._writer: SummaryWriter | None = None
        self._excepthook = threading.excepthook
        self._guard(lambda: self._open(directory, first_step))

    def _open(self, directory: Path, first_step: int) -> None:
        # Without purge_step the curves of a resumed run double back.
        purge_step = first_step if first_step > 0 else None
        threading.excepthook = self._on_thread_error
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=20)
        self._writer.add_custom_scalars(self._layout())

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

    def _layout(self) -> dict:
        """The page "custom scalars": all layers of one measure in a chart."""

        def chart(tag: str) -> list:
            return ["Multiline", [f"{tag}/{_layer_tag(layer)}" for layer in self.layers]]

        if not self.layers:
            return {}
        return {
            "experts": {
                "MaxVio by layer": chart("max_violation"),
                "router entropy by layer": chart("router_entropy"),
                "dead experts by layer": chart("dead_experts"),
            }
        }

    def write_step(self, metrics: StepMetrics, tokens_per_second: float, window: Tensor) -> None:
        """Scalars of one step; `window` (L, E) as `LoadWindow.add` returned it."""

        def write() -> None:
            assert self._writer is not None
            add, step = self._writer.add_scalar, metrics.step
            add("loss/lm", metrics.lm_loss, step)
            for name, value in metrics.aux_losses.items():
                add(f"loss/{name}", value, step)
                add(f"loss_weight/{name}", self.loss_weights[name], step)
            add("optimizer/learning_rate", metrics.learning_rate, step)
            add("optimizer/gradient_norm", metrics.gradient_norm, step)
            add("speed/tokens_per_second", tokens_per_second, step)
            violation, dead = max_violation(metrics.tokens_per_expert), dead_experts(window)
            for index, layer in enumerate(self.layers):
                tag = _layer_tag(layer)
                load = metrics.tokens_per_expert[index]
                add(f"max_violation/{tag}", violation[index], step)
                add(f"router_entropy/{tag}", metrics.router_entropy[index], step)
                add(f"dead_experts/{tag}", dead[index], step)
                add(f"tokens_per_expert_min/{tag}", load.min(), step)
                add(f"tokens_per_expert_max/{tag}", load.max(), step)

        if self._writer is not None:
            self._guard(write)

    def write_load(self, window: Tensor, step: int) -> None:
        """The layer x expert heat map, and the distribution of load / mean load in each layer."""

        def write() -> None:
            assert self._writer is not None
            self._writer.add_figure("experts/load", load_heat_map(window, self.layers), step)
            for index, layer in enumerate(self.layers):
                share = window[index] / window[index].float().mean().clamp(min=1e-9)
                self._writer.add_histogram(f"load_share/{_layer_tag(layer)}", share, step)

        if self._writer is not None and self.layers:
            self._guard(write)

    def write_evaluation(
        self, evaluation: Evaluation, domain_names: tuple[str, ...], step: int
    ) -> None:
        """Validation loss by domain, the domain x expert map and its information by layer."""

        def write() -> None:
            assert self._writer is not None
            add = self._writer.add_scalar
            add("validation/mean_loss", evaluation.mean_loss, step)
            for domain, loss in evaluation.loss.items():
                add(f"validation/{domain}", loss, step)
            for index, layer in enumerate(self.layers):
                tag = _layer_tag(layer)
                add(f"domain_expert_information/{tag}", evaluation.information[index], step)
                add(
                    f"domain_expert_information_shuffled/{tag}",
                    evaluation.shuffled_information[index],
                    step,
                )
            # A picture a layer: cards are narrow, and text in a picture of all would be unreadable.
            for index, layer in enumerate(self.layers):
                counts = evaluation.tokens_per_expert[:, index : index + 1]
                figure = domain_expert_map(counts, domain_names, (layer,))
                self._writer.add_figure(f"domains/{_layer_tag(layer)}", figure, step)
            self._writer.flush()

        if self._writer is not None:
            self._guard(write)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Text as it stands: the config (tag `config`) and samples (`samples`)."""

        def write() -> None:
            assert self._writer is not None
            indented = "\n".join("    " + line for line in text.splitlines())
            self._writer.add_text(tag, indented, step)

        if self._writer is not None:
            self._guard(write)

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
