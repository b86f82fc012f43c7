"""Is a step over two ranks and six passes, with every router, that of one pass in one process?

With the router's own noise, feedback and penalty; and where a router says that a batch cannot be
divided for it, it is another step.
"""

from typing import Any

import pytest
import test_rank_parity
from rank_cases import run_ranks
from test_rank_parity import case, check, run_cases
from training_cases import data
from variant_cases import variant_cases

from moe.variants import load_variant
from train.ranks import Ranks

WHOLE = {"training.micro_batch_size": 12}
# Two show what `after_step` was told. In a third rounding decided between equal letters, which of
# them has an expert of `sequence_topk`.
STEPS = 2


def rank_case(name: str, settings: dict[str, Any], size: int, stage: int) -> dict[str, Any]:
    """A router over two ranks, three passes each."""
    return case("sgd", size, stage, clip=False, passes=3, recompute=stage == 3, world=2) | {
        "model.moe.router": {"name": name, **settings},
        "model.moe.num_experts": 6,
        "model.moe.allow_non_causal": True,
        # Routers with opinions: rounding decides no choice.
        "model.init_std": 0.3,
        "optimizer.learning_rate": 0.05,
    }


def is_divisible(changes: dict[str, Any]) -> bool:
    return load_variant("routers", changes["model.moe.router"]["name"]).Router.divisible


def run_steps(ranks: Ranks, changes: list[dict[str, Any]], text: Any) -> Any:
    test_rank_parity.STEPS = STEPS
    return run_cases(ranks, changes, text)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(test_rank_parity, "STEPS", STEPS)


def check_routers(changes: list[dict[str, Any]]) -> None:
    """Each as its file says: the steps of one process, or others."""
    (results, _) = run_ranks(2, run_steps, changes, data(), seconds=400)
    wrong = []
    for each, found in zip(changes, results, strict=True):
        try:
            # Six passes round otherwise than one.
            check(each | WHOLE, found, rounding=2)
        except AssertionError as error:
            if is_divisible(each):
                wrong.append(f"{each['model.moe.router']}: {error}")
        else:
            if not is_divisible(each):
                wrong.append(f"{each['model.moe.router']} divides, and says that it does not")
    assert wrong == []


def test_two_ranks_take_with_each_router_the_step_of_one_process():
    # The last example of each file, which is the furthest from top-k, or its defaults.
    last = dict(variant_cases("routers"))
    check_routers([rank_case(name, settings, 2, 1) for name, settings in last.items()])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stage"), [(1, 0), (1, 2), (2, 3)])
def test_two_ranks_take_with_every_example_the_step_of_one_process(size, stage):
    changes = [
        rank_case(name, settings, size, stage) for name, settings in variant_cases("routers")
    ]
    # In groups that end before their ranks count as standing still and write their stacks.
    for start in range(0, len(changes), 10):
        check_routers(changes[start : start + 10])
