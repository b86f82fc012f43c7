"""`python -m train.generate`: what it writes, and one clear line where it cannot."""

import shutil

import pytest
import torch
from checkpoint_cases import flip_bit
from training_cases import run

from train.checkpoint import RunLock
from train.errors import ConfigError
from train.generate import load_run, main, sample_text

SAVED = {"training.steps": 30, "evaluation.every": 0, "checkpoint.every": 20}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "run"
    assert run(path, SAVED) == 0
    return path


def write(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_it_goes_on_from_the_prompt_and_says_of_which_step(run_dir, capsys):
    assert main([str(run_dir), "--prompt", "willow ", "--max-new-tokens", "20"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("willow ") and len(printed.out) > len("willow ") + 5
    assert printed.err == f"# {run_dir}, step 30\n"


def test_greedy_is_the_likeliest_token_at_each_place(run_dir, capsys):
    text = write(capsys, run_dir, "--prompt", "7+", "--temperature", 0, "--max-new-tokens", 8)
    model, tokenizer, _ = load_run(run_dir)
    ids = [tokenizer.end_of_text, *tokenizer.encode("7+")]
    for _ in range(8):
        # Without a cache, the whole text again at each token.
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.end_of_text:
            break
    assert text == tokenizer.decode(ids[1:]) + "\n"


def test_a_seed_repeats_its_text_and_another_gives_another(run_dir, capsys):
    options = ("--prompt", "fern", "--max-new-tokens", 40)
    first, again, other = (write(capsys, run_dir, *options, "--seed", s) for s in (1, 1, 2))
    assert first == again != other


def test_an_empty_prompt_is_the_beginning_of_a_document(run_dir, capsys):
    assert write(capsys, run_dir, "--max-new-tokens", 10).strip()


def test_top_k_of_one_is_greedy(run_dir, capsys):
    options = ("--prompt", "otter ", "--max-new-tokens", 12)
    greedy = write(capsys, run_dir, *options, "--temperature", 0)
    assert write(capsys, run_dir, *options, "--top-k", 1, "--temperature", 3) == greedy


def test_a_run_under_way_can_be_read(run_dir, capsys):
    with RunLock(run_dir):
        assert write(capsys, run_dir, "--max-new-tokens", 2)


def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(run_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    file = copy / "checkpoints" / "step_00000030" / "model.safetensors"
    flip_bit(file, 4 * file.stat().st_size)
    assert main([str(copy), "--max-new-tokens", "2"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and f"# {copy}, step 20" in error
    file = copy / "checkpoints" / "step_00000020" / "model.safetensors"
    flip_bit(file, 4 * file.stat().st_size)
    assert main([str(copy), "--max-new-tokens", "2"]) == 4
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature (-1.0) is out of range"),
        (["--temperature", "nan"], "--temperature (nan) is out of range"),
        (["--max-new-tokens", "0"], "--max-new-tokens (0) is out of range"),
        (["--top-k", "0"], "--top-k (0) is out of range"),
        (["--top-p", "1.5"], "--top-p (1.5) is out of range"),
        (["--max-new-tokens", "99999999999"], "(99999999999) is out of range; needs 1 to 2^31 - 1"),
        (["--device", "cuda"], "--device cuda, but PyTorch sees no GPU; leave --device out"),
    ],
)
def test_options_out_of_range_are_one_line(run_dir, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([str(run_dir), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_older_checkpoint_can_be_asked_for(run_dir):
    newest, older, again = (load_run(run_dir, step=step) for step in (None, 20, 30))
    assert (newest[2], older[2], again[2]) == (30, 20, 30)
    weights = [model.embedding.weight for model, _, _ in (newest, older, again)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])
    with pytest.raises(ConfigError, match="has no checkpoint of step 25; it has: 20, 30"):
        load_run(run_dir, step=25)


def test_what_is_no_run_is_one_line(run_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "absent": "no such run directory",
        tmp_path / "empty": "has no checkpoint yet",
    }.items():
        assert main([str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (copy / "tokenizer.json").unlink()
    assert main([str(copy)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {copy / 'tokenizer.json'} is missing; the run's training command puts the right "
        f"one back"
    )
    (copy / "tokenizer.json").write_text("{")
    assert main([str(copy)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokenizer.json cannot be read as a tokenizer" in line and "tokenizer.file" not in line
    assert main([str(copy / "tokenizer.json")]) == 2
    assert "a file, not a run directory" in capsys.readouterr().err


def test_a_stop_ends_a_sample_at_the_next_token(run_dir):
    model, tokenizer, _ = load_run(run_dir)
    whole = sample_text(model, tokenizer, "moss", max_new_tokens=12, temperature=0)
    asked = []
    part = sample_text(
        model,
        tokenizer,
        "moss",
        max_new_tokens=12,
        temperature=0,
        stop=lambda: asked.append(None) or len(asked) > 3,
    )
    assert len(asked) == 4 and part == whole[: len("moss") + 3]
