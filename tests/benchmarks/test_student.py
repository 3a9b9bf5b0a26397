"""benchmarks/experiments/student.py against printed tables and against scipy."""

from __future__ import annotations

import pytest

from benchmarks.experiments.student import paired, quantile, two_sided, within


# Two-sided 95 % and 99 %, as printed in any statistics book.
@pytest.mark.parametrize(
    ("degrees", "at_95", "at_99"),
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (9, 2.262, 3.250), (30, 2.042, 2.750)],
)
def test_quantiles_of_the_printed_tables(degrees: int, at_95: float, at_99: float) -> None:
    assert quantile(0.95, degrees) == pytest.approx(at_95, abs=5e-4)
    assert quantile(0.99, degrees) == pytest.approx(at_99, abs=5e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 100])
def test_p_is_scipys(degrees: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.3, -1.0, 2.262, 5.0, -12.0):
        assert two_sided(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), abs=1e-13)
        assert within(t, degrees) == within(-t, degrees)


def test_paired_differences() -> None:
    """Student's own: ten patients' hours of sleep gained by one drug over the other (Biometrika 1908): t = 4.0621, p = 0.00283."""
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    test = paired(hours)
    assert test.mean == pytest.approx(1.58)
    assert test.p == pytest.approx(0.002833, abs=1e-6)
    assert (test.low, test.high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))
    assert test.text() == "+1.58 [+0.70, +2.46] p 0.003"


@pytest.mark.parametrize(
    ("differences", "text"),
    [
        ([0.5], "+0.50 [one seed]"),
        ([1.0, 1.0], "+1.00 [two seeds]"),
        ([1.0, 1.05], "+1.02 [two seeds]"),
        ([0.0] * 3, "+0.00 [3 equal]"),
        (
            [100 * 0.9505 - 100 * 0.95, 100 * 0.9005 - 100 * 0.9, 100 * 0.8005 - 100 * 0.8],
            "+0.05 [3 equal]",
        ),  # but for rounding
    ],
)
def test_few_or_equal_differences_have_no_p(differences: list[float], text: str) -> None:
    test = paired(differences)
    assert (test.low, test.high, test.p) == (None, None, None)
    assert test.text() == text


def test_no_differences() -> None:
    with pytest.raises(ValueError, match="differences must not be empty"):
        paired([])
