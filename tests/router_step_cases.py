"""What every router has to keep inside a model that takes a training step: beside `router_cases`,
for the contract of the files in `moe/routers`, and for routers with planted bugs."""

from typing import Any, NamedTuple

import torch
from conftest import relative_error
from model_cases import tiny_config
from router_cases import LEAK, ROUNDING, D, E, Make
from torch import Tensor

from moe.model import BatchTotals, MoETransformer, init_weights

BATCH, SEQ_LEN = 4, 7
NUM_LAYERS = 2


def model_with(make: Make, dtype: torch.dtype = torch.float32) -> MoETransformer:
    """A tiny model in training, each of its layers with a router of `make`."""
    model = MoETransformer(
        tiny_config(
            hidden_size=D,
            num_layers=NUM_LAYERS,
            init_std=0.3,
            attention={"num_heads": 1, "num_kv_heads": 1},
            moe={
                "num_experts": E,
                "losses": [
                    {"name": "load_balancing", "weight": 0.5},
                    {"name": "router_z_loss", "weight": 0.1},
                ],
            },
        )
    )
    init_weights(model, 0)
    model.to(dtype)
    for block in model.transformer_blocks():
        block.feed_forward.router = make(dtype)
    return model.train()


def a_batch() -> dict[str, Tensor]:
    """Inputs of a step: unequal lengths, two documents in a sequence, a seed of noise for each."""
    # No token twice: two that are equal in a document would tie, and rounding decide.
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(67, generator=generator)[: BATCH * SEQ_LEN].view(BATCH, SEQ_LEN)
    valid = torch.arange(SEQ_LEN) < torch.tensor([[7], [4], [6], [7]])
    return {
        "input_ids": ids,
        "labels": ids.roll(-1, 1).masked_fill(~valid, -100),
        "document_ids": (torch.arange(SEQ_LEN) // 3).expand(BATCH, SEQ_LEN),
        "valid": valid,
        "noise_seeds": torch.tensor([11, 5, 2**40, 7]),
    }


class Step(NamedTuple):
    """A step's loss () and gradients by name; of each layer the counts (E,), and the means over
    tokens of penalty () and feedback (E,), None where there is none."""

    loss: Tensor
    gradients: dict[str, Tensor]
    counts: list[Tensor]
    penalties: list[Tensor | None]
    feedback: list[Tensor | None]


def take_step(make: Make, num_parts: int) -> Step:
    """One step in so many passes, of which each knows the counts of the whole step; in float64."""
    model, batch = model_with(make, torch.float64), a_batch()
    size = BATCH // num_parts
    parts = [{k: t[at : at + size] for k, t in batch.items()} for at in range(0, BATCH, size)]
    with torch.no_grad():
        passes = [model(**part).routings for part in parts]
    counts = [sum(r.demand for r in layer) for layer in zip(*passes, strict=True)]
    num_tokens = batch["valid"].sum()
    totals = BatchTotals((batch["labels"] != -100).sum(), num_tokens, torch.stack(counts))
    loss = torch.zeros((), dtype=torch.float64)
    means: dict[str, list[Any]] = {"penalty": [None] * NUM_LAYERS, "feedback": [None] * NUM_LAYERS}
    for part in parts:
        out = model(**part, totals=totals)
        out.loss.backward()
        loss += out.loss.detach()
        for layer, routing in enumerate(out.routings):
            for name, found in means.items():
                if (value := getattr(routing, name)) is not None:
                    share = value.detach() * (int(routing.num_tokens) / int(num_tokens))
                    found[layer] = share if found[layer] is None else found[layer] + share
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss, gradients, counts, means["penalty"], means["feedback"])


def distance(step: Step, expected: Step) -> float:
    """The largest relative difference of anything in two steps, inf where counts differ."""
    if not all(map(torch.equal, step.counts, expected.counts)):
        return float("inf")
    assert step.gradients.keys() == expected.gradients.keys()
    pairs = [(step.loss, expected.loss)]
    pairs += [(step.gradients[name], wanted) for name, wanted in expected.gradients.items()]
    for ours, theirs in zip(
        step.penalties + step.feedback, expected.penalties + expected.feedback, strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            pairs.append((ours, theirs))
    errors = [(relative_error(a, b, least=1e-12), a.dtype) for a, b in pairs]
    # Shares of counts are in float32, and equal where its rounding is all that differs.
    return max(error for error, dtype in errors if dtype == torch.float64 or error > 1e-6)


def check_divisible(make: Make) -> None:
    """A step in two and in four passes is that in one, global-batch balance loss and noise too."""
    whole = take_step(make, 1)
    worst = max(distance(take_step(make, parts), whole) for parts in (2, 4))
    assert worst < ROUNDING if make().divisible else worst > LEAK, worst


def check_recomputation(make: Make) -> None:
    """Activations that are computed anew, with noise of PyTorch's stream, change no bit."""
    results = []
    for recompute in (False, True):
        model, batch = model_with(make), a_batch()
        del batch["noise_seeds"]
        model.activation_checkpointing = recompute
        torch.manual_seed(3)
        out = model(**batch)
        out.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
        for layer, routing in enumerate(out.routings):
            named = routing._asdict().items()
            found |= {f"{name} {layer}": t.detach() for name, t in named if t is not None}
        results.append(found | {"loss": out.loss.detach()})
    kept, recomputed = results
    assert kept.keys() == recomputed.keys()
    different = [name for name, value in kept.items() if not torch.equal(recomputed[name], value)]
    assert different == []


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
