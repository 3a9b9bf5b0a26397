"""Graphs of ``torch.compile`` that would go on with what was frozen when they were made."""

import functools
import sys
import warnings

import torch

NOTICED = torch.__version__ >= "2.13"  # a TorchVersion, which compares numbers
"""Whether ``torch.compile`` looks at the ``requires_grad`` of parameters. Before PyTorch 2.13 it does not
(https://github.com/pytorch/pytorch/issues/139476)."""


def drop() -> None:
    """Have everything compiled anew where ``requires_grad`` of parameters has changed and older graphs would not see it."""
    dynamo = sys.modules.get("torch._dynamo")
    if not NOTICED and dynamo is not None and dynamo.utils.counters["frames"]["ok"]:
        _say_once()
        dynamo.reset()


@functools.cache
def _say_once() -> None:
    warnings.warn(
        f"torch.compile of PyTorch {torch.__version__} takes no notice of what is frozen: everything is compiled anew where the boundary "
        "moves and where a refresh begins or ends, and graphs of the whole network may go on with BatchNorm as it was, whatever bn_stats "
        "says. From PyTorch 2.13 on there is none of that",
        UserWarning,
        stacklevel=2,
    )
