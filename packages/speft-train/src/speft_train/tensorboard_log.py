"""TensorBoard's event file, written in the run's own thread.

The usual writer queues events for a thread of its own and waits for it on every flush; when the disk is full that thread
dies with an event unaccounted for, and the wait never ends. Here a full disk is an OSError like any other.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EventFile:
    """One event file in a folder; opened on the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append values at a step, on disk when this returns."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.0"
            self._writer = RecordWriter((self.folder / name).open("ab"))
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=entries))
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class TensorBoard(TrainerCallback):
    """Writes every figure of a log: `train/loss`, `eval/loss`, ..."""

    def __init__(self, folder: Path) -> None:
        self.file = EventFile(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The Trainer names evaluation figures with a prefix."""
        values = {_tag(name): float(v) for name, v in (logs or {}).items() if isinstance(v, (int, float))}
        self.file.scalars(state.global_step, values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nothing more comes."""
        self.file.close()


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
