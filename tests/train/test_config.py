from __future__ import annotations

from typing import Any

import pytest

from localsgd_ext.train.config import RunConfig, differences, resolve
from localsgd_ext.train.options import parse_bytes, parse_sync, parse_t_shift


def _config(**flags: Any) -> RunConfig:
    return resolve("fake", "small_resnet", flags.pop("method", "local"), **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"method": "hebb"},
            "--method must be one of sgd, freeze, refresh, local, local-paper, stochastic-depth, prunetrain, got 'hebb'",
        ),
        ({"lr_schedule": "linear"}, "--lr-schedule must be one of step, cosine, constant, got 'linear'"),
        ({"preset": "nature"}, "--preset must be paper, got 'nature'"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": -0.1}, "--lr must be positive, got -0.1"),
        ({"lr": float("nan")}, "--lr must be positive, got nan"),
        ({"momentum": 1.0}, r"--momentum must be in \[0, 1\), got 1.0"),
        ({"l_max": 1.5}, r"--l-max must be in \(0, 1\), got 1.5"),
        ({"sample": 0.0}, r"--sample must be in \(0, 1\], got 0.0"),
        ({"lasso_ratio": 1.0}, r"--lasso-ratio must be in \(0, 1\), got 1.0"),
        ({"reconfigure_every": 0}, "--reconfigure-every must be at least 1, got 0"),
        ({"survival": 0.0}, r"--survival must be in \(0, 1\], got 0.0"),
        ({"t_shift": 0}, "--t-shift must be positive, got 0"),
        ({"train_size": 0}, "--train-size must be at least 1, got 0"),
        ({"bn_stats": "keep"}, "--bn-stats must be one of update, freeze, fold, got 'keep'"),
        (
            {"method": "local", "bn_stats": "fold"},
            "--bn-stats fold needs a prefix that makes no local updates: .*; got --method local",
        ),
        ({"nan_policy": "ignore"}, "--nan-policy must be one of report, skip, raise, got 'ignore'"),
        (
            {"method": "sgd", "nan_policy": "skip"},
            "--nan-policy skip needs one of the methods freeze, refresh, .*; got --method sgd",
        ),
        ({"method": "sgd", "refresh": 4}, "--refresh 4 needs one of the methods freeze, refresh, .*; got --method sgd"),
        (
            {"method": "prunetrain", "bn_stats": "freeze"},
            "--bn-stats freeze needs one of the methods .*; got --method prunetrain",
        ),
        ({"memory_budget": 0}, "--memory-budget must be a whole number of bytes, at least 1, got 0"),
        ({"memory_budget": 1.5}, r"--memory-budget must be a whole number of bytes, at least 1, got 1\.5"),
        ({"method": "sgd", "memory_budget": 1}, "--memory-budget needs one of the methods freeze, .*; got --method sgd"),
        ({"lr_scaling": "linear"}, "--lr-scaling linear needs --memory-budget, without which the batch does not grow"),
        ({"lr_scaling": "double", "memory_budget": 1}, "--lr-scaling must be one of none, linear, sqrt, got 'double'"),
        ({"max_batch_size": 64}, "--max-batch-size 64 needs --memory-budget"),
        ({"max_batch_size": 31, "memory_budget": 1}, "--max-batch-size must be at least --batch-size 32, got 31"),
        ({"sync": "week"}, "--sync must be step, epoch or a number of mini-batches, at least 1, got week"),
        ({"sync": 0}, "--sync must be step, epoch or a number of mini-batches, at least 1, got 0"),
        (
            {"method": "freeze", "sync": 4},
            "--sync 4 says when local updates are summed .*, for --method local or local-paper; got --method freeze",
        ),
        ({"amp": "fp16"}, "--amp fp16 needs a CUDA device, got --device cpu"),
    ],
)
def test_a_wrong_option_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**flags)


def test_json_round_trip() -> None:
    config = _config(t_shift=0.1, preset=None, seed=3)
    assert RunConfig.from_json(config.to_json()) == config


def test_json_of_something_else() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\], missing fields \['alpha', "):
        RunConfig.from_json({"colour": "red"})


def test_differences_leave_out_what_does_not_matter() -> None:
    config = _config()
    assert differences(config, config.replace(root="/elsewhere", workers=0)) == []
    assert differences(config, config.replace(lr=0.5, batch_size=8)) == ["--batch-size: 32 -> 8", "--lr: 0.01 -> 0.5"]


def test_t_shift() -> None:
    assert [parse_t_shift(text) for text in (None, "auto", "3", "0.1")] == [None, "auto", 3, 0.1]
    assert isinstance(parse_t_shift("3"), int)
    with pytest.raises(ValueError, match="--t-shift must be auto, a number of layers or a fraction of the depth, got 'many'"):
        parse_t_shift("many")


def test_bytes() -> None:
    texts = ("1", "10B", "2kB", "2KiB", "1.5 MB", "10gib", "1e9", " 3 TB ", "0.001kB", "9007199254740993")
    sizes = [1, 10, 2000, 2048, 1_500_000, 10 * 2**30, 10**9, 3 * 10**12, 1, 2**53 + 1]
    assert [parse_bytes(text) for text in texts] == sizes
    for text in ("0", "0.4", "0.0004 kB"):
        with pytest.raises(ValueError, match=f"--memory-budget must be at least one byte, got '{text}'"):
            parse_bytes(text)
    for text in (
        "",
        "much",
        "GiB",
        "-1",
        "1 GB more",
        "10 G",
        "10g",
        "nan",
        "inf",
        "1e400",
        "\N{ARABIC-INDIC DIGIT THREE}",
        "1\N{KELVIN SIGN}iB",
    ):
        with pytest.raises(
            ValueError,
            match=r"--memory-budget must be a number of bytes, .* \(B; kB, MB, GB, TB: 1000s; KiB, MiB, GiB, TiB: 1024s\), got",
        ):
            parse_bytes(text)


def test_sync() -> None:
    assert [parse_sync(text) for text in ("step", "epoch", "4", "-1", "4.5")] == ["step", "epoch", 4, -1, "4.5"]


def test_the_other_methods_have_their_papers_values_in_the_papers_runs() -> None:
    short, long = resolve("glyphs", "small_resnet", "prunetrain"), resolve("cifar10", "resnet18", "prunetrain", "paper")
    assert (short.survival, short.lasso_ratio, short.reconfigure_every) == (0.8, 0.5, 1)
    assert (long.survival, long.lasso_ratio, long.reconfigure_every) == (0.5, 0.2, 10)
    assert resolve("cifar10", "resnet18", "stochastic-depth", "paper", survival=0.9).survival == 0.9
