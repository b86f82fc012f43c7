"""Are the numbers of an analysis those of the model, worked out by another route?"""

import json
import math
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from analysis_cases import DOMAINS, EXPERTS, LAYERS, SAVED, TOKENS, K, analyze
from checkpoint_cases import flip_bit
from training_cases import data, run

from train.analyze import main
from train.generate import load_run
from train.packing import IGNORE

pytest_plugins = ["analysis_fixtures"]

# Sends each byte of `sums` to expert 1 and all else to expert 0: an expert for each domain.
PLANTED_ROUTER = """
import torch
from moe.router import RouterModule
from moe.routing import make_routing
from moe.variants import Count, VariantConfig

class Config(VariantConfig):
    top_k: Count = 1

class Router(RouterModule):
    replays = True
    learned = False

    def __init__(self, config, hidden_size, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x, context):
        ids = context.token_ids
        sums = torch.isin(ids, torch.tensor(list(b"0123456789+=\\n")))
        chosen = sums.long().unsqueeze(-1)
        if context.topk_indices is not None:
            chosen = context.topk_indices
        logits = torch.zeros(len(ids), self.num_experts).scatter_(1, sums.long().unsqueeze(-1), 9.0)
        weights = torch.where(chosen < 0, 0.0, 1.0)
        return make_routing(logits, logits.softmax(-1), weights, chosen, context.valid)
"""


@pytest.fixture(scope="module")
def rows(output) -> list[dict[str, Any]]:
    return pq.read_table(output / "routes.parquet").to_pylist()


@pytest.fixture(scope="module")
def sequences(run_dir):
    """(domain, batch of one sequence, output of the model) of the whole text, one at a time."""
    model, _, _ = load_run(run_dir)
    with torch.no_grad():
        return [
            (name, batch, model(batch.input_ids, document_ids=batch.document_ids))
            for name in DOMAINS
            for batch in data().validation_batches(name, 1, 16, max_tokens=TOKENS)
        ]


def layer_column(analysis: dict[str, Any], key: str) -> list[float]:
    return [layer[key] for layer in analysis["layers"]]


# ---- the table of routes


def test_rows_are_what_the_model_does_with_each_sequence(rows, sequences):
    each = iter(rows)
    for number, (domain, batch, output) in enumerate(sequences):
        labels = batch.labels[0].tolist()
        predicted = output.logits[0].argmax(-1).tolist()
        for position, token in enumerate(batch.input_ids[0].tolist()):
            known = labels[position] != IGNORE
            for layer, routing in enumerate(output.routings):
                row = next(each)
                assert (row["token_id"], row["position"], row["sequence"]) == (
                    token,
                    position,
                    number,
                )
                assert (row["domain"], row["layer"]) == (domain, layer)
                assert row["document"] == int(batch.document_ids[0, position])
                assert row["next_token_id"] == (labels[position] if known else -1)
                assert row["predicted_token_id"] == (predicted[position] if known else -1)
                assert row["experts"] == routing.topk_indices[position].tolist()
                assert row["weights"] == pytest.approx(
                    routing.topk_weights[position].tolist(), abs=1e-6
                )
    assert next(each, None) is None
    assert len(sequences) == 2 * TOKENS // 16


def test_columns_have_the_promised_types(output):
    schema = pq.read_schema(output / "routes.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "token_id": "int32",
        "next_token_id": "int32",
        "predicted_token_id": "int32",
        "position": "int32",
        "sequence": "int32",
        "document": "int32",
        "domain": "dictionary<values=string, indices=int32, ordered=0>",
        "layer": "int16",
        "experts": f"fixed_size_list<element: int16>[{K}]",
        "weights": f"fixed_size_list<element: float>[{K}]",
    }


# ---- the numbers, from the rows in plain Python


def entropy(counts) -> float:
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts if c)


def loads(rows, layer: int) -> dict[str, Counter]:
    found: dict[str, Counter] = {name: Counter() for name in DOMAINS}
    for row in rows:
        if row["layer"] == layer:
            found[row["domain"]].update(row["experts"])
    return found


def test_load_and_domains(analysis, rows):
    assert analysis["tokens"] == dict.fromkeys(DOMAINS, TOKENS)
    for layer, numbers in enumerate(analysis["layers"]):
        by_domain = [[loads(rows, layer)[d][e] for e in range(EXPERTS)] for d in DOMAINS]
        assert [domain[layer] for domain in analysis["load"]] == by_domain
        load = np.array(by_domain).sum(0)
        assert load.sum() == 2 * TOKENS * K
        sorted_load, mean = sorted(load), load.mean()
        differences = sum(abs(a - b) for a in load for b in load)
        expected = {
            "layer": layer,
            "max_violation": sorted_load[-1] / mean - 1,
            "effective_experts": math.exp(entropy(load)),
            "dead_experts": sum(load == 0),
            "starved_experts": sum(load < 0.1 * mean),
            "gini": differences / (2 * EXPERTS**2 * mean),
            "coefficient_of_variation": np.std(load) / mean,
        }
        joint = [count for domain in by_domain for count in domain]
        information = entropy([sum(d) for d in by_domain]) + entropy(load) - entropy(joint)
        expected["domain_information"] = information / entropy([sum(d) for d in by_domain])
        shares = [np.array(d) / sum(d) for d in by_domain]
        within = np.mean([entropy(share) for share in shares])
        expected["domain_divergence"] = entropy(np.mean(shares, 0)) - within
        found = {key: numbers[key] for key in expected}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_pairs_and_repeats(analysis, rows):
    for layer in range(LAYERS):
        pairs, same, neighbours = Counter(), 0, 0
        before = None
        for row in (row for row in rows if row["layer"] == layer):
            pairs.update((i, j) for i in row["experts"] for j in row["experts"])
            first = row["experts"][row["weights"].index(max(row["weights"]))]
            place = row["sequence"], row["document"]
            if before is not None and before[0] == place:
                neighbours += 1
                same += before[1] == first
            before = place, first
        found = analysis["co_activation_counts"][layer]
        assert found == [[pairs[i, j] for j in range(EXPERTS)] for i in range(EXPERTS)]
        rate = analysis["layers"][layer]["repeat_rate"]
        assert rate == pytest.approx(same / neighbours, rel=1e-12)


COLUMNS = {"input": "token_id", "next": "next_token_id", "predicted": "predicted_token_id"}


def vocabulary_by_hand(tokens, routes):
    """(number, {(expert, token): share}, occurrences) of tokens and the experts of each."""
    occurrences, got = Counter(tokens), Counter()
    for token, experts in zip(tokens, routes, strict=True):
        got.update((expert, token) for expert in experts)
    often = {t: n for t, n in occurrences.items() if n >= 8 and t >= 0}
    share = {(e, t): got[e, t] / n for t, n in often.items() for e in range(EXPERTS)}
    largest = {t: max(share[e, t] for e in range(EXPERTS)) for t in often}
    number = sum(largest[t] * n for t, n in often.items()) / sum(often.values())
    return number, share, occurrences


@pytest.mark.parametrize("role", COLUMNS)
def test_vocabulary_and_top_tokens(analysis, rows, role):
    order = torch.randperm(2 * TOKENS, generator=torch.Generator().manual_seed(0)).tolist()
    for layer in range(LAYERS):
        mine = [row for row in rows if row["layer"] == layer]
        # Fewer than 2,048 kinds of bytes: every input token is among the frequent ones.
        inputs = {row["token_id"] for row in mine}
        tokens = [t if (t := row[COLUMNS[role]]) in inputs else -1 for row in mine]
        routes = [row["experts"] for row in mine]
        number, share, occurrences = vocabulary_by_hand(tokens, routes)
        numbers = analysis["layers"][layer]
        assert numbers[f"vocabulary_{role}"] == pytest.approx(number, rel=1e-9)
        control, _, _ = vocabulary_by_hand([tokens[i] for i in order], routes)
        assert numbers[f"vocabulary_{role}_permuted"] == pytest.approx(control, rel=1e-9)
        for expert in range(EXPERTS):
            ranked = sorted(
                (-s, -occurrences[t], t) for (e, t), s in share.items() if e == expert and s
            )
            found = analysis["vocabulary"]["top_tokens"][role][layer][expert]
            assert [(t["token_id"], t["share"], t["occurrences"]) for t in found] == [
                (t, -s, -n) for s, n, t in ranked[:8]
            ]


def test_loss_and_the_routers_mind(analysis, sequences):
    nll: dict[str, list[float]] = defaultdict(list)
    mind: list[list[tuple[float, ...]]] = [[] for _ in range(LAYERS)]
    for domain, batch, output in sequences:
        log_probs = output.logits[0].double().log_softmax(-1)
        for position, label in enumerate(batch.labels[0].tolist()):
            if label != IGNORE:
                nll[domain].append(-float(log_probs[position, label]))
        for layer, routing in enumerate(output.routings):
            for probs in routing.router_probs.double().numpy():
                ranked = sorted(probs, reverse=True)
                mind[layer].append(
                    (entropy(probs) / math.log(EXPERTS), ranked[0], ranked[K - 1] - ranked[K])
                )
    by_domain = {name: float(np.mean(nll[name])) for name in DOMAINS}
    assert analysis["loss"]["domains"] == pytest.approx(by_domain, rel=1e-6)
    assert analysis["loss"]["mean"] == pytest.approx(np.mean(list(by_domain.values())), rel=1e-6)
    assert analysis["predicted_tokens"] == {name: len(nll[name]) for name in DOMAINS}
    for column, key in enumerate(("router_entropy", "router_confidence", "router_margin")):
        expected = [float(np.mean([token[column] for token in layer])) for layer in mind]
        assert layer_column(analysis, key) == pytest.approx(expected, rel=1e-5)


def test_the_numbers_are_those_of_the_end_of_the_run(run_dir, analysis):
    """The last evaluation of the training read the same text; so its controls are the same too."""
    summary = json.loads((run_dir / "summary.json").read_text())
    for ours, theirs in {
        "max_violation": "max_violation",
        "effective_experts": "effective_experts",
        "domain_information": "domain_information",
        "domain_information_shuffled": "domain_information_shuffled",
    }.items():
        assert layer_column(analysis, ours) == [layer[theirs] for layer in summary["layers"]]
    assert analysis["loss"]["mean"] == pytest.approx(summary["mean_loss"], rel=1e-6)
    assert (analysis["step"], analysis["version"]) == (40, 1)


def test_the_sample_of_text_is_the_beginning_of_the_rows(analysis, rows):
    for part in analysis["text"]:
        mine = [row for row in rows if row["domain"] == part["domain"]][: 300 * LAYERS]
        assert part["token_ids"] == [row["token_id"] for row in mine[::LAYERS]]
        assert part["starts"] == list(range(0, 300, 16))
        for layer in range(LAYERS):
            routes = mine[layer::LAYERS]
            assert part["experts"][layer] == [row["experts"] for row in routes]
            # The very same float32.
            found = np.array(part["weights"][layer], np.float32)
            assert (found == np.array([row["weights"] for row in routes], np.float32)).all()
        text = "".join(part["shown"])
        assert ("·" in text) == (part["domain"] == "prose") and "⟨end of text⟩" not in text[:3]


# ---- a router that is known


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A run whose router has an expert for the alphabet of each domain."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted_lab").mkdir()
    (folder / "planted_lab" / "alphabet.py").write_text(PLANTED_ROUTER)
    sys.path.insert(0, str(folder))
    changes = {"model.moe.router": {"name": "planted_lab.alphabet"}, "model.moe.losses": []}
    assert run(folder / "run", {**SAVED, **changes}) == 0
    yield folder / "run"
    sys.path.remove(str(folder))


def test_planted_experts_are_found(planted, analysis, tmp_path):
    found = analyze(planted, tmp_path, "--ablation-tokens", 64)
    assert min(layer_column(found, "domain_information")) > 0.95
    assert max(layer_column(found, "domain_information_shuffled")) < 0.2
    # The learned router of a short run knows less, and the control is what sets it apart.
    assert max(layer_column(analysis, "domain_information")) < 0.95
    assert layer_column(found, "vocabulary_input") == [1, 1]
    assert max(layer_column(found, "vocabulary_input_permuted")) < 0.9
    assert layer_column(found, "dead_experts") == [2, 2]
    # K = 1: there are no pairs.
    assert found["co_activation_counts"] is None
    # Without its expert, a domain loses; the other one, which never asks for it, does not.
    rise = found["ablation"]["rise_by_domain"]
    assert rise["sums"][0][0] == rise["prose"][1][1] == 0
    assert all(rise[name][layer][e] == 0 for name in rise for layer in (0, 1) for e in (2, 3))
    assert found["ablation"]["top_experts"][0]["rise"] > 0.01


def test_a_router_that_cannot_replay_has_no_ablation(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["planted_lab.alphabet"].Router, "replays", False)
    found = analyze(planted, tmp_path)
    assert "planted_lab.alphabet cannot take routes" in found["ablation"]["skipped"]


# ---- other checkpoints


def probe_by_hand(run_dir: Path, step: int) -> tuple[dict[str, float], list[list[set[int]]], list]:
    """(loss by domain, experts of each token by layer, load by layer) of a checkpoint."""
    model, _, _ = load_run(run_dir, step=step)
    losses, routes, load = {}, [[] for _ in range(LAYERS)], [Counter() for _ in range(LAYERS)]
    for name in DOMAINS:
        total, number = 0.0, 0
        for batch in data().validation_batches(name, 1, 16, max_tokens=8192 // 2):
            with torch.no_grad():
                out = model(batch.input_ids, batch.labels, batch.document_ids)
            total += float(out.lm_loss) * int(out.num_labels)
            number += int(out.num_labels)
            for layer, routing in enumerate(out.routings):
                routes[layer] += [set(experts) for experts in routing.topk_indices.tolist()]
                load[layer].update(routing.topk_indices.flatten().tolist())
        losses[name] = total / number
    return losses, routes, load


def test_against_another_checkpoint(run_dir, analysis):
    then, now = probe_by_hand(run_dir, 25), probe_by_hand(run_dir, 40)
    saturation = analysis["saturation"]
    against = saturation["against"]
    assert saturation["probe_tokens"] == len(now[1][0])
    assert against["step"] == 25
    for layer, row in enumerate(against["layers"]):
        same = sum(len(a & b) for a, b in zip(then[1][layer], now[1][layer], strict=True))
        assert row["overlap"] == pytest.approx(same / (K * len(now[1][layer])), rel=1e-12)
        assert 0.2 < row["overlap"] < 1
        shares = [
            [load[layer][e] / load[layer].total() for e in range(EXPERTS)]
            for load in (then[2], now[2])
        ]
        moved = sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2
        assert row["load_moved"] == pytest.approx(moved, rel=1e-9)
        for name, share in zip(("against", "analysed"), shares, strict=True):
            violation = EXPERTS * max(share) - 1
            assert row[f"max_violation_{name}"] == pytest.approx(violation, rel=1e-5)
    for name in DOMAINS:
        expected = {"against": then[0][name], "analysed": now[0][name]}
        assert against["loss"][name] == pytest.approx(expected, rel=1e-6)
    assert saturation["checkpoints"] == [
        {"step": 25, "overlap": [row["overlap"] for row in against["layers"]]}
    ]


def test_an_earlier_step_can_be_analysed_and_a_damaged_other_is_left_out(
    run_dir, analysis, tmp_path, capsys
):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    file = copy / "checkpoints" / "step_00000040" / "model.safetensors"
    flip_bit(file, 4 * file.stat().st_size)
    found = analyze(copy, tmp_path / "out", "--step", 25, "--ablation-tokens", 0)
    assert found["step"] == 25 and found["loss"] != analysis["loss"]
    assert found["saturation"]["checkpoints"] == []
    assert found["ablation"] == {"skipped": "left out by --ablation-tokens 0"}
    error = capsys.readouterr().err
    assert "step_00000040 is damaged" in error and "left out" in error
    assert main([str(copy), "--step", "40"]) == 4
    assert main([str(copy), "--step", "25", "--against", "40"]) == 4


def test_routes_that_the_training_wrote_become_a_curve(run_dir, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    folder = copy / "probe_routes"
    folder.mkdir()
    draw = np.random.default_rng(0)
    routes = {
        step: draw.permuted(np.tile(np.arange(EXPERTS), (50, LAYERS, 1)), axis=2)[..., :K]
        for step in (10, 20, 40)
    }
    for step, values in routes.items():
        np.save(folder / f"step_{step:08d}.npy", values.astype(np.int16))
    np.save(folder / "step_00000030.npy", np.zeros((49, LAYERS, K), np.int16))
    (folder / "step_00000035.npy").write_bytes(b"")
    np.save(folder / "step_00000036.npy", np.array([{}], dtype=object))
    found = analyze(copy, tmp_path / "out", "--ablation-tokens", 0)["saturation"]["training"]
    assert (found["steps"], found["probe_tokens"]) == ([10, 20, 40], 50)
    for step, overlap in zip(found["steps"], found["overlap"], strict=True):
        for layer in range(LAYERS):
            same = sum(
                len(set(a) & set(b))
                for a, b in zip(routes[step][:, layer], routes[40][:, layer], strict=True)
            )
            assert overlap[layer] == pytest.approx(same / (50 * K), rel=1e-12)
    assert found["overlap"][-1] == [1, 1]
    error = capsys.readouterr().err
    assert "probe_routes, step 30: holds (49, 2, 2), needs (50, 2, 2) (N, L, K); left out" in error
    assert error.count("left out") == 3
