"""The study of MoE against dense: its arithmetic by hand, its arms kept, its refusals."""

import json
import math

import pytest
from training_cases import write_config

from moe.config import dense_equivalent
from train.compare import HistoryPoint, crossing, main, render_report, speed_up

SLOW = [HistoryPoint(10, 5.0, 1.0), HistoryPoint(20, 4.0, 2.0), HistoryPoint(30, 3.0, 3.0)]
FAST = [HistoryPoint(10, 4.0, 2.0), HistoryPoint(20, 2.0, 4.0), HistoryPoint(30, 1.0, 6.0)]

CHANGES = {
    "training.steps": 4,
    "training.micro_batch_size": None,
    "evaluation.every": 2,
    "model.moe.router.bias_update_rate": 0,
}


def test_a_crossing_lies_between_the_points_of_the_curve():
    assert crossing(SLOW, 3.5) == (25.0, 2.5)
    assert crossing(SLOW, 5.0) == (10.0, 1.0)
    assert crossing(SLOW, 2.9) is None


def test_speed_up_at_equal_loss_in_all_three_units():
    # The fast curve is at 3.0 after 15 steps and 3 seconds; the slow one needs 30 and 3.
    ratios = speed_up(FAST, SLOW, flops_ratio=0.9)
    assert ratios == pytest.approx({"steps": 2.0, "seconds": 1.0, "flops": 1.8})


def test_speed_up_is_below_one_where_the_dense_model_wins():
    ratios = speed_up(SLOW, FAST, flops_ratio=1.0)
    assert ratios == pytest.approx({"steps": 0.5, "seconds": 1.0, "flops": 0.5})


def test_a_study_keeps_its_arms_and_reports_a_paired_interval(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path / "study", CHANGES)
    arguments = ["--config", str(config), "--seeds", "2"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    kept = {path: path.read_bytes() for path in (tmp_path / "study").glob("seed_*/*.json")}
    assert len(kept) == 4
    each = report["difference"]["each"]
    losses = {arm: report["arms"][arm]["loss"] for arm in ("moe", "dense")}
    assert each == pytest.approx([m - d for m, d in zip(*losses.values(), strict=True)])
    # Student's t at 97.5 % with one degree of freedom is 12.706.
    mean, half = sum(each) / 2, 12.7062 * abs(each[0] - each[1]) / math.sqrt(2) / math.sqrt(2)
    assert report["difference"]["low"] == pytest.approx(mean - half, rel=1e-4)
    assert report["difference"]["high"] == pytest.approx(mean + half, rel=1e-4)
    assert abs(report["arms"]["dense"]["active"] / report["arms"]["moe"]["active"] - 1) < 0.02
    assert "95 % interval" in capsys.readouterr().out

    # A second call trains nothing; with one arm gone, it trains that one.
    trained: list[str] = []
    import train.compare

    original = train.compare.build_engine

    def build(config, model, **keywords):
        trained.append(model.feed_forward)
        return original(config, model, **keywords)

    monkeypatch.setattr(train.compare, "build_engine", build)
    assert main(arguments) == 0
    assert trained == []
    gone = tmp_path / "study" / "seed_1" / "dense.json"
    gone.unlink()
    assert main(arguments) == 0
    assert trained == ["dense"]
    again = json.loads(gone.read_bytes())["history"]
    assert [p["loss"] for p in again] == [p["loss"] for p in json.loads(kept[gone])["history"]]


def test_a_kept_arm_of_other_settings_is_refused(tmp_path, capsys):
    config = write_config(tmp_path / "study", CHANGES)
    assert main(["--config", str(config), "--seeds", "2"]) == 0
    code = main(["--config", str(config), "--seeds", "2", "optimizer.learning_rate=0.5"])
    assert code == 2
    assert "is of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--seeds", "1"], "--seeds (1) must be at least 2"),
        ({"evaluation.every": 0}, [], "evaluation.every (0) must lie between 0"),
        ({"model.feed_forward": "dense"}, [], "must be moe: the dense arm is derived"),
    ],
)
def test_a_study_that_could_say_nothing_is_refused(tmp_path, capsys, change, arguments, message):
    config = write_config(tmp_path / "study", {**CHANGES, **change})
    assert main(["--config", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study" / "report.json").exists()


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    config = write_config(tmp_path / "study", CHANGES)
    assert main(["--config", str(config), "--dry-run"]) == 0
    assert "arm dense" in capsys.readouterr().out
    assert not (tmp_path / "study").exists()


def test_the_report_is_a_table_of_all_seeds():
    arm = {
        "total": 2e6, "active": 1e6, "flops_per_token": 6e6, "loss": [3.0, 3.2],
        "mean_loss": 3.1, "standard_deviation": 0.14, "seconds": 60.0,
    }  # fmt: skip
    ratio = {"mean": 1.5, "each": [1.4, 1.6]}
    page = render_report(
        {
            "tokens": 1000,
            "seeds": [0, 1],
            "arms": {"moe": arm, "dense": arm},
            "difference": {"mean": -0.1, "low": -0.2, "high": 0.01, "each": [-0.1, -0.1]},
            "speed_up": {"steps": ratio, "flops": ratio, "seconds": ratio},
        }
    )
    assert "| seed 0 | seed 1 |" in page and "| 3.0000 | 3.2000 |" in page
    assert "-0.1000, 95 % interval [-0.2000, +0.0100], 2 seeds" in page


def test_the_dense_arm_differs_in_one_switch(tmp_path):
    from training_cases import make_config

    moe = make_config(tmp_path / "study", CHANGES).model
    dense = dense_equivalent(moe).model_dump()
    changed = {key for key, value in moe.model_dump().items() if dense[key] != value}
    assert "feed_forward" in changed and changed <= {"feed_forward", "moe"}
