"""Whether a saved state of LocalizedLearning fits the one that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
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
    supervised: bool,
    known: ExecutionPlan | None,
    include: Patterns,
    skip: Patterns,
) -> ExecutionPlan | None:
    """Return the plan in ``state``, ``None`` if that was saved before the first training forward; nothing is changed.

    Args:
        rule, supervised, include, skip: what is in use here, weak supervision among it.
        known: the plan that is in use here, if there is one.
    Raises:
        ValueError: the state is of another network (the first difference is named), format or rule.
    """
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"state must have format {STATE_FORMAT}, got {state.get('format')!r}")
    if state["rule"] != rule:
        raise ValueError(f"the state is of rule {state['rule']!r}, this is {rule!r}")
    if (state["supervision"] is not None) != supervised:
        raise ValueError("the state and this object differ in whether there is weak supervision")
    if state["plan"] is None:
        return None
    plan = ExecutionPlan.from_state_dict(state["plan"], model)
    if known is not None and plan.layers != known.layers:
        here, there = next((here, there) for here, there in zip_longest(known.layers, plan.layers) if here != there)
        raise ValueError(f"the state is of another network: its layer {there!r} stands where this one has {here!r}")
    unknown = sorted(set(plan.layers) - select_names(model, include, skip))
    if unknown:
        raise ValueError(f"the state's layer {unknown[0]!r} is excluded here by include or skip")
    return plan
