"""How do tokens reach their experts and come back? Dispatch, experts and combine.

A dispatcher is called with the experts, the tokens and their Routing, and returns the combined
output. `local_dispatch` serves experts that all live in this process; `expert_parallel_dispatch`
those that are shared out over the ranks of a process group: two uneven all-to-alls around the local
one, without a capacity, padding or a dropped token.

    two ranks, four experts: rank 0 holds 0 and 1            rank 0          rank 1
    permute         rows sorted by global expert             [0 0 1 2 2 3]   [0 1 1 3]
    all-to-all      to the expert's rank, by source          [0 0 1|0 1 1]   [2 2 3|3]
    local dispatch  each row a token with one expert         sorted by the kernels' own gather
    all-to-all      back, the same sizes the other way
    unpermute       sum over K, weighted by the router
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import DispatchPlan, permute, plan_dispatch, unpermute
from kernels.launch import first_derivative_only
from moe.routing import Routing


def local_dispatch(experts: Any, x: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
    """Send tokens to local experts and sum the results, weighted by the router.

    Args:
        experts: a module as in `moe.variants`, always called as a module: sharding engines gather
            its parameters in hooks of that call.
        x: (T, D).
        routing: of the same tokens.
        backend: of the kernels.
    Returns:
        (T, D).
    """
    num_experts = routing.router_logits.shape[-1]
    plan = plan_dispatch(routing.topk_indices, num_experts, backend=backend)
    return _apply_experts(experts, x, plan, routing.topk_weights, backend)


def _apply_experts(
    experts: Any, x: Tensor, plan: DispatchPlan, topk_weights: Tensor, backend: str
) -> Tensor:
    counts = plan.tokens_per_expert
    if getattr(experts, "fuses_dispatch", False):
        return experts(x, counts, plan=plan, topk_weights=topk_weights, backend=backend)
    rows = permute(x, plan, backend=backend)  # (R, D)
    rows = experts(rows, counts, backend=backend)  # (R, D)
    return unpermute(rows, plan, topk_weights, backend=backend)


def expert_parallel_dispatch(
    experts: Any,
    x: Tensor,
    routing: Routing,
    group: dist.ProcessGroup,
    *,
    backend: str = "auto",
    meanwhile: Callable[[], Tensor] | None = None,
    waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> tuple[Tensor, Tensor | None]:
    """Send tokens to the ranks that hold their experts, and sum what comes back.

    Rank r of the group holds experts r * E/N to (r + 1) * E/N - 1. Every rank of the group must
    call this the same number of times, whatever tokens it has; so must their backward passes.
    The host waits for the device once, for the sizes of both messages.

    Args:
        experts: the experts of this rank, a module as in `moe.variants`.
        x: (T, D), T may differ between ranks, and be 0.
        routing: of the same tokens, over all E experts.
        group: of N ranks; N divides E.
        backend: of the kernels.
        meanwhile: computes something else from tokens that stay here, such as shared experts:
            called while the rows travel, and likewise backward.
        waiting: a block in which other ranks are waited for, so that one can time it.
    Returns:
        (T, D); and what `meanwhile` returned, None without it.
    Raises:
        ValueError: if N does not divide E.
    """
    size = dist.get_world_size(group)
    num_experts = routing.router_logits.shape[-1]
    if num_experts % size:
        raise ValueError(
            f"expert_parallel_dispatch: group has {size} ranks, must divide the experts "
            f"({num_experts})"
        )
    plan = plan_dispatch(routing.topk_indices, num_experts, backend=backend)
    ours = plan.tokens_per_expert  # (E,)
    theirs = torch.empty_like(ours)  # (E,): from rank 0 to each of our experts, from rank 1, ...
    counting = dist.all_to_all_single(theirs, ours, group=group, async_op=True)
    rows = permute(x, plan, backend=backend)  # (R, D), while the counts are under way
    _wait(counting, waiting)
    send, receive = torch.stack([ours, theirs]).view(2, size, -1).sum(-1).tolist()
    # Rows without an assignment stay here; no token asks for them.
    staying = plan.num_rows - sum(send)
    there = _Exchange(send, receive, group, waiting)
    arrived = _Depart.apply(rows[: sum(send)] if staying else rows, there)
    beside = None if meanwhile is None else meanwhile()
    arrived = _Arrive.apply(arrived, there)
    num_local = ours.numel() // size
    expert_of_row = torch.arange(num_local, device=x.device).repeat(size)
    expert_of_row = expert_of_row.repeat_interleave(theirs, output_size=sum(receive))
    local_plan = plan_dispatch(expert_of_row.unsqueeze(-1), num_local, backend=backend)
    ones = routing.topk_weights.new_ones(sum(receive), 1)
    done = _apply_experts(experts, arrived, local_plan, ones, backend)
    home = _Exchange(receive, send, group, waiting)
    back = _Arrive.apply(_Depart.apply(done, home), home)
    if staying:
        back = torch.cat([back, back.new_zeros(staying, back.shape[1])])
    return unpermute(back, plan, routing.topk_weights, backend=backend), beside


# Whoever compiles the model need not look into the clock.
@torch.compiler.disable
def _wait(work: Any, waiting: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    with waiting():
        work.wait()


class _Exchange:
    """Rows (R, D) to the ranks of a group, send[i] of them to rank i; gradients the other way."""

    def __init__(
        self,
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
        waiting: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        self.send, self.receive, self.group, self.waiting = send, receive, group, waiting
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, gradients: bool = False) -> Tensor:
        """The rows that will have arrived after `wait`, or gradients on their way back."""
        send, receive = self.send, self.receive
        if gradients:
            send, receive = receive, send
        rows = rows.contiguous()
        arrived = rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(arrived, rows, receive, send, group=self.group, async_op=True)
        self._under_way = work, rows, arrived
        return arrived

    def wait(self) -> Tensor:
        assert self._under_way is not None
        work, _, arrived = self._under_way
        _wait(work, self.waiting)
        self._under_way = None
        return arrived


# Two functions, so that others run while rows are under way, in the backward pass too: that of
# `_Arrive` sends the gradients off, that of `_Depart` waits for them.
class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange):
        ctx.exchange = exchange
        return exchange.start(rows)

    @staticmethod
    @first_derivative_only
    def backward(ctx, _grad):
        return ctx.exchange.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arrived, exchange):
        ctx.exchange = exchange
        exchange.wait()
        return arrived.view_as(arrived)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        ctx.exchange.start(grad, gradients=True)
        # Of the shape that autograd wants; `_Depart` takes what comes from the other ranks.
        return grad, None
