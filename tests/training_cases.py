"""What the tests of training share: two small domains of text, a tiny model, and runs of it.

A run of ten steps takes about half a second. Its router has jitter and a loss-free bias, so that it
depends on everything that a checkpoint must hold.
"""

import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train.loop
from moe.config import ModelConfig
from train.checkpoint import Checkpoint, find_checkpoint
from train.config import RunConfig, config_from_dict
from train.data import PreparedData, prepare_data
from train.engine import PlainEngine, build_engine
from train.metrics import StepMetrics
from train.packing import Batch, TrainLoader
from train.pretrain import main
from train.random_state import seed_all
from train.tokenizer import with_vocab_size

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 8
EVALUATE_EVERY = 3
# Layers of 4, 8 and 6 experts, 1, 2 and 3 of them a token, that differ in width and router.
MIXED: dict[str, Any] = {
    "model.num_layers": 3,
    "model.moe.router": {"name": "topk", "top_k": 1, "normalize": False},
    "model.moe.layers": [
        {"layers": [1], "num_experts": 8, "intermediate_size": 24, "router": {"name": "hash"}},
        {
            "layers": [2],
            "num_experts": 6,
            "intermediate_size": 8,
            "router": {"name": "topk", "top_k": 3, "bias_update_rate": 0.02},
        },
    ],
}


@cache
def work_dir() -> Path:
    """A directory for this test process, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix="training_cases_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def texts() -> Path:
    """A folder with the documents of two domains that share hardly a letter."""
    folder = work_dir() / "texts"
    folder.mkdir()
    draw = random.Random(0)
    words = ["moss", "fern", "willow", "brook", "meadow", "thistle", "heron", "otter"]
    for number in range(16):
        prose = " ".join(draw.choice(words) for _ in range(120))
        sums = "\n".join(f"{a}+{9 * a}={10 * a}" for a in draw.choices(range(1000), k=60))
        (folder / f"prose_{number:02d}.txt").write_text(prose)
        (folder / f"sums_{number:02d}.txt").write_text(sums)
    return folder


def base_settings(run_dir: Path) -> dict[str, Any]:
    """The settings of the tiny run, as its YAML has them."""
    return {
        "output_dir": str(run_dir),
        "model": {
            "hidden_size": 16,
            "num_layers": 2,
            "attention": {"num_heads": 2},
            "moe": {
                "num_experts": 4,
                "intermediate_size": 16,
                "router": {"name": "topk", "jitter": 0.2, "bias_update_rate": 0.02},
            },
        },
        "data": {
            "cache_dir": str(work_dir() / "cache"),
            "domains": [
                {"name": name, "files": str(texts() / f"{name}_*.txt")}
                for name in ("prose", "sums")
            ],
            "validation_fraction": 0.2,
            "validation_tokens": 128,
        },
        "tokenizer": {"kind": "bytes"},
        "optimizer": {"learning_rate": 0.02},
        "training": {
            "steps": NUM_STEPS,
            "seq_len": 16,
            "batch_size": 4,
            "micro_batch_size": 2,
            "precision": "float32",
            "threads": 1,
        },
        "evaluation": {"every": EVALUATE_EVERY, "batch_size": 4},
        "checkpoint": {"every": 0},
        "logging": {"every": 1, "tensorboard": False, "heatmap_every": 0},
    }


def settings(run_dir: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tiny run with `section.key` of `changes` set; a value of `...` removes the key."""
    values = base_settings(run_dir)
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        node: Any = values
        for section in sections:
            node = node[int(section)] if isinstance(node, list) else node.setdefault(section, {})
        if value is ...:
            del node[key]
        else:
            node[key] = value
    return values


def make_config(run_dir: Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """The tiny run's config, its vocabulary known."""
    config = config_from_dict(settings(run_dir, changes))
    return config.model_copy(update={"model": with_vocab_size(config.model, 258)})


def write_config(run_dir: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The tiny run's YAML, beside its run directory."""
    path = run_dir.with_suffix(".yaml")
    # JSON is YAML.
    path.write_text(json.dumps(settings(run_dir, changes), indent=1))
    return path


@cache
def data() -> PreparedData:
    """The two domains, tokenised."""
    config = config_from_dict(base_settings(work_dir() / "unused"))
    return prepare_data(config.data, config.tokenizer, progress=False)


def make_engine(config: RunConfig, model: ModelConfig | None = None) -> PlainEngine:
    """The engine at the beginning of a run."""
    seed_all(config.seed)
    return build_engine(config, model or config.model)


def micro_batches(config: RunConfig, step: int = 0) -> list[Batch]:
    """The micro-batches of a step."""
    loader = TrainLoader(data(), config.training.seq_len, config.seed)
    size = config.micro_batch_size
    first = step * config.training.batch_size
    return [loader.batch(first + i, size) for i in range(0, config.training.batch_size, size)]


def noise_from_pytorch(patch: pytest.MonkeyPatch) -> None:
    """From now on routers draw noise from PyTorch's stream, as one's own may: what loses, repeats
    or forgets a random stream is seen in the weights."""
    real = TrainLoader.batch

    def batch(loader: TrainLoader, first_sequence: int, num_sequences: int) -> Batch:
        return real(loader, first_sequence, num_sequences)._replace(noise_seeds=None)

    patch.setattr(TrainLoader, "batch", batch)


# ---- runs in this process


def run(run_dir: Path, changes: Mapping[str, Any] | None = None, *arguments: str) -> int:
    """`python -m train.pretrain` on the tiny run; its exit code."""
    return main(["--config", str(write_config(run_dir, changes)), *arguments])


class Recorder:
    """What the steps of the runs inside `with` returned, and hooks to act at chosen instants.

    steps: StepMetrics in order, dropped steps left out. before_step(step), before_forward(count):
    called before optimizer step `step` (from 0) and before forward pass `count` (from 0, validation
    and the forward passes that only count included).
    """

    def __init__(
        self,
        before_step: Callable[[int], object] = lambda step: None,
        before_forward: Callable[[int], object] = lambda count: None,
    ):
        self.steps: list[StepMetrics] = []
        self.forwards = 0
        self._before_step, self._before_forward = before_step, before_forward
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Recorder":
        real_step, real_forward = train.loop.train_step, PlainEngine.__call__

        def step(engine, batches, number, config, **kwargs):
            self._before_step(number)
            metrics = real_step(engine, batches, number, config, **kwargs)
            if metrics is not None:
                self.steps.append(metrics)
            return metrics

        def forward(engine, batch, totals=None):
            self._before_forward(self.forwards)
            self.forwards += 1
            return real_forward(engine, batch, totals)

        self._patch.setattr(train.loop, "train_step", step)
        self._patch.setattr(PlainEngine, "__call__", forward)
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.undo()


def send(number: int) -> None:
    """Send this process a signal; its Python handler runs before the next line."""
    os.kill(os.getpid(), number)


def at(wanted: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """A hook that sends the signal when it is called with `wanted`."""
    return lambda count: send(number) if count == wanted else None


def checkpoint(run_dir: Path) -> Checkpoint:
    """The newest checkpoint of a run; a warning is an error."""

    def fail(message: str) -> None:
        raise AssertionError(f"unexpected warning: {message}")

    found = find_checkpoint(run_dir, "must", fail)
    assert found is not None
    return found


def bits(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, bytes]:
    """Every tensor's dtype, shape and bytes, by group and name."""
    return {
        f"{group}/{name}": repr((t.dtype, tuple(t.shape))).encode()
        + t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for group, named in tensors.items()
        for name, t in named.items()
    }


def different(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> list[str]:
    """Names whose bits differ, or that only one has."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def same_steps(a: list[StepMetrics], b: list[StepMetrics]) -> bool:
    """Whether two lists of steps agree in every bit, but for times and memory; NaN agrees."""
    return [_step_bits(step) for step in a] == [_step_bits(step) for step in b]


def _step_bits(step: StepMetrics) -> str:
    detail = step.detail and step.detail._replace(memory_gib=0.0)
    untimed = step._replace(work_seconds=torch.zeros(0), detail=detail)

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return value

    return repr(plain(untimed))


# ---- runs in processes of their own

_LAUNCHER = """
import json, os, sys, traceback
from train.pretrain import main
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            code = main(request["arguments"])
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Launcher:
    """Starts runs as processes that can be killed.

    One Python imports the program and forks for each run: four seconds of imports once, not at each
    start.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self._process.kill)
        self.pid = 0
        self.log = work_dir() / "log.txt"
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, config: Path, *arguments: str) -> None:
        """Start `python -m train.pretrain --config ...`; its output goes to `log`."""
        assert self._process.stdin is not None
        self.log.unlink(missing_ok=True)
        request = {"arguments": ["--config", str(config), *arguments], "log": str(self.log)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._line())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until the run has printed `text`."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < end, self.output()
            time.sleep(0.005)

    def output(self) -> str:
        """What the run has printed so far, stdout and stderr."""
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Send the run a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the run's end: its exit code, or minus the signal that killed it."""
        return int(self._line())


@cache
def launcher() -> Launcher:
    """The launcher of this test process."""
    return Launcher()
