"""Student's t for paired differences: mean, confidence interval and two-sided p."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST = 3
"""Differences that a test needs. Accuracies are counts of pictures: two differences are equal, or nearly, by chance."""
_SAME = 1e-9  # accuracies in percent, as floats


@dataclass(frozen=True)
class Paired:
    """Of ``n`` differences. ``low`` and ``high`` bound the mean with 95 % confidence; fewer than :data:`LEAST` differences, or equal
    ones, which say nothing of how they vary, have neither them nor ``p``."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def text(self, digits: int = 2) -> str:
        """``+1.21 [+0.40, +2.02] p 0.008``."""
        if self.low is None or self.high is None or self.p is None:
            few = {1: "one seed", 2: "two seeds"}.get(self.n, f"{self.n} equal")
            return f"{self.mean:+.{digits}f} [{few}]"
        small = "p < 0.001" if self.p < 0.001 else f"p {self.p:.3f}"
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}] {small}"


def paired(differences: Sequence[float], confidence: float = 0.95) -> Paired:
    """The paired t-test of ``differences`` against 0. Raises ``ValueError`` for none."""
    n = len(differences)
    if n == 0:
        raise ValueError("differences must not be empty")
    mean = statistics.fmean(differences)
    if n < LEAST or max(differences) - min(differences) < _SAME:
        return Paired(n, mean)
    error = statistics.stdev(differences) / math.sqrt(n)
    reach = quantile(confidence, n - 1) * error
    return Paired(n, mean, mean - reach, mean + reach, two_sided(mean / error, n - 1))


def within(t: float, degrees: int) -> float:
    """The probability that ``|T| < |t|`` for ``T`` of Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    # Powers of the cosine below the degrees: 1 + 1/2 c^2 + (1 3)/(2 4) c^4 + ... or c + 2/3 c^3 + (2 4)/(3 5) c^5 + ...
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def two_sided(t: float, degrees: int) -> float:
    """The p of ``t``."""
    return max(0.0, 1 - within(t, degrees))


def quantile(confidence: float, degrees: int) -> float:
    """The ``t`` with ``within(t) == confidence``, by bisection."""
    low, high = 0.0, 1.0
    while within(high, degrees) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, degrees) < confidence else (low, middle)
    return high
