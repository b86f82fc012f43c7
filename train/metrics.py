"""What is measured at a step?

Counts, losses and flags are summed at every step; what a router is like and how large gradients
and weights are, only at the steps that are logged. `moe/GLOSSARY.md` says what each number means,
`train/scalars.py` under which tag it appears.
"""

import resource
import sys
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.measures import router_sums
from moe.routing import Routing, stack_layers
from moe.variants import load_variant

# A dead expert got nothing over this many optimizer steps.
WINDOW_STEPS = 100
# Intervals that the history of the load has at most.
HISTORY_INTERVALS = 64
# Router logits are counted in this many bins between the bounds; what is beyond, in the last ones.
LOGIT_BINS, LOGIT_BOUND = 128, 16.0
# Whose gradients and weights have a norm of their own.
NORM_GROUPS = ("router", "experts", "dense")


class RouterMeans(NamedTuple):
    """Means over the tokens of a step, each (L,) float64: see `RouterSums`; logit_max a maximum."""

    entropy: Tensor
    confidence: Tensor
    margin: Tensor
    logit_norm: Tensor
    logsumexp: Tensor
    logit_max: Tensor


class StepDetail(NamedTuple):
    """What is measured at logged steps alone.

    routers: means by layer. logit_counts: (L, LOGIT_BINS) router logits of all tokens and experts.
    gradient_norms, weight_norms: L2 norms by group of parameters (NORM_GROUPS), before the update
    and before clipping. memory_gib: the largest of all ranks, on its GPU or of its process.
    """

    routers: RouterMeans
    logit_counts: Tensor
    gradient_norms: dict[str, float]
    weight_norms: dict[str, float]
    memory_gib: float


class StepMetrics(NamedTuple):
    """One optimizer step, summed over ranks and accumulation.

    lm_loss nats per token; aux_losses unweighted and aux_coefficients, what multiplied them in the
    loss, both by name; gradient_norm before clipping; tokens_per_expert (L, E) assignments that
    the routers of L routed layers made, below 0 where a layer has no such expert, and num_dropped
    (L,) those of them that a capacity took back; work_seconds (W,) of each rank's forward passes in
    the step before (`WorkClock`); skipped: the step was not applied since something was inf or NaN;
    detail: None where it was not asked for.
    """

    step: int
    lm_loss: float
    aux_losses: dict[str, float]
    aux_coefficients: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens_per_expert: Tensor
    num_dropped: Tensor
    work_seconds: Tensor
    num_tokens: int
    skipped: bool = False
    detail: StepDetail | None = None


class RoutingSums(NamedTuple):
    """What a forward pass adds to the step's numbers about routing, L routed layers.

    counts (L, E) int64 assignments that the routers made (below 0: no such expert in this layer),
    and dropped (L,) int64 those of them that a capacity took back.
    logit_counts (L, LOGIT_BINS) int64 and tokens (6, L) float64, the sums of `RouterSums`, both
    without layers where they were not asked for; logit_max (L,).
    """

    counts: Tensor
    dropped: Tensor
    logit_counts: Tensor
    tokens: Tensor
    logit_max: Tensor

    def plus(self, other: "RoutingSums") -> "RoutingSums":
        """Those of both passes together."""
        return RoutingSums(
            self.counts + other.counts,
            self.dropped + other.dropped,
            self.logit_counts + other.logit_counts,
            self.tokens + other.tokens,
            torch.maximum(self.logit_max, other.logit_max),
        )

    def means(self) -> RouterMeans:
        """Over the tokens that were summed."""
        num_tokens, *sums = self.tokens.cpu()
        means = [each / num_tokens.clamp(min=1) for each in sums]
        return RouterMeans._make([*means, self.logit_max.cpu()])


def routing_sums(
    routings: tuple[Routing, ...], device: torch.device, *, detail: bool
) -> RoutingSums:
    """The numbers of one forward pass, without waiting for the device."""
    if not routings:
        none = torch.zeros(0, 1, dtype=torch.int64, device=device)
        return RoutingSums(
            none, none[:, 0], none, none.new_zeros(6, 0).double(), none[:, 0].double()
        )
    by_expert = stack_layers([routing.num_dropped for routing in routings], fill=0)
    counts = stack_layers([routing.tokens_per_expert for routing in routings]) + by_expert
    dropped = by_expert.sum(-1)
    if not detail:
        none = counts.new_zeros(0, LOGIT_BINS)
        return RoutingSums(
            counts, dropped, none, none.new_zeros(6, 0).double(), none[:, 0].double()
        )
    each = [router_sums(routing) for routing in routings]
    tokens = torch.stack([torch.stack(sums[:-1]) for sums in each], 1)  # (6, L)
    logits = torch.stack([_logit_counts(routing) for routing in routings])
    return RoutingSums(
        counts, dropped, logits, tokens, torch.stack([sums.logit_max for sums in each])
    )


def _logit_counts(routing: Routing) -> Tensor:
    """(LOGIT_BINS,) how many logits of valid tokens fall into each bin; NaN in none."""
    logits = routing.router_logits.detach().clamp(-LOGIT_BOUND, LOGIT_BOUND)
    ignored = ~routing.valid.unsqueeze(-1) | logits.isnan()
    beyond = logits.masked_fill(ignored, 2 * LOGIT_BOUND)
    return torch.histc(beyond, LOGIT_BINS, -LOGIT_BOUND, LOGIT_BOUND).long()


def memory_in_use(device: torch.device) -> float:
    """GiB: the most that PyTorch has had on the GPU, or the process in memory, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def norm_group(parameter_name: str) -> str:
    """The group of NORM_GROUPS that a parameter belongs to; dense is what is in no router and no
    routed network: shared experts, their gate, the matrices around latent experts, and constant
    experts too."""
    parts = parameter_name.split(".")
    return next((group for group in ("router", "experts") if group in parts), "dense")


def loss_weights(model: ModelConfig) -> dict[str, float]:
    """The weight of each term beside the language-model loss, by its name in logs."""
    weights = {}
    if model.moe_layers:
        weights = {loss.label: loss.weight for loss in model.moe.losses}  # type: ignore[attr-defined]
        names = {model.at(layer).moe.router.name for layer in model.moe_layers}
        if any(load_variant("routers", name).Router.penalizes for name in names):
            weights["router_penalty"] = 1.0
    if model.lm_z_loss_weight:
        weights["lm_z_loss"] = model.lm_z_loss_weight
    return weights


class LoadWindow:
    """Assignments over the last WINDOW_STEPS optimizer steps, for dead experts."""

    def __init__(self) -> None:
        self._steps: deque[Tensor] = deque(maxlen=WINDOW_STEPS)

    def __len__(self) -> int:
        return len(self._steps)

    def tensor(self) -> Tensor:
        """(steps, L, E), for a checkpoint."""
        return torch.stack(list(self._steps)) if self._steps else torch.zeros(0, 0, 0).long()

    def restore(self, steps: Tensor) -> None:
        """Continue the window that `tensor` returned."""
        self._steps.extend(steps.unbind(0))

    def add(self, tokens_per_expert: Tensor) -> Tensor:
        """Add one step's (L, E) counts and return the window's sum."""
        self._steps.append(tokens_per_expert.cpu())
        return self.last(WINDOW_STEPS)

    def last(self, steps: int) -> Tensor:
        """(L, E) sum over the last steps, fewer where there are fewer."""
        return torch.stack(list(self._steps)[-steps:]).sum(0)


class LoadHistory:
    """Assignments over the whole run in at most HISTORY_INTERVALS equal intervals.

    When there are too many, neighbours are joined, so that the memory is bounded however long the
    run. Attributes: counts: (N, L, E) of each interval. edges: N + 1 optimizer steps.
    """

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.edges: list[int] = []
        self._width = 1

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        counts = torch.stack(self.counts) if self.counts else torch.zeros(0, 0, 0).long()
        return {"history": counts, "history_edges": torch.tensor(self.edges, dtype=torch.int64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue the history that `tensors` returned."""
        self.counts = list(tensors["history"].unbind(0))
        self.edges = tensors["history_edges"].tolist()
        if len(self.edges) > 1:
            self._width = self.edges[1] - self.edges[0]

    def add(self, tokens_per_expert: Tensor, step: int) -> None:
        """Add the (L, E) counts of optimizer step `step`, counted from 1."""
        load = tokens_per_expert.cpu()
        if not self.counts:
            self.counts, self.edges = [load], [step - 1, step]
            return
        if self.edges[-1] - self.edges[-2] < self._width:
            self.counts[-1] = self.counts[-1] + load
            self.edges[-1] = step
            return
        if len(self.counts) == HISTORY_INTERVALS:
            pairs = zip(self.counts[::2], self.counts[1::2], strict=True)
            self.counts = [a + b for a, b in pairs]
            self.edges = self.edges[::2]
            self._width *= 2
        self.counts.append(load)
        self.edges.append(step)
