"""Which experts did the tokens of a run choose, and how does another run take the same ones?

`routes.record` writes the chosen experts of every optimizer step to a folder (`train.route_files`);
`routes.replay` gives those of another run to the routers in place of their own choice, in the
passes that only count too. Weights are computed as ever, so routers learn. Evaluation, samples and
generation choose freely.

    python -m train.routes A B     how far two recordings agree, by layer
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.measures import route_overlap
from moe.routing import Routing, stack_layers
from moe.variants import load_variant
from moe.zero_computation import ZERO_COMPUTATION_KINDS
from train.changed_settings import changed_settings, with_allowed_changes
from train.config import RoutesConfig, RunConfig
from train.errors import ConfigError, DataError
from train.packing import Batch
from train.program import guarded
from train.ranks import Ranks
from train.route_files import (
    CHECK_BYTES,
    SETTING,
    Header,
    Recording,
    find_recording,
    index_dtype,
    open_recording,
)
from train.run_directory import check_directory, format_bytes

# Comparisons of an expert with an expert that are held in memory, a byte each.
_COMPARED = 1 << 26
_LABELS = "in the recording", "now"


class RunRoutes:
    """What a run records and replays; nothing by default.

    Args:
        target: what this run writes. source: what it replays. ranks: this process among all; None
            for the only one.
    """

    def __init__(
        self,
        target: Recording | None = None,
        source: Recording | None = None,
        ranks: Ranks | None = None,
    ):
        self.target, self.source = target, source
        self._rank = 0 if ranks is None else ranks.rank

    def replay(self, step: int, batches: list[Batch]) -> list[Batch]:
        """This rank's micro-batches of a step, with the routes to take where there are any.

        Raises:
            DataError: if the recording is damaged there.
        """
        if self.source is None:
            return batches
        sizes = [len(batch.input_ids) for batch in batches]
        share = self.source.read(step, self._rank * sum(sizes), sum(sizes))
        experts = self.source.header.routes["model"]
        limits = np.broadcast_to(experts["num_experts"], len(experts["layers"]))
        for layer, chosen, limit in zip(
            experts["layers"], share.swapaxes(0, 1), limits, strict=True
        ):
            if chosen.size and not -1 <= chosen.min() <= chosen.max() < limit:
                raise DataError(
                    f"{self.source.folder}: step {step + 1}, layer {layer}, names experts from "
                    f"{chosen.min()} to {chosen.max()}, must be -1 (none) to {limit - 1}; record "
                    f"again"
                )
        parts = torch.from_numpy(share).transpose(0, 1).split(sizes, dim=1)  # (L, B, S, K) each
        return [batch._replace(routes=part) for batch, part in zip(batches, parts, strict=True)]

    def collector(self, chosen: list[Tensor]) -> Callable[[tuple[Routing, ...]], None]:
        """What a step calls with the routings of each pass: their routes, (B, L, S, K) on the
        device, are added to `chosen`; nothing is where nothing is recorded."""
        if self.target is None:
            return lambda routings: None
        _, num_layers, seq_len, top_k = self.target.header.shape
        dtype = getattr(torch, self.target.header.dtype)

        def collect(routings: tuple[Routing, ...]) -> None:
            indices = stack_layers([routing.chosen_indices for routing in routings])  # (L, T, K)
            by_sequence = indices.to(dtype).view(num_layers, -1, seq_len, top_k)  # (L, B, S, K)
            chosen.append(by_sequence.transpose(0, 1))

        return collect

    def record(self, step: int, chosen: list[Tensor]) -> None:
        """Write this rank's share of a step, as collected from its passes.

        Raises:
            NoSpaceError, ConfigError: if it cannot be written.
        """
        if self.target is not None:
            # One copy from the device for all layers and passes.
            share = torch.cat(chosen).cpu().numpy()
            self.target.write(step, self._rank * len(share), share)

    def describe(self, start: int, stop: int) -> list[str]:
        """Lines for a person about the steps from `start` to before `stop`."""
        lines = []
        if self.target is not None:
            size = format_bytes(_bytes_of(self.target.header, stop))
            lines.append(f"recording the routes of all steps in {self.target.folder} ({size})")
            if start and (missing := self.target.first_missing(0, start)) is not None:
                lines.append(
                    f"note: {self.target.folder} will not have the routes of step {missing + 1}, "
                    f"which was not recorded; a run that replays it cannot begin before"
                )
        if self.source is not None:
            lines.append(
                f"replaying the routes in {self.source.folder}; evaluation and samples choose "
                f"freely"
            )
        return lines


def check_routes(config: RunConfig) -> None:
    """Refuse what no recording could serve, before the data is prepared.

    Raises:
        ConfigError: naming the settings.
    """
    model = config.model
    for name, folder in config.routes:
        if folder is not None and not model.moe_layers:
            raise ConfigError(
                f"routes.{name} ({folder}) has no effect without routed experts "
                f"(model.feed_forward: dense); leave it out"
            )
    for layer in model.moe_layers if config.routes.replay is not None else ():
        router = model.at(layer).moe.router.name
        if not load_variant("routers", router).Router.replays:
            raise ConfigError(
                f"routes.replay ({config.routes.replay}): {model.setting('router', layer)}.name "
                f"({router}) cannot take routes, its Router does not say `replays = True`; leave "
                f"one of them out"
            )


def open_routes(
    config: RunConfig,
    model: ModelConfig,
    facts: dict[str, Any],
    start: int,
    ranks: Ranks | None = None,
) -> RunRoutes:
    """What `routes` of a config asks for, checked; nothing is written before `Recording.begin`.

    Args:
        model: with its vocab_size known. facts: the run's `identity`. start: steps done so far.
    Raises:
        ConfigError: if the folder to record in holds another run's routes, or those to replay do
            not belong to this run's sequences or lack a step.
        DataError: if those to replay are cut off.
    """
    if config.routes == RoutesConfig():
        return RunRoutes()
    target = source = None
    ours = make_header(config, model, facts)
    if config.routes.record is not None:
        target = Recording(Path(config.routes.record), ours)
        check_directory(target.folder, SETTING, setting=SETTING)
        there = find_recording(target.folder)
        if there is not None:
            recorded = there.header.run
            _refuse(
                f"{SETTING} ({target.folder}) holds the routes of another run:",
                changed_settings(with_allowed_changes(recorded, ours.run), ours.run, _LABELS),
                "choose another folder, or remove that one",
            )
    # A run that is done is only looked at.
    if config.routes.replay is not None and start < config.num_steps:
        source = open_recording(Path(config.routes.replay), "routes.replay")
        _refuse(
            f"routes.replay ({source.folder}) does not fit this run:",
            changed_settings(source.header.routes, ours.routes, _LABELS),
            "go back to the recording's values, or record again with these",
        )
        stop = config.num_steps
        missing = source.first_missing(start, stop)
        if missing is not None:
            raise ConfigError(
                f"routes.replay ({source.folder}) lacks the routes of step {missing + 1}, and this "
                f"run needs those of steps {start + 1} to {stop}; record on, or take fewer "
                f"training.steps"
            )
        source.check_length(stop)
    return RunRoutes(target, source, ranks)


def make_header(config: RunConfig, model: ModelConfig, facts: dict[str, Any]) -> Header:
    """The header of what this run would record."""
    layers = model.moe_layers
    training = config.training
    experts = {
        "layers": list(layers),
        "num_experts": _of_layers(model.choices_of_layers),
        "top_k": _of_layers(model.top_k_of_layers),
    }
    # The last of each layer's experts. None at all is not written: older recordings say nothing.
    costless = zip(ZERO_COMPUTATION_KINDS, model.moe.zero_computation, strict=True)
    experts |= {f"num_{kind}_experts": number for kind, number in costless if number}
    # Two runs that differ in a rate only are two runs; a run keeps its place.
    run = {"output_dir": normpath(config.output_dir), **facts}
    return Header(
        num_steps=config.num_steps,
        dtype=index_dtype(model.num_choices),
        shape=(training.batch_size, len(layers), training.seq_len, model.top_k),
        routes={**facts, "model": experts},
        run=run,
    )


def _of_layers(numbers: Sequence[int]) -> int | list[int]:
    """One number where all layers have the same, else that of each."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def recording_bytes(config: RunConfig, model: ModelConfig) -> int:
    """Bytes that `routes.record` takes on the disk in all; 0 where nothing is recorded."""
    if config.routes.record is None or not model.moe_layers:
        return 0
    return _bytes_of(make_header(config, model, {}), config.num_steps)


def _bytes_of(header: Header, num_steps: int) -> int:
    per_sequence = Recording(Path(), header).sequence_bytes + CHECK_BYTES
    return num_steps * header.shape[0] * per_sequence


def _refuse(problem: str, lines: list[str], way_out: str) -> None:
    if lines:
        raise ConfigError("\n".join([problem, *lines, way_out]))


# ---- how far two recordings agree


def routing_agreement(a: Tensor, b: Tensor) -> Tensor:
    """2 sum |A_t and B_t| / sum (|A_t| + |B_t|) over tokens t, of each layer: the share of the
    assignments that both have; 1 where they are equal, the same whichever comes first.

    Args: (L, B, S, K) chosen experts of the same tokens, -1 for none; K may differ.
    Returns: (L,) float64.
    """
    same, number = _common(a, b)
    return same / number.clamp(min=1)


def _common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) assignments that both have, and the mean of how many each has."""
    ours, theirs = ((routes >= 0).sum((1, 2, 3)) for routes in (a, b))
    same = route_overlap(a.flatten(1, 2), b.flatten(1, 2)) * theirs
    return same, (ours + theirs) / 2


def step_agreement(a: Recording, b: Recording, step: int) -> Tensor:
    """`routing_agreement` of a step of two recordings, (L,), some sequences at a time."""
    batch_size, num_layers, seq_len, top_k = b.header.shape
    at_once = max(1, _COMPARED // (num_layers * seq_len * top_k * top_k))
    same = total = torch.zeros(num_layers, dtype=torch.float64)
    for first in range(0, batch_size, at_once):
        count = min(at_once, batch_size - first)
        ours, theirs = (
            torch.from_numpy(each.read(step, first, count)).transpose(0, 1) for each in (a, b)
        )
        common, number = _common(ours, theirs)
        same, total = same + common, total + number
    return same / total.clamp(min=1)


def common_steps(a: Recording, b: Recording) -> Iterator[int]:
    """The steps, from 0, that both have.

    Raises:
        ConfigError: if they are not of the same sequences and experts, or share no step.
    """
    _refuse(
        f"{a.folder} and {b.folder} are not of the same tokens:",
        changed_settings(a.header.routes, b.header.routes, (f"in {a.folder}", f"in {b.folder}")),
        "compare recordings of the same data, seed, batches, layers and experts",
    )
    stop = min(a.num_steps(), b.num_steps())
    both = np.flatnonzero(a.recorded(0, stop) & b.recorded(0, stop))
    if not len(both):
        raise ConfigError(f"{a.folder} and {b.folder} have no step in common; record on")
    return iter(both.tolist())


def render_agreement(steps: list[int], agreement: Tensor, layers: list[int]) -> str:
    """A table for a person.

    Args: steps: from 0. agreement: (steps, L). layers: the numbers of the blocks.
    """
    worst, where = agreement.min(0)
    lines = [f"agreement over {len(steps)} steps, {steps[0] + 1} to {steps[-1] + 1}", ""]
    lines.append(f"  {'layer':<8}{'mean':>8}{'worst':>9}{'at step':>10}")
    for index, layer in enumerate(layers):
        mean, least = float(agreement[:, index].mean()), float(worst[index])
        lines.append(f"  {layer:<8}{mean:>8.4f}{least:>9.4f}{steps[int(where[index])] + 1:>10}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.routes",
        description="How far two recordings agree: the share of their assignments that both have.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="the routes.record of a run")
    parser.add_argument("b", type=Path, metavar="B", help="that of another, on the same data")
    options = parser.parse_args(argv)

    def program() -> int:
        a, b = open_recording(options.a, "A"), open_recording(options.b, "B")
        steps = list(common_steps(a, b))
        agreement = torch.stack([step_agreement(a, b, step) for step in steps])  # (steps, L)
        print(render_agreement(steps, agreement, b.header.routes["model"]["layers"]))
        return 0

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
