"""Does each mistake in a config give one clear line, and does a printed one reproduce the run?"""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.variants import variant_names
from train.arguments import parse_arguments
from train.config import RunConfig, config_from_dict, dump_config, load_config
from train.config_errors import known_settings
from train.errors import ConfigError
from train.sweep_config import load_sweep
from train.yaml_text import YAMLTextError, read_yaml, write_yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_in(tmp_path, monkeypatch):
    """Work in an empty directory, so that errors name `x.yaml` alone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Any:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load_config("x.yaml", overrides)


def errors_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")


# Each mistake: the YAML, the overrides, and all lines that the user reads.
MISTAKES = {
    "misspelt key of a variant": (
        "model: {moe: {router: {name: topk, topk: 4}}}",
        [],
        ["x.yaml: model.moe.router.topk: unknown key (did you mean model.moe.router.top_k?)"],
    ),
    "misspelt key of a section": (
        "model: {hiden_size: 64}",
        [],
        ["x.yaml: model.hiden_size: unknown key (did you mean model.hidden_size?)"],
    ),
    "dashes in a key": (
        "optimizer: {learning-rate: 1}",
        [],
        ["x.yaml: optimizer.learning-rate: unknown key (did you mean optimizer.learning_rate?)"],
    ),
    "key in the wrong section": (
        "top_k: 4",
        [],
        ["x.yaml: top_k: unknown key (did you mean model.moe.router.top_k?)"],
    ),
    "key like no other": (
        "optimizer: {lr: 1}",
        [],
        [
            "x.yaml: optimizer.lr: unknown key (there are: name, learning_rate, betas, eps,"
            " weight_decay, gradient_clip)"
        ],
    ),
    "misspelt key in a list, from the command line": (
        "seed: 1",
        ["model.moe.losses.0.wight=1"],
        [
            "command line: model.moe.losses.0.wight: unknown key"
            " (did you mean model.moe.losses.0.weight?)"
        ],
    ),
    "value that is not a choice": (
        "model: {attention: {qk_norm: heads}}",
        [],
        ["x.yaml: model.attention.qk_norm: got 'heads'; allowed: 'none', 'head', 'projection'"],
    ),
    "two mistakes at once": (
        "model: {attention: {qk_norm: heads}, moe: {router: {name: topk, topk: 4}}}",
        ["training.batch_size=0"],
        [
            "x.yaml: model.attention.qk_norm: got 'heads'; allowed: 'none', 'head', 'projection'",
            "x.yaml: model.moe.router.topk: unknown key (did you mean model.moe.router.top_k?)",
            "command line: training.batch_size: got 0; needs at least 1",
        ],
    ),
    "unknown variant": (
        "model: {moe: {losses: [load_balance]}}",
        [],
        [
            "x.yaml: model.moe.losses.0: no file load_balance.py in moe/losses"
            " (did you mean load_balancing?); there are: " + ", ".join(variant_names("losses"))
        ],
    ),
    "variant that refuses the settings of the one it replaces": (
        "model: {moe: {losses: [{name: load_balancing, weight: 0.5, scope: sequence}]}}",
        ["model.moe.losses.0.name=router_z_loss"],
        [
            "command line: model.moe.losses.0.name: changes load_balancing to router_z_loss, which"
            " has no setting scope (set for load_balancing); replace all of it:"
            " 'model.moe.losses.0={name: router_z_loss, weight: 0.5}'"
        ],
    ),
    "text for a whole number": (
        "training: {seq_len: long}",
        [],
        ["x.yaml: training.seq_len: got 'long'; needs a whole number"],
    ),
    "true for a stage": (
        "parallel: {zero_stage: true}",
        [],
        ["x.yaml: parallel.zero_stage: got true; needs a number"],
    ),
    "true for a whole number": (
        "training: {steps: true}",
        [],
        ["x.yaml: training.steps: got true; needs a whole number"],
    ),
    "fraction for a whole number": (
        "training: {steps: 1.5}",
        [],
        ["x.yaml: training.steps: got 1.5; needs a whole number"],
    ),
    "number for text": (
        "output_dir: 2024",
        [],
        ["x.yaml: output_dir: got 2024; needs text (put it in quotes)"],
    ),
    "infinite rate": (
        "optimizer: {learning_rate: .inf}",
        [],
        ["x.yaml: optimizer.learning_rate: got inf; needs a finite number"],
    ),
    "an entry of a list": (
        "model: {moe: {layers: [{layers: [-1], num_experts: 4}]}}",
        [],
        ["x.yaml: model.moe.layers.0.layers.0: got -1; needs at least 0"],
    ),
    "too few entries": (
        "optimizer: {betas: [0.9]}",
        [],
        ["x.yaml: optimizer.betas.1: missing; the list needs more entries"],
    ),
    "section without settings": (
        "schedule:",
        [],
        ["x.yaml: schedule: got null; needs settings (`key: value`)"],
    ),
    "section that is a list": (
        "training: [1, 2]",
        [],
        ["x.yaml: training: got a list of 2; needs settings (`key: value`)"],
    ),
    "key that is a number": (
        "1: 2",
        [],
        ["x.yaml: 1: got 1; needs a setting's name as text"],
    ),
    "batch not divisible": (
        "training: {batch_size: 16, micro_batch_size: 5}",
        [],
        ["x.yaml: training.batch_size (16) must be a multiple of training.micro_batch_size (5)"],
    ),
    "two lengths, one of them from the command line": (
        "training: {steps: 10}",
        ["training.tokens=1e6"],
        [
            "command line: training.steps (10) and training.tokens (1000000) both set the length;"
            " give one and leave the other out or null"
        ],
    ),
    "warm-up longer than the run": (
        "schedule: {warmup_steps: 100}",
        ["training.steps=2"],
        [
            "command line: schedule.warmup_steps (100) must be below training.steps (2);"
            " null takes a tenth of the steps"
        ],
    ),
    "warm-up and decay overlap": (
        "schedule: {name: wsd, warmup_steps: 60, decay_fraction: 0.5}\ntraining: {steps: 100}",
        [],
        [
            "x.yaml: schedule.warmup_steps (60) and schedule.decay_fraction (0.5, 50 steps)"
            " must fit into training.steps (100)"
        ],
    ),
    "no domains, from the command line": (
        "seed: 1",
        ["data.domains=[]"],
        ["command line: data.domains (0) needs 1 to 4096 domains"],
    ),
    "more experts a token than there are": (
        "model: {moe: {num_experts: 8, router: {name: topk, top_k: 9}}}",
        [],
        ["x.yaml: model.moe.router.top_k (9) must not exceed model.moe.num_experts (8)"],
    ),
    "setting without effect": (
        "schedule: {name: constant, final_fraction: 0.5}",
        [],
        [
            "x.yaml: schedule.final_fraction (0.5) has no effect with schedule.name constant;"
            " leave it out or use wsd or cosine"
        ],
    ),
    "too many entries": (
        "optimizer: {betas: [0.9, 0.9, 0.9]}",
        [],
        ["x.yaml: optimizer.betas: got a list of 3; needs at most 2 entries"],
    ),
    "a variant's check": (
        "model: {moe: {router: {name: topk, top_k: 1}}}",
        [],
        [
            "x.yaml: model.moe.router.normalize (true) with model.moe.router.top_k (1) makes every"
            " weight 1, so the router would get no gradient; set normalize: false or top_k of at"
            " least 2"
        ],
    ),
    "a check in a list": (
        "data: {domains: [{corpus: python}, {corpus: nothing}]}",
        [],
        [
            "x.yaml: data.domains.1.corpus (nothing) must be one of python, cpp, sympy,"
            " stdlib_tests, speeches_ko, speeches_en, legal, apidocs, drama, scripture"
        ],
    ),
    "one loss twice": (
        "model: {moe: {losses: [router_z_loss, router_z_loss]}}",
        [],
        ["x.yaml: model.moe.losses names router_z_loss twice; keep one line"],
    ),
    "sizes of another world": (
        "training: {seq_len: 1e12}\nmodel: {hidden_size: 2147483648}",
        ["training.steps=1e28"],
        [
            "x.yaml: model.hidden_size (2147483648) must be at most 2,147,483,647",
            "command line: training.steps (9999999999999999583119736832) must be at most"
            " 2,147,483,647",
            "x.yaml: training.seq_len (1000000000000) must be at most 2,147,483,647",
        ],
    ),
    "more layers than could be listed": (
        "seed: 1",
        ["model.num_layers=1e12"],
        ["command line: model.num_layers (1000000000000) must be at most 10,000"],
    ),
    "a forward of too many tokens": (
        "training: {seq_len: 1e9, micro_batch_size: 4}\nevaluation: {batch_size: 1}",
        [],
        [
            "x.yaml: training.micro_batch_size (4) times training.seq_len (1000000000) is"
            " 4,000,000,000 tokens a forward, must be at most 2,147,483,647; lower one of them"
        ],
    ),
    "tokens for more steps than can be counted": (
        "training: {tokens: 9e18, seq_len: 1, batch_size: 1}",
        [],
        [
            "x.yaml: training.tokens (9000000000000000000) is 9,000,000,000,000,000,000 steps of 1"
            " tokens, must be at most 2,147,483,647 steps; lower it or raise training.batch_size"
            " (1)"
        ],
    ),
    "more tokens than can be counted": (
        "training: {steps: 2e9, seq_len: 1e6, batch_size: 1e9, micro_batch_size: 1}",
        [],
        [
            "x.yaml: training.steps (2000000000) of training.batch_size (1000000000) times"
            " training.seq_len (1000000) tokens is beyond 9,223,372,036,854,775,807 tokens; lower"
            " one of them"
        ],
    ),
    "numbers that float32 cannot hold": (
        "optimizer: {eps: 1e-300, learning_rate: 1e39}",
        [],
        [
            "x.yaml: optimizer.learning_rate (1e+39) is beyond float32, in which training computes;"
            " it reaches from 1.2e-38 to 3.4e+38",
            "x.yaml: optimizer.eps (1e-300) is beyond float32, in which training computes; it"
            " reaches from 1.2e-38 to 3.4e+38",
        ],
    ),
    "a whole number that no float holds": (
        "optimizer: {learning_rate: 1" + "0" * 400 + "}",
        [],
        [
            f"x.yaml: optimizer.learning_rate: got 1{'0' * 19}...; needs a number below 1e308",
        ],
    ),
    "a number too long to be written out": (
        "seed: 0x" + "f" * 5000,
        [],
        ["x.yaml: seed: got a number of thousands of digits; needs less than 9223372036854775808"],
    ),
    "text that is no file name": (
        'output_dir: "a\\0b"\nevaluation: {sample_prompts: ["\\ud800"]}',
        [],
        [
            "x.yaml: output_dir ('a\\x00b') must be UTF-8 text without NUL characters; correct it",
            "x.yaml: evaluation.sample_prompts.0 ('\\ud800') must be UTF-8 text without NUL"
            " characters; correct it",
        ],
    ),
    "empty text": (
        "output_dir: ''",
        [],
        ["x.yaml: output_dir: got ''; needs text that is not empty"],
    ),
    "unknown section from the command line": (
        "seed: 1",
        ["optimizér.eps=1"],
        ["command line: optimizér: unknown key (did you mean optimizer?)"],
    ),
    "a place in a list in other digits": (
        "seed: 1",
        ["data.domains.٣.weight=2"],
        [
            "command line: data.domains.٣.weight: data.domains is a list; write a number in place"
            " of ٣"
        ],
    ),
    "override without a value": (
        "seed: 1",
        ["seed"],
        ["command line: seed: not an override; write section.key=value"],
    ),
    "override below a number": (
        "seed: 1",
        ["seed.x=3"],
        ["command line: seed.x: seed has no settings under it"],
    ),
    "override past the end of a list": (
        "seed: 1",
        ["model.moe.losses.2.weight=3"],
        [
            "command line: model.moe.losses.2.weight: model.moe.losses has 2 entries,"
            " numbered from 0"
        ],
    ),
    "override by name in a list": (
        "seed: 1",
        ["model.moe.losses.router_z_loss.weight=3"],
        [
            "command line: model.moe.losses.router_z_loss.weight: model.moe.losses is a list;"
            " write a number in place of router_z_loss"
        ],
    ),
    "override that is not YAML": (
        "seed: 1",
        ["optimizer.betas=[0.9"],
        [
            "command line: optimizer.betas: line 1, column 5: expected ',' or ']', but got"
            " '<stream end>' (while parsing a flow sequence)"
        ],
    ),
    "wrong syntax": (
        "model:\n  hidden_size: 3\n bad: [",
        [],
        [
            "x.yaml: line 3, column 2: expected <block end>, but found '<block mapping start>'"
            " (while parsing a block mapping)"
        ],
    ),
    "tab": (
        "model:\n\thidden_size: 3",
        [],
        ["x.yaml: line 2, column 1: a tab cannot stand here; use spaces"],
    ),
    "repeated keys": (
        "seed: 1\nmodel:\n  hidden_size: 64\n  num_layers: 2\n  hidden_size: 128\nseed: 1\n",
        [],
        [
            "x.yaml: line 5: model.hidden_size is given twice (first on line 3); keep one",
            "x.yaml: line 6: seed is given twice (first on line 1); keep one",
        ],
    ),
    "object tag": (
        "seed: !!python/object/apply:os.getpid []",
        [],
        [
            "x.yaml: line 1, column 7: the tag !!python/object/apply:os.getpid is not accepted;"
            " write a plain value"
        ],
    ),
    "two documents": (
        "seed: 1\n---\nseed: 2\n",
        [],
        [
            "x.yaml: line 2, column 1: but found another document"
            " (expected a single document in the stream)"
        ],
    ),
    "control character": (
        "seed: 1\noutput_dir: a\x01b\n",
        [],
        ["x.yaml: line 2: the character #x0001 is not allowed in YAML"],
    ),
    "empty file": (
        "# only a comment\n",
        [],
        ["x.yaml: empty; a run's YAML has sections such as `model:` and `data:`"],
    ),
    "a list at the top": (
        "- model\n",
        [],
        ["x.yaml: got a list of 1 at the top; needs sections such as `model:`"],
    ),
    "text at the top": (
        "model\n",
        [],
        ["x.yaml: got 'model' at the top; needs sections such as `model:`"],
    ),
    "nesting without end": (
        "seed: " + "[" * 5000,
        [],
        ["x.yaml: the values are nested too deeply"],
    ),
    "number without end": (
        "seed: " + "9" * 5000,
        [],
        [
            "x.yaml: line 1, column 7: 99999999999999999999... of 5000 characters"
            " is not a number that can be read"
        ],
    ),
    "tag that does not fit": (
        "seed: !!int many",
        [],
        ["x.yaml: line 1, column 7: many is not a number that can be read"],
    ),
    "tag of another schema": (
        "output_dir: !!binary aGk=",
        [],
        ["x.yaml: line 1, column 13: the tag !!binary is not accepted; write a plain value"],
    ),
    "value that contains itself": (
        "data: &a {cache_dir: *a}",
        [],
        ["x.yaml: data.cache_dir: got settings; needs text (put it in quotes)"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_each_mistake_gives_these_lines(case, run_in):
    text, overrides, expected = MISTAKES[case]
    assert errors_of(text, *overrides) == expected


WRONG = [None, True, -1, 0.5, 1e12, 1e30, 10**30, 10**400, float("nan"), float("inf"), -0.0]
WRONG += ["x", "", "3", [], [1], [1, 2, 3], ["a", "b"], [[1]], [None], {}, {"a": 1}, [{}]]
WRONG += [{"name": 1}, {"name": "x"}, {"name": None}, {1: 2}]


def test_any_wrong_value_at_any_setting_is_told_in_our_words():
    """Every setting of every section, variant and list entry, with every kind of value."""
    base = RunConfig().model_dump(mode="json")
    refused = 0
    for path in known_settings(RunConfig, base):
        for value in WRONG:
            values = copy.deepcopy(base)
            node = values
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = value
            try:
                config_from_dict(values, "x")
            except ConfigError as error:
                refused += 1
                for line in str(error).split("\n"):
                    # Pydantic's own messages say what an input should be.
                    assert "should" not in line and "valid " not in line.lower(), line
                    text = line.removeprefix("x: ")
                    section = re.match(r"[a-z_]+", text)
                    assert section and section[0] in RunConfig.model_fields, line
                    # A path is not given twice.
                    assert not re.match(rf"({section[0]}[\w.]*): {section[0]}\.", text), line
                    assert len(line) < 500, line
    assert refused > 1000


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


def test_files_that_cannot_be_read_give_one_line(run_in):
    Path("quickstart.yaml").write_text("seed: 1")
    Path("folder.yaml").mkdir()
    Path("latin.yaml").write_bytes("seed: 1 # café".encode("latin-1"))
    expected = {
        "quikstart.yaml": "quikstart.yaml: no such file (did you mean quickstart.yaml?)",
        "no/where.yaml": "no/where.yaml: no such file",
        "quickstart.yaml/x.yaml": "quickstart.yaml/x.yaml: cannot be read: Not a directory",
        "folder.yaml": "folder.yaml: a directory; give one YAML file in it",
        "latin.yaml": "latin.yaml: not UTF-8 text (byte 0xe9 at position 13);"
        " save the file as UTF-8",
    }
    for name, line in expected.items():
        with pytest.raises(ConfigError) as caught:
            load_config(name)
        assert str(caught.value) == line


def test_a_saved_config_that_is_wrong_names_its_source():
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"sed": 1}, source="state.json")
    assert str(caught.value) == "state.json: sed: unknown key (did you mean seed?)"


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


def test_the_replacement_that_the_error_proposes_is_accepted(run_in):
    text, overrides, (line,) = MISTAKES["variant that refuses the settings of the one it replaces"]
    proposed = line.rpartition(": '")[2].rstrip("'")
    config = load(text, *overrides, proposed)
    assert [loss.name for loss in config.model.moe.losses] == ["router_z_loss"]
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
