"""Plants faults in the device code and runs the emulated tests: ``python tests/native/mutations.py``.

Every barrier and every wait is taken out, every ``<``, ``<=``, ``>``, ``>=`` that is not a loop's own is made to say nothing, and
every ``min(a, b)`` is made to be ``a`` and to be ``b``, one at a time. A test must fail for each, or the fault is listed in
``equivalent_mutants.toml`` with the reason why it is none; otherwise the exit status is 1. All faults are compiled into one set of
test programs and chosen when those start, so that a fault costs a test run and not a compilation. Results are kept in
``build/mutants/results.json``: an interrupted run goes on where it was. A result counts for as long as the kernels and the sources
of the tests that it rests on are the same.

Left alone are the comparisons of ``for`` and ``while`` loops, and ``==``; and memory fences: a CPU's memory is coherent, no test on
it could miss one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
BUILD = ROOT / "build" / "mutants"
HERE = Path(__file__).parent
EQUIVALENTS = HERE / "equivalent_mutants.toml"

STATEMENTS = re.compile(r"(?:__syncthreads|__syncwarp|grid_barrier|cp_async_commit|cp_async_wait<[^;{}]*?>)\([^;{}]*?\);")
SPIN = re.compile(r"while \((?=.*load_acquire)")
COMPARISON = re.compile(r" (<=|>=|<|>) ")
MINIMUM = re.compile(r"(?<![\w:.])min\(")  # not the host's std::min

# Included before anything else; with LOCALSGD_MUTANT=-1 the program also says which faults it would have met.
SWITCH = """
#pragma once
#include <cstdio>
#include <cstdlib>
namespace mutation {
inline const char* const kText = std::getenv("LOCALSGD_MUTANT");
inline const int kChosen = kText ? std::atoi(kText) : -2;
struct Met {
    char at[4096] = {};
    ~Met() {
        if (kChosen != -1) return;
        for (int i = 0; i < 4096; ++i)
            if (at[i]) std::printf("met %d\\n", i);
    }
};
inline Met met;
inline bool planted(int id) {
    if (kChosen == -1 && !met.at[id]) met.at[id] = 1;
    return kChosen == id;
}
} // namespace mutation
"""


@dataclass(frozen=True)
class Mutant:
    """``text[begin:end]`` of a file is replaced."""

    file: str
    begin: int
    end: int
    replacement: str  # {id} and {text} are filled in
    name: str  # function, kind and text; with a number where there are several

    @property
    def key(self) -> str:
        return f"{self.file}, {self.name}"


# ---- finding places ----------------------------------------------------------------------------------------------------


def masked(text: str) -> str:
    """The text with everything blanked that is not device code as the emulation compiles it: comments, strings, directives, the
    emulation's and the host's own parts."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"//[^\n]*|\"(?:\\.|[^\"\n])*\"|(?m:^#define (?:[^\n]*\\\n)*[^\n]*)", blank, text)
    lines, hidden = [], 0  # depth of conditionals inside a hidden one
    for line in text.split("\n"):
        directive = re.match(r"\s*#\s*(if|endif)?", line)
        if directive and directive[1] == "if" and (hidden or re.search(r"LOCALSGD_EMULATION|__CUDACC_RTC__", line)):
            hidden += 1
        lines.append(" " * len(line) if hidden or directive else line)
        if directive and directive[1] == "endif" and hidden:
            hidden -= 1
    return "\n".join(lines)


def operand(code: str, at: int, step: int) -> int:
    """Where the operand that begins (``step`` 1) or ends (-1) at ``at`` ends or begins."""
    opening, closing = ("([{", ")]}") if step > 0 else (")]}", "([{")
    depth = 0
    while 0 <= at < len(code):
        c, pair = code[at], code[at : at + 2] if step > 0 else code[at - 1 : at + 1]
        if c in opening:
            depth += 1
        elif c in closing:
            if depth == 0:
                break
            depth -= 1
        elif depth == 0:
            spaced = code[at - 1].isspace() and code[at + 1].isspace()
            if c in ",;?!" or pair in ("&&", "||") or (c in ":=&" and spaced):
                break
            if step < 0 and code[: at + 1].endswith("return"):
                break
        at += step
    return at if step > 0 else at + 1


def enclosing(code: str, at: int) -> str:
    """The words before the innermost parenthesis that is open at ``at``: ``for``, ``if constexpr``, a function's name."""
    depth = 0
    while at > 0:
        at -= 1
        if code[at] in ")]}":
            depth += 1
        elif code[at] in "([{":
            if depth == 0:
                return " ".join(re.findall(r"\w+", code[max(0, at - 24) : at].rpartition(";")[2])[-2:])
            depth -= 1
    return ""


def statement(code: str, at: int) -> str:
    begin = max(code.rfind(c, 0, at) for c in ";{}")
    return code[begin + 1 : at]


def function(code: str, at: int) -> str:
    heads = re.findall(
        r"(?:LOCALSGD_DEVICE|__global__) ([^;{}]*?)\{", re.sub(r"__launch_bounds__\([^{};]*?\)\s+(?=\w)", "", code[:at])
    )
    names = [name for head in heads for name in re.findall(r"(\w+)\(", head)[:1]]
    return names[-1] if names else "?"


def leaves(code: str, at: int) -> bool:
    """Whether the condition around ``at`` decides about leaving: ``if (...) return``."""
    if not re.search(r"\bif \(", statement(code, at)):
        return False
    depth = 0
    while depth >= 0 and at < len(code):
        depth += {"(": 1, ")": -1}.get(code[at], 0)
        at += 1
        if depth == -1 and code[at : at + 1] == ")":
            depth = 0
    return re.match(r"\s*(return|continue|break)\b", code[at:]) is not None


def find(path: Path) -> list[Mutant]:
    text = path.read_text()
    code = masked(text)
    found: list[tuple[int, int, str, str]] = []
    for match in STATEMENTS.finditer(code):
        before = code[: match.start()].rstrip()
        if before[-1:] in ";{})" or before.endswith("else"):
            found.append((*match.span(), "{{ if (!mutation::planted({id})) {text} }}", "without"))
    for match in SPIN.finditer(code):
        begin, end = match.end(), operand(code, match.end(), 1)
        found.append((begin, end, "!mutation::planted({id}) && ({text})", "without waiting while"))
    for match in COMPARISON.finditer(code):
        head, around = statement(code, match.start()), enclosing(code, match.start())
        if re.search(r"\b(constexpr|static_assert|template|using)\b", head) or around.split()[-1:] in (["for"], ["while"]):
            continue
        begin, end = operand(code, match.start(), -1), operand(code, match.end(), 1)
        begin += len(code[begin:end]) - len(code[begin:end].lstrip())
        end -= len(code[begin:end]) - len(code[begin:end].rstrip())
        if leaves(code, match.end()):
            found.append((begin, end, "(!mutation::planted({id}) && {text})", "never"))
        else:
            found.append((begin, end, "(mutation::planted({id}) || {text})", "always"))
    for match in MINIMUM.finditer(code):
        middle = operand(code, match.end(), 1)
        first, second = (match.end(), middle), (middle + 2, operand(code, middle + 2, 1))
        assert code[middle : middle + 2] == ", ", f"{path.name}: min of two was expected, got {statement(code, match.end())}"
        for (begin, end), other in ((first, second), (second, first)):
            kept = text[slice(*other)]
            escaped = kept.replace("{", "{{").replace("}", "}}")
            found.append((begin, end, f"(mutation::planted({{id}}) ? {escaped} : {{text}})", f"min() is {kept}, not"))
    mutants, seen = [], {}
    for begin, end, replacement, kind in sorted(found):
        name = f"{function(code, begin)}: {kind} {' '.join(text[begin:end].split())}"
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name += f" #{seen[name]}"
        mutants.append(Mutant(path.name, begin, end, replacement, name))
    return mutants


def all_mutants() -> list[Mutant]:
    return [mutant for path in sorted(KERNELS.glob("*.cu*")) for mutant in find(path)]


# ---- running -----------------------------------------------------------------------------------------------------------


def planted(mutant: Mutant, number: int, text: str) -> str:
    """What stands in the mutant's place of ``text``."""
    return mutant.replacement.format(id=number, text=text[mutant.begin : mutant.end])


def plant(mutants: list[Mutant], build: Path) -> None:
    """A copy of the sources with all faults in it, each waiting to be chosen."""
    for part in ("csrc", "tests"):
        shutil.rmtree(build / part, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", build / "csrc")
    shutil.copytree(ROOT / "tests" / "native", build / "tests" / "native", ignore=shutil.ignore_patterns("__pycache__"))
    (build / "mutation.h").write_text(SWITCH)
    for path in sorted((build / "csrc" / "kernels").glob("*.cu*")):
        text = path.read_text()
        for number, mutant in reversed(list(enumerate(mutants))):
            if mutant.file == path.name:
                text = text[: mutant.begin] + planted(mutant, number, text) + text[mutant.end :]
        path.write_text(text)
    for name, old, new in (
        ("check.h", "what.c_str());\n", "what.c_str());\n    std::fflush(nullptr), std::_Exit(1);\n"),  # the first is enough
        ("emulation/machine.h", "hang_seconds = 120", "hang_seconds = 20"),
    ):
        path = build / "tests" / "native" / name
        text = path.read_text()
        assert old in text, name
        path.write_text(text.replace(old, new))


def compile_test(build: Path, name: str) -> Path:
    program = build / name
    options = ["-O1", "-std=c++20", "-w", "-fno-ipa-modref", "-DLOCALSGD_EMULATION", "-pthread"]
    options += [f"-I{build / 'csrc'}", f"-I{build / 'tests' / 'native'}", "-include", str(build / "mutation.h")]
    source = build / "tests" / "native" / f"{name}.cpp"
    done = subprocess.run(["c++", *options, str(source), "-o", str(program)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} with all faults in it does not compile:\n{done.stderr[:3000]}")
    return program


@dataclass
class Test:
    program: Path
    seconds: float = 0
    met: frozenset[int] = frozenset()

    def run(self, mutant: int) -> tuple[bool, str]:
        """Whether it passes, and what it prints."""
        environ = {**os.environ, "LOCALSGD_MUTANT": str(mutant)}
        timeout = None if mutant < 0 else 60 + 5 * self.seconds
        try:
            done = subprocess.run([self.program], env=environ, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return False, "runs for ever"
        return done.returncode == 0, done.stdout if mutant < 0 else (done.stderr.strip().splitlines() or ["crashes"])[0]


def build_tests(mutants: list[Mutant], names: list[str], build: Path, jobs: int) -> list[Test]:
    """The test programs, fastest first, and which faults they meet."""
    plant(mutants, build)
    key = f"{fingerprint(build / 'csrc')} {fingerprint(build / 'tests')} {' '.join(names)}"
    stored = build / "tests.json"
    if stored.exists() and (earlier := json.loads(stored.read_text()))["key"] == key:
        return [Test(build / name, seconds, frozenset(met)) for name, seconds, met in earlier["tests"]]
    with ThreadPoolExecutor(jobs) as pool:
        tests = [Test(program) for program in pool.map(lambda name: compile_test(build, name), names)]

    def baseline(test: Test) -> None:
        start = time.monotonic()
        passed, output = test.run(-1)
        assert passed, f"{test.program.name} fails with no fault chosen: {output}"
        test.seconds = time.monotonic() - start
        test.met = frozenset(int(number) for number in re.findall(r"^met (\d+)$", output, re.MULTILINE))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(baseline, tests))
    tests.sort(key=lambda test: test.seconds)
    stored.write_text(json.dumps({"key": key, "tests": [(t.program.name, t.seconds, sorted(t.met)) for t in tests]}))
    return tests


def try_mutant(number: int, tests: list[Test]) -> str:
    """What kills it, or how it survives."""
    met = [test for test in tests if number in test.met]
    for test in met:
        passed, message = test.run(number)
        if not passed:
            return f"killed by {test.program.name}: {message[:160]}"
    return f"survives {', '.join(test.program.name for test in met)}" if met else "met by no test"


def equivalents() -> dict[str, str]:
    return {entry["mutant"]: entry["reason"] for entry in tomllib.loads(EQUIVALENTS.read_text())["equivalent"]}


def test_names() -> list[str]:
    """Those that include device code of csrc/."""
    return sorted(path.stem for path in Path(__file__).parent.glob("test_cuda_*.cpp"))


SOURCES = (".cu", ".cuh", ".h", ".cpp")


def digest(paths: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def fingerprint(directory: Path) -> str:
    return digest(sorted(path for path in directory.rglob("*") if path.suffix in SOURCES))


def prints_of(names: list[str], directory: Path = HERE) -> dict[str, str]:
    """``{test: fingerprint}`` of its own source, of the test that it may include, and of what all tests share."""
    sources = sorted(path for path in directory.rglob("*") if path.suffix in SOURCES)
    shared = [path for path in sources if not path.name.startswith("test_")]
    included = re.compile(r'^#include "(test_\w+\.cpp)"', re.MULTILINE)

    def own(file: str) -> list[Path]:
        path = directory / file
        return [path, *(part for name in included.findall(path.read_text()) for part in own(name))]

    return {name: digest([*shared, *own(f"{name}.cpp")]) for name in names}


def rests_on(result: str, prints: dict[str, str]) -> dict[str, str]:
    """The tests by which a result stands or falls, of those in ``prints``: the one that killed, or all that did not."""
    killer = re.match(r"killed by (\w+)", result)
    return {killer[1]: prints[killer[1]]} if killer else prints


def still_true(earlier: dict[str, Any], kernels: str, prints: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What is left of a results file: a killer that was changed may be weaker now, and a test that was added or changed may kill
    what survived."""
    if earlier["kernels"] != kernels:
        return {}
    return {
        key: entry
        for key, entry in earlier.get("faults", {}).items()
        if entry["tests"].keys() <= prints.keys() and entry["tests"] == rests_on(entry["result"], prints)
    }


def run(names: list[str], jobs: int = 2, fresh: bool = False, pattern: str = "") -> dict[str, str]:
    """``{mutant: what became of it}`` for those whose key matches; those of an interrupted run are not tried again."""
    mutants = all_mutants()
    stored = BUILD / "results.json"
    kernels, prints = fingerprint(KERNELS), prints_of(names)
    known = still_true(json.loads(stored.read_text()), kernels, prints) if stored.exists() and not fresh else {}
    tests = build_tests(mutants, names, BUILD, jobs)

    def one(number: int) -> None:
        result = try_mutant(number, tests)
        known[mutants[number].key] = {"result": result, "tests": rests_on(result, prints)}
        print(f"{mutants[number].key}\n    {result}", flush=True)
        stored.write_text(json.dumps({"kernels": kernels, "faults": dict(known)}, indent=1))

    wanted = [number for number, mutant in enumerate(mutants) if re.search(pattern, mutant.key)]

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [number for number in wanted if mutants[number].key not in known]))
    return {mutants[number].key: known[mutants[number].key]["result"] for number in wanted}


def run_sample(names: list[str], count: int, seed: int, build: Path, jobs: int = 2) -> dict[str, str]:
    """The same for some of those in the files that the tests are named after, if not listed as equivalent."""
    mutants, listed = all_mutants(), equivalents()
    tests = build_tests(mutants, names, build, jobs)
    own = {f"{name.removeprefix('test_cuda_')}.cuh" for name in names}
    eligible = [number for number, mutant in enumerate(mutants) if mutant.file in own and mutant.key not in listed]
    chosen = random.Random(seed).sample(eligible, count)
    with ThreadPoolExecutor(jobs) as pool:
        return {
            mutants[n].key: result for n, result in zip(chosen, pool.map(lambda n: try_mutant(n, tests), chosen), strict=True)
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="test programs at once (%(default)s)")
    parser.add_argument("--tests", default=",".join(test_names()), help="which test programs, separated by commas")
    parser.add_argument("--faults", default="", metavar="REGEX", help="only those whose line in --list matches")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--list", action="store_true", help="print the faults and leave")
    options = parser.parse_args()
    if options.list:
        print("\n".join(mutant.key for mutant in all_mutants() if re.search(options.faults, mutant.key)))
        return 0
    listed = {key: reason for key, reason in equivalents().items() if re.search(options.faults, key)}
    results = run(options.tests.split(","), options.jobs, options.fresh, options.faults)
    killed = {key for key, result in results.items() if result.startswith("killed")}
    survivors = results.keys() - killed - listed.keys()
    for key in sorted(survivors):
        print(f"SURVIVES: {key}\n    {results[key]}")
    wrong = {f"listed as equivalent, but killed: {key}" for key in listed.keys() & killed}
    wrong |= {f"listed as equivalent, but not in the sources: {key}" for key in listed.keys() - results.keys()}
    for line in sorted(wrong):
        print(line)
    print(f"{len(results)} faults: {len(killed)} killed, {len(survivors)} survive, {len(listed)} equivalent")
    return 1 if survivors or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
