"""Curves of the lines of metrics.jsonl; `loss.png` in a workdir shows the loss and the schedule of its run."""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybrid_attn.files import object_of, write_atomically
from hybrid_attn.trees import check

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "loss.png"


def read(path: Path) -> list[dict]:
    """The lines of metrics.jsonl without skipped steps; ValueError for a file with other lines."""
    steps = []
    *lines, last = path.read_bytes().split(b"\n")  # the last line of a killed or running run may be incomplete
    for number, line in enumerate(lines, 1):
        values = object_of(line, f"{path}, line {number}")
        check(type(values.get("step")) is int, f"{path}, line {number} is no step of a run: {line[:40]!r}")
        if "skipped" not in values:
            steps.append(values)
    check(len(steps) > 0, f"{path} has no step yet; wait for its first line")
    return steps


def points(lines: Sequence[Mapping], *names: str) -> list[tuple]:
    """The values of these names in the lines in which all of them are numbers."""
    return [tuple(line[name] for name in names) for line in lines if all(is_number(line.get(name)) for name in names)]


def is_number(value) -> bool:
    """Whether `value` is a number that a picture can hold: finite as a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def smoothed(steps: Sequence[int], values: Sequence[float], window: int) -> np.ndarray:
    """The mean of the values of the `window` steps up to each step."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, end = np.searchsorted(steps, np.asarray(steps) - window, "right"), np.arange(1, len(steps) + 1)
    return (sums[end] - sums[first]) / (end - first)


def style_axes(axes: "Axes") -> None:
    """A pale grid, whole numbers on the horizontal axis, and no frame above and on the right."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def write(workdir: Path, edges: Mapping[int, str]) -> None:
    """Draws `loss.png` of a run whose stages, by name, begin after the steps of `edges`; ValueError where nothing is logged."""
    write_atomically(workdir / PICTURE, png(picture(read(workdir / "metrics.jsonl"), edges)))


def picture(lines: Sequence[Mapping], edges: Mapping[int, str]) -> "Figure":
    """The loss, with its mean over a fiftieth of the steps, above the learning rate and the length of the sequences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps, loss = zip(*points(lines, "step", "loss_mean"), strict=True)
    begun = {step: name for step, name in edges.items() if step < steps[-1]}
    window = max(steps[-1] // 50, 1)
    mean = smoothed(steps, loss, window)
    above.plot(steps, loss, alpha=0.3, linewidth=1, color="C0", marker="." if len(steps) == 1 else None)
    of = f"mean of {window:,} steps; " if window > 1 else ""
    above.plot(steps, mean, linewidth=1.6, color="C0", label=f"{of}the last is {mean[-1]:.4g}")
    above.set(ylabel="loss (nats per token)")
    above.legend(frameon=False, loc="upper right")
    below.plot(*zip(*points(lines, "step", "lr"), strict=True), color="C1", linewidth=1.6)
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    below.yaxis.label.set_color("C1")
    for axes in (above, below):
        style_axes(axes)
        for step in begun if len(edges) > 1 else ():
            axes.axvline(step + 0.5, color="0.6", linewidth=0.8, linestyle=":")
    if len(edges) > 1:
        _draw_lengths(below, lines)
        for step, name in begun.items():
            above.text(step + 0.5, 1.01, f" {name}", transform=above.get_xaxis_transform(), fontsize="small", color="0.3")
    return figure


def _draw_lengths(axes: "Axes", lines: Sequence[Mapping]) -> None:
    """The length of the sequences, on an axis on the right."""
    right = axes.twinx()
    right.plot(*zip(*points(lines, "step", "seq_len"), strict=True), color="C2", linewidth=1.2, drawstyle="steps-pre")
    right.set(ylabel="tokens of a sequence", ylim=(0, None))
    right.yaxis.label.set_color("C2")
    right.spines[["top"]].set_visible(False)
