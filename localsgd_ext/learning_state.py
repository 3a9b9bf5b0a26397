"""Whether a saved state of LocalizedLearning fits the one that is to go on from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from .layers import ExecutionPlan, Patterns, select_names

STATE_FORMAT = 1


def checked_plan(
    state: Mapping[str, Any],
    model: nn.Module,
    *,
    rule: str,
    epochs: int,
    supervised: bool,
    refreshed: bool,
    known: ExecutionPlan | None,
    kept_frozen: Collection[str],
    include: Patterns,
    skip: Patterns,
) -> ExecutionPlan | None:
    """Return the plan in ``state``, ``None`` if that was saved before the first training forward; nothing is changed.

    Args:
        rule, epochs, supervised, refreshed, include, skip: what is in use here, weak supervision and a refresh among it.
        known: the plan that is in use here, if there is one.
        kept_frozen: parameters that the user has frozen here. A layer whose weight is one may be missing in either plan: it is none
            where it was frozen before the order of the layers was found.
    Raises:
        ValueError: the state is of another network (the first difference is named), format, rule or number of epochs, or has a
            refresh that is missing here.
    """
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"state must have format {STATE_FORMAT}, got {state.get('format')!r}")
    if state["rule"] != rule:
        raise ValueError(f"the state is of rule {state['rule']!r}, this is {rule!r}")
    of_the_run = state["schedule"].get("epochs")  # None before the first training forward
    if of_the_run is not None and of_the_run != epochs:
        raise ValueError(
            f"the state is of a run of epochs={of_the_run}, this is of epochs={epochs}: give epochs={of_the_run}, "
            "beyond which step() may go on"
        )
    if rule == "hebbian" and (state["supervision"] is not None) != supervised:  # otherwise there is nothing that it turns round
        raise ValueError("the state and this object differ in whether there is weak supervision")
    if state.get("refresh") is not None and not refreshed:  # the other way round nothing is lost: a refresh begins to count
        raise ValueError(
            "the state is of a run with a refresh, this has none: give refresh or preset='refresh' as it was there"
        )
    if state["plan"] is None:
        return None
    plan = ExecutionPlan.from_state_dict(state["plan"], model)
    if known is not None and (differing := _first_difference(plan.layers, known.layers, kept_frozen)):
        there, here = differing
        frozen = known.left_out.get(there or "", "")
        if "frozen" in frozen:
            raise ValueError(
                f"the state has a layer {there!r}, which is none here: {frozen}; freeze it after load_state_dict()"
            )
        raise ValueError(f"the state is of another network: its layer {there!r} stands where this one has {here!r}")
    unknown = sorted(set(plan.layers) - select_names(model, include, skip))
    if unknown:
        raise ValueError(f"the state's layer {unknown[0]!r} is excluded here by include or skip")
    return plan


def _first_difference(
    there: Sequence[str], here: Sequence[str], kept_frozen: Collection[str]
) -> tuple[str | None, str | None] | None:
    """The first two layers that should be one, ``None`` behind the last, but for those that only one side has, being frozen here."""
    kept = {name for name in {*there} ^ {*here} if f"{name}.weight" in kept_frozen}
    pairs = zip_longest(*([name for name in side if name not in kept] for side in (there, here)))
    return next(((a, b) for a, b in pairs if a != b), None)
