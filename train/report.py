"""How does an analysis become a page? The numbers of `train.analyze` as JSON, text and HTML."""

import json
from pathlib import Path
from typing import Any

from train.status import format_layers, format_table

_FOLDER = Path(__file__).parent
# In the order in which they are put into the page.
_SCRIPTS = ("report_charts.js", "report_overview.js", "report_sections.js", "report_page.js")


def json_text(analysis: dict[str, Any]) -> str:
    """analysis.json: a line for each key at the top, ASCII only. ValueError for NaN."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"
        for key, value in analysis.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def render_html(analysis: dict[str, Any]) -> str:
    """The report, one file that loads nothing else.

    The numbers stand in it as JSON in which nothing can end the script element, whatever a token
    or a domain is called; the scripts only ever set them as text.
    """
    page = (_FOLDER / "report_template.html").read_text(encoding="utf-8")
    scripts = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    data = json_text(analysis)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    # The data last: nothing is replaced in it.
    return page.replace("/* scripts */", scripts).replace("/* data */", data)


def describe(analysis: dict[str, Any]) -> str:
    """The table by layer in short, for a terminal."""
    tokens = sum(analysis["tokens"].values())
    head = (
        f"{analysis['run']}, step {analysis['step']}: {tokens:,} tokens of held-out text, "
        f"{_experts(analysis['layers'])}, loss {analysis['loss']['mean']:.4f} "
        f"nats/token (mean over {len(analysis['domains'])} domains)"
    )
    rows = [["layer", "MaxVio", "effective", "dead", "domain info", "shuffled", "repeat rate"]]
    rows[0] += ["vocabulary", "permuted"]
    for row in analysis["layers"]:
        rows.append(
            [
                str(row["layer"]),
                f"{row['max_violation']:.2f}",
                f"{row['effective_experts']:.1f}",
                str(row["dead_experts"]),
                f"{row['domain_information']:.3f}",
                f"{row['domain_information_shuffled']:.3f}",
                f"{row['repeat_rate']:.3f}",
                f"{row['vocabulary_input']:.3f}",
                f"{row['vocabulary_input_permuted']:.3f}",
            ]
        )
    lines = [head, "", format_table(rows, str.rjust)]
    if skipped := analysis["ablation"].get("skipped"):
        lines += ["", f"No expert was switched off: {skipped}."]
    if top := analysis["ablation"].get("top_experts"):
        first = top[0]
        lines += [
            "",
            f"The expert that matters most: {first['expert']} of layer {first['layer']}; without "
            f"it the loss rises by {first['rise']:.4f} nats/token, by {first['domain_rise']:.4f} "
            f"on {first['domain']}.",
        ]
    return "\n".join([*lines, ""])


def _experts(layers: list[dict[str, Any]]) -> str:
    """What each layer chooses among, and how many a token has: `8 experts, top-2`."""
    # The same in all layers.
    costless = layers[0]["zero_computation"]
    free = f" ({len(costless)} of them {', '.join(dict.fromkeys(costless))})" if costless else ""
    pairs = [(row["choices_per_token"], row["top_k"]) for row in layers]
    chosen = format_layers(top_k if mean == top_k else f"{mean:.2f}" for mean, top_k in pairs)
    fixed = all(mean == top_k for mean, top_k in pairs)
    return (
        f"{format_layers(row['num_experts'] for row in layers)} experts{free}, "
        f"{f'top-{chosen}' if fixed else f'{chosen} a token'}"
    )
