"""How do tokens reach their experts and come back? Dispatch, experts and combine.

A dispatcher is called with the experts, the tokens and their Routing, and returns the combined
output. This one serves experts that all live in this process.
"""

from typing import Any

from torch import Tensor

from kernels.dispatch import permute, plan_dispatch, unpermute
from moe.routing import Routing


def local_dispatch(experts: Any, x: Tensor, routing: Routing) -> Tensor:
    """Send tokens to local experts and sum the results, weighted by the router.

    Args:
        experts: a module `forward(rows, tokens_per_expert)`; where it has `fused(x, plan,
            topk_weights)`, that does all three steps at once.
        x: (T, D).
        routing: of the same tokens.
    Returns:
        (T, D).
    """
    num_experts = routing.router_logits.shape[-1]
    plan = plan_dispatch(routing.topk_indices, num_experts)
    if hasattr(experts, "fused"):
        return experts.fused(x, plan, routing.topk_weights)
    rows = permute(x, plan)  # (R, D)
    rows = experts(rows, plan.tokens_per_expert)  # (R, D)
    return unpermute(rows, plan, routing.topk_weights)
