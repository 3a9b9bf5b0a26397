"""How functions are timed; the GPU's half against a fake of torch.cuda, which advances a clock of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import CpuTimer, CudaTimer


class FakeGpu:
    """Kernels take ``cost`` milliseconds of device time and are noted; a graph replays what was called while it was captured."""

    def __init__(self) -> None:
        self.now, self.ran, self.captured = 0.0, [], None
        self.cuda = SimpleNamespace(
            Stream=lambda: SimpleNamespace(wait_stream=lambda _: None), Event=self.event, CUDAGraph=self.new_graph,
            current_stream=lambda: SimpleNamespace(wait_stream=lambda _: None), stream=self.stream, graph=self.capture,
            synchronize=lambda: None, get_device_properties=lambda: SimpleNamespace(name="NVIDIA H200", L2_cache_size=50 << 20),
        )  # fmt: skip
        self.float32 = torch.float32
        self.buffers: list[SimpleNamespace] = []

    def kernel(self, name: str, cost: float) -> None:
        if self.captured is not None:
            self.captured.append((name, cost))
        else:
            self.ran.append(name)
            self.now += cost

    def empty(self, size: int, **_: object) -> SimpleNamespace:
        assert 4 * size >= 100 << 20  # twice the cache, in fp32
        buffer = SimpleNamespace(zero_=lambda: self.kernel("write all", 1.0))
        self.buffers.append(buffer)
        return buffer

    def sum(self, buffer: SimpleNamespace, *, dim: int, out: object) -> None:
        assert buffer is self.buffers[1]  # not the one that is overwritten
        assert dim == 0
        assert out is not None
        self.kernel("read all", 1.0)

    def zeros(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(add_=lambda _: self.kernel("add", 0.002))

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def new_graph(self) -> SimpleNamespace:
        graph = SimpleNamespace(kernels=[])
        graph.replay = lambda: [self.kernel(*kernel) for kernel in graph.kernels]
        return graph

    @contextmanager
    def stream(self, _stream: object) -> Iterator[None]:
        yield

    @contextmanager
    def capture(self, graph: SimpleNamespace) -> Iterator[None]:
        self.captured = graph.kernels
        try:
            yield
        finally:
            self.captured = None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(timing, "torch", fake)
    return fake


def test_gpu_runs_start_from_flushed_caches_and_are_replayed(gpu: FakeGpu) -> None:
    timer = CudaTimer()
    assert timer.device.name == "H200"
    assert timer.device.launch_us == pytest.approx(2)
    gpu.ran.clear()
    timings = timer.measure({"a": lambda: gpu.kernel("a", 0.01), "b": lambda: gpu.kernel("b", 0.03)}, 0.0)
    assert {name: (timing.us, timing.how) for name, timing in timings.items()} == {
        "a": (pytest.approx(10), "graph"), "b": (pytest.approx(30), "graph"),
    }  # fmt: skip
    assert gpu.ran[: 2 * timing.WARM_UPS] == ["a"] * timing.WARM_UPS + ["b"] * timing.WARM_UPS
    rounds = gpu.ran[2 * timing.WARM_UPS :]
    assert rounds == ["write all", "read all", "a", "write all", "read all", "b"] * (len(rounds) // 6)
    assert timings["a"].runs == 5


def test_what_cannot_be_captured_is_called(gpu: FakeGpu) -> None:
    def waits_for_the_device() -> None:
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.kernel("c", 0.05)

    timings = CudaTimer().measure({"c": waits_for_the_device}, 0.0)
    assert timings["c"].us == pytest.approx(50)
    assert timings["c"].how == "events"


def test_the_cpu_timer_takes_turns_and_the_median() -> None:
    order: list[str] = []
    timings = CpuTimer().measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0)
    assert order[:2] == ["a", "b"]  # to warm up
    rounds = [order[i : i + 2] for i in range(2, len(order), 2)]
    assert all(sorted(names) == ["a", "b"] for names in rounds)
    assert ["a", "b"] in rounds  # in changing order: what ran before decides what lies in the caches
    assert ["b", "a"] in rounds
    assert timings["a"].runs == timings["b"].runs >= 5
    assert timings["a"].us >= timings["a"].best_us > 0


def test_the_slow_do_not_take_the_rounds_of_the_others() -> None:
    functions = {"slow": lambda: time.sleep(0.02), "a": lambda: time.sleep(0.001), "b": lambda: time.sleep(0.002)}
    timings = CpuTimer().measure(functions, 0.3)
    assert timings["slow"].runs == 5
    assert timings["a"].runs == timings["b"].runs > 20


def test_what_is_not_slow_has_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, now = CpuTimer(), [0.0]

    def takes(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(timer, "_clock", lambda: now[0])
    timings = timer.measure({"a": takes(0.01), "b": takes(0.04), "slow": takes(0.06)}, 0.0)
    assert {name: timing.runs for name, timing in timings.items()} == {"a": 10, "b": 10, "slow": 5}
    assert timings["b"].us == pytest.approx(40_000)


def test_processor_time_does_not_count_what_others_take() -> None:
    functions = {"waits": lambda: time.sleep(0.02), "computes": lambda: sum(range(100_000))}
    timings = CpuTimer(processor_time=True).measure(functions, 0.0)
    assert timings["waits"].us < 5_000
    assert timings["computes"].us > 100
    assert {timing.how for timing in timings.values()} == {"cpu"}
