"""Which routers, losses and experts are held to the contracts? Every file of ours, and what the
environment names: `ROUTERS=my_lab.sinkhorn`, likewise LOSSES and EXPERTS, by comma."""

import os
from typing import Any

from moe.variants import load_variant, variant_names


def variant_cases(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of each: its defaults and its EXAMPLES.

    Args: kind: `routers`, `losses` or `experts`.
    """
    own = os.environ.get(kind.upper(), "").split(",")
    names = [*variant_names(kind), *(name.strip() for name in own if name.strip())]
    return [
        (name, settings)
        for name in names
        for settings in ({}, *getattr(load_variant(kind, name), "EXAMPLES", ()))
    ]
