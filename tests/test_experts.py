"""Does every kind of expert keep the contract: one network a row, its own, and no other?"""

import math

import numpy as np
import pytest
import torch
from conftest import assert_equals, assignments, randn, relative_error
from variant_cases import variant_cases

from kernels.dispatch import permute, plan_dispatch, unpermute
from moe.dispatcher import local_dispatch
from moe.routing import make_routing
from moe.variants import load_variant

D, F = 10, 7

KINDS = variant_cases("experts")
CASES = [pytest.param(name, settings, id=f"{name} {settings}") for name, settings in KINDS]


def build(name, settings, num_experts, dtype=torch.float64):
    module = load_variant("experts", name)
    experts = module.Experts(module.Config(name=name, **settings), num_experts, D, F)
    with torch.no_grad():
        for seed, parameter in enumerate(experts.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return experts.to(dtype)


def alone(experts, expert, row):
    """One row through one expert, with no other rows."""
    counts = torch.zeros(next(experts.parameters()).shape[0], dtype=torch.int64)
    counts[expert] = 1
    return experts(row.unsqueeze(0), counts)[0]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_each_row_passes_its_own_expert_alone(name, settings):
    experts = build(name, settings, 5)
    counts = torch.tensor([0, 3, 1, 0, 4])
    rows = randn(8, D, seed=9, dtype=torch.float64)
    out = experts(rows, counts)
    assert out.shape == (8, D)
    assert out.dtype == torch.float64
    expert_of_row = torch.repeat_interleave(torch.arange(5), counts)
    expected = [alone(experts, e, row) for e, row in zip(expert_of_row, rows, strict=True)]
    assert_equals(out, torch.stack(expected))
    # Experts differ: the same row gives another result elsewhere.
    assert not torch.allclose(alone(experts, 0, rows[0]), alone(experts, 1, rows[0]))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradient_reaches_busy_experts_and_is_zero_at_idle_ones(name, settings):
    experts = build(name, settings, 5)
    rows = randn(8, D, seed=9, dtype=torch.float64).requires_grad_()
    experts(rows, torch.tensor([0, 3, 1, 0, 4])).square().sum().backward()
    assert (rows.grad.abs().sum(-1) > 0).all()
    for parameter_name, parameter in experts.named_parameters():
        if not parameter.requires_grad:
            continue
        norms = parameter.grad.flatten(1).norm(dim=1)
        assert norms[[0, 3]].tolist() == [0, 0], parameter_name
        assert (norms[[1, 2, 4]] > 0).all(), parameter_name


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_no_rows_at_all_still_give_every_parameter_a_gradient(name, settings):
    experts = build(name, settings, 3)
    out = experts(torch.zeros(0, D, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    assert out.shape == (0, D)
    out.sum().backward()
    assert all(p.grad is not None for p in experts.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_unused_rows_are_never_read(name, settings):
    experts = build(name, settings, 3)
    rows = randn(6, D, seed=9, dtype=torch.float64)
    clean = experts(rows[:4], torch.tensor([1, 0, 3]))
    rows[4:] = torch.nan
    rows.requires_grad_()
    out = experts(rows, torch.tensor([1, 0, 3]))
    assert_equals(out[:4], clean)
    out[:4].sum().backward()
    assert all(p.grad.isfinite().all() for p in experts.parameters() if p.requires_grad)
    assert rows.grad[:4].isfinite().all()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_experts_are_interchangeable(name, settings):
    experts, shuffled = build(name, settings, 4), build(name, settings, 4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for ours, source in zip(shuffled.parameters(), experts.parameters(), strict=True):
            ours.copy_(source[order])
    row = randn(D, seed=9, dtype=torch.float64)
    for position, expert in enumerate(order):
        assert torch.equal(alone(shuffled, position, row), alone(experts, expert, row))


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("case", ["random", "dropped", "idle experts", "one expert"])
def test_fused_form_equals_the_three_steps(name, settings, case):
    indices, weights, num_experts = assignments(case, 20)
    experts = build(name, settings, num_experts)
    if not getattr(experts, "fuses_dispatch", False):
        pytest.skip("has no fused form")
    plan = plan_dispatch(indices, num_experts)
    x = randn(20, D, seed=9, dtype=torch.float64)
    rows = experts(permute(x, plan), plan.tokens_per_expert)
    fused = experts(x, plan.tokens_per_expert, plan=plan, topk_weights=weights.double())
    assert_equals(fused, unpermute(rows, plan, weights.double()))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_experts_are_stacked_tensors_and_build_on_meta(name, settings):
    module = load_variant("experts", name)
    with torch.device("meta"):
        experts = module.Experts(module.Config(name=name, **settings), 5, D, F)
    shapes = {n: tuple(p.shape) for n, p in experts.named_parameters()}
    # As expert parallelism and checkpoints expect them: gate, down, up; no up without a gate.
    gated = {"w3": (5, F, D)} if experts.config.has_gate else {}
    assert shapes == {"w1": (5, F, D), "w2": (5, D, F)} | gated


def normal_below(x):
    return np.array([0.5 * (1 + math.erf(each / math.sqrt(2))) for each in x])


ORACLES = {
    "swiglu": lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    "geglu": lambda gate, up: gate * normal_below(gate) * up,
    "gelu": lambda hidden: hidden * normal_below(hidden),
    "relu2": lambda hidden: np.where(hidden > 0, hidden, 0) ** 2,
}


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_expert_equals_numpy(name, settings):
    if name not in ORACLES:
        assert "." in name, "a file in moe/experts has its formula in ORACLES"
        pytest.skip("a module of somebody's own")
    experts = build(name, settings, 2)
    row = randn(D, seed=9, dtype=torch.float64)
    weights = {n: w[1].detach().numpy() for n, w in experts.named_parameters()}
    hidden = [weights[n] @ row.numpy() for n in ("w1", "w3") if n in weights]
    if "clamp" in settings:
        bound = settings["clamp"]
        assert max(abs(h).max() for h in hidden) > bound
        hidden = [np.minimum(hidden[0], bound), np.clip(hidden[1], -bound, bound)]
    expected = weights["w2"] @ ORACLES[name](*hidden)
    assert_equals(alone(experts, 1, row), torch.from_numpy(expected))


@pytest.mark.parametrize("name", sorted({name for name, _ in KINDS}))
def test_file_states_its_source(name):
    module = load_variant("experts", name)
    assert "Source" in module.__doc__
    assert module.Config.__doc__


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradcheck(name, settings):
    experts = build(name, settings, 3)
    rows = randn(5, D, seed=9, dtype=torch.float64).requires_grad_()
    names = [n for n, _ in experts.named_parameters()]

    def call(rows, *weights):
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(experts, given, (rows, torch.tensor([2, 0, 2])))

    weights = [p.detach().clone().requires_grad_() for p in experts.parameters()]
    assert torch.autograd.gradcheck(call, [rows, *weights], fast_mode=True)


class Dispatched(torch.nn.Module):
    """From tokens to their weighted sums, in one kernel where the experts have one."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, routing):
        return local_dispatch(self.experts, x, routing)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("case", ["random", "dropped"])
def test_gradcheck_with_a_plan(name, settings, case):
    indices, topk_weights, num_experts = assignments(case, 6)
    layer = Dispatched(build(name, settings, num_experts))
    names = [n for n, _ in layer.named_parameters()]
    scores = torch.zeros(6, num_experts, dtype=torch.float64)

    def call(x, topk_weights, *weights):
        routing = make_routing(scores, scores, topk_weights, indices, None)
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x, routing))

    x = randn(6, D, seed=9, dtype=torch.float64)
    values = x, topk_weights.double(), *layer.parameters()
    given = [each.detach().clone().requires_grad_() for each in values]
    assert torch.autograd.gradcheck(call, given, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of masked rows
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_triton_gives_what_float64_gives(device, name, settings):
    pytest.importorskip("triton")
    counts, exact = torch.tensor([0, 3, 1, 0, 4]), build(name, settings, 5)
    ours = build(name, settings, 5, torch.float32).to(device)
    rows, grad = (randn(8, D, seed=seed, dtype=torch.float64) for seed in (9, 10))
    found, wanted = [], []
    for experts, results, backend in ((ours, found, "triton"), (exact, wanted, "torch")):
        weight = experts.w1
        leaf = rows.to(weight.device, weight.dtype, copy=True).requires_grad_()
        out = experts(leaf, counts.to(weight.device), backend=backend)
        inputs = [leaf, *experts.parameters()]
        results += [out, *torch.autograd.grad(out, inputs, grad.to(out.device, out.dtype))]
    for ours_found, expected in zip(found, wanted, strict=True):
        assert_equals(ours_found, expected)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_autocast_computes_in_bfloat16_and_gives_gradients_in_float32(name, settings):
    experts, counts = build(name, settings, 5, torch.float32), torch.tensor([0, 3, 1, 0, 4])
    rows = randn(8, D, seed=9).requires_grad_()
    wide = experts(rows, counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = experts(rows, counts)
    assert narrow.dtype == torch.bfloat16
    assert relative_error(narrow, wide) < 0.03
    narrow.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in (rows, *experts.parameters()))
