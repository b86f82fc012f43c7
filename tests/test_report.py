"""Is the report one file that loads nothing, in which every text stays text?"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from training_cases import run

import train.report
from train.analyze import main
from train.report import describe, json_text, render_html

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "<!--<script>",
    "\u2028\u2029\x00",
    "quotes \" ' ` ${1} \\",
    "\udcff\ud800",
    "/* data */ /* scripts */",
    "https://example.org/x.js",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report")
    changes = {"training.steps": 3, "checkpoint.every": 2, "evaluation.every": 0}
    assert run(path / "run", changes) == 0
    assert main([str(path / "run"), "--output", str(path / "out"), "--against", "2"]) == 0
    return path / "out"


@pytest.fixture
def analysis(output) -> dict[str, Any]:
    return json.loads((output / "analysis.json").read_text())


def embedded(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def hostile(analysis: dict[str, Any]) -> dict[str, Any]:
    """The analysis with the worst of texts wherever a text can stand."""
    names = {key: HOSTILE[i % len(HOSTILE)] for i, key in enumerate(analysis["token_names"])}
    renamed = dict(zip(analysis["domains"], HOSTILE, strict=False))
    # Domains are keys and values; as JSON both are the same.
    text = json.dumps({**analysis, "token_names": names, "run": HOSTILE[0]})
    for name, other in renamed.items():
        text = text.replace(json.dumps(name), json.dumps(other))
    changed = json.loads(text)
    for part in changed["text"]:
        part["shown"] = [HOSTILE[t % len(HOSTILE)] for t in range(len(part["shown"]))]
    return changed


# ---- the file


def test_the_page_holds_the_numbers_of_the_json(output, analysis):
    assert embedded((output / "report.html").read_text(encoding="utf-8")) == analysis


def test_hostile_text_survives_and_ends_no_script(analysis):
    changed = hostile(analysis)
    page = render_html(changed)
    assert embedded(page) == changed
    assert page.lower().count("<script") == page.lower().count("</script>") == 2
    assert "<img" not in page and "\u2028" not in page
    assert page.encode("utf-8")
    # The same text, written as it is, does end the script: what the escapes are for.
    assert json.dumps(changed, ensure_ascii=False).count("</script>") > 0


def test_the_page_loads_nothing(analysis):
    page = render_html(analysis)
    addresses = set(re.findall(r"https?://[^\s\"'`)]*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bsrc\s*=|@import|url\(|<link|<iframe|fetch\(|XMLHttp|import\(", page)
    assert "default-src 'none'" in page


def test_the_scripts_set_text_as_text_only():
    for name in train.report._SCRIPTS:
        script = (Path(train.report.__file__).parent / name).read_text(encoding="utf-8")
        forbidden = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function"
        assert not re.search(forbidden, script), name


def test_numbers_that_json_cannot_hold_are_refused(analysis):
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({**analysis, "step": float("nan")})


def test_the_table_for_a_terminal_has_a_line_for_each_layer(analysis):
    lines = describe(analysis).splitlines()
    assert "2 experts" not in lines[0] and "4 experts, top-2" in lines[0]
    numbers = [line.split() for line in lines[3:5]]
    for row, layer in zip(numbers, analysis["layers"], strict=True):
        assert row[0] == str(layer["layer"])
        assert row[1] == f"{layer['max_violation']:.2f}"
        assert row[7] == f"{layer['vocabulary_input']:.3f}"


def test_experts_that_cost_nothing_and_a_varying_number_of_them_are_said(analysis):
    layers = [
        layer | {"zero_computation": ["zero", "copy", "copy"], "choices_per_token": 1.5}
        for layer in analysis["layers"]
    ]
    skipped = {"skipped": "left out by --ablation-tokens 0"}
    lines = describe(analysis | {"layers": layers, "ablation": skipped}).splitlines()
    assert "4 experts (3 of them zero, copy), 1.50 a token, loss" in lines[0]
    assert lines[-1] == "No expert was switched off: left out by --ablation-tokens 0."


# ---- in a browser


def page_in_browser(folder: Path, page: str) -> str:
    """What a browser makes of the page, as HTML."""
    (folder / "report.html").write_bytes(page.encode("utf-8"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options = ["--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}"]
    finished = subprocess.run(
        [*command, *options, f"file://{folder / 'report.html'}"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return finished.stdout.decode("utf-8")


SECTIONS = 8


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_every_section_is_drawn_and_hostile_text_runs_nothing(analysis, tmp_path):
    # Half a character stops this way of printing a page, not the page.
    whole = json.loads(json.dumps(hostile(analysis)).replace(json.dumps(HOSTILE[5])[1:-1], "x"))
    seen = page_in_browser(tmp_path, render_html(whole))
    assert seen.count("<section") == SECTIONS
    assert "owned</title>" not in seen and "<img" not in seen
    assert "&lt;img src=x onerror" in seen
    # The last thing that the last section draws.
    assert '<div class="reading"><span' in seen


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_reports_without_pairs_ablation_or_checkpoints_are_drawn(analysis, tmp_path):
    analysis["co_activation_counts"] = None
    for layer in analysis["layers"]:
        layer |= {"zero_computation": ["zero", "copy"], "choices_per_token": 1.5}
    analysis["ablation"] = {"skipped": "left out"}
    overlap = [[0.5, 0.25], [1.0, 1.0]]
    training = {"probe_tokens": 5, "steps": [1, 3], "overlap": overlap}
    analysis["saturation"] |= {"checkpoints": [], "against": None, "training": training}
    seen = page_in_browser(tmp_path, render_html(analysis))
    assert seen.count("<section") == SECTIONS
    assert "so there are no pairs" in seen and "There is none: left out." in seen
    assert "cost nothing: zero, copy." in seen and "K = 1.50 of E = 4" in seen
    assert ">2 (zero)<" in seen and ">3 (copy)<" in seen and ">1 (zero)<" not in seen
    assert "The run has kept no other one" in seen and "During training" in seen
    assert '<div class="reading"><span' in seen
