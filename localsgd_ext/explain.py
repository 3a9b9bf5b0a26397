"""Which algorithm each layer's correlation runs with, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localsgd_ext import ops, roofline
from localsgd_ext._precision import tf32_allowed
from localsgd_ext.layers import LAYER_TYPES, is_plain

_HEADINGS = ("layer", "geometry", "x", "z", "layout")


@dataclass(frozen=True)
class AlgorithmCost:
    """One algorithm for one layer."""

    algorithm: str
    eligible: bool
    """Whether ``algorithm=`` may name it for this layer."""
    automatic: bool
    """Whether ``algorithm="auto"`` may pick it."""
    why_not: str
    """Empty where it is eligible and automatic."""
    estimated_us: float
    """Microseconds by the cost model, which is about ratios, not about this machine."""
    measured_us: float | None
    """Microseconds measured, if ``localsgd_ext.benchmark`` was on."""
    configuration: str
    """Of the kernel on a GPU: core, tile, splits, launches; empty on a CPU, where there is nothing to choose."""

    def __str__(self) -> str:
        if not self.automatic:
            return "-"
        return f"{self.estimated_us:.0f}" if self.measured_us is None else f"{self.estimated_us:.0f} ({self.measured_us:.0f})"


@dataclass(frozen=True)
class LayerChoice:
    """One call of one layer."""

    name: str
    geometry: str
    """Channels, kernel, stride, padding, dilation, groups, and batch x (input -> output size)."""
    x_dtype: torch.dtype
    z_dtype: torch.dtype
    layout: str
    """``"channels_last"`` or ``"contiguous"`` (and whatever else the strides are), of the input."""
    costs: tuple[AlgorithmCost, ...]
    """Empty where no kernel is compiled for the device."""
    pick: str
    """The algorithm's name, or ``"reference"``."""
    reason: str
    roofline_us: float | None = None
    """The least that the pick can take by its bytes and flops (:mod:`localsgd_ext.roofline`); None where the device's peaks are
    not known, as on a CPU."""

    @property
    def roofline_share(self) -> float | None:
        """``roofline_us`` over the pick's measured time or, without one, the estimated; 1 is all that the device can do."""
        cost = next((cost for cost in self.costs if cost.algorithm == self.pick), None)
        us = None if cost is None else cost.estimated_us if cost.measured_us is None else cost.measured_us
        return None if self.roofline_us is None or not us else self.roofline_us / us


@dataclass(frozen=True)
class Explanation:
    """The choices for a network, in execution order; printed, an aligned table."""

    layers: tuple[LayerChoice, ...]

    def __iter__(self) -> Iterator[LayerChoice]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        algorithms = [a for a in ops.ALGORITHMS if a != "auto"]
        timed = any(cost.measured_us is not None for layer in self.layers for cost in layer.costs)
        unit = "µs (measured)" if timed else "µs"
        rows = [(*_HEADINGS, *(f"{a} {unit}" for a in algorithms), "roofline µs", "share", "pick", "why")]
        for layer in self.layers:
            costs = {cost.algorithm: str(cost) for cost in layer.costs}
            dtypes = [str(dtype).removeprefix("torch.") for dtype in (layer.x_dtype, layer.z_dtype)]
            shown = [costs.get(algorithm, "-") for algorithm in algorithms]
            roofline = "-" if layer.roofline_us is None else f"{layer.roofline_us:.0f}"
            share = "-" if layer.roofline_share is None else f"{layer.roofline_share:.0%}"
            rows.append((layer.name, layer.geometry, *dtypes, layer.layout, *shown, roofline, share, layer.pick, layer.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        first_number, last_number = len(_HEADINGS), len(_HEADINGS) + len(algorithms) + 2
        return "\n".join(
            "  ".join(
                cell.rjust(width) if first_number <= i < last_number else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``model`` once on example inputs and return which algorithm ``algorithm="auto"`` picks for each layer, and why.

    The forward runs without gradients and in eval mode, so that nothing in the model changes; under autocast if the caller
    is. Only shapes, dtypes and strides of the example matter. With ``localsgd_ext.benchmark = True`` the algorithms are
    timed, and the picks are those that training will use. As in training, the output is known to be the layer's own.

    Args:
        model: any module; its ``Conv1d/2d/3d`` and ``Linear`` layers with unmodified ``forward`` are listed, once per call.
        *args, **kwargs: what ``model`` is called with, of the batch size that is to be trained with (with
            ``sample=f``: of ``f`` times as many images).

    Returns:
        An :class:`Explanation`: a sequence of rows; ``print`` shows an aligned table.
    """
    choices: list[LayerChoice] = []
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, LAYER_TYPES) and is_plain(module)
    }

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        choices.append(_choice(names[module], module, args[0] if args else kwargs["input"], output))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in names]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return Explanation(tuple(choices))


def _choice(name: str, module: nn.Module, x: Tensor, z: Tensor) -> LayerChoice:
    weight = module.weight
    assert isinstance(weight, Tensor)
    layout = (
        "channels_last"
        if weight.dim() > 2 and x.shape[1 - weight.dim()] > 1 and x.stride(1 - weight.dim()) == 1
        else "contiguous"
    )
    if why := ops.obstacle(weight, x, z):
        geometry = f"{type(module).__name__} {tuple(x.shape)} -> {tuple(z.shape)}"
        reason = f"no kernels are compiled for {weight.device.type}: {why}"
        return LayerChoice(name, geometry, x.dtype, z.dtype, layout, (), "reference", reason)
    geometry_arguments = (
        {}
        if isinstance(module, nn.Linear)
        else {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
    )
    plan = ops.plan(x, z, weight, bias=module.bias, z_is_output=True, **geometry_arguments)  # type: ignore[arg-type]
    costs = tuple(
        AlgorithmCost(c.algorithm, c.eligible, c.automatic, c.why_not, c.estimated_us, c.measured_us, c.configuration)
        for c in plan.candidates
    )
    least = _roofline_us(plan.pick, x, z, weight, getattr(module, "groups", 1), layout)
    return LayerChoice(name, plan.geometry, x.dtype, z.dtype, layout, costs, plan.pick, plan.reason, least)


def _device_of(tensor: Tensor) -> roofline.Device | None:
    if tensor.device.type != "cuda":
        return None
    try:
        return roofline.device(torch.cuda.get_device_properties(tensor.device))
    except ValueError:  # unknown, and PyTorch does not tell its clocks
        return None


def _roofline_us(algorithm: str, x: Tensor, z: Tensor, weight: Tensor, groups: int, layout: str) -> float | None:
    device = _device_of(weight)
    if device is None:
        return None
    batched = weight.dim() in (2, x.dim())
    x_shape, z_shape = (tuple(t.shape) if batched else (1, *t.shape) for t in (x, z))
    geometry = roofline.Geometry(x_shape, z_shape, tuple(weight.shape), groups)
    tf32 = tf32_allowed(linear=weight.dim() == 2)
    dtypes = {"x": x.dtype, "z": z.dtype, "weight": weight.dtype, "tf32": tf32, "layout": layout}
    us = roofline.cost(algorithm, geometry, **dtypes).roofline_us(device)  # type: ignore[arg-type]
    if algorithm == "library":  # norm and write are a launch of their own
        us += roofline.cost("apply", geometry, **dtypes).roofline_us(device)  # type: ignore[arg-type]
    return us
