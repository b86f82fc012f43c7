"""Do the two ways of balancing without a loss undo a fixed skew of 0.3 in the scores, down to what
chance leaves?

Chance leaves something: of a router that sends every token to K random experts, MaxVio is not 0.
That floor is printed beside each number:

    python -m pytest tests/test_skewed_scores.py -s
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.routing import RouterContext, Routing
from moe.variants import load_variant

E, K = 16, 2
SKEW = 0.3
SKEWS = {
    "rising": np.linspace(-SKEW / 2, SKEW / 2, E),
    "one favourite": np.where(np.arange(E) == 3, SKEW, 0.0),
    "one outcast": np.where(np.arange(E) == 3, -SKEW, 0.0),
}


def max_violation(counts: np.ndarray) -> float:
    return float(counts.max() / counts.mean() - 1)


def sampling_floor(rows_per_expert: int, num_experts: int = E, top_k: int = K) -> float:
    """Mean MaxVio of a perfectly balanced router that chooses at random."""
    generator = np.random.default_rng(0)
    num_tokens = rows_per_expert * num_experts // top_k
    found = []
    for _ in range(40):
        keys = generator.random((num_tokens, num_experts))
        chosen = np.argpartition(keys, top_k, axis=1)[:, :top_k]
        found.append(max_violation(np.bincount(chosen.ravel(), minlength=num_experts)))
    return float(np.mean(found))


def skewed_router(name: str, **settings):
    """A sigmoid router whose logits are its inputs."""
    module = load_variant("routers", name)
    config = module.Config(top_k=K, score="sigmoid", **settings)
    router = module.Router(config, E, E)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    return router


def skewed_logits(skew: str, num_tokens: int, seed: int) -> Tensor:
    """(T, E) logits: scores about 1/2 that differ between tokens, and a skew of each expert."""
    generator = np.random.default_rng(seed)
    scores = 0.5 + 0.1 * generator.standard_normal((num_tokens, E)) + SKEWS[skew]
    scores = scores.clip(0.01, 0.99)
    return torch.from_numpy(np.log(scores / (1 - scores))).float()


def route(router, logits: Tensor) -> Routing:
    num_tokens = len(logits)
    ids = torch.zeros(num_tokens).long()
    about = RouterContext(ids, None, None, (1, num_tokens), True)
    return router(logits, about)


def report(what: str, skew: str, violation: float, rows: int) -> None:
    print(
        f"{what}, {skew}: MaxVio {violation:.3f}; floor at {rows} rows {sampling_floor(rows):.3f}"
    )


def test_a_balanced_random_router_shows_0_11_at_256_rows():
    floor = sampling_floor(256)
    print(f"\nsampling floor at 256 rows an expert: {floor:.3f}")
    assert floor == pytest.approx(0.11, abs=0.01)
    # Four times the rows, half the violation.
    assert sampling_floor(1024) == pytest.approx(floor / 2, rel=0.15)


@pytest.mark.parametrize("skew", SKEWS)
def test_the_loss_free_bias_balances_a_skew(skew):
    router = skewed_router("topk", bias_update_rate=5e-3)
    num_tokens, pooled, first = 4096, np.zeros(E), None
    for step in range(200):
        routing = route(router, skewed_logits(skew, num_tokens, step))
        router.after_step(routing.tokens_per_expert)
        counts = routing.tokens_per_expert.numpy()
        first = counts if first is None else first
        if step >= 150:
            pooled += counts
    rows = int(pooled.sum() / E)
    assert rows >= 20_000
    assert max_violation(first) > 0.1, "there was no skew"
    report("loss-free bias, steps 150 to 200", skew, max_violation(pooled), rows)
    assert max_violation(pooled) < 0.1


@pytest.mark.parametrize("skew", SKEWS)
def test_quantile_balancing_balances_the_skew_of_its_batch(skew):
    num_tokens = 2048
    logits = skewed_logits(skew, num_tokens, 0)
    before = route(skewed_router("topk"), logits).tokens_per_expert.numpy()
    assert max_violation(before) > 0.1, "there was no skew"
    counts = route(skewed_router("quantile", source="batch"), logits).tokens_per_expert.numpy()
    rows = num_tokens * K // E
    report("quantile balancing, its own batch", skew, max_violation(counts), rows)
    assert max_violation(counts) < 0.1
    # Below what chance leaves: the quantiles are those of this very batch.
    assert max_violation(counts) < sampling_floor(rows)


def test_a_bias_that_does_not_move_leaves_the_skew():
    """The control: what is asserted above would fail without the update."""
    router = skewed_router("topk", bias_update_rate=5e-3)
    counts = route(router, skewed_logits("rising", 4096, 0)).tokens_per_expert.numpy()
    assert max_violation(counts) > 1
