"""How does a program end? Exit codes and messages instead of tracebacks."""

import os
import sys
from collections.abc import Callable

import torch

from train.errors import NoSpaceError, OutOfMemoryError, PeerError, RunError
from train.run_directory import FULL

_TRAINING_ADVICE = (
    "lower training.micro_batch_size or training.seq_len, set training.activation_checkpointing: "
    "true or choose a smaller model (--dry-run shows what takes how much)"
)


def guarded(program: Callable[[], int], memory_advice: str = _TRAINING_ADVICE) -> int:
    """Run a program; what a user can cause becomes a message and an exit code, not a traceback.

    Args: memory_advice: the way out where memory ran out and no plan was at hand to name it
        (`train.plan.memory_errors`).
    """
    try:
        code = program()
        # While an error can still be handled; Python flushes again, and complains, at exit.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; nothing had to be saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`), which is how most programs end then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        known = exit_code_of(error)
        if known is None:
            raise
        # A PeerError has been said by the rank that failed.
        if not isinstance(error, PeerError):
            print(f"error: {_explain(error, memory_advice)}", file=sys.stderr)
        return known


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of what a user can cause; None for a fault of the program's own."""
    if isinstance(error, RunError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        return 141
    if getattr(error, "errno", None) in FULL:
        return NoSpaceError.exit_code
    system = isinstance(error, MemoryError | RuntimeError | OSError)
    return OutOfMemoryError.exit_code if system and is_out_of_memory(error) else None


def _explain(error: Exception, memory_advice: str) -> str:
    if isinstance(error, RunError):
        return str(error)
    if getattr(error, "errno", None) in FULL:
        return f"no space left on the device: {error}"
    return f"out of memory ({first_line(error)}); {memory_advice}"


def first_line(error: Exception) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the system or PyTorch could not get memory; PyTorch's CPU allocator and its
    sizes beyond 64 bits are plain RuntimeErrors."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    phrases = ("out of memory", "can't allocate memory", "cannot allocate memory", "overflowed")
    return any(phrase in text for phrase in phrases)
