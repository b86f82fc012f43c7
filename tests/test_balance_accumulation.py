"""Is the global-batch balance loss that of the whole batch, however a step is cut, and how far from
it is the approximation `accumulation: running`?

The expected value is the formula over the routings of one pass, its gradient by autograd, with the
routers' noise on; no label counts, so that the balance loss is all there is to differentiate. The
errors of `running`, which the docstring of `moe/losses/load_balancing.py` quotes:

    python -m pytest tests/test_balance_accumulation.py -k running -s
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import relative_error
from rank_cases import gathered_gradients, run_ranks
from torch import Tensor
from training_cases import data, make_config, make_engine, noise_from_pytorch

from moe.routing import Routing
from train.config import RunConfig
from train.engine import Engine, build_engine
from train.packing import IGNORE, TrainLoader
from train.random_state import seed_all
from train.ranks import Ranks
from train.step import read_step, train_step

BATCH = 8


def balance_config(micro_batches: int, world: int = 1, **changes: Any) -> RunConfig:
    """The tiny run with the balance loss alone, in so many micro-batches a rank."""
    loss = {"name": "load_balancing", "weight": 1.0, **changes}
    return make_config(
        Path("unused"),
        {
            "model.moe.losses": [loss],
            "model.moe.router": {"name": "topk", "jitter": 0.3, "bias_update_rate": 0.02},
            # Routers with opinions, and so a load to balance.
            "model.init_std": 0.3,
            "training.device": "cpu",
            "training.batch_size": BATCH,
            "training.micro_batch_size": BATCH // world // micro_batches,
            "optimizer.gradient_clip": None,
        }
        | ({"parallel.expert_parallel_size": world} if world > 1 else {}),
    )


class Balance(NamedTuple):
    """The value of the balance loss, and its gradients by name."""

    value: float
    gradients: dict[str, Tensor]


def balance_of(config: RunConfig, ranks: Ranks | None, text: Any) -> Balance:
    """What a new run says of the balance loss in its second step, on these ranks or alone."""
    seed_all(config.seed)
    return captured_step(build_engine(config, config.model, ranks=ranks), config, text, step=1)


def captured_step(engine: Engine, config: RunConfig, text: Any, step: int) -> Balance:
    """The balance loss and its gradients in one step of the program, without the update."""
    found: dict[str, Tensor] = {}

    def capture(learning_rate: float, gradient_norm: Tensor) -> None:
        found.update(gathered_gradients(engine))

    engine.step = capture  # type: ignore[method-assign]
    loader = TrainLoader(text, config.training.seq_len, config.seed)
    batches = read_step(loader, step, config, engine)
    for batch in batches:
        batch.labels.fill_(IGNORE)
    metrics = train_step(engine, batches, step, config)
    assert metrics is not None and metrics.lm_loss == 0
    (value,) = metrics.aux_losses.values()
    return Balance(value, found)


def formula(routings: tuple[Routing, ...]) -> Tensor:
    """L = E sum_i f_i P_i of each layer, its mean over layers."""
    values = []
    for routing in routings:
        num_experts = routing.router_probs.shape[1]
        chosen = routing.topk_indices.flatten().tolist()
        frequency = torch.tensor([chosen.count(e) / len(chosen) for e in range(num_experts)])
        values.append(num_experts * (frequency * routing.router_probs.mean(0)).sum())
    return torch.stack(values).mean()


def expected_balance(text: Any) -> Balance:
    """By the formula, from one pass over the whole batch."""
    config = balance_config(1)
    engine = make_engine(config)
    batch = TrainLoader(text, config.training.seq_len, config.seed).batch(BATCH, BATCH)
    output = engine.model(
        batch.input_ids, document_ids=batch.document_ids, noise_seeds=batch.noise_seeds
    )
    value = formula(output.routings)
    value.backward()
    for parameter in engine.model.parameters():
        # The last experts and the head, which the routers' loss does not reach.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return Balance(value.item(), gathered_gradients(engine))


def error_of(found: Balance, expected: Balance) -> tuple[float, float]:
    """Relative errors of the value, and of the gradient of each weight that it moves, the worst."""
    assert found.gradients.keys() == expected.gradients.keys()
    moved = [name for name, grad in expected.gradients.items() if bool(grad.any())]
    assert any("router" in name for name in moved) and len(moved) > 10
    still = [grad for name, grad in found.gradients.items() if name not in moved]
    assert not any(bool(grad.any()) for grad in still)
    errors = [relative_error(found.gradients[name], expected.gradients[name]) for name in moved]
    return abs(found.value / expected.value - 1), max(errors)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_exact_counts_give_the_balance_loss_of_the_whole_batch(micro_batches):
    expected = expected_balance(data())
    assert expected.value > 1.01, "nothing to balance"
    found = balance_of(balance_config(micro_batches), None, data())
    value, gradient = error_of(found, expected)
    assert value < 1e-6 and gradient < 1e-6, (value, gradient)


def balance_of_ranks(ranks: Ranks, text: Any) -> list[Balance]:
    """On each of two ranks: exact counts in 1, 2 and 4 micro-batches, and what must differ."""
    found = [balance_of(balance_config(n, 2), ranks, text) for n in (1, 2, 4)]
    found.append(balance_of(balance_config(4, 2, accumulation="running"), ranks, text))
    noise_from_pytorch(pytest.MonkeyPatch())
    return [*found, balance_of(balance_config(2, 2), ranks, text)]


def test_exact_counts_of_two_ranks_do_so_too():
    expected = expected_balance(data())
    (results, _) = run_ranks(2, balance_of_ranks, data(), seconds=100)
    for found in results[:3]:
        value, gradient = error_of(found, expected)
        assert value < 1e-6 and gradient < 1e-6, (value, gradient)
    # Counts of a part of the step, and other noise, would be noticed.
    for found in results[3:]:
        assert max(error_of(found, expected)) > 1e-3


# ---- the approximation

STEPS, EVERY = 80, 8


def running_config(micro_batches: int, accumulation: str) -> RunConfig:
    """1,024 tokens a step, 8 experts."""
    loss = {"name": "load_balancing", "weight": 0.01, "accumulation": accumulation}
    return make_config(
        Path("unused"),
        {
            "model.moe.losses": [loss],
            "model.moe.num_experts": 8,
            "model.moe.router": {"name": "topk"},
            "model.hidden_size": 32,
            "training.device": "cpu",
            "training.steps": STEPS,
            "training.seq_len": 64,
            "training.batch_size": 16,
            "training.micro_batch_size": 16 // micro_batches,
        },
    )


def router_gradient(found: Balance) -> Tensor:
    named = sorted(found.gradients.items())
    return torch.cat([grad.flatten() for name, grad in named if "router.weight" in name])


def errors_of_running() -> dict[int, list[tuple[float, float]]]:
    """By number of micro-batches: relative errors of value and routers' gradient, in training."""
    config = running_config(1, "exact")
    engine = make_engine(config)
    update = engine.step
    loader = TrainLoader(data(), config.training.seq_len, config.seed)
    errors: dict[int, list[tuple[float, float]]] = {2: [], 4: [], 8: []}
    for step in range(STEPS):
        if step % EVERY == EVERY - 1:
            exact = captured_step(engine, config, data(), step)
            for micro_batches, found in errors.items():
                running = captured_step(
                    engine, running_config(micro_batches, "running"), data(), step
                )
                gradient = relative_error(router_gradient(running), router_gradient(exact))
                found.append((abs(running.value / exact.value - 1), gradient))
        engine.step = update  # type: ignore[method-assign]
        train_step(engine, read_step(loader, step, config, engine), step, config)
    return errors


def test_running_counts_are_an_approximation_and_how_good_a_one():
    errors = errors_of_running()
    print("\nmicro-batches   error of the value   of the routers' gradient (means over training)")
    means = {}
    for micro_batches, found in errors.items():
        means[micro_batches] = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
        value, gradient = means[micro_batches]
        print(f"{micro_batches:13d}   {value:18.2%}   {gradient:24.1%}")
    # Nothing like rounding: the label says `approximate` for a reason.
    assert all(1e-4 < value < 0.01 and 0.01 < grad < 0.1 for value, grad in means.values())
    assert means[2][1] < means[4][1] < means[8][1]
