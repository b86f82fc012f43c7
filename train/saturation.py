"""When did the routes become what they are? The same text through several checkpoints of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.measures import (
    dead_experts,
    domain_expert_information,
    effective_experts,
    load_share,
    max_violation,
    route_overlap,
)
from moe.model import MoETransformer
from moe.routing import stack_layers, zero_counts
from train.analysis_text import HeldOutText, num_labels, progress, read, sum_by_domain
from train.checkpoint import Checkpoint, listed_checkpoints, open_checkpoint
from train.engine import load_model
from train.errors import CheckpointError
from train.probe import ProbeRoutes

# Of all domains together.
COMPARED_TOKENS = 8192


class ComparedText(NamedTuple):
    """What a model does with the probe text: N tokens.

    routes: (L, N, K) int16. load: (domains, L, E) int64 assignments, below 0 where a layer has no
    such expert. loss: (domains,) nats per token. labels: (domains,) tokens that were predicted, 0
    where there is no text.
    """

    routes: Tensor
    load: Tensor
    loss: Tensor
    labels: Tensor


def read_compared(model: MoETransformer, text: HeldOutText) -> ComparedText:
    """Read the probe text."""
    num_domains, config = len(text.data.domain_names), model.config
    load = zero_counts(config.choices_of_layers).repeat(num_domains, 1, 1)
    losses = torch.zeros(num_domains, dtype=torch.float64)
    labels = torch.zeros(num_domains, dtype=torch.float64)
    routes = []
    for batch in text.batches():
        reading = read(model, batch)
        chosen = stack_layers([routing.chosen_indices for routing in reading.routings])  # (L, T, K)
        routes.append(chosen.to(torch.int16).cpu())
        # A batch is of one domain.
        domain = int(batch.domain_ids[0])
        load[domain] += stack_layers([r.demand for r in reading.routings]).cpu()
        losses += sum_by_domain(reading.losses, batch.domain_ids, num_domains)
        labels += num_labels(batch, num_domains)
    return ComparedText(torch.cat(routes, 1), load, losses / labels.clamp(min=1), labels)


def compare_checkpoints(
    run_dir: Path,
    analysed: int,
    model: MoETransformer,
    text: HeldOutText,
    *,
    against: int | None,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Overlap of the routes of every other sound checkpoint with those of the analysed one.

    One model at a time; afterwards `model` holds the weights of the last of them.

    Args:
        analysed: step of the checkpoint that `model` holds now. against: step of the one that is
            compared in full, which must be sound.
    Returns:
        `probe_tokens`; `checkpoints`, each with `step` and `overlap` by layer, in the order of
        steps; `against`, see `_in_full`, or None.
    Raises:
        CheckpointError: if `against` is damaged.
    """
    reference = read_compared(model, text)
    others = [entry for entry in sorted(listed_checkpoints(run_dir)) if entry[0] != analysed]
    rows, in_full = [], None
    with progress("overlap", len(others), "other checkpoints") as done:
        for step, path in others:
            other = _open(path, step == against, warn)
            if other is not None:
                load_model(model, other.tensors["model"])
                found = read_compared(model, text)
                overlap = route_overlap(found.routes, reference.routes).tolist()
                rows.append({"step": step, "overlap": overlap})
                if step == against:
                    in_full = {"step": step} | _in_full(model, text, found, reference)
            done(1)
    return {
        "probe_tokens": reference.routes.shape[1],
        "checkpoints": rows,
        "against": in_full,
    }


def _open(path: Path, must: bool, warn: Callable[[str], None]) -> Checkpoint | None:
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        if must:
            raise
        warn(f"{error}; left out")
        return None


def _in_full(
    model: MoETransformer, text: HeldOutText, found: ComparedText, reference: ComparedText
) -> dict[str, Any]:
    """What differs between a checkpoint and the analysed one, on the probe text.

    `loss`: by domain `against` and `analysed`, nats per token. `layers`: `overlap` of the routes,
    `load_moved`, the share of assignments that other experts get (half the sum of absolute
    differences of load shares), and measures of each, `..._against` and `..._analysed`.
    """
    overlap = route_overlap(found.routes, reference.routes)
    sides = {"against": found, "analysed": reference}
    share = [load_share(side.load.sum(0)) for side in sides.values()]  # (L, E)
    columns = {"overlap": overlap, "load_moved": (share[0] - share[1]).abs().sum(-1) / 2}
    for name, side in sides.items():
        load = side.load.sum(0)
        columns |= {
            f"max_violation_{name}": max_violation(load),
            f"effective_experts_{name}": effective_experts(load),
            f"dead_experts_{name}": dead_experts(load),
            f"domain_information_{name}": domain_expert_information(side.load.transpose(0, 1)),
        }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return {
        "layers": [
            {"layer": layer, **dict(zip(columns, row, strict=True))}
            for layer, row in zip(model.config.moe_layers, rows, strict=True)
        ],
        "loss": {
            domain: {name: float(side.loss[index]) for name, side in sides.items()}
            for index, domain in enumerate(text.data.domain_names)
            if reference.labels[index] > 0
        },
    }


def training_curve(
    run_dir: Path, layers: int, top_k: int, warn: Callable[[str], None]
) -> dict[str, Any] | None:
    """Overlap of the routes at each evaluation of the training with those at the last one.

    Returns:
        `probe_tokens`, `steps`, and `overlap` (steps, L); None without two such files.
    """
    kept = ProbeRoutes(run_dir / "probe_routes")
    reference: Tensor | None = None
    overlap: dict[int, list[float]] = {}
    # From the last one on, with which the others are compared.
    for step in reversed(kept.steps()):
        try:
            found = kept.read(step)
            wanted = len(found if reference is None else reference), layers, top_k
            if tuple(found.shape) != wanted:
                raise ValueError(f"holds {tuple(found.shape)}, needs {wanted} (N, L, K)")
        except (OSError, ValueError) as error:
            warn(f"{kept.folder}, step {step}: {error}; left out")
            continue
        if reference is None:
            reference = found
        overlap[step] = route_overlap(found.transpose(0, 1), reference.transpose(0, 1)).tolist()
    if reference is None or len(overlap) < 2:
        return None
    steps = sorted(overlap)
    return {
        "probe_tokens": len(reference),
        "steps": steps,
        "overlap": [overlap[step] for step in steps],
    }
