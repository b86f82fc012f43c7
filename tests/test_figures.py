"""Does every picture show the numbers it was given, and can it be read, whatever their shape?"""

import itertools
import math
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import TwoSlopeNorm

from moe.measures import co_activation_counts
from train.figures import (
    bias_map,
    co_activation_map,
    domain_expert_map,
    load_heat_map,
    load_history,
    render,
    save_figure,
)

DOMAINS = tuple(f"a_domain_of_a_very_long_name_{number}" for number in range(8))
GREY = (200, 200, 200)
FRAME = (96, 96, 96)
EXPERTS = (8, 32, 100)
HOTTEST_LOAD, HOTTEST_BIAS = (103, 0, 31), (127, 59, 8)


@pytest.fixture(autouse=True)
def nothing_warns_and_no_figure_stays_open():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert plt.get_fignums() == []


def random_counts(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(*shape, generator=generator) ** 3 * 100).long()


def boxes(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) inside every frame, in reading order, the colour bar last."""
    frame = np.pad((pixels == FRAME).all(-1), 1)
    run = np.lib.stride_tricks.sliding_window_view(frame, 50, axis=1).all(-1)
    found = []
    for y, x in zip(*np.nonzero(run[:, 1:] & ~frame[:, : run.shape[1] - 1]), strict=True):
        # An upper left corner goes on downwards, too.
        if frame[y : y + 10, x + 1].all():
            right = x + 1 + np.argmin(frame[y, x + 1 :])
            bottom = y + np.argmin(frame[y:, x + 1])
            found.append((int(x) + 1, int(y), int(right) - 2, int(bottom) - 2))
    return found


def cell_colors(pixels: np.ndarray, box, rows: int, columns: int) -> np.ndarray:
    """(rows, columns, 3) colours at the centres of the cells."""
    left, top, right, bottom = box
    x = left + (np.arange(columns) + 0.5) * (right - left) / columns
    y = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
    return pixels[y.astype(int)[:, None], x.astype(int)]


def expected_colors(numbers, name: str, low: float, middle: float, high: float) -> np.ndarray:
    norm = TwoSlopeNorm(vmin=low, vcenter=middle, vmax=high)
    position = norm(np.clip(np.asarray(numbers, dtype=float), low, high))
    return np.asarray(matplotlib.colormaps[name](position, bytes=True))[..., :3]


def assert_same_colors(found: np.ndarray, expected: np.ndarray) -> None:
    # The oracle may round to the neighbour of 256 colours.
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=5)


def share_of(counts: torch.Tensor) -> torch.Tensor:
    return counts / counts.double().mean(-1, keepdim=True)


def hot_box(pixels: np.ndarray, box, color) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of all pixels of a color in the box, which are a rectangle."""
    left, top, right, bottom = box
    hot = (pixels[top:bottom, left:right] == color).all(-1)
    y, x = np.nonzero(hot)
    assert hot[y.min() : y.max() + 1, x.min() : x.max() + 1].all()
    return left + x.min(), top + y.min(), left + x.max() + 1, top + y.max() + 1


def cell_box(box, row: int, rows: int, column: int, columns: int) -> tuple[float, ...]:
    left, top, right, bottom = box
    width, height = (right - left) / columns, (bottom - top) / rows
    return (
        left + width * column,
        top + height * row,
        left + width * (column + 1),
        top + height * (row + 1),
    )


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_each_cell_of_the_load_map_has_the_color_of_its_number(num_experts):
    counts = random_counts(5, num_experts)
    pixels = render(load_heat_map(counts, (1, 2, 3, 5, 8)))
    found = cell_colors(pixels, boxes(pixels)[0], 5, num_experts)
    assert_same_colors(found, expected_colors(share_of(counts), "RdBu_r", 0, 1, 4))


def test_where_a_layer_has_no_such_expert_the_maps_are_grey():
    """And its share is of the experts that it has."""
    counts = torch.tensor([[5, 10, 15, -1, -1], [2, 2, 2, 2, 2], [3, 9, 0, 12, -40]])
    pixels = render(load_heat_map(counts, (0, 1, 2)))
    found = cell_colors(pixels, boxes(pixels)[0], 3, 5)
    even = [[0.5, 1, 1.5, 0, 0], [1, 1, 1, 1, 1], [0.5, 1.5, 0, 2, 0]]
    expected = expected_colors(even, "RdBu_r", 0, 1, 4)
    expected[(counts < 0).numpy()] = GREY
    assert_same_colors(found, expected)
    bias = torch.tensor([[0.5, -0.5, math.nan], [math.nan] * 3])
    pixels = render(bias_map(bias, (0, 1)))
    found = cell_colors(pixels, boxes(pixels)[0], 2, 3)
    expected = expected_colors(bias.nan_to_num(0), "PuOr_r", -0.5, 0, 0.5)
    expected[bias.isnan().numpy()] = GREY
    assert_same_colors(found, expected)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_each_cell_of_the_domain_map_has_the_color_of_its_number(num_experts):
    counts = random_counts(6, 3, num_experts)
    pixels = render(domain_expert_map(counts, DOMAINS[:6], (0, 1, 2)))
    maps = boxes(pixels)
    assert len(maps) == 4
    expected = expected_colors(share_of(counts), "RdBu_r", 0, 1, 4)
    for layer in range(3):
        found = cell_colors(pixels, maps[layer], 6, num_experts)
        assert_same_colors(found, expected[:, layer])


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_each_cell_of_the_bias_map_has_the_color_of_its_number(num_experts):
    bias = torch.randn(4, num_experts, generator=torch.Generator().manual_seed(0)) * 0.003
    bias = bias.clamp(-0.0058, 0.0058)
    bias[2, 5] = 0.0058
    pixels = render(bias_map(bias, (0, 1, 2, 3)))
    found = cell_colors(pixels, boxes(pixels)[0], 4, num_experts)
    assert_same_colors(found, expected_colors(bias, "PuOr_r", -0.006, 0, 0.006))


@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (32, 4), (100, 8), (256, 8)])
def test_each_cell_of_the_co_activation_map_has_the_color_of_its_number(num_experts, top_k):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3000, num_experts, generator=generator)
    scores[:, 1] += scores[:, 6]
    chosen = scores.topk(top_k, -1).indices.numpy()
    together = np.zeros((num_experts, num_experts))
    for token in chosen:
        together[np.ix_(token, token)] += 1
    # The other K - 1 choices, spread over the other experts by their loads.
    load = np.diagonal(together)
    expected_share = (top_k - 1) * load[None] / (load.sum() - load[:, None])
    multiple = together / load[:, None] / expected_share

    counts = co_activation_counts(torch.from_numpy(chosen), num_experts)
    pixels = render(co_activation_map(counts, 3))
    found = cell_colors(pixels, boxes(pixels)[0], num_experts, num_experts)
    expected = expected_colors(multiple, "RdBu_r", 0, 1, 4)
    expected[np.arange(num_experts), np.arange(num_experts)] = GREY
    assert_same_colors(found, expected)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_the_history_shows_each_interval_to_scale(num_experts):
    edges = (100, 110, 120, 170, 180, 300, 500)
    history = random_counts(6, num_experts)
    pixels = render(load_history(history, edges, 3))
    box = boxes(pixels)[0]
    width = box[2] - box[0]
    expected = expected_colors(share_of(history), "RdBu_r", 0, 1, 4)  # (intervals, E)
    by_pixel = cell_colors(pixels, box, num_experts, width)  # (E, width)
    for index, (begin, end) in enumerate(itertools.pairwise(edges)):
        first, last = ((at - 100) / 400 * width for at in (begin, end))
        for x in (round(first), round((first + last) / 2), round(last) - 1):
            assert_same_colors(by_pixel[:, x], expected[index])


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_the_hottest_expert_is_the_hottest_cell_of_the_png(num_experts, tmp_path):
    for layer, expert in itertools.product(range(4), (0, 3, num_experts - 1)):
        counts = torch.full((4, num_experts), 10)
        counts[layer, expert] = 1000
        bias = torch.zeros(4, num_experts)
        bias[layer, expert] = 0.02
        for picture, color in (
            (load_heat_map(counts, (0, 1, 2, 3)), HOTTEST_LOAD),
            (domain_expert_map(counts.unsqueeze(1), DOMAINS[:4], (7,)), HOTTEST_LOAD),
            (bias_map(bias, (0, 1, 2, 3)), HOTTEST_BIAS),
        ):
            save_figure(picture, tmp_path / "picture.png")
            pixels = np.rint(plt.imread(tmp_path / "picture.png")[..., :3] * 255).astype(np.uint8)
            box = boxes(pixels)[0]
            assert hot_box(pixels, box, color) == cell_box(box, layer, 4, expert, num_experts)
        pixels = render(load_history(counts, (0, 5, 10, 15, 20), layer))
        box = boxes(pixels)[0]
        expected = cell_box(box, expert, num_experts, layer, 4)
        assert hot_box(pixels, box, HOTTEST_LOAD) == expected


@pytest.mark.parametrize("num_experts", (8, 32, 100, 256))
def test_the_closest_pair_is_the_hottest_cell(num_experts):
    counts = torch.ones(num_experts, num_experts).fill_diagonal_(num_experts - 1)
    counts[1, torch.arange(num_experts) != 1] = 0.1
    counts[1, num_experts - 2] = num_experts - 1
    pixels = render(co_activation_map(counts, 0))
    box = boxes(pixels)[0]
    expected = cell_box(box, 1, num_experts, num_experts - 2, num_experts)
    assert hot_box(pixels, box, HOTTEST_LOAD) == expected


def test_more_intervals_than_pixels_are_counted_together():
    """An expert that only gets tokens in every tenth interval has a tenth of an even share."""
    history = torch.full((20_000, 4), 10)
    history[:, 2] = 0
    history[::10, 2] = 10
    pixels = render(load_history(history, tuple(range(20_001)), 0))
    colors = cell_colors(pixels, boxes(pixels)[0], 4, 37)
    share = torch.tensor([1, 1, 0.1, 1]) / 3.1 * 4
    expected = expected_colors(share[:, None].expand(4, 37), "RdBu_r", 0, 1, 4)
    assert_same_colors(colors, expected)


def test_no_interval_is_lost_where_several_share_the_last_pixel():
    history = torch.tensor([[10, 10], [0, 10], [10, 20]])
    pixels = render(load_history(history, (0, 100_000, 100_001, 100_002), 0))
    colors = cell_colors(pixels, boxes(pixels)[0], 2, 400)
    assert_same_colors(colors[:, -2], expected_colors([1, 1], "RdBu_r", 0, 1, 4))
    assert_same_colors(colors[:, -1], expected_colors([0.5, 1.5], "RdBu_r", 0, 1, 4))


@pytest.mark.parametrize("edges", [(0,), (0, 1), (0, 1, 1), (0, 2, 1), (0, 1, 2, 3)])
def test_a_history_needs_rising_edges_of_its_intervals(edges):
    with pytest.raises(ValueError, match=f"2 intervals and {len(edges)} edges"):
        load_history(torch.ones(2, 4), edges, 0)
    with pytest.raises(ValueError, match="0 intervals"):
        load_history(torch.ones(0, 4), (0,), 0)


@pytest.mark.parametrize("edges", [(0, 10, 2000), (19_990, 20_020, 20_100), (3, 4), (7, 999_999)])
def test_steps_stand_at_their_place(edges):
    figure = load_history(torch.ones(len(edges) - 1, 4), edges, 0)
    left, _, right, bottom = boxes(render(figure))[0]
    height = figure.canvas.get_width_height()[1]
    below = [text for text in figure.texts if text.get_text().isdigit()]
    extents = {text: text.get_window_extent() for text in below}
    steps = [text for text in below if 0 < height - extents[text].y0 - bottom < 25]
    assert len(steps) >= 2
    for text in steps:
        place = left + (int(text.get_text()) - edges[0]) / (edges[-1] - edges[0]) * (right - left)
        middle = (extents[text].x0 + extents[text].x1) / 2
        assert abs(middle - place) < 2, (text.get_text(), middle, place)


def draw_all(layers: int, experts: int, domains: int, intervals: int, fill=torch.ones) -> dict:
    """Every picture of such numbers, by name."""
    names, blocks = DOMAINS[:domains], tuple(range(layers))
    edges = tuple(7 * number**2 for number in range(intervals + 1))
    counts = fill(domains, layers, experts)
    return {
        "load": load_heat_map(fill(layers, experts), blocks),
        "history": load_history(fill(intervals, experts), edges, 0),
        "co-activation": co_activation_map(fill(experts, experts), 0),
        "bias": bias_map(-0.0012 * fill(layers, experts), blocks),
        "domains": domain_expert_map(counts, names, blocks),
        "domains of a layer": domain_expert_map(counts[:, :1], names, blocks[:1]),
    }


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 4, 1, 1), (4, 32, 8, 20), (24, 128, 8, 500), (96, 512, 3, 3)],
    ids=str,
)
def test_no_text_is_cut_off_or_overlaps(shape):
    for name, figure in draw_all(*shape).items():
        pixels = render(figure)
        height, width = pixels.shape[:2]
        extents = [text.get_window_extent() for text in figure.texts if text.get_text()]
        assert all(text.get_fontsize() >= 11 for text in figure.texts)
        for box in extents:
            assert box.x0 >= 2 and box.x1 <= width - 2, name
            assert box.y0 >= 2 and box.y1 <= height - 2, name
        for left, top, right, bottom in boxes(pixels):
            extents.append(
                matplotlib.transforms.Bbox(((left, height - bottom), (right, height - top)))
            )
        for one, other in itertools.combinations(extents, 2):
            assert not one.overlaps(other), (name, one, other)


def test_pictures_fit_a_card_up_to_512_experts_and_96_layers():
    for shape in ((4, 8, 8, 20), (4, 32, 8, 20), (48, 256, 8, 20), (96, 512, 8, 2000)):
        for name, figure in draw_all(*shape).items():
            height, width = render(figure).shape[:2]
            if name != "domains":
                assert 400 <= width <= 800 and height <= 1000, (name, shape, width, height)
            # A file with all layers, each with all domains.
            assert width <= 6000 and height <= 5000


def test_what_was_never_counted_is_grey():
    pictures = draw_all(2, 8, 3, 2, fill=torch.zeros)
    for name in ("load", "history", "co-activation", "domains", "domains of a layer"):
        pixels = render(pictures[name])
        for box in boxes(pixels)[:-1]:
            assert (cell_colors(pixels, box, 8, 8) == GREY).all(), name
    # A bias of zero is a number.
    pixels = render(pictures["bias"])
    assert (cell_colors(pixels, boxes(pixels)[0], 2, 8) > 240).all()


def test_an_expert_that_is_never_chosen_is_grey():
    counts = torch.ones(4, 4).fill_diagonal_(2)
    counts[2] = counts[:, 2] = 0
    counts[0, 1] = counts[1, 0] = 0
    pixels = render(co_activation_map(counts, 0))
    colors = cell_colors(pixels, boxes(pixels)[0], 4, 4)
    grey = (colors == GREY).all(-1)
    unused = np.arange(4) == 2
    assert (grey == (np.eye(4, dtype=bool) | unused[:, None] | unused[None])).all()
    # That two that are used never meet is a number.
    assert_same_colors(colors[0, 1], expected_colors(0, "RdBu_r", 0, 1, 4))


def test_co_activation_of_one_expert_a_token_is_grey():
    pixels = render(co_activation_map(torch.eye(8), 0))
    assert (cell_colors(pixels, boxes(pixels)[0], 8, 8) == GREY).all()


@pytest.mark.parametrize(
    "largest, limit",
    [
        (0.0, "1"),
        (0.001, "0.001"),
        (0.0011, "0.0015"),
        (0.02, "0.02"),
        (7.3, "8"),
        (1.2e-7, "1.5e−07"),
    ],
)
def test_the_bias_has_a_symmetric_range_in_round_numbers(largest, limit):
    bias = torch.zeros(2, 4)
    bias[1, 2] = -largest
    texts = [text.get_text() for text in bias_map(bias, (0, 1)).texts]
    assert limit in texts and f"−{limit}" in texts


def test_a_bias_that_is_no_number_does_not_hide_the_others():
    bias = torch.tensor([[0.01, torch.nan, torch.inf, -torch.inf]])
    pixels = render(bias_map(bias, (0,)))
    colors = cell_colors(pixels, boxes(pixels)[0], 1, 4)[0]
    assert (colors[0] == colors[2]).all() and (colors[0] == HOTTEST_BIAS).all()
    assert (colors[1] == GREY).all()
    assert_same_colors(colors[3], expected_colors(-0.01, "PuOr_r", -0.01, 0, 0.01))


@pytest.mark.parametrize(
    "label, number", [("0", 0), ("½", 0.5), ("even", 1), ("2×", 2), ("3×", 3), ("≥4×", 4)]
)
def test_the_color_bar_has_each_number_below_its_color(label, number):
    figure = load_heat_map(random_counts(2, 8), (1, 2))
    pixels = render(figure)
    left, top, right, bottom = boxes(pixels)[-1]
    # The last of that text: an expert may have the same name.
    extent = [t.get_window_extent() for t in figure.texts if t.get_text() == label][-1]
    x = min(max(round((extent.x0 + extent.x1) / 2), left), right - 1)
    found = pixels[(top + bottom) // 2, x]
    # Within two pixels: up to three of 256 colours.
    expected = expected_colors(number, "RdBu_r", 0, 1, 4)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 15


def test_a_dead_expert_among_many_has_its_own_pixels():
    """One column of 256 is dark blue in the picture, and not an average with its neighbours."""
    load = torch.ones(2, 256)
    load[:, 100] = 0
    pixels = render(load_heat_map(load, (0, 1)))
    box = boxes(pixels)[0]
    left, top, right, _ = hot_box(pixels, box, (5, 48, 97))
    assert right - left == 2 and (left - box[0]) // 2 == 100 and top == box[1]


def test_long_names_keep_the_end_by_which_they_differ():
    figure = domain_expert_map(torch.ones(8, 1, 4), DOMAINS, (0,))
    labels = [text.get_text() for text in figure.texts if "_name_" in text.get_text()]
    assert len(set(labels)) == 8 and all(len(label) <= 24 for label in labels)


def test_names_are_no_formulas():
    """Two dollars would be one, and a wrong one could not be drawn."""
    render(domain_expert_map(torch.ones(2, 1, 4), ("$a_{$", r"$\frac$"), (0,)))


def test_what_is_rendered_is_what_is_saved(tmp_path):
    figure = load_heat_map(random_counts(3, 16), (0, 1, 2))
    pixels = render(figure)
    save_figure(figure, tmp_path / "load.png")
    saved = np.rint(plt.imread(tmp_path / "load.png") * 255).astype(np.uint8)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert (saved[..., :3] == pixels).all() and (saved[..., 3] == 255).all()


def test_tensorboard_takes_figures_and_their_pixels(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    figure = load_heat_map(random_counts(3, 16), (0, 1, 2))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_image("pixels", render(figure), 1, dataformats="HWC")
        writer.add_figure("figure", figure, 1)
    events = EventAccumulator(str(tmp_path)).Reload()
    pixels, drawn = (events.Images(tag)[0] for tag in ("pixels", "figure"))
    assert pixels.encoded_image_string == drawn.encoded_image_string
