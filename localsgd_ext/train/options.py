"""The options that ``localsgd train`` and ``localsgd compare`` share. ``None`` means "not given" throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localsgd_ext.train.config import AMP, DATA_SETS, LR_SCHEDULES, METHODS, SCHEDULES, SUPERVISIONS
from localsgd_ext.train.models import MODELS

_TRAINING, _LOCAL, _BASELINES = "Training", "Localized learning", "Other methods"
_DATA, _MACHINE = "Data", "Machine"


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
        "Hebbian rule; stochastic-depth leaves out residual branches, prunetrain removes channels."
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
        help="Pictures of imagenet that cannot be decoded: leave them out and report them, or raise an error.",
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
