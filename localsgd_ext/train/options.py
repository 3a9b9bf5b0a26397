"""The options of ``localsgd train``; ``localsgd compare`` shares all but ``--method`` and ``--sync``. ``None`` means "not given" throughout."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from localsgd_ext.batch_growth import LR_SCALINGS
from localsgd_ext.freezing import BN_STATS
from localsgd_ext.nonfinite import NAN_POLICIES
from localsgd_ext.reduction import Sync
from localsgd_ext.train.config import AMP, DATA_SETS, LR_SCHEDULES, METHODS, SCHEDULES, SUPERVISIONS
from localsgd_ext.train.models import MODELS

_TRAINING, _LOCAL, _BASELINES = "Training", "Localized learning", "Other methods"
_DATA, _MACHINE, _PROCESSES = "Data", "Machine", "Faults, memory and several processes"


def _listed(values: tuple[str, ...] | dict[str, object]) -> str:
    return ", ".join(values)


DataSet = Annotated[str | None, typer.Option(help=f"Data set: {_listed(DATA_SETS)}.")]
Model = Annotated[
    str | None, typer.Option(help=f"Network: {', '.join(MODELS)}, or timm:NAME (default: one that suits the data).")
]
Method = Annotated[
    str | None,
    typer.Option(
        help=f"{_listed(METHODS)}: freeze leaves the prefix as it is, refresh trains it with one in 4 mini-batches, local by the "
        "Hebbian rule; stochastic-depth leaves out residual branches, prunetrain removes channels "
        "(default: freeze; with --preset paper: local)."
    ),
]
Preset = Annotated[
    str | None, typer.Option(help="paper: section 6.1's values for this data set and network; options override.")
]
Out = Annotated[Path | None, typer.Option(help="Directory of the run; must be new or empty (default: under runs/).")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit, from its last epoch.")]
Seed = Annotated[int | None, typer.Option(help="First weights, order of the data, augmentation.")]

Epochs = Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)]
BatchSize = Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)]
Lr = Annotated[float | None, typer.Option(help="Learning rate of SGD.", rich_help_panel=_TRAINING)]
Momentum = Annotated[float | None, typer.Option(rich_help_panel=_TRAINING)]
WeightDecay = Annotated[float | None, typer.Option(rich_help_panel=_TRAINING)]
LrSchedule = Annotated[str | None, typer.Option(help=_listed(LR_SCHEDULES) + ".", rich_help_panel=_TRAINING)]
LrStep = Annotated[int | None, typer.Option(help="Epochs between decays (step).", rich_help_panel=_TRAINING)]
LrGamma = Annotated[float | None, typer.Option(help="Factor of a decay (step).", rich_help_panel=_TRAINING)]

LocalLr = Annotated[
    float | None, typer.Option(help="Length of a local step; default 1e-4, paper 0.01.", rich_help_panel=_LOCAL)
]
LocalLrDecay = Annotated[float | None, typer.Option(help="Divisor of the local learning rate.", rich_help_panel=_LOCAL)]
LocalLrDecayEvery = Annotated[int | None, typer.Option(help="Epochs between its decays.", rich_help_panel=_LOCAL)]
Alpha = Annotated[
    float | None, typer.Option(help="The boundary moves once updates fall below this share.", rich_help_panel=_LOCAL)
]
MinLossDrop = Annotated[
    float | None,
    typer.Option(
        help="Share of the first epoch's loss by which it must fall before the boundary leaves 0 (default: 0.1; "
        "0 for local-paper and --preset paper).",
        rich_help_panel=_LOCAL,
    ),
]
LMax = Annotated[float | None, typer.Option(help="Largest share of layers in the prefix.", rich_help_panel=_LOCAL)]
TShift = Annotated[
    str | None, typer.Option(help="Layers per move, a fraction of the depth, or auto (one block).", rich_help_panel=_LOCAL)
]
Schedule = Annotated[str | None, typer.Option(help=_listed(SCHEDULES) + ".", rich_help_panel=_LOCAL)]
Supervision = Annotated[str | None, typer.Option(help=_listed(SUPERVISIONS) + ".", rich_help_panel=_LOCAL)]
Sample = Annotated[
    float | None, typer.Option(help="Fraction of each mini-batch that local updates use, in turn.", rich_help_panel=_LOCAL)
]
Refresh = Annotated[
    int | None,
    typer.Option(help="One in every so many mini-batches goes through the prefix; 0: none.", rich_help_panel=_LOCAL),
]
BnStats = Annotated[
    str | None,
    typer.Option(
        help=f"{_listed(BN_STATS)}: whether the prefix's normalisation goes on following the data, or keeps its running statistics, "
        "or does so as a part of the layers before it, in less time (not with local updates).",
        rich_help_panel=_LOCAL,
    ),
]

Survival = Annotated[
    float | None,
    typer.Option(help="stochastic-depth: how often the last residual branch is kept.", rich_help_panel=_BASELINES),
]
LassoRatio = Annotated[
    float | None,
    typer.Option(help="prunetrain: the group lasso's share of the first mini-batch's loss.", rich_help_panel=_BASELINES),
]
ReconfigureEvery = Annotated[
    int | None,
    typer.Option(
        help="prunetrain: epochs after which empty channels are removed (default: a ninth of all).", rich_help_panel=_BASELINES
    ),
]

Root = Annotated[str | None, typer.Option(help="Where cifar10, cifar100 or imagenet lie.", rich_help_panel=_DATA)]
TrainSize = Annotated[int | None, typer.Option(help="Training pictures.", rich_help_panel=_DATA)]
TestSize = Annotated[int | None, typer.Option(help="Test pictures.", rich_help_panel=_DATA)]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels (digits, fake, imagenet).", rich_help_panel=_DATA)]
Workers = Annotated[int | None, typer.Option(help="Processes that read imagenet.", rich_help_panel=_DATA)]
BadImages = Annotated[
    str | None,
    typer.Option(
        help="Pictures of imagenet that cannot be decoded: report leaves them out, counts and names them; raise ends the run. Of "
        "several processes one whose share of a mini-batch has no other pictures repeats its share of another mini-batch.",
        rich_help_panel=_DATA,
    ),
]

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda if there is one).", rich_help_panel=_MACHINE)
]
ChannelsLast = Annotated[bool | None, typer.Option("--channels-last/--no-channels-last", rich_help_panel=_MACHINE)]
Amp = Annotated[str | None, typer.Option(help="Autocast: " + _listed(AMP) + ".", rich_help_panel=_MACHINE)]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="Bitwise reproducible on a GPU too (slower); a CPU is so anyway.",
        rich_help_panel=_MACHINE,
    ),
]


NanPolicy = Annotated[
    str | None,
    typer.Option(
        help=f"{_listed(NAN_POLICIES)}: what a mini-batch with NaN or infinity may do. report: what it spoils is named at the end of "
        "the epoch; skip: it is kept out of weights and statistics; raise: the run ends.",
        rich_help_panel=_PROCESSES,
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        help="What a step may take on each device, such as 10GiB: the batch doubles at the end of an epoch where that fits. On a "
        "GPU by the peaks of the steps, on a CPU by what they save for the backward pass, parameters, gradients and momentum.",
        rich_help_panel=_PROCESSES,
    ),
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(help="The batch grows no further (default: to all training pictures).", rich_help_panel=_PROCESSES),
]
LrScaling = Annotated[
    str | None,
    typer.Option(
        help=f"{_listed(LR_SCALINGS)}: what the learning rate of SGD is multiplied by where the batch doubles, 1, 2 or 1.41.",
        rich_help_panel=_PROCESSES,
    ),
]
SyncOption = Annotated[
    str | None,
    typer.Option(
        "--sync",
        help="Under torchrun, when local updates are summed over the processes: step, a number of mini-batches, or epoch.",
        rich_help_panel=_PROCESSES,
    ),
]

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}


def parse_bytes(text: str) -> int:
    """``10GiB``, ``512 MB``, ``1.5e9`` as bytes, rounded down.

    Raises:
        ValueError: anything else, a bare ``10G`` too, which means 1000s to some and 1024s to others; or less than a byte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([a-z]*)\s*", text.lower()) if text.isascii() else None
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            "--memory-budget must be a number of bytes, with a unit or without, such as 10GiB "
            f"(B; kB, MB, GB, TB: 1000s; KiB, MiB, GiB, TiB: 1024s), got {text!r}"
        )
    count = int(Fraction(match[1]) * _UNITS[match[2]])
    if count < 1:
        raise ValueError(f"--memory-budget must be at least one byte, got {text!r}")
    return count


def parse_sync(text: str) -> Sync:
    """``step``, ``epoch`` or a whole number; what else there is, is refused where the run is put together."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def parse_t_shift(text: str | None) -> int | float | str | None:
    """``auto``, a whole number of layers, or a fraction of the depth. Raises ``ValueError`` for anything else."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--t-shift must be auto, a number of layers or a fraction of the depth, got {text!r}") from None
