"""Is one arm better than another, by how much, and could so few seeds have told?

Arms are compared by pairs: the same seed is the same text in the same order, so what a seed's text
does to both cancels out of their difference.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

CONFIDENCE = 0.95


class HistoryPoint(NamedTuple):
    """Validation loss after so many training tokens, and the seconds of training up to there."""

    tokens: int
    loss: float
    seconds: float


class Interval(NamedTuple):
    """Values of each seed, their mean, standard deviation and 95 % t-interval."""

    each: list[float]
    mean: float
    standard_deviation: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of a difference: the smallest that these seeds would tell from 0."""
        return (self.high - self.low) / 2


def t_interval(values: Sequence[float]) -> Interval:
    """mean +- t(0.975, n - 1) s / sqrt(n), Student's interval of the mean of n >= 2 values."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * deviation / math.sqrt(len(values))
    return Interval(list(values), mean, deviation, mean - half, mean + half)


def paired_difference(arm: Sequence[float], baseline: Sequence[float]) -> tuple[Interval, float]:
    """Interval of arm - baseline over paired seeds, and the p-value of the paired t-test.

    Where all differences are equal, p is 1 if they are 0 and 0 if not.
    """
    interval = t_interval([a - b for a, b in zip(arm, baseline, strict=True)])
    if interval.standard_deviation == 0:
        return interval, float(interval.mean == 0)
    return interval, float(stats.ttest_rel(arm, baseline).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: p_(i) times (m - i + 1) in rising order, never falling.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def crossing(history: Sequence[HistoryPoint], loss: float) -> tuple[float, float] | None:
    """(tokens, seconds) at which a validation curve first reaches `loss`, linear between points."""
    for before, after in zip([None, *history], history, strict=False):
        if after.loss <= loss:
            if before is None:
                return float(after.tokens), after.seconds
            part = (before.loss - loss) / (before.loss - after.loss)
            return (
                before.tokens + part * (after.tokens - before.tokens),
                before.seconds + part * (after.seconds - before.seconds),
            )
    return None


def speed_up(
    arm: Sequence[HistoryPoint], baseline: Sequence[HistoryPoint], flops_ratio: float
) -> dict[str, float] | None:
    """At equal loss, the baseline's cost over the arm's, in tokens, FLOPs and seconds.

    The better of the two is read where it passes the other's final loss, so below 1 the arm is the
    slower. None where it never does (a loss is not a number).

    Args:
        flops_ratio: FLOPs of a token of the baseline over those of the arm.
    """
    slow, fast, sign = (baseline, arm, 1)
    if arm[-1].loss > baseline[-1].loss:
        slow, fast, sign = (arm, baseline, -1)
    reached = crossing(fast, slow[-1].loss)
    if reached is None:
        return None
    tokens, seconds = reached
    ratios = {
        "tokens": (slow[-1].tokens / tokens) ** sign,
        "seconds": (slow[-1].seconds / seconds) ** sign,
    }
    return {**ratios, "flops": ratios["tokens"] * flops_ratio}
