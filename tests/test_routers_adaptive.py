"""Do noisy top-k, top-p, ReLU and quantile routing compute their formulas, and do their controllers
arrive? What all routers keep: `tests/test_router_contract.py`."""

import math

import numpy as np
import pytest
import torch
from conftest import randn, relative_error
from model_cases import tiny_config, tiny_model, tokens
from router_cases import D, E, T, build, context, dense_weights, route

from moe.model import BatchTotals
from moe.routing import RouterContext
from moe.variants import load_variant
from train.step import add_output


def clean_logits(router, x):
    return x.double().numpy() @ router.weight.detach().double().numpy().T


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def long_context(num_tokens, training=True, valid=None):
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    return RouterContext(ids, None, valid, (1, num_tokens), training, generator)


def identity_router(name, settings, num_experts=8):
    """A router whose logits are its inputs."""
    module = load_variant("routers", name)
    router = module.Router(module.Config(name=name, **settings), num_experts, num_experts)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def max_violation(counts):
    counts = counts.double()
    return float(counts.max() / counts.mean() - 1)


# ---- noisy top-k


@pytest.mark.parametrize("training", [False, True])
def test_noisy_topk_is_the_formula(training):
    router, x = build("noisy_topk", {"top_k": 3}), randn(T, D, seed=9)
    routing = route(router, x, training=training)
    noise = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).double().numpy()
    clean = clean_logits(router, x)
    wide = np.log1p(np.exp(x.double().numpy() @ router.noise_weight.detach().double().numpy().T))
    noisy = clean + noise * wide if training else clean
    kept = np.where(noisy >= np.sort(noisy, -1)[:, -3:-2], noisy, -np.inf)
    assert relative_error(dense_weights(routing, E), torch.from_numpy(softmax(kept))) < 1e-5
    assert relative_error(routing.router_logits, torch.from_numpy(clean)) < 1e-5
    assert relative_error(routing.router_probs, torch.from_numpy(softmax(clean))) < 1e-5
    assert relative_error(routing.noise_std, torch.from_numpy(wide)) < 1e-5
    assert relative_error(routing.selection_logits, torch.from_numpy(noisy)) < 1e-5


def test_noise_has_the_width_that_is_learned_and_none_in_evaluation():
    router = identity_router("noisy_topk", {})
    with torch.no_grad():
        router.noise_weight.copy_(torch.diag(torch.arange(8) - 4.0))
    x = torch.ones(20_000, 8)
    routing = router(x, long_context(len(x)))
    noise = routing.selection_logits - routing.router_logits
    expected = torch.nn.functional.softplus(torch.arange(8) - 4.0)
    # The standard deviation of n draws is itself known to 1 / sqrt(2 n).
    assert ((noise.std(0) / expected - 1).abs() < 4 / math.sqrt(2 * len(x))).all()
    assert (noise.mean(0).abs() < 4 * expected / math.sqrt(len(x))).all()
    still = router(x, long_context(len(x), training=False))
    assert torch.equal(still.selection_logits, still.router_logits)


def test_gradient_of_the_noise_weight_is_that_of_finite_differences():
    router = build("noisy_topk", {"top_k": 3}, torch.float64)
    x, grad = randn(T, D, seed=9, dtype=torch.float64), randn(T, 3, seed=5, dtype=torch.float64)

    def total():
        return (route(router, x, training=True).topk_weights * grad).sum()

    total().backward()
    for place in ((0, 0), (2, 7), (5, 3)):
        with torch.no_grad():
            router.noise_weight[place] += 1e-6
            above = total()
            router.noise_weight[place] -= 2e-6
            below = total()
            router.noise_weight[place] += 1e-6
        slope = float(above - below) / 2e-6
        assert slope != 0
        assert float(router.noise_weight.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_noise_reaches_a_load_in_the_gradient():
    router, x = build("noisy_topk", {}), randn(T, D, seed=9)
    routing = route(router, x, training=True)
    (routing.router_logits / routing.noise_std).square().sum().backward()
    assert router.noise_weight.grad.abs().sum() > 0


def test_noise_begins_with_one_width_for_all():
    model = tiny_model(moe={"router": {"name": "noisy_topk"}})
    routers = [b.feed_forward.router for b in model.blocks if hasattr(b.feed_forward, "router")]
    assert routers
    for router in routers:
        assert torch.count_nonzero(router.noise_weight) == 0
        assert torch.count_nonzero(router.weight) == router.weight.numel()


@pytest.mark.parametrize("name", ["noisy_topk", "quantile"])
def test_one_expert_with_normalised_weights_is_refused(name):
    with pytest.raises(ValueError, match=r"normalize \(True\) with top_k \(1\) makes every weight"):
        load_variant("routers", name).Config(top_k=1)


# ---- top-p


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("p", "most"), [(0.05, None), (0.6, None), (0.9, 3), (1.0, None)])
def test_top_p_is_the_formula(p, most, normalize):
    router = build("top_p", {"p": p, "max_experts": most, "normalize": normalize})
    x = randn(T, D, seed=9) / 4
    routing = route(router, x)
    expected, probs = np.zeros((T, E)), softmax(clean_logits(router, x))
    for token, row in enumerate(probs):
        total = 0.0
        for rank, expert in enumerate(np.argsort(-row)):
            if rank == most or (total >= p and rank > 0):
                break
            expected[token, expert] = row[expert]
            total += row[expert]
    if normalize:
        expected /= expected.sum(-1, keepdims=True)
    dense = dense_weights(routing, E)
    assert torch.equal(dense > 0, torch.from_numpy(expected > 0))
    assert relative_error(dense, torch.from_numpy(expected)) < 1e-5
    each = (routing.topk_indices >= 0).sum(-1)
    assert routing.topk_indices.shape[1] == (most or E)
    assert each.min() >= 1
    if p == 0.6:
        assert each.unique().numel() > 1, "tokens differ in how many they take"


def test_top_p_controller_by_hand():
    settings = {"p": 0.5, "target": 2.0, "proportional": 0.3, "integral": 0.2}
    router = build("top_p", settings)
    counts = torch.zeros(E)
    # Mean 3.2: e = -0.2, log(1 - p) -= (0.3 + 0.2) * -0.2.
    router.after_step(counts, torch.tensor([1.0, 1.0, 1.0, 0.2, 0, 0]))
    assert float(router.threshold) == pytest.approx(1 - 0.5 * math.exp(0.1), rel=1e-6)
    # Mean 1.4: e = 0.1, log(1 - p) -= 0.3 * (0.1 + 0.2) + 0.2 * 0.1.
    router.after_step(counts, torch.tensor([1.0, 0.4, 0, 0, 0, 0]))
    assert float(router.threshold) == pytest.approx(1 - 0.5 * math.exp(0.1 - 0.11), rel=1e-6)
    # A step without a token says nothing.
    router.after_step(counts, torch.zeros(E))
    assert float(router.threshold) == pytest.approx(1 - 0.5 * math.exp(0.1 - 0.11), rel=1e-6)
    for _ in range(1000):
        router.after_step(counts, torch.tensor([1.0, 0, 0, 0, 0, 0]))
    assert float(router.threshold) == pytest.approx(1 - 1e-6, abs=1e-7)
    # From a bound it comes back at once.
    router.after_step(counts, torch.ones(E))
    assert float(router.threshold) < 1 - 1.3e-6
    still = build("top_p", {"p": 0.5})
    still.after_step(counts)
    assert float(still.threshold) == 0.5


@pytest.mark.parametrize("target", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_top_p_arrives_at_its_target(target, sharpness):
    router = identity_router("top_p", {"target": target})
    shift = 0.5 * torch.linspace(-1, 1, 8)
    means = []
    for step in range(300):
        x = sharpness * (randn(1000, 8, seed=step) + shift)
        routing = router(x, long_context(1000))
        router.after_step(routing.tokens_per_expert, routing.feedback)
        means.append(float(routing.tokens_per_expert.sum()) / 1000)
    late = sum(means[-100:]) / 100
    print(f"target {target}, sharpness {sharpness}: first {means[0]:.2f}, last 100 {late:.4f}")
    assert abs(late / target - 1) < 0.02
    # Nor does it swing about it: what the batches' own noise leaves.
    assert max(abs(m / target - 1) for m in means[-100:]) < 0.1


def test_top_p_refuses_what_has_no_effect():
    config = load_variant("routers", "top_p").Config
    with pytest.raises(ValueError, match="integral has no effect without a target"):
        config(integral=0.75)
    with pytest.raises(ValueError, match=r"max_experts \(1\) leaves one expert"):
        config(max_experts=1, normalize=True)
    with pytest.raises(ValueError, match=r"target \(3.0\) must not exceed max_experts \(2\)"):
        config(target=3, max_experts=2)
    for name, value in (("max_experts", "9"), ("target", "9.0")):
        router = {"name": "top_p", name: float(value)}
        with pytest.raises(ValueError, match=rf"router\.{name} \({value}\) must not exceed model"):
            tiny_config(moe={"num_experts": 6, "router": router})


# ---- ReLU


def test_relu_is_the_formula_and_so_is_its_penalty():
    router = build("relu", {"target": 1.5, "initial_lambda": 0.01})
    x, valid = randn(T, D, seed=9), torch.arange(T) % 4 > 0
    routing = route(router, x, valid=valid)
    activation = np.maximum(clean_logits(router, x), 0)
    kept = activation[valid.numpy()]
    expected = np.where(valid.numpy()[:, None], activation, 0)
    assert relative_error(dense_weights(routing, E), torch.from_numpy(expected)) < 1e-5
    load = E / (1.5 * len(kept)) * (kept > 0).sum(0)
    penalty = 0.01 / len(kept) * (load * kept).sum()
    assert routing.penalty.item() == pytest.approx(penalty, rel=1e-5)
    share = torch.from_numpy((kept > 0).mean(0))
    assert relative_error(routing.feedback, share) < 1e-6
    # Its gradient goes through the activations alone, as that of a sum with fixed load.
    routing.penalty.backward()
    rows = x.double().numpy()[valid.numpy()]
    slope = 0.01 / len(kept) * load[:, None] * ((kept > 0).T @ rows)
    assert relative_error(router.weight.grad, torch.from_numpy(slope)) < 1e-5


def test_relu_lambda_by_hand():
    router = build("relu", {"target": 2.0, "factor": 1.2, "initial_lambda": 0.5})
    for share, expected in ((0.4, 0.6), (0.4, 0.72), (0.2, 0.6), (2 / 6, 0.6)):
        router.after_step(torch.zeros(E), torch.full((E,), share))
        assert float(router.penalty_weight) == pytest.approx(expected, rel=1e-6)
    for _ in range(200):
        router.after_step(torch.zeros(E), torch.zeros(E))
    assert float(router.penalty_weight) == pytest.approx(1e-10)
    for _ in range(300):
        router.after_step(torch.zeros(E), torch.ones(E))
    assert float(router.penalty_weight) == pytest.approx(1e3)


def test_relu_arrives_at_its_sparsity_while_it_learns():
    num_experts, width = 8, 16
    module = load_variant("routers", "relu")
    config = module.Config(target=2.0, initial_lambda=1e-4)
    router = module.Router(config, width, num_experts)
    with torch.no_grad():
        router.weight.copy_(0.3 * randn(num_experts, width, seed=0))
    experts = torch.nn.Parameter(0.3 * randn(num_experts, width, width, seed=1))
    teacher = 0.5 * randn(num_experts, width, width, seed=2)
    of_teacher = randn(num_experts, width, seed=3)
    optimizer = torch.optim.Adam([router.weight, experts], lr=1e-2)
    sparsity, losses = [], []
    for step in range(800):
        x = randn(256, width, seed=100 + step)
        # Without a bias and around 0, every logit would be positive for half of the tokens.
        x[:, 0] = 2
        best = (x @ of_teacher.T).argmax(-1)
        wanted = torch.einsum("td,tdf->tf", x, teacher[best])
        routing = router(x, long_context(256))
        out = torch.einsum("te,td,edf->tf", dense_weights(routing, num_experts), x, experts)
        loss = (out - wanted).square().mean()
        optimizer.zero_grad()
        (loss + routing.penalty).backward()
        optimizer.step()
        router.after_step(routing.tokens_per_expert, routing.feedback)
        sparsity.append(1 - float(routing.feedback.mean()))
        losses.append(loss.item())
    late = sum(sparsity[-200:]) / 200
    print(
        f"sparsity {sparsity[0]:.3f} -> {late:.4f} (target 0.75), "
        f"lambda {float(router.penalty_weight):.2e}, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    assert sparsity[0] < 0.6
    assert abs(late / 0.75 - 1) < 0.02
    assert sum(losses[-50:]) < 0.8 * sum(losses[:50])


def test_relu_target_must_leave_something_at_0():
    with pytest.raises(ValueError, match=r"router.target \(6.0\) must be less than model"):
        tiny_config(moe={"num_experts": 6, "router": {"name": "relu", "target": 6}})


# ---- quantile


def test_quantile_prices_are_the_formula():
    top_k, rounds = 2, 3
    scores = randn(T, E, seed=3, dtype=torch.float64).sigmoid()
    prices = load_variant("routers", "quantile").balancing_prices
    beta, s = np.zeros(E), scores.numpy()
    for _ in range(rounds):
        alpha = np.sort(s - beta, 1)[:, -top_k - 1]
        falling = -np.sort(-(s - alpha[:, None]), 0)
        beta = (falling[T * top_k // E - 1] + falling[T * top_k // E]) / 2
        beta -= beta.mean()
    start = torch.zeros(E, dtype=torch.float64)
    assert relative_error(prices(scores, top_k, None, start, rounds), torch.tensor(beta)) < 1e-12
    # Padding between them changes nothing.
    padded = torch.full((2 * T, E), 9.0, dtype=torch.float64)
    padded[::2] = scores
    valid = torch.arange(2 * T) % 2 == 0
    assert relative_error(prices(padded, top_k, valid, start, rounds), torch.tensor(beta)) < 1e-12
    # Nothing can be said of no token, or of fewer assignments than experts.
    few = torch.arange(T) < 2
    for mask in (few, few & False):
        assert torch.equal(prices(scores, top_k, mask, start + 1, rounds), start + 1)


def test_quantile_weighs_by_scores_without_prices():
    router, x = build("quantile", {"top_k": 2}), randn(T, D, seed=9)
    router.expert_bias.copy_(torch.tensor([0.5, 0, 0, 0, 0, -0.5]))
    scores = 1 / (1 + np.exp(-clean_logits(router, x)))
    biased = scores + router.expert_bias.double().numpy()
    kept = np.where(biased >= np.sort(biased, -1)[:, -2:-1], scores, 0)
    expected = torch.from_numpy(kept / kept.sum(-1, keepdims=True))
    assert relative_error(dense_weights(route(router, x), E), expected) < 1e-5


@pytest.mark.parametrize("source", ["previous", "batch"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_quantile_balances_the_batch_that_it_was_computed_on(score, source):
    num_tokens, num_experts, top_k = 80_000, 8, 2
    router = identity_router("quantile", {"source": source, "score": score})
    # Scores that differ by 0.3 between the first expert and the last, as sigmoid scores do here.
    x = randn(num_tokens, num_experts, seed=1) + 0.75 * torch.linspace(-1, 1, num_experts)
    means = x.sigmoid().mean(0)
    assert 0.29 < float(means[-1] - means[0]) < 0.31
    facts = long_context(num_tokens)
    plain = identity_router("topk", {"top_k": top_k})(x, facts).tokens_per_expert
    routing = router(x, facts)
    if source == "previous":
        assert torch.equal(routing.tokens_per_expert, plain)
        router.after_step(routing.tokens_per_expert, routing.feedback)
        routing = router(x, facts)
    random = randn(num_tokens, num_experts, seed=2).topk(top_k).indices.flatten().bincount()
    assert routing.tokens_per_expert.double().mean() == 20_000
    print(
        f"{score}, {source}: MaxVio {max_violation(plain):.3f} -> "
        f"{max_violation(routing.tokens_per_expert):.4f}, of random routing "
        f"{max_violation(random):.4f}"
    )
    assert max_violation(plain) > 0.5
    assert max_violation(routing.tokens_per_expert) < 0.1


def test_quantile_of_the_batches_before_balances_the_next():
    router = identity_router("quantile", {"decay": 0.5})
    shift = 0.75 * torch.linspace(-1, 1, 8)
    for step in range(8):
        routing = router(randn(4000, 8, seed=step) + shift, long_context(4000))
        router.after_step(routing.tokens_per_expert, routing.feedback)
    fresh = router(randn(80_000, 8, seed=99) + shift, long_context(80_000, training=False))
    assert fresh.feedback is None
    assert max_violation(fresh.tokens_per_expert) < 0.1


def test_quantile_update_by_hand():
    router = build("quantile", {"decay": 0.75})
    router.after_step(torch.zeros(E), torch.tensor([4.0, 0, 0, 0, 0, -4.0]))
    assert router.expert_bias.tolist() == [-1, 0, 0, 0, 0, 1]
    router.after_step(torch.zeros(E), torch.tensor([5.0, 0, 0, 0, 0, -1.0]))
    assert router.expert_bias.tolist() == [-2, 0, 0, 0, 0, 1]
    assert torch.equal(router.selection_bias, router.expert_bias)


def test_prices_of_the_same_batch_are_refused_unless_allowed():
    router = {"name": "quantile", "source": "batch"}
    with pytest.raises(
        ValueError, match=r"set model\.moe\.allow_non_causal: true to use it anyway"
    ):
        tiny_config(moe={"router": router})
    tiny_config(moe={"router": router, "allow_non_causal": True})
    tiny_config(moe={"router": {"name": "quantile"}})
    # In evaluation it has none but the earlier ones, and so is causal there.
    own, x = build("quantile", {"source": "batch"}), randn(T, D, seed=9)
    alone = own(x[:1], context(shape=(1, 1)))
    assert torch.equal(alone.topk_indices, route(own, x).topk_indices[:1])


# ---- in a model


@pytest.mark.parametrize(
    "router",
    [
        {"name": "noisy_topk"},
        {"name": "top_p", "target": 2.0},
        {"name": "relu", "initial_lambda": 0.01},
        {"name": "quantile"},
    ],
    ids=lambda router: router["name"],
)
def test_a_model_learns_with_it_and_a_step_tells_it_what_it_asks_for(router):
    model = tiny_model(moe={"router": router}).train()
    ids = tokens(2, 20)
    totals = BatchTotals(torch.tensor(38), torch.tensor(40))
    output = model(ids, ids.roll(-1, 1), totals=totals)
    output.loss.backward()
    sums = add_output(None, output, detail=False)
    told = 0 if router["name"] == "noisy_topk" else len(output.routings)
    assert len(sums.feedback) == told
    for block in model.blocks:
        layer = block.feed_forward
        if not hasattr(layer, "router"):
            continue
        assert all(p.grad.abs().sum() > 0 for p in layer.router.parameters())
        if told:
            layer.router.after_step(torch.zeros(6), sums.feedback[0].float())
            assert all(b.isfinite().all() for b in layer.router.buffers())
