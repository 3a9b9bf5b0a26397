from __future__ import annotations

import pytest

from localsgd_ext.train import progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3599.7, "1:00:00"), (7800, "2:10:00")],
)
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert progress.format_seconds(seconds) == text


def test_rate_and_remaining_time() -> None:
    assert progress.images_per_second(300, 2.0) == 150
    assert progress.images_per_second(0, 0.0) == 0
    assert progress.remaining_seconds(25, 100, elapsed=10.0) == 30
    assert progress.remaining_seconds(100, 100, elapsed=10.0) == 0
    assert progress.remaining_seconds(0, 100, elapsed=10.0) is None


def test_speed_counts_the_epoch_for_the_rate_and_the_job_for_the_rest() -> None:
    now = [0.0]
    speed = progress.Speed(total=400, clock=lambda: now[0])
    assert speed.remaining is None
    now[0] = 10.0
    speed.begin()
    speed.advance(60)
    now[0] = 12.0
    speed.advance(40)
    now[0] = 20.0
    assert speed.rate == 10  # 100 pictures since the epoch began 10 s ago
    assert speed.remaining == 60  # 300 to go at 100 in 20 s, what was not training included
    speed.begin()
    assert speed.rate == 0


def test_lines_print_one_line_per_epoch() -> None:
    written: list[str] = []
    with progress.Lines(total=20, write=written.append) as display:
        for epoch in (1, 2):
            display.begin(f"epoch {epoch}")
            display.advance(4)
            display.advance(6)
            display.end(f"epoch {epoch} done")
    assert written[0].startswith("epoch 1 done  left ")
    assert written[1] == "epoch 2 done  left 0 s"
    assert len(written) == 2


def test_a_bar_in_a_terminal_and_lines_elsewhere() -> None:
    import io

    from rich.console import Console

    assert isinstance(progress.choose(10, Console(file=io.StringIO())), progress.Lines)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    bar = progress.choose(20, console)
    assert isinstance(bar, progress.Bar)
    with bar:
        bar.begin("local seed 0 epoch 1/2")
        bar.advance(10)
        bar.end("summary [of] epoch 1")
    shown = screen.getvalue()
    for part in ("local seed 0 epoch 1/2", "50%", "images/s", "left", "summary [of] epoch 1"):
        assert part in shown
