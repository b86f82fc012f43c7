"""What the tests of `train.analyze` share: a short run, and its analysis as JSON values."""

import json
from pathlib import Path
from typing import Any

from train.analyze import main

TOKENS = 320
SAVED = {
    "training.steps": 40,
    "evaluation.every": 0,
    "checkpoint.every": 25,
    "data.validation_tokens": TOKENS,
    "evaluation.batch_size": 32,
    "logging.every": 20,
    "training.batch_size": 8,
}
ABLATION_TOKENS = 128
DOMAINS = ("prose", "sums")
LAYERS, EXPERTS, K = 2, 4, 2


def analyze(run_dir: Path, output: Path, *arguments: object) -> dict[str, Any]:
    assert main([str(run_dir), "--output", str(output), *map(str, arguments)]) == 0
    return json.loads((output / "analysis.json").read_text())
