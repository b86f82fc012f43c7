"""What happens in one optimizer step?

Totals of the whole batch -> forward and backward of each micro-batch -> gradient norm -> is
everything finite? -> clip and update -> routers' `after_step`. A step that is dropped (a signal,
something not finite) leaves weights, moments and random streams as they were.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.layer import MoELayer
from moe.model import BatchTotals, ModelOutput, MoETransformer
from moe.routing import Routing, stack_layers, zero_counts
from train.config import RunConfig
from train.engine import Engine
from train.errors import NonFiniteError
from train.metrics import (
    NORM_GROUPS,
    RoutingSums,
    StepDetail,
    StepMetrics,
    loss_weights,
    memory_in_use,
    routing_sums,
)
from train.packing import IGNORE, Batch, TrainLoader
from train.random_state import get_random_state, set_random_state
from train.schedule import learning_rate


def read_step(loader: TrainLoader, step: int, config: RunConfig, engine: Engine) -> list[Batch]:
    """This rank's micro-batches of a step: an equal, contiguous share of the global batch.

    Raises:
        ConfigError: if the batch does not divide into equal micro-batches for every rank.
    """
    passes = config.micro_batches_per_rank(engine.world_size)
    per_rank = config.training.batch_size // engine.world_size
    first = step * config.training.batch_size + engine.rank * per_rank
    size = per_rank // passes
    return [loader.batch(first + done * size, size) for done in range(passes)]


def train_step(
    engine: Engine,
    micro_batches: list[Batch],
    step: int,
    config: RunConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
    seen: Callable[[tuple[Routing, ...]], None] = lambda routings: None,
    detail: bool = False,
) -> StepMetrics | None:
    """One optimizer step.

    Args:
        micro_batches: this rank's share of the global batch.
        step: counted from 0.
        stop: asked before each pass; True drops the step.
        seen: called with the routings of each micro-batch, in their order.
        detail: whether to measure `StepDetail` too.
    Returns:
        StepMetrics, or None if the step was dropped: nothing changed then, random streams included.
    Raises:
        NonFiniteError: if the loss or a gradient is inf or NaN and `training.nonfinite` is stop;
            names the step, and the layer whose router was first.
    """
    random_state = get_random_state()
    totals = batch_totals(engine, micro_batches, config, stop)
    sums: _StepSums | None = None
    routings: tuple[Routing, ...] = ()
    for number, batch in enumerate(micro_batches, start=1):
        if totals is None or engine.any_rank(stop()):
            engine.zero_grad()
            set_random_state(random_state)
            return None
        with engine.clock.working():
            output = engine(batch, totals)
        if config.training.debug:
            check_routers(output, config, step)
        assert output.loss is not None
        engine.backward(output.loss, last=number == len(micro_batches))
        sums = add_output(sums, output, detail=detail)
        routings = output.routings
        seen(routings)
        if totals.counts_so_far is not None:
            totals = totals._replace(counts_so_far=sums.routing.counts)
    assert sums is not None
    sums = sum_over_ranks(engine, sums, detail=detail)
    measured = step_detail(engine, sums) if detail else None
    gradient_norm = engine.gradient_norm()
    problem = find_nonfinite(engine, sums, gradient_norm, config)
    rate = learning_rate(step, config)
    if problem is None:
        engine.step(rate, gradient_norm)
        update_routers(engine, routings, sums.routing.counts, sums.feedback)
    engine.zero_grad()
    engine.clock.next_step()
    if problem is not None:
        set_random_state(random_state)
        refuse_nonfinite(engine, step, problem, config)
    return step_metrics(
        sums, step, rate, gradient_norm, config, skipped=problem is not None, detail=measured
    )


def step_metrics(
    sums: "_StepSums",
    step: int,
    rate: float,
    gradient_norm: Tensor,
    config: RunConfig,
    *,
    skipped: bool,
    detail: StepDetail | None,
) -> StepMetrics:
    """Means of the step from its sums over passes and ranks."""
    num_labels = sums.num_labels.clamp(min=1)
    names = loss_weights(config.model)
    aux, coefficients = sums.aux_losses.tolist(), sums.aux_coefficients.tolist()
    if config.model.lm_z_loss_weight:
        aux.append(float(sums.lm_z_loss_sum / num_labels))
        coefficients.append(float(sums.lm_z_coefficient))
    return StepMetrics(
        step=step + 1,
        lm_loss=float(sums.lm_loss_sum / num_labels),
        aux_losses=dict(zip(names, aux, strict=True)),
        aux_coefficients=dict(zip(names, coefficients, strict=True)),
        learning_rate=rate,
        gradient_norm=float(gradient_norm),
        tokens_per_expert=sums.routing.counts.cpu(),
        num_dropped=sums.routing.dropped.cpu(),
        work_seconds=sums.work_seconds.cpu(),
        num_tokens=config.tokens_per_step,
        skipped=skipped,
        detail=detail,
    )


def step_detail(engine: Engine, sums: "_StepSums") -> StepDetail:
    """What is measured at logged steps alone; before the update, with the gradients at hand."""
    norms = [engine.norms(gradients=True), engine.norms(gradients=False)]
    gradients, weights = torch.stack(norms).tolist()
    return StepDetail(
        routers=sums.routing.means(),
        logit_counts=sums.routing.logit_counts.cpu(),
        gradient_norms=dict(zip(NORM_GROUPS, gradients, strict=True)),
        weight_norms=dict(zip(NORM_GROUPS, weights, strict=True)),
        memory_gib=float(sums.memory),
    )


def batch_totals(
    engine: Engine, batches: list[Batch], config: RunConfig, stop: Callable[[], bool]
) -> BatchTotals | None:
    """Labels, tokens and (where a loss asks) expert counts of the whole step; None after a stop.

    Exact counts cost a forward pass without gradients over all micro-batches; the random streams
    are put back, so that the passes with gradients choose the same experts.
    """
    num_labels = torch.stack([(batch.labels != IGNORE).sum() for batch in batches]).sum()
    num_tokens = torch.tensor(sum(batch.input_ids.numel() for batch in batches))
    both = engine.all_reduce(torch.stack([num_labels, num_tokens]).to(engine.device))
    reduce = engine.all_reduce if engine.world_size > 1 else None
    totals = BatchTotals(both[0].clamp(min=1), both[1], sum_over_ranks=reduce)
    layers = config.model.moe_layers
    if not layers or len(batches) == 1:
        return totals
    if not config.exact_counts_needed(len(batches)):
        so_far = zero_counts(config.model.choices_of_layers, engine.device)
        return totals._replace(counts_so_far=so_far)
    random_state = get_random_state()
    counts = torch.zeros((), dtype=torch.long, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            if engine.any_rank(stop()):
                return None
            routings = engine(batch).routings
            counts = counts + stack_layers([r.demand for r in routings])  # (L, E)
    set_random_state(random_state)
    return totals._replace(tokens_per_expert=engine.all_reduce(counts))


class _StepSums(NamedTuple):
    """Sums over the passes of a step; all tensors on the device, float64 where not said otherwise.

    loss_nonfinite () and logits_nonfinite (L,) count the passes with inf or NaN. aux_losses and
    aux_coefficients (n,), and feedback (n, E) of the n layers whose routers have one: each pass by
    its share of the tokens. work_seconds (W,) has this rank's place filled. memory () GiB and
    routing.logit_max are maxima.
    """

    lm_loss_sum: Tensor
    lm_z_loss_sum: Tensor
    lm_z_coefficient: Tensor
    num_labels: Tensor
    aux_losses: Tensor
    aux_coefficients: Tensor
    feedback: Tensor
    loss_nonfinite: Tensor
    logits_nonfinite: Tensor
    work_seconds: Tensor
    memory: Tensor
    routing: RoutingSums


def add_output(sums: _StepSums | None, output: ModelOutput, *, detail: bool) -> _StepSums:
    """Add one pass's facts, without waiting for the device.

    Args: detail: whether routers are looked at.
    """
    assert output.loss is not None and output.lm_loss is not None
    assert output.num_labels is not None and output.aux_share is not None
    none = output.loss.detach().new_zeros(0, dtype=torch.float64)
    share = output.aux_share.double()
    aux = [value.detach().double() * share for value in output.aux_losses]
    coefficients = [value.double() for value in output.aux_coefficients]
    finite = [routing.logits_finite for routing in output.routings]
    feedback = [r.feedback.detach() for r in output.routings if r.feedback is not None]
    z_loss = none.new_zeros(()) if output.lm_z_loss is None else output.lm_z_loss.detach().double()
    z_weight = output.lm_z_coefficient
    now = _StepSums(
        lm_loss_sum=output.lm_loss.double() * output.num_labels,
        lm_z_loss_sum=z_loss * output.num_labels,
        lm_z_coefficient=none.new_zeros(()) if z_weight is None else z_weight.double(),
        num_labels=output.num_labels.double(),
        aux_losses=torch.stack(aux) if aux else none,
        aux_coefficients=torch.stack(coefficients) if coefficients else none,
        feedback=stack_layers(feedback, fill=0).double() * share if feedback else none,
        loss_nonfinite=1 - torch.isfinite(output.loss.detach()).double(),
        logits_nonfinite=1 - torch.stack(finite).double() if finite else none,
        work_seconds=none,
        memory=none.new_zeros(()),
        routing=routing_sums(output.routings, none.device, detail=detail),
    )
    if sums is None:
        return now
    added = [a + b for a, b in zip(sums[:-1], now[:-1], strict=True)]
    return _StepSums._make([*added, sums.routing.plus(now.routing)])


def sum_over_ranks(engine: Engine, sums: _StepSums, *, detail: bool) -> _StepSums:
    """The same over all ranks, in two messages, a third one for maxima at logged steps."""
    work = sums.num_labels.new_zeros(engine.world_size)
    # Filled on the device: assigning a Python number would wait for the copy.
    work[engine.rank : engine.rank + 1].fill_(engine.clock.seconds())
    sums = sums._replace(work_seconds=work)
    routing = sums.routing
    numbers = [*sums[:-2], routing.tokens]
    *summed, tokens = _reduced(engine, numbers)
    integers = [routing.counts, routing.dropped, routing.logit_counts]
    counts, dropped, logit_counts = _reduced(engine, integers)
    memory, logit_max = sums.memory, routing.logit_max
    if detail:
        memory = torch.full_like(memory, memory_in_use(engine.device))
        largest = engine.all_reduce(torch.cat([memory.view(1), logit_max]), maximum=True)
        memory, logit_max = largest[0], largest[1:]
    routing = RoutingSums(counts, dropped, logit_counts, tokens, logit_max)
    return _StepSums._make([*summed, memory, routing])


def _reduced(engine: Engine, tensors: list[Tensor]) -> list[Tensor]:
    """Sums over ranks of tensors of one dtype, in one message."""
    flat = engine.all_reduce(torch.cat([each.reshape(-1) for each in tensors]))
    parts = flat.split([each.numel() for each in tensors])
    return [part.view_as(each) for part, each in zip(parts, tensors, strict=True)]


def find_nonfinite(
    engine: Engine, sums: _StepSums, gradient_norm: Tensor, config: RunConfig
) -> str | None:
    """What is inf or NaN in this step, named; None if nothing. One wait for the device."""
    norm_nonfinite = 1 - torch.isfinite(gradient_norm).double()
    flags = [sums.loss_nonfinite.view(1), norm_nonfinite.view(1), sums.logits_nonfinite]
    loss, norm, *routers = torch.cat(flags).tolist()
    if not any((loss, norm, *routers)):
        return None
    for layer, nonfinite in zip(config.model.moe_layers, routers, strict=True):
        if nonfinite:
            return f"the router logits of layer {layer} are not finite"
    if loss:
        return "the loss is not finite, though every router's logits are"
    # From the loss down, the first one is where it began: everything below it is infected.
    names = engine.nonfinite_gradients()
    where = names[-1] if names else "their sum over all parameters"
    return f"the gradient is not finite, first in {where}"


def refuse_nonfinite(engine: Engine, step: int, problem: str, config: RunConfig) -> None:
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


def update_routers(
    engine: Engine, routings: tuple[Routing, ...], tokens_per_expert: Tensor, feedback: Tensor
) -> None:
    """Call each router's `after_step` with its layer's counts of the whole step, (L, E), and its
    feedback where it has one.

    Args: routings: of one pass. feedback: (n, E) of the n layers that have one, in their order.
    """
    layers = [m for m in engine.model.modules() if isinstance(m, MoELayer)]
    rows = iter(feedback)
    for layer, routing, load in zip(layers, routings, tokens_per_expert, strict=True):
        num_experts = len(routing.tokens_per_expert)
        told = None if routing.feedback is None else next(rows)[:num_experts].float()
        layer.router.after_step(load[:num_experts], told)


def router_biases(model: MoETransformer) -> Tensor | None:
    """(L, E) what routers add to their scores for the choice, NaN where one adds nothing or there
    is no such expert; None where none adds anything."""
    routers = [m.router for m in model.modules() if isinstance(m, MoELayer)]
    biases = [router.selection_bias for router in routers]
    found = [bias.detach() for bias in biases if bias is not None]
    if not found:
        return None
    nothing = found[0].new_full((1,), math.nan)
    each = [nothing if bias is None else bias.detach() for bias in biases]
    return stack_layers(each, fill=math.nan).cpu()
