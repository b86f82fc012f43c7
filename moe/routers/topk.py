"""Token-choice top-k routing: each token takes the K experts that its router scores highest.

    logits = W x,   probs = softmax(logits) or sigmoid(logits)
    weights = the K largest probs, divided by their sum if `normalize`

Optional input jitter (x * uniform(1 - j, 1 + j), training only) and loss-free balancing: a bias b
that enters the choice only, moved once per optimizer step by b_i += rate * sign(mean(c) - c_i).

Sources: Shazeer et al., arXiv 1701.06538; jitter: Switch Transformers, arXiv 2101.03961, section
2.4; loss-free bias: Wang et al., arXiv 2408.15664.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.launch import at_least_float32, no_autocast
from kernels.matmul import linear
from kernels.routing import fused_topk, weights_of
from moe.routing import RouterContext, Routing, make_routing
from moe.variants import Count, Real, VariantConfig


class Config(VariantConfig):
    """top_k experts a token; bias_update_rate 0 is no loss-free bias; jitter 0 is none."""

    name: Literal["topk"] = "topk"
    top_k: Count = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    jitter: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    bias_update_rate: Annotated[Real, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _router_gets_a_gradient(self):
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "normalize (True) with top_k (1) makes every weight 1, so the router would get no "
                "gradient; set normalize: false or top_k of at least 2"
            )
        return self


class Router(nn.Module):
    """(T, D) -> Routing. In float32 always: see `kernels.routing.fused_topk`."""

    causal = True
    fixed_k = True
    replays = True

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        # Saved and restored with the model even where nothing moves it: one layout of checkpoint.
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.expert_bias: Tensor

    @property
    def selection_bias(self) -> Tensor | None:
        """(E,) added to the scores for the choice, None where nothing is."""
        return self.expert_bias if self.config.bias_update_rate > 0 else None

    def _apply(self, fn, recurse=True):
        """Move with the model, but keep the bias in float32: bfloat16 would swallow its updates."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        # Only where the dtype changed: a bias on the meta device has no values to copy.
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        config = self.config
        with no_autocast(x):
            x = at_least_float32(x)
            if context.training and config.jitter > 0:
                noise = torch.rand(
                    x.shape, generator=context.generator, device=x.device, dtype=x.dtype
                )
                x = x * (1 + config.jitter * (2 * noise - 1))
            router_logits = linear(x, at_least_float32(self.weight))  # (T, E)
        score, normalize = config.score, config.normalize
        if context.topk_indices is not None:
            given = context.topk_indices
            chosen = weights_of(router_logits, given, score=score, normalize=normalize)
        else:
            chosen = fused_topk(
                router_logits,
                config.top_k,
                score=score,
                normalize=normalize,
                bias=self.selection_bias,
                backend=context.backend,
            )
        return make_routing(
            router_logits,
            chosen.router_probs,
            chosen.topk_weights,
            chosen.topk_indices,
            context.valid,
            logits_finite=chosen.logits_finite,
        )

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor) -> None:
        """Move the bias towards balance; call once per optimizer step.

        Args: tokens_per_expert: (E,) counts summed over ranks and accumulation steps.
        """
        if self.config.bias_update_rate > 0:
            load = tokens_per_expert.float()
            self.expert_bias += self.config.bias_update_rate * torch.sign(load.mean() - load)
