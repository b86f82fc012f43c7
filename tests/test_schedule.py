"""Learning rates against values computed by hand."""

import pytest
from training_cases import make_config

from train.schedule import learning_rate


def rates(tmp_path, **schedule) -> list[float]:
    steps = schedule.pop("steps", 10)
    changes = {f"schedule.{key}": value for key, value in schedule.items()}
    config = make_config(
        tmp_path, changes | {"training.steps": steps, "optimizer.learning_rate": 1.0}
    )
    return [learning_rate(step, config) for step in range(steps)]


def test_cosine_warms_up_and_falls_to_its_fraction_at_the_last_step(tmp_path):
    # Warm-up of 2: thirds of the peak. Then 0.1 + 0.9 (1 + cos(pi i / 7)) / 2 for i = 0 ... 7.
    cosines = [1.0, 0.9009689, 0.6234898, 0.2225209, -0.2225209, -0.6234898, -0.9009689, -1.0]
    expected = [1 / 3, 2 / 3] + [0.1 + 0.45 * (1 + c) for c in cosines]
    assert rates(tmp_path, name="cosine", warmup_steps=2) == pytest.approx(expected, abs=1e-6)


def test_constant_stays_after_the_warm_up(tmp_path):
    assert rates(tmp_path, name="constant", warmup_steps=3) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_wsd_stays_and_falls_in_a_line(tmp_path):
    # A fifth of 20 steps is 4: from 1 to 0.2 in quarters of 0.8.
    expected = [1 / 3, 2 / 3] + [1.0] * 14 + [0.8, 0.6, 0.4, 0.2]
    found = rates(
        tmp_path, name="wsd", warmup_steps=2, steps=20, decay_fraction=0.2, final_fraction=0.2
    )
    assert found == pytest.approx(expected)


def test_the_default_warm_up_is_a_tenth_and_at_most_100(tmp_path):
    assert rates(tmp_path, name="constant", steps=30) == [0.25, 0.5, 0.75] + [1.0] * 27
    long = rates(tmp_path, name="constant", steps=5000)
    assert long[99] == 100 / 101 and long[100] == 1.0


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 11])
def test_every_rate_is_positive_and_at_most_the_peak(name, steps, tmp_path):
    found = rates(tmp_path, name=name, steps=steps)
    assert all(0 < rate <= 1 for rate in found)
    # One step of wsd is all decay.
    assert max(found) == (1.0 if (name, steps) != ("wsd", 1) else 0.1)


def test_a_fall_to_zero_ends_at_zero(tmp_path):
    for name in ("cosine", "wsd"):
        assert rates(tmp_path, name=name, final_fraction=0)[-1] == pytest.approx(0, abs=1e-12)
