"""Models around models: which can be trained through, and which hide their weights from localized learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from .layers import LAYER_TYPES

if TYPE_CHECKING:
    from .distributed import ReplicatedModel


def unwrap(model: nn.Module) -> tuple[nn.Module, ReplicatedModel | None]:
    """The network itself and, if it was given in one, the :class:`ReplicatedModel` around it."""
    if dist.is_available():
        from .distributed import ReplicatedModel  # needs a torch.distributed, which not every build of PyTorch has

        if isinstance(model, ReplicatedModel):
            return model.module, model
    return model, None


def refuse_wrappers(model: nn.Module) -> None:
    """Raise for models whose weights the forward hooks would not see or not own."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise TypeError("model must not be wrapped in nn.DataParallel: its replicas' updates are lost")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model must not be wrapped in DistributedDataParallel, which fails once the boundary moves and knows nothing of "
            "correlations: wrap it in localsgd_ext.distributed.ReplicatedModel"
        )
    refuse_sharded(model)
    if not any(isinstance(module, LAYER_TYPES) for module in model.modules()):
        raise ValueError(f"model must have a convolution or linear module, {type(model).__name__} has none")


def refuse_sharded(model: nn.Module) -> None:
    """Raise if weights are sharded: what a forward hook writes goes into the gathered copy, which is thrown away."""
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ in ("DTensor", "FlatParameter"):
            raise TypeError(
                f"model must hold whole parameters, {name!r} is sharded (FSDP, tensor parallel): not supported, because local "
                "updates would go into the gathered copy of the weight, which is thrown away after the forward"
            )
    for name, module in model.named_modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            raise TypeError(
                f"model must hold whole parameters, fully_shard was applied to {name or 'the model itself'!r}: not supported, "
                "because local updates would go into the gathered copy of the weight, which is thrown away after the forward"
            )
