"""A CUDA graph without a GPU: operations are recorded, and replayed on the same memory, without the Python around them.

As with a real graph, what is captured is not executed, waiting for a value is an error, and a replay reads and writes the tensors
of the capture. Operations must go through PyTorch's dispatcher to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []  # with what was there before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                self.written += [(t, t.clone()) for t in tree_leaves(given) if isinstance(t, Tensor)]
        outputs = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, outputs))
        return outputs


class RecordedGraphs:
    """A recorder for ``GraphedStep``.

    Args:
        buffers: tensors that operations write without saying so (BatchNorm's running statistics).
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = list(buffers)
        self.warm_ups = 0
        self.replays = 0

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return run()

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        before = [(buffer, buffer.clone()) for buffer in self._buffers]
        with _Recording() as recording:
            outputs = run()
        with torch.no_grad():
            for tensor, content in [*before, *recording.written][::-1]:  # what was captured was not executed
                tensor.data.copy_(content)

        def replay() -> Any:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, recorded in recording.calls:
                    for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                        if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                            old.data.copy_(new)
            return outputs

        return replay
