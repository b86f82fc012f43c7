"""What came out of a sweep? Its numbers as JSON values, and the same as a page of Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.config import RunConfig
from train.plan import Plan
from train.status import format_layers
from train.sweep_statistics import (
    HistoryPoint,
    Interval,
    holm,
    paired_difference,
    speed_up,
    t_interval,
)

Results = Mapping[str, Sequence[Mapping[str, Any]]]

# What is said of a run's experts: its key in the summary, which has it by layer, what makes one
# number of these, and digits.
_ROUTING: dict[str, tuple[str, Callable[[list[float]], float], int]] = {
    "max_violation": ("max_violation", max, 2),
    "max_violation_mean": ("max_violation", statistics.mean, 2),
    "dead_experts": ("dead_experts", sum, 1),
    "domain_information": ("domain_information", statistics.mean, 4),
    "domain_divergence": ("domain_divergence", statistics.mean, 4),
}
# Of at least one false difference among all arms.
SIGNIFICANCE = 0.05
UNITS = ("tokens", "flops", "seconds")
NOT_CAUSAL = "*"


def sweep_report(
    results: Results,
    configs: Mapping[str, RunConfig],
    plans: Mapping[str, Plan],
    baseline: str,
    command: str,
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        results: of each arm, its runs in the order of the seeds, two at least and all of the same
            seeds. configs, plans: of each arm. command: that makes it.
    """
    arms = {
        name: _arm_report(runs, results[baseline], configs[name], plans, name, baseline)
        for name, runs in results.items()
    }
    others = [arm["difference"] for name, arm in arms.items() if name != baseline]
    for difference, adjusted in zip(others, holm([each["p"] for each in others]), strict=True):
        difference["p_holm"] = adjusted
    first = results[baseline][0]
    return {
        "command": command,
        "baseline": baseline,
        "tokens": configs[baseline].num_steps * configs[baseline].tokens_per_step,
        "seeds": [run["seed"] for run in results[baseline]],
        "environment": first["environment"],
        "arms": arms,
    }


def _arm_report(
    runs: Sequence[Mapping[str, Any]],
    baseline_runs: Sequence[Mapping[str, Any]],
    config: RunConfig,
    plans: Mapping[str, Plan],
    name: str,
    baseline: str,
) -> dict[str, Any]:
    model, plan = config.model, plans[name]
    routed = bool(model.moe_layers)
    routers = [model.at(layer).moe.router.name for layer in model.moe_layers]
    report: dict[str, Any] = {
        "router": format_layers(routers) or None,
        # Where layers differ, the mean over them, as of the next one.
        "num_experts": statistics.mean(model.experts_of_layers) if routed else None,
        "experts_per_token": model.experts_per_token if routed else None,
        "causal": model.causal,
        "total": plan.parameters.total,
        "active": plan.parameters.active,
        # Of K, active parameters and FLOPs: nobody knows how many experts a token will have.
        "is_upper_bound": plan.is_upper_bound,
        "flops_per_token": plan.flops_per_token,
        "loss": t_interval(_losses(runs))._asdict(),
        **{measure: t_interval(values)._asdict() for measure, values in _routing(runs).items()},
    }
    for measure in ("tokens_per_second", "training_seconds", "dropped_percent"):
        report[measure] = statistics.mean(run[measure] for run in runs)
    for count in ("skipped_steps", "alarms"):
        report[count] = sum(run[count] for run in runs)
    if name != baseline:
        interval, p = paired_difference(_losses(runs), _losses(baseline_runs))
        report["difference"] = {
            **interval._asdict(),
            "detectable": interval.half_width,
            "p": p,
            "interval_excludes_0": not interval.low <= 0 <= interval.high,
        }
        flops_ratio = plans[baseline].flops_per_token / plan.flops_per_token
        report["speed_up"] = _speed_ups(runs, baseline_runs, flops_ratio)
    return report


def _losses(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [run["history"][-1]["loss"] for run in runs]


def _routing(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Values of each seed by measure; none of a dense model."""
    by_layer = [run["summary"]["layers"] for run in runs]
    if not any(by_layer):
        return {}
    return {
        measure: [float(reduce([layer[key] for layer in layers])) for layers in by_layer]
        for measure, (key, reduce, _) in _ROUTING.items()
    }


def _speed_ups(
    runs: Sequence[Mapping[str, Any]],
    baseline_runs: Sequence[Mapping[str, Any]],
    flops_ratio: float,
) -> dict[str, dict[str, Any]] | None:
    """By unit, of each seed and their mean; None where a pair of curves never meets."""
    pairs = [
        [[HistoryPoint(**point) for point in run["history"]] for run in pair]
        for pair in zip(runs, baseline_runs, strict=True)
    ]
    ratios = [speed_up(arm, other, flops_ratio) for arm, other in pairs]
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios):
        return None
    return {
        unit: {
            "mean": statistics.mean(ratio[unit] for ratio in known),
            "each": [ratio[unit] for ratio in known],
        }
        for unit in UNITS
    }


def render_sweep(report: Mapping[str, Any]) -> str:
    """The report as Markdown: losses, differences, experts, costs."""
    arms, seeds, baseline = report["arms"], report["seeds"], report["baseline"]
    environment = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    names = {name: name + ("" if arm["causal"] else NOT_CAUSAL) for name, arm in arms.items()}
    lines = [
        f"`{report['command']}`",
        "",
        f"Validation loss (nats/token, mean over domains) after {report['tokens']:,} tokens, "
        f"{len(seeds)} seeds; {environment}. Intervals are 95 % t-intervals over seeds.",
        "",
        *_table(
            ["arm", *(f"seed {seed}" for seed in seeds), "mean ± SD"],
            [
                [
                    names[name],
                    *(f"{loss:.4f}" for loss in arm["loss"]["each"]),
                    f"{arm['loss']['mean']:.4f} ± {arm['loss']['standard_deviation']:.4f}",
                ]
                for name, arm in arms.items()
            ],
        ),
        "",
        f"Paired difference to {baseline} (below 0: better). Noise floor: the smallest mean "
        f"difference that this arm's {len(seeds)} pairs would tell from 0.",
        "",
        *_table(
            ["arm", "difference", "interval", "noise floor", "interval excludes 0", "p", "p, Holm"],
            [_difference_row(names[name], arm) for name, arm in arms.items() if name != baseline],
        ),
        "",
        _verdict(names, arms, baseline),
        "",
        "Experts over the whole validation text: MaxVio of the worst layer and mean over layers, "
        "dead experts of all layers, domain information and divergence (mean over layers).",
        "",
        *_table(
            ["arm", "router", "E", "K", "MaxVio", "mean", "dead", "domain info", "divergence"],
            [_routing_row(names[name], arm) for name, arm in arms.items()],
        ),
        "",
        f"Cost. Speed-up: cost of {baseline} over cost of the arm at equal loss, mean over seeds "
        "(below 1: slower).",
        "",
        *_table(
            [
                *("arm", "parameters, total", "active", "MFLOPs/token", "tokens/s", "training s"),
                *(f"speed-up in {unit}" for unit in ("tokens", "FLOPs", "seconds")),
            ],
            [_cost_row(names[name], arm, name == baseline) for name, arm in arms.items()],
        ),
        "",
        *_notes(names, arms),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _difference_row(name: str, arm: Mapping[str, Any]) -> list[str]:
    difference = arm["difference"]
    verdict = "no"
    if difference["interval_excludes_0"]:
        verdict = "yes, better" if difference["mean"] < 0 else "yes, worse"
    return [
        name,
        f"{difference['mean']:+.4f}",
        f"[{difference['low']:+.4f}, {difference['high']:+.4f}]",
        f"±{difference['detectable']:.4f}",
        verdict,
        f"{difference['p']:.2g}",
        f"{difference['p_holm']:.2g}",
    ]


def _verdict(names: Mapping[str, str], arms: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    """In words, which arms differ even though so many were compared."""
    told: dict[str, list[str]] = {"better": [], "worse": [], "not told apart from it": []}
    for name, arm in arms.items():
        if name != baseline:
            difference = arm["difference"]
            verdict = "better" if difference["mean"] < 0 else "worse"
            if difference["p_holm"] >= SIGNIFICANCE:
                verdict = "not told apart from it"
            told[verdict].append(names[name])
    return (
        f"Against {baseline}, at a familywise error of {SIGNIFICANCE:.0%} (Holm): "
        + "; ".join(f"{verdict}: {', '.join(found) or 'none'}" for verdict, found in told.items())
        + "."
    )


def _routing_row(name: str, arm: Mapping[str, Any]) -> list[str]:
    if arm["router"] is None:
        return [name, "dense", *["–"] * (2 + len(_ROUTING))]
    experts_per_token = f"{_most(arm)}{arm['experts_per_token']:g}"
    cells = [name, arm["router"], f"{arm['num_experts']:g}", experts_per_token]
    for measure, (_, _, digits) in _ROUTING.items():
        interval = Interval(**arm[measure])
        cells.append(f"{interval.mean:.{digits}f} ± {interval.half_width:.{digits}f}")
    return cells


def _most(arm: Mapping[str, Any]) -> str:
    return "at most " if arm["is_upper_bound"] else ""


def _cost_row(name: str, arm: Mapping[str, Any], is_baseline: bool) -> list[str]:
    if is_baseline:
        ratios = ["1"] * len(UNITS)
    elif arm["speed_up"] is None:
        ratios = ["never"] * len(UNITS)
    else:
        ratios = [f"{arm['speed_up'][unit]['mean']:.2f}x" for unit in UNITS]
    return [
        name,
        f"{arm['total'] / 1e6:.2f} M",
        f"{_most(arm)}{arm['active'] / 1e6:.3f} M",
        f"{_most(arm)}{arm['flops_per_token'] / 1e6:.3f}",
        f"{arm['tokens_per_second']:,.0f}",
        f"{arm['training_seconds']:.0f}",
        *ratios,
    ]


def _notes(names: Mapping[str, str], arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    if not all(arm["causal"] for arm in arms.values()):
        lines.append(
            f"{NOT_CAUSAL} Its routing sees later tokens, in training or also in validation: its "
            f"loss is not comparable with the others'."
        )
    for name, arm in arms.items():
        found = [
            f"{arm[count]} {count.replace('_', ' ')}"
            for count in ("skipped_steps", "alarms")
            if arm[count]
        ]
        if arm["dropped_percent"]:
            found.append(f"{arm['dropped_percent']:.2f} % of the assignments dropped")
        if found:
            lines.append(f"{names[name]}: {', '.join(found)}, in all seeds together.")
    return ["- " + line for line in lines]
