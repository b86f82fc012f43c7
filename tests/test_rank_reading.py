"""Does a rank that goes on read its own part of a checkpoint, and no rank another checkpoint?"""

import errno
from pathlib import Path
from typing import Any

from rank_cases import run_ranks
from training_cases import make_config, run

from train.config import RunConfig
from train.ranks import Ranks

SAVING = {"checkpoint.every": 4, "checkpoint.keep_last": 5}


def config_of(run_dir: Path) -> RunConfig:
    return make_config(run_dir, SAVING | {"parallel.zero_stage": 3})


def read(ranks: Ranks, run_dir: Path) -> tuple[int, int, list[int]]:
    """Numbers that this rank has read to go on, and holds then; the steps that the ranks find where
    rank 1 cannot open a file of the newest checkpoint."""
    import train.checkpoint_format
    from train.checkpoint import find_checkpoint
    from train.engine import build_engine
    from train.fragments import held_parts
    from train.ranks import gather
    from train.run_state import restore
    from train.stored_tensors import Piece

    counted = [0]
    numbers = Piece.numbers

    def counting(self: Any, start: int, stop: int) -> Any:
        counted[0] += stop - start
        return numbers(self, start, stop)

    config = config_of(run_dir)
    engine = build_engine(config, config.model, ranks=ranks)
    found = find_checkpoint(run_dir, "must", print, ranks)
    assert found is not None
    Piece.numbers = counting  # type: ignore[method-assign]
    engine.load_state_tensors(found.tensors)
    Piece.numbers = numbers  # type: ignore[method-assign]
    held = sum(part.weights.numel() for part in held_parts(engine.engine, 3))  # type: ignore[attr-defined]
    restore(engine, found, config.seed)
    open_file = train.checkpoint_format.open_file

    def failing(path: Path, *rest: Any) -> Any:
        if ranks.rank == 1 and path.parent.name == "step_00000008":
            raise OSError(errno.EMFILE, "Too many open files")
        return open_file(path, *rest)

    train.checkpoint_format.open_file = failing
    older = find_checkpoint(run_dir, "must", print, ranks)
    train.checkpoint_format.open_file = open_file
    assert older is not None
    return counted[0], held, gather(older.step)


def test_a_rank_reads_what_it_holds_and_all_ranks_go_on_from_one_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    assert run(run_dir, SAVING) == 0
    everyone = run_ranks(2, read, run_dir, seconds=90)
    for counted, held, steps in everyone:
        # Weights and two moments; beside them the router's biases and the counts of steps.
        assert 3 * held <= counted <= 3 * held + 100
        assert steps == [4, 4]
