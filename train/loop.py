"""What happens around the optimizer steps of a run? Evaluation, checkpoints, signals, the log."""

import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import NamedTuple

from torch import Tensor

from moe.measures import dead_experts, max_violation
from train.alarms import Alarms
from train.config import RunConfig
from train.data import PreparedData
from train.engine import Engine
from train.metrics import WINDOW_STEPS, LoadHistory, LoadWindow, StepMetrics
from train.metrics_writer import MetricsWriter
from train.packing import TrainLoader
from train.routes import RunRoutes
from train.scalars import StepFacts
from train.status import Status, StatusLine, peak_flops
from train.step import read_step, router_biases, train_step
from train.validation import Evaluation, evaluate

# A stop signal finishes a step that needs less than this, and drops a longer one.
FINISH_SECONDS = 10.0


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks; the second one ends at once.

    launched: whether a launcher started us. Then a Ctrl-C reaches us twice: from the terminal, and
    as the SIGTERM by which the launcher ends its processes. That one is no second request.

    with StopRequest() as stop: `stop()` is True once a signal has come; `stop.exit_code` is 143 or
    130 then, 0 before; `stop.waited()` is the time since, in seconds.
    """

    def __init__(self, launched: bool = False) -> None:
        self.exit_code = 0
        self._launched = launched
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
        if self.exit_code and self._launched and self.exit_code != 128 + number:
            return
        if self.exit_code:
            # Checkpoints are complete or absent at every instant, so this loses at most the step.
            raise SystemExit(128 + number)
        self.exit_code, self._since = 128 + number, time.monotonic()


class Position(NamedTuple):
    """Where a run stands: optimizer steps done, and the last step that was evaluated (-1: none)."""

    step: int = 0
    evaluated: int = -1


class Loop:
    """The run from one position to its end.

    Args:
        save(position): writes a checkpoint. sample(stop): text that the model writes, or None.
        beat(): called again and again while the run moves. flops: of one token
        in training, for the MFU. routes: which are recorded and replayed, none by default.
    """

    def __init__(
        self,
        engine: Engine,
        data: PreparedData,
        config: RunConfig,
        *,
        writer: MetricsWriter | None,
        status: StatusLine,
        save: Callable[[Position], None],
        sample: Callable[[Callable[[], bool]], str | None] = lambda stop: None,
        beat: Callable[[], None] = lambda: None,
        flops: int | None = None,
        routes: RunRoutes | None = None,
    ):
        self.engine, self.data, self.config = engine, data, config
        self.writer, self.status, self.save, self.sample = writer, status, save, sample
        self.beat = beat
        self.routes = routes or RunRoutes()
        self.loader = TrainLoader(data, config.training.seq_len, config.seed)
        self.window, self.load_history = LoadWindow(), LoadHistory()
        self.alarms = Alarms(config.model)
        peak = peak_flops(engine.device)
        # MFU of 1 token/s.
        self._utilisation = None
        if peak is not None and flops is not None:
            self._utilisation = flops / (peak * engine.world_size)
        # Of this process: seconds of each step, and (step, mean validation loss) as evaluated.
        self.step_seconds: list[float] = []
        self.history: list[tuple[int, float]] = []
        # Of this process: steps that were skipped, alarms raised, assignments made and dropped.
        self.num_skipped = self.num_alarms = self.num_assigned = self.num_dropped = 0

    def run(self, position: Position, stop: StopRequest) -> tuple[Position, Evaluation | None]:
        """Train to the last step or until `stop`; the position is saved in either case.

        Returns: where the run stands, and the evaluation at its end (None if it was stopped).
        """
        config = self.config
        # A new run has nothing on the disk yet, not even its beginning.
        saved, evaluation = position.step or -1, None

        def stopping() -> bool:
            # One answer for all ranks: they must do the same.
            self.beat()
            return self.engine.any_rank(stop())

        self.status.begin(position.step)
        self.engine.model.train()
        while True:
            if self._evaluation_due(position) and not stopping():
                result = self._evaluate(position.step, stopping)
                if result is not None:
                    evaluation = result
                    position = position._replace(evaluated=position.step)
                    saved = min(saved, position.step - 1)
            every = config.checkpoint.every
            if every and position.step % every == 0 and position.step != saved and position.step:
                self.save(position)
                saved = position.step
            # Asked after a save too: it may have taken long.
            if stopping() or position.step >= config.num_steps:
                break
            if not self._step(position, stop):
                break
            position = position._replace(step=position.step + 1)
        if position.step != saved:
            self.save(position)
        return position, evaluation if position.step >= config.num_steps else None

    def memory(self) -> dict[str, Tensor]:
        """What later metrics and alarms are made from, for a checkpoint."""
        window = {"load_window": self.window.tensor()}
        return window | self.load_history.tensors() | self.alarms.state()

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Continue from what `memory` returned."""
        self.window.restore(memory["load_window"])
        # Checkpoints of version 0.1.0 have the window alone.
        if "history" in memory:
            self.load_history.restore(memory)
            self.alarms.restore(memory)

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
            self.beat()
            # The first step has no example to be estimated by, and any step can take longer.
            expected = self.step_seconds[-1] if self.step_seconds else 0.0
            left = expected - (time.monotonic() - began)
            return stop() and max(left, stop.waited()) > FINISH_SECONDS

        with self.engine.clock.working():
            batches = read_step(self.loader, position.step, self.config, self.engine)
            batches = self.routes.replay(position.step, batches)
        chosen: list[Tensor] = []
        metrics = train_step(
            self.engine,
            batches,
            position.step,
            self.config,
            stop=drop,
            seen=self.routes.collector(chosen),
            detail=self._measured(position.step + 1),
        )
        if metrics is None:
            return False
        self.routes.record(position.step, chosen)
        self.step_seconds.append(time.monotonic() - began)
        self._report(metrics)
        return True

    def _logged(self, step: int) -> bool:
        every = self.config.logging.every
        return step % every == 0 or step == 1 or step == self.config.num_steps

    def _pictured(self, step: int) -> bool:
        every = self.config.logging.heatmap_every
        return every > 0 and (step % every == 0 or step == self.config.num_steps)

    def _measured(self, step: int) -> bool:
        """Whether the step's details are wanted; by all ranks, though one writes them."""
        wanted = self._logged(step) or self._pictured(step)
        return wanted and self.config.logging.tensorboard

    def _report(self, metrics: StepMetrics) -> None:
        step = metrics.step
        load = metrics.tokens_per_expert
        if not metrics.skipped:
            self.window.add(load)
            self.load_history.add(load, step)
        # Zeros, but where a layer has no such expert.
        window = self.window.last(WINDOW_STEPS) if len(self.window) else load.clamp(max=0)
        alarms = tuple(self.alarms.check(metrics, self.window))
        self.num_skipped += metrics.skipped
        self.num_alarms += len(alarms)
        assigned, dropped = int(load.clamp(min=0).sum()), int(metrics.num_dropped.sum())
        self.num_assigned += assigned
        self.num_dropped += dropped
        speed = metrics.num_tokens / self.step_seconds[-1]
        if metrics.skipped:
            self.status.message(
                f"step {metrics.step} skipped: loss or gradient was not finite; weights unchanged"
            )
        for alarm in alarms:
            self.status.message(alarm.text)
        mfu = None if self._utilisation is None else speed * self._utilisation
        if self._logged(step):
            layers = len(load)
            limited = layers and self.config.model.moe.capacity_factor is not None
            self.status.show(
                Status(
                    step=metrics.step,
                    num_steps=self.config.num_steps,
                    lm_loss=metrics.lm_loss,
                    learning_rate=metrics.learning_rate,
                    gradient_norm=metrics.gradient_norm,
                    tokens_per_second=speed,
                    mfu=mfu,
                    max_violation=float(max_violation(load).max()) if layers else None,
                    dead_experts=int(dead_experts(window).sum()) if layers else None,
                    dropped=dropped / max(1, assigned) if limited else None,
                )
            )
        if self.writer is None or not (self._logged(step) or self._pictured(step) or alarms):
            return
        bias = router_biases(self.engine.model)
        facts = StepFacts(window, self.step_seconds[-1], mfu, bias, alarms)
        self.writer.write_alarms(alarms)
        if self._logged(step) or alarms:
            self.writer.write_step(metrics, facts)
        if self._pictured(step):
            self.writer.write_load(facts, metrics)

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
        self.history.append((step, evaluation.mean_loss))
        if not evaluation.loss:
            self.status.message(f"step {step}: no validation text to evaluate")
            return evaluation
        by_domain = ", ".join(f"{name} {loss:.3f}" for name, loss in evaluation.loss.items())
        self.status.message(
            f"step {step}: validation {evaluation.mean_loss:.4f} nats/token ({by_domain})"
        )
        if self.writer is not None:
            self.writer.write_evaluation(evaluation, self.data, self.load_history, step)
        text = self.sample(stop)
        if text is not None:
            self.status.message(text)
            if self.writer is not None:
                self.writer.write_text("samples", text, step)
        return evaluation
