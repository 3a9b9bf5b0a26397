"""One run in several processes: ``torchrun`` starts them, and each trains on its share of every mini-batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from localsgd_ext.train.config import ONE_PROCESS, RunConfig

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is; by default there is no other."""

    rank: int = 0
    size: int = 1
    restarts: int = 0
    """How often torchrun has started them again, after one had died."""
    launch: str = ""
    """Names the torchrun that started them, the same after a restart: the id it was given, or else its own process."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's part of a mini-batch; all parts together are the mini-batch, in its own order."""
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def from_first(self, value: T) -> T:
        """The first process's ``value``. All processes must call it."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, value: bool) -> bool:
        """Whether it holds on any process. All processes must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return any(values)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process goes through the block before the others: it makes what they find."""
        if self.size > 1 and not self.is_first:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.is_first:
                dist.barrier()


ALONE = World()


def check(config: RunConfig, world: World) -> None:
    """Raises ``ValueError`` for a run that cannot be made by so many processes."""
    if world.size > 1 and config.method in ONE_PROCESS:
        raise ValueError(f"--method {config.method} runs in one process, got {world.size}")
    if world.size == 1 and config.sync != "step":
        raise ValueError(f"--sync {config.sync} needs several processes, started by torchrun, got one")


@contextmanager
def started() -> Iterator[World]:
    """The processes that torchrun has started, as a process group: NCCL for GPUs, gloo for CPUs; without torchrun this one alone."""
    environment = os.environ
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
    run_id = environment.get("TORCHELASTIC_RUN_ID", "")
    launch = f"{socket.gethostname()} {os.getppid()}" if run_id == "none" else run_id
    if int(environment.get("WORLD_SIZE", 1)) == 1 or "RANK" not in environment:
        yield World(restarts=restarts, launch=launch)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives a restart, and with it the addresses of processes that are dead. Restarts are counted by each node's agent:
        # where they may differ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store each time.
        store = PrefixStore(f"restart {restarts}", store)
    dist.init_process_group(store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, restarts, launch)
        # The last of what gloo's threads do: one that let go of a tensor while the interpreter is shutting down would abort the process.
        dist.barrier()
    finally:
        dist.destroy_process_group()
