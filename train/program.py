"""How does a program end? Exit codes and messages instead of tracebacks."""

import os
import sys
from collections.abc import Callable

import torch

from train.errors import RunError

OUT_OF_MEMORY = 8


def guarded(program: Callable[[], int]) -> int:
    """Run a program; what a user can cause becomes a message and an exit code, not a traceback."""
    try:
        return program()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; nothing had to be saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        first_line = str(error).splitlines()[0] if str(error) else "MemoryError"
        print(
            f"error: out of memory ({first_line}); lower training.micro_batch_size, or set "
            f"training.activation_checkpointing: true",
            file=sys.stderr,
        )
        return OUT_OF_MEMORY
