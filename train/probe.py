"""How much have routes changed since the last evaluation? Those of a fixed text are kept as files.

RUN/probe_routes/step_00000300.npy    (N, L, K) int16, the experts of the same N tokens each time
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe.measures import route_overlap
from train.run_directory import replace_file

# Tokens of the probe, over all domains, at most (at least one sequence of each domain).
PROBE_TOKENS = 4096


class ProbeRoutes:
    """The folder of a run's probe routes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def steps(self) -> list[int]:
        """Optimizer steps whose routes are here, in their order."""
        names = [path.stem.removeprefix("step_") for path in self.folder.glob("step_*.npy")]
        return sorted(int(name) for name in names if name.isdecimal())

    def read(self, step: int) -> Tensor:
        """(N, L, K) int64 routes of a step.

        Raises:
            OSError, ValueError: if the file cannot be read, or is damaged.
        """
        path = self._path(step)
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise ValueError("is no .npy file")
        # A map, not memory for whatever shape a damaged header says.
        routes = np.load(path, mmap_mode="r", allow_pickle=False)
        if routes.ndim != 3 or routes.dtype != np.int16:
            raise ValueError(f"holds {routes.dtype} {routes.shape}, needs int16 (N, L, K)")
        return torch.from_numpy(routes.astype(np.int64))

    def begin(self, step: int) -> None:
        """Forget what a run wrote that went on beyond `step`, from which this one goes on.

        Raises:
            OSError: if that cannot be done.
        """
        for later in self.steps():
            if later > step:
                self._path(later).unlink()

    def exchange(self, step: int, routes: Tensor) -> Tensor | None:
        """Keep the routes of a step, and compare them with those of the evaluation before.

        Args: routes: (N, L, K).
        Returns: (L,) float64 `route_overlap`, None without an earlier evaluation.
        Raises:
            OSError: if they cannot be written.
        """
        buffer = io.BytesIO()
        np.save(buffer, routes.cpu().numpy().astype(np.int16))
        self.folder.mkdir(exist_ok=True)
        replace_file(self._path(step), buffer.getvalue())
        earlier = [each for each in self.steps() if each < step]
        if not earlier:
            return None
        try:
            before = self.read(earlier[-1])
        except (OSError, ValueError):
            return None
        if before.shape != routes.shape:
            return None
        return route_overlap(routes.cpu().transpose(0, 1), before.transpose(0, 1))

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.npy"
