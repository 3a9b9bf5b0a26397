"""What the tables of benchmarks/paper.py say of runs that were made up, and which cells there are."""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paper_runs import NETWORK, SMOKE, made, result
from PIL import Image

from benchmarks.experiments import iso, overtime, pareto, pictures, report, suite, tuning
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
        assert draw(SMOKE, suite.finished(cells, store), Timings()).startswith(b"\x89PNG")
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


def at(cost: float, accuracy: float, seeds: int = 3) -> pareto.Seeded:
    return {seed: (cost, accuracy + seed) for seed in range(seeds)}


def test_domination_is_by_the_means_over_common_seeds() -> None:
    points = {
        "cheap": at(1, 80), "good": at(3, 90), "bad": at(2, 79), "worse": at(3, 85), "twin": at(3, 90),
        "lucky": {3: (2.0, 99.0)},  # of a seed that no other finished
        "partial": {1: (3.5, 91.0), 2: (3.5, 93.0), 3: (3.5, 99.0)},  # of two of the others' seeds
        "half": {0: (3.0, 80.0), 1: (3.0, 80.0), 2: (3.0, 80.0), 3: (3.0, 99.0)}
    }  # fmt: skip
    assert pareto.dominated(points) == {
        "cheap": "none", "good": "none", "bad": "cheap", "worse": "good", "twin": "none", "lucky": "-", "partial": "none",
        "half": "good"
    }  # fmt: skip


def test_the_frontier_leaves_out_what_is_dominated_and_what_lacks_seeds() -> None:
    points = {"sgd": at(10, 95), "good": at(5, 90), "bad": at(7, 85), "lucky": {0: (6.0, 99.0)}}
    assert pareto.frontier(points, range(3)) == ["sgd", "good"]
    assert pareto.frontier(points, [0]) == ["good", "lucky"]


def test_equal_cost_is_against_the_best_of_the_baseline() -> None:
    """A bad setting of the baseline beside the method would make a lead of its loss."""
    points = {
        "sgd": at(10, 95), "good": at(5, 90), "bad": at(7, 80), "it": {s: (7.0, 91.0 + s + 0.3 * (s % 2)) for s in range(3)},
        "again": {**at(5, 90), 0: (4.0, 80.0)}, "lucky": {0: (6.9, 99.0)}
    }  # fmt: skip
    rows = ["sgd", "good", "bad", "lucky"]
    paired = pareto.against(points, "it", rows)
    assert paired is not None
    assert (paired.n, paired.mean) == (3, pytest.approx(-0.9))  # 92 at 7 on the way from 90 to 95
    assert pareto.against(points, "good", [*rows, "again"]) is None  # neither itself nor what is the same in most seeds
    bad = pareto.against(points, "bad", rows)
    assert bad is not None
    assert bad.mean == pytest.approx(-12)


def test_equal_cost_is_paired_by_seed() -> None:
    """Both seeds' SGD gains 4 points an epoch, from different levels; the method at 3.5 epochs' cost is 1 and 2 points above."""
    results = {
        "four": {s: result(Variant("SGD", "sgd"), s, 90.0 + s, 4) for s in (0, 1)},
        "three": {s: result(Variant("3", "sgd", {"epochs": 3}), s, 86.0 + s, 3) for s in (0, 1)},
        "it": {s: result(Variant("it", "freeze"), s, 89.0 + 2 * s, 3.5) for s in (0, 1)},
    }
    paired = pareto.against(pareto.priced(results, lambda r: r.macs), "it", ("four", "three"))
    assert paired is not None
    assert (paired.n, paired.mean) == (2, pytest.approx(1.5))


def cells_of(text: str, start: str) -> list[list[str]]:
    """Of all rows that begin so."""
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith(f"| {start} ")]


def stored(directory: Path, runs: list[tuple[Variant, float, float]], epochs: int = 3) -> dict[str, dict[int, Result]]:
    """Three seeds each, of an accuracy that grows by a point with the seed, and a cost; boundaries 0, 1, 2."""
    store = Store(directory)
    for variant, accuracy, macs in runs:
        for seed in range(3):
            store.add(NETWORK, made(NETWORK, variant, seed, [(accuracy + seed) / 100] * epochs, macs))
    return store.by_label(SMOKE.cell(NETWORK, variant, seed) for variant, _, _ in runs for seed in range(3))


def steps(variant: str, *boundaries: int) -> dict[str, Any]:
    """Timed at 8, 6, 4 ... tenths of SGD's."""
    key = Shape.of(SMOKE.config(NETWORK, "freeze")).key
    return {f"{key}|{variant}|{b}": {"shape": key, "ms": 10.0 - 2 * b, "sgd_ms": 10.0, "status": "ok"} for b in boundaries}


def test_all_rows_that_freeze_are_the_baseline_and_a_row_without_a_time_keeps_the_others(tmp_path: Path) -> None:
    curves = pareto.families(SMOKE, NETWORK)
    sgd, short, frozen = curves[pareto.SGD][0], curves[pareto.SHORT][0], curves[pareto.FROZEN]
    at_once, literal, refresh = curves[pareto.FROZEN_SHORT][0], curves[pareto.PAPER_RULE][0], curves[pareto.OURS["freeze"]][0]
    runs = [
        (sgd, 90.0, 1.0), (short, 84.0, 0.75), (frozen[0], 70.0, 0.6), (frozen[1], 87.0, 0.9), (at_once, 80.0, 0.5),
        (literal, 60.0, 0.9), (refresh, 82.0, 0.7)
    ]  # fmt: skip
    results = stored(tmp_path, runs)
    text = pareto.table(SMOKE, NETWORK, results, Timings(steps("frozen", 1, 2)))
    by_macs, by_time = cells_of(text, refresh.label)[1:]
    assert by_macs[1:] == ["-", "-1.50 [3 equal]", "none"]  # 83.5 at 0.7: the bad run with all epochs is not the reference
    assert cells_of(text, literal.label)[2][1:] == ["-", "-", "-"]
    assert by_time[3] != "-"
    assert f"Without time: {literal.label}." in text
    assert cells_of(text, frozen[0].label)[1][2] == "-11.75 [3 equal]"
    assert "the frontiers look a little better than they are" in text
    assert "| at equal time" not in pareto.table(SMOKE, NETWORK, results, Timings())


def size_of(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


def test_pictures_show_time_where_there_is_any(tmp_path: Path) -> None:
    curves = pareto.families(SMOKE, NETWORK)
    frozen = curves[pareto.FROZEN][0]
    runs = stored(
        tmp_path, [(curves[pareto.SGD][0], 90.0, 1.0), (frozen, 80.0, 0.7), (curves[pareto.PAPER_RULE][0], 10.0, 0.7)]
    )
    narrow, wide = (size_of(pareto.picture(SMOKE, {NETWORK: runs}, t)) for t in (Timings(), Timings(steps("frozen", 1, 2))))
    assert wide[0] > 1.8 * narrow[0]
    assert wide[1] == narrow[1]


def test_figure6_draws_what_is_saved_beside_what_is_lost(tmp_path: Path) -> None:
    drawn: list[tuple[str, str, list[float]]] = []

    def note(axes: Any) -> None:
        drawn.extend((a.get_xlabel(), a.get_ylabel(), line.get_ydata().tolist()) for a in axes for line in a.get_lines())

    swept = tuning.shift_sweep(SMOKE, tuning.REFRESH)
    runs = stored(tmp_path, [(tuning.SGD, 90.0, 1.0), *((v, 89.0, 0.75) for v in swept)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "drawn", lambda count, draw, columns=2: _drawn(count, draw, note))
        pictures.figure6(dataclasses.replace(SMOKE, seeds=3), {NETWORK: runs}, Timings())
        for label in runs.keys() - {"SGD"}:
            del runs[label][0]
        pictures.figure6(dataclasses.replace(SMOKE, seeds=3), {NETWORK: runs}, Timings())  # none has all seeds
    assert drawn == [
        ("t_shift", "points lost against SGD", [pytest.approx(1.0)] * len(swept)),
        ("t_shift", "multiply-adds saved, % of SGD's", [pytest.approx(25.0)] * len(swept)),
    ]


def _drawn(count: int, draw: Callable[[Sequence[Any]], None], look: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    axes = list(Figure().subplots(1, count, squeeze=False).flat)
    draw(axes)
    look(axes)
    return b""


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


def test_epochs_that_sgd_needs_are_those_of_the_same_seeds(tmp_path: Path) -> None:
    """Seed 2 is ten points better than the others with every method: that a method has only this one yet is no speed-up."""
    study = dataclasses.replace(SMOKE, seeds=3)
    whole, (short, *_) = iso.SGD, list(iso.shorter(SMOKE, NETWORK).values())
    store = Store(tmp_path)
    for variant, accuracy, seeds in ((whole, 80, (0, 1, 2)), (short, 70, (0, 1, 2)), (iso.FREEZING, 75, (2,))):
        for seed in seeds:
            store.add(NETWORK, made(NETWORK, variant, seed, [(accuracy + 10 * (seed == 2)) / 100], 0.5))
    runs = store.by_label(study.cell(NETWORK, v, seed) for v in (whole, short, iso.FREEZING) for seed in range(3))
    (row, *_) = cells_of(iso.table(study, NETWORK, runs, Timings()), iso.FREEZING.label)
    assert row[2] == "3.50"


def test_choices_under_a_budget() -> None:
    runs = {
        "SGD": {0: result(Variant("SGD", "sgd"), 0, 90, 10)},
        "slow": {0: result(Variant("s", "freeze"), 0, 89.95, 9)},
        "fast": {0: result(Variant("f", "freeze", {"alpha": 1.0}), 0, 89, 5)},
    }
    assert tuning.fastest(runs, ["slow", "fast", "absent"], 0.1) == "slow"
    assert tuning.fastest(runs, ["slow", "fast"], 0.05) == "slow"  # 0.05 but for rounding
    assert tuning.fastest(runs, ["slow", "fast"], 1.0) == "fast"
    assert tuning.fastest(runs, ["slow", "fast"], 0.01) is None
    assert tuning.best_within(runs, ["slow", "fast"], 9) == "slow"
    assert tuning.best_within(runs, ["slow", "fast"], 8) == "fast"
    assert tuning.best_within(runs, ["slow", "fast"], 4) is None


def of_grid(alpha: float, shift: int, cap: float) -> Variant:
    (variant,) = [v for v in tuning.grid(SMOKE, tuning.LITERAL) if v.flags == {"alpha": alpha, "t_shift": shift, "l_max": cap}]
    return variant


def test_what_has_not_all_seeds_is_not_chosen(tmp_path: Path) -> None:
    """Seed 2 is the easiest. What has run with it alone looks better than SGD on average, and loses a point to it."""
    study = dataclasses.replace(SMOKE, seeds=3)
    whole, part = of_grid(0.95, 1, 0.75), of_grid(0.95, 2, 0.75)
    runs = stored(tmp_path, [(tuning.SGD, 90.0, 1.0), (whole, 89.9, 0.9), (part, 89.0, 0.5)])
    runs[part.label] = {2: runs[part.label][2]}
    assert tuning.lost(runs, part.label) == pytest.approx(1.0)
    settings = tuning.grid(study, tuning.LITERAL)
    assert tuning.complete(study, runs, settings) == [whole.label]
    text = tuning.table4(study, {NETWORK: runs}, Timings())[""]
    assert [row[1] for row in cells_of(text, NETWORK[1])] == ["alpha 0.95, t_shift 1, l_max 0.75"] * 2
    assert "small_resnet: Not chosen from, for want of seeds (theirs or SGD's): 11 of 12 settings." in text
    del runs["SGD"][0]
    assert tuning.complete(study, runs, settings) == []


def test_ties_go_to_the_papers_alpha_and_are_named(tmp_path: Path) -> None:
    same = [of_grid(alpha, 2, 0.5) for alpha in (0.8, 0.95, 1.1)]
    runs = stored(tmp_path, [(tuning.SGD, 90.0, 1.0), *((variant, 89.75, 0.9) for variant in same)])
    text = tuning.table4(dataclasses.replace(SMOKE, seeds=3), {NETWORK: runs}, Timings())[""]
    assert [row[1] for row in cells_of(text, NETWORK[1])] == ["alpha 0.95, t_shift 2, l_max 0.5"] * 2
    assert "the same runs as alpha 0.95, t_shift 2, l_max 0.5: alpha 0.8, t_shift 2, l_max 0.5; alpha 1.1, t_shift 2" in text


def test_table7_is_at_equal_time_where_all_was_timed(tmp_path: Path) -> None:
    """By multiply-adds the refresh is dearer than the literal rule, by time cheaper."""
    study = dataclasses.replace(SMOKE, seeds=3)
    flags = {"alpha": 0.95, "t_shift": 1, "l_max": 0.5}
    text = "alpha 0.95, t_shift 1, l_max 0.5"
    literal, refresh = (tuning.changed(method, text, **flags) for method in (tuning.LITERAL, tuning.REFRESH))
    runs = stored(tmp_path, [(tuning.SGD, 90.0, 1.0), (literal, 90.0, 0.8), (refresh, 89.9, 0.85)])
    timings = Timings({**steps("frozen", 1, 2), **{k: {**row, "ms": 9.9} for k, row in steps("local", 1, 2).items()}})
    table = tuning.table7(study, NETWORK, runs, timings)
    head, *_ = table.splitlines()
    assert [cell.strip() for cell in head.split("|")[3:-1]] == [
        "time, % of SGD's", "freezing at no more time: lost", "refresh 1/4 at no more time: lost"
    ]  # fmt: skip
    assert cells_of(table, "0.05")[0] == ["0.05", "0.00", "99.3", "none that cheap", "0.10"]
    assert "36 more runs of each network, which were not made" in table
    untimed = tuning.table7(study, NETWORK, runs, Timings(steps("frozen", 1, 2)))
    assert cells_of(untimed, "0.05")[0] == ["0.05", "0.00", "80.0", "none that cheap", "none that cheap"]
    assert "At no more multiply-adds: not all was timed." in untimed


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
