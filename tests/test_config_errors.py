"""Does each mistake in a config give one clear line?"""

import copy
import re
from pathlib import Path

import pytest
from config_cases import errors_of, load

from moe.variants import variant_names
from train.config import RunConfig, config_from_dict, load_config
from train.config_errors import known_settings
from train.errors import ConfigError

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
            " take 0 or a number within 1.2e-38 and 3.4e+38",
            "x.yaml: optimizer.eps (1e-300) is beyond float32, in which training computes; take"
            " 0 or a number within 1.2e-38 and 3.4e+38",
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


def test_the_replacement_that_the_error_proposes_is_accepted(run_in):
    text, overrides, (line,) = MISTAKES["variant that refuses the settings of the one it replaces"]
    proposed = line.rpartition(": '")[2].rstrip("'")
    config = load(text, *overrides, proposed)
    assert [loss.name for loss in config.model.moe.losses] == ["router_z_loss"]
    assert config.model.moe.losses[0].weight == 0.5


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
