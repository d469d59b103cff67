"""Curves, points and losses of a report, as figures of matplotlib."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation

from hybrid_attn.evals.report import escape, statistics
from hybrid_attn.evals.report.canvas import INK, MUTED, RUNS, WIDTH, panels, single, style
from hybrid_attn.evals.report.statistics import Share
from hybrid_attn.evals.report.tables import tokens

WILSON = "Intervals of 95% (Wilson)"
MOST_TICKS = 8  # of lengths by their logarithm
ASIDE = 0.09  # inches to the next run's point where each has only one
CHARACTERS = 15  # to the inch of a legend
LINE = 0.18  # inches of a legend
LONGEST_NAME = 22
LONGEST_LABEL = 34  # beside an axis
NOTHING = "\u200b"  # a character without a width
DOTTED, DASHED, DASH_DOT, LONG_DASHED = (0, (1, 2)), (0, (4, 3)), (0, (7, 2, 1.5, 2)), (0, (7, 2))


class Curve(NamedTuple):
    """Shares of right answers of one run by length; the run's number is its colour."""

    name: str
    number: int
    shares: Mapping[int, Share]

    def scores(self, top: float) -> tuple[list[float], list[float], list[float]]:
        """The scores, of which `top` is all, and the lower and upper ends of their intervals; in order of length."""
        ordered = [self.shares[length] for length in sorted(self.shares)]
        return tuple([top * getattr(x, field) for x in ordered] for field in ("share", "low", "high"))


class Baseline(NamedTuple):
    """A loss that needs no model of ours, and the dashes of its line."""

    name: str
    loss: float
    dashes: tuple


@style()
def curves(
    by_panel: Mapping[str, Sequence[Curve]],
    trained: Sequence[int],
    label: str,
    top: float = 1,
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
            _curve(axes, curve, top)
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
    return {length for in_panel in by_panel.values() for curve in in_panel for length in curve.shares}


def shares(
    by_panel: Mapping[str, Sequence[Curve]], trained: Sequence[int], label: str, chance: Mapping[str, float] | None = None
) -> Figure:
    """Shares of right answers by length; of a single length as points."""
    if len(lengths_of(by_panel)) == 1:
        return points(by_panel, label, 1, chance)
    return curves(by_panel, trained, label, chance=chance)


def changes(curves: Sequence[Curve]) -> str:
    """How the share of each run changes from the shortest to the longest length; of the first three where there are many."""
    more = f"; and {len(curves) - 3} more runs" if len(curves) > 3 else ""
    return "; ".join(f"{curve.name} {_change(curve.shares)}" for curve in curves[:3]) + more + "."


def _change(shares: Mapping[int, Share]) -> str:
    percents = {tokens(length): f"{100 * shares[length].share:.0f}%" for length in sorted(shares)}
    first, last = tokens(min(shares)), tokens(max(shares))
    if len(shares) == 1:
        return f"{percents[first]} at {first}"
    if percents[first] == percents[last]:
        steady = len({*percents.values()}) == 1
        return f"{percents[first]} at {'all lengths' if steady else f'{first} and {last}'}"
    verb = "falls" if shares[max(shares)].share < shares[min(shares)].share else "rises"
    return f"{verb} from {percents[first]} at {first} to {percents[last]} at {last}"


def _curve(axes: Axes, curve: Curve, top: float) -> None:
    colour, lengths = RUNS[curve.number % len(RUNS)], sorted(curve.shares)
    scores, low, high = curve.scores(top)
    line = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.6, "label": _label(curve.name)}
    if len(lengths) == 1:  # beside the points of other runs, which may lie on it
        aside = axes.transData + ScaledTranslation(ASIDE * curve.number, 0, axes.figure.dpi_scale_trans)
        axes.plot(lengths * 2, (*low, *high), color=colour, alpha=0.4, linewidth=3, transform=aside)
        axes.plot(lengths, scores, "o", color=colour, markersize=4, label=_label(curve.name), transform=aside)
        return
    axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(lengths, scores, ("-", "--", ":")[curve.number // len(RUNS) % 3], **line)


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


def legend(figure: Figure, longest: int = LONGEST_NAME) -> None:
    """Names the lines of all panels, in as many columns as the longest name allows."""
    handles: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [_short(label, longest) for label in handles]
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


@style()
def points(by_name: Mapping[str, Sequence[Curve]], label: str, top: float, chance: Mapping[str, float] | None = None) -> Figure:
    """Scores at one length: names down, scores across, a point with its interval for each run; marks show a guess."""
    numbers = sorted({curve.number for of_name in by_name.values() for curve in of_name})
    step = 0.6 / max(len(numbers), 1)
    figure, axes = single(1.1 + max(0.3, 0.14 * len(numbers)) * max(len(by_name), 2))
    for line, (name, of_name) in enumerate(by_name.items()):
        for curve in of_name:
            y, colour = line + step * (numbers.index(curve.number) - (len(numbers) - 1) / 2), RUNS[curve.number % len(RUNS)]
            scores, low, high = curve.scores(top)
            axes.plot([*low, *high], [y, y], color=colour, alpha=0.4, linewidth=3, solid_capstyle="butt")
            axes.plot(scores, [y], "o", color=colour, markersize=4, label=_label(curve.name))
        if chance and name in chance:
            axes.plot([chance[name]] * 2, [line - 0.4, line + 0.4], color=MUTED, linewidth=1.5, label="chance")
    axes.set_yticks(range(len(by_name)), map(side_label, by_name))
    axes.set(xlabel=label, xlim=(-0.02 * top, 1.03 * top), ylim=(len(by_name) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    legend(figure)
    return figure


@style()
def loss_by_position(
    by_panel: Mapping[str, Sequence[tuple[str, int, Sequence[Mapping]]]],
    trained: Sequence[int],
    baselines: Sequence[Baseline] = (),
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
        for label, loss, dashes in baselines:
            axes.axhline(loss, color=MUTED, linewidth=1.2, linestyle=dashes, label=_label(label))
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
