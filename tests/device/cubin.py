"""Reads a cubin: an ELF file with a section of machine code and one of attributes for each kernel.

NVIDIA's disassembler no longer reads sm_61 and sm_70, so the few instructions that matter here are recognised by their encoding;
a test compares that with the disassembler where both read an architecture.
"""

from __future__ import annotations

import itertools
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

# sm_61: the upper bits of a 64-bit word, (mask, bits); every fourth word schedules the three that follow it.
_WORDS = (
    (0xFF80, 0x5980, "FFMA"), (0xFF80, 0x5180, "FFMA"), (0xFF80, 0x4980, "FFMA"), (0xFE80, 0x3280, "FFMA"),
    (0xFFF0, 0x5B70, "DFMA"), (0xFFF0, 0x5370, "DFMA"), (0xFFF0, 0x4B70, "DFMA"), (0xFEF0, 0x3670, "DFMA"),
    (0xFFF8, 0xEF40, "LDL"), (0xFFF8, 0xEF50, "STL"), (0xFFF0, 0xE240, "BRA"), (0xFFF0, 0xE290, "SSY"), (0xFFF8, 0xF0F8, "SYNC"),
    (0xFFF0, 0xE300, "EXIT"), (0xFFF0, 0xE320, "RET"), (0xFFF8, 0x50B0, "NOP"), (0xFFF0, 0xE3A0, "BPT"),
)  # fmt: skip
# sm_70 and newer: the low 12 bits of a 128-bit instruction, of which 3 tell where its operands are.
_PAIRS = {
    0x223: "FFMA", 0x423: "FFMA", 0x623: "FFMA", 0x823: "FFMA", 0xA23: "FFMA", 0xC23: "FFMA", 0x22B: "DFMA", 0x42B: "DFMA",
    0x62B: "DFMA", 0x82B: "DFMA", 0xA2B: "DFMA", 0xC2B: "DFMA", 0x236: "HMMA", 0x237: "HMMA", 0x23C: "HMMA",
    0x983: "LDL", 0x387: "STL", 0x947: "BRA", 0x94D: "EXIT", 0x950: "RET", 0x918: "NOP", 0x95C: "BPT",
}  # fmt: skip
SPILLS = ("STL", "LDL")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # empty: none of those that are recognised
    predicated: bool
    target: int | None = None  # of a BRA or SSY


@dataclass(frozen=True)
class Loop:
    """A natural loop: ``instructions`` are the addresses of all that it runs, inner loops included."""

    header: int
    instructions: frozenset[int]


@dataclass
class Kernel:
    symbol: str
    architecture: int  # 75 for sm_75
    code: bytes = field(repr=False)
    registers: int = 0
    frame: int = 0  # bytes of stack for each thread

    @cached_property
    def name(self) -> str:
        return demangled(self.symbol)

    @cached_property
    def instructions(self) -> list[Instruction]:
        return list(_decode_words(self.code) if self.architecture < 70 else _decode_pairs(self.code, self.architecture))

    def count(self, *names: str) -> int:
        return sum(i.name in names for i in self.instructions)

    @cached_property
    def body(self) -> list[Instruction]:
        """Without what follows the last instruction: jumps to themselves and padding."""
        end = [i for i in self.instructions if not (i.name == "NOP" or (i.name == "BRA" and i.target == i.address))]
        return [i for i in self.instructions if i.name != "NOP" and end and i.address <= end[-1].address]

    @cached_property
    def only_traps(self) -> bool:
        """Whether all that it does is to end the launch with an error."""
        return self.count("BPT") > 0 and len(self.body) <= 8

    @cached_property
    def loops(self) -> list[Loop]:
        return _natural_loops(self.instructions)

    def main_loops(self, multiply: str, least: int) -> list[Loop]:
        """The innermost loops with at least so many instructions ``multiply``."""
        hot = {i.address for i in self.instructions if i.name == multiply}
        loops = [loop for loop in self.loops if len(loop.instructions & hot) >= least]
        return [a for a in loops if not any(b.instructions < a.instructions for b in loops)]

    def count_in(self, loops: list[Loop], *names: str) -> int:
        within = {address for loop in loops for address in loop.instructions}
        return sum(i.name in names for i in self.instructions if i.address in within)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _decode_words(code: bytes) -> Iterator[Instruction]:
    for address in range(0, len(code), 8):
        if address % 32 == 0:
            continue
        (word,) = struct.unpack_from("<Q", code, address)
        name = next((name for mask, bits, name in _WORDS if word >> 48 & mask == bits), "")
        target = address + 8 + _signed(word >> 20 & 0xFFFFFF, 24) if name in ("BRA", "SSY") else None
        yield Instruction(address, name, word >> 16 & 15 != 7, target)


def _decode_pairs(code: bytes, architecture: int) -> Iterator[Instruction]:
    for address in range(0, len(code), 16):
        low, high = struct.unpack_from("<QQ", code, address)
        name, target = _PAIRS.get(low & 0xFFF, ""), None
        if name == "BRA":
            distance = _signed((high << 64 | low) >> 34 & ((1 << 48) - 1), 48)
            target = address + 16 + 4 * (distance if architecture < 90 else distance << 8 | low >> 16 & 0xFF)
        yield Instruction(address, name, low >> 12 & 15 != 7, target)


def _natural_loops(instructions: list[Instruction]) -> list[Loop]:
    following = {a.address: b.address for a, b in itertools.pairwise(instructions)}
    known = {i.address for i in instructions}
    aligned = {}  # a branch may aim at the word that schedules its target
    for i in instructions:
        if i.target is not None:
            aligned[i.target] = i.target if i.target in known else i.target + 8
    into: dict[int, list[int]] = {i.address: [] for i in instructions}
    back: dict[int, list[int]] = {}
    meets = [(i.address, aligned[i.target]) for i in instructions if i.name == "SSY" and i.target is not None]
    for i in instructions:
        targets = []
        if i.name == "BRA" and i.target is not None:
            targets.append(aligned[i.target])
        elif i.name == "SYNC":  # sm_61: on to where the innermost SSY lets a warp's threads meet
            targets += [target for at, target in meets if at < i.address < target][-1:]
        ends = i.name in ("BRA", "SYNC", "EXIT", "RET")
        if (i.predicated or not ends) and i.address in following:
            targets.append(following[i.address])
        for target in targets:
            if target in into:
                into[target].append(i.address)
                if target <= i.address:
                    back.setdefault(target, []).append(i.address)
    entry = instructions[0].address if instructions else 0
    loops = []
    for header, sources in back.items():
        body, todo = {header}, list(sources)
        while todo:
            at = todo.pop()
            if at not in body:
                body.add(at)
                todo += into[at]
        if entry not in body or header == entry:  # else the header can be passed by: part of another loop
            loops.append(Loop(header, frozenset(body)))
    return loops


@cache
def demangled(symbol: str) -> str:
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    return name.removeprefix("void ").rpartition("(")[0]


# Attributes that are told for each kernel, EIATTR_...
_FRAME_SIZE, _REGCOUNT = 0x11, 0x2F


def read_kernels(cubin: bytes, architecture: int) -> dict[str, Kernel]:
    """``{symbol: kernel}``."""
    if cubin[:4] != b"\x7fELF":
        raise ValueError(f"not a cubin: it begins with {cubin[:4]!r}")
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    strings = _contents(cubin, headers[names_at])
    sections = {_string(strings, header[0]): header for header in headers}
    kernels = {}
    for name, header in sections.items():
        if name.startswith(".text."):
            symbol = name.removeprefix(".text.")
            if f".nv.info.{symbol}" in sections:  # device functions that were not inlined have none
                kernels[symbol] = Kernel(symbol, architecture, _contents(cubin, header))
    symbols, symbol_names = _contents(cubin, sections[".symtab"]), _contents(cubin, sections[".strtab"])
    for kind, index, value in _attributes(_contents(cubin, sections[".nv.info"])):
        kernel = kernels.get(_string(symbol_names, struct.unpack_from("<I", symbols, index * 24)[0]))
        if kernel is not None and kind == _FRAME_SIZE:
            kernel.frame = value
        if kernel is not None and kind == _REGCOUNT:
            kernel.registers = value
    return kernels


def _contents(cubin: bytes, header: tuple[int, ...]) -> bytes:
    return cubin[header[4] : header[4] + header[5]]


def _string(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def _attributes(info: bytes) -> Iterator[tuple[int, int, int]]:
    """(attribute, symbol, value) of those that hold two words."""
    at = 0
    while at + 4 <= len(info):
        form, kind, length = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # the others hold their value in place of the length
            if length == 8:
                yield (kind, *struct.unpack_from("<II", info, at))
            at += length
