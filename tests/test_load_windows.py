"""Over which steps are the loads of experts counted, kept and drawn?"""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from metrics_cases import LAYERS, LOGGED, read
from PIL import Image
from training_cases import NUM_STEPS, checkpoint, make_config, make_engine, micro_batches, run

import train.loop
from train.figures import load_heat_map, render
from train.metrics import HISTORY_INTERVALS, WINDOW_STEPS, LoadHistory, LoadWindow
from train.metrics_writer import MetricsWriter
from train.scalars import StepFacts
from train.step import train_step


def test_dead_experts_are_those_without_a_token_in_the_window():
    window = LoadWindow()
    loads = torch.tensor([[[5, 0, 0, 3]], [[1, 0, 7, 0]]])
    assert (window.add(loads[0]) == 0).sum() == 2
    assert (window.add(loads[1]) == 0).sum() == 1
    for _ in range(WINDOW_STEPS - 1):
        total = window.add(torch.tensor([[2, 0, 0, 2]]))
    # The first step has left the window, the second has not.
    assert total.tolist() == [[1 + 2 * 99, 0, 7, 2 * 99]]
    assert window.add(torch.tensor([[2, 0, 0, 2]])).tolist() == [[200, 0, 0, 200]]


def test_the_history_has_every_step_in_a_bounded_number_of_equal_intervals():
    history, restored = LoadHistory(), LoadHistory()
    for step in range(1, 1001):
        history.add(torch.tensor([[step, 1]]), step)
        if step == 517:
            restored.restore(history.tensors())
        elif step > 517:
            restored.add(torch.tensor([[step, 1]]), step)
    for each in (history, restored):
        assert (
            len(each.counts) <= HISTORY_INTERVALS and each.edges[0] == 0 and each.edges[-1] == 1000
        )
        widths = {b - a for a, b in pairwise(each.edges[:-1])}
        assert widths == {16}
        for (first, last), counts in zip(pairwise(each.edges), each.counts, strict=True):
            assert counts.tolist() == [[sum(range(first + 1, last + 1)), last - first]]


def test_the_heat_map_is_of_the_window(tmp_path):
    config = make_config(tmp_path, LOGGED)
    window = torch.tensor([[30, 34, 31, 33], [20, 22, 64, 22]])
    writer = MetricsWriter(tmp_path, config, 0, pytest.fail)
    facts = StepFacts(window, 1.0)
    engine = make_engine(config)
    metrics = train_step(engine, micro_batches(config), 0, config, detail=True)
    writer.write_load(facts, metrics)
    writer.close()
    encoded = read(tmp_path).Images("load/heat_map")[0].encoded_image_string
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    # Which colour is where in it: tests/test_figures.py.
    assert np.array_equal(pixels, render(load_heat_map(window, LAYERS)))


def test_a_skipped_step_is_in_no_window(tmp_path, monkeypatch):
    real = train.loop.train_step

    def skip(engine, batches, step, *arguments, **options):
        metrics = real(engine, batches, step, *arguments, **options)
        return metrics._replace(skipped=step in (0, 3))

    monkeypatch.setattr(train.loop, "train_step", skip)
    assert run(tmp_path / "run", LOGGED | {"checkpoint.every": 8}) == 0
    window = checkpoint(tmp_path / "run").tensors["metrics"]["load_window"]
    assert len(window) == NUM_STEPS - 2
