"""All that needs a GPU, in stages that can be run alone, stopped and resumed; each leaves OUT/STAGE.json and OUT/STAGE.log.

python benchmarks/gpu_suite.py --out results                                  # every stage
python benchmarks/gpu_suite.py --out results --stages build,parity --budget 300
python benchmarks/gpu_suite.py --out results --resume                         # what has not passed yet

Runs from a source tree, without a network. Exit status: 0 if all passed or were unavailable for a reason given, 1 if one did
not, 2 for wrong arguments or no GPU.
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

from benchmarks import ROOT, stages
from localsgd_ext.train.files import read_json, write_json

GOOD = ("passed", "unavailable")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--stages", default=",".join(stages.STAGES), help=f"of {', '.join(stages.STAGES)}")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="for each stage; default 600")
    parser.add_argument("--resume", action="store_true", help="leave out what has passed, go on with what was stopped")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: stage parity alone, to try it out")
    parser.add_argument("--kernels", default="", metavar="ARGUMENTS", help="more of them for benchmarks/kernels.py")
    args = parser.parse_args(argv)
    wanted = args.stages.split(",")
    if unknown := [stage for stage in wanted if stage not in stages.STAGES]:
        parser.error(f"--stages must be of {', '.join(stages.STAGES)}, got {', '.join(unknown)}")
    if args.device == "cpu" and wanted != ["parity"]:
        parser.error("--device cpu needs --stages parity")
    if args.device == "cuda" and (why := stages.no_gpu()):
        print(f"gpu_suite: {why}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    results = {}
    for stage in wanted:
        results[stage] = run(stage, args)
        print(
            f"{stage:10} {results[stage]['status']:12} {results[stage]['seconds']:6.0f} s  {results[stage]['note']}", flush=True
        )
    return int(any(result["status"] not in GOOD for result in results.values()))


def run(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """One stage, each of its commands a process of its own; the results also go to OUT/STAGE.json."""
    path = args.out / f"{stage}.json"
    if args.resume and path.exists() and (before := read_json(path))["status"] in GOOD:
        return {**before, "note": f"{before['note']} (from before)"}
    start = time.monotonic()
    result: dict[str, Any] = {"stage": stage, "status": "passed", "note": "", "seconds": 0.0, "commands": []}
    try:
        plan = stages.STAGES[stage](args)
    except stages.Unavailable as why:
        result.update(status="unavailable", note=str(why))
        write_json(path, result)
        return result
    with (args.out / f"{stage}.log").open("ab" if args.resume else "wb") as log:
        for command in plan:
            left = args.budget - (time.monotonic() - start)
            begin = log.tell()
            rc, seconds = call(command, log, left)
            status = command.status(rc, output_since(begin, args.out / f"{stage}.log"))
            result["commands"].append(
                {"name": command.name, "argv": command.argv, "environment": command.environment, "rc": rc, "status": status,
                 "seconds": round(seconds, 3)}
            )  # fmt: skip
    bad = [c for c in result["commands"] if c["status"] not in GOOD]
    if bad:
        result["status"] = bad[0]["status"]
    elif result["commands"] and all(c["status"] == "unavailable" for c in result["commands"]):
        result["status"] = "unavailable"
    not_passed = [c for c in result["commands"] if c["status"] != "passed"]
    result["note"] = ", ".join(f"{c['name']}: {c['status']}, rc {c['rc']}" for c in not_passed)
    result["tail"] = last_lines(args.out / f"{stage}.log")
    result["details"] = stages.details(stage, args)
    result["seconds"] = round(time.monotonic() - start, 3)
    write_json(path, result)
    return result


def call(command: stages.Command, log: Any, seconds: float) -> tuple[int | None, float]:
    """The exit status, None if the time was up; and the time it took. Its children end with it."""
    start = time.monotonic()
    if seconds <= 0:
        return None, 0.0
    log.write(f"$ {' '.join(command.argv)}\n".encode())
    log.flush()
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


def last_lines(log: Path, count: int = 20) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-count:]


if __name__ == "__main__":
    sys.exit(main())
