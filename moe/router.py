"""What have all routers in common? What they declare of themselves, and logits in float32."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.launch import at_least_float32, no_autocast
from kernels.matmul import linear
from moe.routing import RouterContext, Routing


class RouterModule(nn.Module):
    """Base of every router: (T, D) hidden states to a Routing.

    A router whose nature breaks one of these rules says so, and `tests/test_router_contract.py`
    holds it to what it says, in either direction:

    causal: no later token plays a part in a token's choice, in training too.
    independent: no other token at all plays a part.
    permutes_tokens: tokens in another order have the same experts.
    permutes_experts: experts in another order are chosen in that order.
    fixed_k: every valid token has exactly K experts.
    learned: it has weights to learn.
    replays: it takes `context.topk_indices` in place of its own choice.
    penalizes: its Routing has a `penalty`.
    """

    causal = True
    independent = True
    permutes_tokens = True
    permutes_experts = True
    fixed_k = True
    learned = True
    replays = False
    penalizes = False

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        """The Routing of (T, D) hidden states."""
        raise NotImplementedError

    def register_float32(self, name: str, value: Tensor) -> None:
        """A buffer that stays in float32 whatever the model becomes: bfloat16 would swallow the
        small steps by which routers are balanced."""
        self.register_buffer(name, value.float())

    def _apply(self, fn: Any, recurse: bool = True) -> "RouterModule":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            # Only where the dtype changed: a buffer on the meta device has no values to copy.
            if old.dtype == torch.float32 != new.dtype:
                setattr(self, name, old.to(new.device))
        return self


class LinearRouter(RouterModule):
    """A router with one vector for each expert: logits = x W^T."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def logits(self, x: Tensor, context: RouterContext, jitter: float = 0.0) -> Tensor:
        """(T, E) float32, also under autocast and in a bfloat16 model: its scores would tie.

        Args: jitter: in training, inputs are multiplied by uniform(1 - jitter, 1 + jitter).
        """
        with no_autocast(x):
            x = at_least_float32(x)
            if context.training and jitter > 0:
                noise = torch.rand(
                    x.shape, generator=context.generator, device=x.device, dtype=x.dtype
                )
                x = x * (1 + jitter * (2 * noise - 1))
            return linear(x, at_least_float32(self.weight))
