"""What the tests of configs share: loading a text as a file, and the lines that refuse it."""

from pathlib import Path
from typing import Any

import pytest

from train.config import load_config
from train.errors import ConfigError


def load(text: str, *overrides: str) -> Any:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load_config("x.yaml", overrides)


def errors_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")
