"""Pictures of experts, for TensorBoard and files: who gets how much, of what, when, with whom?

Blue is less than an even share and red is more, in every picture but `bias_map`. Grey: no number.
"""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from moe.measures import co_activation, independent_co_activation
from train.drawing import Panel, Scale, Side, cell_pixels, cells, draw_maps, text_width
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
        tokens_per_expert: (L, E) counts; below 0, grey: no such expert in the layer.
        layers: (L,) numbers of the blocks.
    """
    panel = Panel("load of each expert", LOAD.colors(_share(_numbers(tokens_per_expert))))
    return draw_maps([panel], _experts(tokens_per_expert.shape[-1]), _layers(layers), LOAD)


def load_history(history: Tensor, edges: tuple[int, ...], layer: int) -> Figure:
    """An expert's load over training, as a multiple of an even share: who dies, who takes over?

    Args:
        history: (N, E) counts of N consecutive intervals.
        edges: (N + 1,) optimizer steps: interval i is from edges[i] to edges[i + 1].
        layer: number of the block.
    Raises:
        ValueError: if `edges` are not N + 1 rising numbers, or N is 0.
    """
    counts = _numbers(history)
    if len(counts) == 0 or len(edges) != len(counts) + 1 or (np.diff(edges) <= 0).any():
        raise ValueError(
            f"{len(counts)} intervals and {len(edges)} edges: at least one interval is needed, one "
            "edge more than intervals, and each edge larger than the one before it"
        )
    # Each interval begins at a whole pixel. Those that begin at the same one are counted together.
    edge = np.asarray(edges, dtype=float)
    begin = np.rint((edge[:-1] - edge[0]) / (edge[-1] - edge[0]) * _WIDTH).astype(int)
    begin, first = np.unique(np.minimum(begin, _WIDTH - 1), return_index=True)
    share = _share(np.add.reduceat(counts, first, axis=0))  # (at most _WIDTH, E)
    widths = np.diff(begin, append=_WIDTH)
    colors = np.repeat(LOAD.colors(share.T), widths, axis=1)  # (E, _WIDTH, 4)

    most = int(_WIDTH // (text_width(str(edges[-1])) + 16))
    ticks = MaxNLocator(min(most, 8), steps=[1, 2, 5, 10], integer=True).tick_values(
        edges[0], edges[-1]
    )
    labels = {at: str(round(at)) for at in ticks if edges[0] <= at <= edges[-1]}
    steps = Side("optimizer step", _WIDTH, edges[0], edges[-1], labels)
    rows = counts.shape[-1]
    cell = max(cell_pixels(rows, _WIDTH, _ROW), _LOWEST // rows)
    experts = cells("expert", _numbered(rows), cell, upright=True)
    return draw_maps([Panel(f"layer {layer}: load over training", colors)], steps, experts, LOAD)


def co_activation_map(counts: Tensor, layer: int) -> Figure:
    """Which experts are chosen together? P(j | i) as a multiple of what independent choices give.

    Grey: the diagonal, which is 1 by definition, and where nothing is to be expected: experts never
    chosen, and all of it where tokens have one expert.

    Args:
        counts: (E, E) of `moe.measures.co_activation_counts`. layer: number of the block.
    """
    expected = _numbers(independent_co_activation(counts)).copy()
    expected[expected == 0] = np.nan
    multiple = _numbers(co_activation(counts)) / expected
    np.fill_diagonal(multiple, np.nan)
    num_experts = len(multiple)
    labels = {**LOAD.labels, 1: "chance"}
    scale = LOAD._replace(labels=labels, unit="P(j | i) ÷ independent choices")
    names = _numbered(num_experts)
    cell = cell_pixels(num_experts, _WIDTH, _WIDTH)
    chosen = cells("chosen: expert i", names, cell, upright=True)
    also = cells("also chosen: expert j", names, cell)
    panel = Panel(f"layer {layer}: experts chosen together", scale.colors(multiple))
    return draw_maps([panel], also, chosen, scale)


def bias_map(bias: Tensor, layers: tuple[int, ...]) -> Figure:
    """The bias that loss-free balancing adds to an expert's score when choosing: one row a layer.

    Orange raises an expert's chance to be chosen, purple lowers it. The colours end at the largest
    absolute bias, rounded up.

    Args:
        bias: (L, E) `expert_bias` of the routers, NaN where there is none.
        layers: (L,) numbers of the blocks.
    """
    numbers = _numbers(bias)
    limit = _round_up(float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0)))
    ticks = (-limit, -limit / 2, 0.0, limit / 2, limit)
    labels = {at: f"{at:.2g}".replace("-", "−") for at in ticks}
    scale = Scale("PuOr_r", -limit, 0.0, limit, labels, "bias, added to the scores when choosing")
    panel = Panel("router bias of each expert", scale.colors(numbers))
    return draw_maps([panel], _experts(numbers.shape[-1]), _layers(layers), scale)


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
    """Multiples of an even share over the last dimension; NaN where nothing was counted, and where
    there is no expert: below 0."""
    counts = np.where(counts < 0, np.nan, counts)
    mean = np.nanmean(counts, -1, keepdims=True)
    return counts / np.where(mean > 0, mean, np.nan)


def _numbered(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def _experts(count: int, width: int = _WIDTH) -> Side:
    return cells("expert", _numbered(count), cell_pixels(count, width, width))


def _layers(layers: tuple[int, ...]) -> Side:
    # Many layers share the height of twelve, down to eight pixels each.
    row = max(8, min(_ROW, 12 * _ROW // len(layers)), _LOWEST // len(layers))
    return cells("layer", [str(layer) for layer in layers], row, upright=True)


def _round_up(number: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15 ... and all decades; 1 for 0."""
    if number <= 0:
        return 1.0
    exponent = math.floor(math.log10(number))
    # A float32 may be a little larger than the number that was meant.
    leading = number / 10.0**exponent * (1 - 1e-6)
    return next(step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step >= leading) * 10.0**exponent


def _short(name: str) -> str:
    # The end stays: names of one family differ there.
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
