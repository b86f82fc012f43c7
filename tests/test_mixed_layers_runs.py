"""Does a whole run of a model whose layers differ draw, record, replay and analyse each layer?"""

import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mixed_cases import CHOICES, EXPERTS, choices, scalars_by_hand
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import CHROMIUM, SECTIONS, page_in_browser
from training_cases import MIXED, NUM_STEPS, Recorder, bits, checkpoint, different, run, same_steps

import train.loop
from train.analyze import main as analyze
from train.report import describe
from train.route_files import open_recording

LOGGED = {
    "logging.tensorboard": True,
    "logging.heatmap_every": 4,
    "evaluation.sample_prompts": ["moss"],
    "evaluation.sample_tokens": 3,
    "checkpoint.every": 4,
    "checkpoint.keep_last": 2,
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A run with pictures, two evaluations and a recording of its routes."""
    run_dir = tmp_path_factory.mktemp("mixed") / "run"
    recording = {"routes.record": str(run_dir.parent / "routes")}
    assert run(run_dir, MIXED | LOGGED | recording) == 0
    return run_dir


def test_pictures_and_histograms_are_of_real_experts(logged):
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(logged / "tensorboard"), size_guidance=dict.fromkeys(kinds, 0))
    events.Reload()
    for layer, number in enumerate(EXPERTS):
        shares = events.Histograms(f"load/share/layer{layer:02d}")
        assert [each.histogram_value.num for each in shares] == [number] * 2
        logits = events.Histograms(f"router/logits/layer{layer:02d}")[-1].histogram_value
        assert logits.num == number * 64
    # One expert a token has no pairs.
    pictures = {tag for tag in events.Tags()["images"] if "co_activation" in tag}
    assert pictures == {f"specialisation/co_activation/layer{layer:02d}" for layer in (1, 2)}
    for tag in events.Tags()["images"]:
        for image in events.Images(tag):
            assert Image.open(io.BytesIO(image.encoded_image_string)).size[0] > 100
    for layer, number in enumerate(EXPERTS):
        tag = f"specialisation/top_tokens/layer{layer:02d}/text_summary"
        (text,) = events.Tensors(tag)[-1].tensor_proto.string_val
        numbers = [line.split()[0] for line in text.decode().splitlines()[1:] if line.strip()]
        assert [each for each in numbers if each.isdigit()] == [str(e) for e in range(number)]
    assert events.Scalars("health/dead_experts")[-1].value <= sum(EXPERTS)
    assert (logged / "domain_expert_map.png").stat().st_size > 0
    summary = json.loads((logged / "summary.json").read_text())
    for row, number in zip(summary["layers"], EXPERTS, strict=True):
        assert 1 <= row["effective_experts"] <= number + 1e-4 and row["dead_experts"] < number


def test_before_any_step_has_counted_the_dead_are_the_experts_that_there_are(tmp_path, monkeypatch):
    real_step = train.loop.train_step

    def first_is_skipped(*arguments, **options):
        metrics = real_step(*arguments, **options)
        return metrics._replace(skipped=metrics.step == 1)

    monkeypatch.setattr(train.loop, "train_step", first_is_skipped)
    changes = MIXED | {"logging.tensorboard": True, "training.steps": 2, "evaluation.every": 0}
    assert run(tmp_path / "run", changes) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Scalars("health/dead_experts")[0].value == sum(EXPERTS)
    assert events.Scalars("health/dead_experts")[1].value < sum(EXPERTS)


def test_recorded_routes_are_replayed_bit_by_bit(logged, tmp_path):
    routes = logged.parent / "routes"
    recording = open_recording(routes, "routes.replay")
    assert recording.header.routes["model"]["num_experts"] == list(EXPERTS)
    assert recording.header.routes["model"]["top_k"] == list(CHOICES)
    stored = recording.read(0, 0, 4)  # (B, L, S, K)
    for layer, (number, chosen) in enumerate(zip(EXPERTS, CHOICES, strict=True)):
        assert (stored[:, layer, :, chosen:] == -1).all()
        own = stored[:, layer, :, :chosen]
        assert own.min() >= 0 and own.max() < number
    with Recorder() as recorder:
        assert run(tmp_path / "free", MIXED) == 0
    with Recorder() as replayed:
        assert run(tmp_path / "replayed", MIXED | {"routes.replay": str(routes)}) == 0
    assert len(recorder.steps) == NUM_STEPS and same_steps(recorder.steps, replayed.steps)
    a, b = (bits(checkpoint(tmp_path / name).tensors) for name in ("free", "replayed"))
    assert different(a, b) == []


def test_a_recording_that_names_another_layers_experts_is_refused(logged, tmp_path, capsys):
    folder = shutil.copytree(logged.parent / "routes", tmp_path / "foreign")
    recording = open_recording(folder, "routes.replay")
    share = recording.read(0, 0, 4).copy()
    share[0, 0, 0, 0] = 5
    recording.write(0, 0, share)
    assert run(tmp_path / "run", MIXED | {"routes.replay": str(folder)}) == 3
    assert "layer 0, names experts from" in capsys.readouterr().err


def test_experts_that_cost_nothing_are_counted_behind_each_layers_own(tmp_path):
    """Evaluated and logged too."""
    costless = {f"model.moe.num_{kind}_experts": 1 for kind in ("zero", "copy", "constant")}
    running = {"model.moe.losses": [{"name": "load_balancing", "accumulation": "running"}]}
    changes = MIXED | LOGGED | costless | running | {"routes.record": str(tmp_path / "routes")}
    with Recorder() as recorder:
        assert run(tmp_path / "run", changes) == 0
    recording = open_recording(tmp_path / "routes", "routes.replay")
    assert recording.header.routes["model"]["num_experts"] == [each + 3 for each in EXPERTS]
    beyond = 0
    for step, metrics in enumerate(recorder.steps):
        stored = recording.read(step, 0, 4)  # (B, L, S, K)
        for layer, number in enumerate(EXPERTS):
            chosen = torch.from_numpy(stored[:, layer].astype(np.int64))
            load = choices(chosen, number + 3)
            absent = [-2] * (max(EXPERTS) - number)  # -1 of each of two passes
            assert metrics.tokens_per_expert[layer].tolist() == [*load, *absent]
            beyond += load[number:].sum()
    assert beyond > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for row, number in zip(summary["layers"], EXPERTS, strict=True):
        assert 1 <= row["effective_experts"] <= number + 3 + 1e-4


@pytest.fixture(scope="module")
def analysed(logged) -> Path:
    """The folder of an analysis of the run."""
    output = logged.parent / "analysis"
    arguments = [str(logged), "--output", str(output), "--against", "4"]
    assert analyze([*arguments, "--ablation-tokens", "64"]) == 0
    return output


def test_an_analysis_has_each_layers_own_experts(analysed):
    found = json.loads((analysed / "analysis.json").read_text())
    assert "4 / 8 / 6 experts, top-1 / 2 / 3" in describe(found)
    rows = pq.read_table(analysed / "routes.parquet").to_pylist()
    for layer, (number, chosen) in enumerate(zip(EXPERTS, CHOICES, strict=True)):
        mine = [row for row in rows if row["layer"] == layer]
        assert all(row["experts"][chosen:] == [-1] * (3 - chosen) for row in mine)
        assert all(row["weights"][chosen:] == [0.0] * (3 - chosen) for row in mine)
        taken = np.array([row["experts"][:chosen] for row in mine])
        load = np.bincount(taken.ravel(), minlength=number)
        assert np.sum([domain[layer] for domain in found["load"]], 0).tolist() == load.tolist()
        numbers = found["layers"][layer]
        assert (numbers["num_experts"], numbers["top_k"]) == (number, chosen)
        expected = scalars_by_hand([load])
        for measure in expected.keys() & numbers.keys():
            assert numbers[measure] == pytest.approx(expected[measure][0], rel=1e-6, abs=1e-9)
        pairs = found["co_activation_counts"][layer]
        if chosen == 1:
            assert pairs is None
        else:
            together = np.zeros((number, number), int)
            for experts in taken:
                for i, j in itertools.product(experts, experts):
                    together[i, j] += 1
            assert pairs == together.tolist()
        for role in ("input", "next", "predicted"):
            assert len(found["vocabulary"]["top_tokens"][role][layer]) == number
        assert len(found["ablation"]["rise"][layer]) == number
        assert len(found["ablation"]["assignments"][layer]) == number
    for top in found["ablation"]["top_experts"]:
        rise = found["ablation"]["rise"][top["layer"]][top["expert"]]
        assert top["rise"] == rise
    ranked = sorted(itertools.chain(*found["ablation"]["rise"]), reverse=True)
    assert [top["rise"] for top in found["ablation"]["top_experts"]] == ranked[:10]
    assert found["saturation"]["training"]["overlap"][-1] == [1.0] * 3


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_report_draws_every_section(analysed, tmp_path):
    seen = page_in_browser(tmp_path, (analysed / "report.html").read_text(encoding="utf-8"))
    assert seen.count("<section") == SECTIONS
    for told in ("4 / 8 / 6", "1 / 2 / 3", "topk / hash / topk"):
        assert f"<b>{told}</b>" in seen
    drawn = seen.split("<section", 1)[1].split("<script", 1)[0]
    assert "NaN" not in drawn and "undefined" not in drawn
    assert '<div class="reading"><span' in seen
