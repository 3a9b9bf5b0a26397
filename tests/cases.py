"""The one list of layer shapes: tests run over ``CASES``, micro benchmarks over ``LAYERS``; benchmarks/networks.py traces more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IntOrTuple = int | tuple[int, ...]

LAYOUTS = ("contiguous", "channels_last", "sliced")


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its input, in ``torch.nn``'s terms. ``weight`` of two dimensions: linear."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: IntOrTuple = 1
    padding: IntOrTuple | str = 0
    dilation: IntOrTuple = 1
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def dims(self) -> int:
        return len(self.weight) - 2

    @property
    def batched(self) -> bool:
        return self.dims == 0 or len(self.x) == self.dims + 2

    @property
    def pointwise(self) -> bool:
        return all(k == 1 for k in self.weight[2:])

    @property
    def depthwise(self) -> bool:
        return self.dims > 0 and self.groups > 1 and self.weight[1] == 1

    @property
    def winograd(self) -> bool:
        """3x3 taps next to each other, at every position, of all channels."""
        ones = (1, (1, 1))
        return self.weight[2:] == (3, 3) and self.groups == 1 and self.stride in ones and self.dilation in ones

    @property
    def cpu_algorithms(self) -> tuple[str, ...]:
        """With those that only a CPU has."""
        return (*self.algorithms, *(("winograd",) if self.winograd else ()))

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Those this layer is eligible for on any device, worked out here independently of the code under test."""
        return (
            *(("gram",) if self.pointwise else ()),
            *(("depthwise",) if self.depthwise else ()),
            "direct",
            "library",
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operations, without the bias."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer as ``torch.nn`` computes it."""
        if self.dims == 0:
            return F.linear(x, weight, bias)
        module = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[self.dims - 1]
        conv = module(
            self.weight[1] * self.groups,
            self.weight[0],
            self.weight[2:],  # type: ignore[arg-type]
            bias=bias is not None,
            device="meta",
            **self.arguments,
        )
        return torch.func.functional_call(conv, {"weight": weight} | ({} if bias is None else {"bias": bias}), (x,))

    def sample(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", layout: str = "contiguous", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``x``, ``weight`` and ``bias`` of normally distributed numbers; ``x`` is shifted as after a ReLU."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.x, generator=generator, dtype=torch.float64) + 0.5
        fan_in = max(1, torch.Size(self.weight[1:]).numel())
        weight = torch.randn(self.weight, generator=generator, dtype=torch.float64) * fan_in**-0.5
        bias = torch.randn(self.weight[0], generator=generator, dtype=torch.float64) if self.bias else None
        return (
            with_layout(x.to(device, dtype), layout, self),
            weight.to(device, dtype),
            None if bias is None else bias.to(device, dtype),
        )


def strided(bias: Tensor | None) -> Tensor | None:
    """The same values as every other element of a longer tensor, whose rest is NaN."""
    if bias is None:
        return None
    wide = torch.full((2 * bias.numel(),), float("nan"), dtype=bias.dtype, device=bias.device)
    wide[::2] = bias
    return wide[::2]


def with_layout(tensor: Tensor, layout: str, case: Case) -> Tensor:
    """The same values in another arrangement; ``sliced``: every other element of a larger tensor, in the last dimension."""
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype, device=tensor.device)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "channels_last" and case.dims > 0:
        channel = tensor.dim() - case.dims - 1
        return tensor.movedim(channel, -1).contiguous().movedim(-1, channel)
    return tensor.contiguous()


CASES = (
    # dense 2-d
    Case("conv3x3", (2, 7, 13, 11), (9, 7, 3, 3), padding=1, bias=True),
    Case("first3x3", (2, 3, 10, 24), (16, 3, 3, 3), padding=1),
    Case("first7x7", (2, 3, 19, 32), (24, 3, 7, 7), stride=2, padding=3, bias=True),
    Case("patches4x4", (2, 3, 8, 21), (8, 3, 4, 4), stride=4, bias=True),
    Case("conv3x3-stride2", (3, 8, 15, 9), (5, 8, 3, 3), stride=2, padding=1),
    Case("conv3x3-dilated", (2, 5, 17, 13), (6, 5, 3, 3), padding=2, dilation=2),
    Case("conv3x5-mixed", (2, 3, 19, 23), (4, 3, 3, 5), stride=(2, 3), padding=(0, 2), dilation=(3, 1), bias=True),
    Case("conv4x4-same", (2, 4, 9, 10), (6, 4, 4, 4), padding="same", bias=True),
    Case("conv3x3-same-dilated", (2, 4, 9, 10), (6, 4, 3, 2), padding="same", dilation=(2, 3)),
    Case("conv3x3-valid", (1, 6, 8, 8), (4, 6, 3, 3), padding="valid"),
    Case("conv3x3-no-overlap", (2, 3, 20, 20), (4, 3, 2, 2), stride=5),
    Case("conv3x3-odd-channels", (1, 129, 6, 5), (151, 129, 3, 3), padding=1),
    Case("conv3x3-many-images", (37, 6, 4, 4), (5, 6, 3, 3), padding=1),
    Case("stem7x7", (2, 3, 33, 31), (16, 3, 7, 7), stride=2, padding=3),
    Case("patchify", (2, 3, 16, 16), (12, 3, 4, 4), stride=4, bias=True),
    # padding modes
    Case("conv3x3-reflect", (2, 4, 9, 7), (5, 4, 3, 3), padding=2, padding_mode="reflect"),
    Case("conv3x3-replicate", (2, 4, 9, 7), (5, 4, 3, 3), padding=(1, 2), padding_mode="replicate", bias=True),
    Case("conv4x3-circular-same", (2, 4, 9, 7), (5, 4, 4, 3), padding="same", padding_mode="circular"),
    # grouped
    Case("grouped3x3", (2, 12, 9, 8), (8, 3, 3, 3), padding=1, groups=4, bias=True),
    Case("grouped1x1", (2, 24, 7, 9), (16, 6, 1, 1), groups=4, bias=True),
    # 1x1
    Case("expand1x1", (2, 16, 21, 19), (64, 16, 1, 1), bias=True),
    Case("contract1x1", (2, 64, 9, 9), (16, 64, 1, 1)),
    Case("square1x1-odd", (3, 129, 9, 5), (151, 129, 1, 1), bias=True),
    Case("wide1x1", (1, 300, 20, 17), (40, 300, 1, 1), bias=True),
    Case("expand1x1-stride2", (2, 12, 15, 14), (48, 12, 1, 1), stride=2),
    Case("contract1x1-stride2", (2, 48, 8, 9), (12, 48, 1, 1), stride=2, bias=True),
    Case("1x1-padded", (2, 6, 5, 7), (9, 6, 1, 1), stride=2, padding=(3, 1), bias=True),
    Case("1x1-circular", (2, 6, 5, 7), (9, 6, 1, 1), padding=1, padding_mode="circular"),
    Case("1x1-late", (40, 20, 3, 3), (30, 20, 1, 1)),
    # depthwise
    Case("depthwise3x3", (2, 33, 13, 21), (33, 1, 3, 3), padding=1, groups=33, bias=True),
    Case("depthwise3x3-stride2", (3, 16, 17, 14), (16, 1, 3, 3), stride=2, padding=1, groups=16),
    Case("depthwise5x5", (2, 8, 19, 40), (8, 1, 5, 5), padding=2, groups=8),
    Case("depthwise7x7", (2, 6, 11, 9), (6, 1, 7, 7), padding=3, groups=6),
    Case("depthwise-multiplier", (2, 7, 9, 10), (21, 1, 3, 3), padding=1, groups=7, bias=True),
    Case("depthwise-mixed", (2, 9, 21, 23), (9, 1, 4, 8), stride=(2, 3), padding=(1, 5), dilation=(3, 2), groups=9),
    Case("depthwise4x4-same", (2, 5, 8, 7), (5, 1, 4, 4), padding="same", groups=5),
    Case("depthwise1x1", (2, 9, 6, 5), (9, 1, 1, 1), groups=9, bias=True),
    Case("depthwise-wide", (1, 130, 6, 6), (130, 1, 3, 3), padding=1, groups=130),
    # 1-d and 3-d
    Case("conv1d", (3, 5, 129), (7, 5, 3), padding=1, bias=True),
    Case("conv1d-strided", (2, 6, 151), (4, 3, 5), stride=3, padding=4, dilation=2, groups=2),
    Case("conv1d-1", (2, 20, 65), (30, 20, 1), bias=True),
    Case("depthwise1d", (3, 12, 151), (12, 1, 31), padding="same", groups=12),
    Case("conv3d", (2, 3, 5, 7, 6), (4, 3, 3, 3, 3), padding=1, bias=True),
    Case("conv3d-strided", (2, 4, 7, 6, 9), (6, 2, 2, 3, 1), stride=(2, 1, 3), padding=(1, 0, 0), groups=2),
    Case("conv3d-1", (2, 8, 3, 5, 4), (12, 8, 1, 1, 1), bias=True),
    Case("depthwise3d", (2, 6, 5, 8, 7), (6, 1, 3, 3, 3), stride=(2, 1, 2), padding=1, dilation=(2, 1, 1), groups=6),
    # linear
    Case("linear", (129, 40), (151, 40), bias=True),
    Case("linear-contract", (64, 200), (10, 200)),
    Case("linear-one-row", (24,), (7, 24), bias=True),
    Case("linear-sequence", (3, 17, 24), (48, 24), bias=True),
    Case("linear-4d", (2, 3, 5, 12), (20, 12)),
    Case("linear-wide", (50, 260), (300, 260)),
    # unbatched
    Case("conv3x3-unbatched", (7, 10, 11), (5, 7, 3, 3), padding=1, bias=True),
    Case("conv1d-unbatched", (4, 33), (6, 4, 5), stride=2),
    Case("depthwise-unbatched", (6, 9, 9), (6, 1, 3, 3), padding=1, groups=6),
    Case("1x1-unbatched", (6, 9, 9), (8, 6, 1, 1), bias=True),
)

EMPTY_CASES = (
    Case("empty-conv", (0, 4, 8, 8), (6, 4, 3, 3), padding=1),
    Case("empty-1x1", (0, 4, 8, 8), (6, 4, 1, 1), bias=True),
    Case("empty-depthwise", (0, 4, 8, 8), (4, 1, 3, 3), padding=1, groups=4),
    Case("empty-reflect", (0, 4, 8, 8), (6, 4, 3, 3), padding=1, padding_mode="reflect"),
    Case("empty-linear", (0, 5), (3, 5), bias=True),
)

# Layers of real networks, for ``make bench``; batch 8 is what a small CPU does in a fraction of a second.
LAYERS = (
    Case("resnet50 stem", (8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    Case("resnet50 expand 64-256", (8, 64, 56, 56), (256, 64, 1, 1)),
    Case("resnet50 contract 256-64", (8, 256, 56, 56), (64, 256, 1, 1)),
    Case("resnet50 dense 64", (8, 64, 56, 56), (64, 64, 3, 3), padding=1),
    Case("resnet50 expand 128-512", (8, 128, 28, 28), (512, 128, 1, 1)),
    Case("resnet50 down 256-512", (8, 256, 56, 56), (512, 256, 1, 1), stride=2),
    Case("resnet50 dense 128", (8, 128, 28, 28), (128, 128, 3, 3), padding=1),
    Case("resnet50 dense 512", (8, 512, 7, 7), (512, 512, 3, 3), padding=1),
    Case("mobilenet_v2 depthwise 144", (8, 144, 56, 56), (144, 1, 3, 3), padding=1, groups=144),
    Case("mobilenet_v2 depthwise 144 stride 2", (8, 144, 56, 56), (144, 1, 3, 3), stride=2, padding=1, groups=144),
    Case("mobilenet_v2 depthwise 384", (8, 384, 14, 14), (384, 1, 3, 3), padding=1, groups=384),
    Case("mobilenet_v2 expand 24-144", (8, 24, 56, 56), (144, 24, 1, 1)),
    Case("mobilenet_v2 contract 144-24", (8, 144, 56, 56), (24, 144, 1, 1)),
    Case("convnext depthwise 96", (8, 96, 56, 56), (96, 1, 7, 7), padding=3, groups=96),
    Case("convnext expand", (8, 56, 56, 96), (384, 96), bias=True),
    Case("convnext contract", (8, 56, 56, 384), (96, 384), bias=True),
)
