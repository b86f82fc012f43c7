"""What stands in TensorBoard of an evaluation: its numbers, pictures, texts and routes?"""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from metrics_cases import EVALUATED, LAYERS, LOGGED, tag_of, values
from PIL import Image
from training_cases import data, make_config, make_engine

from train.checkpoint import load_checkpoint
from train.engine import load_model
from train.figures import bias_map, co_activation_map, domain_expert_map, load_history, render
from train.probe import ProbeRoutes
from train.validation import evaluate

pytest_plugins = ["metrics_fixtures"]


def test_evaluations_pictures_and_texts_are_at_their_steps(logged):
    _, events, _ = logged
    for tag in (
        "validation/mean_loss",
        "validation/domain/prose",
        "specialisation/repeat_rate/layer01",
    ):
        assert list(values(events, tag)) == EVALUATED
    mean = values(events, "validation/mean_loss")
    prose, sums = (
        values(events, "validation/domain/prose"),
        values(events, "validation/domain/sums"),
    )
    assert all(mean[s] == pytest.approx((prose[s] + sums[s]) / 2, rel=1e-6) for s in EVALUATED)
    for tag, steps in {
        "load/heat_map": [4, 8],
        "router/bias": [4, 8],
        "load/history/layer01": EVALUATED,
        "specialisation/domains/layer01": EVALUATED,
        "specialisation/co_activation/layer02": EVALUATED,
    }.items():
        pictures = events.Images(tag)
        assert [image.step for image in pictures] == steps
        assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in pictures)
    samples = events.Tensors("samples/text_summary")
    assert [sample.step for sample in samples] == EVALUATED
    assert b"sample: 'moss" in samples[0].tensor_proto.string_val[0]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.02" in config and "hidden_size: 16" in config
    tokens = events.Tensors("specialisation/top_tokens/layer01/text_summary")[-1]
    table = tokens.tensor_proto.string_val[0].decode()
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["0", "1", "2", "3"]


def test_specialisation_is_that_of_the_checkpoint_evaluated_again(logged):
    run_dir, events, _ = logged
    config = make_config(run_dir, LOGGED)
    engine = make_engine(config)
    for step in EVALUATED:
        found = load_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
        load_model(engine.model, found.tensors["model"])
        # Its numbers are computed another way in tests/test_validation.py.
        evaluation = evaluate(engine, data(), 4, config.training.seq_len)
        whole = evaluation.tokens_per_expert.sum(0).double()  # (L, E)
        for measure, expected in {
            "load/max_violation_validation": whole.amax(-1) / whole.mean(-1) - 1,
            "load/dead_experts_validation": (whole == 0).sum(-1),
            "load/max_violation_sequence": evaluation.sequence_violation,
            "specialisation/domain_information": evaluation.information,
            "specialisation/domain_information_shuffled": evaluation.shuffled_information,
            "specialisation/domain_divergence": evaluation.divergence,
            "specialisation/repeat_rate": evaluation.repeat_rate,
        }.items():
            for index, layer in enumerate(LAYERS):
                got = values(events, tag_of(measure, layer))[step]
                assert got == pytest.approx(float(expected[index]), rel=1e-5), (measure, step)
            over = values(events, f"{measure}/all_layers")[step]
            worst = expected.max() if measure.startswith("load/") else expected.mean()
            assert over == pytest.approx(float(worst), rel=1e-5)
        for name, loss in evaluation.loss.items():
            assert values(events, f"validation/domain/{name}")[step] == pytest.approx(
                loss, rel=1e-5
            )


def test_routes_of_the_probe_are_compared_between_evaluations(logged):
    run_dir, events, _ = logged
    probe = ProbeRoutes(run_dir / "probe_routes")
    assert probe.steps() == EVALUATED
    for before, step in pairwise(EVALUATED):
        old, new = probe.read(before).numpy(), probe.read(step).numpy()
        assert new.shape == old.shape and new.shape[1:] == (2, 2)
        for index, layer in enumerate(LAYERS):
            same = [len(set(a) & set(b)) for a, b in zip(old[:, index], new[:, index], strict=True)]
            tag = tag_of("router/overlap_with_last_evaluation", layer)
            assert values(events, tag)[step] == pytest.approx(sum(same) / (2 * len(same)))
    first = values(events, "router/overlap_with_last_evaluation/layer01")
    assert list(first) == EVALUATED[1:]


def test_pictures_of_an_evaluation_are_of_its_numbers(logged):
    run_dir, events, steps = logged
    config = make_config(run_dir, LOGGED)
    engine = make_engine(config)
    found = load_checkpoint(run_dir / "checkpoints" / "step_00000006")
    load_model(engine.model, found.tensors["model"])
    evaluation = evaluate(engine, data(), 4, config.training.seq_len)
    biases = torch.stack(
        [found.tensors["model"][f"blocks.{n}.feed_forward.router.expert_bias"] for n in LAYERS]
    )
    assert biases.abs().max() > 0

    def pixels(tag, step):
        (image,) = (each for each in events.Images(tag) if each.step == step)
        picture = Image.open(io.BytesIO(image.encoded_image_string))
        return np.asarray(picture.convert("RGB"))

    history = torch.stack([metrics.tokens_per_expert for metrics in steps[:6]])
    for index, layer in enumerate(LAYERS):
        counts = evaluation.tokens_per_expert[:, index : index + 1]
        for tag, figure in {
            "specialisation/domains": domain_expert_map(counts, data().domain_names, (layer,)),
            "specialisation/co_activation": co_activation_map(
                evaluation.co_activation[index], layer
            ),
            "load/history": load_history(history[:, index], tuple(range(7)), layer),
        }.items():
            # Which colour is where in them: tests/test_figures.py.
            assert np.array_equal(pixels(tag_of(tag, layer), 6), render(figure)), tag
    bias = load_checkpoint(run_dir / "checkpoints" / "step_00000004").tensors["model"]
    biases = [bias[f"blocks.{layer}.feed_forward.router.expert_bias"] for layer in LAYERS]
    expected = render(bias_map(torch.stack(biases), LAYERS))
    assert np.array_equal(pixels("router/bias", 4), expected)
