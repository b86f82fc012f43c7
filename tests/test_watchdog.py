"""Does a run that stands still end with its stacks and its exit code, and a slow one not?"""

import errno
import json
import subprocess
import sys
import threading

import pytest
from training_cases import ROOT

from train.errors import ConfigError
from train.watchdog import Watchdog, exit_recorded

STALL = """
import sys, threading, time
from pathlib import Path
from train.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 3, 0.4):
    def stands_still():
        time.sleep(60)
    stands_still()
"""


def test_a_stalled_process_ends_with_its_stacks(tmp_path):
    command = [sys.executable, "-c", STALL, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 6
    assert "rank 3 has not moved for training.stall_minutes" in ended.stderr
    assert "stands_still" in (tmp_path / "stacks_rank_3.txt").read_text()
    record = json.loads((tmp_path / "exit_rank_3.json").read_text())
    assert record["exit_code"] == 6
    assert "has not moved" in record["message"]


MOVES = """
import sys, time
from pathlib import Path
from train.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, 3.0) as watchdog:
    for _ in range(40):
        time.sleep(0.1)
        watchdog.beat()
time.sleep(3.5)
"""


def test_a_process_that_moves_is_left_alone(tmp_path):
    """Longer than the limit, and after its watch has ended."""
    command = [sys.executable, "-c", MOVES, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_nothing_is_watched(tmp_path):
    before = threading.active_count()
    with Watchdog(tmp_path, 0, None):
        assert threading.active_count() == before


def test_how_a_rank_ended_is_on_record(tmp_path):
    def record() -> tuple[int, str]:
        found = json.loads((tmp_path / "exit_rank_1.json").read_text())
        return found["exit_code"], found["message"]

    with exit_recorded(tmp_path, 1) as codes:
        codes.append(143)
    assert record() == (143, "")
    with pytest.raises(ConfigError), exit_recorded(tmp_path, 1):
        raise ConfigError("no such thing")
    assert record() == (2, "no such thing")
    with pytest.raises(KeyError), exit_recorded(tmp_path, 1):
        raise KeyError("x")
    assert record() == (1, "KeyError: 'x'")
    with pytest.raises(MemoryError), exit_recorded(tmp_path, 1):
        raise MemoryError("cannot allocate memory")
    assert record()[0] == 8
    with pytest.raises(OSError, match="full"), exit_recorded(tmp_path, 1):
        raise OSError(errno.ENOSPC, "full")
    assert record()[0] == 7
    with pytest.raises(KeyboardInterrupt), exit_recorded(tmp_path, 1):
        raise KeyboardInterrupt
    assert record()[0] == 130
    with exit_recorded(tmp_path, 1):
        # An older record would be taken for this run's.
        assert not (tmp_path / "exit_rank_1.json").exists()
