"""benchmarks/study.py: measures on known matrices, every rule's step against its formula, a run end to end, tables from JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import study, study_measures, study_rules, study_tables, study_theory
from benchmarks.study_rules import DIRECTIONS, LocalLayers, Seen, Variant, stepped
from localsgd_ext import reference

SMALL = ["--train-size", "64", "--test-size", "32", "--start", "1", "--epochs", "3", "--seeds", "1"]


def test_effective_rank_of_known_matrices() -> None:
    assert study_measures.rank_of(torch.eye(7)) == pytest.approx(7)
    assert study_measures.rank_of(torch.outer(torch.randn(5), torch.randn(9))) == pytest.approx(1)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert study_measures.rank_of(torch.diag(shares.sqrt())) == pytest.approx(2**1.5)  # an entropy of 1.5 bits


def test_filters_are_described_by_how_they_lie_to_their_patches() -> None:
    patches = torch.randn(4000, 3) * torch.tensor([1.0, 3.0, 1.0]) + torch.tensor([10.0, 0.0, 0.0])
    weight = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = study_measures.describe(weight, patches)
    assert found["norm"] == pytest.approx(5**0.5)
    assert found["top"] == pytest.approx(1, abs=0.02)  # the mean makes the first coordinate the top direction
    assert found["top_centred"] == pytest.approx(0, abs=0.1)  # without it, the second varies most
    assert found["filters_top"] == pytest.approx(0.5, abs=0.02)
    assert found["output_rank"] == pytest.approx(2, abs=0.02)  # two uncorrelated outputs
    assert study_measures.describe(weight[:1].expand(4, -1), patches)["output_rank"] == pytest.approx(1)


@pytest.fixture
def seen() -> Seen:
    module = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
    norm = nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    x = torch.randn(4, 3, 9, 9) + 1
    return Seen(module, norm, x, module(x).detach())


def matrices(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Patches ``[count, M]``, outputs ``[count, K]`` and the weight ``[K, M]``, in fp64."""
    patches = F.unfold(seen.x.double(), 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    weight = seen.weight.double()
    return patches, patches @ weight.T, weight


def expected(rule: str, seen: Seen) -> Tensor:
    p, y, w = matrices(seen)
    centred_y = y - y.mean(0)
    assert seen.norm is not None
    scale = seen.norm.weight.detach() / (y.var(0, unbiased=False) + seen.norm.eps).sqrt()
    return {
        "hebb": y.T @ p,
        "per filter": F.normalize(y.T @ p, dim=1),
        "oja": y.T @ p - torch.diag(y.square().sum(0)) @ w,
        "subspace": y.T @ p - y.T @ y @ w,
        "centred": centred_y.T @ (p - p.mean(0)),
        "bn": (centred_y * scale + seen.norm.bias.detach()).T @ p,
        "random": DIRECTIONS["random"](Seen(seen.module, None, -seen.x, -seen.z)).double(),  # whatever the data
    }[rule]


@pytest.mark.parametrize("rule", DIRECTIONS)
def test_a_direction_is_its_formula(rule: str, seen: Seen) -> None:
    wanted = expected(rule, seen)
    assert (DIRECTIONS[rule](seen) - wanted).norm() <= 1e-5 * wanted.norm()


def test_how_far_a_step_goes() -> None:
    weight, direction = 5 * torch.randn(4, 6), torch.randn(4, 6)
    unit = direction / direction.norm()
    torch.testing.assert_close(stepped(weight, direction, -0.1, "absolute"), weight - 0.1 * unit)
    torch.testing.assert_close(stepped(weight, direction, 0.1, "relative"), weight + 0.1 * weight.norm() * unit)
    kept = stepped(weight, direction, 0.1, "preserving")
    torch.testing.assert_close(kept, (weight + 0.1 * unit) * weight.norm() / (weight + 0.1 * unit).norm())


def test_the_hook_makes_the_literal_step_on_active_layers_in_training_only(seen: Seen) -> None:
    module, before = seen.module, seen.module.weight.detach().clone()
    local = LocalLayers(module, [""], {}, Variant())
    local.lr = -0.05
    module(seen.x)
    module.eval()
    local.active = frozenset([""])
    module(seen.x)
    assert torch.equal(module.weight, before)  # not active; not training
    module.train()(seen.x)
    wanted = before.clone()
    reference.hebbian_update_(wanted, seen.x, seen.z, -0.05, stride=2, padding=1)
    torch.testing.assert_close(module.weight.detach(), wanted)
    local.remove()
    module(seen.x)
    torch.testing.assert_close(module.weight.detach(), wanted)


def test_a_sampled_step_sees_the_part_whose_turn_it_is(seen: Seen) -> None:
    module, wanted = seen.module, seen.module.weight.detach().clone()
    local = LocalLayers(module, [""], {}, Variant(sample=0.25))
    local.lr, local.active, local.turn = 0.05, frozenset([""]), 2
    module(seen.x)
    reference.hebbian_update_(wanted, seen.x[2:3], seen.z[2:3], 0.05, stride=2, padding=1)
    torch.testing.assert_close(module.weight.detach(), wanted)


def test_learning_rate_and_sign_by_epoch() -> None:
    assert [Variant(decay=2.0).lr_at(epoch) for epoch in (4, 5, 13)] == [0.01, 0.005, 0.0025]
    signs = {sign: [Variant(sign=sign).sign_at(-1, epoch) for epoch in (10, 11)] for sign in study_rules.SIGNS}
    assert signs == {"supervised": [-1, -1], "plus": [1, 1], "minus": [-1, -1], "alternating": [1, -1]}


def test_the_measured_rule_follows_the_formula() -> None:
    _, *rows = study_theory.collapse()
    for _, _, measured, formula, _, _ in rows:
        assert float(measured) == pytest.approx(float(formula), abs=0.15)
    assert float(rows[-1][2]) < 1.2 < 20 < float(rows[0][2])
    assert float(rows[-1][4]) == pytest.approx(1, abs=1e-3)
    for row in study_theory.there_and_back()[1:]:
        assert float(row[3]) <= 0.01


def test_the_papers_recipes_by_arithmetic() -> None:
    row = next(row for row in study_theory.recipes() if row[0] == "resnet18 on cifar10")
    # K = floor(90 * 2 / (0.75 * 21)) = 11, so the first move is at the end of the twelfth epoch
    spent = (10 + 2 * 0.1) / (10 * sum(0.1**k for k in range(9)))
    assert row[1:3] == ("12 of 90", f"{100 * spent:.1f} %")
    steps, ways = 50_000 // 64, 18 * 0.01 + 30 * 0.005 + 30 * 0.0025
    assert float(row[5]) == pytest.approx(steps * ways / study_theory.NORM, rel=0.01)


def test_a_run_end_to_end_and_again_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, drawn = tmp_path / "study.json", tmp_path / "study.png"
    variants = ["--variants", "sgd;frozen;literal 0.01;BN output 0.01", *SMALL, "--out", str(file)]
    assert study.main([*variants, "--budget", "-1"]) == 3
    assert study.main(variants) == 2  # the file is there
    capsys.readouterr()
    assert study.main([*variants, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert study.main(["--table", str(file), "--picture", str(drawn)]) == 0
    assert capsys.readouterr().out == printed
    assert drawn.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["start|0", "sgd|0", "frozen|0", "literal 0.01|0", "BN output 0.01|0"]
    assert all(0 <= row[key] <= 1 for name, row in rows.items() if name != "start|0" for key in ("fresh", "settled"))
    assert [epoch["boundary"] for epoch in rows["literal 0.01|0"]["epochs"]] == [4, 6]
    assert [epoch["boundary"] for epoch in rows["sgd|0"]["epochs"]] == [0, 0]
    moved = {key: rows[key]["epochs"][0]["moved"] for key in ("frozen|0", "literal 0.01|0", "sgd|0")}
    assert not any(moved["frozen|0"][:4])
    assert all(moved["frozen|0"][4:])
    assert all(moved["literal 0.01|0"])
    assert moved["literal 0.01|0"][0] <= 2 * 0.01 / 1  # two mini-batches, a norm above 1
    assert study.main([*variants, "--resume"]) == 0
    assert json.loads(file.read_text())["rows"] == rows


def row(rule: str, seed: int, accuracy: float, rank: float, **more: Any) -> dict[str, Any]:
    measures = dict.fromkeys(("norm", "top", "top_centred", "filters_top", "output_rank"), [0.5] * 4)
    epoch = {"epoch": 1, "boundary": 4, "sign": 1, "accuracy": accuracy, "moved": [0.1] * 14, "loss": 1.0}
    return {"rule": rule, "recipe": "cosine", "seed": seed, "status": "ok", **more,
            "epochs": [{**epoch, "layers": {"rank": [rank] * 4, **measures}}]}  # fmt: skip


def test_rank_norm_and_angle_epoch_by_epoch() -> None:
    rows = {"start|0": row("", 0, 0.5, 10), "literal|0": row("hebb", 0, 0.7, 8), "literal|1": row("hebb", 1, 0.7, 6)}
    rows["start|1"] = row("", 1, 0.5, 10)
    for seed in (0, 1):
        (first,) = rows[f"literal|{seed}"]["epochs"]
        layers = {**first["layers"], "rank": [2.5] * 4, "norm": [1.0] * 4, "top": [1.0, 1.0, 0.5, 0.0]}
        rows[f"literal|{seed}"]["epochs"].append({**first, "epoch": 2, "layers": layers})
    study = study_tables.Study({"rows": rows, "sizes": {"start": 1}})
    wanted = [(100, 100, 60), (70, 100, 60), (25, 200, 37.5)]  # of cosines 0.5; then of 0, 0, 60 and 90 degrees
    assert study_tables.courses(study, study.runs["literal"]) == [pytest.approx(each) for each in wanted]
    assert study_tables._courses(study)[1] == ("literal", "100, 100, 60", "70, 100, 60", "25, 200, 38")


def test_a_rule_is_compared_with_the_frozen_run_of_its_seed() -> None:
    rows = {
        "start|0": row("", 0, 0.5, 10), "start|1": row("", 1, 0.5, 10),
        "frozen|0": row("frozen", 0, 0.8, 10, fresh=0.8), "frozen|1": row("frozen", 1, 0.9, 10, fresh=0.9),
        "literal|0": row("hebb", 0, 0.7, 5, fresh=0.5), "literal|1": row("hebb", 1, 0.7, 5, fresh=0.6),
    }  # fmt: skip
    sizes = {"train": 64, "test": 32, "start": 1, "epochs": 2, "last": 10}
    about = {"cpu": "a CPU", "threads": 1, "torch": "2", "git_commit": "abc"}
    printed = study_tables.report({"rows": rows, "sizes": sizes, "environment": about})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| literal")]
    assert cells[0] == ["literal", "70.0 ± 0.0", "-15.0 ± 7.1", "-10.0 / -20.0", "-30.0 ± 0.0", "-"]
    assert cells[1][:3] == ["literal", "50", "50"]
    assert cells[3] == ["literal, 1", "+1: 1.00, 50 %"]


@pytest.mark.parametrize("wrong", [["--variants", "nope"], ["--resume"], ["--start", "0"], ["--start", "14"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(wrong)


def test_theory_needs_no_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("collapse", "minus", "there_and_back", "rules"):
        monkeypatch.setattr(study_theory, part, lambda *_: [("a", "b")])
    assert study.main(["--theory"]) == 0
    assert "resnet50 on imagenet" in capsys.readouterr().out
