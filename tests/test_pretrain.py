"""The command line: what it prints and leaves behind, and one clear line for each mistake."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import flip_bit
from training_cases import (
    NUM_STEPS,
    ROOT,
    Recorder,
    at,
    bits,
    checkpoint,
    different,
    launcher,
    run,
    same_steps,
    settings,
    texts,
    write_config,
)

import train.engine
import train.pretrain
from train.config import load_config
from train.pretrain import main
from train.program import guarded

SHORT = {"training.steps": 2, "evaluation.every": 0}


# ---- what a run leaves behind


def test_a_run_leaves_what_reproduces_and_explains_it(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert run(run_dir) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in ("parameters, total", "starting on", f"step {NUM_STEPS}/{NUM_STEPS} | loss "):
        assert text in printed.out
    assert f"After {NUM_STEPS * 64} training tokens" in printed.out
    assert "tensorboard --logdir" not in printed.out, "there is none"
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "domain_expert_map.png",
        "lock",
        "summary.json",
        "tokenizer.json",
    }
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["training_tokens"] == NUM_STEPS * 64
    assert set(summary["domains"]) == {"prose", "sums"}
    assert (run_dir / "domain_expert_map.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_config_reproduces_the_run(tmp_path):
    assert run(tmp_path / "run") == 0
    saved = tmp_path / "run" / "config.yaml"
    assert load_config(saved) == load_config(tmp_path / "run.yaml")
    assert main(["--config", str(saved), f"output_dir={tmp_path / 'again'}"]) == 0
    first, second = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "again")
    assert different(bits(first.tensors), bits(second.tensors)) == []


def test_the_printed_config_loads_back_equal_and_nothing_is_written(tmp_path, capsys):
    override = "optimizer.learning_rate=3e-4"
    assert run(tmp_path / "run", None, "--print-config", override) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(tmp_path / "run.yaml", [override])
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_sizes_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "run", None, "--dry-run") == 0
    printed = capsys.readouterr().out
    # By hand, D 16, F 16, E 4, K 2, 320 entries of vocabulary: embedding and head 2*320*16; a layer
    # 4*16*16 of attention, 2*8 of QK-norms, 2*16 of norms, 4*16 of the router, 3*4*16*16 of
    # experts; and the final norm 16. Active: no embedding, and half of the experts.
    layer = 4 * 256 + 16 + 32 + 64
    total = 2 * 320 * 16 + 2 * (layer + 12 * 256) + 16
    active = 320 * 16 + 2 * (layer + 6 * 256) + 16
    assert f"parameters, total                     {total / 1000:.2f} k" in printed
    assert f"parameters, active a token            {active / 1000:.2f} k" in printed
    for name in ("FLOPs a token", "memory: activations", "disk a checkpoint", "tokens a step"):
        assert name in printed
    assert not (tmp_path / "run").exists()


def test_a_dry_run_plans_the_vocabulary_of_a_tokenizer_file(tmp_path, capsys):
    assert run(tmp_path / "trained", SHORT | {"tokenizer": {"vocab_size": 300}}) == 0
    file = tmp_path / "trained" / "tokenizer.json"
    for tokenizer in ({"file": str(file)}, {"vocab_size": 300}):
        capsys.readouterr()
        assert run(tmp_path / "dry", {"tokenizer": tokenizer}, "--dry-run") == 0
        # Full multiples of 64.
        assert f"parameters, embedding and head        {2 * 320 * 16 / 1000:.2f} k" in (
            capsys.readouterr().out
        )


# ---- checkpoints that are damaged or do not fit


def damage(path: Path) -> None:
    file = path / "model.safetensors"
    flip_bit(file, 4 * file.stat().st_size)


def test_a_damaged_newest_checkpoint_falls_back_and_still_ends_right(tmp_path, capsys):
    changes = {"checkpoint.every": 2, "checkpoint.keep_last": 3}
    with Recorder() as whole:
        assert run(tmp_path / "run", changes) == 0
    expected = bits(checkpoint(tmp_path / "run").tensors)
    damage(tmp_path / "run" / "checkpoints" / "step_00000008")
    capsys.readouterr()
    with Recorder() as again:
        assert run(tmp_path / "run", changes) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^warning: .*step_00000008.*model\.safetensors", printed, re.M)
    assert "resuming at step 6" in printed
    assert same_steps(again.steps, whole.steps[6:])
    assert different(bits(checkpoint(tmp_path / "run").tensors), expected) == []


def test_all_checkpoints_damaged_ends_with_4_and_touches_nothing(tmp_path, capsys):
    changes = {"checkpoint.every": 4}
    assert run(tmp_path / "run", changes) == 0
    directory = tmp_path / "run" / "checkpoints"
    for step in (4, 8):
        damage(directory / f"step_{step:08d}")
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    capsys.readouterr()
    assert run(tmp_path / "run", changes) == 4
    error = capsys.readouterr().err
    assert "step_00000004" in error and "step_00000008" in error and "Traceback" not in error
    assert "choose another output_dir to begin anew" in error
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


OTHER_TEXTS = [
    {"name": "prose", "files": str(texts() / "prose_0*.txt")},
    {"name": "sums", "files": str(texts() / "sums_*.txt")},
]

CHANGED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "model": (
        {"model.hidden_size": 32, "model.moe.num_experts": 8},
        ["model.hidden_size: 16 in the checkpoint, 32 now", "model.moe.num_experts: 4 in the"],
    ),
    "a loss": (
        {
            "model.moe.losses": [
                {"name": "load_balancing", "weight": 0.5},
                {"name": "router_z_loss"},
            ]
        },
        ["model.moe.losses[0].weight: 0.01 in the checkpoint, 0.5 now"],
    ),
    "data": ({"data.domains": OTHER_TEXTS}, ["data.fingerprint: "]),
    "weights": (
        {"data.domains.0.weight": 3.0},
        ["data.weights: [0.5, 0.5] in the checkpoint, [0.75, 0.25] now"],
    ),
    "tokenizer": ({"tokenizer": {"vocab_size": 300}}, ["tokenizer.sha256: ", "data.fingerprint: "]),
    "seed": ({"seed": 5}, ["seed: 0 in the checkpoint, 5 now"]),
    "batch": ({"training.batch_size": 8}, ["training.batch_size: 4 in the checkpoint, 8 now"]),
    "length": ({"training.seq_len": 8}, ["training.seq_len: 16 in the checkpoint, 8 now"]),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_resume_with_something_changed_is_refused_with_the_difference(what, tmp_path, capsys):
    changes, lines = CHANGED[what]
    assert run(tmp_path / "run", SHORT) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    assert run(tmp_path / "run", SHORT | changes) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot resume, the checkpoint was made with other settings:\n")
    for line in lines:
        assert f"\n{line}" in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= len(lines) + 3
    assert (tmp_path / "run" / "config.yaml").read_text() == config, "nothing is overwritten"


def test_what_does_not_change_the_run_so_far_may_change(tmp_path):
    assert run(tmp_path / "run", SHORT) == 0
    allowed = {
        "training.steps": 4,
        "training.micro_batch_size": 1,
        "training.activation_checkpointing": True,
        "optimizer.learning_rate": 1e-4,
        "evaluation.every": 1,
        "checkpoint.every": 1,
    }
    assert run(tmp_path / "run", allowed) == 0
    assert checkpoint(tmp_path / "run").step == 4


def test_the_rate_of_a_routers_bias_may_change_and_at_0_the_bias_stays(tmp_path, capsys):
    def train(steps, rate):
        router = {"name": "topk", "bias_update_rate": rate, "bias_centered": rate is not None}
        other = {"layers": [1], "router": router | {"top_k": 1, "normalize": False}}
        changes = {"training.steps": steps, "routes.record": str(tmp_path / "routes")}
        moe = {"model.moe.router": router, "model.moe.layers": [other]}
        return run(tmp_path / "run", SHORT | changes | moe)

    def biases():
        weights = checkpoint(tmp_path / "run").tensors["model"]
        return [weights[f"blocks.{layer}.feed_forward.router.expert_bias"] for layer in (0, 1)]

    assert train(3, 0.02) == 0
    moved = biases()
    assert all(bias.abs().max() > 0 for bias in moved)
    capsys.readouterr()
    assert train(5, None) == 2
    error = capsys.readouterr().err
    assert "router.bias_update_rate: 0.02 in the checkpoint, null now" in error
    assert train(5, 0) == 0
    changed = "model.moe.router.bias_update_rate: 0.02 in the checkpoint, 0.0 now"
    assert f"note: from here on {changed}" in capsys.readouterr().out
    assert checkpoint(tmp_path / "run").step == 5
    assert all(torch.equal(*pair) for pair in zip(biases(), moved, strict=True))


def test_resume_never_and_must(tmp_path, capsys):
    must, never = {"checkpoint.resume": "must"}, {"checkpoint.resume": "never"}
    assert run(tmp_path / "run", SHORT | must) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "resume: must, but" in line
    assert run(tmp_path / "run", SHORT | never) == 0
    capsys.readouterr()
    assert run(tmp_path / "run", SHORT | never) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "resume: never, but" in line and "up to step 2" in line


def test_a_refused_resume_costs_no_time_for_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(train.pretrain, "prepare_data", lambda *a, **k: pytest.fail("prepared"))
    assert run(tmp_path / "run", {"checkpoint.resume": "must"}) == 2


def test_a_second_process_on_the_same_directory_is_refused_with_the_owners_pid(tmp_path, capsys):
    config = write_config(tmp_path / "run", {"training.steps": 1000})
    process = launcher()
    process.start(config)
    process.wait_for("step 2/1000")
    try:
        assert main(["--config", str(config)]) == 2
    finally:
        process.signal(signal.SIGTERM)
        assert process.wait() == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is in use by process {process.pid} on " in line


# ---- mistakes


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr; there must be no other."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = error.splitlines()
    assert len(lines) == 1, error
    return lines[0]


def text_file(content: bytes, name: str = "only.txt") -> Callable[[Path], dict[str, Any]]:
    """Changes for a run on one file of that content."""

    def changes(tmp_path: Path) -> dict[str, Any]:
        (tmp_path / name).write_bytes(content)
        return {"data.domains": [{"name": "only", "files": str(tmp_path / name)}]}

    return changes


def corrupt_tokenizer(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    return {"tokenizer": {"file": str(tmp_path / "tokenizer.json")}}


def below_a_file(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "file").touch()
    return {"output_dir": str(tmp_path / "file" / "run")}


MISTAKES: dict[str, tuple[Callable[[Path], dict[str, Any]], int, str]] = {
    "a misspelt key": (
        lambda p: {"optimizer.learning_rat": 1e-3},
        2,
        r"optimizer\.learning_rat: .*learning_rate",
    ),
    "an impossible value": (
        lambda p: {"model.moe.num_experts": -3},
        2,
        r"model\.moe\.num_experts: .*-3",
    ),
    "more experts chosen than there are": (
        lambda p: {"model.moe.router": {"name": "topk", "top_k": 9}},
        2,
        r"model\.moe\.router\.top_k \(9\) must not exceed model\.moe\.num_experts \(4\)",
    ),
    "no such variant": (
        lambda p: {"model.moe.router": {"name": "topp"}},
        2,
        r"model\.moe\.router.*topp.*topk",
    ),
    "a data file that is missing": (
        lambda p: {"data.domains": [{"name": "only", "files": str(p / "absent_*.txt")}]},
        3,
        r"data\.domains\.0\.files .*absent_\*\.txt\) matches no file",
    ),
    "an empty corpus": (text_file(b""), 3, r"data\.domains\.0 \(only\) holds no text"),
    "a corpus of white space": (text_file(b" \n \n"), 3, r"holds no text"),
    "a batch larger than the data": (
        text_file(b"short"),
        3,
        r"domain only has 6 training tokens, one sequence needs 17",
    ),
    "a corrupt tokenizer": (corrupt_tokenizer, 3, r"tokenizer\.json\) is not a tokenizer\.json"),
    "a tokenizer that is missing": (
        lambda p: {"tokenizer": {"file": str(p / "absent.json")}},
        3,
        r"tokenizer\.file .*absent\.json\) cannot be read",
    ),
    "a vocabulary smaller than the tokenizer's": (
        lambda p: {"model.vocab_size": 100},
        2,
        r"model\.vocab_size \(100\) must be at least the tokenizer's \(258\); leave it out",
    ),
    "an output_dir below a regular file": (below_a_file, 2, r"choose an output_dir that can be"),
    "a device that is not there": (
        lambda p: {"training.device": "cuda"},
        2,
        r"training\.device: cuda, but PyTorch sees no GPU; set training\.device: auto",
    ),
    "a model beyond any memory": (
        lambda p: {"model.hidden_size": 2**20},
        8,
        r"out of memory \(weights, gradients and optimizer need [0-9.]+ TiB, cpu has .* GiB\)",
    ),
    "a model beyond any size": (
        lambda p: {"model.hidden_size": 2**31 - 64},
        8,
        r"out of memory \(.*overflowed",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_the_right_code(mistake, tmp_path, capsys, monkeypatch):
    changes, code, pattern = MISTAKES[mistake]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    began = time.monotonic()
    assert run(tmp_path / "run", SHORT | changes(tmp_path)) == code
    line = one_line(capsys)
    assert line.startswith("error: ") and re.search(pattern, line), line
    assert time.monotonic() - began < 20
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "mistake",
    ["a data file that is missing", "an empty corpus", "a corrupt tokenizer", "no such variant"],
)
def test_a_dry_run_refuses_what_the_run_would(mistake, tmp_path, capsys):
    changes, code, pattern = MISTAKES[mistake]
    assert run(tmp_path / "run", SHORT | changes(tmp_path), "--dry-run") == code
    assert re.search(pattern, one_line(capsys))


def test_each_of_several_mistakes_has_its_line(tmp_path, capsys):
    mistakes = {"optimizer.learning_rat": 1, "training.batch_size": 0, "model.hiden_size": 4}
    assert run(tmp_path / "run", mistakes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("error: ")
    for key in mistakes:
        assert sum(key in line for line in lines) == 1


def test_a_config_that_is_missing_is_one_line(tmp_path, capsys):
    assert main(["--config", str(tmp_path / "absent.yaml")]) == 2
    assert one_line(capsys) == f"error: {tmp_path / 'absent.yaml'}: no such file"


def test_invalid_utf8_is_refused_or_replaced_with_a_note(tmp_path, capsys):
    changes = text_file(b"some words \xff\xfe and more " * 400)(tmp_path)
    assert run(tmp_path / "run", SHORT | changes) == 3
    assert "byte 0xff at position 11" in one_line(capsys)
    (domain,) = changes["data.domains"]
    changes = {"data.domains": [domain | {"invalid_utf8": "replace"}]}
    assert run(tmp_path / "run", SHORT | changes) == 0
    printed = capsys.readouterr()
    assert printed.out.count("only: replaced invalid UTF-8 in 1 files: ") == 1
    assert printed.err == ""


def test_documents_longer_than_the_context_are_trained_on(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{number} words of a long document. " * 100)
    domains = [{"name": "long", "files": str(folder / "*.txt")}]
    with Recorder() as recorder:
        assert run(tmp_path / "run", {"data.domains": domains}) == 0
    assert recorder.steps[-1].lm_loss < recorder.steps[0].lm_loss


def test_one_short_document_is_trained_on_without_validation(tmp_path, capsys):
    changes = text_file(b"Nothing is left for validation. " * 10)
    assert run(tmp_path / "run", changes(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "only: one short document only, all of it for training" in printed
    assert "no validation text" in printed and "validation 0.0000" not in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["domains"] == {} and summary["mean_loss"] is None


def test_a_full_disk_ends_with_7_and_the_run_goes_on_where_there_is_space(small_disk, capsys):
    changes = {"checkpoint.every": 2, "checkpoint.keep_last": 1}
    with Recorder(before_step=at(3)):
        assert run(small_disk / "run", changes) == 143
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
    capsys.readouterr()
    assert run(small_disk / "run", changes) == 7
    assert "free some space" in one_line(capsys)
    assert checkpoint(small_disk / "run").step == 4
    filler.unlink()
    assert run(small_disk / "run", changes) == 0


def test_a_file_size_limit_ends_with_7(tmp_path, capsys):
    assert run(tmp_path / "run", SHORT) == 0
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        code = run(tmp_path / "run", SHORT | {"training.steps": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    line = one_line(capsys)
    assert code == 7 and "safetensors: File too large: free some space" in line
    assert checkpoint(tmp_path / "run").step == 2


def test_a_read_only_run_directory_is_one_line(tmp_path, capsys, monkeypatch):
    # Root may write anywhere, so the system call itself refuses.
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if str(path).startswith(str(tmp_path / "run")) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    assert run(tmp_path / "run", SHORT) == 2
    assert "Read-only file system: choose an output_dir that can be written" in one_line(capsys)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_being_out_of_memory_is_one_line_and_8(error, capsys):
    def program() -> int:
        raise error

    assert guarded(program) == 8
    assert one_line(capsys).startswith("error: out of memory (")


def test_our_own_faults_keep_their_traceback():
    def program() -> int:
        raise RuntimeError("required rank 4 tensor to use channels_last memory format")

    with pytest.raises(RuntimeError, match="memory format"):
        guarded(program)


def test_the_allocator_of_pytorch_refuses_with_a_message_that_we_know(capsys):
    assert guarded(lambda: torch.empty(2**50) is None) == 8
    assert "allocate" in one_line(capsys)


def test_an_expensive_forward_pass_that_runs_out_of_memory_is_8(tmp_path, capsys, monkeypatch):
    def call(engine, batch, totals=None):
        return torch.empty(2**50)

    monkeypatch.setattr(train.engine.PlainEngine, "__call__", call)
    assert run(tmp_path / "run") == 8
    line = one_line(capsys)
    assert "lower training.micro_batch_size" in line and "by the plan, activations need" in line


def test_foreign_kernels_are_refused_with_what_to_uninstall(tmp_path, capsys, monkeypatch):
    spec = type("Spec", (), {"origin": "/somewhere/kernels/__init__.py"})
    monkeypatch.setattr(train.pretrain.importlib.util, "find_spec", lambda name: spec)
    assert run(tmp_path / "run") == 2
    assert "pip uninstall kernels" in one_line(capsys)


# ---- real processes


@pytest.fixture
def buffered(monkeypatch):
    """Output is buffered, as it is by default: the error of a closed pipe may come at the end."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


PROGRAM = [sys.executable, "-m", "train.pretrain"]


def test_output_piped_into_head_trains_to_the_end_without_complaint(tmp_path, buffered):
    config = write_config(tmp_path / "run", SHORT)
    # Output is read up to its first line, and the pipe is closed.
    with subprocess.Popen(
        [*PROGRAM, "--config", str(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("domain ")
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(120) in (0, 141)
    assert error == ""
    assert checkpoint(tmp_path / "run").step == 2
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_printed_config_piped_into_a_closed_pipe_is_silent(tmp_path, buffered):
    config = write_config(tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)
    command = [*PROGRAM, "--config", str(config), "--print-config"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert done.stderr == b"" and done.returncode == 141


def test_the_settings_of_a_test_are_what_the_file_says(tmp_path):
    """The helper of these tests writes what it claims to."""
    changes = {"training.steps": 3, "data.domains.0.weight": 2.0, "evaluation.every": ...}
    values = settings(tmp_path, changes)
    assert values["training"]["steps"] == 3 and values["data"]["domains"][0]["weight"] == 2.0
    assert "every" not in values["evaluation"]
    assert load_config(write_config(tmp_path / "run", changes)).num_steps == 3
