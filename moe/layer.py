"""The feed-forward layers: routed experts (with shared ones beside them), and the dense baseline.

1. the router chooses K experts for each token
2. dispatch sends each token to its experts, 3. they compute, 4. combine sums their outputs
5. shared experts, which every token passes, are added
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.dispatcher import local_dispatch
from moe.modules import Linear
from moe.routing import RouterContext, Routing
from moe.variants import load_variant


class DenseFeedForward(nn.Module):
    """One network of the experts' kind for all tokens: (T, D) -> (T, D).

    y = w2 activate(w1 x, w3 x), without w3 where the experts have no gate.
    """

    def __init__(self, config: ModelConfig, intermediate_size: int):
        super().__init__()
        hidden = config.hidden_size
        self.activate = config.activate
        self.w1 = Linear(hidden, intermediate_size)
        self.w2 = Linear(intermediate_size, hidden)
        self.w3 = Linear(hidden, intermediate_size) if config.moe.experts.has_gate else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = (self.w1(x),) if self.w3 is None else (self.w1(x), self.w3(x))  # (T, F) each
        return self.w2(self.activate(*hidden))


class MoELayer(nn.Module):
    """Routed experts: (T, D) -> (T, D) and the Routing of these tokens.

    Attributes:
        first_expert, num_local_experts: the experts in this process, by global number; all of them
            here, a share of them in an expert-parallel subclass.
    """

    first_expert = 0

    def __init__(self, config: ModelConfig):
        # Not super(): a subclass may have a second base, whose constructor is none of ours.
        nn.Module.__init__(self)
        moe = config.moe
        hidden = config.hidden_size
        self.backend = config.kernel_backend
        self.router = load_variant("routers", moe.router.name).Router(
            moe.router, hidden, moe.num_experts
        )
        self.num_local_experts = moe.num_experts
        self.experts = self.build_experts(config)
        self.shared_experts = None
        if moe.num_shared_experts:
            width = moe.num_shared_experts * config.shared_intermediate_size
            self.shared_experts = DenseFeedForward(config, width)

    def build_experts(self, config: ModelConfig) -> nn.Module:
        """All experts of the layer; an expert-parallel layer builds its own share instead."""
        module = load_variant("experts", config.moe.experts.name)
        return module.Experts(
            config.moe.experts,
            config.moe.num_experts,
            config.hidden_size,
            config.moe.intermediate_size,
        )

    def dispatch(self, x: Tensor, routing: Routing, shared: Callable[[], Tensor] | None) -> Tensor:
        """Steps 2-5, `shared` computes the last; an expert-parallel layer has all-to-alls there."""
        out = local_dispatch(self.experts, x, routing, backend=self.backend)  # (T, D)
        return out if shared is None else out + shared()

    def forward(self, x: Tensor, context: RouterContext) -> tuple[Tensor, Routing]:
        routing = self.router(x, context)
        shared = None if self.shared_experts is None else partial(self.shared_experts, x)
        return self.dispatch(x, routing, shared), routing


def init_feed_forward(layer: nn.Module, std: float, out_std: float, seed_of) -> None:
    """Normal weights; each expert from a stream of its own, named by its global id.

    A router or experts with parameters that are no matrices fill them all in a method
    `init_weights(std, out_std, seed_of)` of their own.

    Args:
        std: of all matrices but those into the residual stream (`w2`), which get out_std.
        seed_of(name) -> torch.Generator.
    """
    own: dict[str, Any] = {
        name: module for name, module in layer.named_children() if hasattr(module, "init_weights")
    }
    with torch.no_grad():
        for module in own.values():
            module.init_weights(std, out_std, seed_of)
        for name, parameter in layer.named_parameters():
            if name.split(".")[0] in own:
                continue
            scale = out_std if name.split(".")[-1] == "w2" or ".w2." in f".{name}" else std
            if parameter.dim() < 3:
                parameter.normal_(0, scale, generator=seed_of(name))
                continue
            first = layer.first_expert if isinstance(layer, MoELayer) else 0
            for local, expert in enumerate(parameter):
                expert.normal_(0, scale, generator=seed_of(f"{name}.{first + local}"))
