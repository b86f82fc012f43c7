"""Does a checkpoint of one layout of ranks go on in every other, bit for bit?

Expected is one run of one process that nobody interrupted: the state that it saved, the tokens of
its next steps and their losses.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rank_cases import gathered_state, run_ranks
from torch import Tensor
from training_cases import Recorder, checkpoint, data, make_config, run

from train.checkpoint import find_checkpoint
from train.config import RunConfig
from train.packing import Batch, TrainLoader
from train.ranks import Ranks
from train.step import read_step, train_step

# With noise, and a rate that does not depend on the run's length.
STEADY = {
    "model.moe.router": {"name": "topk", "jitter": 0.2, "bias_update_rate": 0.02},
    "training.device": "cpu",
    "training.micro_batch_size": None,
    "training.batch_size": 8,
    "schedule": {"name": "constant", "warmup_steps": 0},
    "checkpoint.keep_last": 10,
    "evaluation.every": 0,
}
# The first checkpoint, a second one that ranks write, and steps after either. After an odd number
# of updates by the same amount, no router bias is back at 0.
FIRST, SECOND, MANY, FEW = 5, 9, 20, 4


class Layout(NamedTuple):
    """Expert parallel size and ZeRO stage; `kept` says where stages keep what they hold."""

    size: int
    stage: int
    kept: str = "as usual"

    def settings(self) -> dict[str, Any]:
        zero: dict[str, Any] = {}
        if self.stage == 3 and self.kept == "released":
            # Stage 3 leaves parameters as small as these where they are, unless told otherwise.
            zero = {"stage3_param_persistence_threshold": 0}
        if self.kept == "offloaded":
            zero = {"offload_optimizer": {"device": "cpu"}}
        return {
            "parallel.expert_parallel_size": self.size,
            "parallel.zero_stage": self.stage,
            "deepspeed": {"zero_optimization": zero} if zero else {},
        }


ALONE = Layout(1, 1)


def layouts(*sizes: int) -> list[Layout]:
    """Every size and stage; the two largest sizes with other places of what is held."""
    kept = {2: {2: "offloaded", 3: "released"}, 4: {1: "offloaded", 3: "released"}}
    return [
        Layout(size, stage, kept.get(size, {}).get(stage, "as usual"))
        for size in sizes
        for stage in (0, 1, 2, 3)
    ]


def config_of(run_dir: Path, layout: Layout, steps: int = SECOND + MANY) -> RunConfig:
    return make_config(run_dir, STEADY | layout.settings() | {"training.steps": steps})


class Uninterrupted(NamedTuple):
    """A run of one process: its directory, with the checkpoint of step FIRST alone, and the loss
    and the tokens (B, S) of each step."""

    run_dir: Path
    losses: list[float]
    tokens: list[Tensor]

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.run_dir, target))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Uninterrupted:
    run_dir, tokens = tmp_path_factory.mktemp("alone") / "run", []
    read = read_step

    def recorded(*args: Any) -> list[Batch]:
        batches = read(*args)
        tokens.append(torch.cat([batch.input_ids for batch in batches]))
        return batches

    settings = STEADY | {"training.steps": SECOND + MANY, "checkpoint.every": FIRST}
    with pytest.MonkeyPatch.context() as patch, Recorder() as recorder:
        patch.setattr("train.loop.read_step", recorded)
        assert run(run_dir, settings) == 0
    for path in (run_dir / "checkpoints").glob("step_*"):
        if path.name != f"step_{FIRST:08d}":
            shutil.rmtree(path)
    (run_dir / "checkpoints" / "latest").write_text(f"step_{FIRST:08d}\n")
    weights = checkpoint(run_dir).tensors["model"]
    assert all(bias.any() for name, bias in weights.items() if name.endswith("bias"))
    return Uninterrupted(run_dir, [metrics.lm_loss for metrics in recorder.steps], tokens)


class Continued(NamedTuple):
    """What a run goes on with: its state as it was loaded, losses and tokens of its next steps."""

    step: int
    state: dict[str, dict[str, Tensor]]
    losses: list[float]
    tokens: list[Tensor]


def no_warning(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def go_on(
    ranks: Ranks | None, run_dir: Path, layout: Layout, text: Any, steps: int
) -> Continued | None:
    """The newest checkpoint, loaded and trained on; None on all ranks but the first."""
    from train.engine import build_engine
    from train.run_state import restore

    config = config_of(run_dir, layout)
    engine = build_engine(config, config.model, ranks=ranks)
    found = find_checkpoint(run_dir, "must", no_warning, ranks)
    assert found is not None
    position = restore(engine, found, config.seed)
    result = Continued(position.step, gathered_state(engine), [], [])
    loader = TrainLoader(text, config.training.seq_len, config.seed)
    for step in range(position.step, position.step + steps):
        batches = read_step(loader, step, config, engine)
        ours = torch.cat([batch.input_ids for batch in batches])
        result.tokens.append(torch.cat(engine.gather(ours)))
        metrics = train_step(engine, batches, step, config)
        assert metrics is not None
        result.losses.append(metrics.lm_loss)
    return result if engine.rank == 0 else None


def same_state(loaded: Any, saved: Any) -> None:
    """Bitwise: weights, moments and router biases."""
    for group in ("model", "optimizer"):
        assert loaded[group].keys() == saved[group].keys()
        for name, tensor in saved[group].items():
            assert torch.equal(loaded[group][name], tensor), f"{group}: {name}"


def check(found: Continued | None, alone: Uninterrupted, saved: Any, what: Any) -> None:
    """The state to the bit, the order of the samples exactly, the losses to 1e-5."""
    assert found is not None
    end = found.step + len(found.losses)
    try:
        same_state(found.state, saved)
        expected = alone.tokens[found.step : end]
        for ours, theirs in zip(found.tokens, expected, strict=True):
            assert torch.equal(ours, theirs)
        assert found.losses == pytest.approx(alone.losses[found.step : end], rel=1e-5)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


Jobs = list[tuple[Path, Layout, int]]


def go_on_often(ranks: Ranks, jobs: Jobs, text: Any) -> list[Continued | None]:
    return [go_on(ranks, run_dir, layout, text, steps) for run_dir, layout, steps in jobs]


def test_every_layout_goes_on_from_one_process(alone):
    """All for a few steps, the last for many."""
    saved = checkpoint(alone.run_dir).tensors
    *most, last = layouts(1, 2)
    jobs = [(alone.run_dir, each, FEW) for each in most] + [(alone.run_dir, last, MANY)]
    (results, _) = run_ranks(2, go_on_often, jobs, data(), seconds=120)
    for (_, layout, _), found in zip(jobs, results, strict=True):
        assert found.step == FIRST
        check(found, alone, saved, layout)


def write(ranks: Ranks, run_dir: Path, layout: Layout) -> dict | None:
    """Go on from what is there to step SECOND, and save it; the state that the engine then has."""
    import train.pretrain

    engines: list[Any] = []
    build = train.pretrain.build_engine

    def keep(*args: Any, **kwargs: Any) -> Any:
        engines.append(build(*args, **kwargs))
        return engines[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.pretrain, "build_engine", keep)
        config = config_of(run_dir, layout, SECOND)
        # What the lock does, which only rank 0 holds.
        Path(config.output_dir).mkdir(exist_ok=True)
        assert train.pretrain.run(config, ranks) == 0
    state = gathered_state(engines[0])
    return state if ranks.rank == 0 else None


def write_and_read(
    ranks: Ranks, read: Jobs, written: Jobs, others: list[Layout], text: Any
) -> tuple[list[Continued | None], list[dict | None], list[Continued | None]]:
    """Go on from runs that are there; write runs; go on from these, each in another layout."""
    first = go_on_often(ranks, read, text)
    states = [write(ranks, run_dir, layout) for run_dir, layout, _ in written]
    jobs = [
        (run_dir, other, steps) for (run_dir, _, steps), other in zip(written, others, strict=True)
    ]
    return first, states, go_on_often(ranks, jobs, text)


# Experts without w3 in fewer dimensions, with what every token passes beside them.
RESIDUAL_LATENT = {
    "model.moe.experts": {"name": "relu2"},
    "model.moe.latent_size": 6,
    "model.moe.num_shared_experts": 1,
    "model.moe.shared_gate": "softmax",
}


@pytest.mark.parametrize(
    "model",
    [pytest.param({}, marks=pytest.mark.slow), {"model.tie_embeddings": True}, RESIDUAL_LATENT],
    ids=("plain", "tied", "residual and latent"),
)
def test_what_ranks_wrote_goes_on_in_one_process_and_in_other_layouts(model, tmp_path, monkeypatch):
    """Bit for bit, from the disk; runs that ranks began themselves."""
    for setting, value in model.items():
        monkeypatch.setitem(STEADY, setting, value)
    writers = [Layout(2, 0), Layout(1, 1), Layout(2, 2), Layout(2, 3, "released")]
    written = [(tmp_path / f"run_{number}", each, 0) for number, each in enumerate(writers)]
    others = [*writers[1:], writers[0]]
    (results, _) = run_ranks(
        2, with_settings, model, write_and_read, [], written, others, data(), seconds=120
    )
    _, states, reread = results
    for (run_dir, _, _), state, found in zip(written, states, reread, strict=True):
        same_state(checkpoint(run_dir).tensors, state)
        same_state(found.state, state)
        in_one_process = go_on(None, run_dir, ALONE, data(), 0)
        assert in_one_process is not None
        same_state(in_one_process.state, state)


def with_settings(ranks: Ranks, model: dict[str, Any], work: Any, *args: Any) -> Any:
    """`work` in a process that knows nothing of the test's own settings."""
    STEADY.update(model)
    return work(ranks, *args)


@pytest.mark.slow
def test_four_ranks_go_on_from_one_process_and_from_two_ranks_and_back(alone, tmp_path):
    """From one process to two ranks and four; from two to four; from four to two and one."""
    saved = checkpoint(alone.run_dir).tensors

    def starts(world: int, writers: list[Layout]) -> Jobs:
        return [
            (alone.copy(tmp_path / f"{world}_{number}"), layout, MANY)
            for number, layout in enumerate(writers)
        ]

    by_two = starts(2, [Layout(1, 1), Layout(1, 3), Layout(2, 2, "offloaded"), Layout(2, 0)])
    others = [Layout(2, 3, "released"), Layout(2, 1), Layout(1, 0), Layout(1, 2)]
    (of_two, _) = run_ranks(2, write_and_read, [], by_two, others, data(), seconds=300)

    read = [(alone.run_dir, layout, MANY) for layout in layouts(1, 2, 4)]
    from_two = [Layout(4, 2), Layout(2, 0), Layout(1, 3), Layout(4, 3, "released")]
    read += [(run_dir, each, MANY) for (run_dir, _, _), each in zip(by_two, from_two, strict=True)]
    by_four = starts(4, [Layout(1, 0), Layout(2, 1), Layout(2, 3), Layout(4, 0), Layout(4, 2)])
    others = [Layout(4, 1, "offloaded"), Layout(1, 3), Layout(2, 2), Layout(2, 3), Layout(1, 1)]
    (of_four, *_) = run_ranks(4, write_and_read, read, by_four, others, data(), seconds=600)

    back = [Layout(2, 1), Layout(1, 2), Layout(2, 3), Layout(1, 0), Layout(2, 2)]
    jobs = [(run_dir, layout, MANY) for (run_dir, _, _), layout in zip(by_four, back, strict=True)]
    (back_to_two, _) = run_ranks(2, go_on_often, jobs, data(), seconds=300)

    sources = [saved] * 12 + of_two[1]
    for (_, layout, _), found, source in zip(read, of_four[0], sources, strict=True):
        check(found, alone, source, ("to four ranks", layout))
    for ranks, jobs, (_, states, reread) in (("two", by_two, of_two), ("four", by_four, of_four)):
        for (run_dir, layout, _), state, found in zip(jobs, states, reread, strict=True):
            assert found.step == SECOND
            check(found, alone, state, (f"{ranks} ranks, written as", layout))
            once_more = go_on(None, run_dir, ALONE, data(), MANY)
            check(once_more, alone, state, (f"from {ranks} ranks to one process", layout))
    for (_, layout, _), found, state in zip(jobs, back_to_two, of_four[1], strict=True):
        check(found, alone, state, ("from four ranks to two", layout))
