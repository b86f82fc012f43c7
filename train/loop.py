"""One optimizer step, and the loop around it: evaluation, checkpoints, signals.

A step, in order: totals of the whole batch -> forward and backward of each micro-batch -> gradient
norm -> is everything finite? -> clip and update -> routers' `after_step`. A step that is dropped
(a signal, something not finite) leaves weights, moments and random streams as they were.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from moe.layer import MoELayer
from moe.model import BatchTotals, ModelOutput, flops_per_token
from moe.routing import max_violation
from train.config import RunConfig
from train.data import PreparedData
from train.engine import PlainEngine
from train.errors import NonFiniteError
from train.metrics import LoadWindow, MetricsWriter, StepMetrics, expert_usage
from train.packing import IGNORE, Batch, TrainLoader
from train.random_state import get_random_state, set_random_state
from train.schedule import learning_rate
from train.status import Status, StatusLine, peak_flops
from train.validation import Evaluation, evaluate

# A stop signal finishes a step that needs less than this, and drops a longer one.
FINISH_SECONDS = 10.0


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks; the second one ends at once.

    with StopRequest() as stop: `stop()` is True once a signal has come; `stop.exit_code` is 143 or
    130 then, 0 before; `stop.waited()` is the time since, in seconds.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._since = 0.0
        self._previous: dict[int, signal.Handlers | Callable | int | None] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.exit_code != 0

    def waited(self) -> float:
        return time.monotonic() - self._since if self.exit_code else 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            # Checkpoints are complete or absent at every instant, so this loses at most the step.
            raise SystemExit(128 + number)
        self.exit_code, self._since = 128 + number, time.monotonic()


class Position(NamedTuple):
    """Where a run stands: optimizer steps done, and the last step that was evaluated (-1: none)."""

    step: int = 0
    evaluated: int = -1


class HistoryPoint(NamedTuple):
    """Validation loss after a step, and the seconds of training steps up to it in this process."""

    step: int
    loss: float
    seconds: float


def exact_counts_needed(config: RunConfig, num_micro_batches: int) -> bool:
    """Whether the balance loss needs the whole step's counts before its first backward pass."""
    return num_micro_batches > 1 and any(
        getattr(loss, "scope", None) == "global_batch"
        and getattr(loss, "accumulation", None) == "exact"
        for loss in config.model.moe.losses
    )


def train_step(
    engine: PlainEngine,
    micro_batches: list[Batch],
    step: int,
    config: RunConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> StepMetrics | None:
    """One optimizer step.

    Args:
        micro_batches: this rank's share of the global batch.
        step: counted from 0.
        stop: asked before each pass; True drops the step.
    Returns:
        StepMetrics, or None if the step was dropped: nothing changed then, random streams included.
    Raises:
        NonFiniteError: if the loss or a gradient is inf or NaN and `training.nonfinite` is stop;
            names the step, and the layer whose router was first.
    """
    random_state = get_random_state()
    totals = batch_totals(engine, micro_batches, config, stop)
    summary: _StepSums | None = None
    for batch in micro_batches:
        if totals is None or stop():
            engine.zero_grad()
            set_random_state(random_state)
            return None
        output = engine(batch, totals)
        if config.training.debug:
            check_routers(output, config, step)
        assert output.loss is not None
        engine.backward(output.loss)
        summary = add_output(summary, output)
        if totals.counts_so_far is not None:
            totals = totals._replace(counts_so_far=summary.tokens_per_expert)
    assert summary is not None
    tokens_per_expert = engine.all_reduce(summary.tokens_per_expert)  # (L, E)
    gradient_norm = engine.gradient_norm()
    problem = find_nonfinite(engine, summary, gradient_norm, config)
    rate = learning_rate(step, config)
    if problem is None:
        engine.step(rate, gradient_norm)
        update_routers(engine, tokens_per_expert)
    engine.zero_grad()
    if problem is not None:
        set_random_state(random_state)
        refuse_nonfinite(engine, step, problem, config)
    passes = len(micro_batches)
    names = [loss.name for loss in config.model.moe.losses]
    aux_means = (summary.aux_losses / passes).tolist()
    return StepMetrics(
        step=step + 1,
        lm_loss=float(summary.lm_loss_sum / summary.num_labels.clamp(min=1)),
        aux_losses=dict(zip(names, aux_means, strict=False)),
        learning_rate=rate,
        gradient_norm=float(gradient_norm),
        tokens_per_expert=tokens_per_expert.cpu(),
        router_entropy=(summary.router_entropy / passes).cpu(),
        num_tokens=sum(batch.input_ids.numel() for batch in micro_batches),
        skipped=problem is not None,
    )


def batch_totals(
    engine: PlainEngine, batches: list[Batch], config: RunConfig, stop: Callable[[], bool]
) -> BatchTotals | None:
    """Labels, tokens and (where a loss asks) expert counts of the whole step; None after a stop.

    Exact counts cost a forward pass without gradients over all micro-batches; the random streams
    are put back, so that the passes with gradients choose the same experts.
    """
    num_labels = torch.stack([(batch.labels != IGNORE).sum() for batch in batches]).sum()
    num_tokens = torch.tensor(sum(batch.input_ids.numel() for batch in batches))
    totals = BatchTotals(
        engine.all_reduce(num_labels.to(engine.device)).clamp(min=1),
        engine.all_reduce(num_tokens.to(engine.device)),
    )
    layers = config.model.moe_layers
    if not layers or len(batches) == 1:
        return totals
    if not exact_counts_needed(config, len(batches)):
        num_experts = config.model.moe.num_experts
        so_far = torch.zeros(len(layers), num_experts, dtype=torch.long, device=engine.device)
        return totals._replace(counts_so_far=so_far)
    random_state = get_random_state()
    counts = torch.zeros((), dtype=torch.long, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            if stop():
                return None
            counts = counts + expert_usage(engine(batch).routings)[0]  # (L, E)
    set_random_state(random_state)
    return totals._replace(tokens_per_expert=engine.all_reduce(counts))


class _StepSums(NamedTuple):
    """Sums over the passes of a step; all tensors on the device."""

    lm_loss_sum: Tensor
    num_labels: Tensor
    aux_losses: Tensor
    tokens_per_expert: Tensor
    router_entropy: Tensor
    loss_finite: Tensor
    logits_finite: Tensor


def add_output(sums: _StepSums | None, output: ModelOutput) -> _StepSums:
    """Add one pass's facts, without waiting for the device."""
    assert output.loss is not None and output.lm_loss is not None
    assert output.num_labels is not None
    counts, entropy = expert_usage(output.routings)
    aux = [value.detach() for value in output.aux_losses]
    finite = [routing.logits_finite for routing in output.routings]
    now = _StepSums(
        output.lm_loss * output.num_labels,
        output.num_labels,
        torch.stack(aux) if aux else torch.zeros(0),
        counts,
        entropy,
        torch.isfinite(output.loss.detach()),
        torch.stack(finite) if finite else torch.ones(0, dtype=torch.bool),
    )
    if sums is None:
        return now
    return _StepSums(
        sums.lm_loss_sum + now.lm_loss_sum,
        sums.num_labels + now.num_labels,
        sums.aux_losses + now.aux_losses,
        sums.tokens_per_expert + now.tokens_per_expert,
        sums.router_entropy + now.router_entropy,
        sums.loss_finite & now.loss_finite,
        sums.logits_finite & now.logits_finite,
    )


def find_nonfinite(
    engine: PlainEngine, sums: _StepSums, gradient_norm: Tensor, config: RunConfig
) -> str | None:
    """What is inf or NaN in this step, named; None if nothing. One wait for the device."""
    flags = [sums.loss_finite.view(1), torch.isfinite(gradient_norm).view(1), sums.logits_finite]
    loss_finite, norm_finite, *router_finite = torch.cat(flags).tolist()
    if all(router_finite) and loss_finite and norm_finite:
        return None
    for layer, finite in zip(config.model.moe_layers, router_finite, strict=True):
        if not finite:
            return f"the router logits of layer {layer} are not finite"
    if not loss_finite:
        return "the loss is not finite, though every router's logits are"
    # From the loss down, the first one is where it began: everything below it is infected.
    names = engine.nonfinite_gradients()
    where = names[-1] if names else "their sum over all parameters"
    return f"the gradient is not finite, first in {where}"


def refuse_nonfinite(engine: PlainEngine, step: int, problem: str, config: RunConfig) -> None:
    """Raise unless the step can be skipped: no skip mends weights that are inf or NaN themselves.

    Nothing is saved: what led here should not push an older checkpoint out.
    """
    broken = engine.nonfinite_weights()
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise NonFiniteError(
            f"step {step + 1}: {problem}: the weight {broken[0]}{more} holds inf or NaN; go back "
            f"to an older checkpoint with a lower optimizer.learning_rate"
        )
    if config.training.nonfinite == "stop":
        raise NonFiniteError(
            f"step {step + 1}: {problem}; the weights are as before this step, and nothing was "
            f"saved. To go on from the last checkpoint, run again with a lower "
            f"optimizer.learning_rate or with training.nonfinite: skip"
        )


def check_routers(output: ModelOutput, config: RunConfig, step: int) -> None:
    """`training.debug`: stop where a router's logits go wrong, not at the end of the step."""
    for layer, routing in zip(config.model.moe_layers, output.routings, strict=True):
        if not routing.logits_finite:
            tokens = (~torch.isfinite(routing.router_logits).all(-1)).nonzero().flatten()
            raise NonFiniteError(
                f"step {step + 1}: the router logits of layer {layer} are not finite, first at "
                f"token {int(tokens[0])} of the micro-batch; the weights are as before this step"
            )


def update_routers(engine: PlainEngine, tokens_per_expert: Tensor) -> None:
    """Call each router's `after_step` with its layer's counts of the whole step, (L, E)."""
    layers = [m for m in engine.model.modules() if isinstance(m, MoELayer)]
    for layer, load in zip(layers, tokens_per_expert, strict=True):
        if hasattr(layer.router, "after_step"):
            layer.router.after_step(load)


class Loop:
    """The run from one position to its end.

    Args:
        save(position): writes a checkpoint. sample(stop): text that the model writes, or None.
    """

    def __init__(
        self,
        engine: PlainEngine,
        data: PreparedData,
        config: RunConfig,
        *,
        writer: MetricsWriter | None,
        status: StatusLine,
        save: Callable[[Position], None],
        sample: Callable[[Callable[[], bool]], str | None] = lambda stop: None,
    ):
        self.engine, self.data, self.config = engine, data, config
        self.writer, self.status, self.save, self.sample = writer, status, save, sample
        self.loader = TrainLoader(data, config.training.seq_len, config.seed)
        self.window = LoadWindow()
        flops = flops_per_token(engine.model, config.training.seq_len)
        peak = peak_flops(engine.device)
        self._utilisation = None if peak is None else flops / peak  # MFU of 1 token/s
        self._step_seconds = 0.0
        self._train_seconds = 0.0
        self.history: list[HistoryPoint] = []

    def run(self, position: Position, stop: StopRequest) -> tuple[Position, Evaluation | None]:
        """Train to the last step or until `stop`; the position is saved in either case.

        Returns: where the run stands, and the evaluation at its end (None if it was stopped).
        """
        config = self.config
        # A new run has nothing on the disk yet, not even its beginning.
        saved, evaluation = position.step or -1, None
        self.status.begin(position.step)
        self.engine.model.train()
        while True:
            if self._evaluation_due(position) and not stop():
                result = self._evaluate(position.step, stop)
                if result is not None:
                    evaluation = result
                    position = position._replace(evaluated=position.step)
                    saved = min(saved, position.step - 1)
            every = config.checkpoint.every
            if every and position.step % every == 0 and position.step != saved and position.step:
                self.save(position)
                saved = position.step
            # Asked after a save too: it may have taken long.
            if stop() or position.step >= config.num_steps:
                break
            if not self._step(position, stop):
                break
            position = position._replace(step=position.step + 1)
        if position.step != saved:
            self.save(position)
        return position, evaluation if position.step >= config.num_steps else None

    def _evaluation_due(self, position: Position) -> bool:
        every = self.config.evaluation.every
        due = position.step == self.config.num_steps or (
            every > 0 and position.step > 0 and position.step % every == 0
        )
        return due and position.evaluated != position.step

    def _step(self, position: Position, stop: StopRequest) -> bool:
        """One optimizer step and its metrics; False if a stop dropped it."""
        began = time.monotonic()

        def drop() -> bool:
            # The first step has no example to be estimated by, and any step can take longer.
            left = self._step_seconds - (time.monotonic() - began)
            return stop() and max(left, stop.waited()) > FINISH_SECONDS

        batches = read_step(self.loader, position.step, self.config, self.engine)
        metrics = train_step(self.engine, batches, position.step, self.config, stop=drop)
        if metrics is None:
            return False
        self._step_seconds = time.monotonic() - began
        self._train_seconds += self._step_seconds
        self._report(metrics)
        return True

    def _report(self, metrics: StepMetrics) -> None:
        logging = self.config.logging
        window = self.window.add(metrics.tokens_per_expert)
        speed = metrics.num_tokens * self.engine.world_size / self._step_seconds
        if metrics.skipped:
            self.status.message(
                f"step {metrics.step} skipped: loss or gradient was not finite; weights unchanged"
            )
        last = metrics.step == self.config.num_steps
        if metrics.step % logging.every == 0 or metrics.step == 1 or last:
            layers = len(metrics.tokens_per_expert)
            self.status.show(
                Status(
                    step=metrics.step,
                    num_steps=self.config.num_steps,
                    lm_loss=metrics.lm_loss,
                    learning_rate=metrics.learning_rate,
                    gradient_norm=metrics.gradient_norm,
                    tokens_per_second=speed,
                    mfu=None if self._utilisation is None else speed * self._utilisation,
                    max_violation=float(max_violation(window).max()) if layers else None,
                    dead_experts=int((window == 0).sum()) if layers else None,
                )
            )
            if self.writer is not None:
                self.writer.write_step(metrics, speed, window)
        every = logging.heatmap_every
        if self.writer is not None and every and (metrics.step % every == 0 or last):
            self.writer.write_load(window, metrics.step)

    def _evaluate(self, step: int, stop: Callable[[], bool]) -> Evaluation | None:
        config = self.config
        evaluation = evaluate(
            self.engine,
            self.data,
            config.evaluation.batch_size,
            config.training.seq_len,
            stop=stop,
        )
        if evaluation is None:
            return None
        self.history.append(HistoryPoint(step, evaluation.mean_loss, self._train_seconds))
        if not evaluation.loss:
            self.status.message(f"step {step}: no validation text to evaluate")
            return evaluation
        by_domain = ", ".join(f"{name} {loss:.3f}" for name, loss in evaluation.loss.items())
        self.status.message(
            f"step {step}: validation {evaluation.mean_loss:.4f} nats/token ({by_domain})"
        )
        if self.writer is not None:
            self.writer.write_evaluation(evaluation, self.data.domain_names, step)
        text = self.sample(stop)
        if text is not None:
            self.status.message(text)
            if self.writer is not None:
                self.writer.write_text("samples", text, step)
        return evaluation


def read_step(
    loader: TrainLoader, step: int, config: RunConfig, engine: PlainEngine
) -> list[Batch]:
    """This rank's micro-batches of a step: an equal, contiguous share of the global batch."""
    per_rank = config.training.batch_size // engine.world_size
    first = step * config.training.batch_size + engine.rank * per_rank
    size = min(config.micro_batch_size, per_rank)
    return [loader.batch(first + done, size) for done in range(0, per_rank, size)]
