"""A run that writes to TensorBoard, made once for all test files that ask for it."""

import pytest
from metrics_cases import LOGGED, read
from training_cases import Recorder, run


@pytest.fixture(scope="session")
def logged(tmp_path_factory):
    """A run with a checkpoint at each step, its events and what its steps returned."""
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    saving = {"checkpoint.every": 1, "checkpoint.keep_last": 100}
    with Recorder() as recorder:
        assert run(run_dir, LOGGED | saving) == 0
    return run_dir, read(run_dir), recorder.steps
