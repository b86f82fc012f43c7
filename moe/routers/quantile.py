"""Quantile balancing: a price for each expert, at which every expert is wanted equally often.

    probs s = softmax, sigmoid or sqrt(softplus) of x W
    alpha_t = the (K + 1)-th largest over experts of s[t] - beta
    beta_e = between the T K / E-th and the next largest over tokens of s[:, e] - alpha,   in turns
    choose the K largest of s - beta;  weights are s of the chosen, divided by their sum

Alpha and beta are the prices of the assignment problem: exactly T K / E tokens want each expert
where neither moves any more. There is no rate and no coefficient. `source` says whose beta counts:

    previous   that of the batches before, moved once per optimizer step: no token sees another
    batch      in training that of the batch itself, so a choice depends on later tokens; evaluation
               takes that of the batches before, as the only one that a token at a time can have

Causal with `previous`, not causal with `batch`. Sources: quantile balancing of Megatron-LM
(moe_utils.py) and OpenAthena; kexue.fm 11626; the dual of BASE layers, arXiv 2103.16716.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.launch import no_autocast
from kernels.routing import score_of
from moe.router import LinearRouter, Score, refuse_constant_weight, routing_of, topk_or_given
from moe.routing import RouterContext, Routing
from moe.variants import Count, Real, VariantConfig

EXAMPLES = (
    {"top_k": 3, "score": "softmax", "decay": 0.5},
    {"source": "batch"},
    {"top_k": 1, "normalize": False, "num_iterations": 1},
)


class Config(VariantConfig):
    """top_k experts a token; num_iterations of alpha and beta in a batch; decay: what stays of the
    old beta in a step, 0 takes the last batch's."""

    name: Literal["quantile"] = "quantile"
    top_k: Count = 2
    score: Score = "sigmoid"
    normalize: bool = True
    source: Literal["previous", "batch"] = "previous"
    num_iterations: Count = 8
    decay: Annotated[Real, Field(ge=0, lt=1)] = 0.0

    @property
    def causal(self) -> bool:
        """Only with another batch's beta."""
        return self.source == "previous"

    @model_validator(mode="after")
    def _router_learns(self):
        refuse_constant_weight(self.top_k, self.normalize)
        return self


def balancing_prices(
    scores: Tensor, top_k: int, valid: Tensor | None, start: Tensor, num_iterations: int
) -> Tensor:
    """beta (E,), shifted to mean 0, which changes no choice; from `start` (E,), so often in turns.

    Half-way between the last token that is to have an expert and the first that is not: at the
    latter itself that token would waver between two experts to the bit. `start` itself where there
    are fewer assignments than experts, or every token takes every expert.

    Args: scores: (T, E); valid: (T,) bool or None.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0 or top_k == num_experts:
        return start
    by_expert = scores.nan_to_num().T.contiguous()  # (E, T)
    count = torch.full((1,), num_tokens, device=scores.device)
    if valid is not None:
        count = valid.sum().view(1)
    # Between places T K / E - 1 and T K / E in falling order, from 0.
    share = (count * top_k // num_experts).clamp(min=1, max=num_tokens - 1)
    places = torch.cat([share - 1, share]).clamp(min=0).expand(num_experts, 2)
    # The highest place that padding can leave, known without a wait for the device.
    num_read = min(num_tokens, max(1, num_tokens * top_k // num_experts) + 1)
    beta = start
    for _ in range(num_iterations):
        alpha = (by_expert - beta.unsqueeze(-1)).topk(top_k + 1, dim=0).values[-1]  # (T,)
        wanted = by_expert - alpha  # (E, T)
        if valid is not None:
            wanted = wanted.masked_fill(~valid, -torch.inf)
        beta = wanted.topk(num_read, dim=-1).values.gather(-1, places).mean(-1)  # (E,)
        beta = beta - beta.mean()
    return torch.where(count * top_k >= num_experts, beta, start)


class Router(LinearRouter):
    """(T, D) -> Routing. In float32 always."""

    # The mean of the betas of two parts is not the beta of both.
    divisible = False
    replays = True

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        super().__init__(config, hidden_size, num_experts)
        self.causal = self.independent = config.causal
        # -beta, under the name by which biases of the choice are known.
        self.register_float32("expert_bias", torch.zeros(num_experts))
        self.expert_bias: Tensor

    @property
    def selection_bias(self) -> Tensor:
        """(E,) added to the scores for the choice: -beta of the batches before."""
        return self.expert_bias

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        config = self.config
        router_logits = self.logits(x, context)  # (T, E)
        bias, feedback = self.expert_bias, None
        if context.training:
            with torch.no_grad(), no_autocast(x):
                scores = score_of(router_logits, config.score)
                start = -self.expert_bias.to(scores.dtype)
                beta = balancing_prices(
                    scores, config.top_k, context.valid, start, config.num_iterations
                )
            feedback = beta
            if config.source == "batch":
                bias = -beta
        chosen = topk_or_given(
            router_logits,
            context,
            config.top_k,
            score=config.score,
            normalize=config.normalize,
            bias=bias,
        )
        return routing_of(router_logits, chosen, context, feedback=feedback)

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, feedback: Tensor | None = None) -> None:
        """Take over the batch's beta.

        Args: feedback: (E,) beta, the mean over passes and ranks.
        """
        assert feedback is not None
        self.expert_bias.lerp_(-feedback.float(), 1 - self.config.decay)
