"""Do the routers other than top-k choose and weigh by their formulas? The expected values are those
of a few lines of NumPy in float64. What all routers keep: `tests/test_router_contract.py`."""

from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import randn
from model_cases import tiny_model, tokens
from router_cases import D, E, T, build, context, route
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.measures import max_violation, router_sums
from moe.model import num_parameters
from moe.routers.hash import _mix, _signed, expert_keys
from moe.routing import SPLITMIX_STEP
from moe.variants import load_variant

OTHERS = (
    "balanced",
    "expert_choice",
    "hash",
    "random_choice",
    "sequence_topk",
    "sinkhorn",
    "token_rounding",
)
UNLEARNED = ("balanced", "hash", "random_choice")
PADDED = torch.arange(T) % 5 > 0


def logits_of(router, x):
    """(T, E) x W^T in NumPy."""
    return x.double().numpy() @ router.weight.detach().double().numpy().T


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


SCORES = {
    "softmax": softmax,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
    "sqrt_softplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
}


def chosen_weights(routing):
    """(T, E) float64, the weight of each expert for each token, NaN where it has none."""
    dense = np.full(routing.router_logits.shape, np.nan)
    for t, row in enumerate(routing.topk_indices.tolist()):
        for k, expert in enumerate(row):
            if expert >= 0:
                dense[t, expert] = routing.topk_weights[t, k].item()
    return dense


def assert_chooses(routing, chosen, weights):
    """Just the (T, E) bool `chosen`, with the (T, E) weights there."""
    wanted = np.where(chosen, weights, np.nan)
    np.testing.assert_allclose(chosen_weights(routing), wanted, rtol=1e-10)


# ---- expert choice


def expert_choice_oracle(probs, valid, experts_per_token):
    capacity = round(valid.sum() * experts_per_token / probs.shape[1])
    capacity = min(max(capacity, 1), valid.sum())
    chosen = np.zeros(probs.shape, dtype=bool)
    for expert in range(probs.shape[1]):
        by_score = sorted(np.flatnonzero(valid), key=lambda t: (-probs[t, expert], t))
        chosen[by_score[:capacity], expert] = True
    return chosen


@pytest.mark.parametrize("experts_per_token", [0.01, 1, 1.37, 2, 6])
@pytest.mark.parametrize("valid", [None, PADDED])
def test_each_expert_takes_its_best_tokens(experts_per_token, valid):
    router = build("expert_choice", {"experts_per_token": experts_per_token}, torch.float64)
    x = randn(T, D, seed=9, dtype=torch.float64)
    routing = route(router, x, valid=valid)
    probs, mask = softmax(logits_of(router, x)), np.ones(T, dtype=bool)
    if valid is not None:
        mask = valid.numpy()
    chosen = expert_choice_oracle(probs, mask, experts_per_token)
    assert_chooses(routing, chosen, probs)
    assert float(max_violation(routing.tokens_per_expert)) == 0


def test_expert_choice_gives_equal_tokens_to_the_first_ones():
    router = build("expert_choice", {"experts_per_token": 2})
    # Of equal rows a matmul may give logits that differ in the last bit, of zeros it does not.
    routing = route(router, torch.zeros(T, D))
    # C = 24 * 2 / 6
    assert (routing.topk_indices[:8] == torch.arange(E)).all()
    assert (routing.topk_indices[8:] == -1).all()


def test_expert_choice_rounds_to_at_least_one_token_and_at_most_all():
    for experts_per_token, taken in ((1e-6, 1), (E, T)):
        router = build("expert_choice", {"experts_per_token": experts_per_token})
        assert route(router, randn(T, D, seed=9)).tokens_per_expert.tolist() == [taken] * E


# ---- Sinkhorn


def sinkhorn_oracle(logits, iterations):
    """The plan, by multiplication: columns and rows are divided by their sums in turn."""
    plan = np.exp(logits)
    for _ in range(iterations):
        plan = plan / plan.sum(0)
        plan = plan / plan.sum(1, keepdims=True)
    return plan


def largest(scores, top_k):
    """(T, E) bool, the K largest of each row."""
    return np.argsort(np.argsort(-scores, kind="stable"), kind="stable") < top_k


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("valid", [None, PADDED])
def test_sinkhorn_chooses_by_the_plan_and_weighs_by_the_score(score, normalize, valid):
    settings = {"score": score, "normalize": normalize, "temperature": 0.7, "num_iterations": 5}
    router = build("sinkhorn", settings, torch.float64)
    x = randn(T, D, seed=9, dtype=torch.float64) + 0.5
    logits, mask = logits_of(router, x), np.ones(T, dtype=bool)
    if valid is not None:
        mask = valid.numpy()
    chosen = np.zeros((T, E), dtype=bool)
    chosen[mask] = largest(sinkhorn_oracle(logits[mask] / 0.7, 5), 2)
    weights = SCORES[score](logits)
    if normalize:
        weights = weights / np.where(chosen, weights, 0).sum(1, keepdims=True).clip(1e-30)
    assert_chooses(route(router, x, valid=valid, training=True), chosen, weights)
    # In evaluation, and only there, it is top-k.
    plain = largest(logits, 2) & mask[:, None]
    found = ~np.isnan(chosen_weights(route(router, x, valid=valid)))
    assert (found == plain).all() and not (found == chosen).all()


def test_sinkhorn_balances_what_topk_does_not():
    router = build("sinkhorn", {"top_k": 1, "num_iterations": 100, "temperature": 0.1})
    x, shape = randn(40 * T, D, seed=9) + 0.5, (40 * T, 1)
    plain = max_violation(route(router, x, shape=shape).tokens_per_expert)
    balanced = max_violation(route(router, x, shape=shape, training=True).tokens_per_expert)
    assert float(plain) > 0.5
    assert float(balanced) < 0.1


def test_a_cold_sinkhorn_solves_the_assignment_of_base_layers():
    settings = {"top_k": 1, "num_iterations": 3000, "temperature": 0.05}
    router = build("sinkhorn", settings, torch.float64, num_experts=3)
    for seed in range(5):
        x = randn(6, D, seed=seed, dtype=torch.float64)
        logits = logits_of(router, x)
        # Two tokens for each expert, and the largest sum of scores, among all that there are.
        ways = set(permutations((0, 0, 1, 1, 2, 2)))
        best = max(ways, key=lambda way: sum(logits[t, e] for t, e in enumerate(way)))
        routing = route(router, x, shape=(1, 6), training=True)
        assert tuple(routing.topk_indices[:, 0].tolist()) == best


# ---- sequence top-k


def sequence_oracle(logits, probs, documents, valid, experts_per_token, most):
    """Each document keeps its largest scores, of the `most` that each token sends."""
    chosen = np.zeros(probs.shape, dtype=bool)
    sent = largest(logits, most)
    for document in sorted(set(documents)):
        members = [t for t in range(len(documents)) if documents[t] == document and valid[t]]
        pairs = [(t, e) for t in members for e in np.flatnonzero(sent[t])]
        pairs.sort(key=lambda pair: -probs[pair])
        for pair in pairs[: max(1, round(len(members) * experts_per_token))]:
            chosen[pair] = True
    return chosen


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("experts_per_token", "most"), [(2, None), (1.3, 2), (3, 3), (0.01, 1)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("valid", [None, PADDED])
def test_a_document_keeps_its_largest_scores(
    score, normalize, experts_per_token, most, packed, valid
):
    if normalize and most == 1:
        pytest.skip("refused")
    settings = {"score": score, "normalize": normalize, "top_k": most}
    settings["experts_per_token"] = experts_per_token
    router = build("sequence_topk", settings, torch.float64)
    x = randn(T, D, seed=9, dtype=torch.float64)
    # Two documents in the first sequence; ids are unique within a sequence only, in no order.
    ids = torch.tensor([5] * 3 + [2] * 5 + [2] * 8 + [7, 1] * 4) if packed else torch.zeros(T)
    inputs = context(valid=valid)._replace(document_ids=ids.int())
    routing = router(x, inputs)
    logits = logits_of(router, x)
    probs = SCORES[score](logits)
    documents = [(t // 8, int(ids[t])) for t in range(T)]
    mask = np.ones(T, dtype=bool) if valid is None else valid.numpy()
    chosen = sequence_oracle(logits, probs, documents, mask, experts_per_token, most or E)
    weights = probs
    if normalize:
        weights = probs / np.where(chosen, probs, 0).sum(1, keepdims=True).clip(1e-30)
    assert routing.topk_indices.shape == (T, most or E)
    assert_chooses(routing, chosen, weights)
    # Unused columns come last.
    assert (routing.topk_indices.ge(0).int().diff(dim=1) <= 0).all()


def test_documents_and_sequences_do_not_share_their_experts():
    router = build("sequence_topk", {}, torch.float64)
    x = randn(T, D, seed=9, dtype=torch.float64)
    inputs = context()._replace(document_ids=torch.arange(T).remainder(8).ge(3).int())
    before = router(x, inputs)
    other = x.clone()
    other[3:8] = 5 * randn(5, D, seed=2, dtype=torch.float64)
    after = router(other, inputs)
    kept = torch.arange(T)[(torch.arange(T) < 3) | (torch.arange(T) >= 8)]
    assert torch.equal(before.topk_weights[kept], after.topk_weights[kept])
    assert not torch.equal(before.topk_indices[3:8], after.topk_indices[3:8])


def test_a_sequence_of_one_token_is_routed_by_topk():
    x = randn(T, D, seed=9)
    routing = route(build("sequence_topk", {}), x, shape=(T, 1))
    plain = route(build("topk", {"normalize": False}), x, shape=(T, 1))
    assert torch.equal(routing.topk_indices[:, :2], plain.topk_indices)
    assert torch.equal(routing.topk_weights[:, :2], plain.topk_weights)
    assert (routing.topk_indices[:, 2:] == -1).all()


def test_equal_tokens_of_a_sequence_share_its_experts_from_the_first_on():
    router = build("sequence_topk", {"experts_per_token": 1, "top_k": 2})
    routing = route(router, randn(1, D, seed=4).expand(T, D))
    # Eight places, and eight tokens with the same best expert.
    assert (routing.topk_indices[:, 0] >= 0).all() and (routing.topk_indices[:, 1] == -1).all()
    assert len(set(routing.topk_indices[:, 0].tolist())) == 1


# ---- hash


def unsigned_mix(z):
    """SplitMix64's finaliser in Python's own integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_mixing_is_splitmix64():
    # The generator's first numbers from the seed 1234567, as its authors' program prints them.
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    states = [_signed(1234567 + SPLITMIX_STEP * (n + 1)) for n in range(3)]
    assert [z % 2**64 for z in _mix(torch.tensor(states)).tolist()] == list(published)
    assert [unsigned_mix(z % 2**64) for z in states] == list(published)


def test_hash_is_that_of_pythons_own_integers():
    ids = [0, 1, 2, 50303, 2**31 - 1, 128_255]
    keys = expert_keys(torch.tensor(ids), E, seed=3, layer=2)
    router = build("hash", {"top_k": 3, "seed": 3})
    inputs = context(ids=torch.tensor(ids), shape=(1, 6))._replace(layer=2)
    routing = router(randn(6, D, seed=9), inputs)
    for row, token_id in enumerate(ids):
        hashed = unsigned_mix(
            (unsigned_mix((token_id + SPLITMIX_STEP * 4) % 2**64) + SPLITMIX_STEP * 3) % 2**64
        )
        wanted = [_signed(unsigned_mix((hashed + SPLITMIX_STEP * e) % 2**64)) for e in range(E)]
        assert keys[row].tolist() == wanted
        best = sorted(range(E), key=lambda e: -wanted[e])[:3]
        assert routing.topk_indices[row].tolist() == best
    assert (routing.topk_weights == torch.tensor(1 / 3)).all()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (60, 6)])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_hash_spreads_ids_evenly(num_experts, top_k, seed):
    num_ids = 100_000
    router = build("hash", {"top_k": top_k, "seed": seed}, num_experts=num_experts)
    counts = np.zeros((2, num_experts))
    pairs = np.zeros((num_experts, num_experts))
    chosen = []
    for layer in range(2):
        inputs = context(ids=torch.arange(num_ids), shape=(1, num_ids))._replace(layer=layer)
        routing = router(torch.zeros(num_ids, D), inputs)
        counts[layer] = routing.tokens_per_expert.numpy()
        chosen.append(routing.topk_indices[:, 0].numpy())
    np.add.at(pairs, (chosen[0], chosen[1]), 1)
    mean = num_ids * top_k / num_experts
    # Of K different ones among E the variance is (1 - K/E) of the mean; chi-square has E - 1
    # degrees of freedom, and exceeds them by six of its standard deviations hardly ever.
    chi_square = ((counts - mean) ** 2 / mean / (1 - top_k / num_experts)).sum(1)
    freedom = num_experts - 1
    chi_square *= freedom / num_experts
    assert (abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)).all()
    assert (counts.max(1) / mean - 1 < 0.1).all()
    # One layer says nothing of the next.
    mean, freedom = num_ids / num_experts**2, num_experts**2 - 1
    assert abs(((pairs - mean) ** 2 / mean).sum() - freedom) < 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [False, True])
def test_learned_weights_of_hashed_experts(score, normalize):
    settings = {"weights": "learned", "score": score, "normalize": normalize}
    router, uniform = build("hash", settings, torch.float64), build("hash", {})
    x = randn(T, D, seed=9, dtype=torch.float64)
    routing, plain = route(router, x), route(uniform, x)
    assert torch.equal(routing.topk_indices, plain.topk_indices)
    weights, chosen = SCORES[score](logits_of(router, x)), ~np.isnan(chosen_weights(plain))
    if normalize:
        weights = weights / np.where(chosen, weights, 0).sum(1, keepdims=True)
    assert_chooses(routing, chosen, weights)


def test_seed_and_layer_change_the_hash_and_nothing_else_does():
    x, inputs = randn(T, D, seed=9), context(ids=torch.arange(T))
    first = build("hash", {})(x, inputs).topk_indices
    assert torch.equal(build("hash", {})(x + 1, inputs).topk_indices, first)
    assert torch.equal(build("hash", {})(x, inputs._replace(training=True)).topk_indices, first)
    assert not torch.equal(build("hash", {"seed": 1})(x, inputs).topk_indices, first)
    assert not torch.equal(build("hash", {})(x, inputs._replace(layer=1)).topk_indices, first)


# ---- random choice


def test_random_sets_of_experts_are_all_equally_likely():
    num_tokens = 60_000
    router, x = build("random_choice", {"top_k": 2}), torch.zeros(num_tokens, D)
    for training in (False, True):
        routing = route(router, x, shape=(1, num_tokens), training=training)
        pairs = np.zeros((E, E))
        np.add.at(pairs, tuple(routing.topk_indices.T.numpy()), 1)
        assert (np.diag(pairs) == 0).all()
        ordered = pairs[~np.eye(E, dtype=bool)]
        mean, freedom = num_tokens / 30, 29
        chi_square = ((ordered - mean) ** 2 / mean).sum()
        assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)
        assert (routing.topk_weights == 0.5).all()


def test_random_choice_draws_in_training_and_repeats_itself_in_evaluation():
    router, x = build("random_choice", {}), randn(T, D, seed=9)
    state = torch.get_rng_state()
    first = router(x, context()).topk_indices
    assert torch.equal(router(x, context()).topk_indices, first)
    # It took no number of training's.
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(router(x, context()._replace(layer=1)).topk_indices, first)
    assert not torch.equal(build("random_choice", {"seed": 1})(x, context()).topk_indices, first)
    drawn = [router(x, context(training=True)).topk_indices for _ in range(2)]
    assert not torch.equal(*drawn)


# ---- forced balance


@pytest.mark.parametrize("top_k", [1, 2, 4, 6])
@pytest.mark.parametrize("num_tokens", [1, 7, 24])
@pytest.mark.parametrize("masked", [False, True])
def test_turns_balance_to_one_assignment(top_k, num_tokens, masked):
    router = build("balanced", {"top_k": top_k})
    valid = torch.arange(num_tokens) % 5 != 3 if masked else None
    x = randn(num_tokens, D, seed=9)
    routing = route(router, x, valid=valid, shape=(1, num_tokens))
    turn = 0
    for t, row in enumerate(routing.topk_indices.tolist()):
        if valid is not None and not valid[t]:
            assert row == [-1] * top_k
            continue
        assert row == [(turn * top_k + k) % E for k in range(top_k)]
        turn += 1
    assert routing.tokens_per_expert.max() - routing.tokens_per_expert.min() <= 1


@pytest.mark.parametrize("normalize", [False, True])
def test_learned_weights_of_forced_experts(normalize):
    settings = {"weights": "learned", "normalize": normalize}
    router = build("balanced", settings, torch.float64)
    x = randn(T, D, seed=9, dtype=torch.float64)
    chosen = np.array([[(e - 2 * t) % E < 2 for e in range(E)] for t in range(T)])
    weights = softmax(logits_of(router, x))
    if normalize:
        weights = weights / np.where(chosen, weights, 0).sum(1, keepdims=True)
    assert_chooses(route(router, x), chosen, weights)


# ---- all of them


@pytest.mark.parametrize("name", UNLEARNED)
def test_a_router_without_opinion_has_uniform_probabilities(name):
    routing = route(build(name, {}), randn(T, D, seed=9))
    assert (routing.router_logits == 0).all()
    assert (routing.router_probs == torch.tensor(1 / E)).all()
    assert (routing.topk_weights == 0.5).all()


@pytest.mark.parametrize("name", ["balanced", "hash"])
def test_uniform_weights_without_normalisation_are_1(name):
    routing = route(build(name, {"normalize": False}), randn(T, D, seed=9), valid=PADDED)
    assert torch.equal(routing.topk_weights, PADDED.float().unsqueeze(-1).expand(T, 2))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "number"), [("expert_choice", E), ("sequence_topk", 2), ("token_rounding", 2)]
)
def test_one_token_has_its_experts(name, number, training):
    routing = route(build(name, {}), randn(1, D, seed=9), shape=(1, 1), training=training)
    # In expert choice all experts take at least one token, and there is no other.
    assert int(routing.tokens_per_expert.sum()) == number


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_only_shapes_are_known_on_the_host(name, training):
    # A fake tensor has no values: to read one back raises, as it would wait on a GPU.
    with FakeTensorMode():
        module = load_variant("routers", name)
        router = module.Router(module.Config(name=name), D, E)
        valid = torch.empty(T, dtype=torch.bool)
        inputs = context(valid=valid, training=training, ids=torch.empty(T, dtype=torch.int64))
        routing = router(torch.empty(T, D), inputs)
    assert routing.tokens_per_expert.shape == (E,)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_with_it_learns_and_is_measured(name):
    model = tiny_model(moe={"router": {"name": name}, "allow_non_causal": True})
    ids, valid = tokens(2, 12), torch.arange(24).view(2, 12) < 20
    labels = ids.roll(-1, 1).masked_fill(~valid, -100)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
    for _ in range(6):
        out = model(ids, labels, valid=valid)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        for routing in out.routings:
            assert all(value.isfinite().all() for value in router_sums(routing))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", ["expert_choice", "sequence_topk"])
def test_active_weights_are_those_of_the_mean_number_of_experts(name):
    def sizes(router, **settings):
        moe = {"router": {"name": router, **settings}, "allow_non_causal": True}
        model = tiny_model(moe=moe)
        return num_parameters(model), model.config.dense_intermediate_size

    # TINY's experts are three matrices of 24 x 14, in each of two layers.
    assert sizes(name) == sizes("topk", top_k=2)
    (half, width), (whole, _) = sizes(name, experts_per_token=1.5), sizes(name)
    assert whole.active - half.active == 3 * 24 * 14
    assert width == sizes("topk", top_k=2)[1] - 7


REFUSED = {
    "normalize (True) with top_k (1) makes every weight 1": (
        ("sinkhorn", {"top_k": 1, "normalize": True}),
        ("sequence_topk", {"top_k": 1, "experts_per_token": 1, "normalize": True}),
        ("hash", {"top_k": 1, "weights": "learned"}),
        ("balanced", {"top_k": 1, "weights": "learned"}),
    ),
    "score (sigmoid) has no effect with weights (uniform)": (("hash", {"score": "sigmoid"}),),
    "experts_per_token (2.5) must not exceed top_k (2)": (
        ("sequence_topk", {"top_k": 2, "experts_per_token": 2.5}),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_without_effect_are_refused(message):
    for name, settings in REFUSED[message]:
        with pytest.raises(ValueError) as caught:
            load_variant("routers", name).Config(**settings)
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["expert_choice", "sequence_topk"])
def test_more_experts_per_token_than_experts_are_refused(name):
    config = load_variant("routers", name).Config(experts_per_token=6.5)
    config.check_experts(7)
    with pytest.raises(ValueError, match=r"experts_per_token \(6.5\) must not exceed"):
        config.check_experts(6)
