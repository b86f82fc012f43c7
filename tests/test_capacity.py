"""Does an expert keep what its capacity allows, in the order of the priority, and is every dropped
assignment counted?"""

import io
import math
import re
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import randn, relative_error
from model_cases import tiny_config, tiny_model, tokens
from pydantic import ValidationError
from router_cases import CHECKS as ROUTING_CHECKS
from router_cases import build
from router_step_cases import CHECKS as STEP_CHECKS
from test_causality import before, changed_at, difference
from torch._subclasses.fake_tensor import FakeTensorMode
from training_cases import make_config, make_engine, micro_batches, run

from moe.capacity import BROKEN_RULES, limit_to_capacity
from moe.losses import LossContext, importance
from moe.losses.load_balancing import Config, loss
from moe.router import RULES, RouterModule
from moe.routing import RouterContext, make_routing, noise_like
from moe.rules import broken_rules
from train.analysis_routes import TextSample
from train.analysis_text import Reading
from train.packing import Batch
from train.route_statistics import RouteStatistics
from train.route_table import RouteTable
from train.scalars import load_measures
from train.step import train_step
from train.validation import _Probe

T, E, K = 40, 6, 3
PRIORITIES = ("position", "probability", "random")


def context(shape=(4, T // 4), valid=None, seed=None, training=True):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ids = torch.zeros(math.prod(shape), dtype=torch.int64)
    return RouterContext(ids, None, valid, shape, training, generator)


def routing(seed=0, valid=None, hot=0.0):
    """Top-K of random scores with some assignments missing; `hot` is added to the first expert."""
    logits = randn(T, E, seed=seed) + hot * (torch.arange(E) == 0)
    probs = logits.softmax(-1)
    weights, indices = probs.topk(K, dim=-1)
    missing = randn(T, K, seed=seed + 1) > 1.2
    return make_routing(
        logits, probs, weights.masked_fill(missing, 0), indices.masked_fill(missing, -1), valid
    )


def kept_by_hand(made, factor, order):
    """The (token, column) pairs that stay, expert by expert; `order` sorts the pairs of one."""
    indices = made.topk_indices.numpy()
    capacity = math.ceil(Fraction(str(factor)) * int((indices >= 0).sum()) / E)
    kept = set()
    for expert in range(E):
        pairs = [(int(t), int(k)) for t, k in zip(*np.nonzero(indices == expert), strict=True)]
        kept |= set(sorted(pairs, key=order)[:capacity])
    return kept


def pairs_of(limited):
    return {(int(t), int(k)) for t, k in (limited.topk_indices >= 0).nonzero()}


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.1, 1.25, 2.0, 6.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("priority", ["position", "probability"])
def test_an_expert_keeps_the_first_of_its_tokens(priority, padded, factor):
    valid = torch.arange(T) % 5 > 0 if padded else None
    for seed in range(5):
        made = routing(seed, valid, hot=1.0)
        limited = limit_to_capacity(made, factor, priority, context(valid=valid))
        probs = made.router_probs

        def falling(pair, made=made, probs=probs):
            expert = made.topk_indices[pair]
            return -float(probs[pair[0], expert]), pair

        order = falling if priority == "probability" else (lambda pair: pair)
        assert pairs_of(limited) == kept_by_hand(made, factor, order)


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7])
def test_every_assignment_is_kept_or_counted_as_dropped(factor, priority):
    made = routing(hot=2.0)
    limited = limit_to_capacity(made, factor, priority, context(seed=3))
    wanted = np.bincount(made.topk_indices[made.topk_indices >= 0].numpy(), minlength=E)
    kept = np.bincount(limited.topk_indices[limited.topk_indices >= 0].numpy(), minlength=E)
    capacity = math.ceil(Fraction(str(factor)) * int(wanted.sum()) / E)
    assert kept.tolist() == np.minimum(wanted, capacity).tolist()
    assert limited.tokens_per_expert.tolist() == kept.tolist()
    assert limited.num_dropped.tolist() == (wanted - kept).tolist()
    assert limited.num_dropped.sum() > 0
    assert limited.demand.tolist() == wanted.tolist()
    stays = limited.topk_indices >= 0
    assert torch.equal(limited.topk_indices[stays], made.topk_indices[stays])
    assert torch.equal(limited.topk_weights[stays], made.topk_weights[stays])
    assert (limited.topk_weights[~stays] == 0).all()


def test_with_enough_room_nothing_is_dropped():
    made = routing(hot=2.0)
    for priority in PRIORITIES:
        limited = limit_to_capacity(made, float(E), priority, context(seed=3))
        assert torch.equal(limited.topk_indices, made.topk_indices)
        assert torch.equal(limited.topk_weights, made.topk_weights)
        assert limited.num_dropped.tolist() == [0] * E


@pytest.mark.parametrize("priority", PRIORITIES)
def test_no_tokens_and_tokens_without_an_expert(priority):
    nothing = make_routing(
        torch.zeros(0, E), torch.zeros(0, E), torch.zeros(0, K), torch.zeros(0, K).long(), None
    )
    limited = limit_to_capacity(nothing, 1.0, priority, context((0, 8), seed=0))
    assert limited.topk_indices.shape == (0, K) and limited.demand.tolist() == [0] * E
    valid = torch.zeros(T, dtype=torch.bool)
    limited = limit_to_capacity(routing(valid=valid), 1.0, priority, context(valid=valid, seed=0))
    assert (limited.topk_indices == -1).all() and limited.demand.tolist() == [0] * E


def test_a_random_order_is_another_one_for_each_seed_and_the_same_for_one():
    made = routing(hot=2.0)
    drops = [pairs_of(limit_to_capacity(made, 1.0, "random", context(seed=s))) for s in (1, 1, 2)]
    assert drops[0] == drops[1] != drops[2]
    # No token is dropped for its place: over many draws each of the hot expert's has its turn.
    wanted = (made.topk_indices == 0).nonzero().tolist()
    kept = np.zeros(len(wanted))
    for seed in range(400):
        limited = limit_to_capacity(made, 1.0, "random", context(seed=seed))
        kept += [float(limited.topk_indices[t, k] == 0) for t, k in wanted]
    expected = kept.mean()
    # Five standard deviations of a binomial.
    assert np.abs(kept - expected).max() < 5 * math.sqrt(expected * (1 - expected / 400))


def test_a_random_order_follows_from_the_sequences_and_not_from_the_routers_noise():
    made = routing(hot=2.0)

    def dropped(seeds, layer=0):
        here = context()._replace(noise_seeds=torch.tensor(seeds), layer=layer)
        return pairs_of(limit_to_capacity(made, 1.0, "random", here))

    assert dropped([1, 2, 3, 4]) == dropped([1, 2, 3, 4])
    assert dropped([1, 2, 3, 4]) != dropped([1, 2, 3, 5])
    assert dropped([1, 2, 3, 4]) != dropped([1, 2, 3, 4], layer=1)
    here = context()._replace(noise_seeds=torch.tensor([1, 2, 3, 4]))
    first, second = (
        noise_like(made.topk_weights, here, torch.Tensor.uniform_, stream=stream)
        for stream in (0, 1)
    )
    together = torch.stack([first.flatten(), second.flatten()])
    assert not torch.equal(first, second) and torch.corrcoef(together)[0, 1].abs() < 0.3


def test_no_value_goes_to_the_host():
    with FakeTensorMode():
        logits = torch.randn(T, E)
        weights, indices = logits.softmax(-1).topk(K, dim=-1)
        made = make_routing(logits, logits.softmax(-1), weights, indices, None)
        for priority in PRIORITIES:
            limit_to_capacity(made, 1.0, priority, context())


# ---- the contract of routers


class Limited(RouterModule):
    """A router's choice under a capacity, which breaks the rules that it says it breaks."""

    def __init__(self, router, priority):
        super().__init__()
        self.router, self.priority = router, priority
        for rule in RULES:
            broken = rule in BROKEN_RULES[priority]
            setattr(self, rule, getattr(router, rule) and not broken)
        self.replays = router.replays

    def forward(self, x, context):
        routing = self.router(x, context)
        if self.priority == "random":
            # One order for all calls: another one each time would hide what is looked for.
            context = context._replace(generator=torch.Generator().manual_seed(2))
        return limit_to_capacity(routing, 0.5, self.priority, context)


@pytest.mark.parametrize("check", ROUTING_CHECKS | STEP_CHECKS)
@pytest.mark.parametrize("priority", PRIORITIES)
def test_dropping_keeps_the_contract_but_where_it_says_so(priority, check):
    def make(dtype=torch.float32, num_experts=6):
        return Limited(build("topk", {}, dtype, num_experts), priority)

    (ROUTING_CHECKS | STEP_CHECKS)[check](make)


# ---- in a model


def dropping(priority="position", **more):
    changes = {"capacity_factor": 1.0, "drop_priority": priority, **more}
    return {"moe": changes | ({} if priority == "position" else {"allow_non_causal": True})}


@pytest.mark.parametrize("priority", PRIORITIES)
def test_only_dropping_by_position_is_causal(priority):
    model = tiny_model(dtype=torch.float64, **dropping(priority)).train()
    ids = tokens(2, 14)
    torch.manual_seed(0)
    model(ids)
    worst = 0.0
    for position in range(1, 14):
        for seed in range(3):
            changed = changed_at(ids, *[(0, p) for p in range(position, 14)])
            changed[0, position:] += seed
            first, second = (
                (lambda x: (torch.manual_seed(0), model(x))[1])(each) for each in (ids, changed)
            )
            kept = torch.zeros(2, 14, dtype=torch.bool)
            kept[0, :position] = True
            same = all(
                torch.equal(a.topk_indices[kept.flatten()], b.topk_indices[kept.flatten()])
                for a, b in zip(first.routings, second.routings, strict=True)
            )
            error = relative_error(second.logits[kept], first.logits[kept])
            worst = max(worst, error if same else float("inf"))
    assert (worst < 1e-10) == (priority == "position"), worst


def test_evaluation_is_dropless_unless_asked_and_then_causal():
    ids = tokens(2, 14)
    plain = tiny_model(dtype=torch.float64).eval()
    model = tiny_model(dtype=torch.float64, **dropping()).eval()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert sum(int(r.num_dropped.sum()) for r in model(ids).routings) == 0
    asked = tiny_model(dtype=torch.float64, **dropping(eval_capacity_factor=0.8)).eval()
    assert all(r.num_dropped.sum() > 0 for r in asked(ids).routings)
    # Of the first row alone: what it drops is taken from what the second row may keep.
    kept = before(6)
    kept[1] = False
    assert difference(asked, ids, changed_at(ids, (0, 6)), kept) < 1e-10


@pytest.mark.parametrize("priority", PRIORITIES)
def test_padding_takes_no_room(priority):
    model = tiny_model(dtype=torch.float64, **dropping(priority)).train()
    ids = tokens(2, 14)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[:, 10:] = False

    def run(ids):
        torch.manual_seed(0)
        return model(ids, valid=valid)

    first, second = run(ids), run(torch.where(valid, ids, 5))
    assert relative_error(second.logits[valid], first.logits[valid]) < 1e-10
    for a, b in zip(first.routings, second.routings, strict=True):
        assert torch.equal(a.num_dropped, b.num_dropped) and a.num_dropped.sum() > 0
        assert int(a.demand.sum()) == 2 * int(valid.sum())


def test_a_dropped_token_passes_by_and_its_weights_get_no_gradient():
    model = tiny_model(dtype=torch.float64, **dropping(capacity_factor=0.5)).train()
    layer = model.transformer_blocks()[0].feed_forward
    x = randn(28, 24, seed=3, dtype=torch.float64).requires_grad_()
    out, routed = layer(x, context((2, 14)))
    gone = (routed.topk_indices == -1).all(-1)
    assert gone.any() and not gone.all()
    assert (out[gone] == 0).all() and (out[~gone].abs().sum(-1) > 0).all()
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert (gradient[gone] == 0).all() and (gradient[~gone].abs().sum(-1) > 0).all()


def test_the_importance_loss_sees_what_the_router_asked_for():
    made, here = routing(hot=2.0), context()
    limited = limit_to_capacity(made, 0.5, "position", here)
    config = importance.Config()
    value = importance.loss(config, limited, LossContext(here))
    assert torch.equal(value, importance.loss(config, made, LossContext(here)))
    assert value > 0.5
    plain = limited._replace(wanted_indices=None, wanted_weights=None)
    assert importance.loss(config, plain, LossContext(here)) < 0.9 * value


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_the_balance_loss_sees_what_the_router_asked_for(scope):
    made = routing(hot=2.0)
    here = context()
    config = Config(scope=scope)
    limited = limit_to_capacity(made, 0.5, "position", here)
    assert torch.equal(
        loss(config, limited, LossContext(here)), loss(config, made, LossContext(here))
    )


def test_the_bias_moves_by_what_the_router_asked_for(tmp_path):
    router = {"name": "topk", "bias_update_rate": 0.02}
    changes = {"model.moe.router": router, "training.micro_batch_size": 2}

    def biases(more):
        config = make_config(tmp_path, changes | more)
        engine = make_engine(config)
        metrics = train_step(engine, micro_batches(config, 1), 1, config, detail=True)
        layers = engine.model.transformer_blocks()
        return torch.stack([b.feed_forward.router.expert_bias for b in layers]), metrics

    # Of the first layer: what enters the others has gone through other experts.
    free, before = biases({})
    bound, metrics = biases({"model.moe.capacity_factor": 0.5})
    assert torch.equal(free[0], bound[0]) and free[0].abs().sum() > 0
    made = before.tokens_per_expert.sum(-1)
    # What is told of the load is what routers chose: a capacity would make it look even.
    assert torch.equal(metrics.tokens_per_expert[0], before.tokens_per_expert[0])
    assert torch.equal(metrics.tokens_per_expert.sum(-1), made)
    assert (metrics.num_dropped > 0.4 * made).all()
    shown = load_measures(
        metrics.tokens_per_expert, metrics.num_dropped, metrics.tokens_per_expert
    )["dropped_percent"]
    assert torch.allclose(shown, 100 * metrics.num_dropped / made)


def test_what_is_told_of_routes_is_what_the_router_chose():
    config = tiny_config(num_layers=1)
    ids = tokens(4, T // 4)
    batch = Batch(ids, ids.roll(-1, 1), torch.zeros(4, T // 4).int(), torch.tensor([0, 0, 1, 1]))

    def told(routing):
        reading = Reading(torch.zeros(ids.shape), ids, (routing,))
        statistics, probe = RouteStatistics(config, 2, torch.arange(67)), _Probe(2, T // 4)
        sample, file = TextSample(("prose", "sums")), io.BytesIO()
        table = RouteTable(file, ("prose", "sums"), (0,), K)
        by_sequence = statistics.add(batch, (routing,))
        probe.add(batch, (routing,))
        sample.add(batch, reading)
        table.add(batch, reading)
        table.close()
        counts = by_sequence, statistics.load, statistics.co_activation, statistics.repeats
        counts += statistics.vocabulary.assignments, probe.routes(1, K)
        return [
            *(each.tolist() for each in counts),
            sample.numbers(),
            pq.read_table(file).to_pydict(),
        ]

    made = routing(hot=2.0)
    limited = limit_to_capacity(made, 0.5, "position", context())
    assert limited.num_dropped.sum() > T / 2
    assert told(limited) == told(made)


def test_the_status_line_says_what_a_run_dropped(tmp_path, capsys):
    short = {"training.steps": 2, "evaluation.every": 0}
    assert run(tmp_path / "whole", short) == 0
    assert "dropped" not in capsys.readouterr().out
    assert run(tmp_path / "dropping", short | {"model.moe.capacity_factor": 0.5}) == 0
    shares = re.findall(r"^step .* dropped (\S+)% ", capsys.readouterr().out, re.MULTILINE)
    assert len(shares) == 2 and all(40 < float(share) < 80 for share in shares)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_recomputation_drops_the_same(priority, tmp_path):
    def run(recompute):
        changes = {"model.moe": dropping(priority)["moe"] | {"num_experts": 4}}
        config = make_config(tmp_path, changes | {"training.activation_checkpointing": recompute})
        engine = make_engine(config)
        metrics = train_step(engine, micro_batches(config, 1), 1, config, detail=True)
        return metrics, [p.clone() for p in engine.model.parameters()]

    plain, weights = run(False)
    again, others = run(True)
    assert plain.num_dropped.sum() > 0
    assert torch.equal(plain.num_dropped, again.num_dropped)
    assert torch.equal(plain.tokens_per_expert, again.tokens_per_expert)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_config_says_that_it_is_not_causal():
    for priority in PRIORITIES:
        assert tiny_config(**dropping(priority)).causal == (priority == "position")
    for priority in ("position", "probability"):
        changes = dropping(priority, capacity_factor=None, eval_capacity_factor=1.5)
        config = tiny_config(**changes)
        assert config.causal == (priority == "position")
        (rules,) = broken_rules(config).values()
        assert rules == BROKEN_RULES[priority]


MISTAKES = {
    "model.moe.drop_priority (random) has no effect without a capacity; set "
    "model.moe.capacity_factor or leave it out": {"drop_priority": "random"},
    "model.moe.drop_priority (probability) lets later tokens decide whether one is dropped, which "
    "spoils language modelling; take position, or set model.moe.allow_non_causal: true to use it "
    "anyway": {"drop_priority": "probability", "capacity_factor": 1.0},
    "model.moe.eval_capacity_factor (2.0) with model.moe.drop_priority (random) would make "
    "evaluation random; leave it out, or take position or probability": {
        "drop_priority": "random",
        "capacity_factor": 1.0,
        "eval_capacity_factor": 2.0,
        "allow_non_causal": True,
    },
    "Input should be greater than 0": {"capacity_factor": 0},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_settings_that_cannot_be_are_refused(message):
    with pytest.raises(ValidationError) as caught:
        tiny_config(moe=MISTAKES[message])
    assert [e["msg"].removeprefix("Value error, ") for e in caught.value.errors()] == [message]
