"""Are the settings of a run what its YAML and the command line say, and does a printed config
reproduce it? `tests/test_config_errors.py` has the mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from config_cases import errors_of, load
from hypothesis import given, settings
from hypothesis import strategies as st

from train.arguments import parse_arguments
from train.config import RunConfig, config_from_dict, dump_config, load_config
from train.errors import ConfigError
from train.sweep_config import load_sweep
from train.yaml_text import YAMLTextError, read_yaml, write_yaml

ROOT = Path(__file__).parents[1]


def test_micro_batches_are_shared_between_ranks():
    def of(world_size: int, **training: int | None) -> int:
        return config_from_dict({"training": training}).micro_batches_per_rank(world_size)

    assert of(1, batch_size=16, micro_batch_size=4) == 4
    assert of(2, batch_size=16, micro_batch_size=4) == 2
    assert of(4, batch_size=16, micro_batch_size=4) == 1
    assert of(4, batch_size=16) == 1
    with pytest.raises(ConfigError) as caught:
        of(3, batch_size=16, micro_batch_size=4)
    assert str(caught.value) == (
        "training.batch_size (16) must be a multiple of training.micro_batch_size (4) times the "
        "number of ranks (3); set training.batch_size to 12, lower training.micro_batch_size or "
        "start another number of ranks"
    )
    with pytest.raises(ConfigError) as caught:
        of(32, batch_size=16)
    assert str(caught.value) == (
        "training.batch_size (16) must be a multiple of the number of ranks (32); set "
        "training.batch_size to 32, or start another number of ranks"
    )


def test_more_threads_than_cores_are_refused_where_the_run_is_started(run_in, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert load("training: {threads: 4}").training.threads == 4
    assert errors_of("seed: 1", "training.threads=5") == [
        "command line: training.threads (5) must be at most the CPU cores of this machine (4);"
        " lower it, or leave it out"
    ]
    # Of a checkpoint from a larger machine, the model can be read all the same.
    assert config_from_dict({"training": {"threads": 64}}).training.threads == 64


def test_numbers_and_words_are_read_as_yaml_1_2_reads_them():
    expected = {
        "3e-4": 3e-4, "1e9": 1e9, "1E+3": 1000.0, "-.5": -0.5, "1.": 1.0, "12": 12, "-3": -3,
        "010": 10, "0o17": 15, "0xff": 255, ".inf": float("inf"), "-.INF": float("-inf"),
        "true": True, "False": False, "null": None, "~": None, "": None,
        "off": "off", "on": "on", "yes": "yes", "No": "No", "y": "y",
        "1:30": "1:30", "2024-01-01": "2024-01-01", "1_000": "1_000", "0b1": "0b1", "e5": "e5",
        "'3e-4'": "3e-4", "'true'": "true", "=": "=",
    }  # fmt: skip
    for text, value in expected.items():
        found = read_yaml(f"key: {text}")["key"]
        assert found == value and type(found) is type(value), text


def test_numbers_are_taken_from_file_and_command_line(run_in):
    config = load("optimizer: {learning_rate: 3e-4}\ntraining: {tokens: 1e9}", "optimizer.eps=1e-6")
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.eps == 1e-6
    assert config.training.tokens == 1_000_000_000
    assert type(config.training.tokens) is int


def test_off_stays_text_where_text_is_wanted_and_switches_off_a_flag(run_in):
    config = load("output_dir: off\nlogging: {tensorboard: off}")
    assert config.output_dir == "off"
    assert config.logging.tensorboard is False


def test_overrides_reach_variants_and_lists_that_the_file_does_not_mention(run_in):
    config = load(
        "seed: 3",
        "--local_rank=1",
        "model.moe.router.top_k=4",
        "model.moe.losses.0.weight=0.5",
        "training.steps=7",
        "training.steps=8",
    )
    assert config.seed == 3
    assert config.model.moe.router.top_k == 4
    assert config.model.moe.losses[0].name == "load_balancing"
    assert config.model.moe.losses[0].weight == 0.5
    assert config.model.moe.losses[1] == RunConfig().model.moe.losses[1]
    assert config.training.steps == 8


def test_an_override_of_a_bare_variant_name_keeps_the_variant(run_in):
    config = load("model: {moe: {losses: [router_z_loss]}}", "model.moe.losses.0.weight=0.5")
    assert config.model.moe.losses[0].name == "router_z_loss"
    assert config.model.moe.losses[0].weight == 0.5


def test_length_defaults_to_steps_and_tokens_round_up(run_in):
    assert RunConfig().num_steps == 1000
    config = load("training: {tokens: 1025, seq_len: 64, batch_size: 4}")
    assert (config.tokens_per_step, config.num_steps) == (256, 5)
    assert load("training: {steps: 10}", "training.steps=null", "training.tokens=1").num_steps == 1


def test_merge_keys_are_not_repeated_keys(run_in):
    config = load("model: {<<: {num_layers: 2}, hidden_size: 64}")
    assert (config.model.num_layers, config.model.hidden_size) == (2, 64)


def test_printed_config_is_complete_and_loads_back_equal(run_in):
    config = load("seed: 5", "model.moe.router.top_k=3", "evaluation.sample_prompts=[off, '3e-4']")
    text = dump_config(config)
    assert load(text) == config
    assert dump_config(load(text)) == text
    # A reader of YAML 1.1 finds the same settings.
    assert config_from_dict(yaml.safe_load(text)) == config
    assert list(read_yaml(text)) == list(RunConfig.model_fields)


CHOICE = "model: {moe: {allow_non_causal: true, router: {name: expert_choice}, losses: []}}"
NOTES = {
    "seed: 1": [],
    CHOICE: [
        "# model.moe.router.name expert_choice breaks these rules of moe/router.py: causal, "
        "independent, divisible, fixed_k"
    ],
    "model: {moe: {router: {name: hash}, capacity_factor: 1.25}}": [
        "# model.moe.router.name hash breaks these rules of moe/router.py: permutes_experts",
        "# model.moe.drop_priority position breaks these rules of moe/router.py: independent, "
        "divisible, permutes_tokens, fixed_k",
    ],
    "model: {moe: {layers: [{layers: [1], router: {name: top_p}}]}}": [
        "# model.moe.layers.0.router.name top_p breaks these rules of moe/router.py: fixed_k"
    ],
    CHOICE.replace("moe:", "feed_forward: dense, moe:"): [],
}


@pytest.mark.parametrize("yaml_text", NOTES)
def test_a_printed_config_says_which_rules_its_routing_breaks(run_in, yaml_text):
    config = load(yaml_text)
    text = dump_config(config)
    assert [line for line in text.splitlines() if line.startswith("#")] == NOTES[yaml_text]
    assert load(text) == config


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(
    rate=st.floats(1e-12, 1e12),
    seed=st.integers(0, 2**63 - 1),
    prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
    clip=st.none() | st.floats(1e-6, 1e6),
    tensorboard=st.booleans(),
)
def test_any_config_survives_printing_and_loading(rate, seed, prompts, clip, tensorboard):
    config = config_from_dict(
        {
            "seed": seed,
            "optimizer": {"learning_rate": rate, "gradient_clip": clip},
            "evaluation": {"sample_prompts": prompts},
            "logging": {"tensorboard": tensorboard},
        }
    )
    assert config_from_dict(read_yaml(dump_config(config))) == config


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.text(st.sampled_from("0123456789eE.+-_xobftnyTNaulrse~:<='\" "), max_size=8))
def test_any_text_is_written_so_that_it_stays_text(text):
    assert read_yaml(write_yaml({"key": text})) == {"key": text}


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.text(st.sampled_from("ab:-[]{}!&*#|>%@`'\",? \n\t\x000e"), max_size=30))
def test_any_text_is_read_or_refused_with_lines(text):
    try:
        read_yaml(text)
    except YAMLTextError as error:
        assert error.problems and all("\n" not in line for line in error.problems)


def test_arguments_are_split_into_options_and_overrides():
    options, overrides = parse_arguments(
        ["--local_rank=0", "seed=1", "--config", "x.yaml", "a.b=-1", "--dry-run", "c.0.d=[1, 2]"],
        "Trains.",
    )
    assert vars(options) == {"config": "x.yaml", "print_config": False, "dry_run": True}
    assert overrides == ["seed=1", "a.b=-1", "c.0.d=[1, 2]"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a=1"], "the following arguments are required: --config"),
        (["--config", "x", "--seed=1"], "--seed=1: unknown option"),
        (
            ["--config", "x", "--training.steps=3"],
            "--training.steps=3: write a setting without dashes, training.steps=VALUE",
        ),
    ],
)
def test_arguments_that_cannot_be_give_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments, "Trains.")
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.endswith(f": {line} (--help shows examples)\n") and printed.count("\n") == 1


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"], "Trains a model.")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "Trains a model." in printed and "model.moe.router.top_k=4" in printed


def test_loading_a_config_is_quick_to_import():
    """A misspelt key is answered at once: no data or tokenizer library is imported for it."""
    code = (
        "import sys, train.config; print(sorted({'datasets', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


SHIPPED = sorted(ROOT.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_opens_with_its_question_and_cost(path):
    load = load_sweep if path.parent.name == "ablations" else load_config
    load(path)
    first, second, *_ = path.read_text().split("\n")
    assert first.startswith("# ") and second.startswith("# ")
