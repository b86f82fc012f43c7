"""What every router has to keep, as functions that raise AssertionError: for the contract of the
files in `moe/routers`, and for routers with planted bugs, which they must catch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from conftest import randn, relative_error
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from moe.routing import RouterContext, Routing
from moe.variants import load_variant

T, D, E = 24, 10, 6
SHAPE = (3, 8)
# How far a token's weights may move when other tokens change, in float64.
ROUNDING = 1e-10
# What a violation is at least.
LEAK = 1e-6

Make = Callable[..., Any]


def build(name: str, settings: dict[str, Any], dtype=torch.float32, num_experts: int = E) -> Any:
    """A router whose weights are drawn from a seed."""
    module = load_variant("routers", name)
    router = module.Router(module.Config(name=name, **settings), D, num_experts)
    with torch.no_grad():
        for seed, parameter in enumerate(router.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return router.to(dtype)


def maker(name: str, settings: dict[str, Any]) -> Make:
    return lambda dtype=torch.float32, num_experts=E: build(name, settings, dtype, num_experts)


def context(valid=None, training=False, generator=None, shape=SHAPE, ids=None) -> RouterContext:
    num_tokens = shape[0] * shape[1]
    return RouterContext(
        token_ids=torch.arange(num_tokens) % 5 if ids is None else ids,
        document_ids=torch.zeros(num_tokens, dtype=torch.int32),
        valid=valid,
        batch_shape=shape,
        training=training,
        generator=generator,
    )


def route(router: Any, x: Tensor, **options: Any) -> Routing:
    """A routing whose noise, if any, is drawn from one seed."""
    generator = torch.Generator().manual_seed(0) if options.get("training") else None
    return router(x, context(generator=generator, **options))


def is_noisy(make: Make) -> bool:
    router, x = make(), randn(T, D, seed=9)

    def drawn(seed: int) -> Routing:
        generator = torch.Generator().manual_seed(seed)
        return router(x, context(training=True, generator=generator))

    one, other = drawn(1), drawn(2)
    pairs = ((one.topk_weights, other.topk_weights), (one.topk_indices, other.topk_indices))
    return not all(torch.equal(*pair) for pair in pairs)


def modes(make: Make) -> Iterator[bool]:
    """`training` False, and True where no noise tells places of tokens or experts apart."""
    yield False
    if not is_noisy(make):
        yield True


def assert_consistent(routing: Routing, num_tokens: int, num_valid: int, num_experts: int) -> None:
    """Shapes, dtypes, counts and weights of one Routing."""
    top_k = routing.topk_indices.shape[1]
    assert routing.router_logits.shape == routing.router_probs.shape == (num_tokens, num_experts)
    assert routing.topk_weights.shape == routing.topk_indices.shape == (num_tokens, top_k)
    floats = (routing.router_logits, routing.router_probs, routing.topk_weights)
    assert {t.dtype for t in floats} == {torch.float32}
    indices = routing.topk_indices
    assert indices.dtype == torch.int64
    assert ((indices >= -1) & (indices < num_experts)).all()
    assert (routing.topk_weights[indices < 0] == 0).all()
    counts = [int((indices == e).sum()) for e in range(num_experts)]
    assert routing.tokens_per_expert.tolist() == counts
    assert int(routing.num_tokens) == num_valid
    assert bool(routing.logits_finite)
    # No expert twice for one token.
    chosen = [[e for e in row if e >= 0] for row in indices.tolist()]
    assert all(len(set(row)) == len(row) for row in chosen)
    for value in (routing.penalty, routing.feedback):
        assert value is None or value.isfinite().all()


def check_record(make: Make) -> None:
    for training in (False, True):
        for valid in (None, torch.arange(T) % 3 > 0):
            router = make().train(training)
            routing = route(router, randn(T, D, seed=9), valid=valid, training=training)
            num_valid = T if valid is None else int(valid.sum())
            assert_consistent(routing, T, num_valid, E)
            if valid is not None:
                assert (routing.topk_indices[~valid] == -1).all()
            if router.fixed_k:
                wanted = num_valid * routing.topk_indices.shape[1]
                assert int(routing.demand.sum()) == wanted
            assert (routing.penalty is not None) == router.penalizes
            for of_noise in (routing.noise_std, routing.selection_logits):
                assert (of_noise is not None) == router.draws_noise


def check_small(make: Make) -> None:
    """One token, no token, padding alone; and equal tokens, whose experts are full while others are
    empty."""
    router, x = make(), randn(T, D, seed=9)
    for training in (False, True):
        single = route(router, x[:1], shape=(1, 1), training=training)
        assert_consistent(single, 1, 1, E)
        if router.fixed_k:
            assert int(single.demand.sum()) == single.topk_indices.shape[1]
        nothing = route(router, x[:0], shape=(0, 8), training=training)
        assert_consistent(nothing, 0, 0, E)
        padding = route(router, x, valid=torch.zeros(T, dtype=torch.bool), training=training)
        assert_consistent(padding, T, 0, E)
        assert (padding.topk_indices == -1).all()
        same, ids = x[:1].expand(T, D), torch.zeros(T).long()
        assert_consistent(route(router, same, ids=ids, training=training), T, T, E)


def check_gradient(make: Make) -> None:
    router = make()
    if not router.learned:
        assert not list(router.parameters())
        return
    x = randn(T, D, seed=9).requires_grad_()
    # As in training, where alone there is noise, and its width is learned.
    weights = route(router, x, training=True).topk_weights
    (weights * randn(*weights.shape, seed=5)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 1e-4, name
    assert x.grad is not None and x.grad.abs().sum() > 1e-4


def check_derivative(make: Make) -> None:
    """Weights, probabilities and penalty have the gradient of finite differences, with respect to
    hidden states and every weight; in float64, with the same experts and noise throughout."""
    shape = (2, 3)
    x = randn(6, D, seed=9, dtype=torch.float64).requires_grad_()
    router = make(torch.float64)
    weights = dict(router.named_parameters())
    if not weights:
        return
    free = route(router, x, training=True, shape=shape)

    def outputs(x: Tensor, *values: Tensor) -> list[Tensor]:
        about = context(training=True, generator=torch.Generator().manual_seed(0), shape=shape)
        if router.replays:
            about = about._replace(topk_indices=free.topk_indices)
        given = dict(zip(weights, values, strict=True))
        routing = torch.func.functional_call(router, given, (x, about))
        assert torch.equal(routing.topk_indices, free.topk_indices), "not a place to differentiate"
        found = [routing.topk_weights, routing.router_probs, routing.penalty]
        return [each for each in found if each is not None]

    values = [w.detach().clone().requires_grad_() for w in weights.values()]
    try:
        torch.autograd.gradcheck(outputs, [x, *values])
    except GradcheckError as error:
        raise AssertionError(str(error)) from error


def check_evaluation(make: Make) -> None:
    """Twice the same bits, and no state changed, in training neither."""
    router = make()
    before = {k: v.clone() for k, v in router.state_dict().items()}
    x = randn(T, D, seed=9)
    assert_same(route(router, x), route(router, x))
    torch.manual_seed(1)
    first = router(x, context())
    torch.manual_seed(2)
    assert_same(first, router(x, context()))
    route(router, x, training=True)
    assert all(torch.equal(v, before[k]) for k, v in router.state_dict().items())


def check_generator(make: Make) -> None:
    router, x = make(), randn(T, D, seed=9)
    assert_same(route(router, x, training=True), route(router, x, training=True))


def assert_same(a: Routing, b: Routing) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def moved(before: Routing, after: Routing, kept: Tensor) -> float:
    """Relative change of the weights at the tokens `kept`, inf where an expert changed there."""
    if not torch.equal(before.topk_indices[kept], after.topk_indices[kept]):
        return float("inf")
    return relative_error(after.topk_weights[kept], before.topk_weights[kept])


def disturbances(kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(changed hidden states' mask (T,), the tokens that must not notice (T,)): `later` tokens of a
    sequence, or any `other` tokens."""
    places = torch.arange(T).view(SHAPE)
    for at in (1, 5, 7):
        changed = torch.zeros(SHAPE, dtype=torch.bool)
        if kind == "later":
            changed[1, at:] = True
            kept = (places < places[1, at]) | (places > places[1, -1])
            # Other sequences are no later tokens of this one: `independent` looks at them.
            kept[0], kept[2] = False, False
        else:
            changed[1, at] = True
            changed[2, :at] = True
            kept = ~changed
        yield changed.flatten(), kept.flatten()


def worst_move(make: Make, kind: str) -> float:
    """The largest change at tokens that must not notice, in float64."""
    worst = 0.0
    router = make(torch.float64)
    x = randn(T, D, seed=9, dtype=torch.float64)
    for training in (False, True):
        for number, (changed, kept) in enumerate(disturbances(kind)):
            noise = 3 * randn(T, D, seed=10 + number, dtype=torch.float64)
            other = torch.where(changed.unsqueeze(-1), x + noise, x)
            before = route(router, x, training=training)
            after = route(router, other, training=training)
            worst = max(worst, moved(before, after, kept))
    return worst


def check_causal(make: Make) -> None:
    move = worst_move(make, "later")
    assert move < ROUNDING if make().causal else move > LEAK, move


def check_independent(make: Make) -> None:
    move = worst_move(make, "other")
    assert move < ROUNDING if make().independent else move > LEAK, move


def check_permutes_tokens(make: Make) -> None:
    """Tokens in another order within their sequences, their ids with them."""
    order = torch.cat([8 * row + randn(8, seed=row).argsort() for row in range(3)])
    router, x = make(torch.float64), randn(T, D, seed=9, dtype=torch.float64)
    ids = torch.arange(T) % 5
    worst = 0.0
    for training in modes(make):
        before = route(router, x, ids=ids, training=training)
        after = route(router, x[order], ids=ids[order], training=training)
        back = torch.empty_like(order)
        back[order] = torch.arange(T)
        undone = after._replace(
            topk_indices=after.topk_indices[back], topk_weights=after.topk_weights[back]
        )
        worst = max(worst, moved(before, undone, torch.ones(T, dtype=torch.bool)))
    assert worst < ROUNDING if router.permutes_tokens else worst > LEAK, worst


def dense_weights(routing: Routing, num_experts: int) -> Tensor:
    """(T, E) the weight of each expert for each token."""
    weights = routing.topk_weights.new_zeros(len(routing.topk_indices), num_experts + 1)
    return weights.scatter_(1, routing.topk_indices + 1, routing.topk_weights)[:, 1:]


def check_permutes_experts(make: Make) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    router, other = make(torch.float64), make(torch.float64)
    x = randn(T, D, seed=9, dtype=torch.float64)
    with torch.no_grad():
        tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for tensor in tensors.values():
            if tensor.dim() and tensor.shape[0] == E:
                tensor.copy_(tensor[order])
    worst = 0.0
    for training in modes(make):
        before = dense_weights(route(router, x, training=training), E)
        after = dense_weights(route(other, x, training=training), E)
        if not torch.equal(before[:, order] > 0, after > 0):
            worst = float("inf")
        else:
            worst = max(worst, relative_error(after, before[:, order]))
    assert worst < ROUNDING if router.permutes_experts else worst > LEAK, worst


def check_padding(make: Make) -> None:
    """What stands where there is padding changes nothing, neither do its ids."""
    router, valid = make(torch.float64), torch.arange(T) % 4 > 0
    x = randn(T, D, seed=9, dtype=torch.float64)
    other = torch.where(valid.unsqueeze(-1), x, 1e3)
    ids = torch.arange(T) % 5
    for training in (False, True):
        first = route(router, x, valid=valid, ids=ids, training=training)
        second = route(
            router, other, valid=valid, ids=torch.where(valid, ids, 3), training=training
        )
        assert moved(first, second, torch.ones(T, dtype=torch.bool)) < ROUNDING
        assert torch.equal(first.tokens_per_expert, second.tokens_per_expert)
        for one, two in ((first.penalty, second.penalty), (first.feedback, second.feedback)):
            assert one is None or relative_error(two, one) < ROUNDING


def check_float32(make: Make) -> None:
    """The same arithmetic under autocast and in a bfloat16 model."""
    x, router = randn(T, D, seed=9), make()
    plain = route(router, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(route(router, x), plain)
    narrow, wide = make(torch.bfloat16), make()
    wide.load_state_dict(narrow.state_dict())
    assert_same(route(narrow, x.bfloat16()), route(wide, x.bfloat16().float()))


def check_state(make: Make) -> None:
    """Buffers keep float32 to the bit through casts, `after_step`, save and load."""
    router = make()
    # Only a step of training tells a router anything.
    told = route(router, randn(T, D, seed=9), training=True)
    weights = {k: v.clone() for k, v in router.named_parameters()}
    if hasattr(router, "after_step"):
        feedback = () if told.feedback is None else (told.feedback,)
        for _ in range(3):
            router.after_step(torch.arange(E) ** 2, *feedback)
    assert all(torch.equal(v, weights[k]) for k, v in router.named_parameters())
    state = {k: v.clone() for k, v in router.named_buffers()}
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        torch.nn.Sequential(router).to(dtype)
        for name, buffer in router.named_buffers():
            if state[name].is_floating_point():
                assert buffer.dtype == torch.float32, name
                assert torch.equal(buffer, state[name]), name
    fresh = make()
    fresh.load_state_dict(router.state_dict())
    x = randn(T, D, seed=9)
    assert_same(route(fresh, x), route(router, x))


def check_nonfinite(make: Make) -> None:
    router, x = make(), randn(T, D, seed=9)
    if not router.learned:
        return
    for poison in (torch.nan, torch.inf):
        broken = x.clone()
        broken[7, 2] = poison
        assert not bool(route(router, broken).logits_finite)
        assert bool(route(router, broken, valid=torch.arange(T) != 7).logits_finite)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
