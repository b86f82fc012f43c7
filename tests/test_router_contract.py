"""Does every router in `moe/routers` keep the contract, or break it just where it says so? And does
the contract notice a router with a bug?"""

import pytest
import torch
from conftest import randn
from router_cases import CHECKS as ROUTING_CHECKS
from router_cases import D, E, T, build, maker, route
from router_step_cases import CHECKS as STEP_CHECKS
from variant_cases import variant_cases

from kernels.routing import fused_topk
from moe.router import LinearRouter, RouterModule
from moe.routing import make_routing
from moe.variants import load_variant

CHECKS = ROUTING_CHECKS | STEP_CHECKS
ROUTERS = variant_cases("routers")
NAMES = sorted({name for name, _ in ROUTERS})
CASES = [pytest.param(name, settings, id=f"{name} {settings}") for name, settings in ROUTERS]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_router_keeps_the_contract(name, settings, check):
    CHECKS[check](maker(name, settings))


@pytest.mark.parametrize("name", NAMES)
def test_router_states_source_and_causality_and_describes_its_settings(name):
    module = load_variant("routers", name)
    assert "Source" in module.__doc__
    assert "ausal" in module.__doc__, "says whether it is causal"
    assert module.Config.__doc__ and issubclass(module.Router, RouterModule)
    assert hasattr(module.Config(name=name), "top_k")
    assert set(module.Config.may_change) <= set(module.Config.model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_router_does_with_one_expert_and_with_all_of_them(name):
    fields = load_variant("routers", name).Config.model_fields
    # A top_k that is no setting but follows from others cannot be given.
    one = {"top_k": 1} if "top_k" in fields and fields["top_k"].default is not None else {}
    if "normalize" in fields and one:
        one["normalize"] = False
    routing = route(build(name, one, num_experts=1), randn(T, D, seed=9))
    assert routing.tokens_per_expert.shape == (1,)
    if one:
        every = route(build(name, {"top_k": E}), randn(T, D, seed=9))
        assert every.tokens_per_expert.tolist() == [T] * E


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_router_builds_on_meta(name, settings):
    module = load_variant("routers", name)
    with torch.device("meta"):
        router = module.Router(module.Config(name=name, **settings), D, E)
    router = router.to_empty(device="cpu")
    router.load_state_dict(build(name, settings).state_dict())
    route(router, randn(T, D, seed=9))


# ---- planted bugs, each of which one of the checks must catch


class Sound(LinearRouter):
    """Top-2 softmax, without any bug."""

    def __init__(self):
        super().__init__(None, D, E)
        self.register_float32("bias", torch.zeros(E))
        with torch.no_grad():
            self.weight.copy_(randn(E, D, seed=0))

    def scores(self, x, context):
        return self.logits(x, context)

    def forward(self, x, context):
        logits = self.scores(x, context)
        weights, indices, probs, _ = fused_topk(logits, 2, bias=self.bias)
        return make_routing(logits, probs, weights, indices, context.valid)


class Peeks(Sound):
    """A token sees the one after it."""

    def scores(self, x, context):
        rows = x.view(*context.batch_shape, -1)
        return self.logits((rows + 1e-3 * rows.roll(-1, 1)).reshape_as(x), context)


class SeesOthers(Sound):
    """The mean of the batch is in the scores; no later token of the sequence is, in evaluation."""

    def scores(self, x, context):
        rows = x.view(*context.batch_shape, -1)
        return self.logits(x + 1e-3 * rows.roll(1, 0).reshape_as(x), context)


class PeeksBesideNoise(Sound):
    """A token sees the one after it, in training only, where there is noise too."""

    def scores(self, x, context):
        logits = self.logits(x, context)
        if not context.training:
            return logits
        noise = torch.randn(logits.shape, generator=context.generator, dtype=logits.dtype)
        rows = x.view(*context.batch_shape, -1)
        later = self.logits(rows.roll(-1, 1).reshape_as(x), context)
        return logits + noise + 1e-3 * later


class DividesBySpread(Sound):
    """In training by that of the batch, which a single token has not."""

    def scores(self, x, context):
        if context.training:
            x = x - x.mean(0)
            x = x / x.norm(dim=0)
        return super().scores(x, context)


class CountsPadding(Sound):
    def forward(self, x, context):
        routing = super().forward(x, context)
        whole = super().forward(x, context._replace(valid=None))
        return routing._replace(tokens_per_expert=whole.tokens_per_expert)


class RoutesPadding(Sound):
    def forward(self, x, context):
        return super().forward(x, context._replace(valid=None))


class NarrowBias(Sound):
    def _apply(self, fn, recurse=True):
        return torch.nn.Module._apply(self, fn, recurse)


class NarrowInput(Sound):
    def logits(self, x, context, jitter=0.0):
        return torch.nn.functional.linear(x, self.weight).float()


class KeepsState(Sound):
    """The load is stored by the forward pass: recomputation and evaluation would count twice."""

    def forward(self, x, context):
        routing = super().forward(x, context)
        self.bias += 1e-3 * routing.tokens_per_expert
        return routing


class NoisyEvaluation(Sound):
    def scores(self, x, context):
        return super().scores(x, context) + torch.rand(len(x), E)


class OwnNoise(Sound):
    """Noise that no generator and no replay of the random stream reaches."""

    def scores(self, x, context):
        noise = torch.rand(len(x), E) if context.training else 0.0
        return super().scores(x, context) + noise


class OwnStream(Sound):
    """Noise of a stream that recomputation does not put back."""

    def __init__(self):
        super().__init__()
        self.stream = torch.Generator().manual_seed(0)

    def scores(self, x, context):
        noise = torch.rand(len(x), E, generator=self.stream) if context.training else 0.0
        return super().scores(x, context) + noise


class SumsFeedback(Sound):
    """Tells `after_step` the counts, and not a mean over tokens: a step in parts tells it less."""

    def forward(self, x, context):
        routing = super().forward(x, context)
        return routing._replace(feedback=routing.tokens_per_expert.float())


class ClaimsToBeWhole(Sound):
    """Says that a batch cannot be divided, and it can."""

    divisible = False


class SteepGradient(torch.autograd.Function):
    """The identity, with a gradient that is a hundredth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


class Steep(Sound):
    def scores(self, x, context):
        return SteepGradient.apply(super().scores(x, context))


class Favours(Sound):
    def scores(self, x, context):
        return super().scores(x, context) + torch.arange(E) / 10


class ByPosition(Sound):
    def scores(self, x, context):
        turn = torch.arange(len(x)).unsqueeze(-1) % E
        return super().scores(x, context) + (turn == torch.arange(E))


class Detached(Sound):
    def forward(self, x, context):
        routing = super().forward(x, context)
        return routing._replace(topk_weights=routing.topk_weights.detach().requires_grad_())


class Twice(Sound):
    def forward(self, x, context):
        routing = super().forward(x, context)
        indices = routing.topk_indices[:, :1].expand(-1, 2)
        return make_routing(
            routing.router_logits,
            routing.router_probs,
            routing.topk_weights,
            indices,
            context.valid,
        )


class HidesNan(Sound):
    def forward(self, x, context):
        return super().forward(x, context)._replace(logits_finite=torch.tensor(True))


class ClaimsNoise(Sound):
    """Says that it draws noise, and its Routing has none."""

    draws_noise = True


class ClaimsToSee(Sound):
    """Says that it is not causal, and is."""

    causal = False


class ClaimsLess(Sound):
    fixed_k = True

    def forward(self, x, context):
        routing = super().forward(x, context)
        indices = routing.topk_indices.clone()
        indices[:, 1] = torch.where(routing.topk_weights[:, 1] < 0.3, -1, indices[:, 1])
        weights = routing.topk_weights.masked_fill(indices < 0, 0)
        logits, probs = routing.router_logits, routing.router_probs
        return make_routing(logits, probs, weights, indices, context.valid)


# What must fail; where a bug shows in more than one way, others may too.
PLANTED = {
    Peeks: {"causal", "independent", "permutes_tokens"},
    SeesOthers: {"independent"},
    PeeksBesideNoise: {"causal", "independent"},
    DividesBySpread: {"small", "independent", "divisible"},
    CountsPadding: {"record"},
    RoutesPadding: {"record", "padding"},
    NarrowBias: {"state"},
    NarrowInput: {"float32"},
    KeepsState: {"evaluation", "recomputation"},
    NoisyEvaluation: {"evaluation"},
    OwnNoise: {"generator", "divisible"},
    OwnStream: {"generator", "recomputation"},
    SumsFeedback: {"divisible"},
    ClaimsToBeWhole: {"divisible"},
    Steep: {"derivative"},
    Favours: {"permutes_experts"},
    ByPosition: {"permutes_tokens"},
    Detached: {"gradient"},
    Twice: {"record"},
    HidesNan: {"nonfinite"},
    ClaimsNoise: {"record"},
    ClaimsToSee: {"causal"},
    ClaimsLess: {"record"},
}


def failures(kind) -> set[str]:
    def make(dtype=torch.float32, num_experts=E):
        return kind().to(dtype)

    failed = set()
    for name, check in CHECKS.items():
        try:
            check(make)
        except (AssertionError, RuntimeError):
            failed.add(name)
    return failed


def test_a_sound_router_passes():
    assert failures(Sound) == set()


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_the_contract_notices_a_planted_bug(kind):
    assert PLANTED[kind] <= failures(kind)
