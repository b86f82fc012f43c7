"""Which block sizes are fastest on this machine? `python -m kernels.bench OP --tune`.

Starts from the tiles of `kernels.tiles` and changes one number of one kernel at a time, again from
each round's best as long as that helps: forward and backward of the whole operation are checked
against the reference and timed in turns with the best so far. What is wrong or does not fit the
chip is passed over, and what orders a row's sums stays as it is. Winners are written to tiles.json
under this architecture; run the tests and `python -m kernels.aot` after it.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial

from kernels.bench import Case, Contestant, largest_error, reference_of
from kernels.machine import clock_of, seconds_of
from kernels.tiles import Tile, Trial, on_trial, same_row_order, save_tile

# What a number of a tile may become; those of a kernel that has no such number are left out.
CHOICES = {
    "BLOCK_M": (32, 64, 128, 256),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "GROUP_M": (1, 4, 8, 16),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
# A winner has to take less than this share of the time of the best before it.
GAIN = 0.99


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles with one number changed."""
    for name, choices in CHOICES.items():
        for choice in choices:
            if name in tile.blocks and tile.blocks[name] != choice:
                yield tile._replace(blocks={**tile.blocks, name: choice})
            elif name in ("num_warps", "num_stages") and getattr(tile, name) != choice:
                yield Tile(**tile._asdict() | {name: choice})


def tune_case(
    case: Case, tolerance: float, repeats: int, report: Callable[[str], None]
) -> dict[str, Tile]:
    """Improve the tile of each kernel that a case launches on its Triton backend, and save it.

    Returns: the winners by kernel; empty where the table was best.
    """
    ours = Contestant(partial(case.ours, backend="triton"), case.leaves)
    expected = reference_of(case)
    winners: dict[str, Tile] = {}
    with on_trial() as trial:
        ours.both(case.grad)
        launches = dict(trial.latest)
        for kernel, launch in launches.items():
            best, centre, tried = launch.tile, None, [launch.tile]
            while best != centre:
                centre = best
                for candidate in neighbours(centre):
                    if candidate in tried or not same_row_order(kernel, centre, candidate):
                        continue
                    tried.append(candidate)
                    ratio = _trial_ratio(trial, kernel, candidate, best, ours, case, repeats)
                    if ratio is None or ratio > GAIN:
                        continue
                    trial.instead[kernel] = candidate
                    if largest_error(ours.both(case.grad), expected) <= tolerance:
                        report(f"{kernel}: {candidate} takes {ratio:.2f} of {best}")
                        best = candidate
                    trial.instead[kernel] = best
            if best != launch.tile:
                winners[kernel] = best
        for kernel, tile in winners.items():
            arch, dtype, size, _ = launches[kernel]
            # Up to the next power of two: rows per expert vary a little from step to step.
            bucket = str(1 << max(0, size - 1).bit_length())
            save_tile(kernel, arch, dtype, bucket, tile)
            report(f"{kernel}: saved {tile} for {arch}, {dtype}, sizes up to {bucket}")
    return winners


def _trial_ratio(
    trial: Trial,
    kernel: str,
    candidate: Tile,
    best: Tile,
    ours: Contestant,
    case: Case,
    repeats: int,
) -> float | None:
    """Time of a candidate over that of the best so far; None if it does not compile or launch."""

    def run(tile: Tile) -> None:
        trial.instead[kernel] = tile
        ours.both(case.grad)

    try:
        run(candidate)
        pair = {"candidate": partial(run, candidate), "best": partial(run, best)}
        seconds = seconds_of(pair, repeats, clock_of(case.grad.device))
    # Triton raises a dozen types for tiles that exceed the chip or break a rule of its compiler.
    except Exception:
        return None
    finally:
        trial.instead[kernel] = best
    return statistics.median(seconds["candidate"]) / statistics.median(seconds["best"])
