"""Curves for TensorBoard, in event files that are written where the caller is.

``SummaryWriter`` writes in a thread of its own: what goes wrong there ends in a traceback of that thread, and may be lost here.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

_numbers = itertools.count()


class EventFile:
    """A new file of events in ``directory``. What older files there have of ``first_step`` and later is no longer shown."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self.path = directory / f"events.out.tfevents.{now:010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._append(
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of every curve."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, *events: object) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        with self.path.open("ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())  # type: ignore[attr-defined]
