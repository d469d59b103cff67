"""Curves, points, losses and heat maps of a report, as figures of matplotlib."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation

from hybrid_attn.evals.report import escape
from hybrid_attn.evals.report.canvas import INK, MUTED, PAPER, RUNS, WIDTH, panels, single, style
from hybrid_attn.evals.report.statistics import Difference, Share, Z
from hybrid_attn.evals.report.tables import signed, tokens

WILSON = "Intervals of 95% (Wilson)"
MOST_TICKS = 8  # of lengths by their logarithm
ASIDE = 0.09  # inches to the next run's point where each has only one
CHARACTERS, LINE = 15, 0.18  # of a legend: characters to the inch, and inches of a line
LONGEST_NAME, LONGEST_LABEL = 22, 34  # in a legend, and beside an axis
NOTHING = "\u200b"  # a character without a width
DOTTED, DASHED, DASH_DOT, LONG_DASHED = (0, (1, 2)), (0, (4, 3)), (0, (7, 2, 1.5, 2)), (0, (7, 2))
# Vermilion, sand, blue: wrong and right are apart for every eye, and in grey.
SCORES = LinearSegmentedColormap.from_list("scores", ("#c8501e", "#e8a565", "#f1e8d6", "#7fb0d3", "#14568f"))
AMOUNTS = LinearSegmentedColormap.from_list("amounts", ("#e9eff4", "#a9cbe2", "#4f93c4", "#14568f", "#0b2f52"))
MOST_CHARACTERS, MOST_NAMES = 66, 24  # below a heat map, and beside it
MOST_NUMBERS = 14  # cells of a heat map in either direction that still have room for numbers
LIGHT, DARK, CENTRED = "#ffffff", "#20262e", {"ha": "center", "va": "center", "fontsize": 8}
Level = tuple[str, float, tuple]  # the name of a score or a loss that needs no model of ours, its value, and its dashes
PALE = {"alpha": 0.4, "linewidth": 3}  # the interval of a point


class Curve(NamedTuple):
    """Shares of right answers of one run by length; the run's number is its colour."""

    name: str
    number: int
    shares: Mapping[int, Share]

    def scores(self, top: float) -> np.ndarray:
        """The scores, of which `top` is all, and the lower and upper ends of their intervals, [3, lengths], by length."""
        return np.array([[top * x for x in self.shares[length][:3]] for length in sorted(self.shares)]).T

    @property
    def look(self) -> dict:
        """How matplotlib draws its points."""
        return {"color": RUNS[self.number % len(RUNS)], "marker": "o", "markersize": 4, "label": _label(self.name)}


# By panel or by name: curves; lines, each with a name, the number of its run, and buckets from `first` to `end`.
Curves, Lines = Mapping[str, Sequence[Curve]], Mapping[str, Sequence[tuple[str, int, Sequence[Mapping]]]]
Scores = Mapping[tuple[str, int], float]  # by name and length


@style()
def curves(by_panel: Curves, trained: Sequence[int], label: str, top: float, levels: Mapping[str, Level]) -> Figure:
    """Score from 0 to `top` by length, a panel for each name, which may have a level; marks at the lengths of training."""
    number, across = len(by_panel), min(len(by_panel), 4)
    size = {1: (WIDTH, 3.2), 2: (WIDTH, 2.5)}.get(across, (2.75 * across, 2.35 * -(-number // across) + 0.5))
    figure, grid = panels(number, across, size, label, sharex=True)
    for axes, (name, in_panel) in zip(grid.flat, by_panel.items(), strict=False):
        for curve in in_panel:
            _curve(axes, curve, top)
        _lengths_across(axes, _lengths_of(by_panel), trained)
        axes.set_ylim(-0.02 * top, 1.03 * top)
        if name in levels:
            level_line(axes, *levels[name])
        axes.set_title(side_label(name) if number > 1 else "")
    for axes in grid.flat[max(0, number - across) : number]:
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel("length (tokens)")
    return with_legend(figure)


def shares(by_panel: Curves, trained: Sequence[int], label: str, levels: Mapping[str, Level]) -> Figure:
    """Shares of right answers by length; of a single length as points."""
    single_length = len(_lengths_of(by_panel)) == 1
    return points(by_panel, label, 1, levels) if single_length else curves(by_panel, trained, label, 1, levels)


def _lengths_of(by_panel: Curves) -> list[int]:
    return sorted({length for in_panel in by_panel.values() for curve in in_panel for length in curve.shares})


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
    look, lengths = curve.look, sorted(curve.shares)
    scores, low, high = curve.scores(top)
    if len(lengths) == 1:  # beside the points of other runs, which may lie on it
        aside = axes.transData + ScaledTranslation(ASIDE * curve.number, 0, axes.figure.dpi_scale_trans)
        axes.plot(lengths * 2, (*low, *high), color=look["color"], transform=aside, **PALE)
        axes.plot(lengths, scores, linestyle="none", transform=aside, **look)
        return
    axes.fill_between(lengths, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(lengths, scores, ("-", "--", ":")[curve.number // len(RUNS) % 3], linewidth=1.6, **look)


def _lengths_across(axes: Axes, lengths: Sequence[int], trained: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks = lengths[:1]
    for length in lengths[1:]:
        if length >= ticks[-1] * (lengths[-1] / lengths[0]) ** (1 / MOST_TICKS):
            ticks.append(length)
    axes.set_xticks(ticks, [tokens(length) for length in ticks], minor=False)
    axes.minorticks_off()
    if len(lengths) == 1:
        axes.set_xlim(min([*lengths, *trained]) / 2, lengths[0] * 2)
    _mark(axes, trained, lengths[-1])


def _mark(axes: Axes, trained: Sequence[int], last: int) -> None:
    for length in sorted(length for length in set(trained) if length <= last):
        axes.axvline(length, color=INK, linewidth=1, linestyle=DASHED, alpha=0.6, label=f"trained at {tokens(length)}")


def level_line(axes: Axes, name: str, value: float, dashes: tuple) -> None:
    axes.axhline(value, color=MUTED, linewidth=1 if dashes == DOTTED else 1.2, linestyle=dashes, label=_label(name))


def with_legend(figure: Figure, longest: int = LONGEST_NAME) -> Figure:
    """Names the lines of all panels, in as many columns as the longest name allows."""
    handles: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [_short(label, longest) for label in handles]
    columns = int(np.clip(CHARACTERS * figure.get_figwidth() / (6 + max(map(len, names))), 1, len(handles)))
    figure.set_figheight(figure.get_figheight() + LINE * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), names, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
    return figure


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
def points(by_name: Curves, label: str, top: float, levels: Mapping[str, Level]) -> Figure:
    """Scores at one length: names down, scores across, a point with its interval for each run; marks show levels."""
    numbers = sorted({curve.number for of_name in by_name.values() for curve in of_name})
    step = 0.6 / max(len(numbers), 1)
    figure, axes = single(1.1 + max(0.3, 0.14 * len(numbers)) * max(len(by_name), 2))
    for line, (name, of_name) in enumerate(by_name.items()):
        for curve in of_name:
            y = line + step * (numbers.index(curve.number) - (len(numbers) - 1) / 2)
            scores, low, high = curve.scores(top)
            axes.plot([*low, *high], [y, y], color=curve.look["color"], solid_capstyle="butt", **PALE)
            axes.plot(scores, [y], linestyle="none", **curve.look)
        if name in levels:
            level, value, _ = levels[name]
            axes.plot([value] * 2, [line - 0.4, line + 0.4], color=MUTED, linewidth=1.5, label=level)
    axes.set_yticks(range(len(by_name)), map(side_label, by_name))
    axes.set(xlabel=label, xlim=(-0.02 * top, 1.03 * top), ylim=(len(by_name) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    return with_legend(figure)


@style()
def loss_by_position(by_panel: Lines, trained: Sequence[int], levels: Sequence[Level] = ()) -> Figure:
    """Loss by position: lines with gaps where no token was scored, and intervals of 95% from the losses of sequences."""
    number = len(by_panel)
    across = 2 if number == 4 else min(number, 3)
    size = (WIDTH, 3.0) if number < 3 else (3.7 * across, 2.6 * -(-number // across) + 0.5)
    figure, grid = panels(number, across, size, "loss (nats per token)")
    for axes, (name, lines) in zip(grid.flat, by_panel.items(), strict=False):
        for label, run, buckets in lines:
            losses, spreads, edges = _steps(buckets)
            band = {"fill": True, "alpha": 0.15, "linewidth": 0}
            axes.stairs(losses, edges, baseline=None, color=RUNS[run % len(RUNS)], linewidth=1.6, label=_label(label))
            axes.stairs(losses + spreads, edges, baseline=losses - spreads, color=RUNS[run % len(RUNS)], **band)
        for level in levels:
            level_line(axes, *level)
        positions_across(axes)
        _mark(axes, trained, max(bucket["end"] for *_, buckets in lines for bucket in buckets))
        axes.set(title=side_label(name), xlabel="position (tokens)")
    return with_legend(figure)


def positions_across(axes: Axes) -> None:
    """Tokens by their logarithm."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)) if x >= 1 else "")
    axes.xaxis.set_minor_formatter(NullFormatter())


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
    return losses, Z * errors, edges


@style()
def heat_map(lengths: Sequence[int], names: Sequence[str], shares: Scores, trained: int) -> Figure:
    """Lengths across, depths by their names down, shares of right answers by depth and length from 0 to 1."""
    width = WIDTH if len(lengths) > 2 else 2.1 + 0.9 * len(lengths)
    figure, axes = single(1.5 + 0.29 * min(max(len(names), 4), 16), width)
    _scale(figure, _scores(axes, lengths, names, shares, 1, trained), ticks=[0, 0.5, 1])
    axes.set(xlabel="context length (tokens)", ylabel="depth of the needle (%)")
    return figure


@style()
def task_map(runs: Sequence[tuple[str, Scores, int]], tasks: Sequence[str]) -> Figure:
    """Tasks down, lengths across, scores from 0 to 100; a panel for each run: its name, scores by task and length, training."""
    lengths = sorted({length for _, scores, _ in runs for _, length in scores})
    across = min(len(runs), 3)
    beside = 0.5 + 0.085 * max(len(side_label(task)) for task in tasks)  # inches
    width = max(WIDTH if across < 3 else 0, beside + across * max(1.3, 0.62 * len(lengths)))
    height = 0.9 + -(-len(runs) // across) * (0.55 + 0.25 * max(len(tasks), 3))
    figure, grid = panels(len(runs), across, (width, height))
    for axes, (name, scores, trained) in zip(grid.flat, runs, strict=False):
        _scores(axes, lengths, tasks, scores, 100, trained)
        axes.set(title=side_label(name) if len(runs) > 1 else "", xlabel="length (tokens)")
    return figure


@style()
def heads(values: np.ndarray, names: Sequence[str], most: float, label: str) -> Figure:
    """Layers down by their names, heads across, numbers from 0 to `most`; a layer without one does not reach the needle."""
    figure, axes = single(1.4 + 0.24 * min(max(len(names), 5), 28))
    image = _coloured(axes, values, [*map(str, range(values.shape[1]))], names, cmap=AMOUNTS, vmin=0, vmax=most)
    size = 9.5 if len(names) <= 16 else 7 if len(names) <= 40 else 5
    axes.set_yticks(np.arange(len(names)) + 0.5, map(side_label, names), fontsize=size)
    for row in np.flatnonzero(np.isnan(values).all(1)):
        axes.text(values.shape[1] / 2, row + 0.5, "out of reach", color=MUTED, **CENTRED)
    axes.set(xlabel="head", ylabel="layer")
    _scale(figure, image, label)
    return figure


@style()
def differences(differences: Sequence[Difference], number: int) -> Figure:
    """Tasks down, lengths across: run `number` less the first, in the colour of the better one where that is clear."""
    tasks, lengths = list(dict.fromkeys(x.task for x in differences)), sorted({x.length for x in differences})
    cells = np.full((len(tasks), len(lengths)), math.nan)
    figure, axes = single(1.2 + 0.27 * max(len(tasks), 3))
    for x in differences:
        row, column = tasks.index(x.task), lengths.index(x.length)
        clear = x.verdict != "unclear"
        cells[row, column] = x.difference if clear else 0
        colour = LIGHT if clear and abs(x.difference) > 0.45 else DARK
        weight = "bold" if clear else "normal"
        axes.text(column + 0.5, row + 0.5, signed(x.difference, 2), color=colour, fontweight=weight, **CENTRED)
    towards = LinearSegmentedColormap.from_list("towards", (RUNS[0], "#eef0f2", RUNS[number % len(RUNS)]))
    image = _coloured(axes, cells, [*map(tokens, lengths)], tasks, cmap=towards, vmin=-1, vmax=1)
    axes.set_xlabel("length (tokens)")
    _scale(figure, image, ticks=[-1, 0, 1])
    return figure


def _scores(axes: Axes, lengths: Sequence[int], names: Sequence[str], scores: Scores, top: float, trained: int) -> QuadMesh:
    """Scores from 0 to `top`, with numbers where there is room; a white dashed line before lengths beyond that of training."""
    cells = np.array([[scores.get((name, length), math.nan) for length in lengths] for name in names])
    for (row, column), score in np.ndenumerate(cells):
        if max(cells.shape) <= MOST_NUMBERS and not math.isnan(score):
            colour = DARK if 0.15 * top <= score <= 0.8 * top else LIGHT
            axes.text(column + 0.5, row + 0.5, f"{score:.2f}" if top == 1 else f"{score:.0f}", color=colour, **CENTRED)
    image = _coloured(axes, cells, [*map(tokens, lengths)], names, cmap=SCORES, vmin=0, vmax=top)
    beyond = sum(length <= trained for length in lengths)
    if beyond < len(lengths):
        axes.axvline(beyond, color=DARK, linewidth=4.5, clip_on=False)  # not cut off at the edge
        axes.axvline(beyond, color=LIGHT, linewidth=2.2, linestyle=(0, (3, 1.6)), clip_on=False)
    return image


def _coloured(axes: Axes, cells: np.ndarray, across: Sequence[str], down: Sequence[str], **scale) -> QuadMesh:
    """Cells in the colours of a scale, and the names of columns and rows, of which the first is at the top."""
    image = axes.pcolormesh(cells, edgecolors=PAPER, linewidth=0.8, **scale)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    every = -(-len(across) * (1 + max(map(len, across))) // MOST_CHARACTERS)
    axes.set_xticks(np.arange(len(across))[::every] + 0.5, across[::every])
    every = -(-len(down) // MOST_NAMES)
    axes.set_yticks(np.arange(len(down))[::every] + 0.5, map(side_label, down[::every]))
    axes.set_ylim(len(down), 0)
    return image


def _scale(figure: Figure, image: QuadMesh, label: str = "", ticks: Sequence[float] | None = None) -> None:
    bar = figure.colorbar(image, ax=image.axes, fraction=0.035, pad=0.02, ticks=ticks, label=label)
    bar.outline.set_visible(False)
