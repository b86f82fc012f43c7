"""Checkpoints come back bit for bit; damage is found and stepped over; pruning is careful."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    DAMAGES,
    FILES,
    flip_bit,
    flip_random_bit,
    is_content_of,
    names_in,
    newest,
    no_warning,
    same_bits,
    save,
    steps_in,
    truncate,
    values_of,
)

from train.changed_settings import changed_settings, refuse_changes, with_allowed_changes
from train.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from train.errors import CheckpointError, ConfigError
from train.run_directory import REPLACED, SAVING, RunLock, remove_leftovers

# ---- round trip


def test_round_trip_preserves_every_dtype_shape_and_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    integers = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    named = {f"{dtype}": torch.randn(3, 5, generator=generator).to(dtype) for dtype in floats}
    named |= {f"{d}": torch.randint(0, 100, (7,), generator=generator).to(d) for d in integers}
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    named |= {
        "fp8": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "fp8_e5m2": torch.randn(9, generator=generator).to(torch.float8_e5m2),
        "bool": torch.tensor([True, False, True]),
        "int64_limits": torch.tensor([2**63 - 1, -(2**63)]),
        "specials": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "zero_dim": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "empty_bool": torch.empty(0, dtype=torch.bool),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "tied_a": base,
        "tied_b": base,
        "name.with/odd ü\n": torch.ones(1),
    }
    path = save_checkpoint(tmp_path, 7, {"model": named, "rng": {}}, {}, keep_last=1)
    loaded = load_checkpoint(path)
    assert loaded.tensors.keys() == {"model", "rng"}
    assert loaded.tensors["rng"] == {}
    assert loaded.tensors["model"].keys() == named.keys()
    for name, tensor in named.items():
        assert same_bits(loaded.tensors["model"][name], tensor.detach()), name


def test_round_trip_preserves_the_state(tmp_path):
    state: dict[str, Any] = {
        "bits": 2**127 + 3,
        "loss": 0.1 + 0.2,
        "none": None,
        "on": True,
        "text": "ü\n\x00",
    }
    state |= {"nested": {"list": [1, 2.5, "a", [], {}]}, "tuple": (1, 2)}
    path = save_checkpoint(tmp_path, 3, {}, state, keep_last=1)
    loaded = load_checkpoint(path)
    assert loaded.state == state | {"tuple": [1, 2]}
    assert (loaded.path, loaded.step) == (tmp_path / "checkpoints" / "step_00000003", 3)
    assert type(loaded.state["on"]) is bool


def test_loaded_tensors_do_not_follow_the_file(tmp_path):
    path = save(tmp_path, 1)
    loaded = load_checkpoint(path)
    for name in ("model.safetensors", "optimizer.safetensors"):
        with (path / name).open("r+b") as file:
            file.write(b"\xff" * (path / name).stat().st_size)
    assert is_content_of(loaded, 1)


def test_large_groups_are_hashed_and_written_across_chunks(tmp_path):
    tensors = {"model": {"w": torch.arange(700_001, dtype=torch.int64)}}
    path = save_checkpoint(tmp_path, 1, tensors, {}, keep_last=1)
    assert torch.equal(load_checkpoint(path).tensors["model"]["w"], tensors["model"]["w"])
    listed = json.loads((path / "manifest.json").read_text())["files"]["model.safetensors"]
    content = (path / "model.safetensors").read_bytes()
    assert listed == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_latest_names_the_newest_and_steps_beyond_eight_digits_sort(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_100000000\n"
    assert newest(tmp_path, no_warning).step == 100_000_000


@pytest.mark.parametrize("group", ["../model", "/model", "a.b", "", "a b", "..", "x" * 65])
def test_group_names_that_could_leave_the_directory_are_refused(tmp_path, group):
    with pytest.raises(ValueError, match="group"):
        save_checkpoint(tmp_path, 1, {group: {}}, {}, keep_last=1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"loss": float("nan")}}, "state.a.loss is nan"),
        ({"a": [1, float("inf")]}, r"state.a\[1\] is inf"),
        ({"a": {1: 2}}, "state.a has the key 1"),
        ({"a": Path("x")}, "state.a is a PosixPath"),
        ({"a": torch.tensor(1)}, "state.a is a Tensor"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path, state, where):
    with pytest.raises(ValueError, match=where):
        save_checkpoint(tmp_path, 1, {}, state, keep_last=1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, device="meta"), "dense tensor"),
        (torch.eye(2).to_sparse(), "dense tensor"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused(tmp_path, tensor, what):
    with pytest.raises(ValueError, match=f"model: w .*{what}"):
        save_checkpoint(tmp_path, 1, {"model": {"w": tensor}}, {}, keep_last=1)


# ---- damage


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected_named_and_stepped_over(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    assert verify_checkpoint(path) == []
    DAMAGES[damage](path / file)
    problems = verify_checkpoint(path)
    assert len(problems) == 1 and file in problems[0]
    with pytest.raises(CheckpointError, match=file) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    warnings: list[str] = []
    assert is_content_of(find_checkpoint(tmp_path, "auto", warnings.append), 1)
    assert len(warnings) == 1 and file in warnings[0] and str(path) in warnings[0]


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 2)
    manifest = path / "manifest.json"
    original = manifest.read_bytes()
    bits = random.Random(0)
    for byte in range(len(original)):
        bit = 8 * byte + bits.randrange(8)
        flip_bit(manifest, bit)
        assert verify_checkpoint(path), bit
        manifest.write_bytes(original)
    assert verify_checkpoint(path) == []


def test_every_single_bit_of_latest_counts_but_misleads_nobody(tmp_path):
    for step in (2, 3):
        save(tmp_path, step)
    latest = tmp_path / "checkpoints" / "latest"
    original = latest.read_bytes()
    flips = [partial(flip_bit, bit=bit) for bit in range(8 * len(original))]
    for damage in [*flips, truncate(0), truncate(0.5), truncate(0.99), Path.unlink]:
        damage(latest)
        warnings: list[str] = []
        assert is_content_of(find_checkpoint(tmp_path, "auto", warnings.append), 3)
        assert len(warnings) == 1 and "latest" in warnings[0]
        latest.write_bytes(original)
    find_checkpoint(tmp_path, "auto", no_warning)


def test_a_link_in_place_of_a_file_is_damage(tmp_path):
    path = save(tmp_path, 1)
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert verify_checkpoint(path) == ["model.safetensors: not a plain file"]


def test_all_damaged_ends_with_exit_code_4_and_names_each(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2)]
    for path in paths:
        flip_random_bit(path / "model.safetensors")
    for resume in ("auto", "must"):
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as error:
            find_checkpoint(tmp_path, resume, lambda _: None)
        assert error.value.exit_code == 4
        assert all(str(path) in str(error.value) for path in paths)


def test_a_checkpoint_under_another_steps_name_is_damage_a_plain_copy_is_not(tmp_path):
    path = save(tmp_path, 1)
    shutil.copytree(path, tmp_path / "best")
    path.rename(path.with_name("step_00000009"))
    assert "step 1" in verify_checkpoint(path.with_name("step_00000009"))[0]
    assert is_content_of(load_checkpoint(tmp_path / "best"), 1)


def seal(path: Path, change: Callable[[dict], object], files: bool = True) -> None:
    """Forge: rewrite the manifest of `path` so that all its checksums fit again.

    An independent writer of the format: it says in ten lines what a manifest is.
    """
    body = json.loads((path / "manifest.json").read_text())
    if files:
        for name in body["files"]:
            content = (path / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            body["files"][name] = {"bytes": len(content), "sha256": digest}
    change(body)
    body.pop("sha256")
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("file", FILES[:3])
def test_a_pickle_bomb_never_runs_even_with_fitting_checksums(tmp_path, file, forged):
    path = save(tmp_path, 1)
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    pickle.loads(bomb)
    assert exploded.exists(), "the bomb itself must work"
    exploded.unlink()
    (path / file).write_bytes(bomb)
    if forged:
        seal(path, lambda body: None)
        assert verify_checkpoint(path) == []
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(path)
    torch.save({"w": Bomb(exploded)}, path / file)
    if forged:
        seal(path, lambda body: None)
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(path)
    assert not exploded.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files, body: files.update({"../other.safetensors": files.pop("model")}),
            "../other",
        ),
        (lambda files, body: files.update({"model.pt": files.pop("model")}), "model.pt"),
        (lambda files, body: files.update({"model.safetensors": 3}), "for model.safetensors"),
        (lambda files, body: files["state.json"].update(mode=1), "for state.json"),
        (lambda files, body: files.pop("state.json"), "not a checkpoint's manifest"),
        (lambda files, body: body.update(files=[]), "not a checkpoint's manifest"),
        (lambda files, body: body.update(step="2"), "not a checkpoint's manifest"),
        (lambda files, body: body.update(format=2), "format 2, this program reads 1"),
    ],
)
def test_forged_manifests_are_refused(tmp_path, change, message):
    path = save(tmp_path, 2)
    seal(path, lambda body: None)
    assert verify_checkpoint(path) == [], "the forger itself must be able to pass"
    # Files that exist and fit their checksums, so that only their names are wrong.
    shutil.copy(path / "model.safetensors", path.parent / "other.safetensors")
    shutil.copy(path / "model.safetensors", path / "model.pt")

    def forge(body: dict) -> None:
        files = body["files"]
        files["model"] = files["model.safetensors"]
        change(files, body)
        files.pop("model", None)

    seal(path, forge, files=False)
    with pytest.raises(CheckpointError, match=r"manifest\.json") as error:
        load_checkpoint(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ("[1]", "not a JSON object"),
        ("{", "state.json"),
        ('{"a":' * 100_000, "state.json"),
        (b"\xff\xfe\xfa", "state.json"),
    ],
)
def test_state_that_is_not_strict_json_is_refused(tmp_path, text, message):
    path = save(tmp_path, 1)
    (path / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    seal(path, lambda body: None)
    assert verify_checkpoint(path) == []
    with pytest.raises(CheckpointError, match=r"state\.json") as error:
        load_checkpoint(path)
    assert message in str(error.value)


# ---- auto, never, must


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
@pytest.mark.parametrize("directory", ["absent", "empty", "leftovers"])
def test_without_checkpoints_only_must_refuses(tmp_path, resume, directory):
    run_dir = tmp_path / "run"
    if directory != "absent":
        (run_dir / "checkpoints").mkdir(parents=True)
    if directory == "leftovers":
        (run_dir / "checkpoints" / (SAVING + "step_00000005")).mkdir()
        (run_dir / "checkpoints" / "notes.txt").touch()
    if resume == "must":
        with pytest.raises(ConfigError, match="resume: auto") as error:
            find_checkpoint(run_dir, resume, no_warning)
        assert str(run_dir) in str(error.value) and error.value.exit_code == 2
    else:
        assert find_checkpoint(run_dir, resume, no_warning) is None


def test_with_checkpoints_only_never_refuses(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 4)
    assert is_content_of(find_checkpoint(tmp_path, "auto", no_warning), 4)
    assert is_content_of(find_checkpoint(tmp_path, "must", no_warning), 4)
    with pytest.raises(ConfigError, match="another output_dir, or set resume: auto"):
        find_checkpoint(tmp_path, "never", no_warning)


# ---- the same step again, leftovers, pruning


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_saving_a_step_again_replaces_it_sound_or_damaged(tmp_path, damage):
    path = save_checkpoint(tmp_path, 5, values_of(4), {"step": 4}, keep_last=2)
    if damage:
        DAMAGES[damage](path / "model.safetensors")
    save(tmp_path, 5)
    assert is_content_of(find_checkpoint(tmp_path, "must", no_warning), 5)
    assert names_in(tmp_path) == {"step_00000005", "latest"}


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000005").write_text("in the way")
    save(tmp_path, 5)
    assert is_content_of(find_checkpoint(tmp_path, "must", no_warning), 5)


def leave_leftovers(run_dir: Path) -> None:
    directory = run_dir / "checkpoints"
    shutil.copytree(directory / "step_00000001", directory / (SAVING + "step_00000002"))
    shutil.copytree(directory / "step_00000001", directory / (REPLACED + "step_00000001"))
    (directory / (SAVING + "step_00000003")).mkdir()
    (directory / (SAVING + "latest")).write_text("step_0")


@pytest.mark.parametrize("by", ["start", "save of another step", "save of the same step"])
def test_leftovers_of_killed_saves_are_removed(tmp_path, by):
    save(tmp_path, 1)
    leave_leftovers(tmp_path)
    assert is_content_of(find_checkpoint(tmp_path, "auto", no_warning), 1)
    expected = {"latest", "step_00000001"}
    if by == "start":
        with RunLock(tmp_path):
            pass
    else:
        step = 2 if by == "save of the same step" else 4
        save(tmp_path, step)
        expected.add(f"step_{step:08d}")
    assert names_in(tmp_path) == expected


def test_a_checkpoint_moved_aside_is_found_and_comes_back(tmp_path):
    path = save(tmp_path, 1)
    path.rename(path.with_name(REPLACED + path.name))
    assert is_content_of(find_checkpoint(tmp_path, "auto", no_warning), 1)
    remove_leftovers(tmp_path / "checkpoints")
    assert names_in(tmp_path) == {"latest", "step_00000001"}
    assert is_content_of(find_checkpoint(tmp_path, "auto", no_warning), 1)


def test_pruning_keeps_the_newest(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, keep_last=3)
        assert steps_in(tmp_path) == list(range(max(1, step - 2), step + 1))
    save(tmp_path, 7, keep_last=1)
    assert steps_in(tmp_path) == [7]


def test_pruning_never_deletes_the_last_sound_one(tmp_path):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    # After a fall back to 30 the run saves at 35; 40 and 50 are newer by name but damaged, and 35
    # itself comes back damaged from the disk.
    for step in (40, 50):
        flip_random_bit(tmp_path / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    save(tmp_path, 35, keep_last=2)
    assert steps_in(tmp_path) == [35, 40, 50], "the newest sound one stays, older ones go"
    save(tmp_path, 36, keep_last=2)
    assert steps_in(tmp_path) == [36, 40, 50]
    assert is_content_of(find_checkpoint(tmp_path, "must", lambda _: None), 36)


def test_pruning_deletes_oldest_first_and_the_manifest_before_the_rest(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    removed: list[str] = []
    real_unlink, real_rmtree = os.unlink, shutil.rmtree

    def unlink(path, *args, **kwargs):
        removed.append(Path(path).name)
        return real_unlink(path, *args, **kwargs)

    def rmtree(path, *args, **kwargs):
        removed.append(Path(path).name)
        return real_rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(tmp_path, 4, keep_last=2)
    steps = [name for name in removed if name.startswith("step_")]
    assert steps == ["step_00000001", "step_00000002"]
    for name in steps:
        assert removed[removed.index(name) - 1] == "manifest.json"


def test_a_save_succeeds_though_old_files_cannot_be_deleted(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    warnings: list[str] = []
    save(tmp_path, 3, keep_last=2, warn=warnings.append)
    assert len(warnings) == 1 and "step_00000001" in warnings[0]
    assert is_content_of(find_checkpoint(tmp_path, "must", no_warning), 3)


# ---- another model, other data


def test_changed_fields_are_refused_one_line_each(tmp_path):
    saved = {
        "model": {
            "hidden_size": 256,
            "tied": True,
            "moe": {"losses": [{"name": "z", "weight": 0.1}]},
        },
        "data": {"fingerprint": "aa", "order": [1, 2]},
        "tokenizer": {"old": None},
    }
    current = {
        "model": {"hidden_size": 128, "tied": 1, "moe": {"losses": [{"name": "z", "weight": 0.2}]}},
        "data": {"fingerprint": "aa", "order": (1, 2)},
        "tokenizer": {"new": {"kind": "bpe"}},
    }
    with pytest.raises(ConfigError) as error:
        refuse_changes(saved, current)
    assert str(error.value).splitlines()[1:-1] == [
        "model.hidden_size: 256 in the checkpoint, 128 now",
        "model.tied: true in the checkpoint, 1 now",
        "model.moe.losses[0].weight: 0.1 in the checkpoint, 0.2 now",
        "tokenizer.old: null in the checkpoint, not set now",
        'tokenizer.new.kind: not set in the checkpoint, "bpe" now',
    ]
    assert "another output_dir" in str(error.value).splitlines()[-1]
    assert error.value.exit_code == 2


def test_a_number_that_a_router_may_change_is_no_change_of_the_run():
    def identity(rate, other=None, **settings):
        router = {"name": "topk", "bias_update_rate": rate} | settings
        return {"model": {"moe": {"router": router, "layers": [{"router": other}]}}}

    def changes(saved, current):
        return changed_settings(with_allowed_changes(saved, current), current)

    before = identity(0.1)
    assert changes(before, identity(0)) == [] and before == identity(0.1)
    assert changes(identity(0, before["model"]["moe"]["router"]), identity(0.1, {})) != []
    rate = "model.moe.router.bias_update_rate"
    assert changes(before, identity(None)) == [f"{rate}: 0.1 in the checkpoint, null now"]
    assert changes(identity(None), before) == [f"{rate}: null in the checkpoint, 0.1 now"]
    (line,) = changes(identity(0.1, top_k=2), identity(0.2, top_k=1))
    assert line == "model.moe.router.top_k: 2 in the checkpoint, 1 now"
    # What is gone since, or was not there yet, is told as any other change.
    name = '"my_lab.gone" in the checkpoint, "topk" now'
    assert f"model.moe.router.name: {name}" in changes(identity(0.1, name="my_lab.gone"), before)
    for old in ({}, {"model": {}}, {"model": {"moe": {"router": {"name": "topk"}}}}):
        assert changes(old, before) != []


def test_the_same_settings_pass_after_a_round_trip(tmp_path):
    settings: dict[str, Any] = {
        "model": {"rates": (1, 2.5), "empty": {}, "none": None, "name": "ü", "x": [{}]}
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {}, settings, keep_last=1))
    refuse_changes(loaded.state, settings)


def test_a_folder_in_the_place_of_latest_does_not_stop_a_save(tmp_path):
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    told: list[str] = []
    tensors = {"model": {"w": torch.ones(1)}}
    path = save_checkpoint(tmp_path, 1, tensors, {}, keep_last=1, warn=told.append)
    assert verify_checkpoint(path) == []
    assert told == [
        f"{path.parent / 'latest'} is a folder, it should name step_00000001: remove it"
    ]
