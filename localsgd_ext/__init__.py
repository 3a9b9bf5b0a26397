"""LoCal+SGD for PyTorch: a growing prefix of the network learns locally during the forward pass, the rest by SGD."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("localsgd_ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
