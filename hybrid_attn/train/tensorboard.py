"""Event files of TensorBoard, one for each start of a run."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from hybrid_attn.config import Config
from hybrid_attn.files import Appended
from hybrid_attn.model import ranks
from hybrid_attn.train.statistics import BY_LAYER_TYPE


class TensorBoard:
    """The folder `tensorboard` of the workdir, with charts that have a line for each layer type."""

    def __init__(self, workdir: Path, start: int, config: Config):
        """A new event file of a run that goes on from step `start`: TensorBoard hides later steps of older files.

        A writer in the background, such as tensorboardX has, would lose what a kill finds in its queue.
        """
        folder = workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.from{start}"
        self.file = Appended(folder / name)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        if config.train.statistics_every is not None:
            self._write(Event(step=start, summary=summary.custom_scalars(charts(config))))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._write(Event(step=step, summary=summary.scalar(tag, value)))

    def picture(self, step: int, tag: str, pixels_HWC: np.ndarray) -> None:
        self._write(Event(step=step, summary=summary.image(tag, pixels_HWC, dataformats="HWC")))

    def close(self) -> None:
        self.file.close()

    def _write(self, event: Event) -> None:
        """Writes a record: the length of the event in 8 bytes, 4 of checksum, the event, 4 of checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self.file.write(length + sums[0] + content + sums[1])


def charts(config: Config) -> dict[str, dict[str, list]]:
    """TensorBoard's layout of custom scalars: for each statistic one chart with a line for each layer type."""
    letters, names = sorted(set(config.model.layers)), BY_LAYER_TYPE + ranks.NAMES * config.train.rank_statistics
    return {"layer types": {name: ["Multiline", [f"^{x}/{name}$" for x in letters]] for name in names}}
