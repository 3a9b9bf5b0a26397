"""How csrc/cpu cuts a correlation among threads, worked out here a second time: ``gram_tasks``, ``direct_tasks``,
``few_channels_parts`` and ``winograd_plan`` there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from cases import Case
from torch import Tensor


def columns(case: Case, algorithm: str) -> int:
    """Of what is packed of x: channels of a group, for ``direct`` times the taps."""
    return math.prod(case.weight[1:] if algorithm == "direct" else case.weight[1:2])


def parts(case: Case, algorithm: str, positions: int) -> int:
    """Ranges of positions whose sums are added up at the end: at most 8, each of 2^22 products or more, and not so many for ``direct``
    that their sums have more than 2^20 elements. From 256 columns on one, and for ``gram`` one for each 2^15 positions, again if
    their sums are no more elements. For ``direct`` of 512 positions or more."""
    wide = columns(case, algorithm)
    if wide >= 256:
        return max(1, min(8, (1 << 20) // (case.groups * wide**2), positions >> 15)) if algorithm == "gram" else 1
    products = positions * (wide * wide // 2 if algorithm == "gram" else wide * case.weight[0] // case.groups)
    most = 8 if algorithm == "gram" else min(8, (1 << 20) // panels(case), positions // 512)
    return max(1, min(most, products >> 22))


def panels(case: Case) -> int:
    """Elements of ``direct``'s sums: whole panels of 32 columns."""
    return case.weight[0] * -(-columns(case, "direct") // 32) * 32


def strips(case: Case, algorithm: str, positions: int, threads: int) -> int:
    """Of the columns, from 256 on, and always for ``direct`` of fewer than 1024 positions: one for a thread, of 64 columns or more."""
    wide = columns(case, algorithm)
    cut = wide >= 256 or (algorithm == "direct" and positions < 1024)
    return max(1, min(threads, wide // 64)) if cut else 1


def multiplies_bf16() -> bool:
    """Whether instructions of this CPU do that our kernels use: AVX-512's or AMX's."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return "avx512_bf16" in flags or {"amx_tile", "amx_bf16"} <= flags


def has_few_channels(case: Case, x: Tensor, z: Tensor) -> bool:
    """Whether ``direct`` sums over ``z``'s columns: at most 4 channels, 2^14 elements of ``D``, neighbours in rows of 16 or more that
    are read where they lie."""
    small = case.weight[1] <= 4 and math.prod(case.weight) <= 1 << 14
    if torch.float64 in (x.dtype, z.dtype):
        read = z.dtype == torch.float64
    else:
        both = x.dtype == z.dtype == torch.bfloat16
        read = z.dtype in (torch.float32, torch.bfloat16) and not (both and multiplies_bf16())
    layer = case.dims == 2 and case.groups == 1 and not case.pointwise
    return layer and small and read and z.shape[-1] >= 16 and z.stride(-1) == 1


def few_channels_parts(case: Case, z: Tensor) -> int:
    """Of 2^22 products or more, at most 64, cut between 8 rows of an image."""
    rows = -(-z.shape[-2] // 8) * (z.shape[0] if case.batched else 1)
    return max(1, min(64, rows, math.prod(case.weight[1:]) * z.numel() >> 22))


def winograd_plan(case: Case, positions: int, threads: int) -> dict[str, int]:
    """``parts`` of the tiles that are summed apart: a power of two, at most 8, of 4 blocks or more each, and not so many that their
    ``sums`` in as many ``frequencies`` as a tile reads elements, ``C`` up to a multiple of 32, are more than 2^20 elements;
    ``blocks`` of 64 tiles that are in memory at once, of 2^18 elements together if one is not more: a thread's own where the
    threads can share out the parts evenly, or all threads'. ``block``: elements of one, ``x`` and ``z``, channels up to multiples
    of 32 and a line of 32 elements behind each frequency. ``all``: blocks of the layer. Tiles are those of
    the fewest multiplications: of 2 x 2 outputs, from 512 positions on 2 x 4, from 4096 on 4 x 4."""
    out, columns = case.weight[0], [-(-n // 32) * 32 for n in case.weight[:2]]
    images = case.x[0] if case.batched else 1
    above = {"same": 1, "valid": 0}[case.padding] if isinstance(case.padding, str) else case.arguments["padding"]
    height = case.x[-2] - 2 + 2 * (above if isinstance(above, int) else above[0])
    width = positions // images // height
    of_tiles = {(2, 2): 0, (2, 4): 512, (4, 4): 4096}
    tiles = {
        tile: images * -(-height // tile[0]) * -(-width // tile[1]) for tile, least in of_tiles.items() if positions >= least
    }
    tile = min(tiles, key=lambda tile: (tile[0] + 2) * (tile[1] + 2) * tiles[tile])
    frequencies = (tile[0] + 2) * (tile[1] + 2)
    blocks = -(-tiles[tile] // 64)
    sums = frequencies * out * columns[1]
    parts = 1 << max(1, min(8, blocks // 4, (1 << 20) // sums)).bit_length() - 1
    apart = parts % threads == 0
    at_once = max(1, min((1 if apart else threads) * (1 << 18) // (frequencies * 64 * sum(columns)), -(-blocks // parts)))
    block = frequencies * (64 * sum(columns) + 2 * 32)
    return {
        "frequencies": frequencies,
        "parts": parts,
        "sums": sums,
        "blocks": at_once * (threads if apart else 1),
        "block": block,
        "all": blocks,
    }


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
        "strips": strips(case, algorithm, positions, threads),
        "tiles": -(-positions // 128),
        "panels": -(-both // 32),
        "chunks": -(-wide // 512) if algorithm == "direct" else 1,
    }
    yield from (what for what, count in counts.items() if count > 1)
