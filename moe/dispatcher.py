"""How do tokens reach their experts and come back? Dispatch, experts and combine.

A dispatcher is called with the experts, the tokens and their Routing, and returns the combined
output. This one serves experts that all live in this process.
"""

from typing import Any

from torch import Tensor

from kernels.dispatch import permute, plan_dispatch, unpermute
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
    num_experts, weights = routing.router_logits.shape[-1], routing.topk_weights
    plan = plan_dispatch(routing.topk_indices, num_experts)
    counts = plan.tokens_per_expert
    if getattr(experts, "fuses_dispatch", False):
        return experts(x, counts, plan=plan, topk_weights=weights, backend=backend)
    rows = permute(x, plan)  # (R, D)
    rows = experts(rows, counts, backend=backend)  # (R, D)
    return unpermute(rows, plan, weights)
