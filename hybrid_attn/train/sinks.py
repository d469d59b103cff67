"""Where the numbers of a run can be looked at: TensorBoard, W&B, trackio. What a run knows stands in its JSON lines.

A sink is a class with three methods and a row of `SINKS`; process 0 alone opens one.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hybrid_attn.config import Config, to_dict
from hybrid_attn.trees import check, choice


class Sink(Protocol):
    """What shows the numbers of a run. A tag begins with the name of its group: `train/loss_nats`, `L/logit_max`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows finite numbers of a step, by tag."""

    def picture(self, step: int, tag: str, pixels_HWC: np.ndarray) -> None:
        """Shows an image, RGB between 0 and 1."""

    def close(self) -> None:
        """Ends the output of a run that has come to its end."""


def tensorboard(workdir: Path, start: int, config: Config) -> Sink:
    """TensorBoard. Its package imports PyTorch where that is installed, which takes seconds, so that it is imported here."""
    return importlib.import_module("hybrid_attn.train.tensorboard").TensorBoard(workdir, start, config)


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
    "tensorboard": Row(tensorboard),
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
