"""What the local rule does to the filters, and what that costs: rules side by side behind the same moving boundary.

python benchmarks/study.py --out results.json           # again with --resume if it was stopped
python benchmarks/study.py --table results.json --picture study.png
python benchmarks/study.py --theory                     # one linear layer, and the paper's recipes by arithmetic: no training

A seed's runs all go on from the same network, trained by SGD for the first epochs; then the boundary moves, the same way
for every rule. So a rule is compared with a frozen prefix on the same weights, pictures and steps. benchmarks/STUDY.md says what
was found.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import study_measures, study_tables, study_theory
from benchmarks.records import Records, exit_status
from benchmarks.study_rules import LocalLayers, Variant
from localsgd_ext import WeakSupervision, trace_layers
from localsgd_ext.freezing import PrefixFreeze
from localsgd_ext.train import config, data, environment, models
from localsgd_ext.train.files import read_json, write_atomically

RECIPES = ("cosine", "stopped")
# A hundredth of where it began. Of the paper's CIFAR-10 recipe a tenth is left when its first layers turn local, a thousandth when a
# quarter of them has.
STOPPED = 1e-4
RENEWAL = 20  # mini-batches
SETTLING = (2, 0.003)  # epochs and SGD's learning rate for the layers behind the prefix once the rule has ended
_OTHERS = {"centred": "centred", "subspace": "subspace", "BN output": "bn", "Oja": "oja", "per filter": "per filter"}
VARIANTS = {  # those that matter most first
    "frozen": Variant("frozen"),
    "literal 0.01": Variant(),
    "random 0.01": Variant("random"),
    "centred 0.01": Variant("centred"),
    "sign -1, 0.01": Variant(sign="minus"),
    "subspace 0.01": Variant("subspace"),
    "BN output 0.01": Variant("bn"),
    "sign in turn, 0.01": Variant(sign="alternating"),
    "Oja 0.01": Variant("oja"),
    "per filter 0.01": Variant("per filter"),
    "norm kept 0.01": Variant(step="preserving"),
    "relative 0.001": Variant(step="relative", lr=1e-3),
    "decay 10, 0.01": Variant(decay=10.0),
    "sample 1/4, 0.01": Variant(sample=0.25),
    **{f"literal {lr:g}": Variant(lr=lr) for lr in (1e-3, 1e-4)},
    "sgd": Variant("sgd"),
    **{f"stopped: {name}": Variant(name, recipe="stopped") for name in ("sgd", "frozen")},
    **{f"stopped: literal {lr:g}": Variant(lr=lr, recipe="stopped") for lr in (1e-2, 1e-3, 1e-4)},
    "sign -1, 0.001": Variant(sign="minus", lr=1e-3),
    **{f"{name} 0.001": Variant(rule, lr=1e-3) for name, rule in _OTHERS.items()},
    "decay 2, 0.01": Variant(decay=2.0),
    "sign +1, 0.01": Variant(sign="plus"),
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained, in pictures and epochs."""

    train: int = 2000
    test: int = 1000
    start: int = 10
    epochs: int = 14
    last: int = 10

    def boundary(self, epoch: int) -> int:
        """0 while all is SGD, then 4, 6, 8, ... layers, at most ``last``."""
        return min(self.last, 2 * (epoch - self.start + 2)) if epoch >= self.start else 0

    def sgd_lr(self, recipe: str, epoch: int) -> float:
        """The same for all recipes before the boundary moves."""
        if recipe == "stopped" and epoch >= self.start:
            return STOPPED
        return 0.01 * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


class Run:
    """A network and its optimizer, taken further epoch by epoch."""

    def __init__(self, sizes: Sizes, seed: int, pictures: data.Data) -> None:
        self.sizes, self.data = sizes, pictures
        self.model = models.build("small_resnet", pictures.num_classes, seed).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.probe = next(iter(pictures.train(0)))[0]  # what the filters are measured on
        self.plan = trace_layers(self.model, self.probe[:2])
        self.supervision = WeakSupervision()

    def fork(self) -> Run:
        """A copy to take elsewhere, on the same data."""
        other = copy.copy(self)
        together = copy.deepcopy((self.model, self.optimizer, self.supervision))  # the optimizer's parameters stay the model's
        other.model, other.optimizer, other.supervision = together
        return other

    def epochs(self, variant: Variant, first: int, end: int) -> list[dict[str, Any]]:
        freeze = PrefixFreeze(self.model, self.plan, optimizers=[self.optimizer])
        learns = variant.rule not in ("sgd", "frozen")
        local = LocalLayers(self.model, self.plan.layers[: self.sizes.last] if learns else (), self._norms(), variant)
        rows = []
        for epoch in range(first, end):
            freeze.set_boundary(0 if variant.rule == "sgd" else self.sizes.boundary(epoch))
            local.active = frozenset(self.plan.layers[: freeze.boundary])
            sign = variant.sign_at(self.supervision.sign, epoch)
            local.lr = sign * variant.lr_at(epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = self.sizes.sgd_lr(variant.recipe, epoch)
            before = self._weights()
            loss = self._train(epoch)
            self.supervision.step(loss)
            moved = [float(f"{(w - b).norm() / b.norm():.4g}") for w, b in zip(self._weights(), before, strict=True)]
            measured = self.plan.layers[: self.sizes.boundary(epoch) or self.sizes.last]
            rows.append(
                {
                    "epoch": epoch,
                    "boundary": freeze.boundary,
                    "sign": sign,
                    "loss": round(loss, 5),
                    "accuracy": self._accuracy() if epoch == end - 1 else None,
                    "moved": moved,
                    "layers": study_measures.layers(self.model, measured, self.probe)
                    if epoch >= self.sizes.start - 1
                    else None,
                }
            )
        local.remove()
        return rows

    def settle(self) -> dict[str, float]:
        """Test accuracy with BatchNorm's statistics made anew for the weights as they are, and after the layers behind the prefix,
        which does not move any more, had some epochs to get used to it."""
        freeze = PrefixFreeze(self.model, self.plan, optimizers=[self.optimizer])
        freeze.set_boundary(self.sizes.last)
        self._renew_statistics()
        fresh = self._accuracy()
        epochs, lr = SETTLING
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for epoch in range(self.sizes.epochs, self.sizes.epochs + epochs):
            self._train(epoch)
        return {"fresh": fresh, "settled": self._accuracy()}

    @torch.no_grad()
    def _renew_statistics(self) -> None:
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        momentum = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over mini-batches
        self.model.train()
        for _, (x, _) in zip(range(RENEWAL), self.data.train(self.sizes.epochs), strict=False):
            self.model(x)
        for norm, before in zip(norms, momentum, strict=True):
            norm.momentum = before

    def _norms(self) -> dict[str, str]:
        """The BatchNorm that follows each layer."""
        norms = {position: name for name, position in self.plan.norms.items()}
        places = dict(zip(self.plan.layers, self.plan.positions, strict=True))
        return {layer: norms[min(p for p in norms if p > places[layer])] for layer in self.plan.layers[:-1]}

    def _weights(self) -> list[Tensor]:
        return [self.model.get_parameter(f"{name}.weight").detach().clone() for name in self.plan.layers]

    def _train(self, epoch: int) -> float:
        self.model.train()
        total = 0.0
        for x, y in self.data.train(epoch):
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item()
        return total / self.data.steps

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        correct = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in self.data.test())
        return correct / self.data.test_size


class Runs:
    """Rows by key; what a seed's runs have in common is computed once."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._starts: dict[int, tuple[Run, list[dict[str, Any]]]] = {}

    def row(self, variant: Variant | None, seed: int) -> dict[str, Any]:
        """Of a variant; ``None``: of the epochs before the boundary moves, which all variants go on from."""
        begin = time.perf_counter()
        trained, rows = self._start(seed)
        about: dict[str, Any] = {}
        if variant is not None:
            run = trained.fork()
            rows = run.epochs(variant, self.sizes.start, self.sizes.epochs)
            about = {**asdict(variant), **run.settle()}
        return {**about, "seed": seed, "seconds": round(time.perf_counter() - begin, 1), "epochs": rows, "status": "ok"}

    def _start(self, seed: int) -> tuple[Run, list[dict[str, Any]]]:
        if seed not in self._starts:
            run = Run(self.sizes, seed, data.load(self._config(seed)))
            self._starts[seed] = run, run.epochs(Variant("sgd"), 0, self.sizes.start)
        return self._starts[seed]

    def _config(self, seed: int) -> config.RunConfig:
        flags = {"train_size": self.sizes.train, "test_size": self.sizes.test, "channels_last": True}
        return config.resolve("glyphs", "small_resnet", "sgd", None, seed=seed, **flags)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=";".join(VARIANTS), help=f"separated by semicolons, of {'; '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    sizes = Sizes()
    parser.add_argument("--train-size", type=int, default=sizes.train)
    parser.add_argument("--test-size", type=int, default=sizes.test)
    parser.add_argument("--start", type=int, default=sizes.start, metavar="EPOCHS", help="of SGD alone")
    parser.add_argument("--epochs", type=int, default=sizes.epochs, help="in all")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further run after that")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="only print the tables of a results file")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw one as well")
    parser.add_argument("--theory", action="store_true", help="only print what follows without training")
    args = parser.parse_args(argv)
    args.variants = args.variants.split(";")
    for name in args.variants:
        if name not in VARIANTS:
            parser.error(f"--variants must be of {'; '.join(VARIANTS)}, got {name!r}")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    if not 0 < args.start < args.epochs:
        parser.error(f"--start must be at least 1 and below --epochs, got {args.start} of {args.epochs}")
    return args


def measure(args: argparse.Namespace) -> Records:
    torch.set_num_threads(1)
    sizes = Sizes(args.train_size, args.test_size, args.start, args.epochs)
    header = {
        "command": shlex.join(["python", "benchmarks/study.py", *args.argv]),
        "sizes": asdict(sizes),
        "environment": environment.describe("cpu"),
    }
    records = Records(args.out, header, resume=args.resume)
    records.save()
    runs = Runs(sizes)
    seeds = range(args.seeds)
    # A variant at a time: when the budget ends, those begun have all their seeds.
    tasks: dict[str, tuple[Variant | None, int]] = {
        **{f"start|{seed}": (None, seed) for seed in seeds},
        **{f"{name}|{seed}": (VARIANTS[name], seed) for name in args.variants for seed in seeds},
    }
    begin = time.monotonic()
    for done, key in enumerate(records.todo(tasks, args.budget), start=1):
        row = runs.row(*tasks[key])
        records.add(key, row)
        minutes = (time.monotonic() - begin) / done * len(records.left) / 60
        left = f"{len(records.left)} left, about {minutes:.0f} min"
        print(f"{key}: {100 * row['epochs'][-1]['accuracy']:.1f} %, {row['seconds']} s; {left}", file=sys.stderr, flush=True)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: wrong arguments or file; 3: the budget ran out."""
    args = arguments(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.theory:
        print(study_theory.report(), end="")
        return 0

    def work() -> Records | None:
        records = None if args.table else measure(args)
        content = records.content if records else read_json(args.table)
        print(study_tables.report(content), end="")
        if args.picture:
            write_atomically(args.picture, study_tables.picture(content))
        return records

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
