"""Pictures of expert use: drawn with matplotlib, returned as figures."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

# Colours end at this multiple of an even share, in every picture, so that steps and runs compare.
MAX_SHARE = 4.0


def _load_norm() -> matplotlib.colors.Normalize:
    return matplotlib.colors.TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=MAX_SHARE)


def _draw(axes, share: np.ndarray, row_names: list[str], title: str):
    image = axes.imshow(share, aspect="auto", cmap="RdBu_r", norm=_load_norm())
    axes.set_yticks(range(len(row_names)), row_names)
    num_experts = share.shape[1]
    step = max(1, num_experts // 8)
    axes.set_xticks(range(0, num_experts, step))
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=11, length=0)
    return image


def _color_bar(figure: Figure, image, axes) -> None:
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1, 2, 3, 4])
    bar.ax.set_yticklabels(["0", "½", "even", "2×", "3×", "≥4×"], fontsize=11)


def load_heat_map(tokens_per_expert: Tensor, layers: tuple[int, ...]) -> Figure:
    """Each expert's load as a multiple of an even share: one row a routed layer.

    Args:
        tokens_per_expert: (L, E) counts. layers: (L,) numbers of the blocks.
    """
    load = tokens_per_expert.double()
    share = (load / load.mean(-1, keepdim=True).clamp(min=1e-9)).numpy()
    height = 1.2 + 0.4 * len(layers)
    figure, axes = plt.subplots(figsize=(5.5, height), dpi=100, layout="constrained")
    image = _draw(axes, share, [f"layer {layer}" for layer in layers], "load of each expert")
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
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.6 + 3.4 * columns, 0.8 + rows * (0.9 + 0.28 * len(domain_names))),
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
        image = _draw(axes, share[:, index], list(domain_names), f"layer {layers[index]}")
    figure.supxlabel("expert", fontsize=12)
    if image is not None:
        _color_bar(figure, image, grid)
    return figure


def save_figure(figure: Figure, path) -> None:
    """Write a PNG and forget the figure."""
    figure.savefig(path)
    plt.close(figure)
