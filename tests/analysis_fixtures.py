"""A short run and its analysis, made once for all test files that ask for them."""

import json
from pathlib import Path
from typing import Any

import pytest
from analysis_cases import ABLATION_TOKENS, SAVED, analyze
from training_cases import run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("analyze") / "run"
    assert run(path, SAVED) == 0
    return path


@pytest.fixture(scope="session")
def output(run_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("output") / "new"
    analyze(run_dir, path, "--against", 25, "--ablation-tokens", ABLATION_TOKENS)
    return path


@pytest.fixture(scope="session")
def analysis(output) -> dict[str, Any]:
    return json.loads((output / "analysis.json").read_text())
