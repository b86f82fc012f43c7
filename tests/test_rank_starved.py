"""Do 20 steps pass, and rightly, where every token goes to the experts of one rank?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import run_ranks
from training_cases import data, make_config

from train.engine import build_engine
from train.packing import TrainLoader
from train.ranks import Ranks
from train.step import read_step, train_step

STEPS = 20
CALM = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "training.micro_batch_size": None,
    "training.steps": STEPS,
    "optimizer.learning_rate": 0.001,
    "parallel.expert_parallel_size": 2,
}


def train_starved(ranks: Ranks | None, stages: list[int], text: Any) -> list[list[float]]:
    """Losses of each stage's steps, in which experts 2 and 3 of 4 get no token."""
    results = []
    for stage in stages:
        config = make_config(Path("unused"), CALM | {"parallel.zero_stage": stage})
        engine = build_engine(config, config.model, ranks=ranks)
        for name, bias in engine.model.named_buffers():
            if name.endswith("expert_bias"):
                bias.copy_(torch.tensor([1e4, 1e4, 0, 0]))
        loader = TrainLoader(text, config.training.seq_len, config.seed)
        losses = []
        for step in range(STEPS):
            metrics = train_step(engine, read_step(loader, step, config, engine), step, config)
            assert metrics is not None
            assert metrics.tokens_per_expert[:, 2:].sum() == 0
            assert metrics.tokens_per_expert[:, :2].sum() > 0
            losses.append(metrics.lm_loss)
        results.append(losses)
    return results


def test_a_rank_whose_experts_get_nothing_takes_part_in_every_step():
    (alone,) = train_starved(None, [1], data())
    (together, _) = run_ranks(2, train_starved, [0, 1, 2, 3], data(), seconds=90)
    for losses in together:
        assert losses == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0]
