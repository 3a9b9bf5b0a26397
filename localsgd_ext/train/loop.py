"""One training run, epoch by epoch: plain PyTorch, with :class:`LocalizedLearning` plugged in as a user would."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localsgd_ext import trace_layers
from localsgd_ext.distributed import ReplicatedModel, Traffic
from localsgd_ext.train import assembly, checkpoint, models, processes, prunetrain
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.cost import Cost, DroppedBranches, whole_cost
from localsgd_ext.train.data import Data, UnreadablePictures, derive_seed
from localsgd_ext.train.files import write_atomically, write_json
from localsgd_ext.train.growing import MiniBatch
from localsgd_ext.train.measure import PhaseTimer
from localsgd_ext.train.processes import ALONE, World
from localsgd_ext.train.progress import Progress
from localsgd_ext.train.prunetrain import GroupLasso
from localsgd_ext.train.rundir import SUMMARY, RunDirectory
from localsgd_ext.train.stochastic_depth import ResidualBranches

_NAMED = 5  # pictures on the screen; the log has all
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A network, its optimizer and what it learned so far; :meth:`run_epoch` goes one epoch further and saves it.

    Every random number follows from ``(seed, epoch)``: runs of one seed share their first weights, the order of the data
    and its augmentation, may be interleaved in one process, and a resumed run needs no generator's state.

    Of the processes of a ``world`` each has a trainer, and all call the same methods; the first one writes. ``among_others``: other
    trainers of this process are on the device.

    Raises:
        ValueError: the run cannot be made by so many processes, or the network cannot be trained by the method.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        directory: RunDirectory,
        progress: Progress,
        label: str = "",
        world: World = ALONE,
        among_others: bool = False,
    ) -> None:
        self.config, self.data, self.directory, self.progress, self.label = config, data, directory, progress, label
        self.world = world
        self.epoch = 0
        self.metrics: list[dict[str, Any]] = []
        self._logged: set[str] = set()  # unreadable pictures
        processes.check(config, world)
        self._device = torch.device(config.device)
        assembly.set_determinism(config, self._device)
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = models.build(config.model, data.num_classes, config.seed).to(self._device)
        self.model = self.model.to(memory_format=self._layout)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.replicas = ReplicatedModel(self.model, sync=config.sync) if world.size > 1 else None
        self._scheduler = assembly.lr_scheduler(self.optimizer, config)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.amp == "fp16")
        self._example = self._pictures(2)
        with self._logged_warnings():
            self.local = assembly.localized_learning(config, self.replicas or self.model, self.optimizer, self._boundary_moved)
            self.num_layers = len(self.local.trace(self._example) if self.local else trace_layers(self.model, self._example))
        self.batch = MiniBatch(
            config,
            self.local,
            self._scheduler,
            self._pictures(config.batch_size // world.size),
            data.train_size,
            world,
            count_saved=among_others,
        )
        if self.batch.grows and config.refresh:
            self.say(
                "warning: with --refresh the batch grows only where SGD's could: a refresh needs its memory at every boundary"
            )
        self.dropped: DroppedBranches | None = None
        if config.method == "stochastic-depth":
            with self._autocast():
                whole = whole_cost(self.model, self._pictures(config.batch_size))
            self.dropped = DroppedBranches(ResidualBranches(self.model, config.survival), whole)
        self.lasso = GroupLasso(self.model, config.lasso_ratio) if config.method == "prunetrain" else None

    @property
    def done(self) -> bool:
        return self.epoch >= self.config.epochs

    def say(self, line: str) -> None:
        """To the log and the screen."""
        self.directory.log(line)
        self.progress.say(f"{self.label} {line}".strip())

    def warm_up(self) -> None:
        """One step on a copy that is thrown away, so that the first run timed does not pay for starting the libraries."""
        model = copy.deepcopy(self.model).train()
        with torch.random.fork_rng(), self._autocast():
            model(self._pictures(self.config.batch_size)).sum().backward()

    def run_epoch(self) -> dict[str, Any]:
        """Train for an epoch, evaluate, record and save. Returns what was measured (see ``metrics.jsonl``)."""
        config, number = self.config, self.epoch + 1
        others = (self.world.rank,) if self.world.rank else ()  # so that dropout differs from share to share
        assembly.seed_everything(derive_seed(config.seed, self.epoch, 1, *others))
        self.data.unreadable.clear()
        self.data.repeated = 0
        self.progress.begin(f"{self.label} epoch {number}/{config.epochs}".strip())
        boundary = self.local.boundary if self.local else 0
        lr = self._scheduler.get_last_lr()[0]
        size, parameters = self.batch.size, _size(self.model)
        local_lr = self.local.sign * self.local.current_lr if self.local and self.local.rule == "hebbian" else None

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.batch.begin_epoch()
        before = self.replicas.traffic if self.replicas else Traffic()
        start = time.perf_counter()
        loss, timer, cost = self._train()
        nonfinite = self._nonfinite()
        self._end_of_epoch(loss)
        self._scheduler.step()
        if self.lasso and number % config.reconfigure_every == 0:
            self._reconfigure()
        seconds = time.perf_counter() - start  # everything that training costs; evaluation and saving are not in it
        test_accuracy, test_loss = self.evaluate()
        traffic = self.replicas.traffic if self.replicas else Traffic()
        everyones = self.world.gather((self.data.unreadable, self.data.repeated))
        unreadable = {path: why for of_one, _ in everyones for path, why in of_one.items()}
        repeated = sum(of_one for _, of_one in everyones)

        steps = self.data.train_size // size
        images = steps * size
        # What larger mini-batches leave out counts as done, or the time left would be that of more pictures than there are.
        self.progress.advance(self.data.steps * config.batch_size - images)
        elapsed = (self.metrics[-1]["elapsed_train_seconds"] if self.metrics else 0.0) + seconds
        entry = {
            "epoch": number,
            "boundary": boundary,
            "num_layers": self.num_layers,
            "batch_size": size,
            "mini_batches": steps,
            "train_images": self.data.train_size,
            "test_images": self.data.test_size,
            "train_loss": _finite(loss),
            "test_loss": _finite(test_loss),
            "test_accuracy": test_accuracy,
            "train_seconds": seconds,
            "elapsed_train_seconds": elapsed,
            "images_per_second": images / seconds,
            "step_ms": timer.medians(),
            "saved_activation_bytes": cost.saved_bytes,
            "multiply_adds": cost.multiply_adds * self.world.size,
            "parameters": parameters,
            "peak_device_bytes": self.batch.peak_device_bytes(self._device),
            "predicted_bytes": self.batch.predicted_bytes,
            "reductions": traffic.steps - before.steps,
            "reduced_bytes": traffic.gradients + traffic.correlations - before.gradients - before.correlations,
            "lr": lr,
            "local_lr": local_lr,
            **nonfinite,
            "unreadable_images": len(unreadable),
        }
        if unreadable:
            self.say(f"epoch {number}: {_unreadable(unreadable, repeated)}")
            if len(unreadable) > _NAMED:
                for path in sorted(unreadable.keys() - self._logged):
                    self.directory.log(f"{path} could not be read: {unreadable[path]}")
            self._logged |= unreadable.keys()
        if not math.isfinite(loss):
            self.say(f"epoch {number}: the training loss is not finite ({loss}); a smaller --lr or --local-lr may help")
        self.epoch = number
        self.metrics.append(entry)
        self.directory.add_metrics(entry)  # before the checkpoint: a resumed run forgets entries, it cannot invent them
        self.save()
        line = (
            f"epoch {number}/{config.epochs}  loss {loss:.4f}  accuracy {100 * test_accuracy:.2f} %  "
            f"prefix {boundary}/{self.num_layers}  "
            f"{f'batch {size}  ' if self.batch.grows else ''}{images / seconds:.0f} images/s  "
            f"saved {cost.saved_bytes / 2**20:.1f} MiB"
        )
        self.directory.log(line)
        self.progress.end(f"{self.label}  {line}".strip())
        return entry

    def _nonfinite(self) -> dict[str, Any]:
        """What NaN and infinity cost in the epoch, for its entry. All processes must call it, before the evaluation.

        It reduces what ``--sync`` lets wait. A forward of the evaluation would do so too, but where there are few test pictures not
        every process makes one.
        """
        local = self.local
        kept = local.kept_statistics if local else {}
        names = [name for name, _ in self.model.named_modules()]
        # Each process has statistics of its own. Local updates and optimizer steps are the same ones on all of them.
        everyones = self._sum_over_processes([float(kept.get(name, 0)) for name in names])
        return {
            "skipped_updates": local.skipped if local else {},
            "skipped_steps": local.skipped_steps if local else 0,
            "kept_statistics": {name: int(count) for name, count in zip(names, everyones, strict=True) if count},
        }

    def _end_of_epoch(self, loss: float) -> None:
        """Boundary, sign and batch of the next epoch."""
        if self.local is None:
            return
        with self._logged_warnings():
            try:
                self.local.step(loss)
            except FloatingPointError as error:  # it counts epochs from 0
                raise FloatingPointError(f"epoch {self.epoch + 1}: {str(error).partition(': ')[2]}") from None
        if self.epoch + 1 == self.config.epochs:  # nobody would train with a larger batch
            return
        with self._autocast():
            grown = self.batch.step()
        if grown is not None:
            self.say(grown)

    def _train(self) -> tuple[float, PhaseTimer, Cost]:
        """One pass over the training set: mean loss of all processes, times, and what its steps cost."""
        self.model.train()
        timer = PhaseTimer(self._device)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        counted: Tensor | int = 0
        cost = Cost(self.model, self.local, self.config.sample, self.dropped)
        timer.start()
        for x, y in self.data.train(self.epoch, self.batch.size):
            refreshing = self.local is not None and self.local.refreshing
            timer.kind(refreshing)
            timer.mark("data")
            with cost.of_step(refreshing):
                loss = self._forward(x, y)
            timer.mark("forward")
            self.optimizer.zero_grad(set_to_none=True)
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if self.dropped:
                self.dropped.branches.fill_gradients()
            if self.lasso:
                if self.lasso.coefficient is None:
                    self.lasso.set_coefficient(float(loss.detach()))
                self._scaler.unscale_(self.optimizer)
                self.lasso.add_gradient_()
            timer.mark("backward")
            self._scaler.step(self.optimizer)
            self._scaler.update()
            timer.mark("optimizer")
            value = loss.detach()
            if self.config.nan_policy == "skip":  # in the mean it would leave a trace: the sign of the local updates
                counted = counted + value.isfinite()
                total += value.where(value.isfinite(), 0)
            else:
                counted += 1
                total += value
            self.progress.advance(len(y) * self.world.size)
        total_of_all, count = self._sum_over_processes([float(total), float(counted)])
        return total_of_all / count if count else math.nan, timer, cost

    def _reconfigure(self) -> None:
        removed = prunetrain.reconfigure(self.model, self.optimizer, self._example, self._layout)
        self.say(f"reconfigured: {removed} channels removed, {_size(self.model)} parameters left")

    def _forward(self, x: Tensor, y: Tensor) -> Tensor:
        with self._autocast():
            return F.cross_entropy((self.replicas or self.model)(x), y)

    def _sum_over_processes(self, values: list[float]) -> list[float]:
        if self.replicas is None:
            return values
        return [sum(of_all) for of_all in zip(*self.replicas.gather(values), strict=True)]

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy (fraction) and mean loss on the test set."""
        self.model.eval()
        if self.replicas:
            self.replicas.broadcast_buffers()  # each has had BatchNorm statistics of its own since the last step
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        seen = 0  # fewer than test_size where pictures could not be read
        for x, y in self.data.test():
            with self._autocast():
                logits = self.model(x)
            correct += (logits.argmax(1) == y).sum()
            total += F.cross_entropy(logits.float(), y, reduction="sum")
            seen += len(y)
        right, loss, pictures = self._sum_over_processes([float(correct), float(total), float(seen)])
        if not pictures:
            path, why = self.world.from_first(list(self.data.unreadable.items())[-1:])[0]
            raise UnreadablePictures(f"none of the {self.data.test_size} test pictures can be read; {path}: {why}")
        return right / pictures, loss / pictures

    def save(self) -> None:
        """Write the checkpoint of the epochs finished so far."""
        local = self.local.state_dict() if self.local else None  # first: it makes the updates that are still due
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "local": local,
            "lasso": self.lasso.coefficient if self.lasso else None,
            "batch": self.batch.state_dict(),
        }
        if self.world.is_first:
            checkpoint.save(self.directory.path, self.epoch, self.config.identity(), state)

    def restore(self) -> None:
        """Go on from the newest usable checkpoint. Raises ``CheckpointError`` if there are some and none can be used."""
        found = checkpoint.load_latest(self.directory.path, self.config.identity(), self.say, RunConfig.defaults())
        if found is not None:
            self.epoch, state = found
            if self.lasso:
                before = dict(self.model.named_parameters())
                prunetrain.load(self.model, state["model"], self._layout)
                prunetrain.exchange(self.optimizer, before, dict(self.model.named_parameters()))
                self.lasso.coefficient = state["lasso"]
            else:
                self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
            self._scaler.load_state_dict(state["scaler"])
            if self.local:
                self.local.load_state_dict(state["local"])
            self.batch.load_state_dict(state.get("batch"))  # not in checkpoints from before it could grow
        self.metrics = self.directory.keep_metrics(self.epoch)
        if len(self.metrics) != self.epoch:
            raise checkpoint.CheckpointError(
                f"{self.directory.path}: the checkpoint is of epoch {self.epoch}, but metrics.jsonl has {len(self.metrics)} epochs"
            )
        epochs = [of_one[0] for of_one in self.replicas.gather([self.epoch])] if self.replicas else []
        if len(set(epochs)) > 1:
            raise checkpoint.CheckpointError(
                f"{self.directory.path} must be the same directory for all processes; their checkpoints are of epochs "
                + ", ".join(f"{epoch:.0f}" for epoch in epochs)
            )
        self.say(f"resuming after epoch {self.epoch} of {self.config.epochs}")

    def finish(self) -> None:
        """Write the summary and the trained weights (``model.pt``, a plain state dict; that of a pruned network is loaded by
        :func:`localsgd_ext.train.prunetrain.load`); take the hooks off."""
        if self.local:
            self.local.remove()
        self.batch.remove()
        if self.dropped:
            self.dropped.branches.fold_()
        if not self.world.is_first:
            return
        buffer = io.BytesIO()
        torch.save(self.model.state_dict(), buffer)
        write_atomically(self.directory.path / "model.pt", buffer.getvalue())
        last = self.metrics[-1]
        write_json(self.directory.path / SUMMARY, {"config": self.config.to_json(), "epochs": self.epoch, "last": last})
        self.directory.log("finished")
        self.directory.close()

    def _boundary_moved(self, old: int, new: int) -> None:
        self.say(f"boundary {old} -> {new} of {self.num_layers} layers")

    def _pictures(self, count: int) -> Tensor:
        """Black ones, ``[count, 3, H, W]``."""
        x = torch.zeros(count, 3, self.data.image_size, self.data.image_size, device=self._device)
        return x.to(memory_format=self._layout)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp == "none":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=_AMP[self.config.amp])

    @contextlib.contextmanager
    def _logged_warnings(self) -> Iterator[None]:
        """The library's warnings belong into the run's log, not only onto a screen nobody looks at. All processes must go through it."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        said: dict[str, list[int]] = {}
        for rank, messages in enumerate(self.world.gather([str(warning.message) for warning in caught])):
            for message in dict.fromkeys(messages):
                said.setdefault(message, []).append(rank)
        for message, ranks in said.items():
            self.say(f"warning{'' if len(ranks) == self.world.size else f' ({self.world.of(ranks)})'}: {message}")


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _unreadable(reasons: dict[str, str], repeated: int) -> str:
    """All of them counted, the first few named; and the shares of mini-batches that were repeated for want of a readable picture."""
    listed = "; ".join(f"{path} ({why})" for path, why in sorted(reasons.items())[:_NAMED])
    more = f"; and {len(reasons) - _NAMED} more, in the log" if len(reasons) > _NAMED else ""
    again = f" ({repeated} times a whole share of a mini-batch, another of which was repeated)" if repeated else ""
    return f"{len(reasons)} pictures could not be read and were left out{again}: {listed}{more}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # NaN is not JSON
