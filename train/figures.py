"""Pictures of experts, for TensorBoard and files: who gets how much, of what, when, with whom?

Blue is less than an even share and red is more; grey: no number.
"""

import math

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from train.drawing import Panel, Scale, Side, cell_pixels, cells, draw_maps
from train.drawing import render as render
from train.drawing import save_figure as save_figure

# Colours end at this multiple of an even share, in every picture, so that steps and runs compare.
MAX_SHARE = 4.0

LOAD = Scale(
    "RdBu_r",
    low=0.0,
    middle=1.0,
    high=MAX_SHARE,
    labels={0: "0", 0.5: "½", 1: "even", 2: "2×", 3: "3×", 4: "≥4×"},
    unit="load ÷ even share",
)
# Pixels for all experts in a row, and for a row with a label of its own.
_WIDTH, _ROW = 400, 40
# No map is lower: the name beside it needs that.
_LOWEST = 60
_LONGEST_NAME = 24


def load_heat_map(tokens_per_expert: Tensor, layers: tuple[int, ...]) -> Figure:
    """Each expert's load as a multiple of an even share: one row a routed layer.

    Args:
        tokens_per_expert: (L, E) counts. layers: (L,) numbers of the blocks.
    """
    panel = Panel("load of each expert", LOAD.colors(_share(_numbers(tokens_per_expert))))
    return draw_maps([panel], _experts(tokens_per_expert.shape[-1]), _layers(layers), LOAD)


def domain_expert_map(
    tokens_per_expert: Tensor, domain_names: tuple[str, ...], layers: tuple[int, ...]
) -> Figure:
    """Share of each domain's assignments that an expert gets, against an even share; by layer.

    Args:
        tokens_per_expert: (domains, L, E) counts. layers: (L,) numbers of the blocks.
    """
    share = _share(_numbers(tokens_per_expert))
    panels = [
        Panel(f"layer {layer}", LOAD.colors(share[:, index])) for index, layer in enumerate(layers)
    ]
    names = [_short(name) for name in domain_names]
    domains = cells("", names, max(28, _LOWEST // len(names)), upright=True)
    # About as wide as it is tall, but of two columns at least.
    columns = max(2, round(math.sqrt(len(layers) / 2)))
    experts = _experts(share.shape[-1], width=300)
    scale = LOAD._replace(unit="share of a domain ÷ even share")
    return draw_maps(panels, experts, domains, scale, columns)


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _share(counts: np.ndarray) -> np.ndarray:
    """Multiples of an even share over the last dimension; NaN where nothing was counted."""
    mean = counts.mean(-1, keepdims=True)
    return counts / np.where(mean > 0, mean, np.nan)


def _numbered(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def _experts(count: int, width: int = _WIDTH) -> Side:
    return cells("expert", _numbered(count), cell_pixels(count, width, width))


def _layers(layers: tuple[int, ...]) -> Side:
    # Many layers share the height of twelve, down to eight pixels each.
    row = max(8, min(_ROW, 12 * _ROW // len(layers)), _LOWEST // len(layers))
    return cells("layer", [str(layer) for layer in layers], row, upright=True)


def _short(name: str) -> str:
    # The end stays: names of one family differ there.
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
