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
    except PeerError as error:
        # The rank that failed has said it.
        return error.exit_code
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; nothing had to be saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`), which is how most programs end then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError, OSError) as error:
        if getattr(error, "errno", None) in FULL:
            print(f"error: no space left on the device: {error}", file=sys.stderr)
            return NoSpaceError.exit_code
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory ({first_line(error)}); {memory_advice}", file=sys.stderr)
        return OutOfMemoryError.exit_code


def first_line(error: Exception) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, the system or PyTorch could not get memory; PyTorch's CPU allocator and its
    sizes beyond 64 bits are plain RuntimeErrors."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    phrases = ("out of memory", "can't allocate memory", "cannot allocate memory", "overflowed")
    return any(phrase in text for phrase in phrases)
