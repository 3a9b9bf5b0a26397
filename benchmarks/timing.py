"""How long functions take: all of them in turn, round after round, so that drift hits them alike; the median counts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from localsgd_ext import roofline

Function = Callable[[], object]
WARM_UPS = 3
MOST_ROUNDS, LEAST_ROUNDS = 100, 5
SLOW = 5  # times as long as the fastest of a layer
COMPARED_ROUNDS = 10  # at least, of what is not slow: one in eight medians of five was off by a tenth


@dataclass(frozen=True)
class Timing:
    us: float
    best_us: float
    runs: int
    how: str
    """``"graph"``: replay of a CUDA graph between two events; ``"events"``: the call itself between them; on a CPU ``"clock"``, or
    ``"cpu"``: processor time of one thread."""


class Timer(Protocol):
    device: roofline.Device
    """With the launch cost measured."""

    def measure(self, functions: Mapping[str, Function], seconds: float) -> dict[str, Timing]: ...


def _rounds(one_round: float, seconds: float) -> int:
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(one_round, 1e-9))))


def _timing(us: list[float], how: str) -> Timing:
    return Timing(median(us), min(us), len(us), how)


class CpuTimer:
    """Wall-clock time, or the calling thread's processor time, of which other work on the machine takes nothing, though it slows
    it down. The roofline is that of this machine as a GEMM and a copy have it, not of a data sheet."""

    def __init__(self, processor_time: bool = False) -> None:
        self._clock, self._how = (time.thread_time, "cpu") if processor_time else (time.perf_counter, "clock")
        a, b = torch.randn(1024, 1024), torch.empty(1024, 1024)
        long, copy = torch.zeros(16 << 20), torch.zeros(16 << 20)
        one = torch.zeros(1)
        functions = {"empty": lambda: one.add_(1), "gemm": lambda: torch.mm(a, a, out=b), "copy": lambda: copy.copy_(long)}
        # Each alone; a ceiling is what was reached once.
        us = {name: self.measure({name: function}, 0.2)[name].best_us for name, function in functions.items()}
        self.device = roofline.Device(
            "this CPU, by a GEMM and a copy", None, torch.get_num_threads(), 2 * 4 * (16 << 20) / us["copy"] * 1e6, 0,
            {"fp32": 2 * 1024**3 / us["gemm"] * 1e6}, us["empty"],
        )  # fmt: skip

    def measure(self, functions: Mapping[str, Function], seconds: float) -> dict[str, Timing]:
        clock = self._clock
        for function in functions.values():
            function()
        times: dict[str, list[float]] = {name: [] for name in functions}
        order = random.Random(0)

        def take_turns(names: list[str], rounds: int) -> None:
            for _ in range(rounds):
                # Who comes after the patch matrix of `unfold` finds its operands out of the caches, and who comes after a function
                # that read them finds them there: a new order in each round.
                order.shuffle(names)
                for name in names:
                    start = clock()
                    functions[name]()
                    times[name].append(clock() - start)

        take_turns(list(functions), LEAST_ROUNDS)
        took = {name: median(values) for name, values in times.items()}
        left = seconds - sum(sum(values) for values in times.values())
        # Few rounds have few orders. What takes many times as long as the fastest would leave the others no more. All others go on
        # together: who comes after himself finds his operands in the caches.
        quick = [name for name in functions if took[name] <= SLOW * min(took.values())]
        more = int(left / max(sum(took[name] for name in quick), 1e-9))
        take_turns(quick, min(MOST_ROUNDS, max(COMPARED_ROUNDS, LEAST_ROUNDS + more)) - LEAST_ROUNDS)
        return {name: _timing([1e6 * value for value in values], self._how) for name, values in times.items()}


class CudaTimer:
    """Device time, from cold caches: between two runs a buffer of at least twice the size of the second-level cache is
    overwritten, which also takes longer than the host needs to queue the next run; then a second one of that size is read. What
    was overwritten is in the cache until something else needs the place, and to write it back would be at the cost of the run
    that is timed; what was only read can be dropped."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        size = max(2 * properties.L2_cache_size, 256 << 20) // 4
        self._written, self._read = (torch.empty(size, dtype=torch.float32, device="cuda") for _ in range(2))
        self._sum = torch.zeros((), device="cuda")
        one = torch.zeros(1, device="cuda")
        self.device = roofline.device(properties)
        self.device = self.device.measured(self.measure({"empty": lambda: one.add_(1)}, 0.1)["empty"].us)

    def measure(self, functions: Mapping[str, Function], seconds: float) -> dict[str, Timing]:
        calls, how = {}, {}
        for name, function in functions.items():
            calls[name], how[name] = self._captured(function)
        self._round(calls)
        start = time.perf_counter()
        self._round(calls)
        rounds = _rounds(time.perf_counter() - start, seconds)
        results = [self._round(calls) for _ in range(rounds)]
        return {name: _timing([result[name] for result in results], how[name]) for name in functions}

    def _round(self, calls: Mapping[str, Function]) -> dict[str, float]:
        marks = {}
        for name, call in calls.items():
            self._written.zero_()
            torch.sum(self._read, dim=0, out=self._sum)  # no allocation, and one number written
            marks[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            marks[name][0].record()
            call()
            marks[name][1].record()
        torch.cuda.synchronize()
        return {name: 1e3 * begin.elapsed_time(end) for name, (begin, end) in marks.items()}

    def _captured(self, function: Function) -> tuple[Function, str]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):  # cuDNN's search, compilation
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError:  # what synchronises cannot be captured
            torch.cuda.synchronize()
            return function, "events"
        return graph.replay, "graph"


def timer_for(device: str, processor_time: bool = False) -> Timer:
    return CudaTimer() if torch.device(device).type == "cuda" else CpuTimer(processor_time)
