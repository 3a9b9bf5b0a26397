from collections.abc import Sequence

import torch
from torch import Tensor

gpu: str | None
"""The type of the devices that run the CUDA kernels, or None where none are compiled."""

class Candidate:
    @property
    def algorithm(self) -> str: ...
    @property
    def eligible(self) -> bool: ...
    @property
    def automatic(self) -> bool: ...
    @property
    def why_not(self) -> str: ...
    @property
    def estimated_us(self) -> float: ...
    @property
    def measured_us(self) -> float | None: ...
    @property
    def configuration(self) -> str: ...

class Plan:
    @property
    def geometry(self) -> str: ...
    @property
    def channels_last(self) -> bool: ...
    @property
    def candidates(self) -> list[Candidate]: ...
    @property
    def pick(self) -> str: ...
    @property
    def reason(self) -> str: ...

def correlation(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    z_is_output: bool,
    algorithm: str,
    benchmark: bool,
    /,
) -> Tensor: ...
def hebbian_update_(
    weight: Tensor,
    x: Tensor,
    z: Tensor | None,
    lr: float | Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    z_is_output: bool,
    normalize: bool,
    algorithm: str,
    skipped: Tensor | None,
    benchmark: bool,
    /,
) -> None: ...
def apply_update_(
    weights: Sequence[Tensor], correlations: Sequence[Tensor], lr: float | Tensor, normalize: bool, skipped: Tensor | None, /
) -> None: ...
def gram_sums(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    /,
) -> Tensor: ...
def correlation_of_gram_sums(sums: Tensor, weight: Tensor, bias: Tensor | None, groups: int, /) -> Tensor: ...
def plan(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    z_is_output: bool,
    benchmark: bool,
    /,
) -> Plan: ...
def unavailable(device: torch.device, /) -> str: ...
