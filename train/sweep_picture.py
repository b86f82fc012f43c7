"""How does a sweep look? Loss against the baseline and balance, one row an arm, a dot a seed."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from train.drawing import BODY, DPI, HEADING
from train.sweep_report import NOT_CAUSAL

# Inches: of a row, and of the titles and scales around all of them.
_WIDTH, _ROW, _AROUND = 12.0, 0.42, 1.7
# Colour-blind safe (Wong, Nature Methods 2011): better, worse, not told apart.
_BETTER, _WORSE, _OPEN, _SEEDS = "#0072b2", "#d55e00", "#444444", "#9a9a9a"


def sweep_picture(report: Mapping[str, Any]) -> Figure:
    """Loss differences with their 95 % intervals and a line at 0, and beside them MaxVio.

    Args: report: of `train.sweep_report`. A dense arm has no MaxVio.
    """
    arms, baseline = report["arms"], report["baseline"]
    figure = Figure(
        figsize=(_WIDTH, _AROUND + _ROW * len(arms)),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    loss, balance = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for row, (name, arm) in enumerate(arms.items()):
        if name == baseline:
            loss.plot(0, row, "D", color=_OPEN, markersize=6)
        else:
            difference = arm["difference"]
            color = _OPEN
            if difference["interval_excludes_0"]:
                color = _BETTER if difference["mean"] < 0 else _WORSE
            _draw_row(loss, row, difference, color)
        if "max_violation" in arm:
            _draw_row(balance, row, arm["max_violation"], _OPEN)
        else:
            balance.text(0, row, "  no experts", va="center", size=BODY, color=_OPEN)
    for axes in (loss, balance):
        axes.axvline(0, color="black", linewidth=1, zorder=1)
    names = [name + ("" if arm["causal"] else f" {NOT_CAUSAL}") for name, arm in arms.items()]
    loss.set_yticks(range(len(arms)), names, size=BODY)
    loss.set_ylim(len(arms) - 0.5, -0.5)
    seeds = len(report["seeds"])
    _label(loss, f"validation loss − that of {baseline}", "nats/token; left of 0 is better")
    _label(balance, "load balance on validation text", "MaxVio of the worst layer; 0 is even")
    # An interval may reach below 0, MaxVio cannot.
    highest = balance.get_xlim()[1]
    balance.set_xlim(-0.03 * highest, highest)
    figure.suptitle(
        f"{report['tokens']:,} tokens, {seeds} paired seeds: each seed a dot, mean and 95 % "
        f"interval (blue: better than {baseline}, orange: worse){_footnote(arms)}",
        size=HEADING,
    )
    return figure


def _draw_row(axes: Axes, row: int, interval: Mapping[str, Any], color: str) -> None:
    each: Sequence[float] = interval["each"]
    axes.plot(each, [row + 0.22] * len(each), "o", color=_SEEDS, markersize=4)
    axes.plot([interval["low"], interval["high"]], [row, row], color=color, linewidth=2.5)
    axes.plot(interval["mean"], row, "o", color=color, markersize=7)


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, size=HEADING)
    axes.set_xlabel(unit, size=BODY)
    axes.tick_params(axis="x", labelsize=BODY)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", color="#e4e4e4")
    axes.set_axisbelow(True)


def _footnote(arms: Mapping[str, Mapping[str, Any]]) -> str:
    if all(arm["causal"] for arm in arms.values()):
        return ""
    return f"\n{NOT_CAUSAL} sees later tokens: its loss is not comparable"
