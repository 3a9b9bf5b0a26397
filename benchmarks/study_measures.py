"""What benchmarks/study.py says about a layer: the shape of its filters, and how they lie to the patches they see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of ``values`` (squared singular values, or eigenvalues) as shares of their sum."""
    shares = values.double().clamp_min(0)
    shares = shares / shares.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def rank_of(matrix: Tensor) -> float:
    """Effective rank of a matrix: ``n`` equal singular values give ``n``, one alone gives 1."""
    return effective_rank(torch.linalg.svdvals(matrix.double()).square())


def top_direction(moment: Tensor) -> Tensor:
    """Eigenvector of the largest eigenvalue of a symmetric matrix."""
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors[:, -1]


def moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Second moment and covariance ``[M, M]`` of patches ``[count, M]``."""
    second = (patches.T @ patches).double() / len(patches)
    mean = patches.double().mean(0)
    return second, second - torch.outer(mean, mean)


def describe(weight: Tensor, patches: Tensor) -> dict[str, float]:
    """Of filters ``[K, M]`` over patches ``[count, M]``; cosines are absolute values."""
    weight = weight.double()
    second, covariance = moments(patches)
    top, top_centred = top_direction(second), top_direction(covariance)
    dominant = torch.linalg.svd(weight, full_matrices=False).Vh[0]
    outputs = weight @ covariance @ weight.T  # covariance of the outputs [K, K]; BatchNorm makes it a correlation
    scale = outputs.diagonal().clamp_min(1e-30).rsqrt()
    return {
        "rank": rank_of(weight),
        "norm": float(weight.norm()),
        "top": float((dominant @ top).abs()),
        "top_centred": float((dominant @ top_centred).abs()),
        "filters_top": float((F.normalize(weight, dim=1) @ top).abs().mean()),
        "output_rank": effective_rank(torch.linalg.eigvalsh(scale[:, None] * outputs * scale)),
    }


def layers(model: nn.Module, names: Sequence[str], pictures: Tensor) -> dict[str, list[float]]:
    """:func:`describe` for each of the convolutions in ``names``, by measure, on what ``pictures`` are to them in evaluation."""
    modules = {name: model.get_submodule(name) for name in names}
    inputs: dict[str, Tensor] = {}
    with _captured(modules, inputs), _evaluation(model), torch.no_grad():
        model(pictures)
    found = [describe(_filters(modules[name]), _patches(modules[name], inputs[name])) for name in names]
    return {measure: [float(f"{each[measure]:.4g}") for each in found] for measure in found[0]}


def _filters(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    return module.weight.detach().flatten(1)


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """``[count, M]``, in the order of the filters' columns."""
    assert isinstance(module, nn.Conv2d)
    assert isinstance(module.padding, tuple)
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return columns.transpose(1, 2).flatten(0, 1)


@contextmanager
def _captured(modules: dict[str, nn.Module], inputs: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        return modules[name].register_forward_pre_hook(lambda _, args: inputs.__setitem__(name, args[0].detach()))

    handles = [keep(name) for name in modules]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    yield
    model.train(training)
