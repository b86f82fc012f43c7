"""Does the benchmark of ranks count what is sent, time what trains alike, and leave no trace?"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_cases import run_ranks
from training_cases import make_config, write_config

import train.rank_bench
from moe.model import MoETransformer, num_parameters
from train.config import RunConfig
from train.errors import OutOfMemoryError, RunError
from train.metrics import StepMetrics
from train.rank_bench import (
    build_layout,
    choose,
    layout_names,
    main,
    measure,
    plan_together,
    refuse_differences,
    render,
)
from train.ranks import Ranks
from train.traffic import bytes_sent, counted

ROW_BYTES = 4 * 16
SETTINGS = {
    "model.moe.router": {"name": "topk", "top_k": 2},
    "training.micro_batch_size": None,
    # Stage 3 leaves parameters as small as these where they are, unless told otherwise.
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


def config(**moe: Any) -> RunConfig:
    settings = {f"model.moe.{name}": value for name, value in moe.items()}
    return make_config(Path("unused"), SETTINGS | settings)


def record_exchanges(patch: pytest.MonkeyPatch, rank: int) -> list[int]:
    """Rows that the dispatcher sends to other ranks, one entry a message."""
    rows_sent: list[int] = []
    real = dist.all_to_all_single

    def exchange(output: Any, rows: Any, receive: Any = None, send: Any = None, **options: Any):
        if send is not None:
            rows_sent.append(sum(n for other, n in enumerate(send) if other != rank))
        return real(output, rows, receive, send, **options)

    patch.setattr(dist, "all_to_all_single", exchange)
    return rows_sent


def count_step(ranks: Ranks, *, all_to_rank_0: bool, **moe: Any) -> dict[str, Any]:
    """What a counted step of 2x0 says, and what the dispatcher was seen to send."""
    engine, step = build_layout("2x0", config(**moe), ranks, "float32")
    if all_to_rank_0:
        # Equal logits: ties go to the lowest experts, 0 and 1, which rank 0 holds.
        for name, parameter in engine.model.named_parameters():
            if ".router." in name:
                torch.nn.init.zeros_(parameter)
    with pytest.MonkeyPatch.context() as patch:
        rows_sent = record_exchanges(patch, ranks.rank)
        with counted(engine) as sent:
            metrics = step()
    return {"sent": sent, "rows": rows_sent, "tokens_per_expert": metrics.tokens_per_expert}


def linear_in_steps(ranks: Ranks) -> dict[str, Any]:
    """`F.linear`, which DeepSpeed's stage 3 replaces, as the steps of two layouts find it."""
    steps = {name: build_layout(name, config(), ranks, "float32")[1] for name in ("1x3", "1x0")}
    found: dict[str, Any] = {}
    for name, step in steps.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.rank_bench, "train_step", lambda *args: F.linear)
            found[name] = step()
    return found


def bench(ranks: Ranks) -> dict[str, Any]:
    """On each rank: all layouts measured, two steps counted, and whether anything is left over."""
    methods, linear = dict(vars(dist.ProcessGroup)), F.linear
    facts = measure(config(), layout_names(config().model, 2), ranks, repeats=2)
    found = {
        "facts": facts,
        "known": count_step(ranks, all_to_rank_0=True),
        "random": count_step(ranks, all_to_rank_0=False),
        "latent": count_step(ranks, all_to_rank_0=True, latent_size=6, num_shared_experts=1),
    }
    engine, _ = build_layout("1x0", config(), ranks, "float32")
    with pytest.raises(KeyError), counted(engine):
        raise KeyError
    now = vars(dist.ProcessGroup)
    found["left over"] = [name for name in now if now[name] is not methods.get(name)]
    found["left over"] += [name for name in ("backward",) if name in vars(engine)]
    in_steps = linear_in_steps(ranks)
    assert in_steps["1x0"] is linear and in_steps["1x3"] is not linear
    found["left over"] += [] if F.linear is linear else ["linear"]
    # A method that is put back wrongly is no method any more.
    (total,) = engine.all_reduce(torch.ones(1)).tolist()
    return found | {"total": total}


def check_table(facts: dict[str, Any]) -> None:
    names = ["1x0", "1x1", "1x2", "1x3", "2x0", "2x1", "2x2", "2x3"]
    rows = [line.split(" | ") for line in render(facts).splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == names
    assert all(len(at["seconds"]) == 2 for at in facts["layouts"].values())
    assert all(float(row[1]) > 0 for row in rows)
    assert facts["tokens_per_step"] == 4 * 16 and "world size 2" in render(facts)


def check_tokens(name: str, planned: int, ranks: list[dict[str, int]]) -> None:
    """Four messages in each of two layers, of which with even routing a half leaves the rank."""
    even = 4 * 2 * (32 * 2) * ROW_BYTES // 2
    assert planned == (even if name.startswith("2x") else 0)
    for sent in ranks:
        if name.startswith("2x"):
            assert sent["tokens"] == pytest.approx(even, rel=0.5)
        else:
            assert sent["tokens"] == 0


def check_shared(name: str, ranks: list[dict[str, int]]) -> None:
    """Numbers outside experts are shared by both ranks, experts only without expert parallelism."""
    with torch.device("meta"):
        count = num_parameters(MoETransformer(config().model))
    stage = int(name[-1])
    whole = 4 * (count.total if name.startswith("1x") else count.total - count.experts)
    for sent in ranks:
        # An all-reduce sends 2 n / 2. Stage 3 scatters sums, n / 2, padded to equal parts.
        if stage < 3:
            assert sent["gradients"] == whole
        else:
            assert sent["gradients"] == pytest.approx(whole / 2, rel=0.01)
        if stage == 0:
            assert sent["weights"] == 0
        elif stage < 3:
            assert sent["weights"] == pytest.approx(whole / 2, rel=0.01)
        else:
            # In the forward and in the backward pass, but for what is still there.
            assert whole / 2 <= sent["weights"] <= 1.01 * whole
        assert 0 < sent["other"] < 2048


def check_counts(found: dict[str, Any]) -> None:
    """With all tokens on rank 0's experts only rank 1 sends rows and their outputs' gradients, and
    only rank 0 outputs and the rows' gradients: T * K rows each time, T = 32, K = 2, two layers."""
    known, seen = found["known"], found["random"]
    assert known["tokens_per_expert"].tolist() == [[64, 64, 0, 0]] * 2
    assert known["sent"]["tokens"] == 2 * 2 * 32 * 2 * ROW_BYTES
    # Of latent experts l / D of that: 6 numbers a row in place of 16.
    assert found["latent"]["sent"]["tokens"] * 16 == known["sent"]["tokens"] * 6
    # As the dispatcher is seen to send them: there and back, forward and backward, in two layers.
    assert len(seen["rows"]) == 8 and len(set(seen["rows"])) > 1
    assert seen["sent"]["tokens"] == sum(seen["rows"]) * ROW_BYTES


@pytest.mark.multi_rank
def test_two_ranks_count_what_they_send_and_leave_nothing_wrapped():
    both = run_ranks(2, bench)
    facts = both[0]["facts"]
    check_table(facts)
    for name, at in facts["layouts"].items():
        check_tokens(name, at["planned_token_bytes"], at["sent_bytes"])
        check_shared(name, at["sent_bytes"])
    for found in both:
        check_counts(found)
        assert found["left over"] == [] and found["total"] == 2


def bench_alone(ranks: Ranks) -> dict[str, Any]:
    return measure(config(), ["plain", "1x0", "1x3"], ranks, repeats=2)


@pytest.mark.multi_rank
def test_one_rank_is_timed_beside_the_plain_engine():
    (facts,) = run_ranks(1, bench_alone)
    assert layout_names(config().model, 1) == ["plain", "1x0", "1x1", "1x2", "1x3"]
    assert list(facts["layouts"]) == ["plain", "1x0", "1x3"]
    for at in facts["layouts"].values():
        assert at["sent_bytes"] == [dict.fromkeys(("tokens", "gradients", "weights", "other"), 0)]
    assert "DeepSpeed's own work" in render(facts)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        # 24 bytes over 3 ranks.
        ("allreduce", ([torch.zeros(6)], None), 32),
        ("reduce_scatter", ([torch.zeros(2)], [list(torch.zeros(3, 2))], None), 16),
        ("allgather", ([list(torch.zeros(3, 2))], [torch.zeros(2)], None), 16),
        ("broadcast", ([torch.zeros(6)], None), 16),
        ("all_to_all_single", (torch.zeros(0), torch.zeros(3, 2), [], [], None), 16),
        # Rank 1 keeps 2 of 3 rows of 8 bytes.
        ("all_to_all_single", (torch.zeros(0), torch.zeros(3, 2), [], [1, 2, 0], None), 8),
    ],
)
def test_bytes_that_leave_rank_1_of_3(name, args, expected):
    assert bytes_sent(name, args, 1, 3)[1] == expected


@pytest.mark.parametrize("change", [{"lm_loss": 5.1}, {"gradient_norm": math.nan}])
def test_layouts_that_train_differently_are_not_timed(change):
    none = torch.zeros(1)
    step = StepMetrics(1, 5.0, {}, {}, 0.1, 1.0, none, none, none, 64)
    refuse_differences({"1x0": [step], "1x1": [step._replace(lm_loss=5.0001)]})
    with pytest.raises(RunError, match="WRONG: in step 1 layout 1x1 has"):
        refuse_differences({"1x0": [step], "1x1": [step._replace(**change)]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "1"], "--repeats (1) must be at least 2"),
        (["--layouts", "2x0"], "--layouts (2x0) must be of plain, 1x0, 1x1, 1x2, 1x3"),
        (["--layouts", "1x0", "seed=1"], "write settings before --layouts"),
        (["--json", "."], "--json (.) is a folder"),
        (["parallel.zero_stage=2"], "parallel.zero_stage=2 has no effect here"),
        (["--dry-run"], "python -m train.plan"),
    ],
)
def test_a_mistake_is_named(arguments, message, tmp_path, capsys):
    path = write_config(tmp_path / "run")
    assert main(["--config", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_layouts_are_chosen_by_name():
    model = config().model
    assert choose(None, model, 4)[::4] == ["1x0", "2x0", "4x0"]
    assert choose(["2x1", "1x3"], model, 2) == ["1x3", "2x1"]
    dense = make_config(Path("unused"), {"model.feed_forward": "dense", "model.moe": ...}).model
    assert choose(None, dense, 2) == ["1x0", "1x1", "1x2", "1x3"]


def test_layouts_that_do_not_fit_together_are_named():
    large = make_config(Path("unused"), SETTINGS | {"model.hidden_size": 2**20})
    with pytest.raises(OutOfMemoryError, match=r"1x0, 2x3: out of memory .*; or choose"):
        plan_together(large, ["1x0", "2x3"], Ranks(0, 0, 2), "cpu", "float32")
