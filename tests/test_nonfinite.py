"""A loss or gradient of inf or NaN never reaches weights, moments or router biases."""

import math
import signal
from pathlib import Path

import pytest
import torch
from training_cases import (
    Recorder,
    at,
    bits,
    checkpoint,
    different,
    make_config,
    make_engine,
    micro_batches,
    noise_from_pytorch,
    run,
    same_steps,
)

import train.loop
from train.engine import PlainEngine
from train.errors import NonFiniteError
from train.random_state import get_random_state
from train.step import train_step

# Without jitter, where a test asks that a weight is not even touched by noise.
CALM = {"model.moe.router": {"name": "topk", "bias_update_rate": 0.02}}


@pytest.fixture(autouse=True)
def _stream(monkeypatch):
    """A step that is refused must put PyTorch's stream back."""
    noise_from_pytorch(monkeypatch)


def state(engine: PlainEngine) -> dict[str, bytes]:
    return bits({**engine.state_tensors(), "random": get_random_state()})


def trained_engine(tmp_path: Path, changes: dict) -> tuple[PlainEngine, object]:
    """An engine after one good step, so that it has moments and biases to spoil."""
    config = make_config(tmp_path, changes)
    engine = make_engine(config)
    train_step(engine, micro_batches(config, 0), 0, config)
    return engine, config


PLANTED = {
    "router": (
        "blocks.1.feed_forward.router.weight",
        r"step 2: the router logits of layer 1 are not finite: the weight "
        r"blocks\.1\.feed_forward\.router\.weight holds inf or NaN",
    ),
    "last expert": (
        "blocks.1.feed_forward.experts.w2",
        r"step 2: the loss is not finite, though every router's logits are: the weight "
        r"blocks\.1\.feed_forward\.experts\.0\.w2 holds",
    ),
    # The next router is the first thing that notices; the message names the cause all the same.
    "first expert": (
        "blocks.0.feed_forward.experts.w1",
        r"step 2: the router logits of layer 1 are not finite: the weight "
        r"blocks\.0\.feed_forward\.experts\.0\.w1 holds",
    ),
    "attention": (
        "blocks.0.attention.wv.weight",
        r"step 2: the router logits of layer 0 are not finite: the weight "
        r"blocks\.0\.attention\.wv\.weight holds",
    ),
    "head": (
        "head.weight",
        r"step 2: the loss is not finite, though every router's logits are: the weight "
        r"head\.weight holds",
    ),
}


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", PLANTED)
def test_a_planted_value_is_named_and_changes_nothing(place, value, policy, tmp_path):
    engine, config = trained_engine(tmp_path, CALM | {"training.nonfinite": policy})
    name, message = PLANTED[place]
    # The first row, so that every token passes it in a router; expert 0 gets some of 64 tokens.
    dict(engine.model.named_parameters())[name].data.view(-1)[0] = value
    before = state(engine)
    with pytest.raises(NonFiniteError, match=message) as error:
        train_step(engine, micro_batches(config, 1), 1, config)
    assert "\n" not in str(error.value) and error.value.exit_code == 5
    assert different(state(engine), before) == []
    assert all(p.grad is None for p in engine.model.parameters())


def spoil_gradient(engine: PlainEngine, name: str, value: float) -> None:
    """Plant a value in the first element of a weight's gradient, from now on."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    dict(engine.model.named_parameters())[name].register_hook(hook)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["blocks.0.feed_forward.experts.w3", "embedding.weight"])
def test_a_gradient_that_is_not_finite_is_named(name, value, tmp_path):
    engine, config = trained_engine(tmp_path, {})
    spoil_gradient(engine, name, value)
    before = state(engine)
    expected = name.replace("experts.w3", "experts.0.w3")
    with pytest.raises(
        NonFiniteError, match=f"step 2: the gradient is not finite, first in {expected};"
    ):
        train_step(engine, micro_batches(config, 1), 1, config)
    assert different(state(engine), before) == []


def test_the_gradient_that_is_named_is_the_one_nearest_to_the_loss(tmp_path):
    engine, config = trained_engine(tmp_path, {})
    for name in (
        "blocks.1.attention.wq.weight",
        "embedding.weight",
        "blocks.0.attention.wo.weight",
    ):
        spoil_gradient(engine, name, math.nan)
    with pytest.raises(NonFiniteError, match=r"first in blocks\.1\.attention\.wq\.weight;"):
        train_step(engine, micro_batches(config, 1), 1, config)


def test_a_skipped_step_changes_nothing_and_the_next_one_goes_on(tmp_path):
    engine, config = trained_engine(tmp_path, {"training.nonfinite": "skip"})
    before = state(engine)
    parameter = engine.model.head.weight
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    skipped = train_step(engine, micro_batches(config, 1), 1, config)
    assert skipped.skipped and not math.isfinite(skipped.gradient_norm)
    assert different(state(engine), before) == []
    handle.remove()
    good = train_step(engine, micro_batches(config, 2), 2, config)
    assert not good.skipped and math.isfinite(good.gradient_norm)
    changed = different(state(engine), before)
    assert {"model/head.weight", "optimizer/head.weight:exp_avg"} <= set(changed)


def test_overflow_of_the_sum_of_squares_is_caught(tmp_path):
    """Each gradient is finite, their norm is not: the update would divide by inf."""
    engine, config = trained_engine(tmp_path, {"training.micro_batch_size": 4})
    engine.model.head.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    before = state(engine)
    with pytest.raises(NonFiniteError, match="first in their sum over all parameters"):
        train_step(engine, micro_batches(config, 1), 1, config)
    assert different(state(engine), before) == []


def test_debug_names_the_token(tmp_path):
    engine, config = trained_engine(tmp_path, {"training.debug": True})

    def spoil(module, arguments):
        x, context = arguments
        return x.index_fill(0, torch.tensor([5, 9]), math.nan), context

    engine.model.blocks[1].feed_forward.register_forward_pre_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"layer 1 are not finite, first at token 5 of"):
        train_step(engine, micro_batches(config, 1), 1, config)


# ---- through the program


@pytest.fixture
def spoiled(monkeypatch):
    """A set of steps, counted from 0, in which the head's gradients become NaN, in every run."""
    steps: set[int] = set()
    real = train.loop.train_step

    def step(engine, batches, number, config, **kwargs):
        if number not in steps:
            return real(engine, batches, number, config, **kwargs)
        handle = engine.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
        try:
            return real(engine, batches, number, config, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(train.loop, "train_step", step)
    return steps


@pytest.mark.parametrize("log_every", [1, 100])
def test_the_program_stops_with_5_on_log_steps_and_others(log_every, tmp_path, spoiled, capsys):
    spoiled.add(4)
    saving = {"checkpoint.every": 3, "logging.every": log_every}
    assert run(tmp_path / "run", saving) == 5
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: step 5: the gradient is not finite, first in head.weight; the")
    assert ("step 4/8" in printed.out) == (log_every == 1)
    # The last checkpoint is the one before, as it was, and a run without the fault goes on from it.
    assert checkpoint(tmp_path / "run").step == 3
    spoiled.clear()
    with Recorder() as rest:
        assert run(tmp_path / "run", saving) == 0
    assert [metrics.step for metrics in rest.steps] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("log_every", [1, 100])
def test_the_program_skips_and_says_so(log_every, tmp_path, spoiled, capsys):
    spoiled.update((3, 4))
    changes = {"training.nonfinite": "skip", "logging.every": log_every}
    with Recorder() as recorder:
        assert run(tmp_path / "run", changes) == 0
    assert [metrics.step for metrics in recorder.steps if metrics.skipped] == [4, 5]
    printed = capsys.readouterr().out
    for step in (4, 5):
        assert f"step {step} skipped: loss or gradient was not finite; weights unchanged" in printed
    assert "step 6 skipped" not in printed
    moments = checkpoint(tmp_path / "run").tensors["optimizer"]
    assert moments["head.weight:step"].item() == 6


def test_a_run_with_skipped_steps_resumes_to_the_same_bits(tmp_path, spoiled):
    spoiled.update((3, 4))
    changes = {"training.nonfinite": "skip"}
    with Recorder() as whole:
        assert run(tmp_path / "whole", changes) == 0
    with Recorder(before_step=at(3, signal.SIGTERM)) as first:
        assert run(tmp_path / "parts", changes) == 143
    with Recorder() as second:
        assert run(tmp_path / "parts", changes) == 0
    assert same_steps(first.steps + second.steps, whole.steps)
    found, expected = checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole")
    assert different(bits(found.tensors), bits(expected.tensors)) == []


def test_weights_that_overflow_end_the_run_under_either_policy(tmp_path, capsys):
    """A rate so high that the update itself is inf: no later step could be good."""
    changes = {"optimizer.learning_rate": 3e38, "training.nonfinite": "skip"}
    assert run(tmp_path / "run", changes | {"schedule.name": "constant"}) == 5
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "holds inf or NaN; go back to an older checkpoint with a lower" in line
