"""Does the run still move? What watches it, and what a rank leaves behind when it ends.

RUN/stacks_rank_0.txt      the stacks of all threads of a rank that stood still
RUN/exit_rank_0.json       exit code and last message of a rank: launchers replace both
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from train.errors import RunError, StalledError
from train.program import exit_code_of

_TICK_SECONDS = 1.0


class Watchdog:
    """Ends the process with its stacks if nobody calls `beat` for `seconds`; None never does.

    Counts time that this process was running: a laptop that sleeps, or SIGSTOP, is no stall.

        with Watchdog(run_dir, rank, seconds) as watchdog:
            ...
            watchdog.beat()
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float | None):
        self.path = run_dir / f"stacks_rank_{rank}.txt"
        self.run_dir, self.rank, self.seconds = run_dir, rank, seconds
        self._beats = 0
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def beat(self) -> None:
        """Say that the run moves."""
        self._beats += 1

    def _watch(self) -> None:
        assert self.seconds is not None
        tick = min(_TICK_SECONDS, self.seconds / 4)
        seen, stood = self._beats, 0.0
        while not self._ended.wait(tick):
            # Not the clock's difference: while the process was stopped, nothing could move.
            stood = stood + tick if self._beats == seen else 0.0
            seen = self._beats
            if stood > self.seconds:
                self._give_up()

    def _give_up(self) -> None:
        """No exception could reach a thread that waits in a library: the process ends here."""
        minutes = (self.seconds or 0.0) / 60
        message = (
            f"rank {self.rank} has not moved for training.stall_minutes "
            f"({minutes:g}); the stacks of its threads are in {self.path}"
        )
        with contextlib.suppress(OSError), self.path.open("w") as file:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"error: {message}", file=sys.stderr, flush=True)
        write_exit_record(self.run_dir, self.rank, StalledError.exit_code, message)
        os._exit(StalledError.exit_code)


def write_exit_record(run_dir: Path, rank: int, exit_code: int, message: str) -> None:
    """RUN/exit_rank_N.json; a disk that refuses it changes nothing."""
    text = json.dumps({"rank": rank, "exit_code": exit_code, "message": message}) + "\n"
    with contextlib.suppress(OSError):
        (run_dir / f"exit_rank_{rank}.json").write_text(text)


@contextlib.contextmanager
def exit_recorded(run_dir: Path, rank: int) -> Iterator[list[int]]:
    """Leave an exit record of the block; what it appends to the list is its exit code, else 0."""
    with contextlib.suppress(OSError):
        (run_dir / f"exit_rank_{rank}.json").unlink(missing_ok=True)
    codes: list[int] = []
    try:
        yield codes
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        write_exit_record(run_dir, rank, code, "")
        raise
    except BaseException as error:
        known = exit_code_of(error)
        text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        write_exit_record(run_dir, rank, 1 if known is None else known, text)
        raise
    write_exit_record(run_dir, rank, codes[-1] if codes else 0, "")
