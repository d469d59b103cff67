"""Where the numbers of a run can be looked at: TensorBoard, W&B, trackio. What a run knows stands in its JSON lines.

A sink is a class with three methods and a row of `SINKS`; process 0 alone opens one.
"""

import functools
import importlib
import importlib.util
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from hybrid_attn.config import Config, to_dict
from hybrid_attn.files import Appended
from hybrid_attn.train.statistics import BY_LAYER_TYPE
from hybrid_attn.trees import check, choice


class Sink(Protocol):
    """What shows the numbers of a run. A tag begins with the name of its group: `train/loss_nats`, `L/logit_max`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows finite numbers of a step, by tag."""

    def picture(self, step: int, tag: str, pixels_HWC: np.ndarray) -> None:
        """Shows an image, RGB between 0 and 1."""

    def close(self) -> None:
        """Ends the output of a run that has come to its end."""


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
    letters = sorted(set(config.model.layers))
    return {"layer types": {name: ["Multiline", [f"^{x}/{name}$" for x in letters]] for name in BY_LAYER_TYPE}}


class Tracker:
    """A run of W&B or of trackio, whose packages have the same functions; where it goes, their own settings say.

    A run that is resumed is a new run there, in the group of the workdir: neither takes back steps that were logged.
    """

    def __init__(self, package: str, workdir: Path, start: int, config: Config, **settings):
        self.package, group = importlib.import_module(package), workdir.absolute().name
        project = os.environ.get("WANDB_PROJECT", "hybrid-attn")
        try:
            self.run = self.package.init(
                project=project, group=group, name=f"{group} from {start}", config=to_dict(config), **settings
            )
        except Exception as cause:  # each of their versions has other errors
            raise ValueError(f"train.sinks: {package} does not start ({cause}); mend that, or take the name out") from cause

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, tag: str, pixels_HWC: np.ndarray) -> None:
        self.run.log({tag: self.package.Image((255 * pixels_HWC).astype(np.uint8))}, step=step)

    def close(self) -> None:
        self.run.finish()


def wandb(workdir: Path, start: int, config: Config) -> Tracker:
    """W&B; its files are in the folder `wandb` of the workdir."""
    return Tracker("wandb", workdir, start, config, dir=str(workdir))


class Row(NamedTuple):
    """`open(workdir, start, config)` opens the sink of a run that goes on from step `start`; `needs` is an optional package."""

    open: Callable[[Path, int, Config], Sink]
    needs: str | None = None


SINKS: dict[str, Row] = {
    "tensorboard": Row(TensorBoard),
    "wandb": Row(wandb, "wandb"),
    "trackio": Row(functools.partial(Tracker, "trackio"), "trackio"),
}


def check_names(names: Sequence[str]) -> None:
    """ValueError for a name in `train.sinks` that is not in `SINKS`, or whose package is not installed."""
    for name in names:
        needs = choice("train.sinks", name, SINKS).needs
        installed = needs is None or importlib.util.find_spec(needs) is not None
        check(
            installed,
            f"train.sinks has {name!r}, whose package is not here: pip install 'hybrid_attn[{needs}]', or leave it out",
        )
