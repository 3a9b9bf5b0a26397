"""One run in several processes: ``torchrun`` starts them, and each trains on its share of every mini-batch."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from localsgd_ext.train.config import ONE_PROCESS, RunConfig

T = TypeVar("T")

_LAST_WORDS = "last words of the first process"
_PATIENCE = timedelta(seconds=5)  # with the first process, which may be about to fail for the same reason


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is; by default there is no other."""

    rank: int = 0
    size: int = 1
    launch: str = ""
    """Names the torchruns that started them, one a line; they outlive the processes, which a restart replaces."""
    store: Any = field(default=None, compare=False, repr=False)
    """``torch.distributed``'s, through which a process that fails finds out what the others have said."""

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

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, in the order of ranks. All processes must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def of(self, ranks: list[int]) -> str:
        """``process 2 of 4``: those of ``ranks``, counted from 1."""
        numbers = ", ".join(str(rank + 1) for rank in ranks)
        return f"process{'es' if len(ranks) > 1 else ''} {numbers} of {self.size}"

    def last_words(self, error: str) -> str | None:
        """What this process, which ends with ``error``, has to say of it; ``None``: another says the same.

        The first process says what it has. Another one names itself, and says only what neither the first nor a third has said.
        Any process may call it, whatever the others do: nothing waits for them but, for seconds, for the first one's words.
        """
        words = error if self.is_first else f"{self.of([self.rank])} on {socket.gethostname()}: {error}"
        if self.store is None:
            return words
        try:
            if self.is_first:
                self.store.set(_LAST_WORDS, error)
            elif self._first_says(error) or self.store.add(hashlib.sha256(error.encode()).hexdigest(), 1) > 1:
                return None
        except RuntimeError:  # the store is gone, with the process that had it
            pass
        return words

    def _first_says(self, error: str) -> bool:
        try:
            self.store.wait([_LAST_WORDS], _PATIENCE)
        except dist.DistStoreError:  # it has not failed
            return False
        return bool(self.store.get(_LAST_WORDS) == error.encode())

    @contextlib.contextmanager
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


@contextlib.contextmanager
def started() -> Iterator[World]:
    """The processes that torchrun has started, as a process group: NCCL for GPUs, gloo for CPUs; without torchrun this one alone."""
    environment = os.environ
    torchrun = _torchrun()
    if int(environment.get("WORLD_SIZE", 1)) == 1 or "RANK" not in environment:
        yield World(launch=torchrun)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives a restart, and with it the addresses of processes that are dead. Restarts are counted by each node's agent:
        # where they may differ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store each time.
        store = PrefixStore(f"restart {environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(store=store, rank=rank, world_size=size)
    try:
        launch = "\n".join(sorted(set(World(rank, size).gather(torchrun)) - {""}))
        yield World(rank, size, launch, store)
        with contextlib.suppress(RuntimeError):  # another has failed since, and says why
            dist.barrier()  # or the first to leave would cut off what others still wait for
    finally:
        dist.destroy_process_group()
        # Of gloo that only drops references. Its threads end with the last of them, which the trainer's reference cycles hold, unless an
        # exception holds the trainer. One that let go of a tensor while the interpreter shuts down would abort the process.
        gc.collect()


def _torchrun() -> str:
    """The torchrun that has started this process: its machine, its number there and when it began. Empty if none has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:
        # In ticks since the machine was started.
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # no Linux: numbers of processes come again, but not soon
        began = ""
    return f"{socket.gethostname()} {parent} {began}".strip()
