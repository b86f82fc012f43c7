"""SIGTERM and Ctrl-C save the run and end it; a second one ends it at once, and nothing is lost."""

import os
import signal
import time

import pytest
from training_cases import (
    NUM_STEPS,
    Recorder,
    at,
    checkpoint,
    data,
    launcher,
    make_config,
    make_engine,
    micro_batches,
    run,
    send,
    write_config,
)

import train.loop
import train.pretrain
from train.checkpoint import RunLock, verify_checkpoint
from train.loop import Loop, StopRequest
from train.run_directory import REPLACED, SAVING
from train.status import StatusLine
from train.step import train_step

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_a_question_until_the_second_one(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop() and stop.exit_code == 0 and stop.waited() == 0
        send(number)
        assert stop() and stop.exit_code == CODES[number] and 0 <= stop.waited() < 1
        for second in CODES:
            with pytest.raises(SystemExit) as ended:
                send(second)
            assert ended.value.code == CODES[second]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", CODES)
def test_a_signal_saves_within_the_step_and_exits_with_its_code(number, tmp_path, capsys):
    with Recorder(before_step=at(2, number)) as recorder:
        assert run(tmp_path / "run") == CODES[number]
    assert len(recorder.steps) == 3 and checkpoint(tmp_path / "run").step == 3
    printed = capsys.readouterr()
    assert printed.out.endswith("stopped by a signal; saved at step 3: run again to go on\n")
    assert printed.err == ""


def test_a_signal_before_the_first_step_saves_the_beginning(tmp_path, monkeypatch):
    real = Loop.run

    def signalled(loop, position, stop):
        send(signal.SIGTERM)
        return real(loop, position, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", signalled)
        assert run(tmp_path / "run") == 143
    assert checkpoint(tmp_path / "run").step == 0
    with Recorder() as recorder:
        assert run(tmp_path / "run", {"checkpoint.resume": "must"}) == 0
    assert [metrics.step for metrics in recorder.steps] == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize("number", CODES)
def test_a_process_ends_with_the_code(number, tmp_path):
    process = launcher()
    process.start(write_config(tmp_path / "run", {"training.steps": 1000}))
    process.wait_for("step 2/1000")
    process.signal(number)
    began = time.monotonic()
    assert process.wait() == CODES[number], process.output()
    assert time.monotonic() - began < 10
    saved = checkpoint(tmp_path / "run").step
    assert process.output().endswith(f"saved at step {saved}: run again to go on\n")


# ---- long steps


class Clock:
    """A clock that a test moves by hand, in place of the loop's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(train.loop.time, "monotonic", lambda: self.now)


# (seconds a forward pass takes, forward pass in which the signal comes, steps that are done).
# A step has 4 passes: 2 that count, 2 with gradients.
LONG = {
    "a short step is finished": (2.4, 5, 2),
    "the end of a long step is finished": (4.0, 6, 2),
    "the beginning of a long step is not": (4.0, 4, 1),
    "the first step is given ten seconds": (6.0, 0, 0),
    "and finished if that is enough": (4.0, 2, 1),
}


@pytest.mark.parametrize("case", LONG)
def test_a_step_is_finished_if_that_takes_less_than_ten_seconds(case, tmp_path, monkeypatch):
    seconds, when, steps = LONG[case]
    clock = Clock(monkeypatch)

    def before_forward(count: int) -> None:
        clock.now += seconds
        if count == when:
            send(signal.SIGTERM)

    with Recorder(before_forward=before_forward) as recorder:
        assert run(tmp_path / "run", {"evaluation.every": 0}) == 143
    assert len(recorder.steps) == steps == checkpoint(tmp_path / "run").step


def test_a_stop_that_lasts_longer_than_expected_drops_the_step(tmp_path, monkeypatch):
    """The step before took a second; this one hangs on a slow disk, say."""
    clock = Clock(monkeypatch)

    def before_forward(count: int) -> None:
        clock.now += 0.25 if count < 5 else 11.0
        if count == 4:
            send(signal.SIGTERM)

    with Recorder(before_forward=before_forward) as recorder:
        assert run(tmp_path / "run", {"evaluation.every": 0}) == 143
    assert len(recorder.steps) == 1 and recorder.forwards == 6


def test_a_dropped_step_leaves_nothing_behind(tmp_path):
    config = make_config(tmp_path)
    engine = make_engine(config)
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 3

    assert train_step(engine, micro_batches(config), 0, config, stop=stop) is None
    assert len(asked) == 4, "asked before each of the two counting passes and the two others"
    assert all(p.grad is None for p in engine.model.parameters())
    assert not engine.optimizer.state


# ---- other instants


def test_a_signal_during_a_save_lets_it_finish(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(fd: int) -> None:
        calls.append(fd)
        # Within the second save, which has written some of its files.
        if (tmp_path / "run/checkpoints" / f"{SAVING}step_00000004").exists():
            monkeypatch.setattr(os, "fsync", real)
            send(signal.SIGTERM)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(tmp_path / "run", {"checkpoint.every": 2}) == 143
    # Saved once, not again at the same step.
    assert checkpoint(tmp_path / "run").step == 4


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_second_signal_during_a_save_leaves_a_sound_directory(call, tmp_path, monkeypatch):
    real = getattr(os, call)

    def interrupted(*arguments):
        if call == "fsync" or "step_00000004" in str(arguments[0]) or "latest" in str(arguments[1]):
            directory = tmp_path / "run" / "checkpoints"
            if (directory / "step_00000002").exists():
                monkeypatch.setattr(os, call, real)
                send(signal.SIGTERM)
                send(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "run", {"checkpoint.every": 2})
    assert ended.value.code == 143
    monkeypatch.undo()
    directory = tmp_path / "run" / "checkpoints"
    for path in directory.glob("step_*"):
        assert verify_checkpoint(path) == []
    # The lock is free, and the next start clears away what was being written.
    with RunLock(tmp_path / "run"):
        names = {path.name for path in directory.iterdir()}
    assert not [name for name in names if name.startswith((SAVING, REPLACED))]
    assert run(tmp_path / "run", {"checkpoint.every": 2, "checkpoint.resume": "must"}) == 0
    assert checkpoint(tmp_path / "run").step == NUM_STEPS


def test_a_signal_while_the_model_writes_a_sample_saves_the_evaluation(tmp_path, monkeypatch):
    real = train.pretrain.sample_text

    prompts = []

    def signalled(model, tokenizer, prompt, **options):
        prompts.append(prompt)
        send(signal.SIGTERM)
        return real(model, tokenizer, prompt, **options)

    monkeypatch.setattr(train.pretrain, "sample_text", signalled)
    sampling = {"evaluation.sample_prompts": ["moss", "fern"], "evaluation.sample_tokens": 2}
    assert run(tmp_path / "run", sampling) == 143
    assert prompts == ["moss"], "the second prompt is not begun"
    found = checkpoint(tmp_path / "run")
    assert found.step == 3 and found.state["evaluated"] == 3


def test_ctrl_c_before_the_training_is_one_line_and_130(tmp_path, monkeypatch, capsys):
    def prepare(*arguments, **options):
        send(signal.SIGINT)
        # Another thread may take the signal; Python then raises a moment later.
        time.sleep(10)

    monkeypatch.setattr(train.pretrain, "prepare_data", prepare)
    # A shell starts background jobs with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(tmp_path / "run") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nstopped by Ctrl-C; nothing had to be saved\n"


def test_the_loop_asks_before_each_validation_batch(tmp_path):
    config = make_config(tmp_path, {"evaluation.batch_size": 1})
    engine = make_engine(config)
    saved = []
    loop = Loop(engine, data(), config, writer=None, status=StatusLine(), save=saved.append)
    # 2 domains of 128 validation tokens are 16 passes of one sequence of 16 tokens.
    with Recorder(before_forward=at(3 * 4 + 5)) as recorder, StopRequest() as stop:
        position, evaluation = loop.run(train.loop.Position(), stop)
    assert recorder.forwards == 3 * 4 + 6
    assert evaluation is None and position == (3, -1) and saved == [position]
