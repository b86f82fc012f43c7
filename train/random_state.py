"""Every random stream of the process, as tensors that a checkpoint can hold."""

import hashlib
import math
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def get_random_state() -> dict[str, Tensor]:
    """PyTorch's CPU and CUDA streams, Python's and NumPy's."""
    version, words, gauss = random.getstate()
    assert version == 3
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Continue the streams where `get_random_state` found them."""
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int, rank: int = 0, step: int = 0) -> None:
    """Start every stream from the run's seed; those of other ranks and parts of a run differ.

    Args: step: at which a rank joins that the run did not have before.
    """
    if rank:
        digest = hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()
        seed = int.from_bytes(digest[:7])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
