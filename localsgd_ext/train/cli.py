"""The commands of ``localsgd``."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from localsgd_ext.train import archives, models, processes, progress, prunetrain, report, rundir
from localsgd_ext.train import compare as comparing
from localsgd_ext.train import data as data_sets
from localsgd_ext.train import options as o
from localsgd_ext.train.checkpoint import CheckpointError
from localsgd_ext.train.config import DATA_SETS, RunConfig, resolve
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.presets import DEFAULT_MODELS
from localsgd_ext.train.processes import ALONE, World

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train networks with LoCal+SGD: a growing prefix does without back-propagation, the rest learns by SGD.",
)

_PARSED: dict[str, Callable[[str], Any]] = {
    "t_shift": o.parse_t_shift,
    "memory_budget": o.parse_bytes,
    "sync": o.parse_sync,
}

# A full disk or quota, a file size limit; no permission, a read-only file system; a failing disk, a path that is wrong.
_DISK_TROUBLES = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}


@app.command()
def train(
    data: o.DataSet = None,
    model: o.Model = None,
    method: o.Method = None,
    preset: o.Preset = None,
    out: o.Out = None,
    resume: o.Resume = False,
    seed: o.Seed = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    momentum: o.Momentum = None,
    weight_decay: o.WeightDecay = None,
    lr_schedule: o.LrSchedule = None,
    lr_step: o.LrStep = None,
    lr_gamma: o.LrGamma = None,
    local_lr: o.LocalLr = None,
    local_lr_decay: o.LocalLrDecay = None,
    local_lr_decay_every: o.LocalLrDecayEvery = None,
    alpha: o.Alpha = None,
    min_loss_drop: o.MinLossDrop = None,
    l_max: o.LMax = None,
    t_shift: o.TShift = None,
    schedule: o.Schedule = None,
    supervision: o.Supervision = None,
    sample: o.Sample = None,
    refresh: o.Refresh = None,
    bn_stats: o.BnStats = None,
    survival: o.Survival = None,
    lasso_ratio: o.LassoRatio = None,
    reconfigure_every: o.ReconfigureEvery = None,
    root: o.Root = None,
    train_size: o.TrainSize = None,
    test_size: o.TestSize = None,
    image_size: o.ImageSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    device: o.Device = None,
    channels_last: o.ChannelsLast = None,
    amp: o.Amp = None,
    deterministic: o.Deterministic = None,
    nan_policy: o.NanPolicy = None,
    memory_budget: o.MemoryBudget = None,
    max_batch_size: o.MaxBatchSize = None,
    lr_scaling: o.LrScaling = None,
    sync: o.SyncOption = None,
) -> None:
    """Train one network with one method; under torchrun in several processes, which share every mini-batch."""
    flags = _given(locals(), leave_out=("out", "resume"))
    with processes.started() as world:
        _train(flags, out, resume, world)


def _train(flags: dict[str, Any], out: Path | None, resume: bool, world: World) -> None:
    console = Console(quiet=not world.is_first)
    with _clear_errors(world):
        flags = _parsed(flags)
        if resume:
            out = _require_out(out)
            config = rundir.read_config(out).replace(**flags)
            processes.check(config, world)
        else:
            flags.setdefault("method", "local" if flags.get("preset") == "paper" else "freeze")
            config = _new_config(flags)
            out = out or Path("runs") / f"{config.data}-{_file_name(config.model)}-{config.method}-seed{config.seed}"
            processes.check(config, world)
            # Started again by torchrun, with the command of the first time, after a failure or because nodes came: the run goes on.
            resume = world.from_first(world.is_first and rundir.launched_by(out, world.launch))
            if world.is_first and not resume:
                rundir.require_empty(out)
        _check_machine(config)
        with world.first_goes_ahead():
            loaded = data_sets.load(config, console.print, world)
            if world.is_first:
                directory = rundir.RunDirectory(out, config, resume=resume, launch=world.launch)
            else:
                directory = rundir.WatchedRunDirectory(out, config)
        to_do = (config.epochs - rundir.epochs_done(out)) * loaded.steps * config.batch_size
    with _interruptible(out, world), progress.choose(to_do, console) if world.is_first else progress.Silence() as display:
        with _clear_errors(world):
            trainer = Trainer(config, loaded, directory, display, world=world)
            if resume:
                trainer.restore()
        while not trainer.done:
            trainer.run_epoch()
        trainer.finish()
    if world.is_first:
        with _clear_errors(world), _interruptible(out, world):
            summary = report.write([report.read_run(out)], out)
        report.show(summary, console)
        console.print(f"Everything is in {out}", soft_wrap=True)


@app.command()
def compare(
    data: o.DataSet = None,
    model: o.Model = None,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated (default: sgd,freeze,refresh,local).")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, from --seed upwards (default: 1).")] = None,
    preset: o.Preset = None,
    out: o.Out = None,
    resume: o.Resume = False,
    seed: o.Seed = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    momentum: o.Momentum = None,
    weight_decay: o.WeightDecay = None,
    lr_schedule: o.LrSchedule = None,
    lr_step: o.LrStep = None,
    lr_gamma: o.LrGamma = None,
    local_lr: o.LocalLr = None,
    local_lr_decay: o.LocalLrDecay = None,
    local_lr_decay_every: o.LocalLrDecayEvery = None,
    alpha: o.Alpha = None,
    min_loss_drop: o.MinLossDrop = None,
    l_max: o.LMax = None,
    t_shift: o.TShift = None,
    schedule: o.Schedule = None,
    supervision: o.Supervision = None,
    sample: o.Sample = None,
    refresh: o.Refresh = None,
    bn_stats: o.BnStats = None,
    survival: o.Survival = None,
    lasso_ratio: o.LassoRatio = None,
    reconfigure_every: o.ReconfigureEvery = None,
    root: o.Root = None,
    train_size: o.TrainSize = None,
    test_size: o.TestSize = None,
    image_size: o.ImageSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    device: o.Device = None,
    channels_last: o.ChannelsLast = None,
    amp: o.Amp = None,
    deterministic: o.Deterministic = None,
    nan_policy: o.NanPolicy = None,
    memory_budget: o.MemoryBudget = None,
    max_batch_size: o.MaxBatchSize = None,
    lr_scaling: o.LrScaling = None,
) -> None:
    """Train with several methods in turn, from the same first weights on the same data, and draw up a table and a picture."""
    flags = _given(locals(), leave_out=("out", "resume", "methods", "seeds"))
    console = Console()
    with processes.started() as world, _clear_errors(world):
        if world.size > 1:
            raise ValueError(f"compare runs in one process, got {world.size}: use localsgd train for each method")
        flags = _parsed(flags)
        if resume:
            out = _require_out(out)
            comparison = comparing.resumed(out, comparing.parse_methods(methods) if methods is not None else None, seeds, flags)
        else:
            names = comparing.parse_methods(methods if methods is not None else "sgd,freeze,refresh,local")
            configs = {name: _new_config({**comparing.options_for(name, names, flags), "method": name}) for name in names}
            first_seed = flags.get("seed", 0)
            comparison = comparing.Comparison(configs, tuple(range(first_seed, first_seed + (1 if seeds is None else seeds))))
            out = out or Path("runs") / f"compare-{comparison.first.data}-{_file_name(comparison.first.model)}"
        for config in comparison.configs.values():
            _check_machine(config)
        loaded = comparing.start(comparison, out, console.print, resume=resume)
        if (said := comparing.left_out(comparison)) is not None:
            console.print(said, highlight=False, soft_wrap=True)
    with _interruptible(out):
        comparing.run(comparison, out, loaded, lambda total: progress.choose(total, console))
    with _clear_errors(), _interruptible(out):
        summary = report.write(comparing.runs(out), out)
    report.show(summary, console)
    console.print(f"Table and picture are in {out}", soft_wrap=True)


@app.command("report")
def report_command(
    directory: Annotated[Path, typer.Argument(help="Directory of a run or of a comparison.")],
) -> None:
    """Rebuild table and pictures from the JSON files of a run or a comparison."""
    console = Console()
    with _clear_errors():
        if (directory / comparing.PLAN).exists():
            runs = comparing.runs(directory)
            if not runs:
                raise ValueError(f"{directory}: no run of this comparison is finished; continue it with --resume")
        else:
            runs = [report.read_run(directory)]
        summary = report.write(runs, directory)
    report.show(summary, console)


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(help="A tar or zip archive.")],
    folder: Annotated[Path, typer.Argument(help="Where to: a new or empty folder.")],
) -> None:
    """Unpack a data set's archive; one that holds links, or names that lead out of the folder, is refused."""
    with _clear_errors():
        files = archives.unpack(archive, folder)
    Console().print(f"{files} files are in {folder}", soft_wrap=True)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(context: typer.Context) -> None:
    """Say what is installed and compiled, test it, and say what is missing."""
    from localsgd_ext import doctor as doctor_module

    raise typer.Exit(doctor_module.main(context.args))


def _given(arguments: dict[str, Any], leave_out: tuple[str, ...]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in arguments.items() if value is not None and name not in leave_out}


def _parsed(flags: dict[str, Any]) -> dict[str, Any]:
    """``flags`` with the values of those that are of several kinds."""
    return flags | {name: _PARSED[name](flags[name]) for name in _PARSED.keys() & flags.keys()}


def _new_config(flags: dict[str, Any]) -> RunConfig:
    if "data" not in flags:
        raise ValueError(f"--data is required: one of {', '.join(DATA_SETS)}")
    flags = {"device": "cuda" if torch.cuda.is_available() else "cpu", **flags}
    model = flags.pop("model", None) or DEFAULT_MODELS.get(flags["data"], "small_resnet")
    return resolve(flags.pop("data"), model, flags.pop("method"), flags.pop("preset", None), **flags)


def _check_machine(config: RunConfig) -> None:
    models.check_name(config.model)
    if config.method == "prunetrain":
        prunetrain.check_installed()
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {config.device} cannot be used here: {reason}") from None


def _require_out(out: Path | None) -> Path:
    if out is None:
        raise ValueError("--resume needs --out, the directory of the run to continue")
    return out


def _file_name(model: str) -> str:
    return model.replace(":", "-").replace("/", "-")


@contextlib.contextmanager
def _clear_errors(world: World = ALONE) -> Iterator[None]:
    """The user's mistakes end in one message, whichever processes find them; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        raise _failed(str(error), world) from None
    except OSError as error:
        raise _failed(_disk_trouble(error), world) from None


@contextlib.contextmanager
def _interruptible(out: Path, world: World = ALONE) -> Iterator[None]:
    """What ends a run that can go on ends in one message that says how."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True, quiet=not world.is_first).print(f"Interrupted. Continue with --resume --out {out}", soft_wrap=True)
        raise typer.Exit(130) from None
    except (data_sets.UnreadablePictures, comparing.RunRefused, CheckpointError) as error:
        raise _failed(str(error), world) from None
    except FloatingPointError as error:  # --nan-policy raise
        raise _failed(f"{error}. The epochs before are saved: --resume --out {out} repeats this one", world) from None
    except OSError as error:
        trouble = _disk_trouble(error)
        raise _failed(
            f"{trouble}. What was saved before is whole; when that is put right, continue with --resume --out {out}", world
        ) from None


def _disk_trouble(error: OSError) -> str:
    """What the system refused and for which file. Raises ``error`` again if it is not about writing or reading files."""
    if error.errno not in _DISK_TROUBLES or error.filename is None:
        raise error
    return f"{error.strerror}: {error.filename}"


def _failed(message: str, world: World) -> typer.Exit:
    """Says why the processes end, once for all that have the same reason."""
    words = world.last_words(message)
    if words is not None:
        Console(stderr=True).print(f"Error: {words}", style="red", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(2)
