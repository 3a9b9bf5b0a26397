"""Tests that run in several processes on gloo.

``@distributed_test(world_size=2)`` runs the function below it in that many processes, each with a default process group; a
test whose arguments have a ``world_size`` may leave it out. Processes are forked from a server that has imported everything
already. What one of them raises fails the test, and so does one that takes too long: nothing hangs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0

_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed", "localsgd_ext.distributed", "models", "replicated"]
)


def distributed_test(world_size: int | None = None, timeout: float = TIMEOUT) -> Callable[..., Any]:
    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(**arguments: Any) -> None:
            run(arguments["world_size"] if world_size is None else world_size, function, arguments, timeout)

        return test

    return decorate


def run(world_size: int, function: Callable[..., None], arguments: dict[str, Any], timeout: float = TIMEOUT) -> None:
    """Run ``function(**arguments)``, a module's own, in every process; raises ``AssertionError`` with what went wrong."""
    with tempfile.TemporaryDirectory() as directory:
        where = function.__module__, function.__qualname__, arguments
        processes = [
            _servers.Process(target=_process, args=(rank, world_size, directory, timeout, *where)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        while any(p.is_alive() for p in processes) and time.monotonic() < end and not any(p.exitcode for p in processes):
            time.sleep(0.01)
        grace = min(end, time.monotonic() + 5)  # for the others to fail with a message of their own
        for process in processes:
            process.join(max(0.0, grace - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        failures = [f"rank {file.suffix[1:]}:\n{file.read_text()}" for file in sorted(Path(directory).glob("failure.*"))]
        codes = [process.exitcode for process in processes]
        if failures or hung or any(codes):
            raise AssertionError("\n".join([f"exit codes {codes}, still running: {hung}", *failures]))


def _process(
    rank: int, world_size: int, directory: str, timeout: float, module: str, name: str, arguments: dict[str, Any]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("error", UserWarning)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        getattr(importlib.import_module(module), name).__wrapped__(**arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(directory, f"failure.{rank}").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)  # the process group's threads may be waiting for a process that is gone


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For what one process trains by itself, as a reference, beside a process group: no warning that it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "local updates are not summed")
        yield


def raises_everywhere(kind: type[BaseException], action: Callable[[], Any]) -> str:
    """The message of what ``action`` raises; all processes must see it raise."""
    message = ""
    try:
        action()
    except kind as error:
        message = str(error)
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    assert all(messages), f"{kind.__name__} was not raised on all ranks: {messages}"
    return message
