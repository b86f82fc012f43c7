"""What does a training step cost in each way of sharing a model out over ranks?

    torchrun --standalone --nproc_per_node 2 -m train.rank_bench --config configs/quickstart.yaml
    torchrun --standalone --nproc_per_node 1 -m train.rank_bench --config configs/quickstart.yaml

A layout `2x1` is experts over 2 ranks at ZeRO stage 1. With one rank there is `plain` too, the
engine without DeepSpeed: what the others take more is DeepSpeed's own work. All layouts are built
at once and take whole training steps in turns (`train.step`), on the same batches of random tokens;
a step ends when it has on every rank. Layouts whose losses differ are not timed. Where all do not
fit into memory at once, choose some: `--layouts 1x0 2x1`.

Beside the times stands what a rank sends in one step (`train.traffic` says what is counted).
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.nn.functional as F

from kernels.machine import machine_facts, seconds_of
from moe.config import ModelConfig
from train.arguments import parse_arguments
from train.config import RunConfig, dump_config, load_config
from train.deepspeed_config import check_user_settings
from train.device import choose_device, choose_precision
from train.engine import Engine, build_engine
from train.errors import ConfigError, OutOfMemoryError, RunError
from train.layouts import Layout, plan_layouts, possible_sizes
from train.metrics import StepMetrics
from train.packing import TrainLoader
from train.plan import check_memory, make_plan
from train.program import guarded
from train.random_state import seed_all
from train.ranks import Ranks, check_layout, first_rank_first, gather, launched_ranks
from train.run_directory import (
    check_directory,
    format_bytes,
    make_directory,
    replace_file,
    storage_errors,
)
from train.status import format_layers
from train.step import read_step, train_step
from train.tokenizer import planned_vocab_size, with_vocab_size
from train.traffic import KINDS, counted

PLAIN = "plain"
FEWER = "choose fewer layouts at once, for example --layouts 1x0 1x1"
# Steps of each layout that must agree with those of the others; then one is counted.
CHECKED_STEPS = 2


class RandomTokens:
    """One domain, a single document of random tokens; a `train.packing.TokenSource`."""

    domain_names: tuple[str, ...] = ("random",)
    weights: tuple[float, ...] = (1.0,)
    # No token is.
    end_of_text = -1

    def __init__(self, config: RunConfig, vocab_size: int):
        count = 16 * config.training.batch_size * config.training.seq_len + 1
        self._tokens = np.random.default_rng(config.seed).integers(0, vocab_size, count)

    def train_stream(self, domain: str) -> np.ndarray:
        """All of them."""
        return self._tokens


def layout_names(model: ModelConfig, world_size: int) -> list[str]:
    """Every layout of a number of ranks."""
    sizes = possible_sizes(model.experts_of_layers, world_size)
    names = [f"{size}x{stage}" for size in sizes for stage in (0, 1, 2, 3)]
    return [PLAIN, *names] if world_size == 1 else names


def choose(wanted: list[str] | None, model: ModelConfig, world_size: int) -> list[str]:
    """The layouts that --layouts names, all without it.

    Raises:
        ConfigError: if there is none of that name.
    """
    possible = layout_names(model, world_size)
    for name in wanted or ():
        if name not in possible:
            hint = "; write settings before --layouts" if "=" in name else ""
            raise ConfigError(
                f"--layouts ({name}) must be of {', '.join(possible)}, those of {world_size} "
                f"rank(s) and these experts{hint}"
            )
    return [name for name in possible if wanted is None or name in wanted]


def with_layout(config: RunConfig, name: str) -> RunConfig:
    """The config with a layout's `parallel.expert_parallel_size` and `parallel.zero_stage`."""
    size, stage = map(int, name.split("x"))
    update = {"expert_parallel_size": size, "zero_stage": stage}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


def build_layout(
    name: str, config: RunConfig, ranks: Ranks, precision: str
) -> tuple[Engine, Callable[[], StepMetrics]]:
    """The engine of a layout, and what takes its next training step.

    Args: config: its model with the vocab_size known.
    """
    if name != PLAIN:
        config = with_layout(config, name)
    usual_linear = F.linear
    engine = build_engine(
        config, config.model, ranks=None if name == PLAIN else ranks, precision=precision
    )
    # DeepSpeed's stage 3 replaces this function for the whole process; the others keep theirs.
    own_linear, F.linear = F.linear, usual_linear
    assert config.model.vocab_size is not None
    tokens = RandomTokens(config, config.model.vocab_size)
    loader = TrainLoader(tokens, config.training.seq_len, config.seed)
    numbers = itertools.count()

    def step() -> StepMetrics:
        number = next(numbers)
        F.linear = own_linear
        metrics = train_step(engine, read_step(loader, number, config, engine), number, config)
        F.linear = usual_linear
        # The next layout begins on all ranks at once.
        if engine.world_size > 1:
            dist.barrier()
        assert metrics is not None
        return metrics

    return engine, step


def measure(config: RunConfig, names: list[str], ranks: Ranks, repeats: int) -> dict[str, Any]:
    """Build, check, count and time layouts; the process group is joined, every rank calls this.

    Args: config: its model with the vocab_size known.
    Returns: facts of machine and shape, and in `layouts` of each one: `seconds` of every step on
        this rank, their median `ms` and quartiles, `sent_bytes` of each rank by kind, and
        `planned_token_bytes`, what `train.plan` says of the first kind.
    Raises:
        RunError: if two layouts do not train alike.
        OutOfMemoryError: if they do not fit into memory together.
    """
    device = choose_device(config.training.device)
    # `auto` measures, and may find another one each time.
    precision = gather(choose_precision(config.training.precision, device))[0]
    planned = plan_together(config, names, ranks, device, precision)
    steps, checked, sent = {}, {}, {}
    for name in names:
        seed_all(config.seed, ranks.rank)
        engine, steps[name] = build_layout(name, config, ranks, precision)
        checked[name] = [steps[name]() for _ in range(CHECKED_STEPS)]
        with counted(engine) as ours:
            steps[name]()
        sent[name] = gather(ours)
    refuse_differences(checked)
    seconds = seconds_of(steps, repeats)
    layouts = {}
    for name in names:
        quartiles = statistics.quantiles(seconds[name], n=4, method="inclusive")
        low, median, high = (1e3 * at for at in quartiles)
        layouts[name] = {
            "ms": median,
            "ms_quartiles": [low, high],
            "tokens_per_second": config.tokens_per_step / median * 1e3,
            "sent_bytes": sent[name],
            "planned_token_bytes": planned[name].all_to_all_bytes if name in planned else 0,
            "seconds": seconds[name],
        }
    return machine_facts(device) | {
        "deepspeed": importlib.metadata.version("deepspeed"),
        "backend": dist.get_backend(),
        "world_size": ranks.world_size,
        "local_world_size": ranks.local_world_size,
        "cores": os.cpu_count(),
        "precision": precision,
        "tokens_per_step": config.tokens_per_step,
        "micro_batches_per_rank": config.micro_batches_per_rank(ranks.world_size),
        "shape": describe_shape(config.model),
        "config": config.model_dump(mode="json"),
        "repeats": repeats,
        "layouts": layouts,
    }


def plan_together(
    config: RunConfig, names: list[str], ranks: Ranks, device: str, precision: str
) -> dict[str, Layout]:
    """What `train.plan` says of each layout of these ranks, by name.

    Raises:
        OutOfMemoryError: if weights, gradients and moments of the named ones do not fit together.
    """
    compute_bytes = 2 if precision == "bfloat16" else 4
    plan = make_plan(config, config.model, compute_bytes)
    layouts = plan_layouts(config, config.model, plan.parameters, ranks.world_size, compute_bytes)
    planned = {f"{at.expert_parallel_size}x{at.zero_stage}": at for at in layouts}
    held = [plan if name == PLAIN else planned[name] for name in names]
    parts = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "host_bytes")
    needed = {part: sum(getattr(at, part) for at in held) for part in parts}
    together = plan._replace(ranks=ranks, **needed)
    try:
        check_memory(together, device)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{', '.join(names)}: {error}; or {FEWER}") from error
    return planned


def refuse_differences(checked: dict[str, list[StepMetrics]]) -> None:
    """Refuse to time layouts that do not train alike; tolerances for bfloat16, which rounds sums
    over ranks and over passes at different places.

    Raises:
        RunError: naming the first layout that differs from the first of all.
    """
    first, *others = checked
    for name in others:
        for wanted, found in zip(checked[first], checked[name], strict=True):
            for what, tolerance in (("lm_loss", 1e-3), ("gradient_norm", 2e-2)):
                a, b = getattr(wanted, what), getattr(found, what)
                if not math.isclose(a, b, rel_tol=tolerance):
                    raise RunError(
                        f"WRONG: in step {found.step} layout {name} has {what} {b:.6g}, layout "
                        f"{first} {a:.6g}; nothing is timed"
                    )


def describe_shape(model: ModelConfig) -> str:
    """`4 layers, D 128, F 128, 32 experts, top-4, vocabulary 2,048`."""
    parts = [f"{model.num_layers} layers", f"D {model.hidden_size}"]
    if model.moe_layers:
        layers = [model.at(layer) for layer in model.moe_layers]
        parts += [f"F {format_layers(each.moe.intermediate_size for each in layers)}"]
        parts += [f"{format_layers(model.experts_of_layers)} experts"]
        parts += [f"top-{format_layers(model.top_k_of_layers)}"]
    return ", ".join([*parts, f"vocabulary {model.vocab_size:,}"])


def describe(facts: dict[str, Any]) -> list[str]:
    """What the numbers depend on, and what they can and cannot show."""
    world, local = facts["world_size"], facts["local_world_size"]
    recomputed = facts["config"]["training"]["activation_checkpointing"]
    on = (
        f"Training steps of {facts['tokens_per_step']:,} random tokens, world size {world}, "
        f"micro-batches a rank: {facts['micro_batches_per_rank']}; {facts['shape']}; "
        f"{facts['precision']}{', activations recomputed' if recomputed else ''}. "
        f"{facts['chip']}, threads a rank: {facts['threads']}, {facts['backend']}, torch "
        f"{facts['torch']}, deepspeed {facts['deepspeed']}, commit {facts['commit']}. Medians of "
        f"{facts['repeats']} steps in turns."
    )
    if world == 1:
        return [on, "", "One rank sends nothing: `1x0` less `plain` is DeepSpeed's own work."]
    shows = f"There are {local} ranks on this machine of {world}, and a network in these times."
    if local == world:
        shows = "All ranks are on one machine: no network is in these times."
    if facts["device"] == "cpu":
        shows += (
            f" They share {facts['cores']} cores and send through its memory, so the times show "
            f"the work that sharing out adds, not what it would gain."
        )
    legend = (
        "`2x1`: experts over 2 ranks, ZeRO stage 1. Sent: by a rank in one step, mean over ranks; "
        "planned: tokens by `train.plan`, which takes routing to be even."
    )
    return [on, "", f"{shows} {legend}"]


def render(facts: dict[str, Any]) -> str:
    """Lines on what was measured, and a Markdown table."""
    head = ("layout", "ms a step", "middle half", "tokens/s", "sent: tokens", "planned", *KINDS[1:])
    lines = [*describe(facts), "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, at in facts["layouts"].items():
        low, high = at["ms_quartiles"]
        tokens, *rest = (statistics.mean(rank[k] for rank in at["sent_bytes"]) for k in KINDS)
        cells = [name, f"{at['ms']:.1f}", f"{low:.1f} to {high:.1f}"]
        cells.append(f"{at['tokens_per_second']:,.0f}")
        cells += map(format_bytes, (tokens, at["planned_token_bytes"], *rest))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--repeats", type=int, default=10, help="timed steps of each layout")
        parser.add_argument("--layouts", nargs="+", metavar="NAME", help="some, such as 1x0 2x1")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write all facts there")

    options, overrides = parse_arguments(argv, __doc__ or "", add_options)
    return guarded(lambda: _main(options, overrides), FEWER)


def _main(options: Any, overrides: list[str]) -> int:
    with first_rank_first():
        config = load_config(options.config, overrides)
        ranks = launched_ranks() or Ranks(0, 0, 1)
        vocab_size = planned_vocab_size(config.tokenizer)
        config = config.model_copy(update={"model": with_vocab_size(config.model, vocab_size)})
        names = choose(options.layouts, config.model, ranks.world_size)
        check(options, overrides, config, names, ranks)
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    # Not at the head: --help needs no DeepSpeed, whose import takes seconds.
    from train.expert_parallel import connect, disconnect, peer_errors

    if launched_ranks() is None:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    minutes = config.parallel.timeout_minutes
    with peer_errors(ranks.rank, minutes):
        connect(choose_device(config.training.device), ranks, minutes)
        with first_rank_first():
            facts = measure(config, names, ranks, options.repeats)
    if ranks.rank == 0:
        print(render(facts))
        if options.json:
            with storage_errors(options.json, setting="--json"):
                make_directory(options.json.parent)
                replace_file(options.json, json.dumps(facts, indent=1) + "\n")
    disconnect()
    return 0


def check(
    options: Any, overrides: list[str], config: RunConfig, names: list[str], ranks: Ranks
) -> None:
    """Refuse what cannot be, and settings without an effect.

    Raises:
        ConfigError: naming the option or setting.
    """
    if options.repeats < 2:
        raise ConfigError(f"--repeats ({options.repeats}) must be at least 2")
    if options.dry_run:
        raise ConfigError("--dry-run: python -m train.plan --world-size N says what layouts take")
    for override in overrides:
        setting = override.partition("=")[0].lstrip("-")
        if setting in ("parallel", "parallel.expert_parallel_size", "parallel.zero_stage"):
            raise ConfigError(f"{override} has no effect here: choose with --layouts")
    check_layout(with_layout(config, "1x0"), ranks)
    for name in (name for name in names if name != PLAIN):
        try:
            check_user_settings(with_layout(config, name))
        except ConfigError as error:
            raise ConfigError(
                f"layout {name}: {error}; choose others, for example --layouts 1x1 1x3"
            ) from error
    if options.json and ranks.rank == 0:
        check_directory(options.json.parent, "the folder of --json")
        if options.json.is_dir():
            raise ConfigError(f"--json ({options.json}) is a folder; name a file in it")


if __name__ == "__main__":
    exit_code = main()
    # As in `train.pretrain`: threads of process groups may end a process that winds down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
