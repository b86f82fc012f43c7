"""Which settings differ between the parts of a run, and which of them must not?"""

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from moe.variants import load_variant
from train.errors import ConfigError


def changed_settings(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    labels: tuple[str, str] = ("in the checkpoint", "now"),
) -> list[str]:
    """One line per field that differs between two nested mappings; tuples count as lists."""
    before, now = dict(_flatten(saved)), dict(_flatten(current))
    lines = []
    for field in dict.fromkeys([*before, *now]):
        if field not in before or field not in now or before[field] != now[field]:
            was, is_now = before.get(field, "not set"), now.get(field, "not set")
            lines.append(f"{field}: {was} {labels[0]}, {is_now} {labels[1]}")
    return lines


def refuse_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another model, other data or another tokenizer.

    Args:
        saved: nested mapping as stored in the checkpoint.
        current: the same of this run; tuples count as lists.
    Raises:
        ConfigError: one line per field that differs, and the way out.
    """
    lines = changed_settings(saved, current)
    if lines:
        raise ConfigError(
            "\n".join(
                [
                    "cannot resume, the checkpoint was made with other settings:",
                    *lines,
                    "go back to the checkpoint's values, or begin anew in another output_dir",
                ]
            )
        )


def with_allowed_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The saved identity of a run with the current numbers that the routers `may_change`.

    Args: saved: of any version of the project, and of variants that may be gone.
    """
    allowed = copy.deepcopy(dict(saved))
    for theirs, ours in zip(_routers(allowed), _routers(current), strict=False):
        if theirs.get("name") != ours.get("name"):
            continue
        for name in load_variant("routers", ours["name"]).Config.may_change if ours else ():
            if None not in (theirs.get(name), ours.get(name)):
                theirs[name] = ours[name]
    return allowed


def _routers(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of the routers of all layers, {} where a layer has none of its own."""
    moe = identity.get("model", {}).get("moe", {})
    return [place.get("router") or {} for place in (moe, *moe.get("layers", ()))]


def _flatten(value: Any, where: str = "") -> Iterable[tuple[str, str]]:
    """(dotted field, JSON text) of each leaf; lists of mappings are entered, other lists whole."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        items = [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    if not items:
        yield where, json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
    for field, item in items:
        yield from _flatten(item, field)
