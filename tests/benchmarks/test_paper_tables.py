"""What the tables of benchmarks/paper.py say of runs that were made up, and which cells there are."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from paper_runs import NETWORK, SMOKE, made, result

from benchmarks.experiments import iso, overtime, pareto, report, suite, tuning
from benchmarks.experiments.cells import Variant, digest
from benchmarks.experiments.scales import SCALES, Study
from benchmarks.experiments.store import Result, Store
from benchmarks.experiments.timing import Shape, Timings

# ---------------------------------------------------------------- cells


def test_what_cannot_be_trained_yet_is_named() -> None:
    cell = SMOKE.cell(NETWORK, Variant("new", "no-such-method"), 0)
    assert (cell.config, cell.missing) == (None, "localsgd_ext.train has no method no-such-method yet")
    unfit = SMOKE.cell(NETWORK, Variant("unfit", "freeze", {"l_max": 2.0}), 0)
    assert (unfit.config, unfit.missing) == (None, "--l-max must be in (0, 1), got 2.0")
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        Study(SCALES["smoke"], flags={"epochs": 0}).cell(NETWORK, Variant("SGD", "sgd"), 0)
    of_a_boundary = Study(SCALES["smoke"], flags={"bn_stats": "nonsense"})  # SGD leaves it out, all others would be missing
    with pytest.raises(ValueError, match="--bn-stats must be one of update"):
        of_a_boundary.cell(NETWORK, Variant("SGD", "sgd"), 0)


def test_what_does_not_wait_is_no_run_of_its_own_where_none_waits() -> None:
    """With the paper's preset; elsewhere both are there."""
    for scale, there in (("full", False), ("cpu", True)):
        study = Study(SCALES[scale], root="/data")
        network = study.networks("cifar")[0]
        assert bool(pareto.families(study, network)[pareto.NOT_WAITING]) == there


def test_an_option_that_is_new_leaves_the_names_of_old_runs() -> None:
    config = SMOKE.config(NETWORK, "sgd")
    assert digest(config) == digest(config.replace(root="/somewhere", workers=0))
    assert digest(config) == digest(config.replace(refresh=0))
    assert digest(config) == digest(config.replace(l_max=0.5, local_lr=1.0))  # nothing to SGD
    frozen = SMOKE.config(NETWORK, "freeze")
    assert digest(frozen) == digest(frozen.replace(local_lr=1.0))
    changed = [frozen, frozen.replace(refresh=4), frozen.replace(seed=1), frozen.replace(l_max=0.5), config]
    assert len({digest(one) for one in changed}) == 5


def test_the_full_scale_is_the_papers() -> None:
    study = Study(SCALES["full"], root="/data")
    assert study.networks("imagenet") == (("imagenet", "resnet50"), ("imagenet", "resnet34"), ("imagenet", "mobilenet_v2"))
    config = study.config(("cifar10", "resnet18"), "local-paper")
    assert (config.epochs, config.lr, config.lr_step, config.batch_size, config.local_lr) == (90, 0.05, 10, 64, 0.01)
    assert study.shortened(("cifar10", "resnet18"), 45) == {"epochs": 45, "lr_step": 5}
    assert Study(SCALES["full"], data="cifar100").networks("imagenet") == (("cifar100", "resnet18"), ("cifar100", "vgg13"))
    assert Study(SCALES["cpu"], data="cifar10").networks("cifar") == (("cifar10", "small_resnet"), ("cifar10", "small_vgg"))
    pairs = {cell.config.seed for cell in suite.EXPERIMENTS["pareto"].cells(Study(SCALES["cpu"])) if cell.config is not None}
    assert len(pairs) == 10


def test_a_line_that_a_kill_cut_short_goes(tmp_path: Path) -> None:
    store, variant = Store(tmp_path), Variant("SGD", "sgd")
    store.add(NETWORK, made(NETWORK, variant, 0, [0.5]))
    with store.path(NETWORK).open("a") as file:
        file.write('{"id": "hal')
    assert store.get(SMOKE.cell(NETWORK, variant, 0)) is not None
    store.add(NETWORK, made(NETWORK, variant, 1, [0.25]))
    found = [store.get(SMOKE.cell(NETWORK, variant, seed)) for seed in (0, 1)]
    assert [r.accuracy for r in found if r is not None] == [50, 25]


# ---------------------------------------------------------------- what tables say


@pytest.mark.parametrize("experiment", suite.EXPERIMENTS)
@pytest.mark.parametrize("baseline", [True, False])
def test_every_experiment_makes_tables_and_pictures_of_half_finished_seeds(
    experiment: str, baseline: bool, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    cells = suite.EXPERIMENTS[experiment].cells(SMOKE)
    random = np.random.default_rng(0)
    for cell in cells:
        sgd = cell.variant.label == "SGD"
        if cell.config is not None and store.get(cell) is None and (baseline if sgd else cell.seed == 0):
            accuracies = random.uniform(0.4, 0.9, cell.config.epochs).tolist()
            store.add(cell.network, made(cell.network, cell.variant, cell.seed, accuracies, random.uniform(0.5, 1)))
    report = suite.report(experiment, SMOKE, store, Timings())
    assert ("| SGD  " in report) == (baseline and experiment != "figure3")
    assert "Not trained yet, small_resnet on fake: " in report
    draw = suite.EXPERIMENTS[experiment].picture
    if draw is not None:
        assert draw(SMOKE, suite.finished(cells, store)).startswith(b"\x89PNG")
    nothing = suite.report(experiment, SMOKE, Store(tmp_path / "empty"), Timings())
    assert "Scale smoke: none of " in nothing
    assert "Not trained yet, small_resnet on fake: SGD (2 seeds)" in nothing


def test_interpolation_along_a_curve() -> None:
    curve = [(4.0, 80.0), (8.0, 90.0), (6.0, 88.0)]
    assert pareto.interpolated(curve, 5) == 84
    assert pareto.interpolated(curve, 7) == 89
    assert pareto.interpolated(curve, 8) == 90
    assert pareto.interpolated(curve, 8.1) is None
    assert pareto.interpolated([], 1) is None


def test_domination() -> None:
    points = {"cheap": (1.0, 80.0), "good": (3.0, 90.0), "bad": (2.0, 79.0), "worse": (3.0, 85.0), "twin": (3.0, 90.0)}
    assert pareto.dominated(points) == {"cheap": None, "good": None, "bad": "cheap", "worse": "twin", "twin": None}


def test_equal_cost_is_paired_by_seed() -> None:
    """Both seeds' SGD gains 4 points an epoch, from different levels; the method at 3.5 epochs' cost is 1 and 2 points above."""
    labels = {"whole": ["four"], "short": ["three"], "method": ["it"]}
    results = {
        "four": {s: result(Variant("SGD", "sgd"), s, 90.0 + s, 4) for s in (0, 1)},
        "three": {s: result(Variant("3", "sgd", {"epochs": 3}), s, 86.0 + s, 3) for s in (0, 1)},
        "it": {s: result(Variant("it", "freeze"), s, 89.0 + 2 * s, 3.5) for s in (0, 1)},
    }
    points = pareto.Points(labels, results, lambda r: r.macs)
    paired = points.against("it", ("whole", "short"))
    assert paired is not None
    assert (paired.n, paired.mean) == (2, pytest.approx(1.5))
    assert points.mean("it") == (3.5, 90.0)


def test_memory_is_a_mean_over_the_epochs_and_that_of_the_last(tmp_path: Path) -> None:
    curves = pareto.families(SMOKE, NETWORK)
    store = Store(tmp_path)
    runs: dict[str, dict[int, Result]] = {}
    for variant, last in ((curves[pareto.SGD][0], 1000), (curves[pareto.FROZEN][0], 500)):
        entry = made(NETWORK, variant, 0, [0.5, 0.5])
        entry["epochs"]["saved_activation_bytes"] = [1000, last]
        store.add(NETWORK, entry)
        found = store.get(SMOKE.cell(NETWORK, variant, 0))
        assert found is not None
        runs[variant.label] = {0: found}
    lines = pareto.table(SMOKE, NETWORK, runs, Timings()).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:4]] == ["100.0 / 100.0", "75.0 / 50.0"]


def test_seeds_that_are_slow_to_begin_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sgd = pareto.families(SMOKE, NETWORK)[pareto.SGD][0]
    runs: dict[int, Result] = {}
    for seed, losses in enumerate([[3.0, 2.7, 1.0], [3.0, 2.8, 1.0], [3.0, 2.0, 2.9], [3.0, 3.1, 3.0]]):
        entry = made(NETWORK, sgd, seed, [0.5] * 3)
        entry["epochs"]["train_loss"] = losses
        store.add(NETWORK, entry)
        found = store.get(SMOKE.cell(NETWORK, sgd, seed))
        assert found is not None
        runs[seed] = found
    assert "within a tenth of the first one's in 2 of 4 seeds (1, 3)." in pareto.table(
        SMOKE, NETWORK, {sgd.label: runs}, Timings()
    )


def test_epochs_that_sgd_needs() -> None:
    curve = [(4.0, 80.0), (6.0, 84.0), (8.0, 90.0)]
    assert iso.epochs_needed(curve, 87) == 7
    assert iso.epochs_needed(curve, 91) is None
    assert iso.epochs_needed(curve, 79) is None  # three might do


def test_choices_under_a_budget() -> None:
    runs = {
        "SGD": {0: result(Variant("SGD", "sgd"), 0, 90, 10)},
        "slow": {0: result(Variant("s", "freeze"), 0, 89.95, 9)},
        "fast": {0: result(Variant("f", "freeze", {"alpha": 1.0}), 0, 89, 5)},
    }
    assert tuning.fastest(runs, ["slow", "fast", "absent"], 0.1) == "slow"
    assert tuning.fastest(runs, ["slow", "fast"], 1.0) == "fast"
    assert tuning.fastest(runs, ["slow", "fast"], 0.01) is None
    assert tuning.best_within(runs, ["slow", "fast"], 9) == "slow"
    assert tuning.best_within(runs, ["slow", "fast"], 8) == "fast"
    assert tuning.best_within(runs, ["slow", "fast"], 4) is None


def test_the_batch_that_fits() -> None:
    assert [overtime.largest_batch(64, now, 1000) for now in (1000, 501, 500, 250, 100)] == [64, 64, 128, 256, 512]
    assert overtime.chosen(3) == [0, 1, 2]
    assert (overtime.chosen(90)[0], overtime.chosen(90)[-1], len(overtime.chosen(90))) == (0, 89, 12)


def test_whole_runs_are_put_together_from_steps() -> None:
    sgd, frozen = Variant("SGD", "sgd"), Variant("f", "freeze", {"refresh": 4})
    entry = made(NETWORK, frozen, 0, [0.5, 0.5, 0.5])  # boundaries 0, 1 and 2; 4 steps an epoch
    key = Shape.of(SMOKE.config(NETWORK, "freeze")).key
    rows = {
        f"{key}|frozen|{boundary}": {"shape": key, "ms": ms, "sgd_ms": 10.0, "status": "ok"}
        for boundary, ms in ((1, 8.0), (2, 6.0))
    }
    timings = Timings(rows)
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        store.add(NETWORK, entry)
        run = store.get(SMOKE.cell(NETWORK, frozen, 0))
    assert run is not None
    assert timings.steps_of_sgd(run) == pytest.approx(4 * (1 + 0.25 + 0.75 * 0.8 + 0.25 + 0.75 * 0.6))
    assert Timings().steps_of_sgd(run) is None
    still = dataclasses.replace(run, config=run.config.replace(bn_stats="freeze"))
    assert timings.steps_of_sgd(still) is None  # measured as a variant of its own
    assert timings.steps_of_sgd(result(sgd, 0, 50)) == 4
    assert json.loads(json.dumps(entry)) == entry


def test_a_run_that_stands_for_two_is_counted_once_in_the_hours(tmp_path: Path) -> None:
    """What does not wait for the loss, where that falls at once, is copied from what does."""
    store = Store(tmp_path)
    waits, at_once = Variant("waits", "freeze", {"min_loss_drop": 0.1}), Variant("at once", "freeze", {"min_loss_drop": 0.0})
    entries = [made(NETWORK, variant, 0, [0.5], 1.0) for variant in (waits, at_once)]
    for entry, hours in zip(entries, (0.25, 0.25), strict=True):
        store.add(NETWORK, {**entry, "hours": hours})
    store.add(NETWORK, {**made(NETWORK, waits, 1, [0.5], 1.0), "hours": 0.5})
    cells = [SMOKE.cell(NETWORK, variant, seed) for variant, seed in ((waits, 0), (at_once, 0), (waits, 1))]
    assert "3 of 3 runs finished (1 of them the same as another), 0.75 core-hours" in report.stamp(SMOKE, cells, store)
    assert "2 of 2 runs finished, 0.75 core-hours" in report.stamp(SMOKE, [cells[0], cells[2]], store)
