"""Does an analysis stay within its memory, leave whole files, and refuse what cannot be?"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from analysis_cases import ABLATION_TOKENS, LAYERS, TOKENS, analyze
from training_cases import run, settings

import train.analysis_text
import train.route_table
from train.analyze import FILES, main

pytest_plugins = ["analysis_fixtures"]


def test_memory_is_bounded_and_the_numbers_do_not_depend_on_it(
    run_dir, analysis, output, tmp_path, monkeypatch
):
    """One sequence a forward and 64 rows a part give the same table and the same numbers."""
    sizes = []
    real = train.analysis_text.read

    def measured(model, batch, routes=None):
        sizes.append(batch.input_ids.numel())
        return real(model, batch, routes)

    for module in ("analysis_routes", "expert_ablation", "saturation"):
        monkeypatch.setattr(f"train.{module}.read", measured)
    monkeypatch.setattr(train.analysis_text, "MAX_LOGITS", 16 * 320)
    monkeypatch.setattr(train.route_table, "_ROWS", 64)
    arguments = ("--against", 25, "--ablation-tokens", ABLATION_TOKENS)
    found = analyze(run_dir, tmp_path, *arguments)
    assert max(sizes) == 16
    table = pq.ParquetFile(tmp_path / "routes.parquet")
    assert table.num_row_groups == 2 * TOKENS * LAYERS / 64
    whole = pq.read_table(output / "routes.parquet")
    for name in whole.column_names[:-1]:
        assert table.read().column(name).to_pylist() == whole.column(name).to_pylist()
    for key in ("load", "co_activation_counts", "vocabulary", "saturation", "layers", "loss"):
        assert json.loads(json.dumps(found[key])) == approximately(analysis[key]), key


def approximately(value):
    """Equal to float32 rounding, whatever the nesting."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value


def test_a_second_analysis_replaces_the_first_and_is_the_same(run_dir, output, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    default = copy / "analysis" / "step_00000040"
    arguments = [str(copy), "--against", "25", "--ablation-tokens", str(ABLATION_TOKENS)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if "/" in line][-1] == str(
        default / "report.html"
    )
    assert "routes: 640 tokens in" in printed.err and "ablation: 8 experts in" in printed.err
    for name in FILES:
        (default / name).write_text("old")
    (default / "mine.txt").write_text("mine")
    assert main(arguments) == 0
    assert sorted(path.name for path in default.iterdir()) == sorted([*FILES, "mine.txt"])
    first = json.loads((output / "analysis.json").read_text())
    again = json.loads((default / "analysis.json").read_text())
    assert {**again, "run": None} == {**first, "run": None}
    assert (default / "routes.parquet").read_bytes() == (output / "routes.parquet").read_bytes()


def test_a_failure_leaves_the_old_files_and_nothing_else(run_dir, tmp_path, monkeypatch):
    analyze(run_dir, tmp_path, "--ablation-tokens", 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stop(analysis):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.analyze.render_html", stop)
    assert main([str(run_dir), "--output", str(tmp_path), "--tokens", "32"]) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_exit_code_7(run_dir, small_disk, capsys):
    folder = small_disk / "out"
    (small_disk / "filler").write_bytes(bytes(3_000_000 - 16_384))
    assert main([str(run_dir), "--output", str(folder)]) == 7
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "No space left" in line and "choose another" in line
    assert list(folder.iterdir()) == []


def test_what_cannot_be_is_one_line(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "folder" / "analysis.json").mkdir(parents=True)
    for arguments, message in (
        ([tmp_path / "absent"], "no such run directory"),
        ([run_dir, "--step", 7], "has no checkpoint of step 7; it has: 25, 40"),
        ([run_dir, "--against", 7], "has no checkpoint of step 7; it has: 25, 40"),
        ([run_dir, "--against", 40], "--against (40) is the analysed step itself"),
        ([run_dir, "--tokens", 15], "--tokens (15) is out of range; needs training.seq_len (16)"),
        ([run_dir, "--ablation-tokens", 1], "--ablation-tokens (1) is out of range; needs 0"),
        ([run_dir, "--ablation-tokens", -1], "--ablation-tokens (-1) is out of range"),
        ([run_dir, "--output", file], f"--output ({file}) is a file"),
        ([run_dir, "--output", tmp_path / "folder"], "analysis.json is a folder"),
        ([run_dir, "--output", run_dir / "checkpoints" / "x"], "lies among the checkpoints"),
        ([run_dir, "--device", "cuda"], "--device cuda, but PyTorch sees no GPU"),
    ):
        assert main([str(argument) for argument in arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_a_dense_model_has_no_experts(tmp_path, capsys):
    changes = {"training.steps": 1, "evaluation.every": 0, "model.feed_forward": "dense"}
    assert run(tmp_path / "run", changes) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no routed layer (model.feed_forward: dense)" in line


def own_run(folder: Path, texts: list[str]) -> Path:
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(text)
    domains = settings(folder)["data"]["domains"]
    domains = [{**domains[0], "files": str(folder / "texts" / "*.txt")}]
    changes = {"training.steps": 1, "evaluation.every": 0, "data.domains": domains}
    assert run(folder / "run", changes) == 0
    return folder / "run"


def test_text_that_changed_is_refused(tmp_path, capsys):
    path = own_run(tmp_path, [f"text {n} " * 40 for n in range(12)])
    assert main([str(path), "--ablation-tokens", "0"]) == 0
    (tmp_path / "texts" / "3.txt").write_text("another text " * 40)
    capsys.readouterr()
    assert main([str(path)]) == 2
    assert "is not what the model was trained with" in capsys.readouterr().err
    for file in (tmp_path / "texts").iterdir():
        file.unlink()
    assert main([str(path)]) == 3


def test_no_validation_text_is_an_error(tmp_path, capsys):
    # One document is all for training.
    path = own_run(tmp_path, ["only one text " * 40])
    capsys.readouterr()
    assert main([str(path)]) == 3
    assert "has no validation text to analyse" in capsys.readouterr().err
