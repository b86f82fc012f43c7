"""What does a person watching the run see? One line that stays on a terminal, lines in a pipe."""

import io
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TextIO

import torch


class Status(NamedTuple):
    """Numbers of one line. lm_loss in nats per token; mfu None where it is not known; dropped: the
    share of the assignments that a capacity took back, None without one.
    """

    step: int
    num_steps: int
    lm_loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    mfu: float | None
    max_violation: float | None
    dead_experts: int | None
    dropped: float | None = None


# Dense bfloat16 peaks in FLOP/s, from the makers' data sheets.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """The device's bfloat16 peak in FLOP/s, None where it is unknown (and on every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name), None)


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s` or `2h07m`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def format_layers(values: Iterable[Any]) -> str:
    """What each layer has, `4 / 8 / 6`; once where all have the same."""
    texts = [str(value) for value in values]
    return " / ".join(texts if len(set(texts)) > 1 else texts[:1])


def format_table(
    rows: Sequence[Sequence[str]], justify: Callable[[str, int], str] = str.ljust
) -> str:
    """Rows of cells, all rows as long as the first, in columns; `justify` as `str.ljust`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(justify, row, widths)).rstrip() for row in rows)


# What goes first where the terminal is too narrow for all: a line that wraps cannot be replaced.
_LEFT_OUT_FIRST = ("mfu", "rate", "gradient", "dead", "dropped", "violation", "speed")


def format_line(
    status: Status, seconds_left: float, width: int | None = None, label: str = ""
) -> str:
    """The status line, in at most `width` characters, with `label` before it."""
    parts = {
        **({"label": label} if label else {}),
        "step": f"step {status.step}/{status.num_steps}",
        "loss": f"loss {status.lm_loss:.4f}",
        "rate": f"lr {status.learning_rate:.2e}",
        "gradient": f"grad {status.gradient_norm:.2f}",
        "speed": f"{status.tokens_per_second:,.0f} tok/s",
        "mfu": "mfu n/a" if status.mfu is None else f"mfu {status.mfu:.1%}",
    }
    if status.max_violation is not None:
        parts["violation"] = f"maxvio {status.max_violation:.2f}"
        parts["dead"] = f"dead {status.dead_experts}"
    if status.dropped is not None:
        parts["dropped"] = f"dropped {status.dropped:.1%}"
    parts["left"] = f"left {format_duration(seconds_left)}"
    for name in _LEFT_OUT_FIRST:
        if width is not None and len(" | ".join(parts.values())) > width:
            parts.pop(name, None)
    return " | ".join(parts.values())[:width]


class StatusLine:
    """Shows `Status` lines and messages between them.

    On a terminal each line replaces the one before; in a pipe each is a line of its own. The time
    left is that of the remaining steps at the mean pace so far, pauses for evaluation included.

    label: stands before each line, where a run is one of many. seconds_after(seconds): of what
    comes after a run that takes so long; part of the time left.
    """

    label = ""
    seconds_after: Callable[[float], float] = staticmethod(lambda seconds: 0.0)

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        if isinstance(self.stream, io.TextIOWrapper):
            # A sample may hold any script, and a terminal that lacks it must not end the training.
            self.stream.reconfigure(errors="backslashreplace")
        self.live = self.stream.isatty()
        self._start: tuple[float, int] | None = None
        self._shown = 0

    def begin(self, step: int) -> None:
        """Start the clock at the first step of this process."""
        self._start = (time.monotonic(), step)

    def show(self, status: Status) -> None:
        """Print one line."""
        began, first = self._start or (time.monotonic(), status.step)
        pace = (time.monotonic() - began) / max(1, status.step - first)
        width = shutil.get_terminal_size().columns - 1 if self.live else None
        left = pace * (status.num_steps - status.step) + self.seconds_after(pace * status.num_steps)
        line = format_line(status, left, width, self.label)
        if self.live:
            self._write("\r" + line.ljust(self._shown))
            self._shown = len(line)
        else:
            self._write(line + "\n")

    def message(self, text: str) -> None:
        """Print text that stays, above the live line."""
        clear = "\r" + " " * self._shown + "\r" if self.live and self._shown else ""
        self._shown = 0
        self._write(f"{clear}{text}\n")

    def _write(self, text: str) -> None:
        # A closed pipe or a full disk behind the log must not end the training.
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            return
