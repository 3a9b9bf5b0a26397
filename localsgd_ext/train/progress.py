"""How a run shows itself: a live bar in a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self


def images_per_second(images: int, seconds: float) -> float:
    """0 before anything is known."""
    return images / seconds if seconds > 0 else 0.0


def remaining_seconds(done: int, total: int, elapsed: float) -> float | None:
    """Time left if the rest goes as fast as what was done in ``elapsed`` seconds; ``None`` before anything was done."""
    return elapsed * (total - done) / done if done > 0 else None


def format_seconds(seconds: float | None) -> str:
    """``8 s``, ``3:05``, ``2:10:00``; ``-`` for ``None``."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress(Protocol):
    """``with progress:`` around the whole job; :meth:`begin` and :meth:`end` around each epoch."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def begin(self, label: str) -> None:
        """An epoch begins."""

    def advance(self, images: int) -> None:
        """So many training pictures more are done."""

    def end(self, line: str) -> None:
        """The epoch is over; ``line`` sums it up."""

    def say(self, line: str) -> None:
        """Print a message without disturbing the bar."""


class Speed:
    """Counts pictures against the clock, for the whole job and for the present epoch."""

    def __init__(self, total: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total, self.done = total, 0
        self._epoch_done = 0
        self._clock = clock
        self._start = self._epoch_start = clock()

    def begin(self) -> None:
        self._epoch_done, self._epoch_start = 0, self._clock()

    def advance(self, images: int) -> None:
        self.done += images
        self._epoch_done += images

    @property
    def rate(self) -> float:
        """Training pictures per second in this epoch."""
        return images_per_second(self._epoch_done, self._clock() - self._epoch_start)

    @property
    def remaining(self) -> float | None:
        """Seconds to the end of the job, evaluation included."""
        return remaining_seconds(self.done, self.total, self._clock() - self._start)


class Lines:
    """One line per epoch: for logs, pipes and CI. ``total`` pictures are to be trained on in the whole job."""

    def __init__(self, total: int, write: Callable[[str], None] | None = None) -> None:
        self._speed = Speed(total)
        self._write = write or (lambda line: print(line, flush=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def begin(self, label: str) -> None:
        self._speed.begin()

    def advance(self, images: int) -> None:
        self._speed.advance(images)

    def end(self, line: str) -> None:
        self._write(f"{line}  left {format_seconds(self._speed.remaining)}")

    def say(self, line: str) -> None:
        self._write(line)


class Silence:
    """For processes beside the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def begin(self, label: str) -> None:
        pass

    def advance(self, images: int) -> None:
        pass

    def end(self, line: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass


class Bar:
    """A rich progress bar over the whole job, with the epoch, pictures per second and the time left."""

    def __init__(self, total: int, console: Any) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._speed = Speed(total)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s"),
            TextColumn("left {task.fields[left]}"),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=total, rate=0.0, left="-")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, label: str) -> None:
        self._speed.begin()
        self._bar.update(self._task, description=label)

    def advance(self, images: int) -> None:
        self._speed.advance(images)
        fields = {"rate": self._speed.rate, "left": format_seconds(self._speed.remaining)}
        self._bar.update(self._task, completed=self._speed.done, **fields)  # type: ignore[arg-type]

    def end(self, line: str) -> None:
        self.say(line)

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False)


def choose(total: int, console: Any) -> Progress:
    """A bar if ``console`` (rich's) is a terminal, lines if not."""
    return Bar(total, console) if console.is_terminal else Lines(total)
