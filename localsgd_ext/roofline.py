"""What a correlation can cost at least: bytes, flops, and the time that a device needs for them.

A roofline: memory and arithmetic overlap perfectly, whatever takes longer decides, and a launch is paid on top::

    roofline_us = max(bytes / memory bandwidth, sum of flops / peak of the unit that multiplies them) + launch

It is what a measured time is to be compared with ("70 % of the roofline"), and a prediction where there is no device to
measure on; it is no promise. Counted is what this package's kernels do, not what a textbook GEMM would. Pure arithmetic:
nothing here needs a GPU.

>>> layer = Geometry(x=(64, 64, 56, 56), z=(64, 256, 56, 56), weight=(256, 64, 1, 1))
>>> round(cost("gram", layer, x=torch.bfloat16).roofline_us(device("H200"), launch_us=3), 1)
8.4
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

__all__ = ["DEVICES", "Cost", "Device", "Geometry", "Product", "cost", "device", "estimate"]

WINOGRAD_TILES = ((2, 2, 0), (2, 4, 512), (4, 4, 4096))  # outputs down and across, from so many positions on (winograd.h)
COSTED = ("gram", "direct", "depthwise", "winograd", "library", "apply")
UNITS = ("fp32", "tf32", "bf16", "fp16")
LAYOUTS = ("channels_last", "contiguous")
_ASSUMED_LAUNCH_US = 3.0


@dataclass(frozen=True)
class Device:
    """A GPU (or whatever else multiplies and reads memory), by the numbers of its data sheet."""

    name: str
    compute_capability: tuple[int, int] | None
    """None for what is no GPU."""
    multiprocessors: int
    bytes_per_s: float
    """Of its main memory, both directions together."""
    l2_bytes: int
    flops_per_s: Mapping[str, float]
    """Peak of each unit it has, of ``"fp32"`` (fused multiply-add, two flops), ``"tf32"``, ``"bf16"``, ``"fp16"`` (matrix units
    adding in fp32, dense: data sheets like to print twice as much, for structured sparsity)."""
    launch_us: float = _ASSUMED_LAUNCH_US
    """What an empty launch takes: not from a data sheet but an assumption, unless somebody measured it (:meth:`measured`)."""

    def measured(self, launch_us: float) -> Device:
        """The same device with a launch cost that was measured on it."""
        return replace(self, launch_us=launch_us)

    def peak(self, unit: str) -> float:
        """Flops per second for operands of type ``unit``, which are widened to fp32 where no matrix unit takes them."""
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
        return self.flops_per_s.get(unit, self.flops_per_s["fp32"])


def _gpu(
    name: str, capability: tuple[int, int], sms: int, gb_per_s: float, l2_mib: float, **tflops: float
) -> tuple[str, Device]:
    peaks = {unit: value * 1e12 for unit, value in tflops.items()}
    return name, Device(name, capability, sms, gb_per_s * 1e9, int(l2_mib * 2**20), peaks)


# Data sheets and architecture white papers of NVIDIA, at boost clock, without sparsity. GeForce cards add in fp32 at half the
# rate of their fp16 figure, which is what counts here.
DEVICES: Mapping[str, Device] = dict(
    (
        _gpu("GTX 1080 Ti", (6, 1), 28, 484, 2.75, fp32=11.3),
        _gpu("V100 SXM2", (7, 0), 80, 900, 6, fp32=15.7, fp16=125),
        _gpu("V100 PCIe", (7, 0), 80, 900, 6, fp32=14, fp16=112),
        _gpu("T4", (7, 5), 40, 320, 4, fp32=8.1, fp16=65),
        _gpu("A100 40GB", (8, 0), 108, 1555, 40, fp32=19.5, tf32=156, bf16=312, fp16=312),
        _gpu("A100 80GB PCIe", (8, 0), 108, 1935, 40, fp32=19.5, tf32=156, bf16=312, fp16=312),
        _gpu("A100 80GB SXM", (8, 0), 108, 2039, 40, fp32=19.5, tf32=156, bf16=312, fp16=312),
        _gpu("RTX 3090", (8, 6), 82, 936, 6, fp32=35.6, tf32=35.6, bf16=71, fp16=71),
        _gpu("RTX 4090", (8, 9), 128, 1008, 72, fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2),
        _gpu("L4", (8, 9), 58, 300, 48, fp32=30.3, tf32=60, bf16=121, fp16=121),
        _gpu("H100 PCIe", (9, 0), 114, 2000, 50, fp32=51, tf32=378, bf16=756, fp16=756),
        _gpu("H100 SXM", (9, 0), 132, 3350, 50, fp32=67, tf32=494, bf16=989, fp16=989),
        _gpu("H200", (9, 0), 132, 4800, 50, fp32=67, tf32=494, bf16=989, fp16=989),
    )
)

# How the driver calls them, without "NVIDIA", "Tesla" and "GeForce".
_DRIVER_NAMES = (
    (r"v100-sxm2-\d+gb", "V100 SXM2"),
    (r"v100-pcie-\d+gb", "V100 PCIe"),
    (r"a100-(sxm4|pcie)-40gb|a100", "A100 40GB"),
    (r"a100 80gb pcie|a100-pcie-80gb", "A100 80GB PCIe"),
    (r"a100-sxm4-80gb", "A100 80GB SXM"),
    (r"h100 80gb hbm3", "H100 SXM"),
    (r"h100", "H100 PCIe"),
    (r"h200 sxm", "H200"),
)


class Properties(Protocol):
    """What :func:`torch.cuda.get_device_properties` tells."""

    @property
    def name(self) -> str: ...
    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...
    @property
    def multi_processor_count(self) -> int: ...
    @property
    def L2_cache_size(self) -> int: ...
    @property
    def clock_rate(self) -> int: ...
    @property
    def memory_clock_rate(self) -> int: ...
    @property
    def memory_bus_width(self) -> int: ...


def device(which: str | Properties) -> Device:
    """Return a known device by its name or the driver's name for it, or an estimate for an unknown one's properties.

    Args:
        which: ``"H200"``, ``"NVIDIA H100 80GB HBM3"``, …, or what ``torch.cuda.get_device_properties`` returns.

    Raises:
        ValueError: a name that is not in :data:`DEVICES`, or properties without clock rates.
    """
    name = which if isinstance(which, str) else which.name
    short = " ".join(re.sub(r"\b(nvidia|tesla|geforce)\b", "", name.lower()).split())
    known = {key.lower(): value for key, value in DEVICES.items()}
    if short in known:
        return known[short]
    for pattern, key in _DRIVER_NAMES:
        if re.fullmatch(pattern, short):
            return DEVICES[key]
    if isinstance(which, str):
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, or the driver's name of one of them, got {which!r}")
    return estimate(which)


def estimate(properties: Properties) -> Device:
    """Return a device from clock rates and bus width alone, named "… (estimated)".

    Fused multiply-adds are counted by compute capability. Matrix units are not guessed (their rate differs between cards of one
    capability), so low-precision rooflines are too low a bar there.

    Raises:
        ValueError: PyTorch does not tell the clock rates.
    """
    clocks = [getattr(properties, key, 0) for key in ("clock_rate", "memory_clock_rate", "memory_bus_width")]
    if not all(clocks):
        raise ValueError(
            f"device must be one of {', '.join(DEVICES)}, or have clock_rate, memory_clock_rate and memory_bus_width; "
            f"{properties.name!r} is unknown and this PyTorch does not tell them"
        )
    core_khz, memory_khz, bus_bits = clocks
    capability = (properties.major, properties.minor)
    lanes = 64 if capability in ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0)) else 128
    peak = properties.multi_processor_count * lanes * 2 * core_khz * 1e3
    bandwidth = 2 * memory_khz * 1e3 * bus_bits / 8  # double data rate
    name = f"{properties.name} (estimated)"
    return Device(name, capability, properties.multi_processor_count, bandwidth, properties.L2_cache_size, {"fp32": peak})


@dataclass(frozen=True)
class Geometry:
    """A layer's call: ``x [N, C, *spatial]``, ``z [N, K, *spatial_out]``, ``weight [K, C/groups, *kernel]``; linear: ``x [..., C]``,
    ``z [..., K]``, ``weight [K, C]``."""

    x: tuple[int, ...]
    z: tuple[int, ...]
    weight: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        dims = len(self.weight) - 2
        if dims not in (0, 1, 2, 3):
            raise ValueError(f"weight must have 2 (linear), 3, 4 or 5 (conv) dimensions, got shape {self.weight}")
        channel = -1 if dims == 0 else 1
        if dims and not len(self.x) == len(self.z) == dims + 2:
            raise ValueError(
                f"x and z must have {dims + 2} dimensions for a weight of shape {self.weight}, got {self.x}, {self.z}"
            )
        if self.x[channel] != self.weight[1] * self.groups:
            raise ValueError(
                f"x must have {self.weight[1] * self.groups} channels (weight.shape[1] * groups), got shape {self.x}"
            )
        if self.z[channel] != self.weight[0]:
            raise ValueError(f"z must have {self.weight[0]} channels (weight.shape[0]), got shape {self.z}")

    @property
    def positions(self) -> int:
        """Rows of the GEMM's sum: batch times output positions."""
        return math.prod(self.z) // self.weight[0] if self.weight[0] else 0

    @property
    def pointwise(self) -> bool:
        return all(k == 1 for k in self.weight[2:])

    @property
    def depthwise(self) -> bool:
        return len(self.weight) > 2 and self.groups > 1 and self.weight[1] == 1

    @property
    def winograd(self) -> bool:
        return self.weight[2:] == (3, 3) and self.groups == 1

    @property
    def winograd_flops(self) -> int:
        """Of the products over tiles of outputs, in as many frequencies as a tile reads elements; that the stride is 1 is not seen
        here."""
        return (
            2
            * self.weight[0]
            * self.weight[1]
            * min(
                (rows + 2) * (columns + 2) * math.prod(self.z[:-3]) * -(-self.z[-2] // rows) * -(-self.z[-1] // columns)
                for rows, columns, least_positions in WINOGRAD_TILES
                if self.positions >= least_positions
            )
        )

    @property
    def wgrad_flops(self) -> int:
        """Of a weight gradient: two for each element of ``z`` and each weight it meets."""
        return 2 * self.positions * math.prod(self.weight)

    def x_elements(self, layout: str = "channels_last") -> int:
        """Elements of ``x`` that cross the memory bus at least once: a stride that is larger than the kernel leaves some out, whole
        pixels if their channels lie together (``"channels_last"``), else only whole rows."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        kernel = self.weight[2:]
        if not kernel:
            return math.prod(self.x)
        touched = [min(n, p * k) for n, p, k in zip(self.x[2:], self.z[2:], kernel, strict=True)]
        if layout == "contiguous":
            touched[-1] = self.x[-1]
        return math.prod(self.x[:2]) * math.prod(touched)


@dataclass(frozen=True)
class Product:
    """The product ``W·G`` of the Gram form, in fp32's precision, or to 2.5e-6 where operands are bf16: on matrix units,
    ``W`` and ``G`` are sums of numbers that these multiply (bf16 or tf32), and ``pairs`` of those parts are multiplied; where a
    device has no such unit, fp32 numbers once."""

    flops: int
    """Of one pair."""
    unit: str
    pairs: int

    def pairs_on(self, device: Device) -> int:
        return self.pairs if self.unit in device.flops_per_s else 1

    def seconds(self, device: Device) -> float:
        return self.flops * self.pairs_on(device) / device.peak(self.unit)


@dataclass(frozen=True)
class Cost:
    """What has to be done at least. ``workspace_bytes`` are extra: partial sums of a split GEMM, mostly in the second-level cache,
    and no part of the roofline."""

    bytes: int
    flops: int
    """Without the product's."""
    unit: str
    workspace_bytes: int = 0
    product: Product | None = None
    """Of the Gram form, after its Gram matrix."""

    def executed_flops(self, device: Device) -> int:
        """With the product's, in as many pairs of parts as ``device`` needs."""
        return self.flops + (self.product.flops * self.product.pairs_on(device) if self.product else 0)

    def roofline_us(self, device: Device, launch_us: float | None = None) -> float:
        """Microseconds on ``device``; ``launch_us`` in the place of its launch cost."""
        arithmetic = self.flops / device.peak(self.unit) + (self.product.seconds(device) if self.product else 0)
        seconds = max(self.bytes / device.bytes_per_s, arithmetic)
        return 1e6 * seconds + (device.launch_us if launch_us is None else launch_us)


def cost(
    algorithm: str,
    geometry: Geometry,
    *,
    x: torch.dtype = torch.float32,
    z: torch.dtype | None = None,
    weight: torch.dtype = torch.float32,
    tf32: bool = False,
    layout: str = "channels_last",
    splits: int = 1,
) -> Cost:
    """Return what an update by ``algorithm`` costs, of a layer whose own output ``z`` is.

    ``"gram"``: ``x`` once; the lower triangle of ``XXᵀ``; ``W·G`` in fp32 precision, as a :class:`Product`.
    ``"direct"``: ``x`` and ``z`` once, ``2·M·N·K`` flops. ``"depthwise"``: the same on fused multiply-adds, whatever the dtypes.
    ``"winograd"``: likewise, of the products in tiles of outputs, of whatever size the layer has. All of these read and write ``W``.
    ``"library"``: the weight gradient alone, as direct, but it writes ``D`` and no ``W``; it
    is the library's own, in its operands' dtype (this package asks for one in fp32 where they are fp16 or differ: the copies that
    takes are not counted). ``"apply"``: the normalised write alone: ``D`` twice, ``W`` in and out.

    An fp32 ``x`` beside a ``z`` of 16 bits is taken to be autocast's, which rounded ``x`` and ``W`` for the forward: it is
    multiplied by the unit of ``z``'s dtype. Operands of 16 bits are never rounded, so beside an fp32 ``z`` they are widened.

    Args:
        x, z, weight: dtypes as stored; ``z`` that of ``x`` by default.
        tf32: whether fp32 operands may be rounded to it.
        layout: ``"channels_last"`` or ``"contiguous"``, of ``x``.
        splits: blocks that share a tile's sum; affects ``workspace_bytes`` only: each writes its part, all are read once, and the
            sum goes out and in again for the norm (D's tiles as if they had no ragged edge; a Gram kernel's are G's).

    Raises:
        ValueError: an unknown algorithm, or one that the layer is not eligible for.
    """
    if algorithm not in COSTED:
        raise ValueError(f"algorithm must be one of {', '.join(COSTED)}, got {algorithm!r}")
    if algorithm == "gram" and not geometry.pointwise:
        raise ValueError(f"algorithm 'gram' needs a kernel of size 1 or a linear layer, got weight of shape {geometry.weight}")
    if algorithm == "winograd" and not geometry.winograd:
        raise ValueError(
            "algorithm 'winograd' needs a 3x3 kernel and groups == 1, "
            f"got weight of shape {geometry.weight} and groups={geometry.groups}"
        )
    if algorithm == "depthwise" and not geometry.depthwise:
        raise ValueError(f"algorithm 'depthwise' needs groups == in_channels > 1, got weight of shape {geometry.weight}")
    z = x if z is None else z
    elements = math.prod(geometry.weight)
    write = 2 * elements * weight.itemsize
    if algorithm == "apply":
        return Cost(2 * 4 * elements + write, 4 * elements, "fp32")
    read_x = geometry.x_elements(layout) * x.itemsize
    read_z = math.prod(geometry.z) * z.itemsize
    unit = _unit(x, z, tf32)
    if algorithm == "gram":
        unit = _gram_unit(x, z, tf32)
        channels = geometry.weight[1]
        triangle = geometry.groups * geometry.positions * channels * (channels + 1)
        product = Product(2 * elements * channels, *_product(unit, weight if weight.itemsize <= z.itemsize else z, z))
        partial = geometry.groups * channels * (channels + 1) // 2
        return Cost(read_x + write, triangle, unit, _workspace(partial, splits) + _workspace(elements, 1), product)
    if algorithm == "library":
        return Cost(read_x + read_z + elements * _result_bytes(x, z), geometry.wgrad_flops, unit)
    unit = "fp32" if algorithm in ("depthwise", "winograd") else unit
    flops = geometry.winograd_flops if algorithm == "winograd" else geometry.wgrad_flops
    return Cost(read_x + read_z + write, flops, unit, _workspace(elements, splits))


_LOWER = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _unit(x: torch.dtype, z: torch.dtype, tf32: bool) -> str:
    """What multiplies ``x`` with ``z`` and rounds neither more than the forward did."""
    if x in _LOWER and z in _LOWER:
        return _LOWER[x] if x == z else "tf32"  # holds both exactly
    if z in _LOWER:
        return _LOWER[z]  # autocast rounded x to it
    return "tf32" if tf32 else "fp32"


def _gram_unit(x: torch.dtype, z: torch.dtype, tf32: bool) -> str:
    """The same for ``x`` with itself."""
    return _LOWER[x] if x in _LOWER else _unit(x, z, tf32)


def _product(unit: str, weight: torch.dtype, z: torch.dtype) -> tuple[str, int]:
    """The unit of ``W·G`` and its pairs of parts, for a Gram matrix made by ``unit`` and ``W``'s dtype in the forward: as
    ``parts_of`` in csrc/kernels/gram.cu."""
    if unit == "bf16":
        return "bf16", 7 if weight != torch.bfloat16 else 2 if z == torch.bfloat16 else 3
    if unit == "fp16":  # a sum soon exceeds its range
        return "tf32", 2 if weight in _LOWER else 3
    return (unit, 2) if unit == "tf32" else (unit, 1)


def _result_bytes(x: torch.dtype, z: torch.dtype) -> int:
    return min(x.itemsize, z.itemsize)  # the library's gradient has its operands' dtype


def _workspace(elements: int, splits: int) -> int:
    """fp32 partial sums: written by each split, all read; the sum written (over the first part) and read for the write."""
    return 4 * elements * (2 * splits + 2)
