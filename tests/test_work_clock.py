"""Does the clock count a rank's own work, and neither its waiting nor the work of another step?"""

import contextlib

import pytest

from train.work_clock import WorkClock


class Time:
    """A clock that a test turns."""

    def __init__(self, monkeypatch):
        self.now = 10.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    return Time(monkeypatch)


def test_work_less_the_waiting_in_it(time):
    clock = WorkClock("cpu")
    assert clock.seconds() == 0
    with clock.working():
        time.passes(1)
    time.passes(100)
    with clock.working():
        time.passes(2)
        with clock.waiting():
            time.passes(30)
        time.passes(4)
    # Waiting for others between the sections is no part of them.
    with clock.waiting():
        time.passes(50)
    assert clock.seconds() == 0, "of a step that has ended"
    clock.next_step()
    assert clock.seconds() == pytest.approx(7)
    with clock.working():
        time.passes(9)
    assert clock.seconds() == pytest.approx(7)
    clock.next_step()
    assert clock.seconds() == pytest.approx(9)
    clock.next_step()
    assert clock.seconds() == 0


def test_a_section_that_fails_is_closed(time):
    clock = WorkClock("cpu")
    with contextlib.suppress(ValueError), clock.working(), clock.waiting():
        time.passes(1)
        raise ValueError
    with clock.waiting():
        time.passes(5)
    with clock.working():
        time.passes(3)
    clock.next_step()
    assert clock.seconds() == pytest.approx(3)
