"""How is a map of coloured cells laid out in pixels, and drawn while a training step waits?

Matplotlib's axes, ticks, colour bars and layout engines took most of the 85 ms of a figure. Here
every text is measured and placed once, in pixels from the figure's top left corner, and a cell is a
whole number of pixels. Nothing is known to pyplot, so nothing needs to be closed.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

DPI = 100
# Points. A card of TensorBoard shows a figure at two thirds of its size.
BODY, HEADING = 11, 12
# Pixels: of a line of text, between things, around the figure.
LINE, GAP, MARGIN = 19, 6, 10
# Pixels: above a map, of which so many below its title; from a map down to the foot of its labels.
HEAD, TITLE, LABEL = 27, 10, 18
BAR_HEIGHT, WIDEST_BAR = 12, 400
# What there is no number for, and the line around a map.
GREY, FRAME = "#c8c8c8", (96, 96, 96, 255)


class Scale(NamedTuple):
    """Which number has which colour: `low` the first, `middle` the middle, `high` the last one.

    Numbers beyond have the colour of the end, and NaN is grey. `labels` and `unit` are those of the
    colour bar.
    """

    color_map: str
    low: float
    middle: float
    high: float
    labels: Mapping[float, str]
    unit: str

    def position(self, numbers) -> np.ndarray:
        """Where on the colour bar, from 0 to 1."""
        return np.interp(numbers, (self.low, self.middle, self.high), (0.0, 0.5, 1.0))

    def colors(self, numbers: np.ndarray) -> np.ndarray:
        """(..., 4) uint8 of (...) numbers."""
        color_map = matplotlib.colormaps[self.color_map].with_extremes(bad=GREY)
        return np.asarray(color_map(self.position(numbers), bytes=True))


class Side(NamedTuple):
    """What runs along one side of a map, from `start` to `end`, and which of it has a label."""

    name: str
    pixels: int
    start: float
    end: float
    labels: Mapping[float, str]

    def place(self, number: float) -> float:
        """Pixels from the start."""
        return self.pixels * (number - self.start) / (self.end - self.start)


class Panel(NamedTuple):
    """A map, (rows, columns, 4) uint8 colours, and its title."""

    title: str
    colors: np.ndarray


def cell_pixels(count: int, room: int, largest: int) -> int:
    """Of one of `count` cells in a row: about `room` for all, but two pixels where 600 suffice."""
    least = 2 if 2 * count <= 600 else 1
    return min(max(room // count, least), largest)


def cells(name: str, labels: Sequence[str], cell: int, upright: bool = False) -> Side:
    """A side of cells of `cell` pixels each, numbered from 0; `upright` counts from the top.

    As many have a label as there is room for: each, every second, fourth, eighth ...
    """
    room = LINE + GAP if upright else 8 + max(map(text_width, {labels[-1], max(labels, key=len)}))
    every = 2 ** max(0, math.ceil(math.log2(room / cell)))
    chosen = {float(index): labels[index] for index in range(0, len(labels), every)}
    return Side(name, len(labels) * cell, -0.5, len(labels) - 0.5, chosen)


@functools.lru_cache(maxsize=4096)
def text_width(text: str) -> float:
    """Pixels of a text in the body's size."""
    renderer = RendererAgg(1, 1, DPI)
    return renderer.get_text_width_height_descent(text, FontProperties(size=BODY), ismath=False)[0]


class _Sheet:
    """A figure of width x height pixels, and what is drawn by pixels from its top left."""

    def __init__(self, width: int, height: int):
        # A hundredth more, since the canvas rounds down: 0.57 inches at 100 dpi are 56 pixels.
        self.width, self.height = width + 0.01, height + 0.01
        self.rows = height
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI)
        FigureCanvasAgg(self.figure)

    def write(self, text: str, x: float, y: float, size: int = BODY, align="center", **kwargs):
        """y: of the baseline, unless `va` says otherwise."""
        position = x / self.width, (self.rows - y) / self.height
        self.figure.text(*position, text, size=size, ha=align, parse_math=False, **kwargs)

    def image(self, colors: np.ndarray, left: int, top: int, width: int, height: int) -> None:
        """A map, its cells enlarged to that size, and a line around it: cells may be white."""
        framed = np.full((height + 2, width + 2, 4), FRAME, np.uint8)
        rows, columns = colors.shape[:2]
        framed[1:-1, 1:-1] = colors.repeat(height // rows, 0).repeat(width // columns, 1)
        # As it is, pixel by pixel: an image of axes would take 5 ms more.
        self.figure.figimage(framed, left - 1, self.rows - top - height - 1, origin="upper")

    def color_bar(self, scale: Scale, left: int, top: int, width: int) -> None:
        """The colours, labels below, and the unit below them."""
        colors = matplotlib.colormaps[scale.color_map](np.linspace(0, 1, width), bytes=True)
        self.image(colors[None], left, top, width, BAR_HEIGHT)
        foot = top + BAR_HEIGHT + LABEL
        for number, label in scale.labels.items():
            self.write(label, left + width * float(scale.position(number)), foot)
        self.write(scale.unit, left + width / 2, foot + LINE)


def draw_maps(panels: Sequence[Panel], x: Side, y: Side, scale: Scale, columns: int = 1) -> Figure:
    """Maps with the same sides in rows of `columns`, above the colour bar that they share."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    # From one map to the next.
    across, down = x.pixels + LINE + GAP, HEAD + y.pixels + LABEL + 2 * GAP
    width = (columns - 1) * across + x.pixels
    bar = min(width, WIDEST_BAR)
    bar_left = (width - bar) // 2
    # The last labels may reach beyond the maps.
    ends = [x.place(at) - x.pixels + text_width(text) / 2 for at, text in x.labels.items()]
    ends += [
        bar_left + bar * float(scale.position(at)) - width + text_width(text) / 2
        for at, text in scale.labels.items()
    ]
    left = MARGIN + (LINE + GAP if y.name else 0)
    left += math.ceil(max(map(text_width, y.labels.values()))) + GAP
    foot = MARGIN + rows * down + LINE - 2 * GAP
    bar_top = foot + LINE
    height = bar_top + BAR_HEIGHT + LABEL + LINE + GAP + MARGIN
    sheet = _Sheet(left + width + MARGIN + math.ceil(max(0.0, *ends)), height)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        begin, top = left + column * across, MARGIN + row * down + HEAD
        sheet.image(panel.colors, begin, top, x.pixels, y.pixels)
        sheet.write(panel.title, begin + x.pixels / 2, top - TITLE, HEADING)
        for at, text in x.labels.items():
            sheet.write(text, begin + x.place(at), top + y.pixels + LABEL)
        if column == 0:
            for at, text in y.labels.items():
                place = top + y.place(at)
                sheet.write(text, left - GAP, place, align="right", va="center_baseline")
            sheet.write(y.name, MARGIN + LINE / 2, top + y.pixels / 2, va="center", rotation=90)
    sheet.write(x.name, left + width / 2, foot)
    sheet.color_bar(scale, left + bar_left, bar_top, bar)
    return sheet.figure


def render(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8 pixels, for `add_image(..., dataformats="HWC")`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, path) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=DPI)
