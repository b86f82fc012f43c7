"""The feed-forward layers: routed experts (with shared ones beside them), and the dense baseline.

1. the router chooses K experts for each token; a capacity may drop some
2. dispatch sends each token to its experts, 3. they compute, 4. combine sums their outputs, and
   copy and constant experts, which cost nothing, add theirs
5. shared experts, which every token passes, are added, by a learned gate if there is one

Latent experts (LatentMoE, arXiv 2601.18089) work in l < D dimensions: one matrix before step 2 and
one after step 4, so that l numbers a row are sent.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe.capacity import limit_to_capacity
from moe.config import SHARED_GATE_WIDTHS, ModelConfig
from moe.dispatcher import local_dispatch
from moe.modules import Linear
from moe.routing import RouterContext, Routing
from moe.variants import load_variant
from moe.zero_computation import ZeroComputationExperts, networks_only


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
        zero_computation: copy and constant experts; None without any.
        latent_down, latent_up: D -> l and l -> D around the experts; None without a latent_size.
        shared_gate: D -> 1 or 2 numbers that weight the shared experts; None without one.
    """

    first_expert = 0

    def __init__(self, config: ModelConfig):
        # Not super(): a subclass may have a second base, whose constructor is none of ours.
        nn.Module.__init__(self)
        moe = config.moe
        hidden = config.hidden_size
        self.backend = config.kernel_backend
        self.capacity_factor = moe.capacity_factor
        self.eval_capacity_factor = moe.eval_capacity_factor
        self.drop_priority = moe.drop_priority
        self.router = load_variant("routers", moe.router.name).Router(
            moe.router, hidden, moe.num_choices
        )
        self.num_experts = self.num_local_experts = moe.num_experts
        self.experts = self.build_experts(config)
        self.num_choices, self.zero_computation = moe.num_choices, None
        # Zero experts alone have nothing to add.
        if moe.num_copy_experts or moe.num_constant_experts:
            self.zero_computation = ZeroComputationExperts(
                hidden, moe.num_experts, *moe.zero_computation
            )
        latent = moe.latent_size
        self.latent_down = None if latent is None else Linear(hidden, latent)
        self.latent_up = None if latent is None else Linear(latent, hidden)
        self.shared_experts = None
        if moe.num_shared_experts:
            width = moe.num_shared_experts * config.shared_intermediate_size
            self.shared_experts = DenseFeedForward(config, width)
        gate_width = SHARED_GATE_WIDTHS[moe.shared_gate]
        self.shared_gate = Linear(hidden, gate_width) if gate_width else None

    def build_experts(self, config: ModelConfig) -> nn.Module:
        """All experts of the layer; an expert-parallel layer builds its own share instead."""
        module = load_variant("experts", config.moe.experts.name)
        return module.Experts(
            config.moe.experts,
            config.moe.num_experts,
            config.expert_hidden_size,
            config.moe.intermediate_size,
        )

    def dispatch(
        self, x: Tensor, routing: Routing, shared: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Steps 2-4, and what `shared` computes; an expert-parallel layer has all-to-alls there.

        Args: x: (T, D), or (T, l) of latent experts. Returns: the same of the experts; (T, D).
        """
        routed = local_dispatch(self.experts, x, routing, backend=self.backend)
        return routed, None if shared is None else shared()

    def forward(self, x: Tensor, context: RouterContext) -> tuple[Tensor, Routing]:
        routing = self.router(x, context)
        factor = self.capacity_factor if context.training else self.eval_capacity_factor
        if factor is not None:
            routing = limit_to_capacity(
                routing, factor, self.drop_priority, context, num_bounded=self.num_experts
            )
        shared = None if self.shared_experts is None else partial(self.shared_experts, x)
        computed = routing
        if self.num_choices > self.num_experts:
            computed = networks_only(routing, self.num_experts)
        read = x if self.latent_down is None else self.latent_down(x)  # (T, l)
        routed, beside = self.dispatch(read, computed, shared)
        if self.latent_up is not None:
            routed = self.latent_up(routed)  # (T, D)
        if self.zero_computation is not None:
            routed = routed + self.zero_computation(x, routing)
        return routed if beside is None else self.add_shared(x, routed, beside), routing

    def add_shared(self, x: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
        """Step 5, see `shared_gate` of `moe.config.MoEConfig`; all (T, D)."""
        if self.shared_gate is None:
            return routed + shared
        logits = self.shared_gate(x)  # (T, 1) or (T, 2)
        if logits.shape[-1] == 1:
            return routed + logits.sigmoid() * shared
        # In the dtype of the matmuls, as in DeepSpeed: autocast would leave all in float32.
        coefficients = logits.softmax(-1).to(logits.dtype)
        return routed * coefficients[:, :1] + shared * coefficients[:, 1:]


def init_feed_forward(layer: nn.Module, std: float, out_std: float, seed_of) -> None:
    """Normal weights; each expert from a stream of its own, named by its global id.

    A router or experts with parameters that are no matrices fill them all in a method
    `init_weights(std, out_std, seed_of)` of their own.

    Args:
        std: of all matrices but those into the residual stream, which get out_std: `w2`, and of
            latent experts `latent_up` in place of theirs.
        seed_of(name) -> torch.Generator.
    """
    latent = getattr(layer, "latent_up", None) is not None
    own: dict[str, Any] = {
        name: module for name, module in layer.named_children() if hasattr(module, "init_weights")
    }
    with torch.no_grad():
        for child, module in own.items():
            into_stream = not (latent and child == "experts")
            module.init_weights(std, out_std if into_stream else std, seed_of)
        for name, parameter in layer.named_parameters():
            child, *rest = name.split(".")
            if child in own:
                continue
            into_stream = "w2" in (child, *rest) and not (latent and child == "experts")
            scale = out_std if into_stream or child == "latent_up" else std
            if parameter.dim() < 3:
                parameter.normal_(0, scale, generator=seed_of(name))
                continue
            first = layer.first_expert if isinstance(layer, MoELayer) else 0
            for local, expert in enumerate(parameter):
                expert.normal_(0, scale, generator=seed_of(f"{name}.{first + local}"))
