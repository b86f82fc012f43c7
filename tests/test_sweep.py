"""A sweep trains pairs, keeps what is finished, goes on after any end, and says what came out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from training_cases import ROOT, Recorder, base_settings, send, settings, work_dir

import train.loop
from train.run_directory import RunLock
from train.sweep import main
from train.sweep_report import render_sweep

CHANGES = {
    "training.steps": 4,
    "training.micro_batch_size": None,
    "evaluation.every": 2,
    "model.moe.router.bias_update_rate": None,
}
ARMS = {
    "top2": {},
    "dense": {"model": {"feed_forward": "dense"}},
    "choice": {
        "model": {
            "moe": {"router": {"name": "expert_choice"}, "losses": [], "allow_non_causal": True}
        }
    },
}
SEEDS = 3
TIMES = ("seconds", "tokens_per_second", "training_seconds", "speed_up", "command")


def write(out: Path, arms=None) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps({**settings(out, CHANGES), "arms": arms or ARMS}))
    return path


def sweep(out: Path, *arguments: str, arms=None, seeds: int = SEEDS) -> int:
    return main(["--config", str(write(out, arms)), "--seeds", str(seeds), *arguments])


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def untimed(value):
    """A report without what a clock decides."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key not in TIMES}
    return value


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A sweep that nothing has disturbed."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    assert sweep(out) == 0
    return out


def kept(out: Path) -> dict[str, dict]:
    paths = sorted(out.glob("seed_*/*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in paths}


def test_the_report_has_the_numbers_of_the_runs(whole):
    runs, report = kept(whole), report_of(whole)
    assert len(runs) == SEEDS * len(ARMS)
    losses = {
        arm: np.array([runs[f"seed_{seed}/{arm}"]["history"][-1]["loss"] for seed in range(SEEDS)])
        for arm in ARMS
    }
    for arm, each in losses.items():
        found = report["arms"][arm]
        assert found["loss"]["each"] == pytest.approx(each)
        assert found["loss"]["standard_deviation"] == pytest.approx(each.std(ddof=1))
        if arm == "top2":
            assert "difference" not in found
            continue
        result = stats.ttest_rel(each, losses["top2"])
        interval = result.confidence_interval(0.95)
        assert found["difference"]["low"] == pytest.approx(interval.low)
        assert found["difference"]["high"] == pytest.approx(interval.high)
        assert found["difference"]["p"] == pytest.approx(result.pvalue)
        assert found["difference"]["detectable"] == pytest.approx(
            (interval.high - interval.low) / 2
        )
        excluded = interval.low > 0 or interval.high < 0
        assert found["difference"]["interval_excludes_0"] == excluded
    layers = [runs[f"seed_{seed}/top2"]["summary"]["layers"] for seed in range(SEEDS)]
    worst = [max(layer["max_violation"] for layer in each) for each in layers]
    assert report["arms"]["top2"]["max_violation"]["mean"] == pytest.approx(np.mean(worst))
    assert "max_violation" not in report["arms"]["dense"]
    assert report["arms"]["choice"]["causal"] is False and report["arms"]["top2"]["causal"]


def test_a_dense_arm_costs_what_the_baseline_costs(whole):
    arms = report_of(whole)["arms"]
    assert arms["dense"]["flops_per_token"] == pytest.approx(
        arms["top2"]["flops_per_token"], rel=0.01
    )
    assert arms["dense"]["total"] < arms["top2"]["total"]


def test_the_page_and_the_picture_can_be_read(whole):
    page = (whole / "report.md").read_text()
    for arm in ARMS:
        assert f"| {arm}" in page
    assert "| choice* |" in page and "its loss is not comparable" in page
    # All rows of a table are as long as its head.
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    with Image.open(whole / "report.png") as picture:
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB"))
    assert width == 1200 and 250 < height < 450
    # Text begins after the margin: nothing is cut off at an edge.
    edge = np.concatenate([pixels[:4].reshape(-1, 3), pixels[:, :4].reshape(-1, 3)])
    assert (edge == 255).all() and (pixels != 255).any()


@pytest.mark.parametrize("arm", ARMS)
def test_tensorboard_has_a_row_and_a_curve_of_each_run(whole, arm):
    run = kept(whole)[f"seed_1/{arm}"]
    events = EventAccumulator(str(whole / "tensorboard" / arm / "seed_1")).Reload()
    curve = {scalar.step: scalar.value for scalar in events.Scalars("validation/mean_loss")}
    tokens = 4 * 16
    assert curve == pytest.approx({p["tokens"] // tokens: p["loss"] for p in run["history"]})
    summaries = events.summary_metadata
    start = HParamsPluginData.FromString(
        summaries["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert start.hparams["arm"].string_value == arm and start.hparams["seed"].number_value == 1
    assert ("num_experts" in start.hparams) == (arm != "dense")
    experiment = HParamsPluginData.FromString(
        summaries["_hparams_/experiment"].plugin_data.content
    ).experiment
    columns = {info.name.tag for info in experiment.metric_infos}
    routing = {
        "load/max_violation_validation/all_layers",
        "load/dead_experts_validation/all_layers",
    }
    assert routing <= columns if arm != "dense" else not routing & columns
    # Each column has a scalar to show.
    assert columns <= set(events.Tags()["scalars"])
    if arm != "dense":
        worst = max(layer["max_violation"] for layer in run["summary"]["layers"])
        (scalar,) = events.Scalars("load/max_violation_validation/all_layers")
        assert scalar.value == pytest.approx(worst)


def test_all_arms_of_a_seed_see_the_same_tokens_in_the_same_order(tmp_path, monkeypatch):
    seen: list[list[torch.Tensor]] = []
    real = train.loop.train_step

    def step(engine, batches, number, config, **keywords):
        if number == 0:
            seen.append([])
        seen[-1].append(torch.cat([batch.input_ids for batch in batches]))
        return real(engine, batches, number, config, **keywords)

    monkeypatch.setattr(train.loop, "train_step", step)
    arms = {"whole": {}, "parts": {"training": {"micro_batch_size": 2}}, "dense": ARMS["dense"]}
    assert sweep(tmp_path / "out", arms=arms, seeds=2) == 0
    first, parts, dense, second, *_ = [torch.stack(steps) for steps in seen]
    assert first.shape == (4, 4, 16)
    assert torch.equal(first, parts) and torch.equal(first, dense)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_sweep_goes_on_and_reports_the_same(whole, tmp_path, capsys, number, code):
    out = tmp_path / "whole"
    steps = 0

    def stop_in_the_fifth_run(step: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 4 * 4 + 2:
            send(number)

    with Recorder(before_step=stop_in_the_fifth_run):
        assert sweep(out) == code
    assert len(kept(out)) == 4 and not (out / "report.json").exists()
    assert "run again to go on" in capsys.readouterr().out
    with Recorder() as recorder:
        assert sweep(out) == 0
    assert len(recorder.steps) == 4 * (SEEDS * len(ARMS) - 4)
    assert untimed(report_of(out)) == untimed(report_of(whole))
    printed = capsys.readouterr().out
    assert "run 5/9 dense seed 1 | step" in printed and "| left " in printed


def test_a_killed_sweep_goes_on_and_reports_the_same(whole, tmp_path):
    out = tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "train.sweep", "--config", str(write(out)), f"--seeds={SEEDS}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not (out / "seed_0" / "dense.json").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 2 <= len(kept(out)) < SEEDS * len(ARMS)
    assert sweep(out) == 0
    assert untimed(report_of(out)) == untimed(report_of(whole))


def test_finished_runs_are_not_trained_again_and_missing_ones_are(tmp_path):
    out = tmp_path / "out"
    assert sweep(out, seeds=2) == 0
    before = report_of(out)
    with Recorder() as recorder:
        assert sweep(out, seeds=2) == 0
    assert recorder.steps == [] and report_of(out) == before
    (out / "seed_1" / "dense.json").unlink()
    # A part of it: what is there of two whole seeds is reported, and one whole seed is not enough.
    assert sweep(out, "--report", seeds=2) == 2
    with Recorder() as recorder:
        assert sweep(out, seeds=2) == 0
    assert len(recorder.steps) == 4
    assert untimed(report_of(out)) == untimed(before)


def test_a_part_of_a_sweep_reports_its_whole_seeds(whole, tmp_path, capsys):
    out = tmp_path / "part"
    assert sweep(out, seeds=2) == 0
    # Of the third seed one arm is there, copied from another place as from another machine.
    (out / "seed_2").mkdir()
    found = (whole / "seed_2" / "top2.json").read_bytes()
    (out / "seed_2" / "top2.json").write_bytes(found)
    with Recorder() as recorder:
        assert sweep(out, "--report") == 0
    assert recorder.steps == [] and report_of(out)["seeds"] == [0, 1]
    with Recorder() as recorder:
        assert sweep(out) == 0
    assert len(recorder.steps) == 4 * 2 and report_of(out)["seeds"] == [0, 1, 2]
    assert report_of(out)["arms"]["top2"]["loss"] == report_of(whole)["arms"]["top2"]["loss"]
    # A report of two arms stands beside that of all.
    before = report_of(out)
    assert sweep(out, "--report", "--arms", "top2, dense,") == 0
    assert report_of(out) == before
    some = json.loads((out / "report_of_some.json").read_text())
    assert list(some["arms"]) == ["top2", "dense"]
    assert some["arms"]["top2"] == before["arms"]["top2"]
    assert "report_of_some.png" in capsys.readouterr().out
    assert {path.name for path in out.glob("report*")} == {
        f"report{part}.{kind}" for part in ("", "_of_some") for kind in ("json", "md", "png")
    }


def test_results_of_other_settings_are_refused_before_anything_is_trained(tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep(out, seeds=2) == 0
    with Recorder() as recorder:
        assert sweep(out, "optimizer.learning_rate=0.5") == 2
    assert recorder.steps == []
    error = capsys.readouterr().err
    assert "is of other settings (optimizer.learning_rate: 0.02 there, 0.5 now)" in error
    # A run may go on with another rate, a result is of one.
    arms = {name: ARMS[name] for name in ("top2", "dense")}
    assert sweep(out, "model.moe.router.bias_update_rate=0.5", seeds=2, arms=arms) == 2
    error = capsys.readouterr().err
    assert "model.moe.router.bias_update_rate: null there, 0.5 now" in error


@pytest.mark.parametrize("text", ['{"arm": "to', "{}", "[]", "7"])
def test_a_damaged_result_is_named(text, tmp_path, capsys):
    out = tmp_path / "out"
    path = out / "seed_0" / "top2.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert sweep(out, seeds=2) == 2
    assert f"{path} is damaged: no result of a run; delete it" in capsys.readouterr().err


def test_an_arm_that_diverges_is_named_and_the_finished_ones_stay(tmp_path, capsys):
    out, arms = tmp_path / "out", {"good": {}, "wild": {"optimizer": {"learning_rate": 1e30}}}
    assert sweep(out, arms=arms, seeds=2) == 5
    error = capsys.readouterr().err
    assert "arm wild, seed 0: " in error and "--arms goes on without this arm" in error
    assert list(kept(out)) == ["seed_0/good"]


def test_one_sweep_at_a_time_may_write(tmp_path, capsys):
    with RunLock(tmp_path / "out"):
        assert sweep(tmp_path / "out") == 2
    assert "is in use by" in capsys.readouterr().err


def test_one_seed_is_refused(tmp_path, capsys):
    assert sweep(tmp_path / "out", seeds=1) == 2
    assert "--seeds (1) must be at least 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_nobody_can_know_before_is_said_to_be_a_bound(whole, tmp_path, capsys):
    arms = {"top2": {}, "varying": {"model": {"moe": {"router": {"name": "top_p"}}}}}
    assert sweep(tmp_path / "out", "--dry-run", arms=arms) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["varying"].count("at most") == 2 and "at most" not in lines["top2"]
    report = report_of(whole)
    assert "at most" not in render_sweep(report)
    report["arms"]["top2"]["is_upper_bound"] = True
    rows = [line for line in render_sweep(report).splitlines() if "at most" in line]
    # K; active parameters and FLOPs.
    assert [row.count("at most") for row in rows] == [1, 2]
    assert all(row.startswith("| top2 |") for row in rows)


def test_a_dry_run_shows_each_arm_and_trains_nothing(tmp_path, capsys):
    assert sweep(tmp_path / "out", "--dry-run") == 0
    page = capsys.readouterr().out
    assert "3 seeds of 3 arms: 9 runs" in page and "against top2" in page
    assert not (tmp_path / "out").exists()


def test_the_printed_configs_are_runs(tmp_path, capsys):
    from train.config import load_config

    assert sweep(tmp_path / "out", "--print-config") == 0
    texts = capsys.readouterr().out.split("--- # ")[1:]
    assert [text.split("\n")[0] for text in texts] == list(ARMS)
    for text in texts:
        path = tmp_path / "arm.yaml"
        path.write_text(text.partition("\n")[2])
        assert load_config(path).num_steps == 4


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/ablations/*.yaml")), ids=lambda path: path.stem
)
def test_a_shipped_sweep_trains(path, tmp_path, capsys):
    changes = {
        "output_dir": str(tmp_path / "out"),
        "data.cache_dir": str(work_dir() / "cache"),
        "data.domains": base_settings(tmp_path)["data"]["domains"],
        "data.max_bytes_per_domain": None,
        "data.validation_tokens": 64,
        "tokenizer.vocab_size": 258,
        "training.steps": 2,
        "training.tokens": None,
        "training.seq_len": 16,
        "training.batch_size": 4,
        "training.micro_batch_size": 2,
        "evaluation.every": 1,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    assert main(["--config", str(path), "--dry-run"]) == 0
    share = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "%" in line]
    # At equal active FLOPs, but for a router's own cost.
    assert all(abs(float(each.rstrip("%"))) < 1.2 for each in share) and share
    assert main(["--config", str(path), "--seeds", "2", *overrides]) == 0
    assert capsys.readouterr().err == ""
    assert report_of(tmp_path / "out")["seeds"] == [0, 1]
