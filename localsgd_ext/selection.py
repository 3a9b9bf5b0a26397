"""Learning mode selection: where the boundary between localized learning and SGD stands in each epoch (paper, section 2.2).

``boundary`` is the index ``T`` of the *transition layer*, the first layer that learns by SGD; the layers before it learn
locally. Schedules differ in one method, ``step``, called at the end of every epoch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from numbers import Integral
from typing import Any

from .checks import answer, require_numbers

_ROUNDING = 1e-9  # so that 0.29 * 100 = 28.999999999999996 counts as 29


class ModeSelection(ABC):
    """A schedule of the boundary over a run of ``epochs`` epochs of a network of ``num_layers`` layers.

    Before a network has begun to learn, what its first layers have become is worth nothing yet, and their updates are small too.
    With ``min_loss_drop`` (not in the paper) the boundary stays at 0 until the loss of an epoch, where it is told, is that much
    below the first one's.

    Args:
        num_layers: ``L``, the number of layers; may be given later through :meth:`bind` (``LocalizedLearning`` does).
        epochs: ``E_max``, the number of epochs of the run.
        l_max: fraction of the layers that may ever learn locally, in (0, 1]. At least one layer keeps learning by SGD.
        min_loss_drop: share of the first epoch's loss by which the loss must have fallen, in [0, 1); 0: do not wait, which is also done
            where the first loss is not positive.
    Raises:
        ValueError: an argument out of its range.
        TypeError: one that is no number, or no int.
    """

    needs_update_norm = False
    """Whether :meth:`step` wants the norm of the transition layer's change over the epoch."""
    takes_loss = False
    """Whether :meth:`step` may be told the epoch's mean training loss too, as ``loss``. ``DynamicModeSelection`` says yes: a class
    derived from it whose own ``step`` takes no ``loss`` says no, or takes it."""
    waiting: str | None = None
    """Why the boundary has not moved at the end of the last epoch, where that may surprise."""

    def __init__(
        self, num_layers: int | None = None, epochs: int | None = None, *, l_max: float = 0.75, min_loss_drop: float = 0.0
    ) -> None:
        require_numbers(l_max=l_max, min_loss_drop=min_loss_drop)
        if not 0 < l_max <= 1:
            raise ValueError(f"l_max must be in (0, 1], got {l_max}")
        if not 0 <= min_loss_drop < 1:
            raise ValueError(f"min_loss_drop must be in [0, 1), got {min_loss_drop}")
        given: tuple[tuple[str, Any], ...] = (("num_layers", num_layers), ("epochs", epochs))
        for name, value in given:
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.l_max = l_max
        self.min_loss_drop = min_loss_drop
        self._first_loss: float | None = None
        self.num_layers = num_layers
        self.epochs = epochs
        self.epoch = 0
        self.boundary = 0
        if num_layers is not None and epochs is not None:
            self.bind(num_layers, epochs)

    def bind(self, num_layers: int, epochs: int, block_size: int | None = None) -> None:
        """Fix the network's depth and the length of the run; ``block_size`` is what ``t_shift="auto"`` stands for."""
        for name, mine, given in (("num_layers", self.num_layers, num_layers), ("epochs", self.epochs, epochs)):
            if mine is not None and mine != given:
                raise ValueError(f"the schedule was made for {name}={mine}, it is used with {name}={given}")
        self.num_layers, self.epochs = num_layers, epochs
        self._start(block_size)

    @abstractmethod
    def _start(self, block_size: int | None) -> None:
        """Called once the depth and the length of the run are known."""

    @property
    def cap(self) -> int:
        """The largest boundary: ``floor(l_max * L)``, and always one layer for SGD."""
        depth = self._bound(self.num_layers)
        return min(math.floor(self.l_max * depth + _ROUNDING), depth - 1)

    @abstractmethod
    def step(self, update_norm: float | None = None) -> int:
        """End the epoch and return the boundary for the next one."""

    @abstractmethod
    def never_moves(self) -> str | None:
        """Why the boundary cannot leave 0 in this run, or None if it can."""

    def state_dict(self) -> dict[str, Any]:
        """Hyper-parameters and position, as numbers and strings."""
        return {
            "kind": type(self).__name__,
            "num_layers": self.num_layers,
            "epochs": self.epochs,
            "l_max": self.l_max,
            "min_loss_drop": self.min_loss_drop,
            "first_loss": self._first_loss,
            "epoch": self.epoch,
            "boundary": self.boundary,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, hyper-parameters included.

        Raises:
            ValueError: the state is of another kind of schedule.
        """
        if state["kind"] != type(self).__name__:
            raise ValueError(f"the state is of a {state['kind']}, this is a {type(self).__name__}")
        self.num_layers, self.epochs, self.l_max = state["num_layers"], state["epochs"], state["l_max"]
        self.epoch, self.boundary = state["epoch"], state["boundary"]
        # States from before there was min_loss_drop go on as they began.
        self.min_loss_drop, self._first_loss = state.get("min_loss_drop", 0.0), state.get("first_loss")

    def _see(self, loss: float | None) -> None:
        """Keep the first epoch's loss."""
        if self._first_loss is None and loss is not None and math.isfinite(loss):
            self._first_loss = float(loss)

    def _not_begun(self, loss: float | None) -> str | None:
        """Of a loss that has not fallen by ``min_loss_drop``; ``None`` without it, or where the first was 0 or less."""
        if self.min_loss_drop == 0 or loss is None:
            return None
        first = self._first_loss
        if first is None or not math.isfinite(loss):
            return f"the loss is {loss} (min_loss_drop=0 does not wait)"
        wanted = (1 - self.min_loss_drop) * first
        if first <= 0 or loss <= wanted:
            return None
        was = f"it was {first:.4g} at first and must fall to {wanted:.4g}"
        return f"the loss is {loss:.4g}, {was} (min_loss_drop=0 does not wait)"

    @staticmethod
    def _bound(value: int | None) -> int:
        if value is None:
            raise RuntimeError("the schedule does not know num_layers and epochs yet: give both, or call bind()")
        return value


class DynamicModeSelection(ModeSelection):
    """The boundary moves when the transition layer's updates get small (paper, Algorithm 1).

    At the end of epoch ``E``, with ``u_E = ||W_T(end of E) - W_T(start of E)||_2`` of the transition layer and ``W_avg`` the
    mean of the ``K`` values before it: if ``u_E <= alpha * W_avg`` and ``e_k >= K``, the boundary moves by ``t_shift`` layers,
    ``e_k = 0`` and the history begins anew (it was another layer's); otherwise ``e_k += 1``. So moves are at least ``K + 1``
    epochs apart. ``K = max(1, floor(E_max * t_shift / (l_max * L)))`` (equation 2).

    Args:
        alpha: fraction of the average below which an update counts as small; the paper's is 0.95.
        t_shift: layers per move: an int, a fraction of ``L``, or ``"auto"`` for the size of the network's recurring block
            (resolved by ``LocalizedLearning``).
        min_loss_drop: see :class:`ModeSelection`; 0 is Algorithm 1 as printed.
    Raises:
        ValueError: an argument out of its range, or ``t_shift="auto"`` where no network is known.
        TypeError: one that is no number.
    """

    needs_update_norm = True
    takes_loss = True

    def __init__(
        self,
        num_layers: int | None = None,
        epochs: int | None = None,
        *,
        alpha: float = 0.95,
        l_max: float = 0.75,
        t_shift: int | float | str = "auto",
        min_loss_drop: float = 0.0,
    ) -> None:
        require_numbers(alpha=alpha, t_shift=1 if isinstance(t_shift, str) else t_shift)
        given: object = t_shift
        if isinstance(given, Integral):  # numpy's too
            t_shift = int(given)
        if not alpha > 0:  # so that NaN is refused
            raise ValueError(f"alpha must be positive, got {alpha}")
        if t_shift != "auto" and (
            isinstance(t_shift, str) or not (0 < t_shift < 1 or (isinstance(t_shift, int) and t_shift >= 1))
        ):
            raise ValueError(f"t_shift must be 'auto', an int of at least 1 or a fraction in (0, 1), got {t_shift!r}")
        self.alpha = alpha
        self.t_shift = t_shift
        self.shift = 0
        self.min_epochs = 0
        self.epochs_since_move = 0
        self._history: deque[float] = deque()
        super().__init__(num_layers, epochs, l_max=l_max, min_loss_drop=min_loss_drop)

    def _start(self, block_size: int | None) -> None:
        depth, epochs = self._bound(self.num_layers), self._bound(self.epochs)
        if isinstance(self.t_shift, str):
            if block_size is None:
                raise ValueError("t_shift must be an int or a fraction where no network is known, got 'auto'")
            self.shift = block_size
        else:
            self.shift = self.t_shift if isinstance(self.t_shift, int) else max(1, round(self.t_shift * depth))
        self.min_epochs = max(1, math.floor(epochs * self.shift / (self.l_max * depth) + _ROUNDING))
        self._history = deque(maxlen=self.min_epochs)

    def step(self, update_norm: float | None = None, loss: float | None = None) -> int:
        """End an epoch in which the transition layer's weight changed by ``update_norm`` (L2); return the next boundary.

        ``loss``: the epoch's mean training loss, which only ``min_loss_drop`` asks for.
        """
        if update_norm is None:
            raise ValueError("update_norm must be the norm of the transition layer's change over the epoch, got None")
        self._bound(self.num_layers)
        self._see(loss)
        # e_k >= K implies that the history holds K values: both grow by one an epoch and restart together.
        settled = self.epochs_since_move >= self.min_epochs and update_norm <= self.alpha * (
            sum(self._history) / self.min_epochs
        )
        self.waiting = self._not_begun(loss) if settled and self.boundary == 0 else None
        if settled and self.boundary < self.cap and self.waiting is None:
            self.boundary = min(self.boundary + self.shift, self.cap)
            self.epochs_since_move = 0
            self._history.clear()
        else:
            self.epochs_since_move += 1
            self._history.append(float(update_norm))
        self.epoch += 1
        return self.boundary

    def never_moves(self) -> str | None:
        if self.cap == 0:
            return f"l_max={self.l_max} of {self.num_layers} layers is less than one layer"
        if self.min_epochs + 1 >= self._bound(self.epochs):
            return (
                f"K = {self.min_epochs} epochs must pass first (equation 2: {self.epochs} epochs * t_shift {self.shift} / "
                f"(l_max {self.l_max} * {self.num_layers} layers)): use more epochs or a smaller t_shift"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "alpha": self.alpha,
            "t_shift": self.t_shift,
            "shift": self.shift,
            "min_epochs": self.min_epochs,
            "epochs_since_move": self.epochs_since_move,
            "history": list(self._history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.alpha, self.t_shift, self.shift = state["alpha"], state["t_shift"], state["shift"]
        self.min_epochs, self.epochs_since_move = state["min_epochs"], state["epochs_since_move"]
        self._history = deque(state["history"], maxlen=self.min_epochs)

    def __repr__(self) -> str:
        shift = self.shift or self.t_shift
        return f"{type(self).__name__}(boundary={self.boundary}, alpha={self.alpha}, t_shift={shift}, K={self.min_epochs})"


class StaticModeSelection(ModeSelection):
    """The boundary is a function of the epoch (paper, appendix: static schedules, "equation 3" there).

    Args:
        kind: ``"quadratic"``: ``T = max(0, c1 - c2 * (E - E_max)^2)`` (the paper's); ``"linear"``:
            ``T = max(0, c1 - c2 * (E_max - E))``; ``"exponential"``: ``T = c1 * (1 - exp(-c2 * E))``; or a callable of the
            epoch. ``T`` is floored and kept within ``[0, cap]``. A callable may also move the boundary back, which gives
            local-first schedules (section 2.2).
        c1: boundary reached at the end, in layers; ``l_max * L`` unless given.
        c2: rate; unless given, such that ``T(0) = 0`` (exponential: ``5 / E_max``).
        min_loss_drop: see :class:`ModeSelection`; not of a callable. After the wait the schedule, from its first move on, is run
            through in the epochs that are left.
    Raises:
        ValueError: an unknown ``kind``, or ``l_max``, ``min_loss_drop``, ``c1`` or ``c2`` out of its range.
        TypeError: ``l_max``, ``c1``, ``c2`` or ``min_loss_drop`` is no number.
    """

    takes_loss = True
    KINDS = ("quadratic", "linear", "exponential")

    def __init__(
        self,
        num_layers: int | None = None,
        epochs: int | None = None,
        *,
        kind: str | Callable[[int], float] = "quadratic",
        c1: float | None = None,
        c2: float | None = None,
        l_max: float = 0.75,
        min_loss_drop: float = 0.0,
    ) -> None:
        if not callable(kind) and kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)} or a callable of the epoch, got {kind!r}")
        for name, value in (("c1", c1), ("c2", c2)):
            if value is not None:
                require_numbers(**{name: value})
                if not math.isfinite(value):
                    raise ValueError(f"{name} must be finite, got {value}")
        if callable(kind) and min_loss_drop:
            raise ValueError(f"min_loss_drop must be 0 where kind is a callable, got {min_loss_drop}")
        self.kind = kind
        self.c1 = c1
        self.c2 = c2
        self.waited = 0
        """Epochs for which the first move had to wait."""
        super().__init__(num_layers, epochs, l_max=l_max, min_loss_drop=min_loss_drop)

    def _start(self, block_size: int | None) -> None:
        self.boundary = self.at(self.epoch)

    def at(self, epoch: int) -> int:
        """The boundary in ``epoch`` (counted from 0).

        Raises:
            TypeError, ValueError: a callable's answer is no finite number.
        """
        if self.waited == 0:
            return self._by_clock(epoch)
        last = self._bound(self.epochs)
        first = next(e for e in range(last + 1) if self._by_clock(e) > 0)
        begun = first + self.waited
        if epoch < begun or begun >= last:
            return 0
        return self._by_clock(first + (epoch - begun) * (last - first) / (last - begun))

    def _by_clock(self, epoch: float) -> int:
        """Without any wait."""
        depth, last = self._bound(self.num_layers), self._bound(self.epochs)
        c1 = self.l_max * depth if self.c1 is None else self.c1
        if callable(self.kind):
            value = answer("kind", self.kind, int(epoch))
            if not math.isfinite(value):
                raise ValueError(f"kind({epoch}) must be finite, got {value}")
        elif self.kind == "quadratic":
            value = c1 - (c1 / last**2 if self.c2 is None else self.c2) * (min(epoch, last) - last) ** 2
        elif self.kind == "linear":
            value = c1 - (c1 / last if self.c2 is None else self.c2) * (last - epoch)
        else:
            value = c1 * (1 - math.exp(-(5 / last if self.c2 is None else self.c2) * epoch))
        return min(max(0, math.floor(value + _ROUNDING)), self.cap)

    def step(self, update_norm: float | None = None, loss: float | None = None) -> int:
        """End an epoch of this mean training ``loss`` and return the next boundary; ``update_norm`` is not used."""
        boundary = self.at(self.epoch + 1)
        self._see(loss)
        self.waiting = self._not_begun(loss) if self.boundary == 0 < boundary else None
        if self.waiting is not None:
            self.waited += 1
            boundary = 0
        self.epoch += 1
        self.boundary = boundary
        return self.boundary

    def never_moves(self) -> str | None:
        if any(self.at(epoch) for epoch in range(self._bound(self.epochs))):
            return None
        return f"the schedule stays at 0 over all {self.epochs} epochs"

    def state_dict(self) -> dict[str, Any]:
        # A callable cannot be saved: the one given to the constructor goes on.
        return super().state_dict() | {
            "schedule": None if callable(self.kind) else self.kind,
            "c1": self.c1,
            "c2": self.c2,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["kind"] == type(self).__name__ and callable(self.kind) != (state["schedule"] is None):
            here, there = ("a callable" if callable(self.kind) else repr(self.kind), state["schedule"] or "a callable")
            raise ValueError(f"the state is of a static schedule of kind {there}, this one is {here}")
        super().load_state_dict(state)
        self.kind = state["schedule"] or self.kind
        self.c1, self.c2, self.waited = state["c1"], state["c2"], state.get("waited", 0)

    def __repr__(self) -> str:
        kind = getattr(self.kind, "__name__", "callable") if callable(self.kind) else self.kind
        return f"{type(self).__name__}(boundary={self.boundary}, kind={kind!r})"
