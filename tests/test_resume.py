"""A run that was stopped and started again ends in the same bits as one that was not."""

import hashlib
import random
import signal
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from training_cases import (
    EVALUATE_EVERY,
    MIXED,
    NUM_STEPS,
    Recorder,
    at,
    bits,
    checkpoint,
    different,
    launcher,
    noise_from_pytorch,
    run,
    same_steps,
    send,
    work_dir,
    write_config,
)

import train.loop
import train.pretrain
from train.checkpoint import load_checkpoint, save_checkpoint
from train.metrics import StepMetrics
from train.packing import TrainLoader
from train.random_state import get_random_state, seed_all, set_random_state

RUNNING = [
    {"name": "load_balancing", "weight": 0.1, "accumulation": "running"},
    {"name": "router_z_loss"},
]

# The one case in which a random stream counts.
STREAM = "noise of PyTorch's stream"

CASES: dict[str, dict[str, Any]] = {
    STREAM: {},
    "exact counts": {},
    "running counts": {"model.moe.losses": RUNNING},
    "whole batch": {"training.micro_batch_size": 4},
    "recomputed and tied": {
        "training.activation_checkpointing": True,
        "training.micro_batch_size": 1,
        "model.tie_embeddings": True,
    },
    "layers that differ": MIXED,
    "layers that differ, running counts": MIXED | {"model.moe.losses": RUNNING},
    "bfloat16": {"training.precision": "bfloat16", "model.moe.num_dense_layers": 1},
}


class Outcome(NamedTuple):
    steps: list[StepMetrics]
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


@cache
def uninterrupted(case: str) -> Outcome:
    run_dir = work_dir() / f"uninterrupted {case}"
    with Recorder() as recorder:
        assert run(run_dir, CASES[case]) == 0
    assert [metrics.step for metrics in recorder.steps] == list(range(1, NUM_STEPS + 1))
    found = checkpoint(run_dir)
    return Outcome(recorder.steps, found.tensors, found.state)


def check(run_dir: Path, case: str, steps: list[StepMetrics]) -> None:
    """The run's steps and last checkpoint are those of the run that was never stopped."""
    expected = uninterrupted(case)
    found = checkpoint(run_dir)
    assert same_steps(steps, expected.steps)
    assert different(bits(found.tensors), bits(expected.tensors)) == []
    for key in ("step", "evaluated", "precision", "identity"):
        assert found.state[key] == expected.state[key], key


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_at_a_random_step_ends_in_the_same_bits(case, tmp_path, monkeypatch):
    if case == STREAM:
        noise_from_pytorch(monkeypatch)
    stop = random.Random(case).randrange(1, NUM_STEPS)
    with Recorder(before_step=at(stop - 1)) as first:
        assert run(tmp_path / "run", CASES[case]) == 143
    # The step in which the signal came was finished.
    assert [metrics.step for metrics in first.steps] == list(range(1, stop + 1))
    assert checkpoint(tmp_path / "run").step == stop
    with Recorder() as second:
        assert run(tmp_path / "run", CASES[case]) == 0
    check(tmp_path / "run", case, first.steps + second.steps)


@pytest.mark.parametrize("within", ["counting", "first micro-batch", "second micro-batch"])
def test_a_step_dropped_between_micro_batches_is_done_again(within, tmp_path, monkeypatch):
    noise_from_pytorch(monkeypatch)
    # Every step counts as longer than a stop may wait.
    monkeypatch.setattr(train.loop, "FINISH_SECONDS", -1e9)
    # Two passes that count and two with gradients are four forward passes a step.
    forward = 4 * 2 + {"counting": 0, "first micro-batch": 2, "second micro-batch": 3}[within]
    with Recorder(before_forward=at(forward)) as first:
        assert run(tmp_path / "run") == 143
    if within == "second micro-batch":
        # Nothing was left to be dropped: the signal came in the step's last pass.
        assert len(first.steps) == 3
    else:
        assert len(first.steps) == 2 and checkpoint(tmp_path / "run").step == 2
        assert first.forwards == forward + 1, "the stop waited for more passes than needed"
    with Recorder() as second:
        assert run(tmp_path / "run") == 0
    check(tmp_path / "run", STREAM, first.steps + second.steps)


AROUND: dict[str, tuple[Callable[[int], object], Callable[[int], object], int]] = {
    # The last step before the evaluation: it is left to the resumed run.
    "before": (at(EVALUATE_EVERY - 1), lambda count: None, -1),
    # In the evaluation's first forward pass: it is given up.
    "during": (lambda step: None, at(4 * EVALUATE_EVERY), -1),
    # In its last one: it is complete.
    "at its end": (lambda step: None, at(4 * EVALUATE_EVERY + 3), EVALUATE_EVERY),
    # In the first step after it.
    "after": (at(EVALUATE_EVERY), lambda count: None, EVALUATE_EVERY),
}


@pytest.mark.parametrize("where", AROUND)
def test_a_stop_around_an_evaluation_neither_repeats_nor_loses_it(where, tmp_path, capsys):
    before_step, before_forward, evaluated = AROUND[where]
    uninterrupted("exact counts")
    capsys.readouterr()
    with Recorder(before_step, before_forward) as first:
        assert run(tmp_path / "run") == 143
    assert checkpoint(tmp_path / "run").state["evaluated"] == evaluated
    with Recorder() as second:
        assert run(tmp_path / "run") == 0
    check(tmp_path / "run", "exact counts", first.steps + second.steps)
    printed = capsys.readouterr().out
    for step in range(EVALUATE_EVERY, NUM_STEPS + 1, EVALUATE_EVERY):
        assert printed.count(f"step {step}: validation") == 1
    assert printed.count(f"step {NUM_STEPS}: validation") == 1


def test_a_stop_in_the_last_evaluation_leaves_it_to_the_resumed_run(tmp_path, capsys):
    uninterrupted("exact counts")
    capsys.readouterr()
    last_evaluation = 4 * NUM_STEPS + 4 * (NUM_STEPS // EVALUATE_EVERY)
    with Recorder(before_forward=at(last_evaluation)) as first:
        assert run(tmp_path / "run") == 143
    assert len(first.steps) == NUM_STEPS
    assert not (tmp_path / "run" / "summary.json").exists()
    with Recorder() as second:
        assert run(tmp_path / "run") == 0
    assert second.steps == []
    check(tmp_path / "run", "exact counts", first.steps)
    assert capsys.readouterr().out.count(f"step {NUM_STEPS}: validation") == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_is_complete_trains_no_more_and_says_the_same(tmp_path):
    assert run(tmp_path / "run") == 0
    summary = (tmp_path / "run" / "summary.json").read_text()
    before = bits(checkpoint(tmp_path / "run").tensors)
    with Recorder() as again:
        assert run(tmp_path / "run") == 0
    assert again.steps == []
    assert different(bits(checkpoint(tmp_path / "run").tensors), before) == []
    pattern = [line for line in summary.splitlines() if "training_seconds" not in line]
    second = (tmp_path / "run" / "summary.json").read_text().splitlines()
    assert [line for line in second if "training_seconds" not in line] == pattern


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path):
    constant = {"schedule.name": "constant", "evaluation.every": 0}
    with Recorder() as whole:
        assert run(tmp_path / "whole", constant) == 0
    with Recorder() as parts:
        assert run(tmp_path / "parts", constant | {"training.steps": 5}) == 0
        assert run(tmp_path / "parts", constant) == 0
    assert same_steps(parts.steps, whole.steps)
    found, expected = checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole")
    assert different(bits(found.tensors), bits(expected.tensors)) == []


# ---- negative controls: what the tests above would notice


def _lose_random_streams(tensors: dict[str, dict[str, Tensor]], patch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensors["random"]["torch"] = torch.get_rng_state()


def _lose_data_position(tensors: dict[str, dict[str, Tensor]], patch: pytest.MonkeyPatch) -> None:
    real = TrainLoader.batch
    read = [0]

    def batch(loader, first_sequence, num_sequences):
        read[0] += num_sequences
        return real(loader, read[0] - num_sequences, num_sequences)

    patch.setattr(TrainLoader, "batch", batch)


def _lose_bias(tensors: dict[str, dict[str, Tensor]], patch: pytest.MonkeyPatch) -> None:
    biases = [t for name, t in tensors["model"].items() if name.endswith("expert_bias")]
    assert len(biases) == 2 and all(bias.any() for bias in biases)
    for bias in biases:
        bias.zero_()


def _lose_moments(tensors: dict[str, dict[str, Tensor]], patch: pytest.MonkeyPatch) -> None:
    moments = [t for name, t in tensors["optimizer"].items() if name.endswith(":exp_avg")]
    assert len(moments) > 10
    for moment in moments:
        moment.zero_()


def _lose_nothing(tensors: dict[str, dict[str, Tensor]], patch: pytest.MonkeyPatch) -> None:
    """The control of the controls: the way of losing something loses nothing by itself."""


LOSSES = {
    "random streams": _lose_random_streams,
    "data position": _lose_data_position,
    "bias": _lose_bias,
    "moments": _lose_moments,
    "nothing": _lose_nothing,
}


@pytest.mark.parametrize("lost", LOSSES)
def test_losing_any_part_of_the_state_is_noticed(lost, tmp_path, monkeypatch):
    noise_from_pytorch(monkeypatch)
    expected = uninterrupted(STREAM)
    with Recorder(before_step=at(4)) as first:
        assert run(tmp_path / "run") == 143
    real = train.pretrain.restore

    def restore(engine, found, seed):
        LOSSES[lost](found.tensors, monkeypatch)
        return real(engine, found, seed)

    monkeypatch.setattr(train.pretrain, "restore", restore)
    with Recorder() as second:
        assert run(tmp_path / "run") == 0
    changed = different(bits(checkpoint(tmp_path / "run").tensors), bits(expected.tensors))
    weights = [name for name in changed if name.startswith("model/") and "bias" not in name]
    assert bool(weights) == (lost != "nothing")
    assert same_steps(first.steps + second.steps, expected.steps) == (lost == "nothing")


def draw_from_every_stream() -> list[float]:
    # An odd number of normal values leaves one in reserve in Python and NumPy.
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal()]
    return [*map(float, drawn), *torch.rand(3).tolist()]


def test_every_random_stream_goes_on_through_a_checkpoint(tmp_path):
    for seed in (0, 2**63 - 1):
        seed_all(seed)
        start = draw_from_every_stream()
        path = save_checkpoint(tmp_path, 1, {"random": get_random_state()}, {}, keep_last=1)
        expected = [draw_from_every_stream() for _ in range(700)]
        seed_all(seed)
        assert draw_from_every_stream() == start
        seed_all(seed + 1 if seed == 0 else 1)
        assert draw_from_every_stream() != start
        set_random_state(load_checkpoint(path).tensors["random"])
        assert [draw_from_every_stream() for _ in range(700)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_resumes(tmp_path):
    """Not to the bit, as PyTorch's own kernels may add in any order there; but to rounding."""
    cuda = {"training.device": "cuda"}
    with Recorder() as whole:
        assert run(tmp_path / "whole", cuda) == 0
    with Recorder(before_step=at(3)) as first:
        assert run(tmp_path / "parts", cuda) == 143
    with Recorder() as second:
        assert run(tmp_path / "parts", cuda) == 0
    losses = [metrics.lm_loss for metrics in first.steps + second.steps]
    assert losses == pytest.approx([metrics.lm_loss for metrics in whole.steps], rel=1e-4)


# ---- processes that end


def files_of(run_dir: Path) -> dict[str, str]:
    """SHA-256 of each file of tensors of the newest checkpoint."""
    path = checkpoint(run_dir).path
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.glob("*.safetensors")
    }


def test_a_process_ended_by_sigterm_resumes_to_the_same_files(tmp_path):
    many = {"training.steps": 40, "evaluation.every": 15}
    assert run(tmp_path / "whole", many) == 0
    config = write_config(tmp_path / "parts", many)
    process = launcher()
    process.start(config)
    process.wait_for("step 7/40")
    process.signal(signal.SIGTERM)
    assert process.wait() == 143, process.output()
    stopped = checkpoint(tmp_path / "parts").step
    assert 7 <= stopped < 40
    assert f"saved at step {stopped}" in process.output()
    process.start(config, "checkpoint.resume=must")
    assert process.wait() == 0, process.output()
    assert f"resuming at step {stopped}" in process.output()
    assert f"step {stopped}/40" not in process.output()
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def kill_repeatedly(tmp_path: Path, kills: int, seed: int) -> None:
    """Kill -9 a run that saves each step, start it again, ...; it ends as if nothing had been."""
    steps = 6 * kills
    saving = {"training.steps": steps, "evaluation.every": 4, "checkpoint.every": 1}
    assert run(tmp_path / "whole", saving) == 0
    config = write_config(tmp_path / "killed", saving)
    process, draw = launcher(), random.Random(seed)
    killed = newest = 0
    while killed < kills:
        process.start(config)
        target = newest + draw.randrange(2, 5)
        process.wait_for(f"step {min(target, steps)}/{steps}")
        # A step with its save takes some 50 ms.
        time.sleep(draw.uniform(0, 0.08))
        process.signal(signal.SIGKILL)
        code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, process.output()
        killed += 1
        found = checkpoint_or_warnings(tmp_path / "killed")
        # What was printed before the last step has been saved.
        assert found >= target - 1
        newest = found
    assert killed >= kills - 1, "the run ended before it could be killed"
    process.start(config)
    assert process.wait() == 0, process.output()
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def checkpoint_or_warnings(run_dir: Path) -> int:
    """The newest sound step; a kill may have landed between the rename and `latest`."""
    found = train.pretrain.find_checkpoint(run_dir, "must", lambda message: None)
    assert found is not None
    return found.step


def test_kill_9_at_random_instants_always_resumes(tmp_path):
    kill_repeatedly(tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_kill_9_at_random_instants_always_resumes_20_times(tmp_path):
    kill_repeatedly(tmp_path, kills=20, seed=1)


def test_a_second_signal_while_the_step_is_finished_ends_at_once(tmp_path):
    def twice(step: int) -> None:
        if step == 2:
            send(signal.SIGTERM)
            send(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended, Recorder(before_step=twice) as first:
        run(tmp_path / "run")
    assert ended.value.code == 143 and len(first.steps) == 2
    with Recorder() as second:
        assert run(tmp_path / "run") == 0
    check(tmp_path / "run", "exact counts", second.steps)
