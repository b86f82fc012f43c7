"""Is data prepared once, and is nothing half-written or damaged ever trusted?"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_cases import BYTES, corpus_config, documents_of, prepare, write_texts

from train import data as data_module
from train.data import DataConfig, prepare_data
from train.tokenizer import TokenizerConfig

pytest_plugins = ["data_fixtures"]


def test_the_second_preparation_reads_and_tokenises_nothing(data_cache, corpus, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("done again")

    for name in ("write_tokens", "select_documents", "read_selected"):
        monkeypatch.setattr(data_module, name, never)
    again = prepare_data(corpus_config(data_cache), TokenizerConfig(vocab_size=512), progress=False)
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(AssertionError, match="done again"):
        prepare_data(corpus_config(data_cache, 100_000), BYTES, progress=False)


def test_the_fingerprint_follows_text_tokenizer_and_names_but_not_weights(tmp_path):
    texts = [f"text {i}" for i in range(30)]
    folder = tmp_path / "in"
    files = write_texts(folder, texts)

    def fingerprint(name="a", weight=1.0, tokenizer=BYTES):
        domain = {"name": name, "files": str(folder / "*.txt"), "weight": weight}
        config = DataConfig(cache_dir=str(tmp_path / "cache"), domains=[domain])
        return prepare_data(config, tokenizer, progress=False).fingerprint

    first = fingerprint()
    assert fingerprint(weight=2.0) == first
    others = [fingerprint(name="b"), fingerprint(tokenizer=TokenizerConfig(vocab_size=260))]
    files[3].write_text("other text", encoding="utf-8")
    others.append(fingerprint())
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "no file", "no manifest", "bad manifest", "a file in its place"]
)
def test_a_damaged_token_file_is_found_and_made_again(tmp_path, damage, caplog):
    files = write_texts(tmp_path / "in", [f"text {i}" for i in range(30)])
    before = prepare(tmp_path, files).fingerprint
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    path, manifest = entry / "train.bin", entry / "manifest.json"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[7] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-2])
    elif damage == "a file in its place":
        shutil.rmtree(entry)
        entry.touch()
    elif damage == "bad manifest":
        manifest.write_text("{", encoding="utf-8")
    else:
        (path if damage == "no file" else manifest).unlink()
    after = prepare(tmp_path, files)
    assert "is damaged and is made again" in caplog.text
    assert after.fingerprint == before
    assert (
        len(documents_of(after, "d0", "train")) + len(documents_of(after, "d0", "validation")) == 30
    )


KILLED = """
import os, signal, sys
from train import token_files
from train.data import DataConfig, prepare_data
from train.tokenizer import TokenizerConfig

write, calls = token_files._write_batch, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
token_files._write_batch, token_files._BATCH_CHARS = killed, 200
domains = [{"name": "d0", "files": sys.argv[1]}]
prepare_data(DataConfig(cache_dir=sys.argv[2], domains=domains), TokenizerConfig(kind="bytes"),
             progress=False)
"""


def test_a_kill_during_tokenisation_leaves_nothing_that_is_trusted(tmp_path):
    files = write_texts(tmp_path / "in", [f"text {i} " + "x" * 50 for i in range(60)])
    folder, cache = str(tmp_path / "in" / "*.txt"), tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, folder, str(cache)]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -9, done.stderr.decode()
    left = list((cache / "tokens").iterdir())
    assert left and all(path.name.startswith(".tmp-") for path in left)
    assert any((path / "train.bin").exists() for path in left)
    data = prepare(tmp_path, files)
    documents = documents_of(data, "d0", "train") + documents_of(data, "d0", "validation")
    assert len(documents) == 60
    assert not list((cache / "tokens").glob(".tmp-*"))


def test_two_processes_that_prepare_at_once_agree(tmp_path):
    write_texts(tmp_path / "in", [f"text {i} " + "x" * 50 for i in range(60)])
    script = KILLED.replace("== 4", "== -1").replace("prepare_data(Data", "print(prepare_data(Data")
    script = script.replace("progress=False)", "progress=False).fingerprint)")
    command = [sys.executable, "-c", script, str(tmp_path / "in" / "*.txt"), str(tmp_path / "c")]
    root = Path(__file__).parents[1]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] and len(outputs[0].strip()) == 64
