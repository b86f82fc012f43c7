"""What stands in TensorBoard, read back and computed again another way."""

import errno
import math
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from training_cases import (
    EVALUATE_EVERY,
    NUM_STEPS,
    ROOT,
    Recorder,
    at,
    checkpoint,
    launcher,
    make_config,
    make_engine,
    micro_batches,
    run,
    write_config,
)

import train.pretrain
from train.checkpoint import load_checkpoint
from train.engine import load_model
from train.metrics import WINDOW_STEPS, LoadWindow, MetricsWriter
from train.step import train_step

# Without noise, so that a forward pass of the test chooses what the run chose.
LOGGED = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "model.moe.num_dense_layers": 1,
    "model.num_layers": 3,
    "logging.tensorboard": True,
    "logging.heatmap_every": 4,
    "evaluation.sample_prompts": ["moss"],
    "evaluation.sample_tokens": 3,
}
LAYERS = (1, 2)


def read(run_dir: Path) -> EventAccumulator:
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=dict.fromkeys(kinds, 0))
    return events.Reload()


def values(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Value by step; a step that is there twice is an error."""
    found = events.Scalars(tag)
    steps = [scalar.step for scalar in found]
    assert len(set(steps)) == len(steps), f"{tag} has steps twice: {steps}"
    return {scalar.step: scalar.value for scalar in found}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run with a checkpoint at each step, its events and what its steps returned."""
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    saving = {"checkpoint.every": 1, "checkpoint.keep_last": 100}
    with Recorder() as recorder:
        assert run(run_dir, LOGGED | saving) == 0
    return run_dir, read(run_dir), recorder.steps


def test_the_tags_are_these_and_no_others(logged):
    _, events, _ = logged
    layers = [f"layer{layer:02d}" for layer in LAYERS]
    by_layer = [
        "max_violation",
        "router_entropy",
        "dead_experts",
        "tokens_per_expert_min",
        "tokens_per_expert_max",
        "domain_expert_information",
        "domain_expert_information_shuffled",
    ]
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "loss/lm",
        "loss/load_balancing",
        "loss/router_z_loss",
        "loss_weight/load_balancing",
        "loss_weight/router_z_loss",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "speed/tokens_per_second",
        "validation/mean_loss",
        "validation/prose",
        "validation/sums",
    } | {f"{name}/{layer}" for name in by_layer for layer in layers}
    assert set(tags["images"]) == {"experts/load"} | {f"domains/{layer}" for layer in layers}
    assert set(tags["histograms"]) == {f"load_share/{layer}" for layer in layers}
    assert {"config/text_summary", "samples/text_summary"} <= set(tags["tensors"])


def test_the_readme_explains_each_tag_and_no_other(logged):
    _, events, _ = logged
    section = (ROOT / "README.md").read_text().split("## Read TensorBoard")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    # `name/…` and `name/layer00` stand for all tags below name.
    rows = [
        re.sub(r"/(…|layer00)$", "/", name)
        for cell in cells
        for name in re.findall("`(.*?)`", cell)
    ]
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]]
    tags += [
        tag.removesuffix("/text_summary")
        for tag in events.Tags()["tensors"]
        if not tag.startswith("custom_scalars")
    ]

    def explains(row: str, tag: str) -> bool:
        return tag.startswith(row) if row.endswith("/") else tag == row

    assert [tag for tag in tags if not any(explains(row, tag) for row in rows)] == []
    assert [row for row in rows if not any(explains(row, tag) for tag in tags)] == []


def test_scalars_of_a_step_are_what_the_step_returned(logged):
    _, events, steps = logged
    config = make_config(Path("unused"), LOGGED)
    loss_weights = {loss.name: loss.weight for loss in config.model.moe.losses}
    for metrics in steps:
        for tag, expected in {
            "loss/lm": metrics.lm_loss,
            "optimizer/learning_rate": metrics.learning_rate,
            "optimizer/gradient_norm": metrics.gradient_norm,
            **{f"loss/{name}": value for name, value in metrics.aux_losses.items()},
            **{f"loss_weight/{name}": weight for name, weight in loss_weights.items()},
        }.items():
            assert values(events, tag)[metrics.step] == pytest.approx(expected, rel=1e-6), tag
    assert loss_weights == {"load_balancing": 0.01, "router_z_loss": 0.001}


def test_loads_are_those_of_the_step_computed_again_from_its_checkpoint(logged):
    run_dir, events, _ = logged
    config = make_config(run_dir, LOGGED)
    engine = make_engine(config)
    window = np.zeros((2, 4))
    for step in range(1, NUM_STEPS):
        found = load_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
        load_model(engine.model, found.tensors["model"])
        load, entropies = np.zeros((2, 4), dtype=int), np.zeros(2)
        batches = micro_batches(config, step)
        for batch in batches:
            output = engine(batch)
            for index, routing in enumerate(output.routings):
                for chosen in routing.topk_indices.flatten().tolist():
                    load[index, chosen] += 1
                p = routing.router_probs.detach().double().numpy()
                entropies[index] += -(p * np.log(p)).sum(1).mean() / math.log(4) / len(batches)
        window += load
        assert load.sum(1).tolist() == [4 * 16 * 2] * 2
        for index, layer in enumerate(LAYERS):
            row = load[index].tolist()
            by_hand = {
                "max_violation": max(row) / (sum(row) / 4) - 1,
                "tokens_per_expert_min": min(row),
                "tokens_per_expert_max": max(row),
                "router_entropy": entropies[index],
            }
            for name, expected in by_hand.items():
                found_value = values(events, f"{name}/layer{layer:02d}")[step + 1]
                assert found_value == pytest.approx(expected, rel=1e-4), (name, step)


def test_load_histograms_are_shares_of_the_window(logged):
    _, events, steps = logged
    window = sum(metrics.tokens_per_expert for metrics in steps[:4]).numpy()
    for index, layer in enumerate(LAYERS):
        first = events.Histograms(f"load_share/layer{layer:02d}")[0]
        share = window[index] / window[index].mean()
        assert first.step == 4 and first.histogram_value.num == 4
        assert first.histogram_value.sum == pytest.approx(4)
        assert first.histogram_value.max == pytest.approx(share.max(), rel=1e-6)
        assert first.histogram_value.min == pytest.approx(share.min(), rel=1e-6)


def test_evaluations_pictures_and_texts_are_at_their_steps(logged):
    _, events, _ = logged
    evaluated = [*range(EVALUATE_EVERY, NUM_STEPS + 1, EVALUATE_EVERY), NUM_STEPS]
    for tag in ("validation/mean_loss", "validation/prose", "domain_expert_information/layer01"):
        assert list(values(events, tag)) == evaluated
    mean = values(events, "validation/mean_loss")
    prose, sums = values(events, "validation/prose"), values(events, "validation/sums")
    assert all(mean[s] == pytest.approx((prose[s] + sums[s]) / 2, rel=1e-6) for s in evaluated)
    assert [image.step for image in events.Images("experts/load")] == [4, 8]
    assert [image.step for image in events.Images("domains/layer01")] == evaluated
    assert all(i.encoded_image_string.startswith(b"\x89PNG") for i in events.Images("experts/load"))
    samples = events.Tensors("samples/text_summary")
    assert [sample.step for sample in samples] == evaluated
    assert b"sample: 'moss" in samples[0].tensor_proto.string_val[0]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.02" in config and "hidden_size: 16" in config


def test_dead_experts_are_those_without_a_token_in_the_window():
    window = LoadWindow()
    loads = torch.tensor([[[5, 0, 0, 3]], [[1, 0, 7, 0]]])
    assert (window.add(loads[0]) == 0).sum() == 2
    assert (window.add(loads[1]) == 0).sum() == 1
    for _ in range(WINDOW_STEPS - 1):
        total = window.add(torch.tensor([[2, 0, 0, 2]]))
    # The first step has left the window, the second has not.
    assert total.tolist() == [[1 + 2 * 99, 0, 7, 2 * 99]]
    assert window.add(torch.tensor([[2, 0, 0, 2]])).tolist() == [[200, 0, 0, 200]]


# ---- stopped, killed and resumed


def next_second() -> None:
    """TensorBoard reads the files in the order of the seconds in their names; a start takes more
    than one, but not in a test that has imported everything."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def test_a_resumed_run_has_each_step_once(tmp_path):
    with Recorder(before_step=at(3)) as first:
        assert run(tmp_path / "run", LOGGED) == 143
    next_second()
    with Recorder() as second:
        assert run(tmp_path / "run", LOGGED) == 0
    events = read(tmp_path / "run")
    losses = values(events, "loss/lm")
    steps = first.steps + second.steps
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    assert list(losses.values()) == pytest.approx([m.lm_loss for m in steps], rel=1e-6)
    assert list(values(events, "validation/mean_loss")) == [3, 6, 8]


def test_steps_after_the_last_checkpoint_of_a_killed_run_are_replaced(tmp_path):
    """They are done again, here with another rate: the curve is the second one's, without a gap."""
    steps = {"training.steps": 60, "evaluation.every": 0, "checkpoint.every": 10}
    steps |= {"schedule.name": "constant", "logging.tensorboard": True}
    config = write_config(tmp_path / "run", steps)
    process = launcher()
    process.start(config)
    process.wait_for("step 27/60")
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    next_second()
    saved = checkpoint(tmp_path / "run").step
    before = values(read(tmp_path / "run"), "loss/lm")
    assert 20 <= saved < 60 and set(range(1, saved + 1)) <= set(before), "flushed with each save"
    assert run(tmp_path / "run", steps | {"optimizer.learning_rate": 0.001}) == 0
    events = read(tmp_path / "run")
    assert list(values(events, "loss/lm")) == list(range(1, 61))
    rates = values(events, "optimizer/learning_rate")
    assert all(rates[step] == pytest.approx(0.001) for step in range(saved + 1, 61))
    assert rates[saved] == pytest.approx(0.02)


def test_a_checkpoint_comes_after_its_curves(tmp_path, monkeypatch):
    """A kill right after a save loses nothing that the resumed run does not do again."""
    real_write, real_save, seen = RecordWriter.write, train.pretrain.save_checkpoint, []

    def write(writer, data):
        time.sleep(0.002)
        real_write(writer, data)

    def save(run_dir, step, *arguments, **options):
        seen.append((step, max(values(read(run_dir), "router_entropy/layer02"))))
        return real_save(run_dir, step, *arguments, **options)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(train.pretrain, "save_checkpoint", save)
    assert run(tmp_path / "run", LOGGED | {"checkpoint.every": 2, "evaluation.every": 0}) == 0
    assert seen == [(2, 2), (4, 4), (6, 6), (8, 8)]


# ---- a directory that cannot be written


def a_file_in_its_place(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("")


def test_an_unwritable_directory_is_one_warning(tmp_path, capsys):
    a_file_in_its_place(tmp_path / "run")
    assert run(tmp_path / "run", LOGGED) == 0
    printed = capsys.readouterr()
    assert printed.out.count("warning: TensorBoard: ") == 1 and printed.err == ""
    assert "File exists" in printed.out and "going on without it" in printed.out
    assert checkpoint(tmp_path / "run").step == NUM_STEPS


@pytest.mark.parametrize("writes", [0, 1, 40, 100])
def test_a_disk_that_fills_up_is_one_warning(writes, tmp_path, capsys, monkeypatch):
    real, done = RecordWriter.write, []

    def write(writer, data):
        done.append(None)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer, data)

    hook = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", write)
    with Recorder() as recorder:
        assert run(tmp_path / "run", LOGGED) == 0
    assert len(recorder.steps) == NUM_STEPS and threading.excepthook is hook
    printed = capsys.readouterr()
    assert printed.out.count("warning: TensorBoard: [Errno 28] No space left on device") == 1
    # The writer's own thread would print its traceback.
    assert printed.err == ""


def test_a_directory_that_vanishes_stops_nothing(tmp_path):
    def vanish(step: int) -> None:
        if step == 4:
            shutil.rmtree(tmp_path / "run" / "tensorboard")

    with Recorder(before_step=vanish):
        assert run(tmp_path / "run", LOGGED) == 0


def test_errors_of_other_threads_are_reported_as_ever(tmp_path, capsys):
    config = make_config(tmp_path, LOGGED)
    seen = []
    hook, threading.excepthook = threading.excepthook, seen.append
    try:
        writer = MetricsWriter(tmp_path / "tb", config.model, 0, lambda text: None)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        writer.close()
        assert len(seen) == 1 and threading.excepthook == seen.append
    finally:
        threading.excepthook = hook


def test_the_curves_up_to_a_failure_are_written(tmp_path, monkeypatch):
    def fail(step: int) -> None:
        if step == 5:
            raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"), Recorder(before_step=fail):
        run(tmp_path / "run", LOGGED)
    assert list(values(read(tmp_path / "run"), "loss/lm")) == [1, 2, 3, 4, 5]


def test_metrics_of_a_skipped_step_reach_the_curves(tmp_path):
    config = make_config(tmp_path, {"training.nonfinite": "skip"})
    engine = make_engine(config)
    engine.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    metrics = train_step(engine, micro_batches(config), 0, config)
    writer = MetricsWriter(tmp_path / "tensorboard", config.model, 0, pytest.fail)
    writer.write_step(metrics, 1.0, metrics.tokens_per_expert)
    writer.close()
    events = read(tmp_path)
    assert math.isnan(values(events, "optimizer/gradient_norm")[1])
    assert math.isfinite(values(events, "loss/lm")[1])
