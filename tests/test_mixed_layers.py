"""Does a model whose layers differ in experts, choices, widths and routers add up, layer by layer?

Oracles look at each layer alone, as NumPy has it from the chosen experts.
"""

import numpy as np
import pytest
import torch
from mixed_cases import CHOICES, EXPERTS, choices, mixed_model
from model_cases import tiny_model, tokens
from training_cases import make_config, make_engine, micro_batches, run

from moe.generate import generate
from moe.layer import MoELayer
from train.scalars import StepFacts, step_scalars
from train.step import router_biases, train_step


def test_losses_are_the_mean_of_each_layer_with_its_own_experts():
    model = mixed_model(dtype=torch.float64)
    out = model(tokens(2, 8), tokens(2, 8, seed=2))
    balance, z = [], []
    for routing, experts, chosen in zip(out.routings, EXPERTS, CHOICES, strict=True):
        logits = routing.router_logits.detach().numpy()
        assert routing.topk_indices.shape == (16, chosen) and logits.shape == (16, experts)
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        frequency = choices(routing.topk_indices, experts) / (16 * chosen)
        balance.append(experts * (frequency * probs.mean(0)).sum())
        z.append((np.log(np.exp(logits).sum(1)) ** 2).mean())
    found = [value.item() for value in out.aux_losses]
    assert found == pytest.approx([np.mean(balance), np.mean(z)], rel=1e-9)


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = mixed_model(dtype=torch.float64)
        model.activation_checkpointing = recompute
        model(tokens(2, 8), tokens(2, 8, seed=2)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-10, atol=1e-12)


def test_generation_with_a_cache_continues_as_a_forward_pass_would():
    model = mixed_model(dtype=torch.float64).eval()
    prompt = tokens(1, 5)
    (continued,) = generate(model, prompt, 4, temperature=0)  # the prompt and what follows
    ids = prompt
    for _ in range(4):
        following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    assert continued.tolist() == ids[0].tolist()


def test_routes_of_a_layer_have_its_own_choices():
    model = mixed_model()
    ids = tokens(2, 8)
    own = [routing.topk_indices.view(2, 8, -1) for routing in model(ids).routings]
    taken = [(each + 1) % number for each, number in zip(own, EXPERTS, strict=True)]
    given = model(ids, routes=taken).routings
    for routing, wanted in zip(given, taken, strict=True):
        assert torch.equal(routing.topk_indices.view(2, 8, -1), wanted)
    taken[1] = torch.cat([taken[1], taken[1]], -1)
    with pytest.raises(ValueError, match=r"layer 1 are \(2, 8, 4\), need \(2, 8, 2\)"):
        model(ids, routes=taken)


def test_a_layer_whose_router_cannot_replay_chooses_freely_beside_others():
    layers = [{"layers": [1], "router": {"name": "relu"}}]
    model, ids = tiny_model(moe={"layers": layers}), tokens(2, 8)
    given = torch.arange(2).expand(2, 8, 2)
    routing = model(ids, routes=[given, None]).routings[0]
    assert torch.equal(routing.topk_indices.view(2, 8, 2), given)
    with pytest.raises(ValueError, match=r"model\.moe\.layers\.0\.router\.name \(relu\) cannot"):
        model(ids, routes=[None, given])


def test_a_run_whose_layers_cannot_all_replay_is_refused(tmp_path, capsys):
    changes = {"model.moe.layers": [{"layers": [1], "router": {"name": "relu"}}]}
    assert run(tmp_path / "run", changes | {"routes.replay": str(tmp_path / "routes")}) == 2
    assert "model.moe.layers.0.router.name (relu) cannot take routes" in capsys.readouterr().err


def test_each_router_is_told_of_its_own_layer(tmp_path):
    routers = [
        {"name": "topk", "bias_update_rate": 0.5},
        {"name": "relu", "factor": 1.5, "initial_lambda": 0.01},
        {"name": "hash"},
        {"name": "quantile", "decay": 0.0},
    ]
    experts = (4, 6, 8, 5)
    changes = {
        "model.num_layers": 4,
        "model.moe.router": routers[0],
        "model.moe.layers": [
            {"layers": [layer], "num_experts": experts[layer], "router": routers[layer]}
            for layer in (1, 2, 3)
        ],
    }
    config = make_config(tmp_path, changes)
    engine = make_engine(config)
    collected: list = []
    metrics = train_step(
        engine, micro_batches(config), 0, config, seen=collected.append, detail=True
    )
    layers = [m for m in engine.model.modules() if isinstance(m, MoELayer)]
    # The loss-free bias: half up where an expert had less than the mean, half down for more.
    load = sum(choices(routings[0].topk_indices, 4) for routings in collected)
    moved = 0.5 * np.sign(load.mean() - load)
    assert layers[0].router.expert_bias.tolist() == pytest.approx(moved.tolist())
    # ReLU's lambda: up where tokens have more than two experts on average.
    taken = sum(choices(routings[1].topk_indices, 6) for routings in collected).sum() / 64
    expected = 0.01 * 1.5 ** np.sign(taken - 2)
    assert float(layers[1].router.penalty_weight) == pytest.approx(expected)
    # The quantile router's prices: minus the mean of what its passes found.
    prices = -np.mean([routings[3].feedback.numpy() for routings in collected], 0)
    assert layers[3].router.expert_bias.tolist() == pytest.approx(prices.tolist(), abs=1e-6)
    # A layer's penalty counts as much as if the others had one.
    penalties = [routings[1].penalty.item() for routings in collected]
    assert metrics.aux_losses["router_penalty"] == pytest.approx(np.mean(penalties) / 4)
    bias = router_biases(engine.model)
    assert bias.isfinite().sum(-1).tolist() == [4, 0, 0, 5]
    values = step_scalars(metrics, StepFacts(metrics.tokens_per_expert, 1.0, bias=bias), range(4))
    ranges = {tag: value for tag, value in values.items() if tag.startswith("router/bias_range")}
    spread = [float(np.ptp(moved)), float(np.ptp(prices))]
    assert ranges == pytest.approx(
        {
            "router/bias_range/layer00": spread[0],
            "router/bias_range/layer03": spread[1],
            "router/bias_range/all_layers": max(spread),
        },
        abs=1e-6,
    )
