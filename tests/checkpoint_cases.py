"""What the tests of checkpoints share: recognisable contents, checks and ways to damage a file."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import torch

from train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    save_checkpoint,
)


def values_of(step: int, size: int = 64) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that tell their step, so that a mixture of two saves cannot pass for either."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(size, generator=generator)},
        "optimizer": {"w.m": torch.randn(size, generator=generator), "step": torch.tensor(step)},
    }


def save(run_dir: Path, step: int, keep_last: int = 10, **kwargs) -> Path:
    state = {"step": step, "seed": [step, 2]}
    return save_checkpoint(run_dir, step, values_of(step), state, keep_last=keep_last, **kwargs)


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def names_in(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*as_bytes)


def is_content_of(checkpoint: Checkpoint | None, step: int, size: int = 64) -> bool:
    expected = values_of(step, size)
    return (
        checkpoint is not None
        and checkpoint.step == step
        and checkpoint.state["step"] == step
        and checkpoint.tensors.keys() == expected.keys()
        and all(
            checkpoint.tensors[group].keys() == named.keys()
            and all(same_bits(checkpoint.tensors[group][name], t) for name, t in named.items())
            for group, named in expected.items()
        )
    )


def newest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    found = find_checkpoint(run_dir, "must", warn)
    assert found is not None
    return found


def no_warning(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def truncate(fraction: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * fraction))


def flip_random_bit(path: Path) -> None:
    flip_bit(path, random.Random(path.name).randrange(8 * path.stat().st_size))


DAMAGES = {
    "bit": flip_random_bit,
    "empty": truncate(0),
    "half": truncate(0.5),
    "99 %": truncate(0.99),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "deleted": Path.unlink,
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "extra": lambda path: path.with_name("extra_" + path.name).write_bytes(b""),
}
