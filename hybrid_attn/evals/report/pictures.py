"""Curves, points and losses of a report, as figures of matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation

from hybrid_attn.evals.report import contents, escape, statistics
from hybrid_attn.evals.report.canvas import INK, MUTED, RUNS, WIDTH, panels, single, styled
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
    by_panel: Mapping[str, Sequence[Curve]],
    trained: Sequence[int],
    label: str,
    top: float,
    enough: float | None = None,
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Score by length, a panel for each name, with lengths by their logarithm and marks at the lengths of training.

    Scores lie between 0 and `top`; a line shows the score that is `enough`, and one the score of a guess in a panel.
    """
    number, across = len(by_panel), min(len(by_panel), 4)
    size = {1: (WIDTH, 3.2), 2: (WIDTH, 2.5)}.get(across, (2.75 * across, 2.35 * -(-number // across) + 0.5))
    figure, grid = panels(number, across, size, label, sharex=True)
    lengths = sorted(lengths_of(by_panel))
    for axes, (name, in_panel) in zip(grid.flat, by_panel.items(), strict=False):
        for curve in in_panel:
            _curve(axes, curve)
        _lengths_across(axes, lengths, trained)
        axes.set_ylim(-0.02 * top, 1.03 * top)
        if enough is not None:
            axes.axhline(enough, color=MUTED, linewidth=1, linestyle=DOTTED, label=f"enough ({enough:g})")
        if chance and name in chance:
            axes.axhline(chance[name], color=MUTED, linewidth=1.2, linestyle=DASH_DOT, label="chance")
        axes.set_title(side_label(name) if number > 1 else "")
    for axes in grid.flat[max(0, number - across) : number]:
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel("length (tokens)")
    legend(figure)
    return figure


def lengths_of(by_panel: Mapping[str, Sequence[Curve]]) -> set[int]:
    return {length for in_panel in by_panel.values() for curve in in_panel for length in curve.lengths}


def shares(
    by_panel: Mapping[str, Sequence[Curve]], trained: Sequence[int], label: str, chance: Mapping[str, float] | None = None
) -> Figure:
    """Shares of right answers by length; of a single length as points."""
    if len(lengths_of(by_panel)) == 1:
        return points(by_panel, label, 1, chance)
    return curves(by_panel, trained, label, 1, chance=chance)


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
    ticks = lengths[:1]
    for length in lengths[1:]:
        if length >= ticks[-1] * (lengths[-1] / lengths[0]) ** (1 / MOST_TICKS):
            ticks.append(length)
    axes.set_xticks(ticks, [tokens(length) for length in ticks], minor=False)
    axes.minorticks_off()
    marks = [length for length in trained if length <= lengths[-1]]
    if len(lengths) == 1:
        axes.set_xlim(min([*lengths, *marks]) / 2, lengths[0] * 2)
    _mark(axes, marks)


def _mark(axes: Axes, trained: Sequence[int]) -> None:
    for length in sorted(set(trained)):
        axes.axvline(length, color=INK, linewidth=1, linestyle=DASHED, alpha=0.6, label=f"trained at {tokens(length)}")


def legend(figure: Figure) -> None:
    """Names the lines of all panels, in as many columns as the longest name allows."""
    handles: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [_short(label, LONGEST_LABEL if label.startswith(("local", "global")) else LONGEST_NAME) for label in handles]
    most_columns = int(CHARACTERS * figure.get_figwidth() / (6 + max(map(len, names))))
    columns = max(1, min(len(handles), most_columns))
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
def points(by_name: Mapping[str, Sequence[Curve]], label: str, top: float, chance: Mapping[str, float] | None = None) -> Figure:
    """Scores at one length: names down, scores across, a point with its interval for each run; marks show a guess."""
    numbers = sorted({curve.number for of_name in by_name.values() for curve in of_name})
    step = 0.6 / max(len(numbers), 1)
    figure, axes = single(1.1 + max(0.3, 0.14 * len(numbers)) * max(len(by_name), 2))
    for line, (name, of_name) in enumerate(by_name.items()):
        for curve in of_name:
            y, colour = line + step * (numbers.index(curve.number) - (len(numbers) - 1) / 2), RUNS[curve.number % len(RUNS)]
            axes.plot(curve.bands[0], [y, y], color=colour, alpha=0.4, linewidth=3, solid_capstyle="butt")
            axes.plot(curve.scores, [y], "o", color=colour, markersize=4, label=_label(curve.name))
        if chance and name in chance:
            axes.plot([chance[name]] * 2, [line - 0.4, line + 0.4], color=MUTED, linewidth=1.5, label="chance")
    axes.set_yticks(range(len(by_name)), map(side_label, by_name))
    axes.set(xlabel=label, xlim=(-0.02 * top, 1.03 * top), ylim=(len(by_name) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    legend(figure)
    return figure


@styled
def loss_by_position(
    by_panel: Mapping[str, Sequence[tuple[str, int, Sequence[Mapping]]]],
    trained: Sequence[int],
    baselines: Mapping[str, float] | None = None,
) -> Figure:
    """Loss by position, a panel for each name; a line has a name, the number of its run, and buckets from `first` to `end`.

    A line has a gap where no token was scored, and around it the interval of 95% that follows from the losses of sequences.
    A level line shows the loss of each of the `baselines`.
    """
    number = len(by_panel)
    across = 2 if number == 4 else min(number, 3)
    size = (WIDTH, 3.0) if number < 3 else (3.7 * across, 2.6 * -(-number // across) + 0.5)
    figure, grid = panels(number, across, size, "loss (nats per token)")
    for axes, (name, lines) in zip(grid.flat, by_panel.items(), strict=False):
        for label, run, buckets in lines:
            _loss_line(axes, buckets, RUNS[run % len(RUNS)], label)
        for label, loss in (baselines or {}).items():
            style = DASH_DOT if label.startswith("chance") else LONG_DASHED
            axes.axhline(loss, color=MUTED, linewidth=1.2, linestyle=style, label=_label(label))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)) if x >= 1 else "")
        axes.xaxis.set_minor_formatter(NullFormatter())
        last = max(bucket["end"] for *_, buckets in lines for bucket in buckets)
        _mark(axes, [length for length in trained if length <= last])
        axes.set(title=side_label(name), xlabel="position (tokens)")
    legend(figure)
    return figure


def _loss_line(axes: Axes, buckets: Sequence[Mapping], colour: str, label: str) -> None:
    losses, spreads, edges = _steps(buckets)
    axes.stairs(losses, edges, baseline=None, color=colour, linewidth=1.6, label=_label(label))
    axes.stairs(losses + spreads, edges, baseline=losses - spreads, fill=True, color=colour, alpha=0.15, linewidth=0)


def _steps(buckets: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Losses, half their intervals, NaN between buckets that do not meet, and the edges around them: a logarithm has no 0."""
    buckets = sorted(buckets, key=lambda bucket: bucket["first"])
    values, edges = [], [max(buckets[0]["first"], 1)]
    for bucket in (bucket for bucket in buckets if bucket["end"] > edges[-1]):
        if bucket["first"] > edges[-1]:
            values.append((None, None))
            edges.append(bucket["first"])
        values.append((bucket["loss"], bucket.get("stderr")))
        edges.append(bucket["end"])
    losses, errors = np.array(values, float).reshape(-1, 2).T
    return losses, statistics.Z * errors, edges


def wilson_curve(name: str, number: int, cells: Mapping[int, tuple[float, float]], top: float = 1) -> Curve:
    """A curve through shares of right answers, of which `top` is all: `cells` has right answers and answers by length."""
    lengths = sorted(cells)
    scores = [top * cells[length][0] / cells[length][1] for length in lengths]
    bands = [tuple(top * x for x in statistics.wilson(*cells[length])) for length in lengths]
    return Curve(name, number, lengths, scores, bands)


def mean_curve(run: Run, number: int, belongs: Callable[[int], bool]) -> Curve:
    """RULER's mean over tasks, with the intervals of its tasks combined."""
    means = contents.ruler_means(run, belongs)
    bands = [(100 * low, 100 * high) for low, high, _ in contents.ruler_intervals(run, belongs).values()]
    return Curve(run.name, number, list(means), list(means.values()), bands)
