"""Curves, points and losses of a report, drawn with matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation

from hybrid_attn.evals.report import contents, escape, statistics
from hybrid_attn.evals.report.canvas import INK, MUTED, RUNS, styled
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.tables import tokens

MOST_TICKS = 8  # of lengths by their logarithm
ASIDE = 0.09  # inches to the next run's point where each has only one
CHARACTERS = 15  # to the inch of a legend
LINE = 0.18  # inches of a legend
LONGEST_NAME = 22
LONGEST_LABEL = 34  # beside an axis
NOTHING = "\u200b"  # a character without a width
DOTTED, DASHED, DASH_DOT, LONG_DASHED = (0, (1, 2)), (0, (4, 3)), (0, (7, 2, 1.5, 2)), (0, (7, 2))


class Curve(NamedTuple):
    """Scores of one run by length, with the interval of each; the run's number is its colour."""

    name: str
    number: int
    lengths: Sequence[int]
    scores: Sequence[float]
    bands: Sequence[tuple[float, float]]


@styled
def curves(
    panels: Mapping[str, Sequence[Curve]],
    trained: Sequence[int],
    label: str,
    top: float,
    least: float | None,
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Score by length, a panel for each name, with lengths by their logarithm and marks at the lengths of training.

    Scores lie between 0 and `top`; a line at `least`, if there is one, is what counts as enough, and one at a panel's `chance`
    is what a guess scores.
    """
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    width, height = {1: (4.9, 3.2), 2: (4.9, 2.5)}.get(across, (2.75 * across, 2.35 * down + 0.5))
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    every = sorted({length for several in panels.values() for curve in several for length in curve.lengths})
    for axes, (name, several) in zip(grid.flat, panels.items(), strict=False):
        for curve in several:
            _curve(axes, curve)
        _lengths_across(axes, every, trained)
        axes.set_ylim(-0.02 * top, 1.03 * top)
        if least is not None:
            axes.axhline(least, color=MUTED, linewidth=1, linestyle=DOTTED, label=f"enough ({least:g})")
        if chance and name in chance:
            axes.axhline(chance[name], color=MUTED, linewidth=1.2, linestyle=DASH_DOT, label="chance")
        axes.set_title(_short(escape.label(name), LONGEST_LABEL) if len(panels) > 1 else "")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(panels) - across) : len(panels)]:
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel("length (tokens)")
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    legend(figure)
    return figure


def _curve(axes: Axes, curve: Curve) -> None:
    colour = RUNS[curve.number % len(RUNS)]
    low, high = zip(*curve.bands, strict=True)
    if len(curve.lengths) == 1:  # beside the points of other runs, which may lie on it
        aside = axes.transData + ScaledTranslation(ASIDE * curve.number, 0, axes.figure.dpi_scale_trans)
        axes.plot(curve.lengths * 2, (*low, *high), color=colour, alpha=0.4, linewidth=3, transform=aside)
        axes.plot(curve.lengths, curve.scores, "o", color=colour, markersize=4, label=_label(curve.name), transform=aside)
        return
    axes.fill_between(curve.lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    style = ("-", "--", ":")[curve.number // len(RUNS) % 3]
    line = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.6, "label": _label(curve.name)}
    axes.plot(curve.lengths, curve.scores, style, **line)


def _lengths_across(axes: Axes, lengths: Sequence[int], trained: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = lengths[:1]
    for length in lengths[1:]:
        if length >= shown[-1] * (lengths[-1] / lengths[0]) ** (1 / MOST_TICKS):
            shown.append(length)
    axes.set_xticks(shown, [tokens(length) for length in shown], minor=False)
    axes.minorticks_off()
    marks = [length for length in trained if length <= lengths[-1]]
    if len(lengths) == 1:
        axes.set_xlim(min([*lengths, *marks]) / 2, lengths[0] * 2)
    _mark(axes, marks)


def _mark(axes: Axes, trained: Sequence[int]) -> None:
    for length in sorted(set(trained)):
        axes.axvline(length, color=INK, linewidth=1, linestyle=DASHED, alpha=0.6, label=f"trained at {tokens(length)}")


def legend(figure: Figure) -> None:
    """What the lines of all panels are, in as many columns as the longest name allows."""
    handles: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [_short(label, LONGEST_LABEL if label.startswith(("local", "global")) else LONGEST_NAME) for label in handles]
    room = int(CHARACTERS * figure.get_figwidth() / (6 + max(map(len, names))))
    columns = max(1, min(len(handles), room))
    figure.set_figheight(figure.get_figheight() + LINE * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), names, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)


def _label(name: str) -> str:
    """What a legend shows: matplotlib leaves labels out that begin with an underscore."""
    name = escape.label(name)
    return f"{NOTHING}{name}" if name.startswith("_") else name


def _short(name: str, longest: int) -> str:
    """Without its middle: names of runs differ at their ends."""
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def side_label(name: str) -> str:
    """A name beside an axis."""
    return _short(escape.label(name), LONGEST_LABEL)


@styled
def points(rows: Mapping[str, Sequence[Curve]], label: str, top: float, chance: Mapping[str, float] | None = None) -> Figure:
    """Scores at one length: names down, scores across, a point with its interval for each run; marks where a guess scores."""
    numbers = sorted({curve.number for several in rows.values() for curve in several})
    step = 0.6 / max(len(numbers), 1)
    figure = Figure(figsize=(4.9, 1.1 + max(0.3, 0.14 * len(numbers)) * max(len(rows), 2)), layout="constrained")
    axes = figure.subplots()
    for place, (name, several) in enumerate(rows.items()):
        for curve in several:
            y, colour = place + step * (numbers.index(curve.number) - (len(numbers) - 1) / 2), RUNS[curve.number % len(RUNS)]
            axes.plot(curve.bands[0], [y, y], color=colour, alpha=0.4, linewidth=3, solid_capstyle="butt")
            axes.plot(curve.scores, [y], "o", color=colour, markersize=4, label=_label(curve.name))
        if chance and name in chance:
            axes.plot([chance[name]] * 2, [place - 0.4, place + 0.4], color=MUTED, linewidth=1.5, label="chance")
    axes.set_yticks(range(len(rows)), map(side_label, rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02 * top, 1.03 * top)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    legend(figure)
    return figure


@styled
def loss_by_position(
    panels: Mapping[str, Sequence[tuple[str, int, Sequence[Mapping]]]],
    trained: Sequence[int],
    beside: Mapping[str, float] | None = None,
) -> Figure:
    """Loss by position, a panel for each name; a line has a name, the number of its run, and buckets from `first` to `end`.

    A line has a gap where no token was scored, and around it the interval of 95% that the losses of rows leave. `beside` are
    losses of simpler models, a level line each.
    """
    across = 2 if len(panels) == 4 else min(len(panels), 3)
    down = -(-len(panels) // across)
    size = (4.9, 3.0) if len(panels) < 3 else (3.7 * across, 2.6 * down + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        for label, number, buckets in lines:
            losses, spreads, edges = _steps(buckets)
            colour = RUNS[number % len(RUNS)]
            axes.stairs(losses, edges, baseline=None, color=colour, linewidth=1.6, label=_label(label))
            axes.stairs(losses + spreads, edges, baseline=losses - spreads, fill=True, color=colour, alpha=0.15, linewidth=0)
        for label, loss in (beside or {}).items():
            style = DASH_DOT if label.startswith("chance") else LONG_DASHED
            axes.axhline(loss, color=MUTED, linewidth=1.2, linestyle=style, label=_label(label))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)) if x >= 1 else "")
        axes.xaxis.set_minor_formatter(NullFormatter())
        last = max(bucket["end"] for *_, buckets in lines for bucket in buckets)
        _mark(axes, [length for length in trained if length <= last])
        axes.set_title(side_label(name))
        axes.set_xlabel("position (tokens)")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss (nats per token)")
    legend(figure)
    return figure


def _steps(buckets: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Losses, half their intervals, NaN between buckets that do not meet, and the edges around them: a logarithm has no 0."""
    buckets = sorted(buckets, key=lambda bucket: bucket["first"])
    found, edges = [], [max(buckets[0]["first"], 1)]
    for bucket in (bucket for bucket in buckets if bucket["end"] > edges[-1]):
        if bucket["first"] > edges[-1]:
            found.append((None, None))
            edges.append(bucket["first"])
        found.append((bucket["loss"], bucket.get("stderr")))
        edges.append(bucket["end"])
    losses, errors = np.array(found, float).reshape(-1, 2).T
    return losses, statistics.Z * errors, edges


def wilson_curve(name: str, number: int, cells: Mapping[int, tuple[float, float]], top: float = 1) -> Curve:
    """A curve through shares of right answers, of which `top` is all: `cells` has right answers and answers by length."""
    lengths = sorted(cells)
    shares = [top * cells[length][0] / cells[length][1] for length in lengths]
    bands = [tuple(top * x for x in statistics.wilson(*cells[length])) for length in lengths]
    return Curve(name, number, lengths, shares, bands)


def mean_curve(run: Run, number: int, belongs: Callable[[int], bool]) -> Curve:
    """RULER's mean over tasks, with the intervals of its tasks combined."""
    means = contents.ruler_means(run, belongs)
    bands = [(100 * low, 100 * high) for low, high, _ in contents.ruler_intervals(run, belongs).values()]
    return Curve(run.name, number, list(means), list(means.values()), bands)
