"""The tables of what was measured, as Markdown.

    python -m kernels.report [FILE.json ...] [--write README.md]

Reads what `python -m kernels.bench OP --json kernels/results` has written, all of it unless files
are named. With --write, the tables replace those between the two marks in that file.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- begin: python -m kernels.report -->", "<!-- end -->"


def load(paths: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The results in the files, by default all in `kernels/results`."""
    # The table of `kernels.aot` there is no result of a benchmark.
    loaded = [json.loads(path.read_text()) for path in paths or sorted(RESULTS.glob("*.json"))]
    return [result for result in loaded if "cases" in result]


def markdown(result: Mapping[str, Any]) -> str:
    """One table: a row for each case; milliseconds, of rivals also our fastest over theirs."""
    names: list[str] = []
    for case in result["cases"]:
        names += [name for name in case["contestants"] if name not in names]
    ours = [name for name in names if name.startswith("ours")]
    rivals = [name for name in names if name not in ours]
    reached = _reached(result)
    head = ["shape", *ours[:1], *([reached[0]] if reached else []), *ours[1:], *rivals]
    lines = [_title(result), "", _row(head), _row(["---"] * len(head))]
    for case in result["cases"]:
        if "wrong" in case:
            lines.append(_row([case["name"], case["wrong"], *[""] * (len(head) - 2)]))
            continue
        contestants = case["contestants"]
        fastest = min(contestants[name]["both_ms"] for name in ours if name in contestants)
        first = contestants.get(ours[0])
        cells = [case["name"], _time(first)]
        if reached:
            cells.append(reached[1].format(**first) if first and reached[2] in first else "")
        cells += [_time(contestants.get(name)) for name in ours[1:]]
        cells += [_time(contestants.get(name), fastest) for name in rivals]
        lines.append(_row(cells))
    return "\n".join(lines)


def _title(result: Mapping[str, Any]) -> str:
    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    return (
        f"`{result['op']}` in {result['dtype']} on {result['chip']}{threads}: forward and "
        f"backward, medians of {result['repeats']} in turns; torch {result['torch']}, triton "
        f"{result['triton']}, commit {result['commit']}. Limits: matmul "
        f"{result['matmul_tflops']:.3g} TFLOP/s, copy {result['copy_gbps']:.0f} GB/s."
    )


def _reached(result: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Heading, format and needed entry of the column that says what ours reached of a limit."""
    facts = [fact for case in result["cases"] for fact in case["contestants"].values()]
    if any("both_tflops" in fact for fact in facts):
        return "TFLOP/s (of matmul)", "{both_tflops:.3g} ({share_of_matmul:.0%})", "both_tflops"
    if any("forward_gbps" in fact for fact in facts):
        return "forward GB/s (of copy)", "{forward_gbps:.0f} ({share_of_copy:.0%})", "forward_gbps"
    return None


def _time(facts: Mapping[str, Any] | None, ours: float | None = None) -> str:
    """`12.3 ms`; of a rival also what ours takes of it."""
    if facts is None:
        return ""
    if "both_ms" not in facts:
        return facts["wrong"]
    time = facts["both_ms"]
    share = "" if ours is None else f" ({ours / time:.2f})"
    return f"{time:.0f} ms{share}" if time >= 1000 else f"{time:.3g} ms{share}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables(paths: Sequence[Path] = ()) -> str:
    """All tables, one below the other."""
    return "\n\n".join(markdown(result) for result in load(paths))


def between_marks(text: str, content: str) -> str:
    """`text` with `content` between the marks.

    Raises:
        ValueError: if the marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there must be the two lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write them into a file."""
    parser = argparse.ArgumentParser(prog="python -m kernels.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", type=Path, metavar="README.md")
    options = parser.parse_args(argv)
    try:
        if options.write is None:
            print(tables(options.files))
        else:
            text = options.write.read_text(encoding="utf-8")
            options.write.write_text(between_marks(text, tables(options.files)), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {options.write or 'results'}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
