"""Ways to train a prefix for less than SGD's cost, side by side: what was tried before the default was chosen.

python benchmarks/tradeoff.py --model small_resnet --out results.json      # again with --resume if it was stopped
python benchmarks/tradeoff.py --table results.json [MORE.json ...]

All ways share first weights, pictures and SGD's learning rate (a cosine over the run). What survived is in the library
(`refresh`), and benchmarks/paper.py measures it over more seeds; benchmarks/TRADEOFF.md says what was found.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import random
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments import student
from benchmarks.experiments.pareto import interpolated
from benchmarks.records import Records, exit_status
from benchmarks.tables import aligned
from benchmarks.tradeoff_drawn import backpropagate
from benchmarks.tradeoff_gates import Drift, LossGate
from benchmarks.tradeoff_local import LocalPrefix
from benchmarks.tradeoff_replayed import Outputs
from benchmarks.tradeoff_ways import WAYS, Way
from localsgd_ext import trace_layers
from localsgd_ext.freezing import PrefixFreeze
from localsgd_ext.train import config, data, environment, models
from localsgd_ext.train.files import read_json
from localsgd_ext.train.measure import multiply_adds

AVERAGE = 0.98  # of weights, from one step to the next: a horizon of 50


class Run:
    """A network on its way."""

    def __init__(self, way: Way, seed: int, epochs: int, lr: float, pictures: data.Data, model: str) -> None:
        self.way, self.lr, self.data = way, lr, pictures
        self.epochs = max(1, round(way.epochs * epochs))
        self.model = cast(nn.Sequential, models.build(model, pictures.num_classes, seed)).to(memory_format=torch.channels_last)
        self.plan = trace_layers(self.model, next(iter(pictures.train(0)))[0][:2])
        self.parameters = dict(self.model.named_parameters())
        entered: dict[str, int] = {}  # parameter -> the least boundary that has it in the prefix
        for boundary in range(1, len(self.plan)):
            for name in self.plan.prefix(self.plan.parameters, boundary):
                entered.setdefault(name, boundary)
        self.groups = [
            {"params": [p for n, p in self.parameters.items() if entered.get(n) == boundary], "boundary": boundary}
            for boundary in [*range(1, len(self.plan)), None]
        ]
        self.optimizer = torch.optim.SGD(self.groups, lr=lr, momentum=0.9, weight_decay=5e-4)
        self.freeze = PrefixFreeze(self.model, self.plan, optimizers=[self.optimizer], keep_state=True)
        self._random = random.Random(seed)
        self._costs: dict[tuple[int, int, int], float] = {}
        self._outputs = Outputs(self.model)
        self._drawn_costs: dict[int, float] = {}
        self._held: dict[Tensor, Tensor] = {}
        self._average: dict[Tensor, Tensor] = {}
        self._gate = LossGate(way.every) if way.by_loss else None
        self._due = 0.0  # mini-batches for the prefix to learn from
        self._still = 0
        self._loss = 0.0  # of the last step
        self._local = LocalPrefix(self.model, self.plan.layers, way.rule, way.rule_lr, way.supervision) if way.rule else None

    def boundary(self, epoch: int) -> int:
        if self.way.growth == "drift":
            return min(self._still, math.floor(self.way.l_max * len(self.plan)), len(self.plan) - 1)
        return self.way.boundary(epoch, self.epochs, len(self.plan))

    def prefix(self, boundary: int) -> list[Tensor]:
        groups = [group for group in self.optimizer.param_groups if group["boundary"] is not None]
        return [p for group in groups if group["boundary"] <= boundary for p in group["params"]]

    def train(self) -> dict[str, Any]:
        total, step, before = 0.0, 0, 0
        drift = None
        if self.way.growth == "drift":
            probe = next(iter(self.data.train(0)))[0]
            drift = Drift(self.model, self.plan.layers, probe, self.way.drift)
        for epoch in range(self.epochs):
            self.model.train()
            boundary = self.boundary(epoch)
            losses = 0.0
            if self._local:
                self._local.begin_epoch(self.plan.layers[:boundary])
            if self.way.averaged and boundary > before:
                self._enter_averaged(before, boundary)
            before = boundary
            inside = self._whole_modules(boundary)[0] if self.way.replays else 0
            begin = self._outputs.begin_epoch(inside, self.way.replays)
            batches = self._outputs.keep(self.data.train(epoch)) if begin == 0 else self._outputs.batches(self._random)
            for x, y in batches:
                self._set_lr(step / self.data.steps)
                total += self._step(x, y, step, boundary, begin)
                losses += self._loss
                step += 1
            if self._local:
                self._local.end_epoch(losses / self.data.steps)
            if drift:
                self._still = drift.end_epoch()
                total += self._forward_cost(probe)
        return {"accuracy": self._accuracy(), "multiply_adds": total}

    def _step(self, x: Tensor, y: Tensor, step: int, boundary: int, begin: int = 0) -> float:
        """Returns its multiply-adds. ``x``: what module ``begin`` takes."""
        if self.way.drawn and boundary:
            return self._drawn(x, y, *self._whole_modules(boundary))
        cut = 0 if self._falls_due(boundary) else self.way.cut(step, boundary)
        local = self._local.begin_step(cut == boundary) if self._local else ()
        cost = self._cost(cut, x, begin, local)
        inside = 0
        if self.way.sliced:
            inside, boundary = self._whole_modules(boundary)
            cost = self._cost(boundary, x)
        if inside:
            cost += (self._cost(0, x) - cost) / self.way.every
            self.freeze.set_boundary(0)
            logits = self._sliced(x, inside)
        else:
            self.freeze.set_boundary(0 if self._gate else cut)
            logits = nn.Sequential(*list(self.model)[begin:])(x)
        loss = F.cross_entropy(logits, y)
        self._loss = loss.item()
        self.optimizer.zero_grad(set_to_none=True)
        prefix = self.prefix(boundary)
        if self._gate and not self._gate.opens(self._loss) and boundary:
            loss.backward(inputs=list(set(self.parameters.values()) - set(prefix)))  # type: ignore[no-untyped-call]
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            cost = self._cost(0, x) if self._gate else cost
        if (cut < boundary or inside) and self.way.power:
            torch._foreach_mul_([p.grad for p in prefix if p.grad is not None], self.way.every**self.way.power)
        if self.way.held:
            for p in prefix:
                if p.grad is not None:
                    self._held[p] = p.grad.clone()
                elif p in self._held:
                    p.grad = self._held[p].clone()
        self.optimizer.step()
        if self.way.averaged:
            with torch.no_grad():
                for p in self.parameters.values():
                    self._average.setdefault(p, p.detach().clone()).lerp_(p, 1 - AVERAGE)
        return cost

    def _falls_due(self, boundary: int) -> bool:
        """Whether it is time for the prefix to learn, where that becomes rarer."""
        if not self.way.rarer or not boundary:
            return False
        self._due += self.optimizer.param_groups[-1]["lr"] / (self.lr * self.way.every)
        if self._due < 1 - 1e-9:
            return False
        self._due -= 1
        return True

    def _sliced(self, x: Tensor, inside: int) -> Tensor:
        """The logits; of the first ``inside`` modules only the first pictures' activations are kept for the backward pass.
        BatchNorm normalises either part by statistics of its own."""
        modules, learning = list(self.model), max(1, len(x) // self.way.every)
        prefix, rest = nn.Sequential(*modules[:inside]), nn.Sequential(*modules[inside:])
        learnt = prefix(x[:learning])
        with torch.no_grad():
            constant = prefix(x[learning:])
        logits: Tensor = rest(torch.cat([learnt, constant]))
        return logits

    def _drawn(self, x: Tensor, y: Tensor, inside: int, boundary: int) -> float:
        """A step in which the first ``inside`` modules learn from a part of the pictures, as drawn."""
        with contextlib.ExitStack() as stack:
            counted = stack.enter_context(multiply_adds(self.model)) if boundary not in self._drawn_costs else None
            self.optimizer.zero_grad(set_to_none=True)
            modules = list(self.model)
            self.freeze.set_boundary(boundary)
            output = nn.Sequential(*modules[:inside])(x).requires_grad_(inside > 0)
            F.cross_entropy(nn.Sequential(*modules[inside:])(output), y).backward()  # type: ignore[no-untyped-call]
            self.freeze.set_open(True)
            if inside:
                assert output.grad is not None
                count = max(1, len(x) // self.way.every)
                backpropagate(modules[:inside], x, output.grad, count, self._random.random())
            self.optimizer.step()
            if counted is not None:
                self._drawn_costs[boundary] = counted.total
        return self._drawn_costs[boundary]

    def _cost(self, cut: int, x: Tensor, begin: int = 0, local: Sequence[str] = ()) -> float:
        """Multiply-adds of a step whose layers learn from ``cut`` on, ``local`` ones by a local step, and that begins with module
        ``begin``; counted once, on a copy."""
        if (cut, begin, len(local)) not in self._costs:
            model = copy.deepcopy(self.model)
            parameters = dict(model.named_parameters())
            for name in self.plan.prefix(self.plan.parameters, cut):
                parameters[name].requires_grad_(False)
            for name in self.plan.parameters.keys() - set(self.plan.prefix(self.plan.parameters, cut)):
                parameters[name].requires_grad_(True)
            with multiply_adds(model, local) as counted:
                nn.Sequential(*list(model)[begin:])(x)
            self._costs[cut, begin, len(local)] = counted.total
        return self._costs[cut, begin, len(local)]

    def _forward_cost(self, x: Tensor) -> float:
        model = copy.deepcopy(self.model).requires_grad_(False)
        with multiply_adds(model) as counted:
            model(x)
        return counted.total

    def _whole_modules(self, boundary: int) -> tuple[int, int]:
        """The network's first modules that hold layers of the prefix only: how many they are, and how many layers."""
        ends = [0]  # layers up to each module's end
        for child in range(len(self.model)):
            ends.append(ends[-1] + sum(name.split(".")[0] == str(child) for name in self.plan.layers))
        modules = max(child for child, end in enumerate(ends) if end <= boundary)
        return (modules, ends[modules]) if ends[modules] else (0, 0)

    def _set_lr(self, epoch: float) -> None:
        """Once per epoch, as a scheduler would; a layer's own, where it is annealed, in every step."""
        whole = self.lr * (1 + math.cos(math.pi * math.floor(epoch) / self.epochs)) / 2
        if self.way.hotter:
            whole /= math.sqrt(1 - self.boundary(math.floor(epoch)) / len(self.plan))
        for group in self.optimizer.param_groups:
            group["lr"] = whole
            end = next((e for e in range(self.epochs) if self.boundary(e) >= (group["boundary"] or math.inf)), None)
            if self.way.annealed and end:
                group["lr"] = self.lr * (1 + math.cos(math.pi * min(1.0, epoch / end))) / 2

    @torch.no_grad()
    def _enter_averaged(self, before: int, boundary: int) -> None:
        already = set(self.prefix(before))
        for p in self.prefix(boundary):
            if p not in already and p in self._average:
                p.copy_(self._average[p])

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        correct = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in self.data.test())
        return correct / self.data.test_size


def report(contents: Sequence[dict[str, Any]]) -> str:
    """Of results files, the tables by model and length of the run."""
    return "\n\n".join(map(_table, contents)) + "\n"


def _table(content: dict[str, Any]) -> str:
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in content["rows"].values():
        rows.setdefault(row["way"], {})[row["seed"]] = row
    sgd = rows.get("SGD", {})
    table = [
        ("way", "seeds", "accuracy, %", "minus SGD", "multiply-adds, % of SGD's", "minus SGD with fewer epochs at that cost")
    ]
    for name, mine in rows.items():
        accuracies = [100 * row["accuracy"] for row in mine.values()]
        both = sorted(mine.keys() & sgd.keys())
        minus = [100 * (mine[s]["accuracy"] - sgd[s]["accuracy"]) for s in both]
        cost = [100 * mine[s]["multiply_adds"] / sgd[s]["multiply_adds"] for s in both]
        shorter = []
        for seed in both:
            curve = [
                (r[seed]["multiply_adds"], r[seed]["accuracy"]) for n, r in rows.items() if n.startswith("SGD") and seed in r
            ]
            reference = interpolated(curve, mine[seed]["multiply_adds"])
            if reference is not None and not name.startswith("SGD"):
                shorter.append(100 * (mine[seed]["accuracy"] - reference))
        table.append(
            (
                name,
                " ".join(map(str, sorted(mine))),
                " / ".join(f"{a:.2f}" for a in accuracies),
                student.paired(minus).text() if minus and name != "SGD" else "-",
                f"{statistics.fmean(cost):.1f}" if cost else "-",
                student.paired(shorter).text() if shorter else "-",
            )
        )
    asked = content["asked"]
    head = f"{asked['model']}, {asked['train_size']} letters, {asked['epochs']} epochs, SGD's learning rate {asked['lr']:g}"
    return f"### {head}\n\n{aligned(table)}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=";".join(WAYS), help=f"separated by semicolons, of {'; '.join(WAYS)}")
    parser.add_argument("--model", choices=("small_resnet", "small_vgg"), default="small_resnet")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--train-size", type=int, default=4000)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further run after that")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE.json", help="only print the tables of results files")
    args = parser.parse_args(argv)
    args.ways = args.ways.split(";")
    for name in args.ways:
        if name not in WAYS:
            parser.error(f"--ways must be of {'; '.join(WAYS)}, got {name!r}")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    for name in ("seeds", "train_size", "test_size", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def measure(args: argparse.Namespace) -> Records:
    """Raises ``ValueError`` if ``--out`` holds runs of other options."""
    torch.set_num_threads(1)
    asked = {name: getattr(args, name) for name in ("model", "train_size", "test_size", "epochs", "lr")}
    header = {
        "command": shlex.join(["python", "benchmarks/tradeoff.py", *args.argv]),
        "asked": asked,
        "environment": environment.describe("cpu"),
    }
    if args.resume and args.out.exists() and read_json(args.out)["asked"] != asked:
        raise ValueError(f"{args.out} is of other options: {read_json(args.out)['asked']}, these are {asked}")
    records = Records(args.out, header, resume=args.resume, must_agree=("torch", "threads", "compiled_kernels"))
    records.save()
    loaded: dict[int, data.Data] = {}
    keys = {f"{name}|{seed}": (name, seed) for seed in range(args.seeds) for name in args.ways}
    for key in records.todo(keys, args.budget):
        name, seed = keys[key]
        if seed not in loaded:
            flags = {"train_size": args.train_size, "test_size": args.test_size, "channels_last": True}
            loaded = {seed: data.load(config.resolve("glyphs", args.model, "sgd", None, seed=seed, **flags))}
        begin = time.perf_counter()
        row = Run(WAYS[name], seed, args.epochs, args.lr, loaded[seed], args.model).train()
        about = {"way": name, "seed": seed, **asdict(WAYS[name]), "seconds": round(time.perf_counter() - begin, 1)}
        records.add(key, {**about, **row, "status": "ok"})
        print(
            f"{key}: {100 * row['accuracy']:.2f} %, {about['seconds']} s; {len(records.left)} left", file=sys.stderr, flush=True
        )
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: wrong arguments or file; 3: the budget ran out."""
    args = arguments(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)

    def work() -> Records | None:
        records = None if args.table else measure(args)
        print(report([records.content] if records else [read_json(path) for path in args.table]), end="")
        return records

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
