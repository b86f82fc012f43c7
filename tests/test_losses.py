"""Do the balancing losses have the values worked out by hand, whatever splits the batch?"""

import math

import pytest
import torch
from conftest import assert_equals, randn, relative_error
from model_cases import tiny_model, tokens

from moe.losses import LossContext
from moe.model import BatchTotals
from moe.routing import RouterContext, make_routing
from moe.variants import load_variant, variant_names

T, E = 12, 4
SETTINGS = {"load_balancing": [{"scope": "micro_batch"}, {"scope": "sequence"}]}
CASES = [
    pytest.param(name, settings, id=f"{name} {settings}")
    for name in variant_names("losses")
    for settings in ({}, *SETTINGS.get(name, []))
]


def compute(name, settings, routing, valid=None, shape=None, counts=None):
    module = load_variant("losses", name)
    shape = shape or (1, len(routing.topk_indices))
    router = RouterContext(torch.zeros(shape[0] * shape[1]).long(), None, valid, shape, True)
    return module.loss(module.Config(name=name, **settings), routing, LossContext(router, counts))


def routing_of(probs, indices, valid=None, logits=None):
    """A Routing with given probabilities and choices."""
    probs, indices = torch.as_tensor(probs), torch.as_tensor(indices)
    logits = probs.log() if logits is None else logits
    return make_routing(logits, probs, torch.ones(indices.shape), indices, valid)


def routing_top2(logits):
    probs = logits.softmax(-1)
    return make_routing(logits, probs, *probs.topk(2), None)


def random_routing(valid=None, seed=0, num_experts=E, dtype=torch.float32):
    """(logits that want a gradient, Routing with top-2 of their softmax)."""
    logits = randn(T, num_experts, seed=seed, dtype=dtype).requires_grad_()
    probs = logits.softmax(-1)
    return logits, make_routing(logits, probs, *probs.topk(2), valid)


# --- the contract, of every file ---


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_loss_is_one_finite_number_whose_gradient_reaches_the_router(name, settings):
    logits, routing = random_routing()
    value = compute(name, settings, routing)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    assert logits.grad.abs().sum() > 1e-4
    assert load_variant("losses", name).Config(**settings, weight=0.5).weight == 0.5


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_padding_counts_nowhere(name, settings):
    valid = torch.arange(T) < 9
    values, grads = [], []
    for size in (1.0, 50.0):
        logits = randn(T, E, seed=1)
        logits[~valid] *= size
        logits.requires_grad_()
        probs = logits.softmax(-1)
        routing = make_routing(logits, probs, *probs.topk(2), valid)
        value = compute(name, settings, routing, valid)
        value.backward()
        values.append(value)
        grads.append(logits.grad)
    assert torch.equal(*values)
    assert torch.equal(*grads)
    assert torch.count_nonzero(grads[0][~valid]) == 0
    # The same as without these tokens at all.
    logits = randn(T, E, seed=1)[:9]
    probs = logits.softmax(-1)
    assert_equals(
        values[0], compute(name, settings, make_routing(logits, probs, *probs.topk(2), None))
    )


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_nothing_but_padding_is_zero(name, settings):
    valid = torch.zeros(T, dtype=torch.bool)
    logits, routing = random_routing(valid)
    value = compute(name, settings, routing, valid)
    value.backward()
    assert value.item() == 0
    assert torch.count_nonzero(logits.grad) == 0


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_order_of_experts_and_tokens_plays_no_part(name, settings):
    logits = randn(T, E, seed=2)
    value = compute(name, settings, routing_top2(logits))
    assert_equals(compute(name, settings, routing_top2(logits.flip(1))), value)
    assert_equals(compute(name, settings, routing_top2(logits.flip(0))), value)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradcheck(name, settings):
    logits = randn(T, E, seed=3, dtype=torch.float64).requires_grad_()
    indices = logits.topk(2).indices

    def call(logits):
        probs = logits.softmax(-1)
        routing = make_routing(logits, probs, probs.gather(1, indices), indices, None)
        return compute(name, settings, routing, shape=(3, 4))

    assert torch.autograd.gradcheck(call, [logits])


# --- values by hand ---


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_balance_loss_by_hand(scope):
    # f = (3/4, 1/4), P = (2.6/4, 1.4/4): L = 2 (0.75 * 0.65 + 0.25 * 0.35) = 1.15
    routing = routing_of([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], [[0], [0], [1], [0]])
    value = compute("load_balancing", {"scope": scope}, routing)
    assert value.item() == pytest.approx(1.15, rel=1e-6)


def test_balance_loss_of_two_choices_by_hand():
    # c = (2, 1, 1, 0), f = c / 4; P = (0.45, 0.3, 0.2, 0.05)
    # L = 4 (0.5 * 0.45 + 0.25 * 0.3 + 0.25 * 0.2) = 1.4
    routing = routing_of([[0.5, 0.4, 0.1, 0.0], [0.4, 0.2, 0.3, 0.1]], [[0, 1], [0, 2]])
    assert compute("load_balancing", {}, routing).item() == pytest.approx(1.4, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_1_at_uniform_and_e_over_k_at_collapse(top_k):
    uniform = routing_of(
        torch.full((8, 4), 0.25), (torch.arange(8)[:, None] + torch.arange(top_k)) % 4
    )
    assert compute("load_balancing", {}, uniform).item() == pytest.approx(1.0, rel=1e-6)
    probs = torch.zeros(8, 4)
    probs[:, :top_k] = 1 / top_k
    collapsed = routing_of(probs, torch.arange(top_k).expand(8, top_k))
    value = compute("load_balancing", {}, collapsed).item()
    assert value == pytest.approx(4 / top_k, rel=1e-6)


def test_layers_are_averaged_after_the_product():
    """Two layers collapsed onto different experts score E/K; pooled they would look balanced."""
    probs = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(8, 4)
    chosen = torch.tensor([0, 1]).expand(8, 2)
    layers = [routing_of(probs, chosen), routing_of(probs.flip(1), 3 - chosen)]
    model = tiny_model(moe={"num_experts": 4, "losses": [{"name": "load_balancing"}]})
    context = RouterContext(torch.zeros(8).long(), None, None, (2, 4), True)
    (value,) = model._aux_losses(layers, context, None)
    assert value.item() == pytest.approx(2.0, rel=1e-6)


def test_scopes_differ_where_sequences_differ():
    # Each of two sequences collapses onto an expert of its own: balanced together only.
    probs = torch.eye(2).repeat_interleave(4, 0)
    routing = routing_of(probs, torch.arange(2).repeat_interleave(4).unsqueeze(-1))
    by_scope = {
        scope: compute("load_balancing", {"scope": scope}, routing, shape=(2, 4)).item()
        for scope in ("micro_batch", "sequence", "global_batch")
    }
    assert by_scope == pytest.approx({"micro_batch": 1, "sequence": 2, "global_batch": 1})
    # The counts of the whole step, 3 to 1: L = 2 (0.75 * 0.5 + 0.25 * 0.5) = 1, but for
    # probabilities (0.8, 0.2) it is 2 (0.75 * 0.8 + 0.25 * 0.2) = 1.3; alone all went to 0: 1.6.
    skewed = routing_of(torch.tensor([0.8, 0.2]).expand(4, 2), torch.zeros(4, 1).long())
    counts = torch.tensor([30, 10])
    for scope, expected in {"global_batch": 1.3, "micro_batch": 1.6, "sequence": 1.6}.items():
        value = compute("load_balancing", {"scope": scope}, skewed, counts=counts)
        assert value.item() == pytest.approx(expected, rel=1e-6)


def test_sequence_scope_by_hand_with_padding():
    # Row 1: tokens to 0 and 1, P = (0.7, 0.3): 2 (0.5 * 0.7 + 0.5 * 0.3) = 1, two tokens
    # Row 2: one token to 0, P = (0.9, 0.1), the other is padding: 2 * 0.9 = 1.8, one token
    # Weighted by length: (2 * 1 + 1 * 1.8) / 3
    valid = torch.tensor([True, True, True, False])
    probs = [[0.9, 0.1], [0.5, 0.5], [0.9, 0.1], [0.0, 1.0]]
    routing = routing_of(probs, [[0], [1], [0], [1]], valid)
    value = compute("load_balancing", {"scope": "sequence"}, routing, valid, (2, 2))
    assert value.item() == pytest.approx(3.8 / 3, rel=1e-6)


def test_sigmoid_scores_are_shared_out_first():
    # Scores (0.6, 0.2) are shares (0.75, 0.25); all tokens to 0: L = 2 * 0.75
    routing = routing_of(torch.tensor([0.6, 0.2]).expand(4, 2), torch.zeros(4, 1).long())
    assert compute("load_balancing", {}, routing).item() == pytest.approx(1.5, rel=1e-6)


def test_dropped_assignments_are_not_counted():
    # c = (2, 1): f = (2/3, 1/3), P = (0.7, 0.3)
    routing = routing_of(torch.tensor([0.7, 0.3]).expand(2, 2), [[0, 1], [0, -1]])
    expected = 2 * (2 / 3 * 0.7 + 1 / 3 * 0.3)
    assert compute("load_balancing", {}, routing).item() == pytest.approx(expected, rel=1e-6)


def test_z_loss_by_hand():
    zeros = torch.zeros(5, 4)
    routing = routing_of(zeros + 0.25, torch.zeros(5, 1).long(), logits=zeros)
    value = compute("router_z_loss", {}, routing).item()
    assert value == pytest.approx(math.log(4) ** 2, rel=1e-6)
    # logsumexp(0, log 3) = log 4, logsumexp(log 2, log 6) = log 8
    logits = torch.tensor([[1.0, 3.0], [2.0, 6.0]]).log()
    routing = routing_of(logits.softmax(-1), [[1], [1]], logits=logits)
    value = compute("router_z_loss", {}, routing).item()
    assert value == pytest.approx((math.log(4) ** 2 + math.log(8) ** 2) / 2, rel=1e-6)


def test_z_loss_gradient_is_2_lse_softmax_over_t():
    logits, routing = random_routing(dtype=torch.float64)
    compute("router_z_loss", {}, routing).backward()
    lse = logits.detach().exp().sum(-1, keepdim=True).log()
    assert_equals(logits.grad, 2 * lse * (logits.detach() - lse).exp() / T)


# --- the same whatever splits the batch ---

SPLIT_LOSSES = [
    {"name": "load_balancing", "weight": 0.5},
    {"name": "router_z_loss", "weight": 0.1},
]


def a_step(with_padding):
    """Inputs of a step of 4 sequences, with labels and padding spread unevenly over them."""
    ids = tokens(4, 10)
    labels = ids.roll(-1, 1)
    labels[0, 2:] = -100
    labels[3, 5] = -100
    valid = None
    if with_padding:
        valid = torch.arange(10) < torch.tensor([[10], [4], [7], [10]])
        labels = labels.masked_fill(~valid, -100)
    return {"input_ids": ids, "labels": labels, "valid": valid}


def run_step(model, step, num_micro_batches, *, checkpointing=False):
    """(loss, counts (L, E), gradients by name) of a step, its micro-batches summed."""
    model.zero_grad()
    model.activation_checkpointing = checkpointing
    with torch.no_grad():
        whole = model(step["input_ids"], valid=step["valid"], need_logits=False)
    totals = BatchTotals(
        (step["labels"] != -100).sum(),
        whole.routings[0].num_tokens,
        torch.stack([r.tokens_per_expert for r in whole.routings]),
    )
    loss, counts = 0.0, 0
    for part in range(num_micro_batches):
        rows = slice(part * 4 // num_micro_batches, (part + 1) * 4 // num_micro_batches)
        out = model(**{k: None if v is None else v[rows] for k, v in step.items()}, totals=totals)
        out.loss.backward()
        loss += out.loss.item()
        counts += torch.stack([r.tokens_per_expert for r in out.routings])
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return torch.tensor(loss, dtype=torch.float64), counts, grads


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_splits_of_a_batch_give_equal_value_and_gradient(scope, with_padding, checkpointing):
    losses = [SPLIT_LOSSES[0] | {"scope": scope}, SPLIT_LOSSES[1]]
    model = tiny_model(dtype=torch.float64, lm_z_loss_weight=0.01, moe={"losses": losses})
    step = a_step(with_padding)
    # One batch without any totals is the definition.
    direct = model(**step)
    direct.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for num_micro_batches in (1, 2, 4):
        loss, counts, grads = run_step(model, step, num_micro_batches, checkpointing=checkpointing)
        assert_equals(loss, direct.loss)
        assert torch.equal(counts, torch.stack([r.tokens_per_expert for r in direct.routings]))
        for name, grad in grads.items():
            assert relative_error(grad, expected[name]) < 1e-9, name


def test_micro_batch_scope_does_depend_on_the_split():
    """The test above can fail: this scope is another function of a split batch."""
    losses = [{"name": "load_balancing", "weight": 0.5, "scope": "micro_batch"}]
    model = tiny_model(dtype=torch.float64, moe={"losses": losses})
    step = a_step(False)
    whole, split = run_step(model, step, 1), run_step(model, step, 4)
    assert relative_error(split[0], whole[0]) > 1e-5
    name = "blocks.0.feed_forward.router.weight"
    assert relative_error(split[2][name], whole[2][name]) > 1e-3


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_float32_splits_agree_to_1e_6(num_micro_batches):
    model = tiny_model(moe={"losses": SPLIT_LOSSES})
    step = a_step(False)
    whole, split = run_step(model, step, 1), run_step(model, step, num_micro_batches)
    assert relative_error(split[0], whole[0]) < 1e-6
    for name, grad in split[2].items():
        assert relative_error(grad, whole[2][name]) < 2e-6, name


def test_activation_checkpointing_neither_doubles_counts_nor_changes_a_bit():
    results = []
    for checkpointing in (False, True):
        # Jitter: the recomputation must draw the same noise.
        model = tiny_model(moe={"router": {"name": "topk", "top_k": 2, "jitter": 0.2}}).train()
        model.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        out = model(**a_step(True))
        out.loss.backward()
        counts = [r.tokens_per_expert.tolist() for r in out.routings]
        assert [sum(c) for c in counts] == [int(r.num_tokens) * 2 for r in out.routings] == [62] * 2
        results.append((counts, out.loss, *[p.grad for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_running_counts_add_those_of_earlier_passes():
    losses = [{"name": "load_balancing", "accumulation": "running"}]
    model = tiny_model(dtype=torch.float64, moe={"losses": losses})
    step = {k: v[:2] for k, v in a_step(False).items() if v is not None}
    earlier = torch.tensor([[40, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 20]])
    totals = BatchTotals(torch.tensor(9), torch.tensor(40), None, earlier)
    out = model(**step, totals=totals)
    values = []
    for routing, before in zip(out.routings, earlier, strict=True):
        frequency = (routing.tokens_per_expert + before).double()
        frequency /= frequency.sum()
        values.append(6 * (frequency * routing.router_probs.mean(0)).sum())
    assert_equals(out.aux_losses[0], torch.stack(values).mean())


def test_loss_is_the_sum_of_its_weighted_terms():
    model = tiny_model(moe={"losses": SPLIT_LOSSES}, lm_z_loss_weight=0.01)
    step = a_step(True)
    out = model(**step)
    logits = model(step["input_ids"], valid=step["valid"]).logits[step["labels"] != -100]
    lm_loss = torch.nn.functional.cross_entropy(logits, step["labels"][step["labels"] != -100])
    z_loss = logits.logsumexp(-1).square().mean()
    assert_equals(out.lm_loss, lm_loss)
    assert int(out.num_labels) == len(logits)
    total = lm_loss + 0.01 * z_loss + 0.5 * out.aux_losses[0] + 0.1 * out.aux_losses[1]
    assert_equals(out.loss, total)


def test_a_step_without_any_label_is_finite():
    model = tiny_model()
    ids = tokens(2, 5)
    nothing = torch.full_like(ids, -100)
    totals = BatchTotals(torch.tensor(0), torch.tensor(10))
    for out in (model(ids, nothing), model(ids, nothing, totals=totals)):
        out.loss.backward()
        assert out.lm_loss.item() == 0
        assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
