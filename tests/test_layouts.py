"""Is the plan for many ranks what the ranks then hold?"""

from pathlib import Path
from typing import Any

import pytest
from rank_cases import run_ranks
from training_cases import data, make_config, write_config

from train.layouts import describe_layouts, plan_layouts, possible_sizes
from train.packing import TrainLoader
from train.plan import describe_plan, main, make_plan
from train.ranks import Ranks
from train.step import read_step, train_step

# Large enough that alignment and indices do not weigh.
WIDE = {
    "model.hidden_size": 64,
    "model.moe": {"num_experts": 8, "intermediate_size": 64},
    "training.batch_size": 4,
    "training.micro_batch_size": None,
}


def config_of(size: int, stage: int):
    layout = {"parallel.expert_parallel_size": size, "parallel.zero_stage": stage}
    return make_config(Path("unused"), WIDE | layout)


def storage_bytes(tensors: Any) -> int:
    """Of all storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held(ranks: Ranks, layouts: list[tuple[int, int]], text: Any) -> list[tuple[int, int]]:
    """For each layout: bytes of weights and of what the optimizer holds, after a step."""
    from train.engine import build_engine

    found = []
    for size, stage in layouts:
        config = config_of(size, stage)
        engine = build_engine(config, config.model, ranks=ranks)
        loader = TrainLoader(text, config.training.seq_len, config.seed)
        assert train_step(engine, read_step(loader, 0, config, engine), 0, config) is not None
        parameters = list(engine.model.parameters())
        weights = [getattr(p, "ds_tensor", p) for p in parameters]
        state = [
            value
            for per_tensor in engine._optimizer.state.values()
            for value in per_tensor.values()
            if value.dim()
        ]
        if stage > 0:
            state += list(engine._optimizer.state)
        found.append((storage_bytes(weights), storage_bytes(state)))
    return found


def test_ranks_hold_what_was_planned():
    layouts = [(size, stage) for size in (1, 2) for stage in (0, 1, 2, 3)]
    (measured, _) = run_ranks(2, held, layouts, data(), seconds=120)
    config = config_of(1, 0)
    count = make_plan(config, config.model, 4).parameters
    planned = plan_layouts(config, config.model, count, 2, 4)
    assert [(at.expert_parallel_size, at.zero_stage) for at in planned] == layouts
    for at, (weights, optimizer) in zip(planned, measured, strict=True):
        assert weights == pytest.approx(at.weight_bytes, rel=0.02), at
        assert optimizer == pytest.approx(at.optimizer_bytes, rel=0.02), at


def test_sizes_divide_ranks_and_experts():
    assert possible_sizes([12], world_size=8) == [1, 2, 4]
    assert possible_sizes([7], world_size=4) == [1]


def test_a_rank_sends_its_rows_to_the_others():
    """Four messages of K rows of D numbers for each token and layer, half of them to oneself."""
    config = config_of(1, 0)
    count = make_plan(config, config.model, 4).parameters
    by_size = {
        at.expert_parallel_size: at.all_to_all_bytes
        for at in plan_layouts(config, config.model, count, 2, 4)
    }
    tokens_of_rank, top_k, layers = 2 * 16, config.model.top_k, 2
    assert by_size == {1: 0, 2: 4 * tokens_of_rank * top_k * layers * 64 * 4 // 2}


def test_latent_experts_have_shorter_rows_sent():
    def sent(moe: dict[str, Any]) -> int:
        config = make_config(Path("unused"), WIDE | {"model.moe": WIDE["model.moe"] | moe})
        count = make_plan(config, config.model, 4).parameters
        return plan_layouts(config, config.model, count, 2, 4)[-1].all_to_all_bytes

    assert sent({"latent_size": 16}) * 64 == sent({}) * 16


def test_recomputing_and_counting_passes_send_rows_again():
    """Two messages each, beside four."""
    several = {"training.micro_batch_size": 1, "training.activation_checkpointing": True}

    def sent(**changes: Any) -> int:
        named = {key.replace("__", "."): value for key, value in changes.items()}
        config = make_config(Path("unused"), WIDE | named)
        count = make_plan(config, config.model, 4).parameters
        return plan_layouts(config, config.model, count, 2, 4)[-1].all_to_all_bytes

    moe = WIDE["model.moe"]
    local = {**moe, "losses": [{"name": "router_z_loss", "weight": 0.1}]}
    whole = {**moe, "losses": [{"name": "load_balancing", "weight": 0.1}]}
    once = sent(model__moe=whole)
    assert sent(model__moe=whole, training__activation_checkpointing=True) == once * 6 // 4
    assert sent(model__moe=local, training__micro_batch_size=1) == once
    assert sent(model__moe=whole, training__micro_batch_size=1) == once * 6 // 4
    named = {key.replace(".", "__"): value for key, value in several.items()}
    assert sent(model__moe=whole, **named) == once * 8 // 4


def test_what_is_offloaded_is_on_the_host():
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    plain = config_of(1, 3)
    offloading = plain.model_copy(update={"deepspeed": {"zero_optimization": both}})
    count = make_plan(plain, plain.model, 4).parameters
    before = plan_layouts(plain, plain.model, count, 2, 4)
    after = plan_layouts(offloading, plain.model, count, 2, 4)
    for at, then in zip(before, after, strict=True):
        moved = 0 if at.zero_stage == 0 else at.optimizer_bytes
        moved += at.weight_bytes if at.zero_stage == 3 else 0
        assert then.host_bytes == moved
        assert then.device_bytes == at.device_bytes - moved
    of_rank = make_plan(offloading, plain.model, 4, Ranks(0, 0, 2))
    assert of_rank.host_bytes == after[3].host_bytes
    assert "offloaded to the host" in describe_plan(of_rank)


def test_the_program_prints_a_table_and_what_fits(tmp_path, capsys):
    config = str(write_config(tmp_path / "run", WIDE))
    assert main(["--config", config, "--world-size", "4", "--gpu-memory", "0.0025"]) == 0
    out = capsys.readouterr().out
    assert "parameters, total" in out
    table = out[out.index("each of 4 ranks:") :].splitlines()
    assert len(table) == 2 + 3 * 4
    assert table[1].split()[-1] == "fits"
    assert {line.split()[-1] for line in table[2:]} == {"yes", "no"}
    assert main(["--config", config, "--world-size", "3"]) == 2
    assert "training.batch_size (4) must be a multiple" in capsys.readouterr().err
    assert main(["--config", config, "--world-size", "0"]) == 2
    assert "--world-size (0)" in capsys.readouterr().err


def test_without_a_memory_nothing_is_said_to_fit():
    config = config_of(1, 0)
    count = make_plan(config, config.model, 4).parameters
    assert "fits" not in describe_layouts(plan_layouts(config, config.model, count, 2, 4), None)
