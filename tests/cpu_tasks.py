"""How csrc/cpu cuts a correlation among threads, worked out here a second time: ``gram_tasks`` and ``direct_tasks`` there."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cases import Case


def columns(case: Case, algorithm: str) -> int:
    """Of what is packed of x: channels of a group, for ``direct`` times the taps."""
    return math.prod(case.weight[1:] if algorithm == "direct" else case.weight[1:2])


def parts(case: Case, algorithm: str, positions: int) -> int:
    """Ranges of positions whose sums are added up at the end: at most 8, each of 2^22 products or more; one from 256 columns on, and
    not so many for ``direct`` that their sums have more than 2^20 elements."""
    wide = columns(case, algorithm)
    if wide >= 256:
        return 1
    products = positions * (wide * wide // 2 if algorithm == "gram" else wide * case.weight[0] // case.groups)
    most = 8 if algorithm == "gram" else min(8, (1 << 20) // panels(case))
    return max(1, min(most, products >> 22))


def panels(case: Case) -> int:
    """Elements of ``direct``'s sums: whole panels of 32 columns."""
    return case.weight[0] * -(-columns(case, "direct") // 32) * 32


def strips(case: Case, algorithm: str, threads: int) -> int:
    """Of the columns, from 256 on: one for a thread, but 64 columns or more each."""
    wide = columns(case, algorithm)
    return max(1, min(threads, wide // 64)) if wide >= 256 else 1


def several(case: Case, algorithm: str, positions: int, threads: int) -> Iterator[str]:
    """Of what there is more than one; in a tile 128 positions, in a panel 32 columns at most, in a chunk 512."""
    wide = columns(case, algorithm)
    both = min(wide, case.weight[0] // case.groups) if algorithm == "direct" else wide
    counts = {
        "parts": parts(case, algorithm, positions),
        "strips": strips(case, algorithm, threads),
        "tiles": -(-positions // 128),
        "panels": -(-both // 32),
        "chunks": -(-wide // 512) if algorithm == "direct" else 1,
    }
    yield from (what for what, count in counts.items() if count > 1)
