"""LoCal+SGD for PyTorch: a growing prefix of the network does without back-propagation, the rest learns by SGD."""

import sys
import types
from importlib.metadata import PackageNotFoundError, version

from . import ops
from .batch_growth import BatchGrowth, ResizableBatchSampler
from .explain import explain
from .freezing import freeze_prefix
from .graphs import GraphedStep
from .layers import ExecutionPlan, trace_layers
from .learning import LocalizedLearning
from .ops import apply_update_, correlation, hebbian_update_
from .selection import DynamicModeSelection, ModeSelection, StaticModeSelection
from .supervision import WeakSupervision
from .updater import HebbianUpdater

try:
    __version__ = version("localsgd_ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"


class _Package(types.ModuleType):
    """So that ``localsgd_ext.benchmark = True`` reaches the operations, as ``torch.backends.cudnn.benchmark`` does."""

    @property
    def benchmark(self) -> bool:
        """Whether ``algorithm="auto"`` times the eligible algorithms once per geometry instead of estimating."""
        return ops.benchmark

    @benchmark.setter
    def benchmark(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"benchmark must be a bool, got {value!r}")
        ops.benchmark = value


sys.modules[__name__].__class__ = _Package

__all__ = [
    "BatchGrowth",
    "DynamicModeSelection",
    "ExecutionPlan",
    "GraphedStep",
    "HebbianUpdater",
    "LocalizedLearning",
    "ModeSelection",
    "ResizableBatchSampler",
    "StaticModeSelection",
    "WeakSupervision",
    "apply_update_",
    "correlation",
    "explain",
    "freeze_prefix",
    "hebbian_update_",
    "trace_layers",
]
