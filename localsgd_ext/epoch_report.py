"""What went wrong in an epoch, said at its end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .nonfinite import NonFiniteGuard
from .updater import HebbianUpdater

if TYPE_CHECKING:
    from .distributed import ReplicatedModel

_CALLER = 3  # stack levels from here to the user's call of LocalizedLearning.step


class EpochReport:
    """Warns of an epoch's trouble, each kind in one message that names the layers; with ``nan_policy="raise"`` raises instead."""

    def __init__(self, guard: NonFiniteGuard, updater: HebbianUpdater | None, replicas: ReplicatedModel | None) -> None:
        self._guard, self._updater, self._replicas = guard, updater, replicas
        self._said_silent = False

    def report(self, epoch: int, poisoned: Sequence[str], epoch_loss: float | None) -> None:
        """Of ``epoch``, which ends.

        Args:
            poisoned: layers whose running statistics are not finite.
            epoch_loss: its mean loss, unless somebody else reports that it is not finite.
        Raises:
            FloatingPointError: by the policy, on all processes if on one, before anything is said.
        """
        raises = self._guard.policy == "raise"
        found = self._guard.findings(poisoned, epoch_loss)
        if raises and self._replicas is not None:  # all processes raise, or the others would wait for this one
            troubled = [str(rank) for rank, (is_so,) in enumerate(self._replicas.gather([float(bool(found))])) if is_so]
            if troubled and not found:
                found = [f"not finite on rank {', '.join(troubled)}"]
        if found and raises:
            raise FloatingPointError(f"epoch {epoch}: {'; '.join(found)}")
        skipped = self._updater.skipped() if self._updater is not None else {}
        if skipped:
            named = ", ".join(f"{name} ({count})" for name, count in skipped.items())
            found.append(f"local updates skipped because the correlation was zero or not finite: {named}")
        for message in (*found, *self._guard.kept(), *self._not_run()):
            warnings.warn(message, UserWarning, stacklevel=_CALLER)

    def _not_run(self) -> list[str]:
        """Of local layers that did not learn, or not in every mini-batch, because of how the model was called."""
        if self._updater is None:
            return []
        found = []
        parts, silent = self._updater.parts_only(), self._updater.silent()
        if parts:
            found.append(
                "the model itself was never called in this epoch, only parts of it, so that the mini-batches could not be told "
                f"apart and all after the first became one local update: {', '.join(parts)}"
            )
        if silent and not self._said_silent:
            self._said_silent = True
            found.append(
                "local layers that never ran with gradients enabled in this epoch, and so did not learn "
                f"(evaluation mode, torch.no_grad, checkpointing with use_reentrant=True?): {', '.join(silent)}"
            )
        return found
