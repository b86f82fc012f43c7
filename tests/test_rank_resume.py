"""Does a run over ranks that was stopped end where an uninterrupted one does, to the last bit?

With noise in the router, drawn from PyTorch's stream so that those of every rank count; in the same
layout, where nothing is summed in another order.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import run_ranks
from training_cases import bits, checkpoint, data, make_config, noise_from_pytorch

from train.config import RunConfig
from train.ranks import Ranks, gather

# In this one a rank forgets its random streams.
PLANTED = (2, 1)


def config_of(folder: Path, part: str, size: int, stage: int) -> RunConfig:
    changes = {
        "parallel.expert_parallel_size": size,
        "parallel.zero_stage": stage,
        "model.moe.router": {"name": "topk", "jitter": 0.5, "bias_update_rate": 0.02},
        "checkpoint.every": 4,
        "checkpoint.keep_last": 5,
        "evaluation.every": 3,
        "training.micro_batch_size": 1,
    }
    return make_config(folder / f"{part}_{size}_{stage}", changes)


def run_whole_and_in_two(ranks: Ranks, folder: Path, layouts: list[tuple[int, int]]) -> None:
    """Each layout from its beginning, and again from its checkpoint at half."""
    import train.pretrain
    import train.run_state

    noise_from_pytorch(pytest.MonkeyPatch())
    set_state = train.run_state.set_random_state
    for size, stage in (*layouts, PLANTED):
        whole, again = (config_of(folder, part, size, stage) for part in ("whole", "again"))
        for config in (whole, again):
            # What the lock does, which only rank 0 holds.
            Path(config.output_dir).mkdir(exist_ok=True)
            if config is again and ranks.rank == 0:
                half = Path(whole.output_dir) / "checkpoints" / "step_00000004"
                shutil.copytree(half, Path(again.output_dir) / "checkpoints" / half.name)
                (Path(again.output_dir) / "checkpoints" / "latest").write_text(half.name + "\n")
            gather(None)
            if config is again and (size, stage) == PLANTED and ranks.rank == 1:
                train.run_state.set_random_state = lambda state: None
            assert train.pretrain.run(config, ranks) == 0
            train.run_state.set_random_state = set_state


def ends(folder: Path, size: int, stage: int) -> list[dict[str, bytes]]:
    """Every tensor of both last checkpoints: weights, moments, biases, streams of each rank."""
    found: list[Any] = [
        checkpoint(folder / f"{part}_{size}_{stage}") for part in ("whole", "again")
    ]
    assert [each.step for each in found] == [8, 8]
    assert {"random_rank_00000", "random_rank_00001"} < found[0].tensors.keys()
    streams = [found[0].tensors[f"random_rank_0000{rank}"]["torch"] for rank in (0, 1)]
    assert not torch.equal(*streams)
    return [bits(each.tensors) for each in found]


@pytest.mark.parametrize(
    "layouts",
    [[(2, 3)], pytest.param([(1, 0), (1, 1), (1, 3), (2, 0), (2, 2)], marks=pytest.mark.slow)],
)
def test_a_run_that_was_stopped_ends_where_an_uninterrupted_one_does(layouts, tmp_path):
    data()
    run_ranks(2, run_whole_and_in_two, tmp_path, layouts, seconds=180)
    for size, stage in layouts:
        whole, again = ends(tmp_path, size, stage)
        assert whole.keys() == again.keys()
        assert [name for name in whole if whole[name] != again[name]] == [], (size, stage)
    whole, again = ends(tmp_path, *PLANTED)
    assert whole != again
