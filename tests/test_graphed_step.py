"""The training step as a graph: the numbers of the plain loop, captured again exactly where a graph would hold fast what changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PlainCNN, TwoBlockResNet, batches, changed, seeded, snapshot, twice_used
from recorded_graph import RecordedGraphs
from torch import Tensor, nn

from localsgd_ext import GraphedStep, LocalizedLearning, StaticModeSelection, ops
from localsgd_ext.graphs import CudaRecorder

LOSSES = (1.0, 0.9, 1.1, 1.0, 1.2, 1.1)  # the sign flips


@pytest.fixture(autouse=True)
def _through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_through_dispatcher", lambda *tensors: True)


class Run:
    """A model in training, by a graph or by the same step called directly."""

    def __init__(
        self, build: Callable[[], nn.Module], path: tuple[int, ...], graphed: bool, lr_step: int = 100, **options: Any
    ) -> None:
        self.model = seeded(build)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=lr_step, gamma=0.5)
        schedule = StaticModeSelection(kind=lambda epoch: path[min(epoch, len(path) - 1)], l_max=1.0)
        self.local = LocalizedLearning(
            self.model, self.optimizer, epochs=len(path), preset="paper", schedule=schedule, **{"lr": 0.05, **options}
        )
        self.local.trace(batches(1)[0][0])
        self.recorder = RecordedGraphs(self.model.buffers())
        self.train_step = GraphedStep(self.local, self.step, warmup=2, recorder=self.recorder) if graphed else self.step
        self.losses: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss

    def epoch(self, number: int, data: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            self.losses.append(self.train_step(x, y).item())
        self.local.step(LOSSES[number % len(LOSSES)])
        self.scheduler.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.5},
    "frozen": {"rule": "frozen"},
    "frozen statistics": {"bn_stats": "freeze"},
    "refresh": {"refresh": 3},
    "refresh frozen": {"refresh": 2, "rule": "frozen"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_numbers_of_the_plain_loop(name: str) -> None:
    path, data = (0, 2, 2, 3, 1, 0), batches(7)
    graphed, plain = (Run(TwoBlockResNet, path, graphed, **OPTIONS[name]) for graphed in (True, False))
    for epoch in range(len(path)):
        for run in (graphed, plain):
            run.epoch(epoch, data)
        assert changed(graphed.model, snapshot(plain.model)) == set(), epoch
    assert graphed.losses == plain.losses
    assert graphed.local.boundary == plain.local.boundary
    assert graphed.recorder.replays > 7
    assert graphed.local.skipped == plain.local.skipped
    if "refresh" not in name:
        assert graphed.train_step.captures == 5  # the boundary has moved four times
        assert graphed.recorder.warm_ups == 2 * 5


def test_skipped_updates_are_counted_by_replays_too() -> None:
    graphed, plain = (Run(PlainCNN, (1, 1), graphed) for graphed in (True, False))
    zero = [(torch.zeros(6, 3, 8, 8), batches(1)[0][1])] * 6
    for run in (graphed, plain):
        for x, y in zero:
            run.train_step(x, y)
    assert graphed.local.skipped == plain.local.skipped == {"features.0": 6}
    with pytest.warns(UserWarning, match=r"skipped .*features\.0 \(6\)$"):
        graphed.local.step(1.0)
    assert not graphed.local.skipped


def test_a_learning_rate_that_changes_is_captured_again() -> None:
    data = batches(5)
    graphed, plain = (Run(PlainCNN, (2,) * 4, graphed, lr_step=2) for graphed in (True, False))
    for epoch in range(4):
        for run in (graphed, plain):
            run.epoch(epoch, data)
    assert changed(graphed.model, snapshot(plain.model)) == set()
    assert graphed.train_step.captures == 2


class OnTheDevice(torch.optim.Optimizer):
    """Plain gradient descent whose learning rate is a tensor and never read by the host, as torch's own with ``fused=True``."""

    def __init__(self, parameters: Any, lr: Tensor) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


def test_a_learning_rate_that_is_a_tensor_is_read_by_the_graph() -> None:
    runs = [Run(PlainCNN, (2,) * 4, graphed=False) for _ in range(2)]
    for run, graphed in zip(runs, (True, False), strict=True):
        run.local.remove()
        run.optimizer = OnTheDevice(run.model.parameters(), torch.tensor(0.05))
        schedule = StaticModeSelection(kind=lambda epoch: 2)
        run.local = LocalizedLearning(run.model, run.optimizer, epochs=4, preset="paper", schedule=schedule, lr=0.05)
        run.local.trace(batches(1)[0][0])
        step = GraphedStep(run.local, run.step, recorder=run.recorder) if graphed else run.step
        for i, (x, y) in enumerate(batches(8)):
            run.optimizer.param_groups[0]["lr"].fill_(0.05 / (i + 1))
            step(x, y)
        assert not graphed or step.captures == 1
    assert changed(runs[0].model, snapshot(runs[1].model)) == set()


def test_each_shape_has_a_graph_of_its_own() -> None:
    data = batches(4, size=6) + batches(1, size=3, seed=5)
    graphed, plain = (Run(PlainCNN, (2,) * 6, graphed) for graphed in (True, False))
    for epoch in range(6):
        for run in (graphed, plain):
            run.epoch(epoch, data)
    assert changed(graphed.model, snapshot(plain.model)) == set()
    assert graphed.train_step.captures == 2


@pytest.mark.parametrize("loaded", ["both", "optimizer", "local"])
def test_a_loaded_state_is_captured_again(loaded: str) -> None:
    """Loading replaces momentum buffers, the optimizer's and the local rule's: a graph would go on with the old ones."""
    outcomes = []
    for graphed in (True, False):
        run = Run(PlainCNN, (2,) * 6, graphed, momentum=0.5)
        run.epoch(0, batches(5))
        state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.local.state_dict()))
        run.epoch(1, batches(5))
        run.model.load_state_dict(state[0])
        if loaded != "local":
            run.optimizer.load_state_dict(state[1])
        if loaded != "optimizer":
            run.local.load_state_dict(state[2])
        run.epoch(1, batches(5))
        outcomes.append(snapshot(run.model))
        if graphed:
            assert run.train_step.captures == 2
    assert all(torch.equal(outcomes[0][name], tensor) for name, tensor in outcomes[1].items())


@pytest.mark.parametrize("layer", ["features.0", "fc"], ids=["of the prefix", "of the rest"])
@pytest.mark.parametrize("options", [{"refresh": 2}, {"refresh": 2, "rule": "frozen"}, {}], ids=str)
def test_what_is_kept_frozen_moves_in_no_replay(options: dict[str, Any], layer: str) -> None:
    """Neither in that of a refresh nor in the others; in the plain loop's numbers."""
    graphed, plain = (Run(PlainCNN, (2,) * 3, graphed, **options) for graphed in (True, False))
    for run in (graphed, plain):
        run.epoch(0, batches(7))
        kept = run.model.get_submodule(layer).weight
        before = kept.detach().clone()
        run.local.keep_frozen([kept])
        run.epoch(1, batches(7))
        run.local.keep_frozen([kept])  # which it is already: no other graph for that
        warm_ups = run.recorder.warm_ups
        run.epoch(2, batches(2))
        assert run.recorder.warm_ups == warm_ups
        assert torch.equal(kept, before)
    assert changed(graphed.model, snapshot(plain.model)) == set()


def test_what_is_returned_is_a_copy() -> None:
    run = Run(PlainCNN, (1,) * 2, True)
    returned = [run.train_step(x, y) for x, y in batches(6)]
    assert len({float(loss) for loss in returned}) == 6
    assert not any(loss.requires_grad for loss in returned)


def test_reset_begins_anew() -> None:
    run = Run(PlainCNN, (1,) * 2, True)
    for _ in range(2):
        for x, y in batches(4):
            run.train_step(x, y)
        run.train_step.reset()
    assert (run.train_step.captures, run.recorder.warm_ups) == (2, 4)


def test_a_step_that_waits_for_the_device_cannot_be_captured() -> None:
    """That the recorder is as strict as a real capture."""
    run = Run(PlainCNN, (1,) * 2, False)
    step = GraphedStep(run.local, lambda x, y: run.step(x, y).item(), warmup=1, recorder=run.recorder)
    x, y = batches(1)[0]
    step(x, y)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        step(x, y)


def test_deferred_updates_are_refused() -> None:
    run = Run(twice_used, (2,) * 2, True)
    with pytest.raises(RuntimeError, match=r"would lose the deferred updates of middle\.conv: layers used several times"):
        run.train_step(*batches(1)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 0.5}, "sample must be 1 in a CUDA graph, .*got 0.5"),
        ({"nan_policy": "skip"}, "nan_policy must be 'report' or 'raise' in a CUDA graph"),
    ],
)
def test_options_that_need_the_host_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(PlainCNN, (1,) * 2, True, **options)


def test_arguments() -> None:
    run = Run(PlainCNN, (1,) * 2, True)
    with pytest.raises(TypeError, match="inputs must be tensors, got int as number 1"):
        run.train_step(batches(1)[0][0], 3)
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        GraphedStep(run.local, run.step, warmup=0, recorder=run.recorder)
    wrong: Any
    for wrong, message in (
        ((run.model, run.step, 1), "local must be a LocalizedLearning, got PlainCNN"),
        ((run.local, None, 1), "step must be callable, got NoneType"),
        ((run.local, run.step, 1.5), "warmup must be an int, got 1.5"),
    ):
        with pytest.raises(TypeError, match=message):
            GraphedStep(wrong[0], wrong[1], warmup=wrong[2], recorder=run.recorder)


def test_a_step_that_is_never_captured_is_said_once() -> None:
    run = Run(PlainCNN, (1,) * 2, True)
    ((x, y),) = batches(1)

    def steps() -> None:
        for _ in range(60):
            run.optimizer.param_groups[0]["lr"] *= 0.99
            run.train_step(x, y)

    message = r"no step was captured .*: lr of an optimizer's parameter group \(.*\) changed in each"
    with pytest.warns(UserWarning, match=message) as said:
        steps()
    assert len(said) == 1
    assert run.train_step.captures == 0
    for _ in range(4):
        run.train_step(x, y)
    assert run.train_step.captures == 1


def test_without_a_gpu_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = Run(PlainCNN, (1,) * 2, False)
    with pytest.raises(RuntimeError, match="GraphedStep needs a CUDA device, there is none"):
        GraphedStep(run.local, run.step)


def test_the_cuda_recorder_warms_up_and_captures_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls, as there is no device: waits in both directions, the capture on the same stream, replay before the result."""
    events: list[Any] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append((self.name, "waits for", other.name))

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    class Context:
        def __init__(self, *args: Any, stream: Any = None) -> None:
            self.stream = stream or args[0]

        def __enter__(self) -> None:
            events.append(("on", self.stream.name))

        def __exit__(self, *_: Any) -> None:
            events.append("off")

    current = Stream("current")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"Stream": Stream, "CUDAGraph": Graph, "graph": Context, "stream": Context}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    recorder = CudaRecorder()
    assert recorder.warm_up(lambda: events.append("run") or 7) == 7
    replay = recorder.capture(lambda: events.append("run") or 8)
    assert replay() == 8
    assert events == [
        *[("side", "waits for", "current"), ("on", "side"), "run", "off", ("current", "waits for", "side")],
        *[("on", "side"), "run", "off", "replay"],
    ]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no layer will ever learn locally")
        yield
