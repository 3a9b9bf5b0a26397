"""Weak supervision: the epoch loss decides the direction of the local updates (paper, section 2.3)."""

from __future__ import annotations

import math
import warnings
from typing import Any


class WeakSupervision:
    """The sign of the local updates, from the trend of the training loss (paper, Algorithm 2).

    Args:
        kind: ``"absolute"``: -1 after an epoch whose loss rose, +1 otherwise (Algorithm 2 as printed). ``"toggle"``: the
            present direction is reversed when the loss rises and kept otherwise (the section's text, read literally).
    Raises:
        ValueError: an unknown ``kind``.
    """

    KINDS = ("absolute", "toggle")

    def __init__(self, kind: str = "absolute") -> None:
        if kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}, got {kind!r}")
        self.kind = kind
        self.sign = 1
        self.last_loss: float | None = None

    def step(self, loss: float) -> int:
        """Take the mean training loss of the epoch that ended and return the sign for the next one: +1 or -1.

        A loss that is not finite tells no trend: it is reported, and neither the sign nor the remembered loss change.
        """
        loss = float(loss)
        if not math.isfinite(loss):
            warnings.warn(
                f"the epoch loss is {loss}: the sign of the local updates stays {self.sign:+d}", UserWarning, stacklevel=2
            )
            return self.sign
        rose = self.last_loss is not None and self.last_loss < loss
        if self.kind == "absolute":
            self.sign = -1 if rose else 1
        elif rose:
            self.sign = -self.sign
        self.last_loss = loss
        return self.sign

    def state_dict(self) -> dict[str, Any]:
        """The kind, the sign and the loss it was decided from."""
        return {"kind": self.kind, "sign": self.sign, "last_loss": self.last_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, ``kind`` included."""
        self.kind, self.sign, self.last_loss = state["kind"], state["sign"], state["last_loss"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.kind!r}, sign={self.sign:+d})"
