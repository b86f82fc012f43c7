"""Are tensors that lie in pieces over the files of a checkpoint read right, whole and in part?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from train.errors import CheckpointError
from train.stored_tensors import DTYPES, Piece, StoredGroup, moments_by_key

SHAPES = {"a": [2, 3], "b": []}


def numbers(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, dtype=torch.float32)


def save(folder: Path, *spans: tuple[str, int, int], group: str = "model") -> Path:
    """A checkpoint in which each span is in the file of another rank."""
    groups = {
        f"{group}_rank_{rank:05d}": {f"{name}@{start}": numbers(start, stop)}
        for rank, (name, start, stop) in enumerate(spans)
    }
    return save_checkpoint(folder, 1, groups, {"shapes": SHAPES}, keep_last=1)


def test_fragments_are_put_together(tmp_path):
    path = save(tmp_path, ("a", 4, 6), ("b", 0, 1), ("a", 0, 4))
    found = load_checkpoint(path).tensors["model"]
    assert torch.equal(found["a"], numbers(0, 6).view(2, 3))
    assert torch.equal(found["b"], torch.tensor(0.0))


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([("a", 0, 4), ("b", 0, 1)], "a: numbers 4 to 6 are missing"),
        ([("a", 2, 6), ("b", 0, 1)], "a: numbers 0 to 2 are missing"),
        ([("a", 0, 4), ("a", 3, 6), ("b", 0, 1)], "a: numbers 3 to 4 come twice"),
        ([("a", 0, 6)], "b: no file has it"),
        ([("a", 0, 7), ("b", 0, 1)], "a: numbers 6 to 7 come twice"),
        ([("a", 0, 6), ("b", 0, 1), ("c", 0, 1)], "c is unknown"),
    ],
)
def test_fragments_that_do_not_cover_a_tensor_once_are_refused(spans, expected, tmp_path):
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(save(tmp_path, *spans))


def test_fragments_of_two_dtypes_are_refused(tmp_path):
    groups = {
        "model_rank_00000": {"a@0": numbers(0, 3), "b": torch.tensor(0.0)},
        "model_rank_00001": {"a@3": numbers(3, 6).bfloat16()},
    }
    path = save_checkpoint(tmp_path, 1, groups, {"shapes": SHAPES}, keep_last=1)
    with pytest.raises(CheckpointError, match="a has fragments of different dtypes"):
        open_checkpoint(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_part_of_any_tensor_can_be_read(dtype, tmp_path):
    """Of a tensor in one piece, whatever its number of dimensions, and of one in three."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 2, (3, 5, 2), generator=draw).to(dtype)
    flat = whole.reshape(-1)
    groups = {
        "other": {"whole": whole, "flat": flat, "one": flat[0], "none": flat[:0].view(0, 3)},
        "model_rank_00000": {"cut@7": flat[7:20], "cut@0": flat[:7]},
        "model_rank_00001": {"cut@20": flat[20:]},
    }
    state = {"shapes": {"cut": [3, 5, 2]}}
    found = open_checkpoint(save_checkpoint(tmp_path, 1, groups, state, keep_last=1)).tensors
    as_bytes = flat.view(torch.uint8)
    size = dtype.itemsize
    for start in range(31):
        for stop in range(start, 31):
            for group, name in (("other", "whole"), ("other", "flat"), ("model", "cut")):
                part = found[group].read(name, start, stop)
                assert part.dtype == dtype
                assert torch.equal(part.view(torch.uint8), as_bytes[start * size : stop * size])
    assert found["other"]["none"].shape == (0, 3)
    assert found["other"]["one"].shape == ()
    assert torch.cat(list(found["model"].stream("cut"))).shape == (30,)


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    read: list[int] = []
    real = Piece.numbers

    def counted(piece: Piece, start: int, stop: int) -> Tensor:
        read.append(stop - start)
        return real(piece, start, stop)

    path = save(tmp_path, ("a", 4, 6), ("b", 0, 1), ("a", 0, 4))
    monkeypatch.setattr(Piece, "numbers", counted)
    group = open_checkpoint(path).tensors["model"]
    assert read == []
    assert group.read("a", 1, 3).tolist() == [1, 2]
    assert read == [2]
    assert group.read("a", 3, 5).tolist() == [3, 4]
    assert read == [2, 1, 1]


def test_moments_are_found_by_their_key(tmp_path):
    optimizer = {"a:exp_avg@0": numbers(0, 6), "a:step": torch.tensor(3.0)}
    groups = {
        "model_rank_00000": {"a@0": numbers(0, 6), "b@0": numbers(0, 1)},
        "optimizer_rank_00000": optimizer,
    }
    path = save_checkpoint(tmp_path, 1, groups, {"shapes": SHAPES}, keep_last=1)
    for checkpoint in (open_checkpoint(path), load_checkpoint(path)):
        moments = moments_by_key(checkpoint.tensors["optimizer"])
        assert moments.keys() == {"exp_avg", "step"}
        assert moments["exp_avg"]["a"].shape == (2, 3)
        assert moments["step"]["a"] == 3
    assert isinstance(open_checkpoint(path).tensors["model"], StoredGroup)


def test_what_one_rank_finds_damaged_all_do(tmp_path):
    """Each checks a part of the files."""
    path = save(tmp_path, ("a", 0, 6), ("b", 0, 1))
    damaged = path / "model_rank_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")

    def answers_of(rank: int) -> list[str]:
        from train.checkpoint_format import verify_checkpoint

        return verify_checkpoint(path, rank, 3)

    everyone = [answers_of(rank) for rank in range(3)]
    assert [len(answers) for answers in everyone].count(1) == 1
    for rank in range(3):
        replies = iter([[None] * 3, everyone])
        with pytest.raises(CheckpointError, match=r"model_rank_00001\.safetensors: its SHA-256"):
            open_checkpoint(path, rank, lambda value, replies=replies: next(replies))
