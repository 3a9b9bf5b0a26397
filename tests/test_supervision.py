"""Algorithm 2 (weak supervision) against traces worked out by hand."""

import math

import pytest
import torch

from localsgd_ext import WeakSupervision

#         loss of the epoch, direction of the next epoch
ABSOLUTE = [
    (1.00, +1),  # nothing to compare with
    (0.90, +1),  # fell
    (0.95, -1),  # rose
    (0.97, -1),  # rose again: "absolute" stays reversed
    (0.50, +1),  # fell
    (0.50, +1),  # a tie did not rise: L[i-1] < L[i] is false
    (0.60, -1),
    (0.60, +1),  # a tie ends the reversal
]
TOGGLE = [
    (1.00, +1),
    (0.90, +1),
    (0.95, -1),  # rose: flip
    (0.97, +1),  # rose: flip back
    (0.50, +1),  # fell: keep
    (0.60, -1),  # rose: flip
    (0.55, -1),  # fell: keep the reversed direction
    (0.55, -1),  # tie: keep
    (0.70, +1),  # rose: flip
]


@pytest.mark.parametrize(("kind", "trace"), [("absolute", ABSOLUTE), ("toggle", TOGGLE)])
def test_trace(kind, trace):
    supervision = WeakSupervision(kind)
    assert supervision.sign == 1
    for epoch, (loss, expected) in enumerate(trace):
        assert supervision.step(loss) == expected, f"after epoch {epoch}"
        assert supervision.sign == expected


def test_default_is_absolute():
    supervision = WeakSupervision()
    assert [supervision.step(loss) for loss, _ in ABSOLUTE] == [sign for _, sign in ABSOLUTE]


def test_tensor_loss_is_accepted():
    supervision = WeakSupervision()
    assert [supervision.step(torch.tensor(value)) for value in (1.0, 2.0, 1.5)] == [1, -1, 1]


@pytest.mark.parametrize("kind", ["absolute", "toggle"])
def test_a_nan_loss_does_not_poison_what_follows(kind):
    supervision = WeakSupervision(kind)
    supervision.step(1.0)
    assert supervision.step(2.0) == -1
    with pytest.warns(UserWarning, match="nan"):
        assert supervision.step(math.nan) == -1  # tells no trend
    assert supervision.step(1.5) == (1 if kind == "absolute" else -1)  # compared with 2.0: it fell
    assert supervision.step(1.7) == (-1 if kind == "absolute" else 1)


@pytest.mark.parametrize("cut", range(1, len(TOGGLE)))
@pytest.mark.parametrize(("kind", "trace"), [("absolute", ABSOLUTE), ("toggle", TOGGLE)])
def test_state_dict_continues_the_trace(kind, trace, cut):
    first = WeakSupervision(kind)
    for loss, _ in trace[:cut]:
        first.step(loss)
    second = WeakSupervision(kind)
    second.load_state_dict(first.state_dict())
    assert second.sign == first.sign
    assert [second.step(loss) for loss, _ in trace[cut:]] == [sign for _, sign in trace[cut:]]


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind.*'absolute'.*'sometimes'|kind.*absolute.*sometimes"):
        WeakSupervision("sometimes")
