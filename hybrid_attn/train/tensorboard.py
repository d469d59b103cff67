"""TensorBoard's event files, written at once: a writer in the background loses what a kill finds in its queue."""

import os
import socket
import struct
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from hybrid_attn.files import Appended


def open_events(folder: Path, start: int) -> "Events":
    """A new event file in `folder` of a run that goes on from step `start`: TensorBoard hides later steps of older files."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.from{start}"
    events = Events(Appended(folder / name))
    events.write(Event(file_version="brain.Event:2"))
    events.write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
    return events


class Events:
    """Writes events to a file."""

    def __init__(self, file: Appended):
        self._file = file

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.write(Event(step=step, summary=summary.scalar(name, value)))

    def add_image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Of red, green and blue between 0 and 1."""
        self.write(Event(step=step, summary=summary.image(name, pixels_HWC, dataformats="HWC")))

    def close(self) -> None:
        self._file.close()

    def write(self, event: Event) -> None:
        """A record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum. OSError with the path."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.write(length + sums[0] + content + sums[1])
