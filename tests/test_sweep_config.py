"""The arms of a sweep: how settings are merged, which arms are refused, what a dense arm costs."""

import copy
import json
from pathlib import Path

import pytest
from training_cases import settings

from train.errors import ConfigError
from train.sweep_config import load_sweep, merge_settings

CHANGES = {"training.steps": 4, "training.micro_batch_size": None, "evaluation.every": 2}


def write(tmp_path: Path, arms, changes=None, **top) -> Path:
    """The tiny run's YAML as a sweep."""
    path = tmp_path / "sweep.yaml"
    values = settings(tmp_path / "out", {**CHANGES, **(changes or {})})
    path.write_text(json.dumps({**values, **top, "arms": arms}))
    return path


def problems(path: Path, *overrides: str, only=()) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_sweep(path, overrides, only)
    return str(error.value).split("\n")


@pytest.mark.parametrize(
    ("shared", "changes", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": 1}, {"d": {"e": 2}}, {"a": 1, "d": {"e": 2}}),
        # A variant keeps its settings as long as it is the same one.
        (
            {"router": {"name": "topk", "jitter": 0.1}},
            {"router": {"top_k": 1}},
            {"router": {"name": "topk", "jitter": 0.1, "top_k": 1}},
        ),
        (
            {"router": {"name": "topk", "jitter": 0.1}},
            {"router": {"name": "hash"}},
            {"router": {"name": "hash"}},
        ),
        (
            {"router": "topk"},
            {"router": {"top_k": 1}},
            {"router": {"name": "topk", "top_k": 1}},
        ),
        ({"losses": [{"name": "a"}, {"name": "b"}]}, {"losses": []}, {"losses": []}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
    ],
)
def test_settings_of_an_arm_are_laid_over_the_shared_ones(shared, changes, merged):
    before = copy.deepcopy((shared, changes))
    assert merge_settings(shared, changes) == merged
    assert (shared, changes) == before


def test_arms_have_their_settings_and_the_command_line_wins_in_all(tmp_path):
    arms = {
        "one": None,
        "two": {"model": {"moe": {"router": {"top_k": 1, "normalize": False}}}},
        "three": {"optimizer": {"learning_rate": 0.5}, "model": {"num_layers": 3}},
    }
    sweep = load_sweep(write(tmp_path, arms), ["model.hidden_size=32"])
    assert list(sweep.arms) == ["one", "two", "three"] and sweep.baseline == "one"
    assert [config.model.hidden_size for config in sweep.arms.values()] == [32] * 3
    assert [config.model.top_k for config in sweep.arms.values()] == [2, 1, 2]
    assert sweep.arms["two"].model.moe.router.jitter == 0.2
    assert sweep.arms["three"].optimizer.learning_rate == 0.5
    with_rate = load_sweep(write(tmp_path, arms), ["optimizer.learning_rate=0.25"])
    assert {config.optimizer.learning_rate for config in with_rate.arms.values()} == {0.25}


def test_some_arms_can_be_chosen_with_the_baseline_among_them(tmp_path):
    arms = {"a": {}, "b": {"model": {"num_layers": 1}}, "c": {"model": {"num_layers": 3}}}
    path = write(tmp_path, arms, baseline="b")
    sweep = load_sweep(path, only=["c", "b"])
    assert list(sweep.arms) == ["b", "c"] and sweep.baseline == "b" and not sweep.whole
    assert load_sweep(path).whole and load_sweep(path, only=["c", "a", "b"]).whole
    (line,) = problems(path, only=["a", "c"])
    assert "--arms (a,c) must name the baseline (b)" in line
    (line,) = problems(path, only=["a", "z"])
    assert line == "--arms: no arm z; there are: a, b, c"


def test_an_arm_that_is_the_baseline_is_refused(tmp_path):
    arms = {"a": {}, "same": {"model": {"num_layers": 2}}, "b": {"model": {"num_layers": 3}}}
    (line,) = problems(write(tmp_path, arms))
    assert line.startswith("arm same: its settings are those of the baseline (a), so every ")
    (line,) = problems(write(tmp_path, arms | {"same": {"logging": {"every": 3}}}))
    assert line.startswith("arm same: its settings are those of the baseline (a), so every ")
    (line,) = problems(write(tmp_path, arms), "model.num_layers=1", only=["a", "b"])
    assert line.startswith("arm b: its settings are those of the baseline (a), so every ")


def test_all_mistakes_are_told_at_once_each_with_its_arm(tmp_path):
    arms = {
        "good": {},
        "top9": {"model": {"moe": {"router": {"top_k": 9}}}},
        "typo": {"model": {"moe": {"routr": {}}}, "optimizer": {"learning_rate": -1}},
        "late": {"model": {"moe": {"router": {"name": "expert_choice"}}}},
    }
    found = problems(write(tmp_path, arms))
    assert [line.split(":")[0] for line in found] == [
        "arm top9", "arm typo", "arm typo", "arm late",
    ]  # fmt: skip
    assert "model.moe.router.top_k (9) must not exceed" in found[0]
    assert any("did you mean model.moe.router?" in line for line in found[1:3])
    assert any("optimizer.learning_rate" in line for line in found[1:3])
    assert "set model.moe.allow_non_causal: true" in found[3]


def test_a_mistake_that_all_arms_share_is_told_once_and_without_an_arm(tmp_path):
    path = write(tmp_path, {"a": {}, "b": {}}, {"model.num_layers": -1})
    (line,) = problems(path)
    assert line.startswith(f"{path}: model.num_layers: got -1")
    (line,) = problems(write(tmp_path, {"a": {}, "b": {}}, {"evaluation.every": 0}))
    assert line.startswith("evaluation.every (0) must lie between 0 and the run's steps (4)")


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"data": {"validation_fraction": 0.3}}, "data.validation_fraction"),
        ({"data": {"domains": [{"name": "python", "corpus": "python"}]}}, "data.domains"),
        ({"tokenizer": {"kind": "bpe", "vocab_size": 300}}, "tokenizer.kind"),
        ({"training": {"steps": 5}}, "tokens of the run"),
        ({"training": {"seq_len": 8, "batch_size": 8}}, "training.seq_len"),
        ({"evaluation": {"batch_size": 2}}, "evaluation.batch_size"),
        ({"seed": 3}, "seed"),
        ({"output_dir": "elsewhere"}, "output_dir"),
    ],
)
def test_arms_that_would_not_be_pairs_are_refused(tmp_path, changes, setting):
    found = problems(write(tmp_path, {"a": {}, "other": changes}))
    assert any(line.startswith(f"arm other: {setting}") for line in found)
    assert all("must be the same in all arms" in line for line in found)


def test_another_batch_at_the_same_tokens_is_a_pair(tmp_path):
    smaller = {"training": {"batch_size": 2, "steps": 8}}
    assert load_sweep(write(tmp_path, {"a": {}, "smaller": smaller})).arms["smaller"].num_steps == 8


@pytest.mark.parametrize(
    ("arms", "top", "message"),
    [
        (None, {}, "arms: got null; needs two arms or more"),
        ({"one": {}}, {}, "arms: got settings; needs two arms or more"),
        ({"a": {}, "b": 3}, {}, "arms.b: got 3; needs settings, or {}"),
        ({"a": {}, "../b": {}}, {}, "got '../b'; needs a name of letters"),
        ({"a": {}, "b": {}}, {"baseline": "c"}, "baseline: got 'c'; needs one of the arms: a, b"),
        ({"a": {}, "b": {}}, {"routes": {"record": "x"}}, "routes has no effect in a sweep"),
        ({"a": {}, "b": {}}, {"parallel": {"zero_stage": 2}}, "parallel has no effect"),
        ({"a": {}, "b": {}}, {"deepspeed": {"x": 1}}, "deepspeed has no effect"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, arms, top, message):
    (line,) = problems(write(tmp_path, arms, **top))
    assert message in line


WIDE = {"num_experts": 8, "intermediate_size": 24, "router": {"name": "topk", "top_k": 3}}


def test_a_dense_arm_has_the_flops_of_the_baseline_whatever_the_shared_settings(tmp_path):
    arms = {"wide": {"model": {"moe": WIDE}}, "dense": {"model": {"feed_forward": "dense"}}}
    dense = load_sweep(write(tmp_path, arms)).arms["dense"].model
    # 3 matrices of D x F: 3 experts of 24, and the router's 8 rows of D, a third of a matrix each.
    assert not dense.moe_layers and dense.dense_intermediate_size == 3 * 24 + round(8 / 3)


def test_a_dense_baseline_has_the_flops_of_the_shared_settings(tmp_path):
    arms = {"dense": {"model": {"feed_forward": "dense"}}, "wide": {"model": {"moe": WIDE}}}
    dense = load_sweep(write(tmp_path, arms)).arms["dense"].model
    assert dense.dense_intermediate_size == 2 * 16 + round(4 / 3)


def test_a_dense_arm_may_have_a_width_of_its_own(tmp_path):
    own = {"model": {"feed_forward": "dense", "moe": {"dense_intermediate_size": 40}}}
    dense = load_sweep(write(tmp_path, {"a": {}, "own": own})).arms["own"].model
    assert dense.dense_intermediate_size == 40
