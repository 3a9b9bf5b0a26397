"""A run whose batch may grow, and the bytes that it takes, counted by hand."""

import io

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from localsgd_ext import BatchGrowth, LocalizedLearning, ResizableBatchSampler, StaticModeSelection, batch_growth, step_memory
from localsgd_ext.batch_growth import SavedMemory
from localsgd_ext.distributed import ReplicatedModel

# Floats of the network below. Saved for the backward pass, per sample: the input (8) and the two ReLU's outputs (16 each, by ReLU and
# the next layer together); where the boundary is 2, only what the last layer reads (16). The last layer has 16 * 4 + 4 parameters.
PARAMETERS, LAST = (8 * 16 + 16) + (16 * 16 + 16) + 68, 68
WHOLE, STOPPED = 4 * (8 + 16 + 16), 4 * 16

# Bytes of a mini-batch of 16, with momentum: where the boundary is 2, and of a refresh.
AT_16 = 4 * (PARAMETERS + LAST + LAST) + STOPPED * 16
WHOLE_AT_16 = 4 * 3 * PARAMETERS + WHOLE * 16


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def moving(*boundaries):
    """A schedule with these boundaries, one an epoch, and the last one from then on."""
    return StaticModeSelection(kind=lambda epoch: boundaries[min(epoch, len(boundaries) - 1)], l_max=0.9)


class Shuffled:
    """Another order in every epoch, known from its number."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def dataset(length=32):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(length, 8, generator=generator), torch.randint(4, (length,), generator=generator))


class Run:
    """The user's loop. A batch of 8 out of 32 samples (of each process)."""

    def __init__(
        self,
        *,
        budget,
        boundaries=(0, 2),
        measure=None,
        refresh=None,
        scheduler=None,
        replicated=False,
        lr_scaling="none",
        rule="frozen",
        **options,
    ):
        self.network = network()
        self.model = ReplicatedModel(self.network) if replicated else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        how = {"schedule": moving(*boundaries), "refresh": refresh, "rule": rule, "supervision": None}
        self.local = LocalizedLearning(self.model, self.optimizer, epochs=9, **how)
        data = dataset(32 * (dist.get_world_size() if replicated else 1))
        self.sampler = DistributedSampler(data, seed=3) if replicated else Shuffled(len(data))
        self.batch_sampler = ResizableBatchSampler(self.sampler, 8)
        self.loader = DataLoader(data, batch_sampler=self.batch_sampler)
        self.growth = BatchGrowth(
            self.local,
            self.batch_sampler,
            memory_budget=budget,
            measure=measure or SavedMemory(self.local, torch.randn(2, 8)),
            lr_scaling=lr_scaling,
            schedulers=self.scheduler or (),
            **options,
        )
        self.steps = []

    def epoch(self, number):
        self.sampler.epoch = number  # as set_epoch() does
        for x, y in self.loader:
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        self.steps.append(len(self.loader))
        self.local.step()
        grew = self.growth.step()
        if self.scheduler:
            self.scheduler.step()
        return grew

    def epochs(self, start, stop):
        return [self.epoch(number) for number in range(start, stop)]

    def parts(self):
        named = {name: getattr(self, name) for name in ("network", "optimizer", "scheduler", "local", "growth")}
        return {name: part for name, part in named.items() if part is not None}

    def saved(self):
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        return self


class FakeDevice:
    """The allocator's counters."""

    def __init__(self, monkeypatch):
        self.peak = self.allocated = 0
        for module in (batch_growth, step_memory):
            monkeypatch.setattr(module, "device_of", lambda local: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device):
        self.peak = self.allocated

    def step(self, run, peak):
        self.peak = max(self.peak, peak)
        run.optimizer.step()
