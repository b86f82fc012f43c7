"""Ways to start the program with many ranks: under a launcher, or forked here without one.

A launcher costs 5 to 15 seconds, most of it imports; ranks that are forked from a process which has
imported everything begin to train after one. They do not end each other, as a launcher's do.
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
from rank_cases import ON_CPU, end_with_parent, free_port, process_context, rank_environment
from training_cases import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), **ON_CPU}


class Started:
    """Ranks that run, and what they print, until the end of a test at the latest."""

    def __init__(self, log: Path, config: Path):
        self.log, self.config = log, config

    def output(self) -> str:
        """What the ranks have printed so far, stdout and stderr."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until one of them has printed `text`."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < end, self.output()[-4000:]
            assert self.running() or text in self.output(), self.output()[-4000:]
            time.sleep(0.01)

    def wait(self, seconds: float = 90) -> int:
        """Wait for the end; the exit code, another than 0 if one of several is."""
        end = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < end, f"not done after {seconds} s:\n{self.output()[-4000:]}"
            time.sleep(0.01)
        return self.exit_code()

    def running(self) -> bool:
        raise NotImplementedError

    def exit_code(self) -> int:
        raise NotImplementedError

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks that are there, the first rank first."""
        raise NotImplementedError

    def end(self) -> None:
        """Nothing of it is left."""
        raise NotImplementedError


class Launched(Started):
    """`train.pretrain` under a launcher, in a session of its own."""

    def __init__(
        self,
        launcher: str,
        world: int,
        config: Path,
        *arguments: str,
        log: Path,
        port: int | None = None,
    ):
        super().__init__(log, config)
        port = port or free_port()
        command = {
            "deepspeed": f"deepspeed.launcher.runner -q --no_local_rank --num_accelerators={world} "
            f"--master_port={port} --module",
            "torchrun": f"torch.distributed.run --nproc_per_node={world} "
            f"--master_addr=127.0.0.1 --master_port={port} -m",
            # One of several nodes that are started by hand, `world` its number.
            "node": f"deepspeed.launcher.runner -q --no_local_rank --no_ssh --node_rank={world} "
            f"--hostfile={config.parent / 'hostfile'} --master_addr=127.0.0.1 "
            f"--master_port={port} --module",
        }[launcher].split()
        program = ["train.pretrain", "--config", str(config), *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, *program],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=config.parent,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def exit_code(self) -> int:
        """The launcher's."""
        return self.process.wait()

    def ranks(self) -> list[psutil.Process]:
        """Processes that run the program with our config, whoever their parents are by now."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ValueError):
                command = process.cmdline()
                if "train.pretrain" in command[1:4] and str(self.config) in command:
                    found[int(process.environ().get("RANK", ""))] = process
        return [found[rank] for rank in sorted(found)]

    def end(self) -> None:
        for process in self.ranks():
            process.kill()
        if self.running():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        assert self.ranks() == []


class Forked(Started):
    """`train.pretrain` in ranks that are forked here, each with what a launcher would tell it."""

    def __init__(self, world: int, config: Path, *arguments: str, log: Path):
        super().__init__(log, config)
        context: Any = process_context("cpu")
        port, command = free_port(), ["--config", str(config), *arguments]
        self.processes = [
            context.Process(target=_program, args=(rank, world, port, log, command))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return None in self.exit_codes()

    def exit_codes(self) -> list[int | None]:
        """Of each rank; None while it runs, minus the signal that killed it."""
        return [process.exitcode for process in self.processes]

    def exit_code(self) -> int:
        return next((code for code in self.exit_codes() if code), 0)

    def wait_for_one(self, seconds: float = 60) -> int:
        """Wait until a rank has ended: which one."""
        sentinels = [process.sentinel for process in self.processes]
        ended = connection.wait(sentinels, seconds)
        assert ended, f"no rank has ended after {seconds} s:\n{self.output()[-4000:]}"
        return sentinels.index(ended[0])

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self.processes if process.is_alive()]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _program(rank: int, world: int, port: int, log: Path, arguments: list[str]) -> None:
    """`python -m train.pretrain` as far as it can be told from inside."""
    gc.freeze()
    end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (1, 2):
        os.dup2(file, target)
    os.environ.update(rank_environment(rank, world, port))
    code: Any = 1
    try:
        from train.pretrain import main

        code = main(arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
