"""Is an expert switched off whatever else a layer has: a capacity, experts that cost nothing, a
router without a bound? `tests/test_analyze.py` does it on a trained run."""

from types import SimpleNamespace

import pytest
import torch
from model_cases import tiny_model, tokens

from moe.routing import make_routing
from train.expert_ablation import ablate_experts
from train.packing import IGNORE, Batch

DOMAINS = torch.tensor([0, 1, 1, 0])


def text():
    """Two batches of two domains, the first sequence without its last labels."""
    batches = []
    for seed in (1, 2):
        ids = tokens(4, 12, seed=seed)
        labels = ids.roll(-1, 1)
        labels[0, 7:] = IGNORE
        batches.append(Batch(ids, labels, torch.zeros(4, 12, dtype=torch.int32), DOMAINS))
    data = SimpleNamespace(domain_names=("prose", "sums"))
    return SimpleNamespace(data=data, mixed_batches=lambda: iter(batches))


def losses(model):
    """(domains,) mean loss of the text."""
    total, number = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for batch in text().mixed_batches():
        with torch.no_grad():
            logits = model(batch.input_ids, document_ids=batch.document_ids).logits.double()
        for row, domain in enumerate(DOMAINS.tolist()):
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
