"""Algorithm 1, equation 2 and the static schedules against traces worked out by hand."""

import math
import re

import numpy as np
import pytest
import torch

from localsgd_ext import DynamicModeSelection, StaticModeSelection


def trace(selection, norms):
    return [selection.step(norm) for norm in norms]


@pytest.mark.parametrize(
    ("num_layers", "epochs", "t_shift", "l_max", "expected"),
    [
        (54, 90, 3, 0.75, 6),  # ResNet-50 on ImageNet: 270 / 40.5 = 6.67
        (37, 90, 2, 0.75, 6),  # ResNet-34: 180 / 27.75 = 6.49
        (8, 30, 1, 0.75, 5),  # 30 / 6, exactly
        (8, 29, 1, 0.75, 4),  # 29 / 6 = 4.83
        (20, 10, 1, 0.75, 1),  # 10 / 15 < 1: at least 1
        (10, 12, 2, 0.5, 4),  # 24 / 5 = 4.8
    ],
)
def test_equation_2(num_layers, epochs, t_shift, l_max, expected):
    assert DynamicModeSelection(num_layers, epochs, t_shift=t_shift, l_max=l_max).min_epochs == expected


def test_algorithm_1_trace():
    # K = 6 * 2 / (0.75 * 8) = 2, cap = floor(0.75 * 8) = 6.
    selection = DynamicModeSelection(8, 6, t_shift=2)
    assert (selection.boundary, selection.min_epochs, selection.epochs_since_move) == (0, 2, 0)
    steps = [
        # u_E,  T, e_k
        (10.0, 0, 1),  # e_k = 0 < K
        (1.0, 0, 2),  # e_k = 1 < K, though u is far below the mean
        (5.3, 0, 3),  # 0.95 * (10 + 1) / 2 = 5.225 < 5.3
        (2.99, 2, 0),  # 0.95 * (1 + 5.3) / 2 = 2.9925 >= 2.99: shift
        (0.1, 2, 1),  # the history restarts: the old layer's norms do not count
        (0.1, 2, 2),
        (0.1, 2, 3),  # 0.095 < 0.1
        (0.09, 4, 0),  # 0.095 >= 0.09: shift
        (8.0, 4, 1),
        (4.0, 4, 2),
        (5.0, 6, 0),  # 0.95 * 6 = 5.7 >= 5: shift, K + 1 = 3 epochs after the last one; at the cap
        (1.0, 6, None),
        (0.1, 6, None),
        (0.01, 6, None),
        (0.001, 6, None),  # nothing moves past the cap
    ]
    for epoch, (norm, boundary, since) in enumerate(steps):
        assert selection.step(norm) == boundary, f"after epoch {epoch}"
        assert selection.boundary == boundary
        if since is not None:
            assert selection.epochs_since_move == since, f"after epoch {epoch}"


def test_the_present_norm_is_not_part_of_its_own_mean():
    # K = 4 / 4 = 1: 3.75 <= 0.95 * 4 = 3.8, though 3.75 > 0.95 * (4 + 3.75) / 2 = 3.68 and 3.75 > 0.95 * 3.75.
    selection = DynamicModeSelection(4, 4, l_max=1.0, t_shift=1)
    assert selection.min_epochs == 1
    assert trace(selection, [4.0, 3.75]) == [0, 1]


def test_only_the_last_k_norms_count():
    # K = 8 * 1 / 4 = 2. With all of the history the mean would be (100 + 2 + 2) / 3 = 34 and 2 would pass.
    selection = DynamicModeSelection(4, 8, l_max=1.0, t_shift=1)
    assert selection.min_epochs == 2
    assert trace(selection, [100.0, 2.0, 60.0, 31.0, 45.0, 30.0]) == [0, 0, 0, 0, 0, 1]
    # E=2: 60 > .95*51; E=3: .95*31 = 29.45 < 31; E=4: .95*45.5 = 43.2 < 45; E=5: .95*38 = 36.1 >= 30.


def test_equality_shifts():
    assert trace(DynamicModeSelection(4, 4, alpha=0.5, l_max=1.0, t_shift=1), [4.0, 2.0]) == [0, 1]
    assert trace(DynamicModeSelection(4, 4, alpha=0.5, l_max=1.0, t_shift=1), [4.0, math.nextafter(2.0, 3.0)]) == [0, 0]


@pytest.mark.parametrize(("num_layers", "epochs", "min_epochs"), [(8, 6, 1), (8, 12, 2), (8, 24, 4)])
def test_shifts_are_k_plus_one_epochs_apart(num_layers, epochs, min_epochs):
    selection = DynamicModeSelection(num_layers, epochs, t_shift=1)
    assert selection.min_epochs == min_epochs
    boundaries = trace(selection, [0.5**epoch for epoch in range(40)])  # always below alpha * mean: only e_k >= K holds it back
    moves = [epoch for epoch in range(1, 40) if boundaries[epoch] != boundaries[epoch - 1]]
    assert moves == [min_epochs + i * (min_epochs + 1) for i in range(6)]
    assert boundaries[-1] == 6


def test_a_shift_past_the_cap_is_clamped():
    # cap = floor(0.75 * 10) = 7, t_shift = 3: 0, 3, 6, 7.
    selection = DynamicModeSelection(10, 3, t_shift=3)
    assert selection.min_epochs == 1
    assert sorted(set(trace(selection, [0.5**epoch for epoch in range(20)]))) == [0, 3, 6, 7]


@pytest.mark.parametrize(("num_layers", "l_max", "cap"), [(100, 0.29, 29), (7, 0.75, 5), (20, 0.55, 11), (3, 0.3, 0)])
def test_the_cap_is_the_floor_of_the_fraction(num_layers, l_max, cap):
    """0.29 * 100 is 28.999999999999996 in floating point, yet 29 layers are meant."""
    selection = DynamicModeSelection(num_layers, 1, l_max=l_max, t_shift=1)
    assert max(trace(selection, [0.5**epoch for epoch in range(300)])) == cap


def test_rising_norms_never_shift():
    assert set(trace(DynamicModeSelection(8, 8, t_shift=1), [1.1**epoch for epoch in range(50)])) == {0}


def test_a_norm_that_is_not_a_number_never_shifts_and_is_forgotten():
    selection = DynamicModeSelection(4, 4, l_max=1.0, t_shift=1)  # K = 1
    assert trace(selection, [4.0, math.nan, 2.0]) == [0, 0, 0]
    assert trace(selection, [1.0, 0.5])[-1] >= 1


FALLING = [0.5**epoch for epoch in range(6)]  # norms, with which Algorithm 1 moves as early and as often as it may


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.0, 3.7, 3.5, 3.6, 9.0, 1.0], [0, 0, 1, 1, 2, 2]),  # 0.9 * 4 = 3.6: held once, and not again
        ([4.0, 3.6, 3.5, 3.5, 3.5, 3.5], [0, 1, 1, 2, 2, 3]),  # as printed
        ([4.0, math.nan, 4.0, math.inf, 3.0, 3.0], [0, 0, 0, 0, 1, 1]),
        ([math.nan, 4.0, 3.9, 3.6, 3.0, 3.0], [0, 0, 0, 1, 1, 2]),  # the first that is a number
        ([math.nan] * 6, [0] * 6),
        ([None] * 6, [0, 1, 1, 2, 2, 3]),
        ([4.0, None, None, None, None, None], [0, 1, 1, 2, 2, 3]),
        ([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0], [0, 1, 1, 2, 2, 3]),  # no share can be taken
    ],
)
def test_the_boundary_waits_for_the_loss_to_fall(losses, expected):
    selection = DynamicModeSelection(4, 4, l_max=1.0, t_shift=1, min_loss_drop=0.1)  # K = 1
    assert [selection.step(norm, loss) for norm, loss in zip(FALLING, losses, strict=True)] == expected


def test_algorithm_1_as_printed_does_not_look_at_the_loss():
    selection = DynamicModeSelection(4, 4, l_max=1.0, t_shift=1)
    assert [selection.step(norm, 4.0) for norm in FALLING] == [0, 1, 1, 2, 2, 3]


def test_why_it_waits_can_be_asked():
    selection = DynamicModeSelection(4, 4, l_max=1.0, t_shift=1, min_loss_drop=0.25)
    reasons = []
    for norm, loss in zip(FALLING, [4.0, 3.5, 3.0, 4.0, 4.0, 4.0], strict=True):
        selection.step(norm, loss)
        reasons.append(selection.waiting)
    assert reasons == [
        None,
        "the loss is 3.5, it was 4 at first and must fall to 3 (min_loss_drop=0 does not wait)",
        *[None] * 4,
    ]


@pytest.mark.parametrize("cut", range(1, 6))
def test_state_dict_continues_the_wait(cut):
    losses = [4.0, 3.9, 3.8, 3.7, 3.6, 3.6]
    first, second = (DynamicModeSelection(4, 4, l_max=1.0, t_shift=1, min_loss_drop=drop) for drop in (0.1, 0.0))
    assert [first.step(norm, loss) for norm, loss in zip(FALLING[:cut], losses[:cut], strict=True)][-1] == (cut == 5)
    second.load_state_dict(first.state_dict())
    rest = [second.step(norm, loss) for norm, loss in zip(FALLING[cut:], losses[cut:], strict=True)]
    assert rest == [0, 0, 0, 1, 1][cut - 1 :]


def test_a_state_from_before_the_wait_goes_on_as_it_began():
    selection = DynamicModeSelection(4, 4, l_max=1.0, t_shift=1, min_loss_drop=0.1)
    state = selection.state_dict()
    del state["min_loss_drop"], state["first_loss"]
    selection.load_state_dict(state)
    assert [selection.step(norm, 4.0) for norm in FALLING] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("cut", range(1, 14))
def test_state_dict_continues_the_trace(cut):
    norms = [10.0, 1.0, 5.3, 2.99, 0.1, 0.1, 0.1, 0.09, 8.0, 4.0, 5.0, 1.0, 0.1, 0.01]
    whole = trace(DynamicModeSelection(8, 6, t_shift=2), norms)
    first, second = DynamicModeSelection(8, 6, t_shift=2), DynamicModeSelection(8, 6, t_shift=2)
    trace(first, norms[:cut])
    second.load_state_dict(first.state_dict())
    assert second.boundary == first.boundary
    assert trace(second, norms[cut:]) == whole[cut:]


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"l_max": -0.1}, "l_max"),
        ({"l_max": 1.5}, "l_max"),
        ({"t_shift": 0}, "t_shift"),
        ({"t_shift": -2}, "t_shift"),
        ({"min_loss_drop": -0.1}, "min_loss_drop"),
        ({"min_loss_drop": 1.0}, "min_loss_drop"),
        ({"min_loss_drop": float("nan")}, "min_loss_drop"),
    ],
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        DynamicModeSelection(8, 6, **{"t_shift": 1, **kwargs})


@pytest.mark.parametrize("value", [True, None, [1]])
@pytest.mark.parametrize("name", ["alpha", "l_max", "t_shift", "min_loss_drop"])
def test_what_is_no_number_is_named(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be a number, got {re.escape(repr(value))}"):
        DynamicModeSelection(8, 6, **{"t_shift": 1, name: value})


def test_numpy_s_numbers_are_numbers():
    mine, theirs = (DynamicModeSelection(8, 6, t_shift=shift) for shift in (2, np.int64(2)))
    assert theirs.shift == mine.shift == 2
    assert type(theirs.shift) is int


@pytest.mark.parametrize("name", ["c1", "c2", "l_max"])
def test_what_is_no_number_is_named_by_static_schedules(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got 'x'"):
        StaticModeSelection(8, 6, **{name: "x"})


# Static schedules: the boundary during epoch E is N(E), so the step at the end of epoch E answers N(E + 1).
def static_trace(kind, num_layers, epochs, **kwargs):
    selection = StaticModeSelection(num_layers, epochs, kind=kind, **kwargs)
    return [selection.step() for _ in range(epochs)]


def test_quadratic_trace():
    # N(E) = max(0, floor(6 - 0.25 * (E - 6)^2)), E = 1..6: 6 - {6.25, 4, 2.25, 1, .25, 0}
    assert static_trace("quadratic", 8, 6, c1=6, c2=0.25) == [0, 2, 3, 5, 5, 6]


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_a_static_schedule_stays_where_the_run_ended(kind):
    selection = StaticModeSelection(20, 10, kind=kind)
    assert [selection.at(epoch) for epoch in (10, 11, 15, 30)] == [15] * 4


def test_linear_trace():
    # N(E) = max(0, floor(5 - 1.5 * (6 - E))), E = 1..6: 5 - {7.5, 6, 4.5, 3, 1.5, 0}
    assert static_trace("linear", 8, 6, c1=5, c2=1.5) == [0, 0, 0, 2, 3, 5]


def test_exponential_trace():
    # N(E) = floor(6 * (1 - exp(-0.5 E))), E = 1..6: 6 * {.3935, .6321, .7769, .8647, .9179, .9502}
    assert static_trace("exponential", 8, 6, c1=6, c2=0.5) == [2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "kind(1) must be a number, got None"),
        ("much", TypeError, "kind(1) must be a number, got 'much'"),
        ("2", TypeError, "kind(1) must be a number, got '2'"),
        (True, TypeError, "kind(1) must be a number, got True"),
        (torch.ones(2), ValueError, "kind(1) must have one element, got shape (2,)"),
        (math.nan, ValueError, "kind(1) must be finite, got nan"),
        (math.inf, ValueError, "kind(1) must be finite, got inf"),
    ],
)
def test_a_callable_s_answer_is_checked(value, error, message):
    selection = StaticModeSelection(8, 6, kind=lambda epoch: value if epoch == 1 else 0)
    with pytest.raises(error, match=re.escape(message)):
        selection.step()
    assert (selection.epoch, selection.boundary) == (0, 0)


def test_callable_trace():
    assert static_trace(lambda epoch: 2 * epoch - 3, 8, 6) == [0, 1, 3, 5, 6, 6]  # max(0, .) and the cap floor(0.75 * 8) = 6


@pytest.mark.parametrize("kind", ["quadratic", "linear", "exponential"])
def test_static_schedules_stay_under_the_cap(kind):
    boundaries = static_trace(kind, 8, 30, c1=100, c2=0.01)
    assert max(boundaries) == 6


@pytest.mark.parametrize("kind", ["quadratic", "linear", "exponential"])
def test_static_defaults_reach_the_cap_and_never_go_back(kind):
    boundaries = static_trace(kind, 20, 40)
    assert boundaries == sorted(boundaries)
    assert boundaries[0] <= 5
    assert boundaries[-1] in (14, 15)


def with_losses(selection, losses):
    return [selection.step(None, loss) for loss in losses]


def test_a_static_schedule_waits_for_the_loss_and_then_takes_the_epochs_that_are_left():
    """Linear to 8 of 10 layers in 8 epochs: T = E. The first move, due in epoch 1, is made in epoch 4: T = 1 + (E - 4) * 7 / 4."""
    selection = StaticModeSelection(10, 8, kind="linear", l_max=0.8, min_loss_drop=0.25)
    assert with_losses(selection, [4.0, 3.9, 3.1, 3.0, 5.0, 5.0, 5.0, 5.0]) == [0, 0, 0, 1, 2, 4, 6, 8]
    assert selection.waited == 3


@pytest.mark.parametrize("kind", StaticModeSelection.KINDS)
def test_a_static_schedule_whose_loss_falls_in_time_is_as_printed(kind):
    schedules = [StaticModeSelection(20, 20, kind=kind, c2=0.01, min_loss_drop=drop) for drop in (0.0, 0.1)]
    losses = [0.8**epoch for epoch in range(20)]
    printed, waiting = (with_losses(schedule, losses) for schedule in schedules)
    assert printed == waiting
    assert max(printed) > 0


@pytest.mark.parametrize("losses", [[4.0] * 6, [4.0, math.nan, math.inf, 4.0, 4.0, 4.0]])
def test_a_static_schedule_may_wait_for_ever(losses):
    selection = StaticModeSelection(10, 6, kind="linear", min_loss_drop=0.1)
    assert with_losses(selection, losses) == [0] * 6


def test_a_static_schedule_may_wait_at_the_very_end_of_a_run_and_beyond():
    selection = StaticModeSelection(10, 1, kind="linear", min_loss_drop=0.1)
    assert with_losses(selection, [4.0, 4.0, 4.0]) == [0, 0, 0]
    assert selection.at(1) == 0


def test_a_static_schedule_is_not_told_the_loss():
    waiting, printed = (StaticModeSelection(10, 6, kind="linear", min_loss_drop=drop) for drop in (0.1, 0.0))
    assert with_losses(waiting, [None] * 6) == with_losses(printed, [4.0] * 6)


def test_a_callable_does_not_wait():
    with pytest.raises(ValueError, match=r"min_loss_drop must be 0 where kind is a callable, got 0\.1"):
        StaticModeSelection(10, 6, kind=lambda epoch: epoch, min_loss_drop=0.1)


@pytest.mark.parametrize("cut", range(1, 8))
def test_static_state_dict_continues_the_wait(cut):
    losses = [4.0, 3.9, 3.8, 3.0, 3.0, 3.0, 3.0, 3.0]
    first, second = (StaticModeSelection(10, 8, kind="linear", l_max=0.8, min_loss_drop=drop) for drop in (0.1, 0.0))
    whole = with_losses(StaticModeSelection(10, 8, kind="linear", l_max=0.8, min_loss_drop=0.1), losses)
    with_losses(first, losses[:cut])
    second.load_state_dict(first.state_dict())
    assert with_losses(second, losses[cut:]) == whole[cut:]
    assert second.waiting is None


def test_static_state_dict_continues():
    whole = static_trace("quadratic", 8, 6, c1=6, c2=0.25)
    first, second = (StaticModeSelection(8, 6, kind="quadratic", c1=6, c2=0.25) for _ in range(2))
    for _ in range(3):
        first.step()
    second.load_state_dict(first.state_dict())
    assert [second.step() for _ in range(3)] == whole[3:]


def test_a_static_state_of_another_kind_is_refused_and_changes_nothing():
    saved, other = StaticModeSelection(8, 6, kind="linear"), StaticModeSelection(8, 6, kind=lambda epoch: epoch)
    for _ in range(4):
        saved.step()
    assert saved.boundary > 0
    with pytest.raises(ValueError, match="kind linear, this one is a callable"):
        other.load_state_dict(saved.state_dict())
    assert (other.epoch, other.boundary) == (0, 0)


def test_unknown_static_kind_is_named():
    with pytest.raises(ValueError, match=r"kind.*cubic"):
        StaticModeSelection(8, 6, kind="cubic")
