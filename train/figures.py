"""Pictures of expert use: drawn with matplotlib, returned as figures."""

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

# Colours end at this multiple of an even share, in every picture, so that steps and runs compare.
MAX_SHARE = 4.0


# Inches. Narrower columns than two pixels blur; past a screen's width they do so all the same.
_COLUMN, _WIDEST = 0.02, 12.0
# A row with a label of its own, and the least height of a label.
_ROW, _LABEL = 0.4, 0.2
_LONGEST_NAME = 24


def _load_norm() -> matplotlib.colors.Normalize:
    return matplotlib.colors.TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=MAX_SHARE)


def _draw(axes, share: np.ndarray, row_names: list[str], title: str, width: float, row: float):
    """A map of (rows, E) shares; width of all columns and height of a row in inches."""
    num_experts = share.shape[1]
    # Sharp cells as long as each has its pixels; beyond, an average loses none.
    sharp = num_experts * _COLUMN <= _WIDEST
    image = axes.imshow(
        share,
        aspect="auto",
        cmap="RdBu_r",
        norm=_load_norm(),
        interpolation="nearest" if sharp else "antialiased",
    )
    every = max(1, math.ceil(_LABEL / row))
    rows = range(0, len(row_names), every)
    axes.set_yticks(rows, [_short(row_names[index]) for index in rows])
    label_width = 0.15 + 0.1 * len(str(num_experts - 1))
    axes.set_xticks(range(0, num_experts, _power_of_two(num_experts * label_width / width)))
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=11, length=0)
    return image


def _power_of_two(least: float) -> int:
    """The smallest power of two that is at least `least`."""
    return 2 ** max(0, math.ceil(math.log2(least)))


def _short(name: str) -> str:
    # The end stays: names of one family differ there.
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _color_bar(figure: Figure, image, axes) -> None:
    # Of one size, at the top, however tall the figure is.
    shrink = min(1.0, 3.0 / figure.get_figheight())
    bar = figure.colorbar(
        image,
        ax=axes,
        ticks=[0, 0.5, 1, 2, 3, 4],
        shrink=shrink,
        anchor=(0.0, 1.0),
        aspect=15,
        pad=0.02,
    )
    bar.ax.set_yticklabels(["0", "½", "even", "2×", "3×", "≥4×"], fontsize=11)


def load_heat_map(tokens_per_expert: Tensor, layers: tuple[int, ...]) -> Figure:
    """Each expert's load as a multiple of an even share: one row a routed layer.

    Args:
        tokens_per_expert: (L, E) counts. layers: (L,) numbers of the blocks.
    """
    load = tokens_per_expert.double()
    share = (load / load.mean(-1, keepdim=True).clamp(min=1e-9)).numpy()
    width = min(max(3.9, _COLUMN * share.shape[1]), _WIDEST)
    # Many layers share the height of twelve, down to ten pixels each.
    row = min(_ROW, max(0.1, 12 * _ROW / len(layers)))
    # The colour bar needs a height of its own.
    height = 1.0 + max(1.3, row * len(layers))
    figure, axes = plt.subplots(figsize=(1.6 + width, height), dpi=100, layout="constrained")
    names = [f"layer {layer}" for layer in layers]
    image = _draw(axes, share, names, "load of each expert", width, row)
    axes.set_xlabel("expert", fontsize=12)
    _color_bar(figure, image, axes)
    return figure


def domain_expert_map(
    tokens_per_expert: Tensor, domain_names: tuple[str, ...], layers: tuple[int, ...]
) -> Figure:
    """Share of each domain's assignments that an expert gets, against an even share; by layer.

    Args:
        tokens_per_expert: (domains, L, E) counts. layers: (L,) numbers of the blocks.
    """
    counts = tokens_per_expert.double()
    share = (counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)).numpy()
    width = min(max(3.0, _COLUMN * share.shape[2]), _WIDEST)
    # About as wide as it is tall, but of two columns at least.
    columns = min(len(layers), max(2, round(math.sqrt(len(layers) / 2))))
    rows = -(-len(layers) // columns)
    names = [_short(name) for name in domain_names]
    margin = 0.9 + 0.085 * max(len(name) for name in names)
    row = max(0.28, 1.3 / len(names))
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(margin + (width + 0.4) * columns, 0.6 + rows * (0.7 + row * len(names))),
        dpi=100,
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(layers):
            axes.axis("off")
            continue
        title = f"layer {layers[index]}"
        image = _draw(axes, share[:, index], names, title, width, row)
    figure.supxlabel("expert", fontsize=12)
    if image is not None:
        _color_bar(figure, image, grid)
    return figure


def save_figure(figure: Figure, path) -> None:
    """Write a PNG and forget the figure."""
    figure.savefig(path)
    plt.close(figure)
