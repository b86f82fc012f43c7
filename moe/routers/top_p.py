"""Top-p routing: an easy token takes few experts, a hard one many.

    probs = softmax(x W)
    a token takes its most probable experts, as few as sum to at least p, from 1 to `max_experts`;
    each weighs its prob, divided by their sum if `normalize`

With a `target` a controller holds the mean number of experts m of a token there, moving p after
each optimizer step by the error e = (target - m) / E:

    log(1 - p) -= proportional * (e - e before) + integral * e,   p within 0 and 1 - 1e-6

which is a PI controller written by its differences: what it moves is the integral, so nothing winds
up behind a bound. It moves log(1 - p), for where routers are sure of themselves a third or fourth
expert is a matter of the last thousandths of p, and steps of p itself would swing about them.

Causal. Sources: Huang et al., arXiv 2403.07652; control: DTop-p, arXiv 2512.13996, here of a p for
each layer and in log(1 - p), in place of one p for all layers and logits rescaled in each.
"""

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.routing import lowest_index_topk, score_of
from moe.router import ChoosingRouter
from moe.routing import RouterContext, Routing
from moe.variants import Count, Real, VariantConfig

# What float32 sums of probabilities can still tell from 1.
LEAST_REST = 1e-6

EXAMPLES = (
    {"p": 0.7, "max_experts": 3, "normalize": True},
    {"p": 0.9, "target": 2.0},
)


class Config(VariantConfig):
    """p at the start; max_experts a token, None is all; target: mean number of experts a token,
    None leaves p as it is; proportional, integral: gains of the controller, in nats of 1 - p for
    an error of all experts."""

    score: ClassVar[str] = "softmax"

    name: Literal["top_p"] = "top_p"
    p: Annotated[Real, Field(gt=0, le=1)] = 0.4
    max_experts: Count | None = None
    normalize: bool = False
    target: Annotated[Real, Field(ge=1)] | None = None
    proportional: Annotated[Real, Field(ge=0)] = 0.25
    integral: Annotated[Real, Field(gt=0)] = 0.5

    @property
    def top_k(self) -> int | None:
        """Columns of the Routing."""
        return self.max_experts

    @property
    def experts_per_token(self) -> float | None:
        """What p is steered to; None where nobody can know."""
        return self.target

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.max_experts == 1 and (self.normalize or self.target is not None):
            raise ValueError(
                "max_experts (1) leaves one expert to every token: its normalised weight would be "
                "1 without a gradient, and a target has nothing to control; set normalize: false "
                "and target: null, or max_experts of at least 2"
            )
        if self.target is None:
            for gain in ("proportional", "integral"):
                # Not whether it was set: a printed config sets the defaults, too.
                if getattr(self, gain) != type(self).model_fields[gain].default:
                    raise ValueError(f"{gain} has no effect without a target; set one or remove it")
        elif self.max_experts is not None and self.target > self.max_experts:
            raise ValueError(
                f"target ({self.target}) must not exceed max_experts ({self.max_experts})"
            )
        return self

    def check_experts(self, num_experts: int) -> None:
        """ValueError if tokens are to take more experts than there are."""
        for name in ("max_experts", "target"):
            value = getattr(self, name)
            if value is not None and value > num_experts:
                raise ValueError(
                    f"model.moe.router.{name} ({value}) must not exceed "
                    f"model.moe.num_experts ({num_experts})"
                )


class Router(ChoosingRouter):
    """(T, D) -> Routing, K = max_experts or E columns, -1 behind a token's experts. In float32."""

    fixed_k = False

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        super().__init__(config, hidden_size, num_experts)
        self.top_k = min(config.max_experts or num_experts, num_experts)
        self.register_float32("log_rest", torch.tensor(self.first_log_rest))
        self.register_float32("last_error", torch.tensor(0.0))
        self.log_rest: Tensor
        self.last_error: Tensor

    @property
    def first_log_rest(self) -> float:
        """log(1 - p) of the config."""
        return math.log(max(1 - self.config.p, LEAST_REST))

    @property
    def threshold(self) -> Tensor | float:
        """p."""
        return self.config.p if self.config.target is None else -torch.expm1(self.log_rest)

    def init_weights(
        self, std: float, out_std: float, seed_of: Callable[[str], torch.Generator]
    ) -> None:
        """Normal weights, and p as in the config."""
        nn.init.normal_(self.weight, 0, std, generator=seed_of("router.weight"))
        self.log_rest.fill_(self.first_log_rest)
        self.last_error.zero_()

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        routing = super().forward(x, context)
        if self.config.target is None:
            return routing
        share = routing.tokens_per_expert / routing.num_tokens.clamp(min=1)  # (E,)
        return routing._replace(feedback=share)

    def choose(self, router_logits: Tensor, context: RouterContext) -> Tensor:
        """(T, K) experts by falling probability, -1 behind the last that is needed."""
        order = lowest_index_topk(router_logits, self.top_k)  # (T, K)
        probs = score_of(router_logits, "softmax").gather(-1, order)
        # An expert is needed where those before it do not reach p.
        before = probs.cumsum(-1)[:, :-1]
        enough = torch.zeros_like(order, dtype=torch.bool)
        enough[:, 1:] = ~(before < self.threshold)
        return order.masked_fill(enough, -1)

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, feedback: Tensor | None = None) -> None:
        """Move p towards the target.

        Args: feedback: (E,) the share of tokens that took each expert, None without a target.
        """
        if self.config.target is None or feedback is None:
            return
        mean = feedback.sum()
        error = (self.config.target - mean) / len(feedback)
        change = self.config.proportional * (error - self.last_error) + self.config.integral * error
        # Every token takes an expert: a mean of 0 is a step without tokens.
        empty = mean == 0
        moved = (self.log_rest - change).clamp(math.log(LEAST_REST), 0)
        self.log_rest.copy_(torch.where(empty, self.log_rest, moved))
        self.last_error.copy_(torch.where(empty, self.last_error, error))
