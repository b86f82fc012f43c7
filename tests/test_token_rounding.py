"""Does token rounding fill every tile, and choose the tokens that it says? The expected values are
those of loops in NumPy. What all routers keep: `tests/test_router_contract.py`."""

import numpy as np
import pytest
import torch
from conftest import randn
from model_cases import tiny_config, tiny_model, tokens

from kernels.dispatch import plan_dispatch
from moe.routers.token_rounding import Config, Router
from moe.routing import RouterContext

ROUNDINGS = ("nearest", "up", "down")


def rounded(logits, valid=None, training=True, indices=None, **settings):
    """The Routing of a router whose logits are its inputs (T, E)."""
    num_tokens, num_experts = logits.shape
    router = Router(Config(**settings), num_experts, num_experts)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    shape = (1, num_tokens)
    context = RouterContext(ids, None, valid, shape, training, topk_indices=indices)
    return router.to(logits.dtype)(logits, context)


def scores_of(logits, score):
    if score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def oracle(scores, valid, top_k, tile, rounding):
    """A set of experts for each token, token by token and expert by expert."""
    num_tokens, num_experts = scores.shape
    order = [sorted(range(num_experts), key=lambda e, t=t: (-scores[t, e], e)) for t in valid]
    takers = {e: set() for e in range(num_experts)}
    for t, best in zip(valid, order, strict=True):
        for expert in best[:top_k]:
            takers[expert].add(t)
    while tile > max(len(valid), 1):
        tile //= 2
    lacking = {e: tile - len(takers[e]) % tile for e in takers}
    rest = {e: len(takers[e]) % tile for e in takers}

    def popularity(expert):
        return sum(scores[t, expert] for t in valid)

    # Whose wish fits among the tokens, by what they lack.
    hopeful = [
        e
        for e in takers
        if (rounding == "up" and rest[e] > 0)
        or (rounding == "nearest" and rest[e] >= tile / 2 and rest[e] > 0)
    ]
    hopeful = [e for e in hopeful if len(takers[e]) + lacking[e] <= len(valid)]
    hopeful.sort(key=lambda e: (lacking[e], -popularity(e), e))
    wishes, sum_of_wishes = {}, 0
    for expert in hopeful:
        sum_of_wishes += lacking[expert]
        if sum_of_wishes <= 0.75 * len(valid):
            wishes[expert] = lacking[expert]
    first = None
    if all(len(takers[e]) < tile for e in takers):
        first = min(takers, key=lambda e: (-len(takers[e]), -popularity(e), e))
        wishes[first] = lacking[first]
    # The best pair of all that are left takes each other, again and again: the only assignment in
    # which no token and expert would both rather have each other.
    pairs = [(e != first, -scores[t, e], t, e) for t in valid for e in wishes if t not in takers[e]]
    further = {}
    for _, _, t, expert in sorted(pairs):
        if t not in further and sum(e == expert for e in further.values()) < wishes[expert]:
            further[t] = expert
    chosen = [set() for _ in range(num_tokens)]
    for expert, own in takers.items():
        taken = {t for t, e in further.items() if e == expert}
        kept = sorted(own, key=lambda t, e=expert: (-scores[t, e], t))
        if expert in wishes and len(taken) == wishes[expert]:
            kept += taken
        else:
            kept = kept[: len(own) - rest[expert]]
        for t in kept:
            chosen[t].add(expert)
    return chosen


def experts_of(routing):
    return [{e for e in row if e >= 0} for row in routing.topk_indices.tolist()]


SHAPES = (
    # tokens, experts, K, tile
    (0, 3, 2, 4),
    (1, 4, 2, 8),
    (1, 1, 1, 2),
    (9, 1, 1, 4),
    (3, 5, 1, 128),
    (24, 6, 2, 4),
    (24, 6, 2, 128),
    (25, 6, 6, 8),
    (30, 7, 1, 5),
    (40, 8, 3, 6),
    (64, 16, 1, 16),
    (64, 16, 4, 16),
    (100, 12, 2, 8),
    (150, 4, 3, 7),
)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_takes_and_leaves_the_tokens_of_the_formula(shape, padded, rounding):
    num_tokens, num_experts, top_k, tile = shape
    for seed in range(6):
        score, normalize = ("softmax", "sigmoid")[seed % 2], top_k > 1 and seed % 3 > 0
        spread = (0.3, 1.0, 3.0)[seed % 3]
        logits = spread * randn(num_tokens, num_experts, seed=seed, dtype=torch.float64)
        logits = logits + randn(num_experts, seed=seed + 50, dtype=torch.float64)
        valid = None
        if padded:
            valid = randn(num_tokens, seed=seed + 99) > -0.5
            # Were padding asked, it would all speak for one expert.
            logits[~valid, -1] = 30.0
        routing = rounded(
            logits,
            valid,
            experts_per_token=top_k,
            tile=tile,
            rounding=rounding,
            score=score,
            normalize=normalize,
        )
        places = range(num_tokens) if valid is None else np.flatnonzero(valid.numpy()).tolist()
        scores = scores_of(logits.numpy(), score)
        chosen = oracle(scores, list(places), top_k, tile, rounding)
        assert experts_of(routing) == chosen
        assert routing.topk_indices.shape == (num_tokens, top_k + 1)
        for t, row in enumerate(routing.topk_indices.tolist()):
            total = sum(scores[t, e] for e in chosen[t]) if normalize else 1
            wanted = [scores[t, e] / total if e >= 0 else 0 for e in row]
            np.testing.assert_allclose(routing.topk_weights[t].detach().numpy(), wanted, rtol=1e-10)


def random_case(seed):
    """(logits, valid or None, K, tile) of random sizes, with at least a tile of valid tokens."""
    draw = np.random.default_rng(seed)
    num_experts = int(draw.integers(2, 40))
    tile = int(draw.choice([2, 3, 8, 16, 64]))
    num_tokens = int(draw.integers(2 * tile, 800))
    logits = draw.uniform(0.2, 3) * draw.standard_normal((num_tokens, num_experts))
    logits += draw.uniform(0, 2) * draw.standard_normal(num_experts)
    valid = draw.random(num_tokens) < 0.9 if draw.random() < 0.5 else np.ones(num_tokens, bool)
    valid[: tile + 1] = True
    logits, valid = torch.from_numpy(logits).float(), torch.from_numpy(valid)
    top_k = int(draw.integers(1, min(num_experts, 9)))
    return logits, None if valid.all() else valid, top_k, tile


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_counts_are_multiples_of_the_tile_and_move_by_less_than_one(rounding):
    changed = 0
    for seed in range(60):
        logits, valid, top_k, tile = random_case(seed)
        settings = {"experts_per_token": top_k, "normalize": False, "tile": tile}
        routing = rounded(logits, valid, rounding=rounding, **settings)
        plain = rounded(logits, valid, training=False, **settings)
        counts, before = routing.tokens_per_expert, plain.tokens_per_expert
        assert (counts % tile == 0).all() and counts.sum() > 0
        assert ((counts - before).abs() < tile).all()
        if rounding == "down":
            # But for the one that must not go down where no expert has a whole tile.
            assert ((counts > before).sum() == 0) or (before < tile).all()
        changed += int((counts != before).sum())
        # One further expert a token at most, and none of padding.
        indices = routing.topk_indices
        assert indices.shape[1] == top_k + 1
        kept = indices[:, :-1]
        assert ((kept == plain.topk_indices[:, :-1]) | (kept == -1)).all()
        assert valid is None or (indices[~valid] == -1).all()
    assert changed > 500


def test_nearest_goes_up_from_half_a_tile_on():
    # Of ten tokens six choose expert 0 and four expert 1; the best further one is the eighth.
    logits = torch.tensor([[2.0, 0.0]] * 6 + [[0.0, 1.5]] * 4)
    logits[7, 0] = 1.0
    settings = {"experts_per_token": 1, "normalize": False}
    up = rounded(logits, tile=7, **settings)
    assert up.tokens_per_expert.tolist() == [7, 7]
    assert up.topk_indices[7, 1] == 0
    nearest = rounded(logits, tile=4, **settings)
    # Two of six and none of four are beyond a tile, and two are half of it.
    assert nearest.tokens_per_expert.tolist() == [8, 4]
    down = rounded(logits, tile=5, **settings)
    # One of six is less than half of five, four of four more.
    assert down.tokens_per_expert.tolist() == [5, 5]
    assert down.topk_indices[:6, 0].tolist() == [0, 0, 0, 0, 0, -1]


def test_a_contested_token_goes_to_the_expert_that_it_scores_highest():
    # Experts 0 and 1 have three tokens each and want the seventh most; it scores expert 1 higher,
    # so expert 0 takes its next best, the eighth.
    logits = torch.full((16, 3), -9.0)
    logits[:3, 0], logits[3:6, 1], logits[6:, 2] = 5.0, 5.0, 5.0
    logits[6, :2] = torch.tensor([3.0, 3.5])
    logits[7, :2] = torch.tensor([2.0, 1.0])
    routing = rounded(logits, experts_per_token=1, normalize=False, tile=4)
    assert routing.tokens_per_expert.tolist() == [4, 4, 12]
    assert routing.topk_indices[6].tolist() == [2, 1]
    assert routing.topk_indices[7].tolist() == [2, 0]


def test_an_expert_that_cannot_be_filled_is_rounded_down():
    # All tokens have expert 0, and five of six expert 1: there is no third for the sixth.
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 5 + [[3.0, 1.0, 2.0]])
    routing = rounded(logits, experts_per_token=2, tile=4, rounding="up")
    # Expert 0 cannot have eight of six, expert 1 neither; expert 2 lacks three.
    assert routing.tokens_per_expert.tolist() == [4, 4, 4]
    routing = rounded(logits, experts_per_token=2, tile=4)
    assert routing.tokens_per_expert.tolist() == [4, 4, 0]


def test_ties_go_to_the_first_tokens_and_experts():
    logits = torch.zeros(12, 4)
    routing = rounded(logits, experts_per_token=2, tile=8, rounding="down")
    assert experts_of(routing) == [{0, 1}] * 8 + [set()] * 4
    # Twelve tokens have expert 0 alone, which loses the last four.
    routing = rounded(logits, experts_per_token=1, normalize=False, tile=8)
    assert experts_of(routing) == [{0}] * 8 + [set()] * 4
    # Experts 1 and 2 lack one each: the first of the tokens that have neither. The sigmoid of 0 is
    # one half to the bit, wherever it stands.
    logits = torch.zeros(10, 4)
    logits[:4, 0], logits[4:7, 1], logits[7:, 2] = 1.0, 1.0, 1.0
    settings = {"experts_per_token": 1, "normalize": False, "score": "sigmoid"}
    routing = rounded(logits, tile=4, **settings)
    assert routing.topk_indices[:3].tolist() == [[0, 1], [0, 2], [0, -1]]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_an_expert_that_nobody_wants_stays_empty(rounding):
    logits = randn(64, 4, seed=1)
    logits[:, 2] -= 50
    routing = rounded(logits, experts_per_token=2, tile=8, rounding=rounding)
    assert int(routing.tokens_per_expert[2]) == 0
    assert int(routing.tokens_per_expert.sum()) > 0


@pytest.mark.parametrize("num_tokens", [64, 67])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_an_expert_that_all_want_keeps_whole_tiles(num_tokens, rounding):
    logits = randn(num_tokens, 4, seed=1, dtype=torch.float64)
    logits[:, 1] += 10
    settings = {"experts_per_token": 1, "normalize": False, "tile": 8}
    routing = rounded(logits, rounding=rounding, **settings)
    assert routing.tokens_per_expert.tolist() == [0, 64, 0, 0]
    # The three that are left over score it lowest.
    lost = logits.softmax(-1)[:, 1].argsort(stable=True)[: num_tokens - 64]
    assert (routing.topk_indices[lost] == -1).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_batch_smaller_than_the_tile_is_rounded_by_a_half_of_it(rounding):
    logits = randn(24, 6, seed=9)
    by_128 = rounded(logits, tile=128, rounding=rounding)
    by_16 = rounded(logits, tile=16, rounding=rounding)
    assert torch.equal(by_128.topk_indices, by_16.topk_indices)
    assert int(by_128.tokens_per_expert.max()) == 16


@pytest.mark.parametrize("rounding", ["nearest", "down"])
def test_where_no_expert_has_a_tile_the_fullest_is_rounded_up(rounding):
    # Counts of 5, 7, 4: none is half of 16.
    logits = torch.full((16, 3), -1.0)
    logits[:5, 0], logits[5:12, 1], logits[12:, 2] = 1.0, 1.0, 1.0
    routing = rounded(logits, experts_per_token=1, normalize=False, tile=16, rounding=rounding)
    assert routing.tokens_per_expert.tolist() == [0, 16, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_is_topk(dtype):
    logits = randn(50, 8, seed=3, dtype=dtype)
    routing = rounded(logits, training=False, tile=16, experts_per_token=3)
    best = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :3]
    assert (routing.topk_indices[:, :3].numpy() == best).all()
    assert (routing.topk_indices[:, 3] == -1).all()
    weights = np.take_along_axis(scores_of(logits.double().numpy(), "softmax"), best, 1)
    weights /= weights.sum(1, keepdims=True)
    np.testing.assert_allclose(routing.topk_weights[:, :3].detach().numpy(), weights, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_route_of_training_is_replayed_as_it_is(training):
    logits = randn(40, 6, seed=4)
    first = rounded(logits, tile=8)
    # Some tokens have three experts, some fewer than two.
    sizes = {len(experts) for experts in experts_of(first)}
    assert {1, 2, 3} <= sizes
    again = rounded(logits, tile=8, training=training, indices=first.topk_indices)
    assert torch.equal(again.topk_indices, first.topk_indices)
    assert torch.equal(again.topk_weights, first.topk_weights)
    has = torch.tensor([float(len(experts) > 0) for experts in experts_of(first)])
    torch.testing.assert_close(again.topk_weights.sum(-1), has)


def zipf_logits(num_tokens, num_experts, seed):
    """Experts whose odds fall as 1, 1/2, 1/3, ..., in random order, with noise for each token."""
    popularity = -torch.arange(1, num_experts + 1).double().log()
    order = randn(num_experts, seed=seed + 100).argsort()
    noise = randn(num_tokens, num_experts, seed=seed, dtype=torch.float64)
    return noise + popularity[order]


@pytest.mark.parametrize("rounding", ["nearest", "up"])
def test_experts_are_rounded_up_although_they_compete(rounding):
    # An expert that gave up at the first token lost to another would hardly ever be filled.
    logits = zipf_logits(2048, 64, seed=0) / 3
    routing = rounded(logits, experts_per_token=4, tile=64, rounding=rounding)
    before = rounded(logits, experts_per_token=4, training=False).tokens_per_expert
    higher = routing.tokens_per_expert > before
    if rounding == "nearest":
        assert torch.equal(higher, before % 64 >= 32) and higher.sum() > 10
    else:
        # There are too few tokens for all.
        wish = before % 64 > 0
        assert (64 - before % 64)[wish].sum() > 2048
        assert higher.sum() > wish.sum() / 2


def rows_of_tiles(routing, tile):
    """Rows of each tile that the grouped kernels' map gives to an expert."""
    triton = pytest.importorskip("kernels.grouped_matmul_triton")
    num_experts = routing.router_logits.shape[1]
    plan = plan_dispatch(routing.topk_indices, num_experts)
    tile_map = triton.Groups(plan.expert_offsets, plan.num_rows).tile_map(tile)
    return [
        min(tile, end - first)
        for expert, first, end in tile_map.T.tolist()
        if expert < num_experts and first < end
    ]


@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), [(64, 2, 8192), (64, 1, 8192)])
def test_the_kernels_find_no_tile_that_is_padded(num_experts, top_k, num_tokens):
    logits = zipf_logits(num_tokens, num_experts, seed=0)
    settings = {"experts_per_token": top_k, "normalize": False, "tile": 128}
    plain = rounded(logits, training=False, **settings)
    padded = [128 - rows for rows in rows_of_tiles(plain, 128)]
    assert sum(padded) > 0.2 * num_tokens * top_k
    for rounding in ROUNDINGS:
        routing = rounded(logits, rounding=rounding, **settings)
        rows = rows_of_tiles(routing, 128)
        assert rows == [128] * (int(routing.tokens_per_expert.sum()) // 128)
        assert rounding == "up" or len(rows) < 0.85 * len(padded)
        # Up to the tiles of top-k, with rows that do work.
        assert len(rows) <= len(padded)


def test_of_zipf_loads_as_many_tiles_are_padded_and_experts_empty_as_the_docstring_says():
    settings = {"experts_per_token": 2, "normalize": False, "tile": 128}
    draws = []
    for seed in range(5):
        logits = zipf_logits(8192, 64, seed)
        plain = rounded(logits, training=False, **settings).tokens_per_expert.numpy()
        nearest = rounded(logits, **settings).tokens_per_expert.numpy()
        tiles = np.ceil(plain / 128).sum()
        padded = 100 * (1 - 2 * 8192 / (128 * tiles))
        empty = (nearest == 0).sum(), (plain == 0).sum()
        draws.append([tiles, padded, np.ceil(nearest / 128).sum(), *empty])
    assert np.mean(draws, 0).round().tolist() == [178, 28, 124, 47, 1]


def test_a_model_counts_the_experts_that_a_token_chooses():
    router = {"name": "token_rounding", "experts_per_token": 3, "tile": 4}
    config = tiny_config(moe={"router": router, "allow_non_causal": True})
    assert (config.top_k, config.experts_per_token) == (4, 3)


def test_it_replays_the_routes_of_a_training_step_in_a_model():
    moe = {"router": {"name": "token_rounding", "tile": 4}, "allow_non_causal": True}
    model, ids = tiny_model(moe=moe), tokens(2, 12)
    first = model(ids)
    routes = [routing.topk_indices.view(2, 12, -1) for routing in first.routings]
    again = model.eval()(ids, routes=routes)
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, model(ids).logits)


def test_settings_without_effect_are_refused():
    for settings, message in (
        ({"experts_per_token": 1}, r"normalize \(True\) with experts_per_token \(1\)"),
        ({"tile": 1}, r"tile \(1\) rounds nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**settings)
    Config(experts_per_token=5).check_experts(6)
    with pytest.raises(ValueError, match=r"experts_per_token \(6\) must be below .* \(6\)"):
        Config(experts_per_token=6).check_experts(6)
