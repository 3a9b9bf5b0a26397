"""LoCal+SGD for PyTorch: a growing prefix of the network learns locally during the forward pass, the rest by SGD."""

from importlib.metadata import PackageNotFoundError, version

from .freezing import freeze_prefix
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

__all__ = [
    "DynamicModeSelection",
    "ExecutionPlan",
    "HebbianUpdater",
    "LocalizedLearning",
    "ModeSelection",
    "StaticModeSelection",
    "WeakSupervision",
    "apply_update_",
    "correlation",
    "freeze_prefix",
    "hebbian_update_",
    "trace_layers",
]
