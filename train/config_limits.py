"""Which values can no run mean, however the sections of its config are typed?"""

from collections.abc import Iterator
from typing import Any

from train.config_errors import SettingPath, dotted, show

# Counts and indices are 32 bits in the kernels; tokens and bytes of a whole run are 64.
MAX_COUNT, MAX_TOTAL = 2**31 - 1, 2**63 - 1
_TOTALS = {"seed", "training.tokens", "data.max_bytes_per_domain"}
MAX_LAYERS = 10_000
# Float32, as far as it has full precision.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127 * (2 - 2.0**-23)


def out_of_range(values: Any, path: SettingPath = ()) -> Iterator[str]:
    """A line for each count that does not fit, each number that float32 cannot hold, and each text
    that can be no file name and no UTF-8.

    Args: values: validated settings, as `model_dump` gives them.
    """
    name = dotted(path)
    if name == "deepspeed":
        # Its numbers have limits of their own.
        return
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from out_of_range(value, (*path, key))
    elif isinstance(values, int):
        most = MAX_TOTAL if name in _TOTALS else MAX_COUNT
        if values > most:
            yield f"{name} ({show(values)}) must be at most {most:,}"
    elif isinstance(values, float):
        if values and not _SMALLEST <= abs(values) <= _LARGEST:
            yield (
                f"{name} ({values}) is beyond float32, in which training computes; take 0 or a "
                f"number within {_SMALLEST:.2g} and {_LARGEST:.2g}"
            )
    elif isinstance(values, str):
        # What the model goes on from may hold anything; every other text names something.
        nul = "\0" in values and not name.startswith("evaluation.sample_prompts")
        if nul or any("\ud800" <= character <= "\udfff" for character in values):
            yield f"{name} ({show(values)}) must be UTF-8 text without NUL characters; correct it"
