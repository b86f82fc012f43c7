"""How long does a rank work on its forward passes, without what it waits for others?

In a step over ranks all end at the same time, so the time of a step does not tell who is slow. The
time that a rank spends in its own sections, less the time that it waits in collectives there, does.
On a GPU both are read from events, one step later, without a synchronisation.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class WorkClock:
    """Sections of work, and the waiting in them.

    with clock.working(): ...            reading data, a forward pass
        with clock.waiting(): ...        a collective in it; outside of such sections it counts not

    Args: counts: False where ranks wait for each other in ways that no `waiting` can be put around;
        `seconds` is 0 then.
    """

    def __init__(self, device: torch.device | str, *, counts: bool = True):
        self._counts = counts
        self._cuda = torch.device(device).type == "cuda"
        self._working = False
        # (begin, end, sign) of the step that runs, and of the one before.
        self._marks: list[tuple[Any, Any, int]] = []
        self._last: list[tuple[Any, Any, int]] = []

    def working(self) -> contextlib.AbstractContextManager[None]:
        """A block that is this rank's own work."""
        return self._section(1) if self._counts else contextlib.nullcontext()

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """A block in which it may wait for other ranks."""
        return self._section(-1) if self._working else contextlib.nullcontext()

    def next_step(self) -> None:
        """End a step: from here on `seconds` is of it."""
        self._last, self._marks = self._marks, []

    def seconds(self) -> float:
        """Work of the last step that has ended, less the waiting in it; 0 before the first."""
        return max(0.0, sum(sign * self._between(a, b) for a, b, sign in self._last))

    @contextlib.contextmanager
    def _section(self, sign: int) -> Iterator[None]:
        begin, was_working = self._now(), self._working
        self._working = True
        try:
            yield
        finally:
            self._working = was_working
            self._marks.append((begin, self._now(), sign))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if not self._cuda:
            return end - begin
        # The step has ended, and with it what the events wait for.
        return begin.elapsed_time(end) / 1e3
