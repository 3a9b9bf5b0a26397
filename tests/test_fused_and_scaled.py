"""Fused optimizers under GradScaler: their step is called, and left out inside the kernel, where that of others is not called."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from models import PlainCNN, batches, changed, seeded, snapshot

from localsgd_ext import LocalizedLearning, StaticModeSelection

KINDS = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **how),
    "sgd without momentum": lambda p, **how: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, **how),
    "adam": lambda p, **how: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, **how),
}
CANCELLED = {f"features.{i}.bias" for i in (0, 3, 6, 9)}  # in front of a BatchNorm: its gradient is zero but for rounding


class Training:
    """A prefix of three layers; in the mini-batches ``overflows`` the gradients are infinite."""

    def __init__(self, kind, overflows=(), *, fused, unscale=False, **options):
        self.model = seeded(PlainCNN)
        self.optimizer = KINDS[kind](self.model.parameters(), **({"fused": True} if fused else {"foreach": False}))
        self.local = LocalizedLearning(
            self.model,
            self.optimizer,
            epochs=10,
            schedule=StaticModeSelection(kind=lambda epoch: 3, l_max=0.8),
            **{"preset": "paper", "lr": 0.01, **options},
        )
        self.local.trace(torch.zeros(2, 3, 8, 8))
        self.prefix = {name for name, p in self.model.named_parameters() if name in self.local._prefix().frozen}
        self.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        self.overflows, self.unscale, self.steps = overflows, unscale, 0

    def step(self, x, y):
        """The parameters that the mini-batch moves, and whether it was a refresh."""
        before, refreshing = snapshot(self.model), self.local.refreshing
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(self.model(x), y)
        if self.steps in self.overflows:
            loss = loss * float("inf")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        named = dict(self.model.named_parameters())
        return changed(self.model, before) & named.keys() - CANCELLED, refreshing

    def state_dict(self):
        parts = (self.local, self.model, self.optimizer, self.scaler)
        saved = io.BytesIO()
        torch.save([copy.deepcopy(part.state_dict()) for part in parts], saved)
        return saved.getvalue()

    def load_state_dict(self, state):
        saved = torch.load(io.BytesIO(state), weights_only=True)
        for part, its in zip((self.model, self.optimizer, self.scaler, self.local), (*saved[1:], saved[0]), strict=True):
            part.load_state_dict(its)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("refresh", [None, 3])
@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_the_loop_that_calls_no_step(kind, rule, refresh, unscale):
    options = {"overflows": (1, 4, 5), "rule": rule, "refresh": refresh, "unscale": unscale}
    ours, theirs = Training(kind, fused=True, **options), Training(kind, fused=False, **options)
    assert ours.optimizer._step_supports_amp_scaling
    for i, (x, y) in enumerate(batches(9, seed=1)):
        moved, refreshing = ours.step(x, y)
        assert (moved, refreshing) == theirs.step(x, y), i
        local = {f"features.{n}.weight" for n in (0, 3, 6)} if rule == "hebbian" and not refreshing else set()
        if i in ours.overflows:
            assert moved == local, i
        elif not refreshing:
            assert moved & ours.prefix == local, i
        if not ours.local.refreshing:
            assert all(p.grad is None for n, p in ours.model.named_parameters() if n in ours.prefix)
    assert ours.scaler.get_scale() == theirs.scaler.get_scale() == 16.0
    for (name, mine), other in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    if kind.startswith("adam"):
        counted = [
            {n: float(t.optimizer.state[p]["step"]) for n, p in t.model.named_parameters() if p in t.optimizer.state}
            for t in (ours, theirs)
        ]
        assert counted[0] == counted[1]
        assert set(counted[0].values()) == ({6.0} if refresh is None else {6.0, 2.0})


@pytest.mark.parametrize(
    ("overflows", "refreshes"),
    [
        ((), [2, 5, 8]),
        ((2,), [2, 3, 6]),  # one that did not happen is made up for
        ((2, 3), [2, 3, 4, 7]),
        ((1,), [3, 6]),
        ((5, 7), [2, 5, 6]),
    ],
)
def test_a_refresh_that_was_left_out_is_made_up_for(overflows, refreshes):
    ours = Training("adam", overflows, fused=True, rule="frozen", refresh=3)
    found, moved = [], []
    for i, (x, y) in enumerate(batches(9, seed=1)):
        changed_now, refreshing = ours.step(x, y)
        found += [i] * refreshing
        moved += [i] * bool(changed_now & ours.prefix)
    assert found == refreshes
    assert moved == [i for i in refreshes if i not in overflows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped", [3, 4, 5])
def test_resumes(kind, stopped):
    """Before, right after and well after a refresh that was left out."""
    straight, first, second = (Training(kind, (2, 3), fused=True, refresh=3) for _ in range(3))
    data = batches(9, seed=1)
    for x, y in data:
        straight.step(x, y)
    for x, y in data[:stopped]:
        first.step(x, y)
    second.load_state_dict(first.state_dict())
    second.steps = stopped
    assert second.local.refreshing == first.local.refreshing == (stopped < 5)
    for x, y in data[stopped:]:
        second.step(x, y)
    for name, mine in second.model.state_dict().items():
        assert torch.equal(mine, straight.model.state_dict()[name]), name
    assert second.scaler.state_dict() == straight.scaler.state_dict()


@pytest.mark.parametrize("skipped", ["front", "back"])
def test_one_of_several_optimizers_is_left_out(skipped):
    """The scaler looks at each by itself. Mini-batch 1 is a refresh, whose step the front does without, or the back."""
    runs = []
    for fused in (True, False):
        model = seeded(PlainCNN)
        front = list(model.features[:9].parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in front)]
        how = {"fused": True} if fused else {"foreach": False}
        optimizers = {"back": KINDS["adam"](rest, **how), "front": KINDS["adam"](front, **how)}
        local = LocalizedLearning(
            model, optimizers.values(), epochs=10, schedule=StaticModeSelection(kind=lambda epoch: 3, l_max=0.8), refresh=2
        )
        local.trace(torch.zeros(2, 3, 8, 8))
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        history = []
        for i, (x, y) in enumerate(batches(10, seed=1)):
            before, refreshing = snapshot(model), local.refreshing
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if i == 1:
                (optimizers[skipped].param_groups[0]["params"][0]).grad.fill_(float("inf"))
            for optimizer in optimizers.values():
                # A closed prefix leaves nothing to check, which the scaler refuses where the optimizer is not fused.
                if any(p.grad is not None for p in optimizer.param_groups[0]["params"]):
                    scaler.step(optimizer)
                else:
                    optimizer.step()
                optimizer.zero_grad()
            scaler.update()
            history.append((changed(model, before) & dict(model.named_parameters()).keys() - CANCELLED, refreshing))
        runs.append(history)
    assert runs[0] == runs[1]
    assert sum(refreshing for _, refreshing in runs[0]) >= 4


def test_steps_that_the_scaler_leaves_out_are_not_the_guard_s():
    ours = Training("sgd", (1, 2), fused=True, refresh=3, nan_policy="skip")
    for x, y in batches(4, seed=1):
        ours.step(x, y)
    assert ours.local.skipped_steps == 0
    assert ours.scaler.get_scale() == 32.0
