"""Do the measures of load and of the router's mind have the values worked out by hand?"""

import math

import numpy as np
import pytest
import torch

from moe.measures import (
    co_activation,
    co_activation_counts,
    coefficient_of_variation,
    dead_experts,
    domain_divergence,
    domain_expert_information,
    effective_experts,
    first_choice,
    gini,
    least_assignments,
    load_share,
    max_violation,
    repeats,
    route_overlap,
    router_sums,
    starved_experts,
    vocabulary_specialisation,
)
from moe.routing import make_routing, stack_layers, zero_counts

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


def routing_of(probs, top_k, logits=None):
    probs = torch.tensor(probs)
    logits = probs.log() if logits is None else logits
    return make_routing(logits, probs, *probs.topk(top_k), None)


def test_spread_of_the_load_by_hand():
    assert coefficient_of_variation(LOADS).tolist() == pytest.approx(
        [0, np.std([25, 14, 1, 0]) / 10, math.sqrt(3), 0], rel=1e-12
    )
    # Half the mean absolute difference of all pairs, over the mean.
    pairs = np.abs(np.subtract.outer([25, 14, 1, 0], [25, 14, 1, 0])).mean() / 2 / 10
    assert gini(LOADS).tolist() == pytest.approx([0, pairs, 0.75, 0], rel=1e-12)
    assert load_share(LOADS)[1].tolist() == [0.625, 0.35, 0.025, 0]
    assert load_share(LOADS)[3].tolist() == [0, 0, 0, 0]


def test_measures_are_of_the_experts_that_a_layer_has():
    """Below 0, whatever a sum has made of it, there is no such expert."""
    rows = [[10, 10, 10, 10], [25, 14, 1], [40, 0], [0, 0, 0, 7], [0, 0]]
    loads = stack_layers([torch.tensor(row) for row in rows])
    assert (loads < 0).sum(-1).tolist() == [0, 1, 2, 0, 2]
    loads = torch.where(loads < 0, 7 * loads, loads)
    expected = {
        name: [] for name in ("violation", "dead", "starved", "effective", "spread", "gini")
    }
    for row in map(np.array, rows):
        mean, total = row.mean(), max(row.sum(), 1)
        expected["violation"].append(row.max() / mean - 1 if mean else 0)
        expected["dead"].append((row == 0).sum())
        expected["starved"].append((row < 0.1 * mean).sum())
        share = row[row > 0] / total
        expected["effective"].append(np.exp(-(share * np.log(share)).sum()))
        expected["spread"].append(row.std() / mean if mean else 0)
        differences = np.abs(np.subtract.outer(row, row)).mean()
        expected["gini"].append(differences / 2 / mean if mean else 0)
        pad = [0] * (4 - len(row))
        assert load_share(loads)[len(expected["gini"]) - 1].tolist() == [*(row / total), *pad]
    assert max_violation(loads).tolist() == pytest.approx(expected["violation"], rel=1e-6)
    assert dead_experts(loads).tolist() == expected["dead"]
    assert starved_experts(loads).tolist() == expected["starved"]
    assert effective_experts(loads).tolist() == pytest.approx(expected["effective"], rel=1e-6)
    assert coefficient_of_variation(loads).tolist() == pytest.approx(expected["spread"], rel=1e-12)
    assert gini(loads).tolist() == pytest.approx(expected["gini"], rel=1e-12)
    assert least_assignments(loads).tolist() == [min(row) for row in rows]


def test_domains_are_told_apart_by_the_experts_that_a_layer_has():
    domains = torch.tensor([[6, 2, 1], [1, 0, 5], [0, 0, 0]])
    absent = torch.full((3, 2), -9)
    padded = torch.cat([domains, absent], 1)
    joint = domains.numpy() / domains.sum().item()
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    used = joint > 0
    mutual = (joint[used] * np.log(joint[used] / independent[used])).sum()
    of_domain = joint.sum(1)[:2]
    information = mutual / -(of_domain * np.log(of_domain)).sum()
    assert float(domain_expert_information(padded)) == pytest.approx(information, rel=1e-9)
    shares = domains.numpy()[:2] / domains.numpy()[:2].sum(1, keepdims=True)
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (*shares, shares.mean(0))]
    divergence = entropies[2] - np.mean(entropies[:2])
    assert float(domain_divergence(padded)) == pytest.approx(divergence, rel=1e-9)


def test_zero_counts_say_where_there_is_no_expert():
    assert zero_counts((2, 4, 3)).tolist() == [[0, 0, -1, -1], [0, 0, 0, 0], [0, 0, 0, -1]]
    assert zero_counts(()).shape[0] == 0


def test_router_measures_by_hand():
    logits = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [1.0, -7.0, 2.0]])
    routing = routing_of([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0]], 2, logits)
    entropies = [
        -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)) / math.log(3),
        -(0.8 * math.log(0.4) + 0.2 * math.log(0.2)) / math.log(3),
        0.0,
    ]
    norms = [5, 0, math.sqrt(54)]
    logsumexps = [math.log(sum(math.exp(v) for v in row)) for row in logits.tolist()]
    expected = {
        "num_tokens": 3,
        "entropy": sum(entropies),
        "confidence": 1.9,
        "margin": 0.1 + 0.2 + 0.0,
        "logit_norm": sum(norms),
        "logsumexp": sum(logsumexps),
        "logit_max": 7,
    }
    assert {k: float(v) for k, v in router_sums(routing)._asdict().items()} == pytest.approx(
        expected, rel=1e-6
    )
    # Padding counts nowhere, not even in the maximum.
    valid = torch.tensor([True, True, False])
    routing = routing._replace(valid=valid, num_tokens=valid.sum())
    sums = router_sums(routing)
    assert float(sums.entropy) == pytest.approx(entropies[0] + entropies[1])
    assert (float(sums.num_tokens), float(sums.logit_max)) == (2, 4)


def test_router_entropy_is_1_at_uniform_and_for_equal_sigmoids():
    assert router_sums(routing_of([[0.25] * 4] * 3, 2)).entropy.item() == pytest.approx(3)
    assert router_sums(routing_of([[0.9] * 4] * 3, 2)).entropy.item() == pytest.approx(3)


def test_margin_is_zero_where_every_expert_is_chosen():
    assert router_sums(routing_of([[0.7, 0.3]], 2)).margin.item() == 0


def test_measures_of_no_tokens_are_zero():
    empty = torch.zeros(0, 4)
    routing = make_routing(empty, empty, torch.zeros(0, 2), torch.zeros(0, 2).long(), None)
    assert [float(value) for value in router_sums(routing)] == [0] * 7


def test_routes_by_hand():
    routes = torch.tensor([[0, 2], [1, -1], [2, 0], [-1, -1]])
    counts = co_activation_counts(routes, 3)
    assert counts.tolist() == [[2, 0, 2], [0, 1, 0], [2, 0, 2]]
    assert co_activation(counts).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert co_activation(torch.zeros(2, 3, 3, dtype=torch.float64)).abs().sum() == 0
    # Of 5 choices of the reference, 3 are the same.
    other = torch.tensor([[2, 1], [1, -1], [0, 1], [-1, -1]])
    assert route_overlap(routes, other).item() == pytest.approx(3 / 5)
    assert route_overlap(routes, routes).item() == 1
    layers = torch.stack([routes, other])
    assert route_overlap(layers, routes.expand(2, -1, -1)).tolist() == pytest.approx([1, 3 / 5])
    assert route_overlap(routes[:0], routes[:0]).item() == 0


def test_co_activation_counts_all_pairs_of_three():
    routes = torch.tensor([[0, 1, 2], [3, 1, 0]])
    expected = np.zeros((4, 4))
    for row in routes.tolist():
        for i in row:
            for j in row:
                expected[i, j] += 1
    assert co_activation_counts(routes, 4).tolist() == expected.tolist()


def test_first_choice_is_the_heaviest_and_repeats_stay_within_documents():
    routing = make_routing(
        torch.zeros(3, 4),
        torch.zeros(3, 4),
        torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.0, 0.0]]),
        torch.tensor([[3, 1], [2, 0], [-1, -1]]),
        None,
    )
    assert first_choice(routing).tolist() == [1, 2, -1]
    choices = torch.tensor([[1, 1, 1, 2, 2], [0, 0, -1, 0, 0]])
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    # Pairs: (1 1) same, across documents none, (1 2) not, (2 2) same; (0 0) twice.
    assert [int(n) for n in repeats(choices, documents)] == [4, 5]


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


def test_domain_divergence_by_hand():
    told, alike = [[8, 0], [0, 2]], [[3, 6], [1, 2]]
    values = domain_divergence(torch.tensor([told, alike])).tolist()
    assert values == pytest.approx([math.log(2), 0], abs=1e-12)
    # The mean of Kullback-Leibler divergences from the mixture; a domain without text is left out.
    shares = np.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    mixture = shares.mean(0)
    by_hand = np.mean(
        [sum(p * np.log(p / mixture[i]) for i, p in enumerate(r) if p) for r in shares]
    )
    counts = torch.tensor([[5, 5, 0], [0, 0, 0], [100, 200, 700]])
    assert domain_divergence(counts).item() == pytest.approx(by_hand, rel=1e-9)
    assert domain_divergence(torch.tensor([[4, 5], [0, 0]])).item() == 0


def test_vocabulary_specialisation_by_hand():
    # Two experts; ids seen 10, 8 and 7 times, of which the last is too rare to say anything.
    assignments = torch.tensor([[[10, 2, 7], [0, 6, 0]], [[5, 4, 7], [5, 4, 7]]])
    occurrences = torch.tensor([10, 8, 7])
    values = vocabulary_specialisation(assignments, occurrences).tolist()
    assert values == pytest.approx([(10 * 1.0 + 8 * 0.75) / 18, 0.5], rel=1e-12)
    values = vocabulary_specialisation(assignments, occurrences, least=1).tolist()
    assert values[1] == pytest.approx((10 * 0.5 + 8 * 0.5 + 7 * 1.0) / 25, rel=1e-12)
    assert vocabulary_specialisation(assignments, occurrences, least=11).tolist() == [0, 0]
