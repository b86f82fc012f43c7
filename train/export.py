"""Write a run's weights into one safetensors file: `python -m train.export RUN --output FILE`.

Whatever the number of ranks that saved them, a tensor at a time: never the whole model in memory.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train.checkpoint import newest_checkpoint, sound_path
from train.checkpoint_format import STATE, parse_json, stream_safetensors, whole_group
from train.errors import CheckpointError, ConfigError
from train.fragments import check_cover
from train.program import guarded
from train.run_directory import SAVING, check_directory, storage_errors, write_durably


class WeightReader:
    """The weights of a checkpoint directory, read one by one.

    Attributes:
        kinds: dtype and shape of each, by name.
    Raises:
        CheckpointError: if the fragments of a weight do not cover it exactly once, or a weight has
            none.
    """

    def __init__(self, checkpoint: Path, stack: contextlib.ExitStack):
        self._pieces: dict[str, list[tuple[int, Any, str]]] = {}
        self.kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}
        shapes = parse_json((checkpoint / STATE).read_bytes()).get("shapes", {})
        spans: dict[str, list[tuple[int, int]]] = {}
        for path in sorted(checkpoint.glob("model*.safetensors")):
            if whole_group(path.stem) != "model":
                continue
            file = stack.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, cut, start = key.rpartition("@")
                name, first = (name, int(start)) if cut else (key, 0)
                part = file.get_slice(key)
                size = torch.Size(part.get_shape())
                self._pieces.setdefault(name, []).append((first, file, key))
                spans.setdefault(name, []).append((first, first + size.numel()))
                dtype = file.get_tensor(key).dtype
                self.kinds[name] = dtype, torch.Size(shapes[name]) if cut else size
        for name in shapes.keys() - self.kinds.keys():
            raise CheckpointError(f"{name}: no file has it")
        for name, (_, shape) in self.kinds.items():
            check_cover(name, spans[name], shape.numel())

    def read(self, name: str) -> Iterator[Tensor]:
        """The values of a weight, in one piece or several, in order."""
        for _, file, key in sorted(self._pieces[name], key=lambda piece: piece[0]):
            yield file.get_tensor(key)


def export_weights(checkpoint: Path, output: Path) -> int:
    """Write the weights of a sound checkpoint to a file that appears whole or not at all.

    Returns: the number of tensors.
    Raises:
        CheckpointError: if fragments are missing.
        ConfigError, NoSpaceError: if the file cannot be written.
    """
    temporary = output.with_name(SAVING + output.name)
    with contextlib.ExitStack() as stack:
        reader = WeightReader(checkpoint, stack)
        with storage_errors(output):
            temporary.unlink(missing_ok=True)
            try:
                write_durably(temporary, stream_safetensors(reader.kinds, reader.read))
                os.replace(temporary, output)
            finally:
                temporary.unlink(missing_ok=True)
    return len(reader.kinds)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    options = parser.parse_args(argv)

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def program() -> int:
        check_directory(options.output.parent, "--output")
        found = newest_checkpoint(options.run, "auto", warn, sound_path)
        if found is None:
            raise ConfigError(f"{options.run} has no checkpoint; give the output_dir of a run")
        count = export_weights(found, options.output)
        print(f"{options.output}: {count} tensors of {found.name}")
        return 0

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
