"""Validation: values by another route, the same at every call, and no trace in the training."""

import math
from collections import Counter

import pytest
import torch
from training_cases import data, make_config, make_engine, micro_batches

from moe.measures import domain_expert_information
from moe.routing import counts_by_sequence, make_routing
from train.packing import IGNORE
from train.random_state import get_random_state
from train.route_statistics import VocabularyCounts, frequent_tokens
from train.step import train_step
from train.validation import Evaluation, evaluate, sum_by_domain


@pytest.fixture
def trained(tmp_path):
    """An engine whose experts have begun to differ, and its config."""
    config = make_config(tmp_path, {"training.steps": 40})
    engine = make_engine(config)
    for step in range(25):
        train_step(engine, micro_batches(config, step), step, config)
    return engine, config


def evaluated(trained, batch_size: int = 4) -> Evaluation:
    engine, config = trained
    result = evaluate(engine, data(), batch_size, config.training.seq_len)
    assert result is not None
    return result


def information_by_hand(counts: list[list[int]]) -> float:
    """I(domain; expert) / H(domain) in plain Python: counts of (domain, expert)."""
    total = sum(map(sum, counts))
    joint = [[c / total for c in row] for row in counts]
    domains = [sum(row) for row in joint]
    experts = [sum(row[e] for row in joint) for e in range(len(joint[0]))]
    mutual = sum(
        p * math.log(p / (domains[d] * experts[e]))
        for d, row in enumerate(joint)
        for e, p in enumerate(row)
        if p
    )
    return mutual / -sum(p * math.log(p) for p in domains if p)


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        # An expert for each domain tells all; the same use of experts tells nothing.
        ([[5, 0], [0, 5]], 1.0),
        ([[3, 1], [6, 2]], 0.0),
        # One bit of domains; an expert of 2/3 and 1/3: 1 - H(1/4) = 0.18872 bits.
        ([[3, 1], [1, 3]], 0.1887219),
        ([[1, 2, 3], [4, 0, 1]], None),
    ],
)
def test_information_against_values_by_hand(counts, value):
    found = domain_expert_information(torch.tensor(counts)).item()
    assert found == pytest.approx(information_by_hand(counts), abs=1e-12)
    if value is not None:
        assert found == pytest.approx(value, abs=1e-6)


def test_the_losses_and_counts_are_those_of_a_pass_over_each_sequence(trained):
    """One sequence at a time, the loss from the logits in float64, the counts one by one."""
    engine, config = trained
    result = evaluated(trained)
    model = engine.model.eval()
    for index, domain in enumerate(data().domain_names):
        nll, labels, counts = 0.0, 0, [Counter(), Counter()]
        for batch in data().validation_batches(domain, 1, config.training.seq_len):
            output = model(batch.input_ids, document_ids=batch.document_ids)
            log_probs = output.logits.detach().double().log_softmax(-1)[0]
            for position, label in enumerate(batch.labels[0].tolist()):
                if label != IGNORE:
                    nll -= float(log_probs[position, label])
                    labels += 1
            for layer, routing in enumerate(output.routings):
                counts[layer].update(routing.topk_indices.flatten().tolist())
        assert result.num_tokens[domain] == labels > 100
        assert result.loss[domain] == pytest.approx(nll / labels, rel=1e-5)
        for layer in range(2):
            expected = [counts[layer][expert] for expert in range(4)]
            assert result.tokens_per_expert[index, layer].tolist() == expected
    for layer in range(2):
        expected = information_by_hand(result.tokens_per_expert[:, layer].tolist())
        assert result.information[layer].item() == pytest.approx(expected, abs=1e-9)


def test_unigram_entropy_and_bits_per_byte_are_those_of_the_validation_text(trained):
    result = evaluated(trained)
    for domain in data().domain_names:
        # Bytes as tokens: a byte a token but for the ends of texts, which stand for none.
        tokens = data()._domains[domain].validation.tolist()
        p = [count / len(tokens) for count in Counter(tokens).values()]
        assert result.unigram_entropy[domain] == pytest.approx(-sum(x * math.log(x) for x in p))
        ends = tokens.count(data().end_of_text)
        bytes_per_token = (len(tokens) - ends) / len(tokens)
        expected = result.loss[domain] / math.log(2) / bytes_per_token
        assert result.bits_per_byte[domain] == pytest.approx(expected)


def test_domains_count_the_same_in_the_means(tmp_path):
    none = torch.zeros(0)
    result = Evaluation(
        loss={"a": 1.0, "b": 3.0},
        unigram_entropy={"a": 2.0, "b": 7.0},
        bits_per_byte={},
        num_tokens={"a": 1000, "b": 1},
        tokens_per_expert=none,
        information=none,
        shuffled_information=none,
        divergence=none,
        sequence_violation=none,
        co_activation=none,
        repeat_rate=none,
        vocabulary=VocabularyCounts(make_config(tmp_path).model, none.long()),
        probe_routes=none,
    )
    assert result.mean_loss == 2.0 and result.mean_gain == 2.5


def test_experts_that_know_their_domain_stand_out_against_the_shuffled_control(trained):
    result = evaluated(trained)
    assert (result.information > 0.1).all()
    # Chance gives a little, here of 16 sequences.
    assert (result.shuffled_information > 0).all()
    assert (result.shuffled_information < 0.2 * result.information).all()


def test_a_router_that_knows_nothing_is_no_better_than_its_control():
    """Choices at random: what the measure says then is chance, and the control says as much."""
    generator = torch.Generator().manual_seed(0)
    by_sequence = torch.randint(0, 20, (64, 1, 8), generator=generator)
    domain_of = torch.arange(64) % 4
    information = domain_expert_information(
        sum_by_domain(by_sequence, domain_of, 4).transpose(0, 1)
    )
    order = torch.randperm(64, generator=generator)
    shuffled = domain_expert_information(
        sum_by_domain(by_sequence, domain_of[order], 4).transpose(0, 1)
    )
    assert 0 < information.item() < 0.01 and 0 < shuffled.item() < 0.01


def test_counts_by_sequence_leave_out_what_was_not_assigned(trained):
    engine, config = trained
    batch = micro_batches(config)[0]
    routing = engine.model.eval()(batch.input_ids).routings[0]
    indices = routing.topk_indices.clone()
    indices[:5] = -1
    counts = counts_by_sequence(routing._replace(topk_indices=indices), 2)
    for sequence, rows in enumerate(indices.view(2, -1).tolist()):
        assert counts[sequence].tolist() == [rows.count(expert) for expert in range(4)]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_nothing(trained, batch_size):
    one, other = evaluated(trained), evaluated(trained, batch_size)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.num_tokens == one.num_tokens
    assert torch.equal(other.tokens_per_expert, one.tokens_per_expert)


def test_an_evaluation_is_deterministic_and_leaves_no_trace(trained):
    engine, _ = trained
    before = {name: value.tolist() for name, value in get_random_state().items()}
    weights = {name: value.clone() for name, value in engine.model.state_dict().items()}
    first, second = evaluated(trained), evaluated(trained)
    assert first.loss == second.loss and first.information.tolist() == second.information.tolist()
    assert first.shuffled_information.tolist() == second.shuffled_information.tolist()
    after = {name: value.tolist() for name, value in get_random_state().items()}
    assert repr(after) == repr(before), "jitter is for training"
    assert all(
        torch.equal(value, weights[name]) for name, value in engine.model.state_dict().items()
    )
    assert engine.model.training and all(p.grad is None for p in engine.model.parameters())


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_an_evaluation_is_given_up_when_asked(trained, passes):
    engine, config = trained
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > passes

    assert evaluate(engine, data(), 4, config.training.seq_len, stop=stop) is None
    assert len(asked) == passes + 1 and engine.model.training


def test_a_dense_model_has_losses_and_no_experts(tmp_path):
    config = make_config(tmp_path, {"model.feed_forward": "dense"})
    result = evaluate(make_engine(config), data(), 4, config.training.seq_len)
    assert set(result.loss) == set(data().domain_names)
    assert result.tokens_per_expert.numel() == 0 and result.information.numel() == 0


def everything_routed(trained, batch_size=4):
    """(domain, input ids, documents, [(L) topk_indices, topk_weights]) of every sequence."""
    engine, config = trained
    engine.model.eval()
    found = []
    with torch.no_grad():
        for place, name in enumerate(data().domain_names):
            for batch in data().validation_batches(name, batch_size, config.training.seq_len):
                output = engine(batch)
                size, length = batch.input_ids.shape
                routes = [r.topk_indices.view(size, length, -1) for r in output.routings]
                weights = [r.topk_weights.view(size, length, -1) for r in output.routings]
                for row in range(size):
                    found.append(
                        (
                            place,
                            batch.input_ids[row].tolist(),
                            batch.document_ids[row].tolist(),
                            [each[row].tolist() for each in routes],
                            [each[row].tolist() for each in weights],
                        )
                    )
    return found


def test_what_experts_were_chosen_for_by_hand(trained):
    result, sequences = evaluated(trained), everything_routed(trained)
    num_layers, num_experts = result.tokens_per_expert.shape[1:]
    for layer in range(num_layers):
        load = torch.zeros(2, num_experts, dtype=torch.int64)
        pairs = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        same = both = 0
        by_token: Counter = Counter()
        occurrences: Counter = Counter()
        for domain, ids, documents, routes, weights in sequences:
            first = [
                chosen[max(range(len(chosen)), key=lambda k: weight[k])]
                for chosen, weight in zip(routes[layer], weights[layer], strict=True)
            ]
            for position, (token, chosen) in enumerate(zip(ids, routes[layer], strict=True)):
                occurrences[token] += 1
                for i in chosen:
                    load[domain, i] += 1
                    by_token[token, i] += 1
                    for j in chosen:
                        pairs[i, j] += 1
                if position and documents[position] == documents[position - 1]:
                    both += 1
                    same += first[position] == first[position - 1]
        assert torch.equal(result.tokens_per_expert[:, layer], load)
        assert torch.equal(result.co_activation[layer], pairs)
        violations = []
        for _, _, _, routes, _ in sequences:
            chosen = Counter(expert for token in routes[layer] for expert in token)
            violations.append(max(chosen.values()) * num_experts / sum(chosen.values()) - 1)
        mean = sum(violations) / len(violations)
        assert float(result.sequence_violation[layer]) == pytest.approx(mean, rel=1e-6)
        assert float(result.repeat_rate[layer]) == pytest.approx(same / both)
        shares = [[c / sum(row) for c in row] for row in load.tolist()]
        middle = [(a + b) / 2 for a, b in zip(*shares, strict=True)]
        divergence = sum(
            p * math.log(p / m) / 2 for row in shares for p, m in zip(row, middle, strict=True) if p
        )
        assert float(result.divergence[layer]) == pytest.approx(divergence, rel=1e-9)
        vocabulary = result.vocabulary
        assert vocabulary.occurrences.tolist() == [
            occurrences[token] for token in vocabulary.token_ids.tolist()
        ]
        for expert in range(num_experts):
            counted = vocabulary.assignments[layer, expert].tolist()
            assert counted == [by_token[t, expert] for t in vocabulary.token_ids.tolist()]
            shown = vocabulary.top_tokens(layer, expert, 3, least=2)
            best = sorted(
                (-by_token[t, expert] / n, -n, t)
                for t, n in occurrences.items()
                if n >= 2 and by_token[t, expert]
            )
            assert [(-t.share, -t.occurrences, t.token_id) for t in shown] == best[:3]


def test_the_probe_is_the_beginning_of_each_domain(trained):
    result, sequences = evaluated(trained), everything_routed(trained)
    by_domain = [[s for s in sequences if s[0] == place] for place in (0, 1)]
    # The whole of this little text fits.
    expected = [
        [[s[3][layer][at] for layer in range(2)] for at in range(len(s[1]))]
        for of in by_domain
        for s in of
    ]
    assert result.probe_routes.tolist() == [row for sequence in expected for row in sequence]


def test_a_long_text_gives_the_probe_equal_parts(trained, monkeypatch):
    monkeypatch.setattr("train.validation.PROBE_TOKENS", 64)
    result, sequences = evaluated(trained, batch_size=3), everything_routed(trained)
    chosen = [[s for s in sequences if s[0] == place][:2] for place in (0, 1)]
    expected = [
        [s[3][layer][at] for layer in range(2)] for of in chosen for s in of for at in range(16)
    ]
    assert result.probe_routes.tolist() == expected and len(expected) == 64


def test_frequent_tokens_are_in_falling_order_and_occur():
    assert frequent_tokens(torch.tensor([3, 0, 9, 3, 1]), 3).tolist() == [2, 0, 3]
    assert frequent_tokens(torch.tensor([0, 2, 0]), 3).tolist() == [1]


def test_tokens_outside_the_vocabulary_count_nowhere(tmp_path):
    config = make_config(tmp_path).model
    counts = VocabularyCounts(config, torch.tensor([7, 5]))
    routing = make_routing(
        torch.zeros(4, 4),
        torch.zeros(4, 4),
        torch.ones(4, 2),
        torch.tensor([[0, 1], [2, -1], [3, 0], [1, 2]]),
        None,
    )
    counts.add(torch.tensor([5, 7, 9, -100]), [routing, routing])
    assert counts.occurrences.tolist() == [1, 1]
    assert counts.assignments[0].tolist() == [[0, 1], [0, 1], [1, 0], [0, 0]]
    assert torch.equal(counts.assignments[0], counts.assignments[1])
