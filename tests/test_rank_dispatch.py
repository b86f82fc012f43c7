"""Do tokens reach experts on other ranks and come back, whatever each rank has to send?"""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import randn, relative_error
from rank_cases import run_ranks

from kernels.dispatch import DispatchPlan
from moe.config import ModelConfig
from moe.dispatcher import expert_parallel_dispatch, local_dispatch
from moe.routing import Routing, make_routing
from train.activation_memory import exchanged_rows
from train.ranks import Ranks
from train.work_clock import WorkClock

D, F, E = 12, 10, 8
# Tokens of each rank, in turns.
TOKENS = ((9, 9, 9, 9), (5, 0, 17, 1), (0, 0, 0, 0), (0, 33, 2, 0))
# Ways to choose experts, some of which starve whole ranks.
CASES = ("random", "dropped", "nothing assigned", "one expert of all", "first rank only")


def routing_of(case: str, num_tokens: int, rank: int) -> Routing:
    """K = 3 experts of E = 8 for each token."""
    draw = torch.Generator().manual_seed(100 * rank + num_tokens)
    scores = torch.rand(num_tokens, E, generator=draw)
    indices = scores.argsort(-1, descending=True)[:, :3]
    weights = torch.rand(num_tokens, 3, generator=draw, dtype=torch.float64) + 0.1
    if case == "dropped":
        indices[torch.rand(num_tokens, 3, generator=draw) < 0.4] = -1
    elif case == "nothing assigned":
        indices = torch.full_like(indices, -1)
    elif case == "one expert of all":
        indices = torch.full_like(indices, -1)
        indices[:, 1] = 5
    elif case == "first rank only":
        indices = indices.new_tensor([0, 1, -1]).expand(num_tokens, 3).clone()
    weights = weights.masked_fill(indices < 0, 0)
    return make_routing(scores.double(), scores.double(), weights, indices, None)


def kept_bytes(ranks: Ranks, name: str, hidden: int) -> tuple[int, int]:
    """What the forward pass saves where all experts are here, and where ranks share them; each
    token goes to one expert of each half."""
    from moe.variants import load_variant

    module = load_variant("experts", name)
    tokens = torch.arange(64)
    indices = torch.stack([tokens % 4, 4 + tokens % 4], 1)
    weights = torch.rand(64, 2).requires_grad_()
    routing = make_routing(torch.rand(64, E), torch.rand(64, E), weights, indices, None)
    x, kept = torch.rand(64, hidden).requires_grad_(), []
    for shares in (1, ranks.world_size):
        experts = module.Experts(module.Config(), E // shares, hidden, 256)
        known = {p.data_ptr() for p in (x, *experts.parameters())}
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
            return saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if shares == 1:
                out = local_dispatch(experts, x, routing)
            else:
                out, _ = expert_parallel_dispatch(experts, x, routing, dist.group.WORLD)
        out.sum().backward()
        kept.append(sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known))
    return kept[0], kept[1]


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_rows_that_are_exchanged_are_kept_as_planned(name):
    hidden = 512
    config = ModelConfig.model_validate({"moe": {"experts": {"name": name}}})
    for alone, shared in run_ranks(2, kept_bytes, name, hidden):
        expected = 64 * 2 * hidden * 4 * exchanged_rows(config)
        assert shared - alone == pytest.approx(expected, rel=0.05)


class Experts(torch.nn.Module):
    """The real module's signature in float64, fused or not; a share of the same weights."""

    def __init__(self, first: int, count: int, fused: bool):
        super().__init__()
        from moe.variants import load_variant

        module = load_variant("experts", "swiglu")
        self.inner = module.Experts(module.Config(), count, D, F).double()
        self.fuses_dispatch = fused
        for number, name in enumerate(("w1", "w2", "w3")):
            whole = randn(E, *getattr(self.inner, name).shape[1:], seed=number).double()
            getattr(self.inner, name).data.copy_(whole[first : first + count])

    def forward(self, x: torch.Tensor, counts: torch.Tensor, *, backend: str, **fused: Any):
        plan: DispatchPlan | None = fused.get("plan")
        assert (plan is not None) == self.fuses_dispatch
        return self.inner(x, counts, backend=backend, **fused)


def exchange(ranks: Ranks, size: int) -> list[str]:
    """Every case on every rank: what differs from all experts in one process, named."""
    from train.expert_parallel import ExpertGroups

    groups = ExpertGroups(size, 1, WorkClock("cpu"))
    count = E // size
    problems = []
    for case in CASES:
        for tokens in TOKENS:
            for fused in (True, False):
                x = randn(tokens[ranks.rank], D, seed=50 + ranks.rank).double()
                routing = routing_of(case, len(x), ranks.rank)
                weight = randn(len(x), D, seed=90 + ranks.rank).double()
                ours = Experts(groups.rank * count, count, fused)
                whole = Experts(0, E, fused)
                found, wanted = [], []
                for experts, results in ((ours, found), (whole, wanted)):
                    leaf = x.clone().requires_grad_()
                    gates = routing.topk_weights.clone().requires_grad_()
                    chosen = routing._replace(topk_weights=gates)
                    if experts is ours:
                        out, _ = expert_parallel_dispatch(experts, leaf, chosen, groups.group)
                    else:
                        out = local_dispatch(experts, leaf, chosen)
                    parameters = list(experts.parameters())
                    grads = torch.autograd.grad((out * weight).sum(), [leaf, gates, *parameters])
                    results += [out, *grads]
                # Each expert's gradient: the sum over the ranks of the group.
                for place in range(3, 6):
                    dist.all_reduce(wanted[place], group=groups.group)
                    wanted[place] = wanted[place][groups.rank * count :][:count]
                names = ("output", "x", "topk_weights", "w1", "w2", "w3")
                for name, a, b in zip(names, found, wanted, strict=True):
                    if a.shape != b.shape or relative_error(a, b, least=1e-6) > 1e-10:
                        problems.append(f"{case}, {tokens}, fused {fused}: {name}")
    return problems


@pytest.mark.parametrize(
    ("world", "size"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow), (4, 4)]
)
def test_experts_on_other_ranks_give_what_experts_here_give(world, size):
    assert run_ranks(world, exchange, size, seconds=120) == [[]] * world


def overlap(ranks: Ranks) -> list[bool]:
    """Rank 1 sends its rows, and later its gradients, only when rank 0 is at what it does
    meanwhile; on rank 0, whether its own were under way then."""
    import moe.dispatcher
    from train.expert_parallel import ExpertGroups

    groups = ExpertGroups(2, 0.5, WorkClock("cpu"))
    store = dist.distributed_c10d._get_default_store()
    real, exchanges, under_way = moe.dispatcher._Exchange.start, [], []

    def start(self: Any, rows: torch.Tensor, **direction: Any) -> torch.Tensor:
        exchanges.append(self)
        # There and back, then the gradients of both: those of the way there come last.
        if ranks.rank == 1 and len(exchanges) in (1, 4):
            store.wait([f"meanwhile {len(exchanges)}"], timedelta(seconds=20))
        return real(self, rows, **direction)

    moe.dispatcher._Exchange.start = start  # type: ignore[method-assign]
    x = randn(6, D, seed=ranks.rank).double().requires_grad_()

    def meanwhile() -> torch.Tensor:
        reached(None)
        beside = 2 * x
        beside.register_hook(reached)
        return beside

    def reached(_grad: torch.Tensor | None) -> None:
        if ranks.rank == 0:
            under_way.append(exchanges[-1]._under_way is not None)
            store.set(f"meanwhile {len(exchanges)}", "")

    routing = routing_of("random", len(x), ranks.rank)
    experts = Experts(groups.rank * E // 2, E // 2, fused=True)
    out, beside = expert_parallel_dispatch(experts, x, routing, groups.group, meanwhile=meanwhile)
    whole = local_dispatch(Experts(0, E, fused=True), x, routing)
    assert relative_error(out, whole) < 1e-10
    assert torch.equal(beside, 2 * x)
    (out + beside).sum().backward()
    return under_way


def test_shared_experts_compute_while_rows_are_under_way():
    assert run_ranks(2, overlap, seconds=60) == [[True, True], []]
