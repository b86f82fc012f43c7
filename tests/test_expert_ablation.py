"""Is the loss without an expert that of a model whose router never chose it, on a trained run and
whatever else a layer has: a capacity, experts that cost nothing, a router without a bound?"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analysis_cases import ABLATION_TOKENS, DOMAINS, EXPERTS, LAYERS, analyze
from model_cases import tiny_model, tokens
from training_cases import data

from moe.routing import make_routing
from train.checkpoint import load_checkpoint, save_checkpoint
from train.expert_ablation import ablate_experts
from train.generate import load_run
from train.packing import IGNORE, Batch

pytest_plugins = ["analysis_fixtures"]

# Of the sequences of a batch of `text`.
DOMAIN_IDS = torch.tensor([0, 1, 1, 0])


def text():
    """Two batches of two domains, the first sequence without its last labels."""
    batches = []
    for seed in (1, 2):
        ids = tokens(4, 12, seed=seed)
        labels = ids.roll(-1, 1)
        labels[0, 7:] = IGNORE
        batches.append(Batch(ids, labels, torch.zeros(4, 12, dtype=torch.int32), DOMAIN_IDS))
    named = SimpleNamespace(domain_names=DOMAINS)
    return SimpleNamespace(data=named, mixed_batches=lambda: iter(batches))


def losses(model):
    """(domains,) mean loss of the text."""
    total, number = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for batch in text().mixed_batches():
        with torch.no_grad():
            logits = model(batch.input_ids, document_ids=batch.document_ids).logits.double()
        for row, domain in enumerate(DOMAIN_IDS.tolist()):
            known = batch.labels[row] != IGNORE
            picked = logits[row].log_softmax(-1)[known, batch.labels[row][known]]
            total[domain] -= picked.sum()
            number[domain] += int(known.sum())
    return total / number


def take_out(expert, normalize):
    """A hook on a router: its Routing without an expert, before any capacity looks at it."""

    def hook(module, arguments, routing):
        gone = routing.topk_indices == expert
        weights = routing.topk_weights.masked_fill(gone, 0)
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        indices = routing.topk_indices.masked_fill(gone, -1)
        return make_routing(routing.router_logits, routing.router_probs, weights, indices, None)

    return hook


@pytest.mark.parametrize(
    ("moe", "normalize"),
    [
        ({"capacity_factor": 0.7, "eval_capacity_factor": 0.7}, True),
        ({"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 1}, True),
        ({"router": {"name": "top_p", "normalize": False}}, False),
    ],
    ids=["capacity", "costless", "top_p"],
)
def test_the_rise_is_that_of_a_layer_whose_router_never_chose_the_expert(moe, normalize):
    model = tiny_model(moe=moe).eval()
    found = ablate_experts(model, text())
    whole = losses(model)
    assert found.loss.tolist() == pytest.approx(whole.tolist(), rel=1e-6)
    for layer, choices in enumerate(model.config.choices_of_layers):
        for expert in range(choices):
            router = model.blocks[layer].feed_forward.router
            handle = router.register_forward_hook(take_out(expert, normalize))
            expected = losses(model) - whole
            handle.remove()
            rise = found.rise[:, layer, expert].tolist()
            assert rise == pytest.approx(expected.tolist(), abs=2e-6)
    assert found.rise.abs().max() > 1e-2
    assert int(found.assignments.sum()) == sum(
        int(routing.demand.sum())
        for batch in text().mixed_batches()
        for routing in model(batch.input_ids).routings
    )


# ---- of a trained run


def losses_without(run_dir: Path, layer: int, expert: int) -> dict[str, float]:
    """Loss of each domain with one expert's part taken out of its layer's sum by a hook on the
    router, the weights of the others divided by their sum."""
    model, _, _ = load_run(run_dir)

    def take_out(module, arguments, routing):
        weights = routing.topk_weights.masked_fill(routing.topk_indices == expert, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        return routing._replace(topk_weights=weights)

    if expert >= 0:
        model.blocks[layer].feed_forward.router.register_forward_hook(take_out)
    losses = {}
    with torch.no_grad():
        for name in DOMAINS:
            each = []
            for batch in data().validation_batches(name, 1, 16, max_tokens=ABLATION_TOKENS // 2):
                logits = model(batch.input_ids, document_ids=batch.document_ids).logits[0]
                known = batch.labels[0] != IGNORE
                picked = logits.double().log_softmax(-1)[known, batch.labels[0][known]]
                each += (-picked).tolist()
            losses[name] = float(np.mean(each))
    return losses


def test_ablation_is_a_forward_without_the_experts_part(run_dir, analysis):
    found = analysis["ablation"]
    whole = losses_without(run_dir, 0, -1)
    assert found["loss"] == pytest.approx(whole, rel=1e-6)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            without = losses_without(run_dir, layer, expert)
            rises = {name: without[name] - whole[name] for name in DOMAINS}
            for name, rise in rises.items():
                assert found["rise_by_domain"][name][layer][expert] == pytest.approx(rise, abs=1e-6)
            mean = sum(rises.values()) / len(rises)
            assert found["rise"][layer][expert] == pytest.approx(mean, abs=1e-6)
    assert max(abs(rise) for layer in found["rise"] for rise in layer) > 1e-3


def test_the_experts_that_matter_most_come_first(analysis):
    found = analysis["ablation"]
    places = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    ranked = sorted(places, key=lambda place: -found["rise"][place[0]][place[1]])
    assert [(row["layer"], row["expert"]) for row in found["top_experts"]] == ranked
    for row in found["top_experts"]:
        rises = {n: r[row["layer"]][row["expert"]] for n, r in found["rise_by_domain"].items()}
        assert row["domain"] == max(rises, key=rises.__getitem__)
        assert row["domain_rise"] == rises[row["domain"]]


def test_a_planted_important_expert_ranks_first(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    checkpoint = load_checkpoint(copy / "checkpoints" / "step_00000040")
    weights = dict(checkpoint.tensors["model"])
    planted = "blocks.1.feed_forward.experts.3.w2"
    assert planted in weights
    for name in weights.keys() - {planted}:
        # All others answer a hundredth of what they did.
        if ".experts." in name and name.endswith(".w2"):
            weights[name] = 0.01 * weights[name]
    save_checkpoint(copy, 41, {"model": weights}, checkpoint.state, keep_last=3)
    found = analyze(copy, tmp_path / "out", "--ablation-tokens", 256)["ablation"]["top_experts"]
    assert (found[0]["layer"], found[0]["expert"]) == (1, 3)
    assert found[0]["rise"] > 3 * abs(found[1]["rise"])
