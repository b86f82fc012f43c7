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

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import DispatchPlan, permute, plan_dispatch, unpermute
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
    plan = plan_dispatch(routing.topk_indices, routing.router_logits.shape[-1])
    return _apply_experts(experts, x, plan, routing.topk_weights, backend)


def _apply_experts(
    experts: Any, x: Tensor, plan: DispatchPlan, topk_weights: Tensor, backend: str
) -> Tensor:
    counts = plan.tokens_per_expert
    if getattr(experts, "fuses_dispatch", False):
        return experts(x, counts, plan=plan, topk_weights=topk_weights, backend=backend)
    rows = permute(x, plan)  # (R, D)
    rows = experts(rows, counts, backend=backend)  # (R, D)
    return unpermute(rows, plan, topk_weights)


def expert_parallel_dispatch(
    experts: Any,
    x: Tensor,
    routing: Routing,
    group: dist.ProcessGroup,
    *,
    backend: str = "auto",
) -> Tensor:
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
    Returns:
        (T, D).
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
    plan = plan_dispatch(routing.topk_indices, num_experts)
    ours = plan.tokens_per_expert  # (E,)
    theirs = torch.empty_like(ours)  # (E,): from rank 0 to each of our experts, from rank 1, ...
    counting = dist.all_to_all_single(theirs, ours, group=group, async_op=True)
    rows = permute(x, plan)  # (R, D), while the counts are under way
    counting.wait()
    send, receive = torch.stack([ours, theirs]).view(2, size, -1).sum(-1).tolist()
    # Rows without an assignment stay here; no token asks for them.
    staying = plan.num_rows - sum(send)
    arrived = _AllToAll.apply(rows[: sum(send)] if staying else rows, send, receive, group)
    num_local = ours.numel() // size
    expert_of_row = torch.arange(num_local, device=x.device).repeat(size)
    expert_of_row = expert_of_row.repeat_interleave(theirs, output_size=sum(receive))
    local_plan = plan_dispatch(expert_of_row.unsqueeze(-1), num_local)
    ones = routing.topk_weights.new_ones(sum(receive), 1)
    done = _apply_experts(experts, arrived, local_plan, ones, backend)
    back = _AllToAll.apply(done, receive, send, group)
    if staying:
        back = torch.cat([back, back.new_zeros(staying, back.shape[1])])
    return unpermute(back, plan, routing.topk_weights)


class _AllToAll(torch.autograd.Function):
    """Rows (R, D) to the ranks of a group, send[i] of them to rank i; gradients the other way."""

    @staticmethod
    def forward(ctx, rows, send, receive, group):
        ctx.sizes, ctx.group = (send, receive), group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad):
        send, receive = ctx.sizes
        return _exchange(grad, receive, send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
    return arrived
