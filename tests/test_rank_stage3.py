"""Does no rank make the whole model at ZeRO stage 3, and is it still the same model?"""

from pathlib import Path
from typing import Any

import torch
from rank_cases import gathered_state, run_ranks
from training_cases import make_config, make_engine

from train.config import RunConfig
from train.ranks import Ranks


def config_of(size: int) -> RunConfig:
    return make_config(
        Path("unused"),
        {
            "parallel.expert_parallel_size": size,
            "parallel.zero_stage": 3,
            "model.moe.num_shared_experts": 1,
            "model.moe.shared_gate": "softmax",
            "model.moe.latent_size": 6,
        },
    )


def build(ranks: Ranks, sizes: list[int]) -> list:
    """For each size: the most numbers that were whole at a time while the model was made, and what
    the ranks then hold together."""
    import deepspeed

    import train.engine
    from train.expert_parallel import parameters_seen

    init, results = deepspeed.zero.Init, []
    real = init._zero_init_param
    for size in sizes:
        made: list[Any] = []
        whole = [0]

        def watched(self: Any, parameter: Any, made: list = made, whole: list = whole) -> None:
            whole.append(sum(each.numel() for each in made))
            real(self, parameter)

        init._zero_init_param = watched
        config = config_of(size)
        try:
            with parameters_seen(made.append):
                engine = train.engine.build_engine(config, config.model, ranks=ranks)
        finally:
            init._zero_init_param = real
        results.append((max(whole), gathered_state(engine)["model"]))
    return results


def test_stage_3_partitions_each_module_as_it_is_made():
    """Largest are the tables of the vocabulary; the model is that of one process, bit for bit."""
    (results, _) = run_ranks(2, build, [1, 2], seconds=90)
    alone = make_engine(config_of(1))
    largest = max(p.numel() for p in alone.model.parameters())
    for most, state in results:
        assert most == largest
        expected = alone.state_tensors()["model"]
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
