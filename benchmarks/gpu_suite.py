"""All that needs a GPU, in stages, those first that are worth most; run from a source tree, without a network.

python benchmarks/gpu_suite.py --out results --stages build,parity,pytest,graph    # first: is it right?
python benchmarks/gpu_suite.py --out results --resume                              # then what has not passed: kernels, sanitizer, steps, train
python benchmarks/gpu_suite.py --out results --resume --stages kernels -- --networks mobilenet_v2 --layouts nhwc

build      the module with the CUDA kernels; without it nothing else runs
parity     every case, algorithm, dtype and layout against fp64
pytest     tests/gpu, a process for each file, less what parity does
graph      hundreds of updates in a captured CUDA graph give the bits of eager mode
kernels    times of real networks' layers; what follows -- goes to benchmarks/kernels.py, here and in compiled
sanitizer  compute-sanitizer's tools on our kernels
step       whole training steps of SGD, a frozen and a local prefix: autocast, with and without torch.compile and CUDA graphs
train      a small comparison of training methods
compiled   the kernels in bf16 and channels_last again, beside what torch.compile makes of a user's code

--budget bounds the whole call. With --resume goes on: what has passed stays, stages that were stopped go on at the row, file or tool
where they were; a fresh machine only builds again. Without it the results of --out are removed first.

DIRECTORY gets at most seven files: summary.json with every stage's status, seconds, last lines and what its results come to, and where
all that was; log.txt with all output; the rows of parity, graph, kernels, step and compiled.

Exit status: 0 if all stages that were asked for have passed, 1 if one failed, 2 for wrong arguments or no GPU, 3 if the time was up,
4 if one cannot run here.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

from benchmarks import ROOT, gpu, kernels, stages
from benchmarks.records import MUST_AGREE
from localsgd_ext.train import environment
from localsgd_ext.train.files import read_json, write_json

SUMMARY, LOG = "summary.json", "log.txt"
WORST_FIRST = ("failed", "stopped", "unavailable", "passed")
EXIT_STATUS = {"passed": 0, "failed": 1, "stopped": 3, "unavailable": 4}
SAME = tuple(key for key in MUST_AGREE if key not in ("compiled_kernels", "clock"))
"""What results that are told in one summary were made with: the kernels may only be built in this run."""
LEAST = 10.0  # seconds without which no stage is begun
TOLD_LINES = 20

Result = dict[str, Any]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s --out DIRECTORY [options] [-- arguments for benchmarks/kernels.py]",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--stages", default=",".join(stages.STAGES), help=f"of {', '.join(stages.STAGES)}")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for the whole call; default 540")
    parser.add_argument("--resume", action="store_true", help="leave out what has passed, go on with what was stopped")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: stage parity alone, to try it out")
    args = parser.parse_args(own)
    asked = args.stages.split(",")
    if unknown := [stage for stage in asked if stage not in stages.STAGES]:
        parser.error(f"--stages must be of {', '.join(stages.STAGES)}, got {', '.join(unknown)}")
    args.stages = [stage for stage in stages.STAGES if stage in asked]
    if args.device == "cpu" and args.stages != ["parity"]:
        parser.error("--device cpu needs --stages parity")
    args.more = tuple(more)
    if more:
        if not set(args.stages) & set(stages.TIMED):
            parser.error(f"arguments after -- are for the stages {' and '.join(stages.TIMED)}, got --stages {','.join(asked)}")
        kernels.arguments(["--device", "cuda", *more])  # wrong ones end here, not after the build
    return args


class Suite:
    """Runs stages and keeps the summary.

    Raises:
        ValueError: ``--resume`` with results of another machine, commit or PyTorch.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.end: float = time.monotonic() + args.budget
        self.out: Path = args.out.resolve()
        self.resume, self.device, self.more = args.resume, args.device, args.more
        here = environment.describe(args.device)
        self.out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = {}
        if self.resume and (self.out / SUMMARY).exists():
            before = read_json(self.out / SUMMARY)
            for key in SAME:
                if before["environment"].get(key) != here.get(key):
                    raise ValueError(
                        f"{self.out / SUMMARY} is of {key} {before['environment'].get(key)!r}, this is {here.get(key)!r}: "
                        "without --resume it is removed, another --out leaves it alone"
                    )
            self.results = before["stages"]
        elif not self.resume:
            for file in (LOG, *(stages.rows_file(self.out, stage).name for stage in stages.STAGES)):
                (self.out / file).unlink(missing_ok=True)
        self.environment = {key: value for key, value in here.items() if key != "compiled_kernels"}
        self._missing: str | None = None
        self._build_failed = False
        self.save()

    def save(self) -> None:
        """The summary as of now."""
        ordered = {stage: self.results[stage] for stage in stages.STAGES if stage in self.results}
        content = {
            "not_passed": {stage: f"{r['status']}: {r['note']}" for stage, r in ordered.items() if r["status"] != "passed"},
            "never_begun": [stage for stage in stages.STAGES if stage not in ordered],
            "environment": self.environment,
            "stages": ordered,
        }
        write_json(self.out / SUMMARY, content)

    def left(self) -> float:
        return self.end - time.monotonic()

    def missing(self) -> str:
        """Why there is nothing to check on the GPU, or ``""``; asked again after a build."""
        if self._missing is None:
            self._missing = stages.missing_on_gpu()
        return self._missing

    def run(self, stage: str) -> Result:
        """One stage, each of its commands a process of its own."""
        before = self.results.get(stage, {}) if self.resume else {}
        asked = list(self.more) if stage in stages.TIMED else []
        if (
            before.get("status") == "passed"
            and before.get("arguments", []) == asked
            and not (stage == "build" and self.missing())
        ):
            return {**before, "note": "passed before", "seconds": 0.0}
        if not before:
            stages.forget(self.out, stage)  # of a run that this summary does not know
        start = time.monotonic()
        result: Result = {"status": "stopped", "note": "the suite ended before this stage did", "seconds": 0.0}
        result |= {"arguments": asked, "commands": [c for c in before.get("commands", []) if c["status"] == "passed"]}
        if why := self.obstacle(stage):
            result["status"], result["note"] = why
            if before.get("status", "passed") != "passed" and result["status"] == "stopped":  # nothing new about it
                return before
        else:
            self.results[stage] = result
            self.save()
            self.commands(stage, result, before)
        if stage == "build":
            self._missing = None
            if result["status"] == "passed" and (missing := self.missing()):
                result |= {"status": "failed", "note": missing}
            self._build_failed = result["status"] != "passed"
        result["details"] = stages.details(stage, self.out)
        result["seconds"] = round(time.monotonic() - start, 1)
        self.results[stage] = result
        self.save()
        return result

    def obstacle(self, stage: str) -> tuple[str, str] | None:
        """Status and note of a stage that cannot begin."""
        if self._build_failed:
            return "stopped", "not begun: the build did not pass"
        if self.left() < LEAST:
            return "stopped", "not begun: the time is up"
        if stage != "build" and self.device == "cuda" and (missing := self.missing()):
            return "failed", f"{missing} (stage build makes them)"
        return None

    def commands(self, stage: str, result: Result, before: Result) -> None:
        """Run the stage's commands, but for those that have passed ``before``, and fill in ``result``."""
        try:
            plan = stages.STAGES[stage](stages.Request(self.out, self.left(), self.device, self.more))
        except stages.Unavailable as why:
            result |= {"status": "unavailable", "note": str(why)}
            return
        if len(plan) == 1:
            result["commands"] = []
        done = {c["name"]: c for c in result["commands"]}
        for command in plan:
            if command.name in done:
                continue
            done[command.name] = self.command(command)
            result["commands"] = [done[c.name] for c in plan if c.name in done]
            self.save()
        result["commands"] = [done[c.name] for c in plan]
        result["status"] = min((c["status"] for c in result["commands"]), key=WORST_FIRST.index)
        result["note"] = "; ".join(
            f"{c['name']} {c['status']}: {c['note']}" for c in result["commands"] if c["status"] != "passed"
        )

    def command(self, command: stages.Command) -> Result:
        log = self.out / LOG
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command.argv)}\n".encode())
            file.flush()
            begin = file.tell()
            rc, seconds = call(command, file, self.left())
        output = output_since(begin, log)
        status = command.status(rc, output)
        lines = [line for line in output.splitlines() if line.strip()]
        note = "the time was up" if rc is None else command.refusal(output) if status == "unavailable" else f"exit status {rc}"
        return {
            "name": command.name, "status": status, "note": note, "rc": rc, "seconds": round(seconds, 1), "argv": command.argv,
            "environment": command.environment, "end": lines[-(1 if status == "passed" else TOLD_LINES) :],
        }  # fmt: skip


def call(command: stages.Command, log: Any, seconds: float) -> tuple[int | None, float]:
    """The exit status, None if the time was up; and the time it took. Its children end with it."""
    start = time.monotonic()
    if seconds <= 0:
        return None, 0.0
    process = subprocess.Popen(
        command.argv, cwd=ROOT, env={**os.environ, **command.environment}, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True
    )  # fmt: skip
    try:
        return process.wait(seconds), time.monotonic() - start
    except subprocess.TimeoutExpired:
        return None, time.monotonic() - start
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output_since(begin: int, log: Path) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(list(sys.argv[1:] if argv is None else argv))
    if args.device == "cuda" and (why := gpu.no_gpu()):
        print(f"gpu_suite: {why}", file=sys.stderr)
        return 2
    try:
        suite = Suite(args)
    except ValueError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    results = {}
    for stage in args.stages:
        result = results[stage] = suite.run(stage)
        print(f"{stage:10} {result['status']:12} {result['seconds']:6.0f} s  {result['note']}", flush=True)
    worst = min((result["status"] for result in results.values()), key=WORST_FIRST.index)
    if worst != "passed":
        print("not passed: " + ", ".join(f"{stage} ({r['status']})" for stage, r in results.items() if r["status"] != "passed"))
    return EXIT_STATUS[worst]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it has started ends with it
    sys.exit(main())
