"""Token-choice top-k routing: each token takes the K experts that its router scores highest.

    logits = W x + d,   probs = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
    weights = scale * the K largest probs, divided by their sum if `normalize`

Softmax over the K chosen logits alone (Mixtral, gpt-oss) is `softmax` with `normalize`: the two are
one function. Optional: d (E,), learned with `logit_bias` and else 0; input jitter
(x * uniform(1 - j, 1 + j), training only); a limit to the best `groups_per_token` of `num_groups`
groups of neighbouring experts, of which a group scores the sum of its best two (experts of one rank
form a group: then a token travels to so many ranks at most); loss-free balancing, a bias b that
enters the choice only, moved once per optimizer step by b_i += rate * sign(mean(c) - c_i), and with
`bias_centered` shifted to mean 0 after it.

Causal. Sources: Shazeer et al., arXiv 1701.06538; jitter: Switch Transformers, arXiv 2101.03961,
section 2.4; loss-free bias: Wang et al., arXiv 2408.15664; sigmoid, groups, scale: DeepSeek-V3,
arXiv 2412.19437, section 2.1.2; sqrt(softplus): DeepSeek-V4; centring: Ling 3; logit bias:
gpt-oss, arXiv 2508.10925.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moe.router import LinearRouter, Score, refuse_constant_weight, routing_of, topk_or_given
from moe.routing import RouterContext, Routing
from moe.variants import Count, Real, VariantConfig

EXAMPLES = (
    {"top_k": 3, "score": "sigmoid", "bias_update_rate": 0.01, "bias_centered": True},
    {"top_k": 1, "normalize": False, "jitter": 0.3},
    {"score": "sqrt_softplus", "scale": 2.5},
    {"top_k": 2, "num_groups": 3, "groups_per_token": 2},
    {"top_k": 4, "logit_bias": True},
)


class Config(VariantConfig):
    """top_k experts a token; scale of the weights; logit_bias: whether logits have a learned bias;
    jitter 0 is none; num_groups None is no limit; bias_update_rate None is no loss-free bias, and 0
    leaves the bias where training has moved it: a run may change it when it goes on, such as to 0
    for its last part (DeepSeek-V3, section 4.2)."""

    may_change: ClassVar[tuple[str, ...]] = ("bias_update_rate",)

    name: Literal["topk"] = "topk"
    top_k: Count = 2
    score: Score = "softmax"
    normalize: bool = True
    scale: Annotated[Real, Field(gt=0)] = 1.0
    logit_bias: bool = False
    jitter: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    num_groups: Count | None = None
    groups_per_token: Count | None = None
    bias_update_rate: Annotated[Real, Field(ge=0)] | None = None
    bias_centered: bool = False

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        refuse_constant_weight(self.top_k, self.normalize)
        if (self.num_groups is None) != (self.groups_per_token is None):
            raise ValueError(
                f"num_groups ({self.num_groups}) and groups_per_token ({self.groups_per_token}) "
                f"limit the choice together; give both or neither"
            )
        # At a rate of 0 nothing is centred, but a run that goes on to it keeps its other settings.
        if self.bias_centered and self.bias_update_rate is None:
            raise ValueError(
                "bias_centered (True) has no effect while bias_update_rate is None; set a rate"
            )
        return self

    def check_experts(self, num_experts: int) -> None:
        """ValueError if the groups do not fit the experts."""
        if self.num_groups is None or self.groups_per_token is None:
            return
        fits = num_experts % self.num_groups == 0 and self.groups_per_token <= self.num_groups
        if not fits or num_experts // self.num_groups * self.groups_per_token < self.top_k:
            raise ValueError(
                f"model.moe.router.num_groups ({self.num_groups}) must divide "
                f"model.moe.num_experts ({num_experts}), and groups_per_token "
                f"({self.groups_per_token}) of them hold top_k ({self.top_k}) experts"
            )


class Router(LinearRouter):
    """(T, D) -> Routing. In float32 always."""

    replays = True

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        super().__init__(config, hidden_size, num_experts)
        if config.logit_bias:
            self.logit_bias = nn.Parameter(torch.empty(num_experts))
        # Saved and restored with the model even where nothing moves it: one layout of checkpoint.
        self.register_float32("expert_bias", torch.zeros(num_experts))
        self.expert_bias: Tensor

    @property
    def selection_bias(self) -> Tensor | None:
        """(E,) added to the scores for the choice, None where nothing is."""
        return None if self.config.bias_update_rate is None else self.expert_bias

    def init_weights(
        self, std: float, out_std: float, seed_of: Callable[[str], torch.Generator]
    ) -> None:
        """Normal weights, and a logit bias of 0."""
        nn.init.normal_(self.weight, 0, std, generator=seed_of("router.weight"))
        if self.config.logit_bias:
            nn.init.zeros_(self.logit_bias)

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        config = self.config
        router_logits = self.logits(x, context, config.jitter)  # (T, E)
        if config.logit_bias:
            router_logits = router_logits + self.logit_bias
        groups = None
        if config.num_groups is not None and config.groups_per_token is not None:
            groups = config.num_groups, config.groups_per_token
        chosen = topk_or_given(
            router_logits,
            context,
            config.top_k,
            score=config.score,
            normalize=config.normalize,
            bias=self.selection_bias,
            groups=groups,
        )
        if config.scale != 1:
            chosen = chosen._replace(topk_weights=chosen.topk_weights * config.scale)
        return routing_of(router_logits, chosen, context)

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, feedback: Tensor | None = None) -> None:
        """Move the bias towards balance."""
        if self.config.bias_update_rate:
            load = tokens_per_expert.float()
            self.expert_bias += self.config.bias_update_rate * torch.sign(load.mean() - load)
            if self.config.bias_centered:
                self.expert_bias -= self.expert_bias.mean()
