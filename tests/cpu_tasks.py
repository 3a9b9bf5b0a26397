"""How csrc/cpu cuts a correlation among threads, worked out here a second time: ``gram_tasks``, ``direct_tasks`` and
``winograd_plan`` there."""

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


def tiles(case: Case, positions: int) -> tuple[int, int]:
    """``winograd``'s, of all images together, and the rows of one: 4, or 2 where that takes no more products."""
    images = case.x[0] if case.batched else 1
    above = {"same": 1, "valid": 0}[case.padding] if isinstance(case.padding, str) else case.arguments["padding"]
    height = case.x[-2] - 2 + 2 * (above if isinstance(above, int) else above[0])
    width = positions // images // height
    rows = 2 if -(-height // 2) * 4 <= -(-height // 4) * 6 else 4
    return images * -(-height // rows) * -(-width // 2), rows


def winograd_plan(case: Case, positions: int, threads: int) -> dict[str, int]:
    """``parts`` of the tiles that are summed apart: at most 8, of 4 blocks or more each, and not so many that their ``sums`` in 16 or
    24 frequencies, ``C`` up to a multiple of 32, are more than 2^20 elements; ``blocks`` of 64 tiles that are in memory at once: a
    thread's own or, where threads are more than parts, of all. ``block``: elements of one, ``x`` and ``z``, channels up to multiples of
    32 and a line of 32 elements behind each frequency."""
    out, channels = case.weight[:2]
    count, rows = tiles(case, positions)
    frequencies, columns, blocks = (rows + 2) * 4, [-(-n // 32) * 32 for n in (channels, out)], -(-count // 64)
    sums = frequencies * out * columns[0]
    parts = max(1, min(8, blocks // 4, (1 << 20) // sums))
    apart = threads <= parts
    cached = (1 if apart else threads) * 256 // (channels + out)
    at_once = max(1, min(cached, -(-blocks // parts)))
    block = frequencies * (64 * sum(columns) + 2 * 32)
    return {"parts": parts, "sums": sums, "blocks": at_once * (threads if apart else 1), "block": block, "all": blocks}


def several(case: Case, algorithm: str, positions: int, threads: int) -> Iterator[str]:
    """Of what there is more than one; in a tile 128 positions, in a panel 32 columns at most, in a chunk 512, in a block 64 tiles."""
    if algorithm == "winograd":
        plan = winograd_plan(case, positions, threads)
        counts = {"parts": plan["parts"], "blocks": plan["all"], "panels": -(-min(case.weight[:2]) // 32)}
        yield from (what for what, count in counts.items() if count > 1)
        return
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
