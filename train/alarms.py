"""Is something going wrong in a run? One line when it begins, naming layer, expert, rank and step.

    collapse        a layer's load over COLLAPSE_STEPS is on little more than K experts
    dead expert     no assignment over the whole window of `LoadWindow`
    drop spike      far more assignments dropped than in the steps before
    loss spike      a loss far above those of the steps before
    divergence      a loss above the run's first one, DIVERGED_STEPS in a row
    slow rank       a rank's forward passes take far longer than the others', SLOW_STEPS in a row

Each is raised once, and again only after it has gone. A layer that has collapsed has dead experts
too: it raises the collapse alone. Thresholds are constants, so that an alarm means the same in all
runs.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.measures import effective_experts
from train.metrics import WINDOW_STEPS, LoadWindow, StepMetrics

COLLAPSE_STEPS = 20
# Raised where effective experts < K + this * (E - K); gone above twice as much.
COLLAPSE_SHARE = 0.1
# By chance an expert of even share goes without a token once in e^this windows.
LEAST_EXPECTED = 20
# Steps that spikes are compared with, and the fewest that say anything.
SPIKE_WINDOW, SPIKE_LEAST = 50, 20
LOSS_DEVIATIONS, LOSS_SHARE, LOSS_NATS = 6.0, 0.05, 0.1
DIVERGED_STEPS = 5
DROP_LEAST, DROP_FACTOR = 0.05, 2.0
SLOW_STEPS, SLOW_FACTOR, SLOW_SECONDS = 10, 1.5, 0.005
# Experts that a line names.
MOST_NAMED = 8


class Alarm(NamedTuple):
    """kind, as in this file's head; step; text: one line for the log, kind and step included."""

    kind: str
    step: int
    text: str


class Alarms:
    """Looks at each step; `check` returns what has begun to go wrong there."""

    def __init__(self, model: ModelConfig):
        self.layers = model.moe_layers
        self._most_experts = model.num_choices
        # Of each layer.
        self.num_experts = model.choices_of_layers
        chosen = [model.at(layer).choices_per_token for layer in model.moe_layers]
        self.top_k = [max(1, round(number)) for number in chosen]
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._first_loss = math.inf
        self._diverged_steps = 0
        # (L,) share of the assignments dropped, of each step.
        self._dropped: deque[list[float]] = deque(maxlen=SPIKE_WINDOW)
        self._slow_steps: list[int] = []
        # What has been raised and is not gone: ("dead expert", layer, expert), ("loss spike",), ...
        self._raised: set[tuple] = set()

    def check(self, metrics: StepMetrics, window: LoadWindow) -> list[Alarm]:
        """Alarms that begin with a step, whose load `window` has already."""
        if metrics.skipped:
            # It has a message of its own, and numbers that say nothing of the next ones.
            return []
        found = [self._loss_spike(metrics), self._divergence(metrics)]
        if self.layers:
            found += self._collapses(metrics.step, window)
            found += self._dead(metrics.step, window)
            found += self._drop_spikes(metrics)
        found += self._slow_ranks(metrics)
        return [alarm for alarm in found if alarm is not None]

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: a run that goes on raises what it would have raised, and no more. But
        for slow ranks: there may be others then."""
        layers = len(self.layers)
        dead = torch.zeros(layers, self._most_experts, dtype=torch.bool)
        flags = torch.zeros(2, layers, dtype=torch.bool)
        for kind, *where in self._raised:
            if kind == "dead expert":
                dead[where[0], where[1]] = True
            elif kind in ("collapse", "drop spike"):
                flags[("collapse", "drop spike").index(kind), where[0]] = True
        return {
            "alarm_losses": torch.tensor(list(self._losses), dtype=torch.float64),
            "alarm_dropped": torch.tensor(list(self._dropped), dtype=torch.float64),
            "alarm_dead": dead,
            "alarm_layers": flags,
            "alarm_loss_spike": torch.tensor(("loss spike",) in self._raised),
            "alarm_divergence": torch.tensor(("divergence",) in self._raised),
            "alarm_first_loss": torch.tensor(self._first_loss, dtype=torch.float64),
            "alarm_diverged_steps": torch.tensor(self._diverged_steps),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue what `state` returned."""
        self._losses.extend(state["alarm_losses"].tolist())
        self._dropped.extend(state["alarm_dropped"].tolist())
        self._raised |= {("dead expert", *at) for at in state["alarm_dead"].nonzero().tolist()}
        for kind, layer in state["alarm_layers"].nonzero().tolist():
            self._raised.add((("collapse", "drop spike")[kind], layer))
        if state["alarm_loss_spike"]:
            self._raised.add(("loss spike",))
        if state["alarm_divergence"]:
            self._raised.add(("divergence",))
        self._first_loss = float(state["alarm_first_loss"])
        self._diverged_steps = int(state["alarm_diverged_steps"])

    def _begins(self, key: tuple, wrong: bool, *, gone: bool | None = None) -> bool:
        """Whether it is wrong now and was not before; `gone`: whether it may be raised again."""
        if wrong and key not in self._raised:
            self._raised.add(key)
            return True
        if (not wrong) if gone is None else gone:
            self._raised.discard(key)
        return False

    def _loss_spike(self, metrics: StepMetrics) -> Alarm | None:
        loss, before = metrics.lm_loss, list(self._losses)
        alarm = None
        if len(before) >= SPIKE_LEAST:
            usual = statistics.median(before)
            deviation = 1.4826 * statistics.median(abs(each - usual) for each in before)
            least = max(LOSS_DEVIATIONS * deviation, LOSS_SHARE * abs(usual), LOSS_NATS)
            # A batch of a rare domain may have had such a loss before.
            limit = max(usual + least, max(before))
            if self._begins(("loss spike",), loss > limit):
                text = f"loss {loss:.3f}, median of the {len(before)} steps before {usual:.3f}"
                alarm = _alarm("loss spike", metrics.step, text)
        if math.isfinite(loss):
            self._losses.append(loss)
        return alarm

    def _divergence(self, metrics: StepMetrics) -> Alarm | None:
        loss = metrics.lm_loss
        if self._first_loss == math.inf:
            self._first_loss = loss
        limit = self._first_loss + max(LOSS_SHARE * abs(self._first_loss), LOSS_NATS)
        self._diverged_steps = self._diverged_steps + 1 if loss > limit else 0
        lasts = self._diverged_steps >= DIVERGED_STEPS
        # A spike has been said already.
        lasts = lasts and ("loss spike",) not in self._raised
        if not self._begins(("divergence",), lasts, gone=not self._diverged_steps):
            return None
        text = (
            f"loss {loss:.3f}, above the first step's {self._first_loss:.3f} for "
            f"{DIVERGED_STEPS} steps; lower optimizer.learning_rate"
        )
        return _alarm("divergence", metrics.step, text)

    def _collapses(self, step: int, window: LoadWindow) -> list[Alarm]:
        if len(window) < COLLAPSE_STEPS:
            return []
        load = window.last(COLLAPSE_STEPS)  # (L, E)
        alarms = []
        for index, effective in enumerate(effective_experts(load).tolist()):
            num_experts, top_k = self.num_experts[index], self.top_k[index]
            if num_experts == top_k:
                continue
            key, own = ("collapse", index), load[index, :num_experts]
            room = COLLAPSE_SHARE * (num_experts - top_k)
            wrong, gone = effective < top_k + room, effective > top_k + 2 * room
            # A layer without any assignment has nothing that could have collapsed.
            wrong = wrong and bool(own.sum())
            if self._begins(key, wrong, gone=gone):
                share = own / own.sum()
                hottest = share.topk(top_k).indices.tolist()
                text = (
                    f"layer {self.layers[index]} uses {effective:.1f} of {num_experts} "
                    f"experts over the last {COLLAPSE_STEPS} steps, most of all "
                    f"{_experts(hottest)} ({float(share[hottest].sum()):.0%} of the assignments)"
                )
                alarms.append(_alarm("collapse", step, text))
        return alarms

    def _dead(self, step: int, window: LoadWindow) -> list[Alarm]:
        if len(window) < WINDOW_STEPS:
            return []
        load, alarms = window.last(WINDOW_STEPS), []
        for index, num_experts in enumerate(self.num_experts):
            own = load[index, :num_experts]
            enough = float(own.double().mean()) >= LEAST_EXPECTED
            # Its dead experts are looked at when it has spread out again.
            if ("collapse", index) in self._raised:
                continue
            new = [
                expert
                for expert, count in enumerate(own.tolist())
                if self._begins(("dead expert", index, expert), count == 0 and enough)
            ]
            if new:
                text = (
                    f"layer {self.layers[index]}, {_experts(new)}: no token in the last "
                    f"{WINDOW_STEPS} steps"
                )
                alarms.append(_alarm("dead expert", step, text))
        return alarms

    def _drop_spikes(self, metrics: StepMetrics) -> list[Alarm]:
        made = metrics.tokens_per_expert.clamp(min=0).sum(-1)
        shares = (metrics.num_dropped / made.clamp(min=1)).tolist()
        alarms, before = [], list(self._dropped)
        if len(before) >= SPIKE_LEAST:
            for index, share in enumerate(shares):
                usual = statistics.median(each[index] for each in before)
                wrong = share > usual + DROP_LEAST and share > DROP_FACTOR * usual
                if self._begins(("drop spike", index), wrong):
                    fullest = int(metrics.tokens_per_expert[index].argmax())
                    text = (
                        f"layer {self.layers[index]} dropped {share:.1%} of its assignments, "
                        f"median of the {len(before)} steps before {usual:.1%}; expert {fullest} "
                        f"is the fullest"
                    )
                    alarms.append(_alarm("drop spike", metrics.step, text))
        self._dropped.append(shares)
        return alarms

    def _slow_ranks(self, metrics: StepMetrics) -> list[Alarm]:
        seconds = metrics.work_seconds.tolist()
        if len(seconds) < 2 or not all(seconds):
            return []
        self._slow_steps = self._slow_steps or [0] * len(seconds)
        alarms = []
        for rank, own in enumerate(seconds):
            others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
            slow = own > SLOW_FACTOR * others and own > others + SLOW_SECONDS
            self._slow_steps[rank] = self._slow_steps[rank] + 1 if slow else 0
            if self._begins(
                ("slow rank", rank), self._slow_steps[rank] >= SLOW_STEPS, gone=not slow
            ):
                text = (
                    f"rank {rank} needs {own * 1e3:.0f} ms a step for its forward passes, the "
                    f"others {others * 1e3:.0f} ms (medians; {SLOW_STEPS} steps in a row)"
                )
                alarms.append(_alarm("slow rank", metrics.step, text))
        return alarms


def _alarm(kind: str, step: int, text: str) -> Alarm:
    return Alarm(kind, step, f"alarm, step {step}: {kind}: {text}")


def _experts(numbers: list[int]) -> str:
    """`expert 3` or `experts 3, 5, 8 and 4 more`."""
    named = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"expert{'s' if len(numbers) > 1 else ''} {named}{more}"
