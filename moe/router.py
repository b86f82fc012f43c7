"""What have all routers in common? What they declare of themselves, logits in float32, and how a
choice of experts becomes a Routing."""

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from kernels.launch import at_least_float32, no_autocast
from kernels.matmul import linear
from kernels.routing import TopK, fused_topk, weights_of
from moe.routing import RouterContext, Routing, make_routing, noise_like, uniform_routing
from moe.variants import Count, VariantConfig

# How logits become scores, `kernels.routing.SCORES`.
Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
# What every choice of experts keeps but where it says otherwise, see `RouterModule`.
RULES = ("causal", "independent", "divisible", "permutes_tokens", "permutes_experts", "fixed_k")


class RouterModule(nn.Module):
    """Base of every router: (T, D) hidden states to a Routing.

    A router whose nature breaks one of these rules says so, and `tests/test_router_contract.py`
    holds it to what it says, in either direction:

    causal: no later token plays a part in a token's choice, in training too.
    independent: no other token at all plays a part.
    divisible: sequences that are routed in parts, with the noise of their own seeds, have the same
    experts as together, and the means over parts of penalty and feedback are those of the whole.
    permutes_tokens: tokens in another order have the same experts.
    permutes_experts: experts in another order are chosen in that order.
    fixed_k: every valid token has exactly K experts.
    learned: it has weights to learn.
    replays: it takes `context.topk_indices` in place of its own choice.
    penalizes: its Routing has a `penalty`.
    draws_noise: its Routing has `noise_std` and `selection_logits`.
    """

    causal = True
    independent = True
    divisible = True
    permutes_tokens = True
    permutes_experts = True
    fixed_k = True
    learned = True
    replays = False
    penalizes = False
    draws_noise = False

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        """The Routing of (T, D) hidden states."""
        raise NotImplementedError

    @property
    def selection_bias(self) -> Tensor | None:
        """(E,) added to the scores for the choice, None where nothing is."""
        return None

    def after_step(self, tokens_per_expert: Tensor, feedback: Tensor | None = None) -> None:
        """Called once after each optimizer step.

        Args: tokens_per_expert: (E,) choices of the whole step, over ranks and passes; feedback:
            (E,) that of the Routing, the mean over the step's tokens, None where it has none.
        """

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

    def __init__(self, config: Any, hidden_size: int, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def logits(self, x: Tensor, context: RouterContext, jitter: float = 0.0) -> Tensor:
        """(T, E) float32, also under autocast and in a bfloat16 model: its scores would tie.

        Args: jitter: in training, inputs are multiplied by uniform(1 - jitter, 1 + jitter).
        """
        with no_autocast(x):
            x = at_least_float32(x)
            if context.training and jitter > 0:
                x = x * (1 + jitter * (2 * noise_like(x, context, Tensor.uniform_) - 1))
            return linear(x, at_least_float32(self.weight))


def topk_or_given(
    router_logits: Tensor,
    context: RouterContext,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    bias: Tensor | None = None,
    groups: tuple[int, int] | None = None,
) -> TopK:
    """The K best experts, or those of `context.topk_indices`, and their weights.

    Args: as in `kernels.routing.fused_topk`; bias and groups play no part where experts are given.
    """
    given = context.topk_indices
    if given is not None:
        return weights_of(router_logits, given, score=score, normalize=normalize)
    return fused_topk(
        router_logits,
        top_k,
        score=score,
        normalize=normalize,
        bias=bias,
        groups=groups,
        backend=context.backend,
    )


def routing_of(
    router_logits: Tensor, chosen: TopK, context: RouterContext, **further: Tensor | None
) -> Routing:
    """The Routing of weighted experts.

    Args: further: the optional arguments of `moe.routing.make_routing`.
    """
    return make_routing(
        router_logits,
        chosen.router_probs,
        chosen.topk_weights,
        chosen.topk_indices,
        context.valid,
        logits_finite=chosen.logits_finite,
        **further,
    )


def refuse_constant_weight(top_k: int | None, normalize: bool, setting: str = "top_k") -> None:
    """ValueError on settings with which the language model's loss never reaches the router.

    Args: setting: the name of the setting that holds `top_k`.
    """
    if top_k == 1 and normalize:
        raise ValueError(
            f"normalize (True) with {setting} (1) makes every weight 1, so the router would get no "
            f"gradient; set normalize: false or {setting} of at least 2"
        )


class ChoosingRouter(LinearRouter):
    """A router that chooses by `choose`, and weighs by scores at these experts: its Config has
    `score` and `normalize`, as settings or as constants."""

    replays = True

    def choose(self, router_logits: Tensor, context: RouterContext) -> Tensor:
        """(T, K) int64 experts of (T, E) logits without a gradient, -1 for no assignment."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        config = self.config
        router_logits = self.logits(x, context)  # (T, E)
        indices = context.topk_indices
        if indices is None:
            indices = self.choose(router_logits.detach(), context)
        chosen = weights_of(router_logits, indices, score=config.score, normalize=config.normalize)
        return routing_of(router_logits, chosen, context)


class AssignedConfig(VariantConfig):
    """Settings of an `AssignedRouter`: top_k experts a token; their weights, 1/K each, or learned
    scores at these experts; without `normalize` 1 each, or the scores as they are."""

    top_k: Count = 2
    weights: Literal["uniform", "learned"] = "uniform"
    score: Score = "softmax"
    normalize: bool = True

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.weights == "learned":
            refuse_constant_weight(self.top_k, self.normalize)
        elif self.score != "softmax":
            raise ValueError(
                f"score ({self.score}) has no effect with weights (uniform); remove it, or set "
                f"weights: learned"
            )
        return self


class AssignedRouter(LinearRouter):
    """A router whose experts follow from a rule; scores, if any, only weigh them."""

    permutes_experts = False
    replays = True

    def __init__(self, config: AssignedConfig, hidden_size: int, num_experts: int):
        super().__init__(config, hidden_size, num_experts)
        self.learned = config.weights == "learned"
        if not self.learned:
            del self.weight

    def assign(self, x: Tensor, context: RouterContext) -> Tensor:
        """(T, K) int64 experts of (T, D) hidden states."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: RouterContext) -> Routing:
        config = self.config
        indices = context.topk_indices
        if indices is None:
            indices = self.assign(x, context)
        if not self.learned:
            weight = 1 / config.top_k if config.normalize else 1.0
            return uniform_routing(x, indices, self.num_experts, weight, context.valid)
        router_logits = self.logits(x, context)  # (T, E)
        chosen = weights_of(router_logits, indices, score=config.score, normalize=config.normalize)
        return routing_of(router_logits, chosen, context)
