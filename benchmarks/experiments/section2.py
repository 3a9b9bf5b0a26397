"""Section 2's side claims: back-propagation's share of a step, a local update against a layer's back-propagation, SGD first or last."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.methods import FREEZING, LITERAL, REFRESH, SGD, changed, compared, difference
from benchmarks.experiments.scales import Study
from benchmarks.experiments.timing import CLAIMS, LEAST_ROUNDS, Shape, Timings, autocast, example, records_of, start_of, wait
from benchmarks.step_variants import Call, calls, geometry, kernel, make
from benchmarks.step_variants import Variant as Step
from benchmarks.tables import aligned, number, times
from localsgd_ext import trace_layers
from localsgd_ext.train import environment

ORDERS = (LITERAL, FREEZING, REFRESH)


def variants(study: Study, network: Network) -> list[Variant]:
    """The linear schedule, which does not wait for the loss, and the same backwards, which spends as much."""
    found = [SGD]
    for method in ORDERS:
        at_once = {} if method is LITERAL else {"min_loss_drop": 0.0}  # the literal rule never waits
        found.append(changed(method, "SGD first", schedule="linear", **at_once))
        found.append(changed(method, "local first", schedule="local-first"))
    return found


def table(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    parts = []
    row = timings.claims.get(Shape.of(study.config(network, "sgd")).key)
    if row is not None:
        head = ("of a step of SGD", "ms", "share")
        whole = sum(row["phases_ms"].values())
        parts.append(aligned([head, *((p, number(ms), f"{100 * ms / whole:.0f} %") for p, ms in row["phases_ms"].items())]))
        ratios = [layer["backward_us"] / layer["update_us"] for layer in row["layers"]]
        total = sum(layer["backward_us"] for layer in row["layers"]) / sum(layer["update_us"] for layer in row["layers"])
        parts.append(
            f"A layer's back-propagation (gradients of weight and input, by the library) against its local update, {len(ratios)} layers: "
            f"all together {times(total)}, median {times(statistics.median(ratios))}, "
            f"from {times(min(ratios))} to {times(max(ratios))}; at least 2x: {sum(r >= 2 for r in ratios)}."
        )
    else:
        parts.append("Missing: times of back-propagation and local updates: --timing SECONDS measures them.")
    for method in ORDERS:
        first, last = (runs.get(changed(method, which).label) for which in ("SGD first", "local first"))
        if first and last and (paired := difference(first, last)) is not None:
            parts.append(f"{method.label}, SGD first minus local first, at the same cost: {paired.text()} points.")
    parts.append(compared(runs, [variant.label for variant in variants(study, network)], timings))
    return "\n\n".join(parts)


def measure(study: Study, networks: tuple[Network, ...], directory: Path, seconds: float, say: Any = print) -> None:
    """Time phases and layers of each network that is not in the file yet."""
    shapes = {shape.key: shape for shape in (Shape.of(study.config(network, "sgd")) for network in networks)}
    if not shapes:
        return
    records = records_of(directory / CLAIMS, next(iter(shapes.values())).device)
    for key in records.todo(shapes):
        records.add(key, row(shapes[key], seconds) | {"commit": environment.git_commit()})
        say(f"{key}: phases and layers")


def row(shape: Shape, seconds: float) -> dict[str, Any]:
    x, y = example(shape)
    start = start_of(shape)
    plan = trace_layers(start, x[:2])
    step = make("sgd", start, x[:2], 0)
    with autocast(shape):
        recorded = calls(step, plan, x)
    phases = _phases(step, x, y, shape, seconds)
    layers = []
    for call in recorded:
        update, backward = _alternating(kernel(call, 1.0), _backward(call), shape, seconds / len(recorded))
        layers.append({"name": call.name, "update_us": update, "backward_us": backward})
    return {"phases_ms": phases, "layers": layers, "status": "ok"}


def _phases(step: Step, x: torch.Tensor, y: torch.Tensor, shape: Shape, seconds: float) -> dict[str, float]:
    """Medians in milliseconds."""
    device = torch.device(shape.device)
    taken: list[list[float]] = []
    begin = time.monotonic()
    while len(taken) < LEAST_ROUNDS or time.monotonic() - begin < seconds:
        clock: list[float] = []

        def mark(clock: list[float] = clock) -> None:
            wait(device)
            clock.append(time.perf_counter())

        mark()
        with autocast(shape):
            loss = nn.functional.cross_entropy(step.model(x), y)
        mark()
        loss.backward()  # type: ignore[no-untyped-call]
        mark()
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)
        mark()
        taken.append([1e3 * (b - a) for a, b in itertools.pairwise(clock)])
    medians = [statistics.median(values) for values in zip(*taken[1:], strict=True)]
    return dict(zip(("forward", "backward", "optimizer"), medians, strict=True))


def _backward(call: Call) -> Callable[[], object]:
    """The gradients that back-propagation makes at a layer, of its weight and, but for the first one, of its input."""
    z, x = call.z, call.x.to(call.z.dtype)
    weight = call.module.weight.detach().to(z.dtype)
    if isinstance(call.module, nn.Linear):
        rows, inputs = z.flatten(0, -2), x.flatten(0, -2)
        return lambda: (rows.t() @ inputs, rows @ weight if call.dgrad else None)
    options = geometry(call.module)
    where = (options["stride"], options["padding"], options["dilation"], False, [0] * (x.dim() - 2), options["groups"])
    return lambda: torch.ops.aten.convolution_backward(z, x, weight, None, *where, [call.dgrad, True, False])


def _alternating(one: Callable[[], object], other: Callable[[], object], shape: Shape, seconds: float) -> tuple[float, float]:
    """Medians in microseconds."""
    device = torch.device(shape.device)
    taken: tuple[list[float], list[float]] = ([], [])
    begin = time.monotonic()
    while len(taken[0]) < LEAST_ROUNDS or time.monotonic() - begin < seconds:
        for function, times_of in zip((one, other), taken, strict=True):
            wait(device)
            before = time.perf_counter()
            function()
            wait(device)
            times_of.append(1e6 * (time.perf_counter() - before))
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])
