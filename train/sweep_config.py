"""What are the arms of a sweep? One YAML becomes a `RunConfig` for each of them.

The YAML is an ordinary run's, which all arms share, and what each arm has in its place:

    baseline: top2                  # what the others are compared with; the first arm by default
    arms:
      top2: {}
      switch: {model: {moe: {router: {top_k: 1, normalize: false}}}}
      hash: {model: {moe: {router: {name: hash}, losses: []}}}
      dense: {model: {feed_forward: dense}}

Sections are merged; a list, and a variant that is given its `name`, replace what was there. An arm
with `feed_forward: dense` and no `model.moe` of its own has the width of equal active FLOPs of the
baseline, or where that is dense itself, of what all arms share.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import dense_equivalent
from train.changed_settings import changed_settings
from train.config import (
    ParallelConfig,
    RoutesConfig,
    RunConfig,
    config_from_settings,
    read_settings,
)
from train.config_errors import show
from train.errors import ConfigError

# Of a run; the pairing of arms would be a lie if they differed.
_SAME = {"seed", "output_dir", "data", "tokenizer", "evaluation"}
# The sections in which arms differ; the others change no number.
_DECIDES = {"model", "optimizer", "schedule", "training"}
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Sweep(NamedTuple):
    """arms: the run of each, in the YAML's order; baseline: the name of one; whole: whether that
    is all of them."""

    arms: dict[str, RunConfig]
    baseline: str
    whole: bool

    @property
    def shared(self) -> RunConfig:
        """The baseline's run, for what all arms have in common."""
        return self.arms[self.baseline]


def load_sweep(path: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Sweep:
    """Read a sweep's YAML; overrides hold for all arms and win over what an arm says.

    Args:
        only: names of the arms wanted, all by default; the baseline must be among them.
    Raises:
        ConfigError: with one line for each mistake in any arm, which the line names unless all
            arms have it.
    """
    values, problems = read_settings(Path(path))
    if problems:
        raise ConfigError("\n".join(problems))
    settings, baseline = _split(values, str(path))
    arms: dict[str, RunConfig] = {}
    refused: dict[str, list[str]] = {}
    for name, changes in settings.items():
        try:
            arms[name] = config_from_settings(merge_settings(values, changes), overrides, str(path))
        except ConfigError as error:
            refused[name] = str(error).split("\n")
    for name, config in arms.items():
        if lines := [*_without_effect(config), *_unlike(config, next(iter(arms.values())))]:
            refused[name] = lines
    if refused:
        raise ConfigError("\n".join(_by_arm(refused, len(settings))))
    for name, changes in settings.items():
        model = arms[name].model
        if model.feed_forward == "dense" and "moe" not in (changes.get("model") or {}):
            routed = arms[baseline].model
            if routed.feed_forward == "dense":
                routed = model.model_copy(update={"feed_forward": "moe"})
            model = model.model_copy(update={"moe": dense_equivalent(routed).moe})
            arms[name] = arms[name].model_copy(update={"model": model})
    chosen = _chosen(arms, baseline, only)
    numbers = {name: config.model_dump(include=_DECIDES) for name, config in chosen.items()}
    same = [name for name in chosen if name != baseline and numbers[name] == numbers[baseline]]
    if same:
        raise ConfigError(
            f"arm {same[0]}: its settings are those of the baseline ({baseline}), so every "
            f"difference would be 0; change it, or leave it out"
        )
    return Sweep(chosen, baseline, len(chosen) == len(arms))


def merge_settings(shared: Any, changes: Any) -> Any:
    """`changes` laid over `shared`, both as read from YAML; neither is altered.

    Mappings are merged key by key. A mapping with a `name` replaces, since the settings of another
    variant mean nothing to it; so does anything else. A variant written as its bare name is merged
    as `{name: ...}`.
    """
    if isinstance(shared, str) and isinstance(changes, dict):
        shared = {"name": shared}
    if not isinstance(shared, dict) or not isinstance(changes, dict) or "name" in changes:
        return copy.deepcopy(changes)
    merged = copy.deepcopy(shared)
    for key, value in changes.items():
        merged[key] = merge_settings(shared[key], value) if key in shared else copy.deepcopy(value)
    return merged


def _split(values: dict[str, Any], source: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Take `arms` and `baseline` out of the settings that all arms share."""
    arms, baseline = values.pop("arms", None), values.pop("baseline", None)
    if not isinstance(arms, dict) or len(arms) < 2:
        raise ConfigError(
            f"{source}: arms: got {show(arms)}; needs two arms or more, each a name with the "
            f"settings that it has in place of the shared ones (as configs/ablations have)"
        )
    problems = []
    for name, changes in arms.items():
        if not isinstance(name, str) or not _ARM_NAME.fullmatch(name):
            problems.append(
                f"{source}: arms: got {show(name)}; needs a name of letters, digits, `_`, `.` and "
                f"`-` that begins with a letter or digit, and is text"
            )
        if not isinstance(changes, dict | None):
            problems.append(f"{source}: arms.{name}: got {show(changes)}; needs settings, or {{}}")
    if baseline is not None and baseline not in arms:
        problems.append(
            f"{source}: baseline: got {show(baseline)}; needs one of the arms: "
            f"{', '.join(map(str, arms))}"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return {name: changes or {} for name, changes in arms.items()}, baseline or next(iter(arms))


def _without_effect(config: RunConfig) -> Iterator[str]:
    if not 0 < config.evaluation.every < config.num_steps:
        yield (
            f"evaluation.every ({config.evaluation.every}) must lie between 0 and the run's steps "
            f"({config.num_steps}): speed-up is read off the validation curve"
        )
    for section, default in (("routes", RoutesConfig()), ("parallel", ParallelConfig())):
        if getattr(config, section) != default:
            yield f"{section} has no effect in a sweep, which runs in one process; leave it out"
    if config.deepspeed:
        yield "deepspeed has no effect in a sweep, which runs in one process; leave it out"


def _unlike(config: RunConfig, first: RunConfig) -> Iterator[str]:
    """What must be the same in all arms and is not."""
    reason = "must be the same in all arms, which are compared on the same tokens in one order"
    labels = "in the first arm", "here"
    dumps = [each.model_dump(mode="json", include=_SAME) for each in (first, config)]
    lengths = [
        {
            "training.seq_len": each.training.seq_len,
            "tokens of the run": each.num_steps * each.tokens_per_step,
        }
        for each in (first, config)
    ]
    for pair in (dumps, lengths):
        for line in changed_settings(pair[0], pair[1], labels):
            yield f"{line}; {reason}"


def _by_arm(refused: Mapping[str, list[str]], num_arms: int) -> Iterator[str]:
    """Each line once where all arms have it, else with the arm's name."""
    lines = dict.fromkeys(line for found in refused.values() for line in found)
    for line in lines:
        owners = [name for name, found in refused.items() if line in found]
        if len(owners) == num_arms:
            yield line
        else:
            yield from (f"arm {name}: {line}" for name in owners)


def _chosen(arms: dict[str, RunConfig], baseline: str, only: Sequence[str]) -> dict[str, RunConfig]:
    unknown = [name for name in only if name not in arms]
    if unknown:
        raise ConfigError(f"--arms: no arm {', '.join(unknown)}; there are: {', '.join(arms)}")
    if only and (baseline not in only or len(set(only)) < 2):
        raise ConfigError(
            f"--arms ({','.join(only)}) must name the baseline ({baseline}) and another arm, which "
            f"is compared with it"
        )
    return {name: config for name, config in arms.items() if not only or name in only}
