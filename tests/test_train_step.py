"""One optimizer step is the same however the batch is cut into passes, and does what AdamW does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor
from training_cases import (
    bits,
    data,
    different,
    make_config,
    make_engine,
    micro_batches,
    noise_from_pytorch,
)

from train.config import RunConfig
from train.engine import PlainEngine
from train.errors import ConfigError
from train.metrics import StepMetrics
from train.packing import IGNORE, Batch, TrainLoader
from train.step import batch_totals, read_step, train_step

# Everything that could depend on the cut is on, noise too.
EVERYTHING = {
    "model.moe.router": {"name": "topk", "jitter": 0.2, "bias_update_rate": 0.02},
    "model.lm_z_loss_weight": 0.01,
    "model.moe.num_shared_experts": 1,
    "optimizer.gradient_clip": None,
}


def balance(**changes: Any) -> dict[str, Any]:
    """A balance loss that matters beside the others, and a z-loss."""
    losses = [
        {"name": "load_balancing", "weight": 0.5, **changes},
        {"name": "router_z_loss", "weight": 0.1},
    ]
    return {"model.moe.losses": losses}


class CapturedStep:
    """Gradients and metrics of one step, whose update is left out."""

    def __init__(self, tmp_path: Path, changes: dict[str, Any]):
        config = make_config(tmp_path, EVERYTHING | changes)
        self.engine = make_engine(config)
        self.gradients: dict[str, Tensor] = {}
        self.engine.step = self._capture  # type: ignore[method-assign]
        self.batches = uneven(micro_batches(config, 1))
        metrics = train_step(self.engine, self.batches, 1, config, detail=True)
        assert metrics is not None
        self.metrics: StepMetrics = metrics

    def _capture(self, learning_rate: float, gradient_norm: Tensor) -> None:
        named = self.engine.model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def uneven(batches: list[Batch]) -> list[Batch]:
    """The first sequence of the step counts 3 labels, so that passes have unequal numbers."""
    batches[0].labels[0, 3:] = IGNORE
    return batches


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
def test_gradients_do_not_depend_on_the_number_of_micro_batches(size, scope, tmp_path):
    whole = CapturedStep(tmp_path, balance(scope=scope) | {"training.micro_batch_size": 4})
    parts = CapturedStep(tmp_path, balance(scope=scope) | {"training.micro_batch_size": size})
    assert len(parts.batches) == 4 // size
    assert worst(parts.gradients, whole.gradients) < 1e-6
    ours, expected = parts.metrics, whole.metrics
    assert torch.equal(ours.tokens_per_expert, expected.tokens_per_expert)
    assert ours.tokens_per_expert.sum(-1).tolist() == [4 * 16 * 2] * 2
    assert ours.num_tokens == expected.num_tokens == 64
    assert ours.lm_loss == pytest.approx(expected.lm_loss, rel=1e-6)
    assert ours.aux_losses == pytest.approx(expected.aux_losses, rel=1e-6)
    assert ours.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
    weights = {"load_balancing": 0.5, "router_z_loss": 0.1, "lm_z_loss": 0.01}
    assert ours.aux_coefficients == pytest.approx(weights, rel=1e-6)
    assert expected.aux_coefficients == pytest.approx(weights, rel=1e-6)
    for a, b in zip(ours.detail.routers, expected.detail.routers, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    assert torch.equal(ours.detail.logit_counts, expected.detail.logit_counts)
    for norms in ("gradient_norms", "weight_norms"):
        assert getattr(ours.detail, norms) == pytest.approx(
            getattr(expected.detail, norms), rel=1e-6
        )


@pytest.mark.parametrize(
    "approximate", [balance(accumulation="running"), balance(scope="micro_batch")]
)
def test_counts_of_a_part_of_the_step_give_other_gradients(approximate, tmp_path):
    """The control of the test above: it would notice counts that are not those of the step."""
    exact = CapturedStep(tmp_path, balance() | {"training.micro_batch_size": 4})
    parts = CapturedStep(tmp_path, approximate | {"training.micro_batch_size": 1})
    routers = [name for name in exact.gradients if "router" in name]
    assert len(routers) == 2
    for name in routers:
        assert relative_error(parts.gradients[name], exact.gradients[name]) > 1e-3


@pytest.fixture(params=["of each sequence", "of PyTorch's stream"])
def either_noise(request, monkeypatch):
    """Noise that follows from the batch, and noise that must be replayed."""
    if request.param == "of PyTorch's stream":
        noise_from_pytorch(monkeypatch)


def test_noise_of_pytorchs_stream_is_another_for_each_cut(tmp_path, monkeypatch):
    """The control of the tests above: with noise that depends on the cut they would fail."""
    noise_from_pytorch(monkeypatch)
    whole, parts = (
        CapturedStep(tmp_path, balance() | {"training.micro_batch_size": size}) for size in (4, 1)
    )
    assert worst(parts.gradients, whole.gradients) > 1e-3


def test_recomputed_activations_give_equal_bits(either_noise, tmp_path):
    """Jitter too is replayed, and the passes are counted once."""
    noise = {"model.moe.router": {"name": "topk", "jitter": 0.3, "bias_update_rate": 0.02}}
    plain = CapturedStep(tmp_path, balance() | noise)
    again = CapturedStep(tmp_path, balance() | noise | {"training.activation_checkpointing": True})
    assert different(bits({"g": again.gradients}), bits({"g": plain.gradients})) == []
    assert torch.equal(again.metrics.tokens_per_expert, plain.metrics.tokens_per_expert)


def test_counting_passes_choose_the_experts_that_the_others_choose(
    either_noise, tmp_path, monkeypatch
):
    """With noise too, since the random streams are replayed."""
    noise = {"model.moe.router": {"name": "topk", "jitter": 0.9}, "training.micro_batch_size": 1}
    seen = []
    real = PlainEngine.__call__

    def call(engine, batch, totals=None):
        output = real(engine, batch, totals)
        counts = torch.stack([r.tokens_per_expert for r in output.routings])
        seen.append((torch.is_grad_enabled(), counts, totals))
        return output

    monkeypatch.setattr(PlainEngine, "__call__", call)
    CapturedStep(tmp_path, balance() | noise)
    counting, training = seen[:4], seen[4:]
    assert [grad for grad, _, _ in seen] == [False] * 4 + [True] * 4
    for (_, counted, _), (_, trained, totals) in zip(counting, training, strict=True):
        assert torch.equal(counted, trained)
        assert torch.equal(totals.tokens_per_expert, sum(counts for _, counts, _ in counting))


@pytest.mark.parametrize(
    ("losses", "micro_batches", "needed"),
    [
        (balance(), 1, False),
        (balance(), 2, True),
        (balance(accumulation="running"), 2, False),
        (balance(scope="sequence"), 2, False),
        ({"model.moe.losses": []}, 2, False),
    ],
)
def test_counting_passes_are_made_only_where_a_loss_needs_them(
    losses, micro_batches, needed, tmp_path
):
    assert make_config(tmp_path, losses).exact_counts_needed(micro_batches) == needed


def test_the_loss_that_is_reported_is_the_mean_over_counted_labels(tmp_path):
    # Without a bias, which the step has moved already.
    step = CapturedStep(tmp_path, {"model.moe.router": {"name": "topk"}})
    model = step.engine.model.eval()
    total, count = 0.0, 0
    for batch in step.batches:
        logits = model(batch.input_ids, document_ids=batch.document_ids).logits
        log_probs = logits.detach().double().log_softmax(-1)
        for row, labels in zip(log_probs, batch.labels, strict=True):
            for position, label in enumerate(labels.tolist()):
                if label != IGNORE:
                    total -= float(row[position, label])
                    count += 1
    assert count < 4 * 16 - 10
    assert step.metrics.lm_loss == pytest.approx(total / count, rel=1e-5)


def test_padding_of_labels_does_not_count_the_z_loss_of_the_head_as_model_loss(tmp_path):
    with_z, without = (
        CapturedStep(tmp_path, {"model.lm_z_loss_weight": weight}) for weight in (0.5, 0.0)
    )
    assert with_z.metrics.lm_loss == pytest.approx(without.metrics.lm_loss, rel=1e-6)
    assert worst(with_z.gradients, without.gradients) > 1e-2


# ---- the update


def reference_adamw(
    weights: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    config: RunConfig,
    rates: list[float],
) -> dict[str, Tensor]:
    """AdamW as in Loshchilov & Hutter, algorithm 2, with clipping, in float64."""
    optimizer = config.optimizer
    beta1, beta2 = optimizer.betas
    weights = {name: w.double() for name, w in weights.items()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t, (step, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = sum(g.double().square().sum() for g in step.values()).sqrt()
        scale = min(1.0, optimizer.gradient_clip / float(norm)) if optimizer.gradient_clip else 1.0
        for name, w in weights.items():
            g = step[name].double() * scale
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            update = (m[name] / (1 - beta1**t)) / (
                (v[name] / (1 - beta2**t)).sqrt() + optimizer.eps
            )
            decay = optimizer.weight_decay if w.dim() >= 2 else 0.0
            weights[name] = w - rate * (update + decay * w)
    return weights


@pytest.mark.parametrize("clip", [None, 0.1, 1e9])
def test_three_steps_are_those_of_adamw(clip, tmp_path):
    config = make_config(
        tmp_path, EVERYTHING | {"optimizer.gradient_clip": clip, "optimizer.eps": 1e-4}
    )
    engine = make_engine(config)
    start = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    gradients, rates = [], []
    real = engine.step

    def step(rate: float, norm: Tensor) -> None:
        named = engine.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named})
        rates.append(rate)
        real(rate, norm)

    engine.step = step
    norms = [
        train_step(engine, micro_batches(config, s), s, config).gradient_norm for s in range(3)
    ]
    by_hand = [sum(g.double().square().sum() for g in step.values()) ** 0.5 for step in gradients]
    assert norms == pytest.approx([float(norm) for norm in by_hand], rel=1e-5)
    assert min(norms) > 0.1, "the small clip must clip"
    expected = reference_adamw(start, gradients, config, rates)
    for name, parameter in engine.model.named_parameters():
        assert relative_error(parameter, expected[name].float()) < 1e-5, name


def test_the_bias_moves_once_a_step_by_the_counts_of_the_whole_step(tmp_path):
    config = make_config(tmp_path, EVERYTHING | {"training.micro_batch_size": 1})
    engine = make_engine(config)
    expected = torch.zeros(2, 4)
    for step in range(3):
        metrics = train_step(engine, micro_batches(config, step), step, config)
        load = metrics.tokens_per_expert.double()
        expected += 0.02 * torch.sign(load.mean(-1, keepdim=True) - load).float()
        routers = [block.feed_forward.router for block in engine.model.blocks]
        assert torch.allclose(torch.stack([r.expert_bias for r in routers]), expected)
    assert expected.abs().max() > 0


def test_a_dense_model_takes_a_step(tmp_path):
    config = make_config(tmp_path, {"model.feed_forward": "dense"})
    metrics = train_step(make_engine(config), micro_batches(config), 0, config)
    assert metrics.aux_losses == {} and metrics.tokens_per_expert.shape[0] == 0


# ---- what a step reads


class _Rank:
    """What `read_step` asks of an engine."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (1, 1), (2, 1), (2, 2), (4, 1)])
def test_any_split_of_a_step_reads_the_same_batch(world_size, micro, tmp_path):
    config = make_config(tmp_path, {"training.micro_batch_size": micro})
    loader = TrainLoader(data(), config.training.seq_len, config.seed)
    for step in (0, 7):
        expected = loader.batch(step * 4, 4)
        parts = [
            batch
            for rank in range(world_size)
            for batch in read_step(loader, step, config, _Rank(rank, world_size))
        ]
        for field in ("input_ids", "labels", "document_ids", "domain_ids", "noise_seeds"):
            value = getattr(expected, field)
            joined = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(joined, value), field


@pytest.mark.parametrize(("world_size", "micro"), [(2, 4), (3, 1), (8, None)])
def test_a_step_that_does_not_divide_is_refused(world_size, micro, tmp_path):
    config = make_config(tmp_path, {"training.micro_batch_size": micro})
    loader = TrainLoader(data(), config.training.seq_len, config.seed)
    with pytest.raises(ConfigError, match=r"training\.batch_size \(4\) must be a multiple of"):
        read_step(loader, 0, config, _Rank(0, world_size))


def test_the_balance_loss_of_ranks_sums_to_that_of_the_whole_batch(tmp_path):
    # Each rank passes once, with the counts of all ranks given by a stand-in for the collective.
    config = make_config(tmp_path, {"training.micro_batch_size": 4})
    engine, (whole,) = make_engine(config), micro_batches(config)
    parts = slice(0, 2), slice(2, 4)
    halves = [
        Batch(*(field[part] for field in whole[:4]), noise_seeds=whole.noise_seeds[part])
        for part in parts
    ]
    totals = batch_totals(engine, [whole], config, lambda: False)
    expected = engine(whole, totals)
    counts = torch.stack([r.tokens_per_expert for r in expected.routings])
    seen = []
    for half in halves:
        sums = totals._replace(sum_over_ranks=lambda local: seen.append(local) or counts)
        seen.append(engine(half, sums).loss)
    assert torch.equal(seen[0] + seen[2], counts)
    assert (seen[1] + seen[3]).item() == pytest.approx(expected.loss.item(), rel=1e-6)
    apart = sum(engine(half, totals).loss.item() for half in halves)
    assert apart != pytest.approx(expected.loss.item(), rel=1e-6)


def test_two_runs_of_a_step_agree_in_every_bit(tmp_path):
    first, second = (CapturedStep(tmp_path, {}) for _ in range(2))
    assert different(bits({"g": first.gradients}), bits({"g": second.gradients})) == []
