"""benchmarks/reduction.py: bytes by hand, the table."""

from __future__ import annotations

import pytest
from processes import distributed_test
from torch import Tensor, nn

from benchmarks import reduction
from benchmarks.networks import Network
from benchmarks.reduction import Row, measure, table


class Expanding(nn.Module):
    """Four layers, of which three are local; the Gram matrix of the second is smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 64, 1), nn.Conv2d(64, 5, 1), nn.Conv2d(5, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@distributed_test(world_size=2)
def test_measure() -> None:
    reduction.NETWORKS["expanding"] = Network("expanding", Expanding, 34, (8,))
    row = measure("expanding", image=34, batch=8, steps=2)
    both = 3 * 4 * 9 + 64 * 5 + 3  # the first and the third layer, and how often each of the three ran
    assert (row.layers, row.local, row.by_gram) == (4, 3, 1)
    assert row.bytes_d == 4 * (both + 4 * 64)
    assert row.bytes_now == 4 * (both + 4 * 5 // 2 + 4)
    assert min(row.ms_d, row.ms_now, row.cpu_ms_d, row.cpu_ms_now) > 0


def test_table() -> None:
    text = table([Row("mine", 4, 3, 1, 3000, 2000, 10.4, 20.6, 1.0, 2.0)])
    assert [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")] == [
        *("mine", "3 of 4", "1", "3", "2", "1.50x", "10", "21", "1", "2")
    ]


@pytest.mark.parametrize("option", ["--steps", "--batch", "--image"])
def test_mistakes(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reduction.main([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
