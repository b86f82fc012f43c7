"""Do the balancing losses have the values worked out by hand, whatever splits the batch?"""

import math

import numpy as np
import pytest
import torch
from conftest import assert_equals, randn, relative_error
from loss_cases import CHECKS, E, Loss, T, broken_checks, build, context, route
from model_cases import tiny_model, tokens
from variant_cases import variant_cases

from moe.model import BatchTotals
from moe.routing import RouterContext, make_routing
from moe.variants import load_variant

LOSSES = variant_cases("losses")
CASES = [pytest.param(name, settings, id=f"{name} {settings}") for name, settings in LOSSES]


def compute(name, settings, routing, valid=None, shape=None, counts=None):
    """The value of a loss; `routing` has what the loss needs."""
    given = context(len(routing.topk_indices), valid, shape, counts)
    return build(name, settings).call(routing, given)


def routing_of(probs, indices, valid=None, logits=None):
    """A Routing with given probabilities and choices."""
    probs, indices = torch.as_tensor(probs), torch.as_tensor(indices)
    logits = probs.log() if logits is None else logits
    return make_routing(logits, probs, torch.ones(indices.shape), indices, valid)


def random_routing(valid=None, seed=0, num_experts=E, dtype=torch.float32):
    """(logits that want a gradient, Routing with top-2 of their softmax)."""
    logits = randn(T, num_experts, seed=seed, dtype=dtype).requires_grad_()
    probs = logits.softmax(-1)
    return logits, make_routing(logits, probs, *probs.topk(2), valid)


# --- the contract, of every file ---


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_loss_keeps_the_contract(name, settings, check):
    CHECKS[check](build(name, settings))


@pytest.mark.parametrize("name", sorted({name for name, _ in LOSSES}))
def test_loss_states_its_source_and_has_a_weight(name):
    module = load_variant("losses", name)
    assert "Source" in module.__doc__
    assert module.Config.__doc__
    assert module.Config(name=name, weight=0.5).weight == 0.5
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        module.Config(name=name, weight=-1)
    # The model multiplies by the weight.
    light, heavy = (module.Config(name=name, weight=weight) for weight in (0.5, 3))
    routing, given = route(randn(T, E, seed=0), noisy=light.needs_noise), context(T)
    assert torch.equal(module.loss(light, routing, given), module.loss(heavy, routing, given))


def sound(routing, context):
    """The mean square of the valid tokens' probabilities, without any bug."""
    squares = routing.router_probs.square().sum(-1)
    if context.router.valid is not None:
        squares = squares * context.router.valid
    return squares.sum() / routing.num_tokens.clamp(min=1)


def counts_padding(routing, context):
    return routing.router_probs.square().sum(-1).mean()


def divides_by_padding(routing, context):
    return sound(routing, context) * routing.num_tokens / len(routing.router_probs)


def without_gradient(routing, context):
    """Of the counts alone, which have none."""
    return routing.tokens_per_expert.float().var() + 0 * sound(routing, context)


def detached(routing, context):
    return sound(routing, context).detach()


def prefers_an_expert(routing, context):
    return sound(routing, context) + routing.router_probs[:, 0].sum() * 0.1


def sums_tokens(routing, context):
    return sound(routing, context) * routing.num_tokens


def in_autocast(routing, context):
    probs = routing.router_probs
    if context.router.valid is not None:
        probs = probs * context.router.valid.unsqueeze(-1)
    return (probs @ probs.T).trace().float()


def endless_entropy(routing, context):
    probs = routing.router_probs
    return sound(routing, context) - (probs * probs.log()).sum() * 0


def pooled():
    """Sums of all layers so far, as a list in a module would have them."""
    seen = []

    def call(routing, context):
        seen.append(sound(routing, context))
        return torch.stack(seen).sum()

    return call


PLANTED = {
    "counts padding": (lambda: counts_padding, {"padding", "only_padding"}),
    "divides by padding": (lambda: divides_by_padding, {"padding"}),
    "has no gradient": (lambda: without_gradient, {"number_with_gradient"}),
    "is detached": (lambda: detached, {"number_with_gradient"}),
    "pools layers": (pooled, {"layers_stand_alone"}),
    "prefers an expert": (lambda: prefers_an_expert, {"order"}),
    "sums over tokens": (lambda: sums_tokens, {"repeats"}),
    "rounds under autocast": (lambda: in_autocast, {"float32"}),
    "takes the log of 0": (lambda: endless_entropy, {"extremes"}),
}


def test_a_sound_loss_passes_every_check():
    assert list(broken_checks(lambda: Loss(sound))) == []


@pytest.mark.parametrize("bug", PLANTED)
def test_the_contract_notices_a_loss_that(bug):
    make, expected = PLANTED[bug]
    assert expected <= set(broken_checks(lambda: Loss(make())))


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


def test_an_assignment_that_is_missing_is_not_counted():
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


# --- values from NumPy ---


def numpy_case(with_padding):
    """(Routing with all that a loss may need, valid, the same in NumPy without padding)."""
    valid = torch.arange(T) % 3 > 0 if with_padding else None
    logits = 2 * randn(T, E, seed=11, dtype=torch.float64)
    routing = route(logits, valid, noisy=True)
    kept = slice(None) if valid is None else valid.numpy()
    fields = ("router_logits", "router_probs", "topk_weights", "topk_indices")
    fields += ("noise_std", "selection_logits")
    return routing, valid, [getattr(routing, field).numpy()[kept] for field in fields]


def squared_cv(sums):
    return np.var(sums) / np.mean(sums) ** 2


def entropy_of(probs):
    return -sum(p * math.log(p) for p in probs)


def oracle(name, settings, logits, probs, weights, indices, std, noisy):
    """A loss of valid tokens alone, token by token and expert by expert."""
    num_tokens, experts = len(probs), range(E)
    if name == "importance" and settings.get("of") == "router_probs":
        return squared_cv(probs.sum(0))
    if name == "importance":
        return squared_cv([weights[indices == e].sum() for e in experts])
    if name == "load":
        load = np.zeros(E)
        for t in range(num_tokens):
            for e in experts:
                others = sorted((noisy[t, i] for i in experts if i != e), reverse=True)
                z = (logits[t, e] - others[indices.shape[1] - 1]) / std[t, e]
                load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
        return squared_cv(load)
    if name == "entropy":
        sharpen = sum(entropy_of(p) for p in probs) / num_tokens
        spread = math.log(E) - entropy_of(probs.mean(0))
        return {"sharpen": sharpen, "spread": spread, "both": sharpen + spread}[settings["aim"]]
    if name == "orthogonality":
        pairs = [(i, j) for i in experts for j in experts if i != j]
        length = np.sqrt((probs**2).sum(0))
        cosines = [probs[:, i] @ probs[:, j] / (length[i] * length[j]) for i, j in pairs]
        return sum(c**2 for c in cosines) / len(pairs)
    assert name == "variance"
    return -sum(((probs[:, e] - probs[:, e].mean()) ** 2).mean() for e in experts) / E


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("importance", {}),
        ("importance", {"of": "router_probs"}),
        ("load", {}),
        ("entropy", {"aim": "sharpen"}),
        ("entropy", {"aim": "spread"}),
        ("entropy", {"aim": "both"}),
        ("orthogonality", {}),
        ("variance", {}),
    ],
)
def test_loss_equals_numpy(name, settings, with_padding):
    routing, valid, arrays = numpy_case(with_padding)
    value = compute(name, settings, routing, valid).item()
    assert value == pytest.approx(oracle(name, settings, *arrays), rel=1e-10)


def test_importance_is_0_at_equal_sums_and_e_minus_1_at_collapse():
    for of in ("topk_weights", "router_probs"):
        equal = make_routing(torch.eye(4), torch.eye(4), torch.ones(4, 1), _column(range(4)), None)
        assert compute("importance", {"of": of}, equal).item() == 0
        one = torch.eye(4)[[2] * 4]
        collapsed = make_routing(one, one, torch.ones(4, 1), _column([2] * 4), None)
        assert compute("importance", {"of": of}, collapsed).item() == pytest.approx(3)


def _column(indices):
    return torch.tensor(list(indices)).unsqueeze(-1)


def test_load_is_that_of_noise_drawn_again():
    """P(t, i) is how often i is among the K chosen where its noise alone is another one."""
    logits = randn(3, E, seed=12, dtype=torch.float64)
    routing = route(logits, noisy=True)
    draws, loads = 40000, torch.zeros(E, dtype=torch.float64)
    for expert in range(E):
        noise = randn(draws, 3, seed=expert, dtype=torch.float64)
        noisy = routing.selection_logits.expand(draws, 3, E).clone()
        noisy[..., expert] = logits[:, expert] + routing.noise_std[:, expert] * noise
        loads[expert] = (noisy.topk(2).indices == expert).any(-1).double().mean(0).sum()
    assert compute("load", {}, routing).item() == pytest.approx(squared_cv(loads.numpy()), rel=0.03)


def test_load_needs_the_routing_of_a_noisy_router():
    with pytest.raises(ValueError, match="the load loss needs"):
        compute("load", {}, random_routing()[1])


def test_load_of_all_experts_is_balanced_whatever_the_noise():
    logits = randn(5, 2, seed=13)
    noise = {"noise_std": torch.ones(5, 2), "selection_logits": logits}
    routing = route(logits)
    routing = routing._replace(**noise)
    assert compute("load", {}, routing).item() == 0


def test_entropy_at_sure_even_and_collapsed_routers():
    even = routing_of(torch.full((4, 4), 0.25), torch.zeros(4, 1).long())
    sure = routing_of(torch.eye(4), _column(range(4)))
    collapsed = routing_of(torch.eye(4)[[1] * 4], _column([1] * 4))
    log_e = pytest.approx(math.log(4))
    expected = {
        "sharpen": (log_e, 0, 0),
        "spread": (pytest.approx(0, abs=1e-7), pytest.approx(0, abs=1e-7), log_e),
        "both": (log_e, pytest.approx(0, abs=1e-7), log_e),
    }
    for aim, values in expected.items():
        found = [compute("entropy", {"aim": aim}, r).item() for r in (even, sure, collapsed)]
        assert tuple(found) == values, aim


def test_orthogonality_is_0_at_disjoint_tokens_and_1_at_equal_wishes():
    disjoint = routing_of(torch.eye(4).repeat(3, 1), torch.zeros(12, 1).long())
    assert compute("orthogonality", {}, disjoint).item() == 0
    equal = routing_of(torch.tensor([0.5, 0.3, 0.1, 0.1]).expand(6, 4), torch.zeros(6, 1).long())
    assert compute("orthogonality", {}, equal).item() == pytest.approx(1)


def test_a_step_down_the_gradient_does_what_the_loss_is_for():
    """Entropy falls or rises, cosines fall, variance rises, sums become more equal."""
    for name, settings in LOSSES:
        loss = build(name, settings)
        logits = randn(T, E, seed=14, dtype=torch.float64).requires_grad_()
        before = loss.call(route(logits, None, loss.noisy), context(T))
        before.backward()
        with torch.no_grad():
            moved = logits - 1e-3 * logits.grad / logits.grad.norm()
        assert loss.call(route(moved, None, loss.noisy), context(T)) < before, name


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


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_loss_of_which_a_part_of_a_step_has_its_own_says_so(name, settings):
    """Else the shares of two passes add up to the loss of the whole step."""
    loss, logits = build(name, settings), randn(T, E, seed=15, dtype=torch.float64)
    whole = route(logits, None, loss.noisy)
    counts = whole.tokens_per_expert

    def value_of(rows):
        part = route(logits[rows], None, loss.noisy)
        return loss.call(part, context(len(part.topk_indices), None, (2, T // 4), counts))

    parts = (value_of(slice(T // 2)) + value_of(slice(T // 2, T))) / 2
    direct = loss.call(whole, context(T, None, (4, T // 4), counts))
    divides = relative_error(parts, direct) < 1e-10
    says = "of this forward pass" in " ".join(load_variant("losses", name).__doc__.split())
    # These two say it of one scope, and of two aims.
    if name == "load_balancing":
        says = settings.get("scope") == "micro_batch"
    if name == "entropy":
        says = settings.get("aim", "sharpen") != "sharpen"
    assert divides != says


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
