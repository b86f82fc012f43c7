"""Do runs write down which experts their tokens chose, and do other runs take the same ones?"""

import json
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import (
    NUM_STEPS,
    Recorder,
    at,
    bits,
    checkpoint,
    different,
    launcher,
    make_config,
    make_engine,
    micro_batches,
    run,
    same_steps,
    texts,
    work_dir,
    write_config,
)

import train.engine
import train.loop
import train.pretrain
from moe.layer import MoELayer
from moe.model import init_weights
from moe.variants import load_variant
from train.checkpoint import load_checkpoint
from train.engine import PlainEngine, load_model
from train.route_files import Recording, open_recording

# Without noise: what is recorded follows from the weights.
CALM = {"model.moe.router": {"name": "topk", "bias_update_rate": 0.02}}
QUIET = {"evaluation.every": 0}


def recorded(folder: Path) -> np.ndarray:
    """(steps, B, L, S, K) of a recording, as the README says to read it."""
    shape = json.loads((folder / "routes.json").read_text())["shape"]
    return np.fromfile(folder / "routes.bin", "int8").reshape(-1, *shape)


def files(folder: Path) -> list[bytes]:
    """What no layout and no interruption may change."""
    return [(folder / name).read_bytes() for name in ("routes.bin", "checks.bin")]


def record(folder: Path) -> dict[str, Any]:
    return {"routes.record": str(folder)}


def replay(folder: Path) -> dict[str, Any]:
    return {"routes.replay": str(folder)}


@cache
def calm_recording() -> Path:
    """Of a whole run without noise."""
    folder = work_dir() / "calm" / "routes"
    assert run(work_dir() / "calm", CALM | QUIET | record(folder)) == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def calm_recording_first():
    """It is made before any test plants something or counts."""
    calm_recording()


# ---- recording


def test_recorded_routes_are_those_of_the_model_computed_again_at_each_step(tmp_path):
    changes = CALM | QUIET | {"model.num_layers": 3, "model.moe.num_dense_layers": 1}
    saving = {"checkpoint.every": 1, "checkpoint.keep_last": 100}
    assert run(tmp_path / "run", changes | saving | record(tmp_path / "routes")) == 0
    routes = recorded(tmp_path / "routes")
    assert routes.shape == (NUM_STEPS, 4, 2, 16, 2)
    # All four sequences at once, where the run had them in two micro-batches.
    config = make_config(tmp_path / "run", changes | {"training.micro_batch_size": 4})
    engine = make_engine(config)
    for step in range(NUM_STEPS):
        if step:
            found = load_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
            load_model(engine.model, found.tensors["model"])
        (batch,) = micro_batches(config, step)
        biases = [m.router.expert_bias for m in engine.model.modules() if isinstance(m, MoELayer)]
        for layer, routing in enumerate(engine(batch).routings):
            logits = routing.router_logits.detach().double().numpy()
            scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            ranked = np.argsort(-(scores + biases[layer].numpy()), axis=-1)[:, :2]
            ours = routes[step, :, layer].reshape(-1, 2)
            assert np.array_equal(np.sort(ours, -1), np.sort(ranked, -1)), (step, layer)


def test_the_plan_says_how_large_a_recording_will_be(tmp_path, capsys):
    changes = {"training.steps": 20_000, "training.seq_len": 128} | record(tmp_path / "routes")
    assert run(tmp_path / "run", changes, "--dry-run") == 0
    # 20,000 steps of 4 sequences: 2 layers of 128 tokens with 2 experts, and a checksum.
    size = 20_000 * 4 * (2 * 128 * 2 + 4) / 2**20
    assert f"disk recorded routes                  {size:.1f} MiB" in capsys.readouterr().out
    assert not (tmp_path / "routes").exists()


def test_micro_batches_and_recomputation_do_not_change_what_is_recorded(tmp_path):
    """All of the first step; later ones up to rounding, which may tip a choice over."""
    (expected, _) = files(calm_recording())
    first = len(expected) // NUM_STEPS
    for number, changes in enumerate(
        (
            {"training.micro_batch_size": 1},
            {"training.micro_batch_size": 4, "training.activation_checkpointing": True},
        )
    ):
        mine = tmp_path / f"routes{number}"
        assert run(tmp_path / f"run{number}", CALM | QUIET | changes | record(mine)) == 0
        found, _ = files(mine)
        assert found[:first] == expected[:first]
        # And each takes what the other chose.
        again, back = tmp_path / f"again{number}", tmp_path / f"back{number}"
        theirs = changes | replay(calm_recording()) | record(again)
        assert run(tmp_path / f"run_again{number}", CALM | QUIET | theirs) == 0
        assert files(again) == files(calm_recording())
        assert run(tmp_path / f"run_back{number}", CALM | QUIET | replay(mine) | record(back)) == 0
        assert files(back) == files(mine)


def test_a_skipped_step_is_recorded_too(tmp_path, monkeypatch):
    real = PlainEngine.gradient_norm
    norms = []

    def norm(engine):
        norms.append(real(engine))
        return norms[-1] * (torch.nan if len(norms) == 3 else 1)

    monkeypatch.setattr(PlainEngine, "gradient_norm", norm)
    changes = QUIET | {"training.nonfinite": "skip"} | record(tmp_path / "routes")
    with Recorder() as steps:
        assert run(tmp_path / "run", changes) == 0
    assert [metrics.step for metrics in steps.steps if metrics.skipped] == [3]
    counts = [np.bincount(chosen, minlength=4) for chosen in by_layer(tmp_path / "routes", 2)]
    assert np.array_equal(counts, steps.steps[2].tokens_per_expert)


def by_layer(folder: Path, step: int) -> list[np.ndarray]:
    """The assignments of each layer in a step."""
    return [routes.reshape(-1) for routes in recorded(folder)[step].swapaxes(0, 1)]


# ---- replaying


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.micro_batch_size": 1, "training.activation_checkpointing": True},
        {"training.micro_batch_size": 4, "training.precision": "bfloat16"},
        {"model.moe.capacity_factor": 0.7},
        {
            "model.moe.capacity_factor": 0.7,
            "model.moe.drop_priority": "random",
            "model.moe.allow_non_causal": True,
        },
    ],
    ids=["counting passes", "recomputed", "bfloat16", "capacity", "random drops"],
)
def test_a_run_that_replays_itself_is_the_same_to_the_bit(changes, tmp_path, capsys):
    """With noise in the router, whose stream goes on as if it were needed."""
    with Recorder() as first:
        assert run(tmp_path / "first", changes | record(tmp_path / "routes")) == 0
    assert f"recording the routes of all steps in {tmp_path / 'routes'}" in capsys.readouterr().out
    again = replay(tmp_path / "routes") | record(tmp_path / "again")
    with Recorder() as second:
        assert run(tmp_path / "second", changes | again) == 0
    assert f"replaying the routes in {tmp_path / 'routes'}; evaluat" in capsys.readouterr().out
    assert same_steps(first.steps, second.steps)
    found, expected = checkpoint(tmp_path / "second"), checkpoint(tmp_path / "first")
    assert different(bits(found.tensors), bits(expected.tensors)) == []
    assert files(tmp_path / "again") == files(tmp_path / "routes")


@pytest.mark.parametrize("other", ["weights", "width"])
def test_another_model_takes_the_recorded_routes_and_its_routers_learn(
    other, tmp_path, monkeypatch
):
    changes: dict[str, Any] = QUIET | {"optimizer.weight_decay": 0}
    if other == "width":
        changes["model.hidden_size"] = 24
    else:
        monkeypatch.setattr(
            train.engine, "init_weights", lambda model, seed: init_weights(model, seed + 1)
        )
    real_step, gradients = PlainEngine.step, []

    def step(engine, rate, norm):
        routers = [m.router for m in engine.model.modules() if isinstance(m, MoELayer)]
        gradients.extend(float(router.weight.grad.abs().sum()) for router in routers)
        real_step(engine, rate, norm)

    monkeypatch.setattr(PlainEngine, "step", step)
    with Recorder() as free:
        assert run(tmp_path / "free", CALM | changes) == 0
    with Recorder() as bound:
        again = replay(calm_recording()) | record(tmp_path / "again")
        assert run(tmp_path / "bound", CALM | changes | again) == 0
    assert files(tmp_path / "again") == files(calm_recording())
    for number, metrics in enumerate(bound.steps):
        counts = [np.bincount(chosen, minlength=4) for chosen in by_layer(calm_recording(), number)]
        assert np.array_equal(counts, metrics.tokens_per_expert), number
    assert not torch.equal(free.steps[0].tokens_per_expert, bound.steps[0].tokens_per_expert)
    assert len(gradients) == 2 * 2 * NUM_STEPS and min(gradients) > 0


def test_exact_counts_are_those_of_the_replayed_routes(tmp_path, monkeypatch):
    """The passes that only count choose as the others do."""
    totals = []
    real = train.engine.PlainEngine.__call__

    def forward(engine, batch, given=None):
        if given is not None and engine.model.training:
            totals.append(given.tokens_per_expert)
        return real(engine, batch, given)

    monkeypatch.setattr(PlainEngine, "__call__", forward)
    with Recorder() as recorder:
        changes = CALM | QUIET | {"model.hidden_size": 24} | replay(calm_recording())
        assert run(tmp_path / "run", changes) == 0
    assert len(totals) == 2 * NUM_STEPS
    for number, counts in enumerate(totals):
        assert torch.equal(counts, recorder.steps[number // 2].tokens_per_expert)


# ---- stopped, killed and resumed


def test_a_stopped_run_goes_on_with_its_recording(tmp_path, monkeypatch):
    """Stopped between two micro-batches, so that a step is dropped and done again; then resumed
    with a replay of what it would have chosen, which is no part of what a run is."""
    assert run(tmp_path / "whole", record(tmp_path / "expected")) == 0
    monkeypatch.setattr(train.loop, "FINISH_SECONDS", -1e9)
    with Recorder(before_forward=at(4 * 2 + 2)) as first:
        assert run(tmp_path / "parts", record(tmp_path / "routes")) == 143
    assert len(first.steps) == 2 and len(recorded(tmp_path / "routes")) == 2
    again = record(tmp_path / "routes") | replay(tmp_path / "expected")
    assert run(tmp_path / "parts", again) == 0
    assert files(tmp_path / "routes") == files(tmp_path / "expected")
    # A run that is done is only looked at.
    shutil.rmtree(tmp_path / "expected")
    assert run(tmp_path / "parts", again) == 0
    found, expected = checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole")
    assert different(bits(found.tensors), bits(expected.tensors)) == []


def test_a_killed_run_goes_on_with_its_recording(tmp_path):
    many = QUIET | {"training.steps": 60, "checkpoint.every": 10}
    assert run(tmp_path / "whole", many | record(tmp_path / "expected")) == 0
    config = write_config(tmp_path / "parts", many | record(tmp_path / "routes"))
    process = launcher()
    process.start(config)
    process.wait_for("step 27/60")
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(recorded(tmp_path / "routes")) >= 27 > checkpoint(tmp_path / "parts").step
    process.start(config)
    assert process.wait() == 0, process.output()
    assert files(tmp_path / "routes") == files(tmp_path / "expected")


def test_a_checkpoint_comes_after_its_routes(tmp_path, monkeypatch):
    """They are on the disk by then: a machine that goes down loses none that are not done again."""
    real_sync, real_save, events = Recording.sync, train.pretrain.save_checkpoint, []

    def sync(recording):
        real_sync(recording)
        events.append(("synced", len(recorded(recording.folder))))

    def save(run_dir, step, *arguments, **options):
        events.append(("saved", step))
        return real_save(run_dir, step, *arguments, **options)

    monkeypatch.setattr(Recording, "sync", sync)
    monkeypatch.setattr(train.pretrain, "save_checkpoint", save)
    changes = QUIET | {"checkpoint.every": 5} | record(tmp_path / "routes")
    assert run(tmp_path / "run", changes) == 0
    assert events == [("synced", 5), ("saved", 5), ("synced", 8), ("saved", 8)]


def test_what_comes_after_the_checkpoint_of_a_run_is_forgotten(tmp_path):
    """It may go another way from there, and end before."""
    changes = QUIET | record(tmp_path / "routes")
    assert run(tmp_path / "run", changes | {"checkpoint.every": 3, "checkpoint.keep_last": 3}) == 0
    before = recorded(tmp_path / "routes")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{NUM_STEPS:08d}")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000003\n")
    other_way = {"training.steps": 5, "optimizer.learning_rate": 0.5, "schedule.warmup_steps": 0}
    assert run(tmp_path / "run", changes | other_way) == 0
    after = recorded(tmp_path / "routes")
    assert len(after) == 5 and np.array_equal(after[:4], before[:4])
    assert json.loads((tmp_path / "routes" / "routes.json").read_text())["num_steps"] == 5


def test_a_recording_that_begins_late_says_so_and_serves_a_run_from_there(tmp_path, capsys):
    with Recorder(before_step=at(2)):
        assert run(tmp_path / "run", QUIET) == 143
    assert run(tmp_path / "run", QUIET | record(tmp_path / "routes")) == 0
    note = f"{tmp_path / 'routes'} will not have the routes of step 1, which was not recorded"
    assert note in capsys.readouterr().out
    checks = np.fromfile(tmp_path / "routes" / "checks.bin", "<u4").reshape(NUM_STEPS, 4)
    assert (checks == 0).all(1).tolist() == [True] * 3 + [False] * 5
    assert run(tmp_path / "new", QUIET | replay(tmp_path / "routes")) == 2
    assert "lacks the routes of step 1, and this run needs those of" in capsys.readouterr().err
    with Recorder(before_step=at(2)):
        assert run(tmp_path / "late", QUIET) == 143
    with Recorder() as second:
        assert run(tmp_path / "late", QUIET | replay(tmp_path / "routes")) == 0
    assert len(second.steps) == 5


# ---- what is refused


@pytest.fixture
def noted(capsys):
    """The one line that a refused run printed."""

    def line() -> str:
        return capsys.readouterr().err.removeprefix("error: ").rstrip("\n")

    return line


def other_text(tmp_path: Path) -> dict[str, Any]:
    return {"data.domains": [{"name": "prose", "files": str(texts() / "sums_*.txt")}]}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed: 0 in the recording, 1 now"),
        ({"training.seq_len": 8}, "training.seq_len: 16 in the recording, 8 now"),
        ({"training.batch_size": 8}, "training.batch_size: 4 in the recording, 8 now"),
        ({"model.num_layers": 3}, "model.layers: [0, 1] in the recording, [0, 1, 2] now"),
        ({"model.moe.num_experts": 8}, "model.num_experts: 4 in the recording, 8 now"),
        (
            {"model.moe.router": {"name": "topk", "top_k": 3}},
            "model.top_k: 2 in the recording, 3 now",
        ),
        (
            {"model.moe.num_experts": 3, "model.moe.num_copy_experts": 1},
            "model.num_copy_experts: not set in the recording, 1 now",
        ),
        ({"data.domains.0.weight": 3}, "data.weights: [0.5, 0.5] in the recording, [0.75, 0.25]"),
        (other_text, 'data.domains: ["prose", "sums"] in the recording, ["prose"] now'),
    ],
)
def test_routes_of_other_tokens_or_experts_are_refused(changes, line, tmp_path, noted):
    changes = changes(tmp_path) if callable(changes) else changes
    changes = CALM | changes | replay(calm_recording())
    with Recorder() as recorder:
        assert run(tmp_path / "run", changes) == 2
    told = noted()
    assert told.startswith(f"routes.replay ({calm_recording()}) does not fit this run:\n")
    assert line in told and told.endswith("or record again with these")
    assert recorder.forwards == 0 and not (tmp_path / "run" / "config.yaml").exists()


def test_routes_that_do_not_reach_to_the_end_are_refused(tmp_path, noted):
    longer = CALM | {"training.steps": NUM_STEPS + 2} | replay(calm_recording())
    assert run(tmp_path / "run", longer) == 2
    assert noted() == (
        f"routes.replay ({calm_recording()}) lacks the routes of step 9, and this run needs those "
        f"of steps 1 to 10; record on, or take fewer training.steps"
    )


DENSE = {"model.feed_forward": "dense", "model.moe": ...}


@pytest.mark.parametrize("name", ["record", "replay"])
def test_a_dense_model_has_no_routes(name, tmp_path, noted):
    assert run(tmp_path / "run", DENSE | {f"routes.{name}": "somewhere"}) == 2
    assert noted() == (
        f"routes.{name} (somewhere) has no effect without routed experts (model.feed_forward: "
        f"dense); leave it out"
    )
    assert run(tmp_path / "run", DENSE | {f"routes.{name}": "somewhere"}, "--dry-run") == 2


def test_a_router_that_cannot_replay_is_refused_before_the_data(tmp_path, noted, monkeypatch):
    monkeypatch.setattr(load_variant("routers", "topk").Router, "replays", False)
    assert run(tmp_path / "run", replay(tmp_path)) == 2
    assert "model.moe.router.name (topk) cannot take routes" in noted()
    assert run(tmp_path / "run", record(tmp_path / "routes")) == 0


def test_one_folder_is_not_recorded_and_replayed(tmp_path, noted):
    (tmp_path / "link").symlink_to(calm_recording())
    assert run(tmp_path / "run", record(tmp_path / "link") | replay(calm_recording())) == 2
    assert "must be two folders; a run cannot write over what it replays" in noted()


def test_a_folder_with_another_runs_routes_is_not_recorded_in(tmp_path, noted):
    """Also of one that differs in nothing but a rate, as many do that share a YAML."""
    before = files(calm_recording())
    faster = CALM | QUIET | {"optimizer.learning_rate": 0.1, "model.hidden_size": 24}
    assert run(tmp_path / "run", faster | record(calm_recording())) == 2
    told = noted().splitlines()
    assert told[0] == f"routes.record ({calm_recording()}) holds the routes of another run:"
    assert told[1] == f'output_dir: "{work_dir() / "calm"}" in the recording, "{tmp_path}/run" now'
    assert told[2] == "model.hidden_size: 16 in the recording, 24 now"
    assert files(calm_recording()) == before


def test_a_place_that_is_no_folder_is_refused_before_training(tmp_path, noted):
    (tmp_path / "file").touch()
    with Recorder() as recorder:
        assert run(tmp_path / "run", record(tmp_path / "file" / "routes")) == 2
    assert noted().endswith("move it away, or choose a routes.record that can be written")
    assert run(tmp_path / "run", replay(tmp_path / "file")) == 2
    assert noted().startswith(f"routes.replay ({tmp_path / 'file'}) holds no recording of routes")
    assert recorder.forwards == 0


def cut(name: str, size: int) -> Any:
    def spoil(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return spoil


def edit(old: str, new: str) -> Any:
    def spoil(folder: Path) -> None:
        text = (folder / "routes.json").read_text()
        assert old in text
        (folder / "routes.json").write_text(text.replace(old, new))

    return spoil


def flip(folder: Path) -> None:
    """One choice of step 3, to another expert."""
    data = bytearray((folder / "routes.bin").read_bytes())
    data[2 * len(data) // NUM_STEPS + 5] ^= 1
    (folder / "routes.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "code", "line", "steps"),
    [
        (cut("routes.bin", 2000), 3, "routes.bin is cut off: its first 8 steps take 2,048", 0),
        (cut("checks.bin", 103), 2, "lacks the routes of step 7, and this run needs", 0),
        (lambda folder: (folder / "routes.bin").unlink(), 3, "routes.bin cannot be read: No s", 0),
        (lambda folder: (folder / "checks.bin").unlink(), 3, "checks.bin cannot be read: No s", 0),
        (cut("routes.json", 100), 3, "routes.json is no header of a recording (the text: In", 0),
        (edit('"int8"', '"float"'), 3, "is no header of a recording (dtype: Input should be", 0),
        (edit('"format": 1', '"format": 2'), 2, "format 2 is not 1, the one that this version", 0),
        (flip, 3, "routes.bin: the routes of step 3 are damaged or missing", 2),
    ],
    ids=[
        "cut routes",
        "cut checks",
        "no routes",
        "no checks",
        "cut header",
        "wrong header",
        "other format",
        "another choice",
    ],
)
def test_a_spoilt_recording_is_one_clear_line(spoil, code, line, steps, tmp_path, noted):
    shutil.copytree(calm_recording(), tmp_path / "routes")
    spoil(tmp_path / "routes")
    with Recorder() as recorder:
        assert run(tmp_path / "run", CALM | QUIET | replay(tmp_path / "routes")) == code
    told = noted()
    assert line in told and str(tmp_path / "routes") in told and "\n" not in told
    assert len(recorder.steps) == steps


def test_a_full_disk_ends_with_7_and_the_run_goes_on_where_there_is_space(
    small_disk, tmp_path, noted
):
    changes = QUIET | {"checkpoint.every": 2, "training.seq_len": 256}
    assert run(tmp_path / "whole", changes | record(tmp_path / "expected")) == 0
    filler = small_disk / "filler"

    def fill(step: int) -> None:
        if step == 5:
            with pytest.raises(OSError, match="No space"), filler.open("wb", 0) as file:
                while True:
                    file.write(b"\0" * 4096)

    with Recorder(before_step=fill) as recorder:
        assert run(tmp_path / "run", changes | record(small_disk / "routes")) == 7
    told = noted()
    assert f"{small_disk / 'routes' / 'routes.bin'}: No space left on device" in told
    assert "free some space or choose another routes.record" in told
    assert len(recorder.steps) == 6 and checkpoint(tmp_path / "run").step == 4
    filler.unlink()
    assert run(tmp_path / "run", changes | record(small_disk / "routes")) == 0
    assert files(small_disk / "routes") == files(tmp_path / "expected")


def test_a_recording_that_names_experts_which_there_are_not_is_refused(tmp_path, noted):
    folder = shutil.copytree(calm_recording(), tmp_path / "foreign")
    recording = open_recording(folder, "routes.replay")
    share = recording.read(0, 0, 4).copy()
    share[0, 0, 0, 0] = 99
    recording.write(0, 0, share)
    assert run(tmp_path / "run", CALM | replay(folder)) == 3
    assert (
        "step 1, layer 0, names experts from 0 to 99, must be -1 (none) to 3; record again"
        in noted()
    )
