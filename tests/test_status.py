"""The status line: one that stays on a terminal, lines in a pipe, and a time left that is right."""

import io

import pytest
import torch

import train.status
from train.status import Status, StatusLine, format_duration, format_line, peak_flops

STATUS = Status(
    step=20,
    num_steps=100,
    lm_loss=3.14159,
    learning_rate=0.0003,
    gradient_norm=1.256,
    tokens_per_second=12345.6,
    mfu=0.4321,
    max_violation=0.257,
    dead_experts=3,
)


class Terminal(io.StringIO):
    """What a terminal is to a program."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that a person sees: a carriage return goes back, and text covers text."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


def test_the_line_has_every_number_with_its_name():
    assert format_line(STATUS, 3725) == (
        "step 20/100 | loss 3.1416 | lr 3.00e-04 | grad 1.26 | 12,346 tok/s | mfu 43.2% | "
        "maxvio 0.26 | dead 3 | left 1h02m"
    )


def test_a_capacity_says_what_it_dropped():
    assert "dead 3 | dropped 2.5% | left" in format_line(STATUS._replace(dropped=0.025), 1)


def test_what_is_not_known_is_not_made_up():
    dense = STATUS._replace(mfu=None, max_violation=None, dead_experts=None)
    assert "mfu n/a | left" in format_line(dense, 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (90000, "25h00m"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_a_narrow_terminal_gets_a_line_that_does_not_wrap(columns, monkeypatch):
    """A terminal replaces one row only: of a line that wraps, the beginning would stay."""
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    status = StatusLine(stream)
    status.begin(0)
    status.show(STATUS)
    (line,) = stream.screen()
    assert len(line) < columns
    assert line.startswith("step 20/100 | loss 3.1416 | ") and " | left " in line
    assert ("tok/s" in line) == (columns > 50) and ("lr 3.00e-04" in line) == (columns > 90)


def test_a_pipe_gets_plain_lines():
    stream = io.StringIO()
    status = StatusLine(stream)
    status.begin(0)
    status.show(STATUS)
    status.message("a message")
    status.show(STATUS._replace(step=21))
    lines = stream.getvalue().splitlines()
    assert [line[:9] for line in lines] == ["step 20/1", "a message", "step 21/1"]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_terminal_has_one_line_and_the_messages_above_it():
    stream = Terminal()
    status = StatusLine(stream)
    status.begin(0)
    status.message("before")
    long = STATUS._replace(tokens_per_second=1e9)
    for shown in (long, STATUS._replace(step=21)):
        status.show(shown)
    status.message("short")
    status.show(STATUS._replace(step=22))
    screen = stream.screen()
    # Nothing of the longer lines is left behind a shorter one.
    assert screen[:2] == ["before", "short"]
    assert len(screen) == 3 and screen[2].startswith("step 22/100 | ")
    assert "1,000,000,000" not in "".join(screen)


def test_a_message_at_the_end_does_not_stand_in_the_status_line():
    stream = Terminal()
    status = StatusLine(stream)
    status.show(STATUS)
    status.message("done")
    assert stream.screen() == ["done", ""]


def test_the_time_left_is_that_of_the_pace_since_the_start_of_this_process(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(train.status.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    status = StatusLine(stream)
    # Resumed at step 10: the ten steps before were another process's.
    status.begin(10)
    now[0] += 30
    status.show(STATUS)
    # An evaluation of 60 s counts: 15 steps in 90 s leave 75 steps in 450 s.
    now[0] += 60
    status.show(STATUS._replace(step=25))
    now[0] += 450
    status.show(STATUS._replace(step=100))
    lefts = [line.rsplit(" left ")[1] for line in stream.getvalue().splitlines()]
    assert lefts == ["4m00s", "7m30s", "0s"]


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_stream_that_fails_does_not_end_the_training(error):
    class Broken(io.StringIO):
        def flush(self):
            raise error

    status = StatusLine(Broken())
    status.show(STATUS)
    status.message("text")


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_the_peak_is_found_by_the_name_of_the_gpu(monkeypatch):
    for name, peak in {
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "Other": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
