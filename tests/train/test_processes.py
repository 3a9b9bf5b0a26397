"""``localsgd train`` in several processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pictures import damage, files_of_shares
from processes import distributed_test
from same_runs import assert_same_run, weights
from tiny import TINY

from localsgd_ext.distributed import check_replicas
from localsgd_ext.train import checkpoint, data, models, rundir
from localsgd_ext.train.config import RunConfig, resolve
from localsgd_ext.train.files import read_json_lines
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.processes import World
from localsgd_ext.train.progress import Silence
from localsgd_ext.train.rundir import RunDirectory, WatchedRunDirectory


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("source", ["memory", "folders"])
def test_shares_make_up_the_mini_batches_of_one_process(
    source: str, size: int, tiny: Callable[..., RunConfig], folders: Path
) -> None:
    config = tiny(train_size=60, batch_size=12, test_size=600)
    if source == "folders":
        config = config.replace(data="imagenet", root=str(folders), train_size=None, test_size=None, workers=0)
    whole = data.load(config)
    parts = [data.load(config, world=World(rank, size)) for rank in range(size)]
    assert {part.steps for part in parts} == {whole.steps}
    for epoch, batch_size in ((0, None), (1, None), (1, 24)):
        batches = list(whole.train(epoch, batch_size))
        assert len(batches) == whole.train_size // (batch_size or 12)
        for batch, *shares in zip(batches, *(part.train(epoch, batch_size) for part in parts), strict=True):
            assert {len(y) for _, y in shares} == {(batch_size or 12) // size}
            for i in (0, 1):
                assert torch.equal(torch.cat([share[i] for share in shares]), batch[i])
    tests = [torch.cat([x for x, _ in [(torch.empty(0), 0), *part.test()]]) for part in parts]
    assert sum(len(x) for x in tests) == whole.test_size
    pictures = torch.cat([x for x, _ in whole.test()])
    assert sorted(map(float, torch.cat([x.reshape(-1, pictures[0].numel()) for x in tests]).double().sum(1))) == sorted(
        map(float, pictures.flatten(1).double().sum(1))
    )


def _folders_of(root: Path, **changes: Any) -> RunConfig:
    options = {"device": "cpu", "root": str(root), "image_size": 32, "workers": 0, "batch_size": 4, "epochs": 1}
    return resolve("imagenet", "small_resnet", "sgd", **{**options, **changes})


def test_fewer_test_pictures_than_processes(folders: Path) -> None:
    parts = [data.load(_folders_of(folders, test_size=3), world=World(rank, 4)) for rank in range(4)]
    assert [[len(y) for _, y in part.test()] for part in parts] == [[1], [1], [1], []]


def test_a_share_without_a_readable_picture_is_made_up_for(folders: Path) -> None:
    """By the process's share before, or the first one after: all make as many steps, with pictures of their own shares."""
    config = _folders_of(folders)
    whole = [list(data.load(config, world=World(rank, 2)).train(0)) for rank in range(2)]
    files = files_of_shares(folders, 2)
    lost = {0: [2], 1: [0, 1, 3]}  # steps of each process
    damaged = {rank: damage(folders, *(name for step in steps for name in files[step][rank])) for rank, steps in lost.items()}
    for rank, instead in ((0, [0, 1, 1, 3, 4, 5]), (1, [2, 2, 2, 2, 4, 5])):
        part = data.load(config, world=World(rank, 2))
        for (x, y), step in zip(part.train(0), instead, strict=True):
            assert torch.equal(x, whole[rank][step][0])
            assert torch.equal(y, whole[rank][step][1])
        assert part.unreadable == damaged[rank]
        assert part.repeated == len(lost[rank])


def test_a_process_without_one_readable_picture(folders: Path) -> None:
    """It cannot train. To the test it has nothing to add."""
    config = _folders_of(folders)
    damage(folders, *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(12)))
    with pytest.raises(data.UnreadablePictures, match=r"none of the 12 pictures of the share of process 2 of 2 can be read; "):
        list(data.load(config, world=World(1, 2)).train(0))
    assert list(data.load(config.replace(test_size=2), world=World(1, 2)).test()) != []
    damage(folders, *(f"val/{name}/{i}.png" for name in ("cat", "dog") for i in range(7)))
    part = data.load(config.replace(test_size=2), world=World(1, 2))
    assert list(part.test()) == []
    assert len(part.unreadable) == 1


@distributed_test(world_size=2)
def test_the_test_pictures_of_others_count_and_none_is_an_error(folders: Path, tmp_path: Path) -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    config = _folders_of(folders, test_size=1)
    directory = RunDirectory(tmp_path / "run", config, resume=False) if world.is_first else None
    made = Trainer(config, data.load(config, world=world), directory, Silence(), world=world)  # type: ignore[arg-type]
    accuracy, _ = made.evaluate()
    assert accuracy in (0, 1)
    dist.barrier()
    if world.is_first:
        damage(folders, *(f"val/{name}/{i}.png" for name in ("cat", "dog") for i in range(7)))
    dist.barrier()
    with pytest.raises(data.UnreadablePictures, match=r"none of the 1 test pictures can be read; .*/val/.*: Unidentified"):
        made.evaluate()


@distributed_test(world_size=2)
def test_every_process_s_warnings_are_logged(tmp_path: Path) -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    made = trained(tmp_path / "run", world, "sgd", 0)
    with made._logged_warnings():
        warnings.warn("of all", UserWarning, stacklevel=1)
        for _ in range(2 * world.rank):
            warnings.warn("of one", UserWarning, stacklevel=1)
    if world.is_first:
        log = (tmp_path / "run" / rundir.LOG).read_text()
        assert log.count("warning: of all\n") == log.count("of all") == 1
        assert log.count("warning (process 2 of 2): of one\n") == log.count("of one") == 1


def test_a_batch_that_cannot_be_shared_is_refused(tiny: Callable[..., RunConfig]) -> None:
    with pytest.raises(
        ValueError, match="--batch-size must be a multiple of the number of processes, which share it: got 16 for 3"
    ):
        data.load(tiny(), world=World(0, 3))


def trained(path: Path, world: World, method: str, epochs: int, resume: bool = False, **changes: Any) -> Trainer:
    config = resolve("fake", "small_resnet", method, **{**TINY, "device": "cpu", **changes})
    directory = RunDirectory(path, config, resume=resume) if world.is_first else WatchedRunDirectory(path, config)
    trainer = Trainer(config, data.load(config, world=world), directory, Silence(), world=world)
    if resume:
        trainer.restore()
    for _ in range(epochs):
        trainer.run_epoch()
    return trainer


@pytest.mark.parametrize("method", ["sgd", "freeze", "refresh", "local"])
@distributed_test(world_size=2)
def test_processes_agree_and_resume(method: str, tmp_path: Path) -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    whole = trained(tmp_path / "whole", world, method, 4)
    assert whole.replicas is not None
    check_replicas(whole.local or whole.replicas, buffers=True)
    trained(tmp_path / "parts", world, method, 2)
    dist.barrier()
    resumed = trained(tmp_path / "parts", world, method, 2, resume=True)
    for ours, theirs in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for trainer in (whole, resumed):
        trainer.finish()
    if world.is_first:
        assert_same_run(tmp_path / "whole", tmp_path / "parts")

    # What was recorded is of all pictures, as one process finds it with the same weights.
    single = Trainer(whole.config, data.load(whole.config), WatchedRunDirectory(tmp_path, whole.config), Silence())
    single.model.load_state_dict(whole.model.state_dict())
    accuracy, loss = single.evaluate()
    assert whole.metrics[-1]["test_accuracy"] == accuracy
    assert whole.metrics[-1]["test_loss"] == pytest.approx(loss, rel=1e-5)
    if method != "sgd":
        assert whole.metrics[-1]["boundary"] > 0


@distributed_test(world_size=2)
def test_the_batch_grows_on_all_processes_and_halves_the_reductions(tmp_path: Path) -> None:
    """8 pictures of each: 16 fit from boundary 2 on, in the last two epochs."""
    world = World(dist.get_rank(), dist.get_world_size())
    options: dict[str, Any] = {"memory_budget": 3_000_000, "lr_scaling": "linear", "nan_policy": "skip", "sync": 2}
    whole = trained(tmp_path / "whole", world, "local", 4, **options)
    assert whole.local is not None
    check_replicas(whole.local, buffers=True)
    columns = {name: [entry[name] for entry in whole.metrics] for name in whole.metrics[0]}
    assert columns["boundary"] == [0, 0, 2, 2]
    assert columns["batch_size"] == [16, 16, 32, 32]
    assert columns["mini_batches"] == columns["reductions"] == [6, 6, 3, 3]
    plan = whole.local.plan
    start = plan.parameters[f"{plan.layers[2]}.weight"]
    gradients = 4 * sum(p.numel() for name, p in whole.model.named_parameters() if plan.parameters[name] >= start)
    sizes = [whole.model.get_submodule(name).weight.numel() for name in plan.layers[:2]]
    correlations = 4 * sum(size + 1 for size in sizes)  # and how often each layer ran
    # Of three mini-batches the first two together, and the third before the evaluation.
    assert columns["reduced_bytes"][2:] == [3 * gradients + 2 * correlations] * 2

    trained(tmp_path / "parts", world, "local", 3, **options)
    dist.barrier()
    resumed = trained(tmp_path / "parts", world, "local", 1, resume=True, **options)
    for trainer in (whole, resumed):
        trainer.finish()
    if world.is_first:
        assert_same_run(tmp_path / "whole", tmp_path / "parts")


@distributed_test(world_size=2)
def test_what_one_process_kept_out_is_counted_for_all(tmp_path: Path) -> None:
    """A picture of the second process's share spoils its statistics alone, and the local update and the step of both."""
    world = World(dist.get_rank(), dist.get_world_size())
    config = resolve("fake", "small_resnet", "local", **{**TINY, "device": "cpu", "nan_policy": "skip"})
    path = tmp_path / "run"
    directory = RunDirectory(path, config, resume=False) if world.is_first else WatchedRunDirectory(path, config)
    made = Trainer(config, data.load(config, world=world), directory, Silence(), world=world)
    good = made.data.train

    def train(number: int, batch_size: int | None = None) -> Iterator[data.Batch]:
        for i, (x, y) in enumerate(good(number, batch_size)):
            if (world.rank, number, i) == (1, 2, 2):
                x[0, 0, 0, 0] = float("nan")
            yield x, y

    made.data.train = train  # type: ignore[method-assign]
    entries = [made.run_epoch() for _ in range(3)]
    norms = {name: 1 for name, module in made.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert entries[1]["kept_statistics"] == {}
    assert entries[2]["kept_statistics"] == norms
    assert entries[2]["skipped_updates"] == dict.fromkeys(made.local.layers[:2], 1)
    assert entries[2]["skipped_steps"] == 1
    made.finish()


@pytest.mark.parametrize("sync", ["step", 4, "epoch"])
@distributed_test(world_size=2)
def test_sync_reaches_the_local_updates(sync: Any, tmp_path: Path) -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    made = trained(tmp_path / "run", world, "local", 3, sync=sync)
    assert made.replicas is not None
    assert made.replicas.sync == sync
    per_reduction = made.replicas.traffic.correlations // {"step": 6, 4: 2, "epoch": 1}[sync]
    assert made.local is not None
    assert per_reduction == 4 * sum(made.model.get_submodule(n).weight.numel() + 1 for n in made.local.layers[:2])


@distributed_test(world_size=2)
def test_a_directory_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    trained(tmp_path / "run", world, "sgd", 1)
    dist.barrier()
    elsewhere = tmp_path / ("run" if world.is_first else "another machine's")
    elsewhere.mkdir(exist_ok=True)
    with pytest.raises(
        checkpoint.CheckpointError, match="same directory for all processes; their checkpoints are of epochs 1, 0"
    ):
        trained(elsewhere, world, "sgd", 0, resume=True)


class InDouble(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def without_batch_norm(num_classes: int) -> torch.nn.Module:
    """BatchNorm's statistics are of a process's share, and those of another number of processes are others."""
    layers: list[torch.nn.Module] = [InDouble()]
    for channels in (3, 6, 6, 6, 6, 6):
        layers += [torch.nn.Conv2d(channels, 6, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(6 * 8 * 8, num_classes)).double()


@distributed_test()
def go_on(path: Path, method: str, epochs: int, resume: bool, world_size: int) -> None:
    part_of_a_run(path, method, epochs, resume, World(dist.get_rank(), world_size))


def part_of_a_run(path: Path, method: str, epochs: int, resume: bool, world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small_resnet", without_batch_norm)
        made = trained(path, world, method, epochs, resume=resume, local_lr=0.01, weight_decay=0.0)
        if made.done:
            made.finish()
    if world.size > 1:
        dist.barrier()
    made.directory.close()


@pytest.mark.parametrize("method", ["local", "freeze"])
def test_a_run_goes_on_in_another_number_of_processes(method: str, tmp_path: Path) -> None:
    """To the same end, but for the order in which sums are rounded."""
    part_of_a_run(tmp_path / "whole", method, 4, False, World())
    go_on(path=tmp_path / "parts", method=method, epochs=1, resume=False, world_size=2)
    part_of_a_run(tmp_path / "parts", method, 2, True, World())
    go_on(path=tmp_path / "parts", method=method, epochs=1, resume=True, world_size=4)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-9, atol=1e-11)
    entries = [read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert entries[0][-1]["boundary"] > 0
    for one, other in zip(*entries, strict=True):
        for name in ("epoch", "boundary", "batch_size", "mini_batches", "test_accuracy", "lr", "local_lr", "multiply_adds"):
            assert one[name] == other[name], name
        for name in ("train_loss", "test_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-6)
