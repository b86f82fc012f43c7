"""What every balancing loss has to keep, as functions that raise AssertionError: for the contract
of the files in `moe/losses`, and for losses with planted bugs, which they must catch."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from conftest import assert_equals, randn
from torch import Tensor

from moe.losses import LossContext
from moe.routing import RouterContext, Routing, make_routing
from moe.variants import load_variant

T, E = 12, 4


class Loss(NamedTuple):
    """A loss with its settings, and whether it needs the Routing of a router that draws noise."""

    call: Callable[[Routing, LossContext], Tensor]
    noisy: bool = False


def build(name: str, settings: dict[str, Any]) -> Loss:
    module = load_variant("losses", name)
    config = module.Config(name=name, **settings)
    return Loss(
        lambda routing, context: module.loss(config, routing, context),
        config.needs_noise,
    )


def context(num_tokens: int, valid=None, shape=None, counts=None) -> LossContext:
    shape = shape or (1, num_tokens)
    return LossContext(
        RouterContext(torch.zeros(num_tokens).long(), None, valid, shape, True), counts
    )


def route(logits: Tensor, valid: Tensor | None = None, noisy: bool = False) -> Routing:
    """Top-2 of the softmax of logits; where noise is needed, of noisy logits, in which the noise
    follows from the logit, so that it moves with token and expert."""
    given, selection = {}, logits
    if noisy:
        std = torch.nn.functional.softplus(0.5 * logits) + 0.1
        selection = logits + std * torch.sin(5 * logits)
        given = {"noise_std": std, "selection_logits": selection}
    probs = selection.softmax(-1)
    indices = selection.topk(2).indices
    return make_routing(logits, probs, probs.gather(1, indices), indices, valid, **given)


def value_of(loss: Loss, logits: Tensor, valid: Tensor | None = None, shape=None) -> Tensor:
    routing = route(logits, valid, loss.noisy)
    return loss.call(routing, context(len(logits), valid, shape))


def check_number_with_gradient(loss: Loss) -> None:
    """One finite float32 number, whose gradient reaches the router."""
    logits = randn(T, E, seed=0).requires_grad_()
    value = value_of(loss, logits)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert value.requires_grad, "no gradient"
    value.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 1e-4


def check_padding(loss: Loss) -> None:
    """What stands where there is padding changes nothing: the same as without these tokens."""
    valid = torch.arange(T) < 9
    values, grads = [], []
    for size in (1.0, 50.0):
        logits = randn(T, E, seed=1)
        logits[~valid] *= size
        logits.requires_grad_()
        value = value_of(loss, logits, valid)
        value.backward()
        values.append(value)
        grads.append(logits.grad)
    assert torch.equal(*values)
    assert torch.equal(*grads)
    assert torch.count_nonzero(grads[0][~valid]) == 0
    assert_equals(values[0], value_of(loss, randn(T, E, seed=1)[:9]))


def check_only_padding(loss: Loss) -> None:
    """Zero, and without a gradient."""
    logits = randn(T, E, seed=0).requires_grad_()
    value = value_of(loss, logits, torch.zeros(T, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert torch.count_nonzero(logits.grad) == 0


def check_order(loss: Loss) -> None:
    """The order of experts and of tokens plays no part."""
    logits = randn(T, E, seed=2)
    value = value_of(loss, logits)
    assert_equals(value_of(loss, logits.flip(1)), value)
    assert_equals(value_of(loss, logits.flip(0)), value)


def check_derivative(loss: Loss) -> None:
    logits = randn(T, E, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_of(loss, x, shape=(3, 4)), [logits])


def check_layers_stand_alone(loss: Loss) -> None:
    """Of a layer, whatever other layers were asked before it."""
    layers = [randn(T, E, seed=seed) for seed in (4, 5, 6)]
    forward = [value_of(loss, logits) for logits in layers]
    backward = [value_of(loss, logits) for logits in reversed(layers)]
    assert all(torch.equal(*pair) for pair in zip(forward, reversed(backward), strict=True))


def check_repeats(loss: Loss) -> None:
    """Twice the tokens, each of them twice, have the same loss: it does not grow with the batch."""
    logits = randn(T, E, seed=6)
    twice = value_of(loss, logits.repeat(2, 1), shape=(2, T))
    assert_equals(twice, value_of(loss, logits))


def check_float32(loss: Loss) -> None:
    """The same arithmetic under autocast."""
    logits = randn(T, E, seed=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = value_of(loss, logits)
    assert torch.equal(value, value_of(loss, logits))


def check_extremes(loss: Loss) -> None:
    """Sure routers, whose other probabilities are 0, and one expert have finite gradients."""
    for logits in (200 * randn(T, E, seed=8), torch.zeros(T, E), torch.eye(E)[:1].expand(T, E)):
        logits = logits.clone().requires_grad_()
        value = value_of(loss, logits)
        assert value.isfinite()
        value.backward()
        assert logits.grad is not None and logits.grad.isfinite().all()


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def broken_checks(loss_maker: Callable[[], Loss]) -> Iterator[str]:
    """Names of the checks that a loss does not pass, each with one made anew."""
    for name, check in CHECKS.items():
        try:
            check(loss_maker())
        except (AssertionError, RuntimeError):
            yield name
