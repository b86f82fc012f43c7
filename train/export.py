"""Write a run's weights into one safetensors file: `python -m train.export RUN --output FILE`.

Whatever the number of ranks that saved them, a tensor at a time: never the whole model in memory.
"""

import argparse
import os
import sys
from pathlib import Path

from train.checkpoint import newest_checkpoint, open_checkpoint
from train.checkpoint_format import stream_safetensors
from train.errors import ConfigError
from train.program import guarded
from train.run_directory import SAVING, check_directory, storage_errors, write_durably
from train.stored_tensors import StoredGroup


def export_weights(weights: StoredGroup, output: Path) -> None:
    """Write weights to a file that appears whole or not at all.

    Raises:
        ConfigError, NoSpaceError: if the file cannot be written.
    """
    temporary = output.with_name(SAVING + output.name)
    with storage_errors(output, setting="--output"):
        temporary.unlink(missing_ok=True)
        try:
            write_durably(temporary, stream_safetensors(weights.kinds, weights.stream))
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    options = parser.parse_args(argv)

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def program() -> int:
        if options.output.suffix != ".safetensors" or options.output.is_dir():
            raise ConfigError(
                f"--output ({options.output}) must name a file that ends in .safetensors"
            )
        if (options.run / "checkpoints").resolve() in options.output.resolve().parents:
            raise ConfigError(
                f"--output ({options.output}) lies among the checkpoints; choose another place"
            )
        check_directory(options.output.parent, "the folder of --output")
        found = newest_checkpoint(options.run, "auto", warn, open_checkpoint)
        if found is None:
            raise ConfigError(f"{options.run} has no checkpoint; give the output_dir of a run")
        weights = found.tensors["model"]
        assert isinstance(weights, StoredGroup)
        export_weights(weights, options.output)
        print(f"{options.output}: {len(weights)} tensors of {found.path.name}")
        return 0

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
