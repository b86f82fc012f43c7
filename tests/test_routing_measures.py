"""Do the measures of load and of the router's mind have the values worked out by hand?"""

import math

import numpy as np
import pytest
import torch

from moe.routing import (
    confidence_and_margin,
    dead_experts,
    domain_expert_information,
    effective_experts,
    make_routing,
    max_violation,
    router_entropy,
    starved_experts,
)

# A layer a row: balanced, skewed (mean 10), collapsed, nothing counted.
LOADS = torch.tensor([[10, 10, 10, 10], [25, 14, 1, 0], [40, 0, 0, 0], [0, 0, 0, 0]])


def test_load_measures_by_hand():
    assert max_violation(LOADS).tolist() == [0, 1.5, 3, 0]
    assert dead_experts(LOADS).tolist() == [0, 1, 3, 4]
    # Fewer than 0.1 of the mean: 1 of 10 is not, 0 is.
    assert starved_experts(LOADS).tolist() == [0, 1, 3, 0]
    assert starved_experts(torch.tensor([100, 100, 1])).item() == 1
    share = np.array([25, 14, 1]) / 40
    skewed = float(np.exp(-(share * np.log(share)).sum()))
    assert effective_experts(LOADS).tolist() == pytest.approx([4, skewed, 1, 1], rel=1e-5)


def routing_of(probs, top_k):
    probs = torch.tensor(probs)
    return make_routing(probs.log(), probs, *probs.topk(top_k), None)


def test_router_measures_by_hand():
    routing = routing_of([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0]], 2)
    entropies = [
        -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)),
        -(0.8 * math.log(0.4) + 0.2 * math.log(0.2)),
        0.0,
    ]
    assert router_entropy(routing).item() == pytest.approx(sum(entropies) / 3 / math.log(3))
    confidence, margin = confidence_and_margin(routing)
    assert confidence.item() == pytest.approx(1.9 / 3)
    assert margin.item() == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    valid = torch.tensor([True, False, True])
    routing = routing._replace(valid=valid, num_tokens=valid.sum())
    assert router_entropy(routing).item() == pytest.approx(entropies[0] / 2 / math.log(3))
    confidence, margin = confidence_and_margin(routing)
    assert (confidence.item(), margin.item()) == pytest.approx((0.75, 0.05))


def test_router_entropy_is_1_at_uniform_and_for_equal_sigmoids():
    assert router_entropy(routing_of([[0.25] * 4] * 3, 2)).item() == pytest.approx(1)
    assert router_entropy(routing_of([[0.9] * 4] * 3, 2)).item() == pytest.approx(1)


def test_margin_is_zero_where_every_expert_is_chosen():
    assert confidence_and_margin(routing_of([[0.7, 0.3]], 2))[1].item() == 0


def information_by_hand(counts):
    """Sum over cells of p log(p / (row * column)), divided by the entropy of the rows."""
    joint = np.array(counts) / np.sum(counts)
    rows, columns = joint.sum(1), joint.sum(0)
    terms = [
        p * math.log(p / (rows[i] * columns[j])) for (i, j), p in np.ndenumerate(joint) if p > 0
    ]
    return sum(terms) / -sum(p * math.log(p) for p in rows if p > 0)


def test_domain_information_by_hand():
    told, hidden, partly = [[8, 0], [0, 2]], [[3, 6], [1, 2]], [[5, 1, 0], [2, 2, 9]]
    information = domain_expert_information(torch.tensor([told, hidden]))
    assert information.tolist() == pytest.approx([1, 0], abs=1e-12)
    value = domain_expert_information(torch.tensor(partly)).item()
    assert value == pytest.approx(information_by_hand(partly), rel=1e-9)
    assert 0.1 < value < 0.9
    # One domain alone has nothing to be told.
    assert domain_expert_information(torch.tensor([[4, 5], [0, 0]])).item() == 0
