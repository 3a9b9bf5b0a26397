"""What the compilers made of every CUDA kernel on every architecture, as a table: ``python benchmarks/device_code.py [75 80 ...]``.

Registers and stack are a thread's; ``KiB`` are all instructions, of which a launch fetches those that it comes by; ``spills`` counts
accesses to the stack in the main loops, ``share`` the part of the main loops' instructions that multiply (HMMA: for a whole warp's tile).
Flop/B are a tile's, from global and from shared memory. No GPU is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from device import kernels


def print_table(architectures: list[int]) -> None:
    print(
        f"{'sm':<4}{'kernel':<58}{'KiB':>5}{'registers':>10}{'stack':>6}{'spills':>7}  {'multiplies':<20}{'share':>6}  flop/B global, shared"
    )
    for architecture in architectures:
        for symbol, r in sorted(kernels.resources(architecture).items(), key=lambda item: kernels.short(item[0])):
            name, frame, spills = kernels.short(symbol), *r.spills
            if r.traps:
                print(f"{architecture:<4}{name:<58}  ends the launch: not for this architecture")
                continue
            instructions = len({address for loop in r.loops for address in loop.instructions})
            counts = {product.multiply: r.multiplies(product) for product in r.variant.products}
            share = f"{sum(counts.values()) / instructions:.0%}" if instructions else "-"
            counted = ", ".join(f"{count} {multiply}" for multiply, count in counts.items())
            tiles = [product.tile for product in r.variant.products if product.tile]
            intensity = ", ".join(f"{tile.global_intensity:.0f} {tile.shared_intensity:.1f}" for tile in tiles) or "-"
            print(
                f"{architecture:<4}{name:<58}{len(r.kernel.code) / 1024:>5.0f}{r.kernel.registers:>10}{frame:>6}{spills:>7}  "
                f"{counted:<20}{share:>6}  {intensity}"
            )


if __name__ == "__main__":
    try:
        print_table([int(a) for a in sys.argv[1:]] or list(kernels.ARCHITECTURES))
    except kernels.MissingToolError as error:
        sys.exit(str(error))
