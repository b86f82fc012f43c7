"""Does every picture show the numbers it was given, and can it be read, whatever their shape?"""

import itertools
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import TwoSlopeNorm

from train.figures import (
    domain_expert_map,
    load_heat_map,
    render,
    save_figure,
)

DOMAINS = tuple(f"a_domain_of_a_very_long_name_{number}" for number in range(8))
GREY = (200, 200, 200)
FRAME = (96, 96, 96)
EXPERTS = (8, 32, 100)
HOTTEST_LOAD = (103, 0, 31)


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
def test_the_hottest_expert_is_the_hottest_cell_of_the_png(num_experts, tmp_path):
    for layer, expert in itertools.product(range(4), (0, 3, num_experts - 1)):
        counts = torch.full((4, num_experts), 10)
        counts[layer, expert] = 1000
        for picture, color in (
            (load_heat_map(counts, (0, 1, 2, 3)), HOTTEST_LOAD),
            (domain_expert_map(counts.unsqueeze(1), DOMAINS[:4], (7,)), HOTTEST_LOAD),
        ):
            save_figure(picture, tmp_path / "picture.png")
            pixels = np.rint(plt.imread(tmp_path / "picture.png")[..., :3] * 255).astype(np.uint8)
            box = boxes(pixels)[0]
            assert hot_box(pixels, box, color) == cell_box(box, layer, 4, expert, num_experts)


def draw_all(layers: int, experts: int, domains: int, intervals: int, fill=torch.ones) -> dict:
    """Every picture of such numbers, by name."""
    names, blocks = DOMAINS[:domains], tuple(range(layers))
    counts = fill(domains, layers, experts)
    return {
        "load": load_heat_map(fill(layers, experts), blocks),
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
    for name in ("load", "domains", "domains of a layer"):
        pixels = render(pictures[name])
        for box in boxes(pixels)[:-1]:
            assert (cell_colors(pixels, box, 8, 8) == GREY).all(), name


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
