"""Are the pictures of expert use readable, whatever the numbers of layers, experts and domains?"""

import itertools

import matplotlib.pyplot as plt
import pytest
import torch

from train.figures import domain_expert_map, load_heat_map, save_figure

DOMAINS = tuple(f"a_domain_of_a_very_long_name_{number}" for number in range(8))


def draw_load(layers: int, experts: int):
    return load_heat_map(torch.ones(layers, experts), tuple(range(layers)))


def draw_domains(domains: int, layers: int, experts: int):
    counts = torch.ones(domains, layers, experts)
    return domain_expert_map(counts, DOMAINS[:domains], tuple(range(layers)))


CASES = {
    "one layer": lambda: draw_load(1, 4),
    "the quickstart": lambda: draw_load(4, 16),
    "many layers and experts": lambda: draw_load(48, 256),
    "a thousand experts": lambda: draw_load(3, 1024),
    "one domain": lambda: draw_domains(1, 1, 2),
    "domains of the quickstart": lambda: draw_domains(8, 4, 16),
    "domains and many experts": lambda: draw_domains(8, 1, 128),
    "domains and many layers": lambda: draw_domains(8, 24, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_labels_do_not_overlap_and_nothing_is_cut_off(case):
    figure = CASES[case]()
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            spans = sorted((box.min[side], box.max[side]) for box in boxes)
            assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(spans)), case
    whole = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert whole.x0 > -0.1 and whole.y0 > -0.1 and whole.x1 < width + 0.1
    assert whole.y1 < height + 0.1 and max(width, height) < 45
    plt.close(figure)


def test_a_dead_expert_among_many_has_its_own_pixels(tmp_path):
    """One column of 256 is dark blue in the picture, and not an average with its neighbours."""
    load = torch.ones(2, 256)
    load[:, 100] = 0
    save_figure(load_heat_map(load, (0, 1)), tmp_path / "load.png")
    pixels = plt.imread(tmp_path / "load.png")  # (height, width, RGBA)
    row = pixels[70]
    dark = (row[:, 2] > 0.3) & (row[:, 0] < 0.05)
    assert 1 <= dark.sum() <= 4


def test_long_names_keep_the_end_by_which_they_differ():
    figure = draw_domains(8, 1, 4)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == 8 and all(len(label) <= 24 for label in labels)
    plt.close(figure)
