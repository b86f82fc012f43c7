"""What a user can cause, and the exit code that each cause ends the program with.

0 ok, 1 a fault of the program's own (with a traceback), 2 configuration (also a locked run
directory or a refused resume), 3 data, 4 corrupt checkpoint, 5 non-finite loss or gradient, 6 the
run stood still or another rank is gone, 7 no space left, 8 out of memory, 130 Ctrl-C (saved), 141
the reader of the output went away, 143 SIGTERM (saved).
"""


class RunError(Exception):
    """A failure with a message for the user, printed without a traceback before `exit_code`."""

    exit_code = 1


class ConfigError(RunError):
    """The configuration cannot be run as it stands, or the run directory refuses it."""

    exit_code = 2


class DataError(RunError):
    """Text, tokenizer files or recorded routes are missing, empty or unreadable."""

    exit_code = 3


class CheckpointError(RunError):
    """A checkpoint is damaged, and no older one could take its place."""

    exit_code = 4


class NonFiniteError(RunError):
    """The loss or a gradient is inf or NaN and the policy is to stop; the weights are untouched."""

    exit_code = 5


class StalledError(RunError):
    """The run stood still, or another rank did not answer."""

    exit_code = 6


class NoSpaceError(RunError):
    """The disk is full; checkpoints that were complete stay intact."""

    exit_code = 7


class PeerError(RunError):
    """Another rank failed, with this exit code, in what all ranks do together."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemoryError(RunError, MemoryError):
    """The run needs more memory than there is; the message names the settings that decide it."""

    exit_code = 8
