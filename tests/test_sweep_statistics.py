"""The arithmetic of a sweep: intervals, p-values and speed-ups by hand, and as often as chance."""

import math

import numpy as np
import pytest
from scipy import stats

from train.sweep_statistics import (
    HistoryPoint,
    crossing,
    holm,
    paired_difference,
    speed_up,
    t_interval,
)

SLOW = [HistoryPoint(10, 5.0, 1.0), HistoryPoint(20, 4.0, 2.0), HistoryPoint(30, 3.0, 3.0)]
FAST = [HistoryPoint(10, 4.0, 2.0), HistoryPoint(20, 2.0, 4.0), HistoryPoint(30, 1.0, 6.0)]
BROKEN = [HistoryPoint(10, math.nan, 2.0), HistoryPoint(30, math.nan, 6.0)]


# Student's t at 97.5 %, from printed tables.
@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (5, 2.776), (10, 2.262)])
def test_an_interval_is_student_s(count, quantile):
    values = np.random.default_rng(count).normal(3.0, 0.5, count)
    found = t_interval(values.tolist())
    half = quantile * values.std(ddof=1) / math.sqrt(count)
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_deviation == pytest.approx(values.std(ddof=1))
    assert found.low == pytest.approx(values.mean() - half, abs=1e-3)
    assert found.high == pytest.approx(values.mean() + half, abs=1e-3)
    assert found.half_width == pytest.approx(half, abs=1e-3)


def test_a_difference_is_taken_by_pairs():
    arm, baseline = [3.10, 2.90, 3.40, 3.00], [3.00, 2.85, 3.25, 2.98]
    interval, p = paired_difference(arm, baseline)
    differences = np.subtract(arm, baseline)
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert interval.each == pytest.approx(differences)
    assert p == pytest.approx(2 * stats.t.sf(t, 3))
    # Of two independent samples nothing could be said.
    assert p < 0.1 < stats.ttest_ind(arm, baseline).pvalue


def test_equal_differences_have_no_t_and_a_p_all_the_same():
    assert paired_difference([2.0, 3.0], [2.0, 3.0]) == ((([0.0, 0.0]), 0, 0, 0, 0), 1.0)
    assert paired_difference([2.0, 3.0], [1.0, 2.0])[1] == 0.0


def test_p_values_are_adjusted_as_holm_s_paper_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def losses(effects: list[float], seeds: int, draw: np.random.Generator) -> np.ndarray:
    """(arms, seeds): what a seed's text does to all arms, an arm's effect, noise of SD 0.01."""
    text = draw.normal(3.4, 0.1, seeds)
    return text + np.array(effects)[:, None] + draw.normal(0, 0.01, (len(effects), seeds))


def test_a_planted_effect_is_found_and_none_is_seldom_called_one():
    draw, repeats = np.random.default_rng(0), 1000
    planted = null = any_null = 0
    for _ in range(repeats):
        # The baseline, one arm that is better by 5 standard deviations, eight that are not.
        baseline, *arms = losses([0.0, -0.05, *[0.0] * 8], 5, draw).tolist()
        each = [paired_difference(arm, baseline) for arm in arms]
        adjusted = holm([p for _, p in each])
        planted += each[0][0].high < 0
        null += not each[1][0].low <= 0 <= each[1][0].high
        any_null += min(adjusted[1:]) < 0.05
    assert planted > 0.95 * repeats
    # 5 % by chance; four standard deviations of the count are 2.8 %.
    assert 0.022 * repeats < null < 0.078 * repeats
    assert any_null < 0.078 * repeats


def test_a_crossing_lies_between_the_points_of_the_curve():
    assert crossing(SLOW, 3.5) == (25.0, 2.5)
    assert crossing(SLOW, 5.0) == (10.0, 1.0)
    assert crossing(SLOW, 2.9) is None


def test_speed_up_at_equal_loss_in_all_three_units():
    # The fast curve is at 3.0 after 15 tokens and 3 seconds; the slow one needs 30 and 3.
    ratios = speed_up(FAST, SLOW, flops_ratio=0.9)
    assert ratios == pytest.approx({"tokens": 2.0, "seconds": 1.0, "flops": 1.8})


def test_speed_up_is_below_one_where_the_baseline_wins():
    ratios = speed_up(SLOW, FAST, flops_ratio=1.0)
    assert ratios == pytest.approx({"tokens": 0.5, "seconds": 1.0, "flops": 0.5})


def test_curves_that_never_meet_have_no_speed_up():
    assert speed_up(BROKEN, SLOW, flops_ratio=1.0) is None
    assert speed_up(SLOW, BROKEN, flops_ratio=1.0) is None
