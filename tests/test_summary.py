"""The page at the end of a run, and its JSON."""

import json

import pytest
import torch
from model_cases import tiny_config
from training_cases import make_config

from train.route_statistics import VocabularyCounts
from train.summary import render_summary, summarize
from train.validation import Evaluation


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        loss={"prose": 2.0, "sums": 3.0},
        unigram_entropy={"prose": 4.5, "sums": 3.5},
        bits_per_byte={"prose": 1.1, "sums": 1.2},
        num_tokens={"prose": 100, "sums": 50},
        # (domains, L, E)
        tokens_per_expert=torch.tensor(
            [[[6, 2, 0, 0], [1, 1, 1, 1]], [[6, 2, 0, 0], [1, 1, 1, 1]]]
        ),
        information=torch.tensor([0.25, 0.0]),
        shuffled_information=torch.tensor([0.01, 0.0]),
        divergence=torch.tensor([0.5, 0.0]),
        sequence_violation=torch.zeros(2),
        co_activation=torch.zeros(2, 4, 4),
        repeat_rate=torch.tensor([0.25, 0.75]),
        vocabulary=VocabularyCounts(tiny_config(), torch.zeros(0).long()),
        probe_routes=torch.zeros(0, 2, 2),
    )


def test_values_against_those_by_hand(evaluation, tmp_path):
    summary = summarize(evaluation, make_config(tmp_path).model, 1000, 61.0)
    assert (summary["mean_loss"], summary["mean_gain"]) == (2.5, 1.5)
    assert [row["gain"] for row in summary["domains"].values()] == [2.5, 0.5]
    first, second = summary["layers"]
    # Loads 12, 4, 0, 0: the mean is 4. exp(H(3/4, 1/4)) = 1.7548.
    assert (first["max_violation"], first["dead_experts"]) == (2.0, 2)
    assert first["effective_experts"] == pytest.approx(1.7548, abs=1e-4)
    assert (second["max_violation"], second["dead_experts"]) == (0.0, 0)
    assert second["effective_experts"] == pytest.approx(4.0)
    assert summary["dead_experts"] == 2
    assert (first["domain_divergence"], second["repeat_rate"]) == (0.5, 0.75)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_page_shows_them(evaluation, tmp_path):
    summary = summarize(evaluation, make_config(tmp_path).model, 1_234_567, 61.0)
    page = render_summary(summary, 4)
    assert page.startswith("After 1,234,567 training tokens in 1m01s, on held-out text")
    rows = {line.split()[0]: line.split()[1:] for line in page.splitlines() if line.strip()}
    assert rows["prose"] == ["2.000", "4.500", "2.500", "1.100"]
    assert rows["mean"] == ["2.500", "1.500"]
    assert rows["0"] == ["2.00", "2", "1.8", "0.250", "0.010"]
    assert "How its 4 experts a layer are used" in page
    assert all(len(line) <= 100 for line in page.splitlines())


def test_the_time_of_training_is_said(evaluation, tmp_path):
    summary = summarize(evaluation, make_config(tmp_path).model, 1000, 65.0)
    assert summary["training_seconds"] == 65.0
    assert render_summary(summary, 4).startswith("After 1,000 training tokens in 1m05s, on held")


def test_a_dense_model_has_no_table_of_experts(evaluation, tmp_path):
    config = make_config(tmp_path, {"model.feed_forward": "dense"})
    evaluation = evaluation._replace(tokens_per_expert=torch.zeros(2, 0, 4))
    summary = summarize(evaluation, config.model, 1000, 1.0)
    assert summary["layers"] == [] and "experts" not in render_summary(summary, 4)


def test_without_validation_text_the_page_says_so(evaluation, tmp_path):
    evaluation = evaluation._replace(loss={})
    summary = summarize(evaluation, make_config(tmp_path).model, 1000, 1.0)
    assert summary["mean_loss"] is None and json.dumps(summary, allow_nan=False)
    assert "there is no validation text" in render_summary(summary, 4)
