"""Is a run's model one file, whoever saved it, and only where every part is there?"""

import torch
from safetensors.torch import load_file
from training_cases import checkpoint, run

from train.checkpoint import save_checkpoint
from train.export import main


def save_in_fragments(run_dir, cut: int = 5, end: int = 12) -> None:
    """A checkpoint of two ranks: a 3 x 4 matrix in two pieces, and a buffer."""
    values = torch.arange(12.0)
    first = {"model_rank_00000": {"w@0": values[:cut], "bias": torch.ones(2, dtype=torch.bfloat16)}}
    second = {"model_rank_00001": {f"w@{cut}": values[cut:end]}, "random_rank_00001": {}}
    state = {"shapes": {"w": [3, 4]}}
    save_checkpoint(run_dir, 1, {**first, **second}, state, keep_last=1)


def test_one_process(tmp_path, capsys):
    assert run(tmp_path / "run") == 0
    output = tmp_path / "model.safetensors"
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 0
    assert "tensors of step_00000008" in capsys.readouterr().out
    exported, saved = load_file(output), checkpoint(tmp_path / "run").tensors["model"]
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_fragments_become_whole(tmp_path):
    save_in_fragments(tmp_path / "run")
    output = tmp_path / "model.safetensors"
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 0
    exported = load_file(output)
    assert torch.equal(exported["w"], torch.arange(12.0).view(3, 4))
    assert torch.equal(exported["bias"], torch.ones(2, dtype=torch.bfloat16))
    assert exported.keys() == {"w", "bias"}


def test_a_missing_fragment_is_an_error(tmp_path, capsys):
    save_in_fragments(tmp_path / "run", end=11)
    output = tmp_path / "model.safetensors"
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 4
    assert "w: numbers 11 to 12 are missing" in capsys.readouterr().err
    assert list(tmp_path.glob("*safetensors*")) == []


def test_a_weight_that_no_rank_wrote_is_an_error(tmp_path, capsys):
    state = {"shapes": {"w": [1], "v": [1]}}
    tensors = {"model_rank_00000": {"w@0": torch.ones(1)}}
    save_checkpoint(tmp_path / "run", 1, tensors, state, keep_last=1)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "x.safetensors")]) == 4
    assert "v: no file has it" in capsys.readouterr().err


def test_wrong_places_are_errors(tmp_path, capsys):
    output = str(tmp_path / "model.safetensors")
    assert main([str(tmp_path / "nothing"), "--output", output]) == 2
    assert "has no checkpoint" in capsys.readouterr().err
    save_in_fragments(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "no" / "folder" / "x")]) == 2
    damaged = tmp_path / "run/checkpoints/step_00000001/model_rank_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main([str(tmp_path / "run"), "--output", output]) == 4
    assert "model_rank_00001.safetensors" in capsys.readouterr().err


def test_a_target_that_is_something_else_is_refused(tmp_path, capsys):
    assert run(tmp_path / "run", {"training.steps": 1, "evaluation.every": 0}) == 0
    config = tmp_path / "run" / "config.yaml"
    before = config.read_bytes()
    inside = next((tmp_path / "run" / "checkpoints").glob("step_*")) / "model.safetensors"
    (tmp_path / "folder.safetensors").mkdir()
    for output, expected in (
        (config, "must name a file that ends in .safetensors"),
        (tmp_path / "folder.safetensors", "must name a file that ends in .safetensors"),
        (inside, "lies among the checkpoints"),
    ):
        assert main([str(tmp_path / "run"), "--output", str(output)]) == 2
        assert expected in capsys.readouterr().err
    assert config.read_bytes() == before
