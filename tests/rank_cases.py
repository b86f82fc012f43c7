"""What the tests of many ranks share: processes that form a group and run a function each.

Starting a group costs seconds, so one group runs many cases. A group that does not end in time is
killed, with the stacks of its processes in the message.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from train.ranks import Ranks

# What a rank needs before its own work: seconds of imports, done once for all that are forked.
_IMPORTED = [
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "pytest",
    "train.deepspeed_engine",
    "train.pretrain",
]

# Also where there is a GPU: what was imported must not have touched it before a fork.
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# Of every operation between the ranks of `run_ranks`: no default of anyone's.
TIMEOUT_MINUTES = 1.25


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@cache
def process_context(device: str) -> BaseContext:
    """How ranks are started: forked from a process that has imported everything and computed
    nothing; on a GPU each anew, as CUDA wants it."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_CPU.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def end_with_parent() -> None:
    """End this process, started by `process_context`, when the test's own is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(
    world_size: int,
    work: Callable[..., Any],
    *args: Any,
    seconds: float = 120,
    device: str = "cpu",
) -> list:
    """What `work(ranks, *args)` returns on each rank of a new process group.

    Raises:
        AssertionError: if a rank raises, dies, or does not end in `seconds`.
    """
    context: Any = process_context(device)
    port, results = free_port(), context.SimpleQueue()
    with tempfile.TemporaryDirectory() as logs:
        processes = [
            context.Process(
                target=_child, args=(rank, world_size, device, port, logs, results, work, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        end = time.monotonic() + seconds
        try:
            while len(answers) < world_size:
                while not results.empty():
                    rank, error = results.get()
                    assert error is None, f"rank {rank} of {world_size}:\n{error}"
                    # Not through the queue: it would hand over shared memory that ends with them.
                    answers[rank] = torch.load(Path(logs) / f"{rank}.pt", weights_only=False)
                dead = [
                    rank
                    for rank, process in enumerate(processes)
                    if process.exitcode is not None and rank not in answers and results.empty()
                ]
                codes = [processes[rank].exitcode for rank in dead]
                assert not dead, f"ranks {dead} died ({codes}): {_read(logs)}"
                if time.monotonic() > end:
                    raise AssertionError(f"not done after {seconds} s: {_stacks(processes, logs)}")
                time.sleep(0.01)
        finally:
            for process in processes:
                process.join(5 if len(answers) == world_size else 0)
                process.kill()
                process.join()
    return [answers[rank] for rank in range(world_size)]


def _stacks(processes: list[Any], logs: str) -> str:
    """What the ranks have written, and where each of them is."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)
    return _read(logs)


def _read(logs: str) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(Path(logs).glob("*.txt")))


def _child(rank, world_size, device, port, logs, results, work, args) -> None:
    import faulthandler

    # DeepSpeed's stage 3 collects garbage: a tenth of the time without all that was imported.
    gc.freeze()
    end_with_parent()
    log = open(Path(logs) / f"rank_{rank}.txt", "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    # Not by the clock: a dump beside code that runs can crash the process.
    faulthandler.register(signal.SIGUSR1, file=log)
    os.environ.update(rank_environment(rank, world_size, port))
    try:
        from train.expert_parallel import connect

        torch.set_num_threads(1)
        connect(device, Ranks(rank, rank, world_size), timeout_minutes=TIMEOUT_MINUTES)
        torch.save(work(Ranks(rank, rank, world_size), *args), Path(logs) / f"{rank}.pt")
        results.put((rank, None))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        sys.exit(1)


def _gathered(engine: Any, parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Whole tensors of every group, on every rank, whichever engine has them."""
    # On the CPU: a tensor of a GPU would come from another rank on that rank's.
    copies = {
        group: {k: t.detach().cpu().clone() for k, t in named.items()}
        for group, named in parts.items()
    }
    if not engine.shared_out:
        return copies
    shapes = engine.state_shapes()
    fragments: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    joined: dict[str, dict[str, Any]] = {group: {} for group in copies}
    for theirs in engine.gather(copies):
        for group, named in theirs.items():
            for key, values in named.items():
                name, found, start = key.rpartition("@")
                if found:
                    fragments.setdefault(group, {}).setdefault(name, {})[int(start)] = values
                else:
                    joined[group][key] = values
    for group, by_name in fragments.items():
        for name, pieces in by_name.items():
            shape = shapes[name if group == "model" else name.rpartition(":")[0]]
            joined[group][name] = torch.cat([pieces[at] for at in sorted(pieces)]).view(shape)
    return joined


def gathered_state(engine: Any) -> dict[str, dict[str, Any]]:
    """Weights and moments of the whole model."""
    return _gathered(engine, engine.state_tensors())


def gathered_gradients(engine: Any) -> dict[str, Any]:
    """Gradients of the whole model, after the last backward pass of a step."""
    from train.expert_names import split_experts

    if not engine.shared_out:
        return {
            part_name: part
            for name, parameter in engine.model.named_parameters()
            for part_name, part in split_experts(name, parameter.grad.cpu().clone()).items()
        }
    from train.fragments import gradient_of, held_parts, split_part

    found = {}
    for number, part in enumerate(held_parts(engine.engine, engine.stage)):
        gradient = gradient_of(engine.stage, part)
        if gradient is not None and engine._writes(part, number):
            for name, start, values in split_part(part, gradient):
                found[f"{name}@{start}"] = values
    return _gathered(engine, {"model": found})["model"]
