"""What happens in one optimizer step?

Totals of the whole batch -> forward and backward of each micro-batch -> gradient norm -> is
everything finite? -> clip and update -> routers' `after_step`. A step that is dropped (a signal,
something not finite) leaves weights, moments and random streams as they were.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.layer import MoELayer
from moe.model import BatchTotals, ModelOutput
from train.config import RunConfig
from train.engine import PlainEngine
from train.errors import NonFiniteError
from train.metrics import StepMetrics, expert_usage, loss_weights
from train.packing import IGNORE, Batch, TrainLoader
from train.random_state import get_random_state, set_random_state
from train.schedule import learning_rate


def read_step(
    loader: TrainLoader, step: int, config: RunConfig, engine: PlainEngine
) -> list[Batch]:
    """This rank's micro-batches of a step: an equal, contiguous share of the global batch."""
    per_rank = config.training.batch_size // engine.world_size
    first = step * config.training.batch_size + engine.rank * per_rank
    size = min(config.micro_batch_size, per_rank)
    return [loader.batch(first + done, size) for done in range(0, per_rank, size)]


def exact_counts_needed(config: RunConfig, num_micro_batches: int) -> bool:
    """Whether the balance loss needs the whole step's counts before its first backward pass."""
    return num_micro_batches > 1 and any(
        getattr(loss, "scope", None) == "global_batch"
        and getattr(loss, "accumulation", None) == "exact"
        for loss in config.model.moe.losses
    )


def train_step(
    engine: PlainEngine,
    micro_batches: list[Batch],
    step: int,
    config: RunConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> StepMetrics | None:
    """One optimizer step.

    Args:
        micro_batches: this rank's share of the global batch.
        step: counted from 0.
        stop: asked before each pass; True drops the step.
    Returns:
        StepMetrics, or None if the step was dropped: nothing changed then, random streams included.
    Raises:
        NonFiniteError: if the loss or a gradient is inf or NaN and `training.nonfinite` is stop;
            names the step, and the layer whose router was first.
    """
    random_state = get_random_state()
    totals = batch_totals(engine, micro_batches, config, stop)
    summary: _StepSums | None = None
    for batch in micro_batches:
        if totals is None or stop():
            engine.zero_grad()
            set_random_state(random_state)
            return None
        output = engine(batch, totals)
        if config.training.debug:
            check_routers(output, config, step)
        assert output.loss is not None
        engine.backward(output.loss)
        summary = add_output(summary, output)
        if totals.counts_so_far is not None:
            totals = totals._replace(counts_so_far=summary.tokens_per_expert)
    assert summary is not None
    tokens_per_expert = engine.all_reduce(summary.tokens_per_expert)  # (L, E)
    gradient_norm = engine.gradient_norm()
    problem = find_nonfinite(engine, summary, gradient_norm, config)
    rate = learning_rate(step, config)
    if problem is None:
        engine.step(rate, gradient_norm)
        update_routers(engine, tokens_per_expert)
    engine.zero_grad()
    if problem is not None:
        set_random_state(random_state)
        refuse_nonfinite(engine, step, problem, config)
    passes = len(micro_batches)
    num_labels = summary.num_labels.clamp(min=1)
    aux_means = (summary.aux_losses / passes).tolist()
    if config.model.lm_z_loss_weight:
        aux_means.append(float(summary.lm_z_loss_sum / num_labels))
    return StepMetrics(
        step=step + 1,
        lm_loss=float(summary.lm_loss_sum / num_labels),
        aux_losses=dict(zip(loss_weights(config.model), aux_means, strict=True)),
        learning_rate=rate,
        gradient_norm=float(gradient_norm),
        tokens_per_expert=tokens_per_expert.cpu(),
        router_entropy=(summary.router_entropy / passes).cpu(),
        num_tokens=sum(batch.input_ids.numel() for batch in micro_batches),
        skipped=problem is not None,
    )


def batch_totals(
    engine: PlainEngine, batches: list[Batch], config: RunConfig, stop: Callable[[], bool]
) -> BatchTotals | None:
    """Labels, tokens and (where a loss asks) expert counts of the whole step; None after a stop.

    Exact counts cost a forward pass without gradients over all micro-batches; the random streams
    are put back, so that the passes with gradients choose the same experts.
    """
    num_labels = torch.stack([(batch.labels != IGNORE).sum() for batch in batches]).sum()
    num_tokens = torch.tensor(sum(batch.input_ids.numel() for batch in batches))
    totals = BatchTotals(
        engine.all_reduce(num_labels.to(engine.device)).clamp(min=1),
        engine.all_reduce(num_tokens.to(engine.device)),
    )
    layers = config.model.moe_layers
    if not layers or len(batches) == 1:
        return totals
    if not exact_counts_needed(config, len(batches)):
        num_experts = config.model.moe.num_experts
        so_far = torch.zeros(len(layers), num_experts, dtype=torch.long, device=engine.device)
        return totals._replace(counts_so_far=so_far)
    random_state = get_random_state()
    counts = torch.zeros((), dtype=torch.long, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            if stop():
                return None
            counts = counts + expert_usage(engine(batch).routings)[0]  # (L, E)
    set_random_state(random_state)
    return totals._replace(tokens_per_expert=engine.all_reduce(counts))


class _StepSums(NamedTuple):
    """Sums over the passes of a step; all tensors on the device."""

    lm_loss_sum: Tensor
    lm_z_loss_sum: Tensor
    num_labels: Tensor
    aux_losses: Tensor
    tokens_per_expert: Tensor
    router_entropy: Tensor
    loss_finite: Tensor
    logits_finite: Tensor


def add_output(sums: _StepSums | None, output: ModelOutput) -> _StepSums:
    """Add one pass's facts, without waiting for the device."""
    assert output.loss is not None and output.lm_loss is not None
    assert output.num_labels is not None
    counts, entropy = expert_usage(output.routings)
    aux = [value.detach() for value in output.aux_losses]
    finite = [routing.logits_finite for routing in output.routings]
    now = _StepSums(
        output.lm_loss * output.num_labels,
        output.num_labels * (0.0 if output.lm_z_loss is None else output.lm_z_loss),
        output.num_labels,
        torch.stack(aux) if aux else output.loss.new_zeros(0),
        counts,
        entropy,
        torch.isfinite(output.loss.detach()),
        torch.stack(finite) if finite else output.loss.new_ones(0, dtype=torch.bool),
    )
    if sums is None:
        return now
    return _StepSums(
        sums.lm_loss_sum + now.lm_loss_sum,
        sums.lm_z_loss_sum + now.lm_z_loss_sum,
        sums.num_labels + now.num_labels,
        sums.aux_losses + now.aux_losses,
        sums.tokens_per_expert + now.tokens_per_expert,
        sums.router_entropy + now.router_entropy,
        sums.loss_finite & now.loss_finite,
        sums.logits_finite & now.logits_finite,
    )


def find_nonfinite(
    engine: PlainEngine, sums: _StepSums, gradient_norm: Tensor, config: RunConfig
) -> str | None:
    """What is inf or NaN in this step, named; None if nothing. One wait for the device."""
    flags = [sums.loss_finite.view(1), torch.isfinite(gradient_norm).view(1), sums.logits_finite]
    loss_finite, norm_finite, *router_finite = torch.cat(flags).tolist()
    if all(router_finite) and loss_finite and norm_finite:
        return None
    for layer, finite in zip(config.model.moe_layers, router_finite, strict=True):
        if not finite:
            return f"the router logits of layer {layer} are not finite"
    if not loss_finite:
        return "the loss is not finite, though every router's logits are"
    # From the loss down, the first one is where it began: everything below it is infected.
    names = engine.nonfinite_gradients()
    where = names[-1] if names else "their sum over all parameters"
    return f"the gradient is not finite, first in {where}"


def refuse_nonfinite(engine: PlainEngine, step: int, problem: str, config: RunConfig) -> None:
    """Raise unless the step can be skipped: no skip mends weights that are inf or NaN themselves.

    Nothing is saved: what led here should not push an older checkpoint out.
    """
    broken = engine.nonfinite_weights()
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise NonFiniteError(
            f"step {step + 1}: {problem}: the weight {broken[0]}{more} holds inf or NaN; go back "
            f"to an older checkpoint with a lower optimizer.learning_rate"
        )
    if config.training.nonfinite == "stop":
        raise NonFiniteError(
            f"step {step + 1}: {problem}; the weights are as before this step, and nothing was "
            f"saved. To go on from the last checkpoint, run again with a lower "
            f"optimizer.learning_rate or with training.nonfinite: skip"
        )


def check_routers(output: ModelOutput, config: RunConfig, step: int) -> None:
    """`training.debug`: stop where a router's logits go wrong, not at the end of the step."""
    for layer, routing in zip(config.model.moe_layers, output.routings, strict=True):
        if not routing.logits_finite:
            tokens = (~torch.isfinite(routing.router_logits).all(-1)).nonzero().flatten()
            raise NonFiniteError(
                f"step {step + 1}: the router logits of layer {layer} are not finite, first at "
                f"token {int(tokens[0])} of the micro-batch; the weights are as before this step"
            )


def update_routers(engine: PlainEngine, tokens_per_expert: Tensor) -> None:
    """Call each router's `after_step` with its layer's counts of the whole step, (L, E)."""
    layers = [m for m in engine.model.modules() if isinstance(m, MoELayer)]
    for layer, load in zip(layers, tokens_per_expert, strict=True):
        if hasattr(layer.router, "after_step"):
            layer.router.after_step(load)
