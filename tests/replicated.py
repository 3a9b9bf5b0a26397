"""Runs of several processes, and of one with the whole batch beside them."""

import io

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import batches, seeded
from processes import alone
from torch import nn

from localsgd_ext import LocalizedLearning, StaticModeSelection
from localsgd_ext.distributed import ReplicatedModel

EPOCHS, SIZE = 6, 8


class NoNorm(nn.Module):
    """Five layers without BatchNorm, whose statistics would differ from share to share: 3x3, 1x1 widening, 1x1, 3x3, linear."""

    def __init__(self):
        super().__init__()
        shapes = [(3, 4, 3), (4, 9, 1), (9, 5, 1), (5, 6, 3)]
        self.convs = nn.ModuleList(nn.Conv2d(c, k, size, padding=size // 2) for c, k, size in shapes)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


def share(x, y, group=None):
    """This process's part of a mini-batch."""
    return tuple(t.chunk(dist.get_world_size(group))[dist.get_rank(group)] for t in (x, y))


def fixed(boundary):
    return StaticModeSelection(kind=lambda epoch: boundary, l_max=0.8)


class Run:
    """A run of a few epochs over moves of the boundary; ``replicated`` or in one process with all images."""

    def __init__(
        self, build=NoNorm, *, replicated, dtype=torch.float64, group=None, sync="step", bucket_bytes=400, ddp=None, **options
    ):
        self.replicated, self.group, self.to_none = replicated, group, True
        self.network = seeded(build).to(dtype)
        self.dtype = dtype
        self.model = self.network
        if replicated:
            self.model = ReplicatedModel(self.network, sync=sync, bucket_bytes=bucket_bytes, process_group=group, **(ddp or {}))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = StaticModeSelection(kind=lambda epoch: (0, 2, 3, 3, 1, 3, 3)[epoch], l_max=0.8)
        self.moves = []
        with alone():
            self.local = LocalizedLearning(
                self.model,
                self.optimizer,
                **{"epochs": EPOCHS, "preset": "paper", "schedule": schedule, "lr": 0.01, **options},
                on_boundary_move=lambda old, new: self.moves.append((old, new)),
            )

    def loss(self, x, y):
        return F.cross_entropy(self.model(x), y)

    def step(self, x, y):
        if self.replicated:
            x, y = share(x, y, self.group)
        loss = self.loss(x, y)
        self.optimizer.zero_grad(set_to_none=self.to_none)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epoch(self, number, batches_per_epoch=3):
        self.model.train()
        data = batches(batches_per_epoch, SIZE, seed=number, dtype=self.dtype)
        losses = [self.step(x, y) for x, y in data]
        self.local.step(sum(losses) / len(losses) + (number % 3 == 1))  # rises, so that the sign is negative at times

    def run(self, start=0, stop=EPOCHS):
        for number in range(start, stop):
            self.epoch(number)
        return self

    def saved(self):
        """A checkpoint, as bytes, through the safe loader."""
        state = {"local": self.local.state_dict(), "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.local.load_state_dict(state["local"])
        return self


def assert_equal(one, many, *, rtol, atol):
    assert (one.local.boundary, one.local.sign) == (many.local.boundary, many.local.sign)
    ours, theirs = many.network.state_dict(), one.network.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
