"""ReLU routing: no top-k at all; an expert takes part where its logit is positive.

    weights = R(x) = relu(x W),   penalty = lambda * mean over tokens of sum_i f_i R_i(x)
    f_i = E / (k T) * (tokens that expert i took part for), 1 at the target, no gradient through it,
    of this forward pass: a part of a step has its own

so every weight is continuous in x. The penalty, an L1 norm that weighs more on experts with much
load, makes room: lambda moves after each optimizer step by a `factor`, up while fewer than
1 - k/E of all (token, expert) pairs are 0 and down while more are; k is `target`. A sparsity
above 1/2 takes hidden states with a direction in common: there is no bias, and around 0 each logit
is positive for half of the tokens.

Causal. Source: ReMoE, Wang et al., arXiv 2412.14711, sections 3.3 to 3.5; here with one lambda for
each layer, in place of one for all.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.launch import no_autocast
from kernels.routing import lowest_index_topk
from moe.router import LinearRouter
from moe.routing import RouterContext, Routing, make_routing
from moe.variants import Real, VariantConfig

EXAMPLES = ({"target": 1.5, "factor": 1.1, "initial_lambda": 0.01},)

# Where no lambda reaches the target it must not run away: it would be long on its way back.
LAMBDA_RANGE = (1e-10, 1e3)


class Config(VariantConfig):
    """target: mean number of experts a token; factor of lambda's steps; initial_lambda."""

    name: Literal["relu"] = "relu"
    target: Annotated[Real, Field(gt=0)] = 2.0
    factor: Annotated[Real, Field(gt=1)] = 1.2
    initial_lambda: Annotated[Real, Field(ge=LAMBDA_RANGE[0], le=LAMBDA_RANGE[1])] = 1e-8

    @property
    def top_k(self) -> None:
        """No bound: a token may take all experts."""
        return None

    @property
    def experts_per_token(self) -> float:
        """What lambda steers to; half of all before it has."""
        return self.target

    def check_experts(self, num_experts: int) -> None:
        """ValueError if the target leaves nothing to be 0."""
        if self.target >= num_experts:
            raise ValueError(
                f"model.moe.router.target ({self.target}) must be less than "
                f"model.moe.num_experts ({num_experts})"
            )


class Router(LinearRouter):
    """(T, D) -> Routing, E columns by falling weight, -1 where it is 0. In float32 always."""

    # f_i of a part, in the penalty, are the part's own.
    divisible = False
    fixed_k = False
    penalizes = True

    def __init__(self, config: Config, hidden_size: int, num_experts: int):
        super().__init__(config, hidden_size, num_experts)
        self.register_float32("penalty_weight", torch.tensor(config.initial_lambda))
        self.penalty_weight: Tensor

    def init_weights(
        self, std: float, out_std: float, seed_of: Callable[[str], torch.Generator]
    ) -> None:
        """Normal weights, and lambda as in the config."""
        nn.init.normal_(self.weight, 0, std, generator=seed_of("router.weight"))
        self.penalty_weight.fill_(self.config.initial_lambda)

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        router_logits = self.logits(x, context)  # (T, E)
        with no_autocast(x):
            activation = router_logits.relu()
            order = lowest_index_topk(router_logits.detach(), router_logits.shape[-1])  # (T, E)
            weights = activation.gather(-1, order)
            routing = make_routing(
                router_logits,
                activation,
                weights,
                order.masked_fill(weights.detach() <= 0, -1),
                context.valid,
            )
            num_tokens = routing.num_tokens.clamp(min=1)
            share = routing.tokens_per_expert / num_tokens  # (E,)
            load = share * len(share) / self.config.target
            # Not times 0: padding may hold inf.
            activation = activation.masked_fill(~routing.valid.unsqueeze(-1), 0)
            penalty = self.penalty_weight * (activation.sum(0) * load).sum() / num_tokens
        return routing._replace(penalty=penalty, feedback=share)

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, feedback: Tensor | None = None) -> None:
        """Move lambda by one step towards the target.

        Args: feedback: (E,) the share of tokens that each expert took part for.
        """
        assert feedback is not None
        # sparsity < 1 - k/E where a token has more than k experts.
        up = torch.sign(feedback.sum() - self.config.target)
        moved = self.penalty_weight * self.config.factor**up
        self.penalty_weight.copy_(moved.clamp(*LAMBDA_RANGE))
