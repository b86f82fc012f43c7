"""What does a checkpoint keep of a run, and how does a run go on from it?"""

from typing import Any

from torch import Tensor

from moe.config import ModelConfig
from train.checkpoint import Checkpoint, rank_group
from train.config import RunConfig
from train.data import PreparedData
from train.engine import Engine, TensorGroups
from train.loop import Position
from train.random_state import get_random_state, seed_all, set_random_state


def identity(config: RunConfig, model: ModelConfig, data: PreparedData) -> dict[str, Any]:
    """What must not change between the parts of a run, but for what `lasting` lets go."""
    return {
        # Which kernels compute it may change: they agree to rounding.
        "model": model.model_dump(mode="json", exclude={"kernel_backend"}),
        "data": {
            "fingerprint": data.fingerprint,
            "domains": list(data.domain_names),
            "weights": list(data.weights),
        },
        "tokenizer": {"sha256": data.tokenizer.sha256},
        "training": {
            "seq_len": config.training.seq_len,
            "batch_size": config.training.batch_size,
        },
        "seed": config.seed,
    }


def run_state(
    engine: Engine,
    at: Position,
    config: RunConfig,
    facts: dict[str, Any],
    *,
    seconds: float,
    metrics: dict[str, Tensor],
) -> tuple[TensorGroups, dict[str, Any]]:
    """What this rank puts into a checkpoint: tensors by group, and what is no tensor.

    Args:
        facts: the `identity` of this run.
        seconds: of training so far.
        metrics: what the metrics of several steps are made from.
    """
    state = {
        "step": at.step,
        "evaluated": at.evaluated,
        "seconds": seconds,
        "precision": engine.precision,
        "identity": facts,
        "config": config.model_dump(mode="json"),
    }
    tensors = {**engine.state_tensors(), "random": get_random_state()}
    if engine.shared_out:
        tensors = {rank_group(name, engine.rank): named for name, named in tensors.items()}
        state["shapes"] = {name: list(shape) for name, shape in engine.state_shapes().items()}
    if engine.rank == 0:
        tensors["metrics"] = metrics
    return tensors, state


def restore(engine: Engine, checkpoint: Checkpoint, seed: int) -> Position:
    """Continue from a checkpoint: weights, moments, router biases, random streams, position."""
    engine.load_state_tensors(checkpoint.tensors)
    groups = [rank_group("random", engine.rank), *(["random"] if engine.rank == 0 else [])]
    streams = [checkpoint.tensors[group] for group in groups if group in checkpoint.tensors]
    if streams:
        set_random_state(streams[0])
    else:
        # A rank that the run did not have before.
        seed_all(seed, engine.rank, checkpoint.step)
    return Position(checkpoint.state["step"], checkpoint.state["evaluated"])
