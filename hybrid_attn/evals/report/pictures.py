"""The pictures of a report, drawn with matplotlib."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from hybrid_attn.evals.report import contents, statistics
from hybrid_attn.evals.report.canvas import INK, MUTED, PAPER, RUNS, styled
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.statistics import Difference
from hybrid_attn.evals.report.tables import signed, tokens

SEGMENTS = {"begin": "#3b4a5a", "needle": "#d9822b", "context": "#8fb3cf", "qc": "#c7cfd6", "nothing": "#ebe3d3"}
SEGMENT_NAMES = {
    "begin": "first tokens",
    "needle": "needle",
    "context": "context",
    "qc": "question",
    "nothing": "nothing (sink)",
}
# Vermilion, sand, blue: wrong and right are apart for every eye, and in grey.
SCORES = LinearSegmentedColormap.from_list("scores", ("#c8501e", "#e8a565", "#f1e8d6", "#7fb0d3", "#14568f"))
AMOUNTS = LinearSegmentedColormap.from_list("amounts", ("#e9eff4", "#a9cbe2", "#4f93c4", "#14568f", "#0b2f52"))
MOST_TICKS = 8  # of lengths by their logarithm
ASIDE = 0.09  # inches to the next run's point where each has only one
MOST_CHARACTERS = 66  # below a heat map
CHARACTERS = 15  # to the inch of a legend
LINE = 0.18  # inches of a legend
LONGEST_NAME = 22
NOTHING = "\u200b"  # a character without a width
CENTRED = {"ha": "center", "va": "center", "fontsize": 8}
MOST_NUMBERS = 12  # cells of a heat map in either direction that still have room for numbers


class Curve(NamedTuple):
    """Scores of one run by length, with the interval of each; the run's number is its colour."""

    name: str
    number: int
    lengths: Sequence[int]
    scores: Sequence[float]
    bands: Sequence[tuple[float, float]]


@styled
def curves(
    panels: Mapping[str, Sequence[Curve]], trained: Sequence[int], label: str, top: float, least: float | None
) -> Figure:
    """Score by length, a panel for each name, with lengths by their logarithm and marks at the lengths of training.

    Scores lie between 0 and `top`; a line at `least`, if there is one, is what counts as enough.
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
            axes.axhline(least, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_title(_escaped(name) if len(panels) > 1 else "")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(panels) - across) : len(panels)]:
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    _legend(figure)
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
    axes.plot(
        curve.lengths, curve.scores, style, color=colour, marker="o", markersize=4, linewidth=1.6, label=_label(curve.name)
    )


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
        axes.axvline(length, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, label=f"trained at {tokens(length)}")


def _legend(figure: Figure) -> None:
    """What the lines of all panels are, in as many columns as the longest name allows."""
    handles: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [_escaped(_short(label)) for label in handles]
    room = int(CHARACTERS * figure.get_figwidth() / (6 + max(map(len, names))))
    columns = max(1, min(len(handles), room))
    figure.set_figheight(figure.get_figheight() + LINE * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), names, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)


def _label(name: str) -> str:
    """What a legend shows: matplotlib leaves labels out that begin with an underscore."""
    return f"{NOTHING}{name}" if name.startswith("_") else name


def _escaped(text: str) -> str:
    """Without formulas: matplotlib reads one between two dollars."""
    return text.replace("$", r"\$")


def _short(name: str) -> str:
    """Without its middle: names of runs differ at their ends."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


@styled
def heat_map(lengths: Sequence[int], depths: Sequence[float], shares: Mapping, trained: int) -> Figure:
    """Lengths across, depths down, the share of right answers as a colour of a fixed scale, 0 to 1, and as a number.

    `shares` has them by length and depth. A white dashed line parts the lengths up to that of training from those beyond it.
    """
    cells = np.array([[shares.get((length, depth), math.nan) for length in lengths] for depth in depths])
    figure = Figure(figsize=(4.9, 1.5 + 0.29 * min(max(len(depths), 4), 16)), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(cells, cmap=SCORES, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.8)
    _cells_named(axes, [tokens(length) for length in lengths], [f"{depth:.0f}" for depth in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the needle (%)")
    if max(cells.shape) <= MOST_NUMBERS:
        _numbers(axes, cells)
    beyond = sum(length <= trained for length in lengths)
    if beyond < len(lengths):
        axes.axvline(beyond, color="#20262e", linewidth=4.5, clip_on=False)  # whole at the edge, too
        axes.axvline(beyond, color="#ffffff", linewidth=2.2, linestyle=(0, (3, 1.6)), clip_on=False)
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    return figure


def _cells_named(axes: Axes, across: Sequence[str], down: Sequence[str]) -> None:
    axes.grid(False)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    every = -(-len(across) * (1 + max(map(len, across))) // MOST_CHARACTERS)
    axes.set_xticks(np.arange(len(across))[::every] + 0.5, across[::every])
    every = -(-len(down) // 24)
    axes.set_yticks(np.arange(len(down))[::every] + 0.5, down[::every])


def _numbers(axes: Axes, cells: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(cells):
        if not math.isnan(share):
            dark = share < 0.15 or share > 0.8
            colour, x, y = "#ffffff" if dark else "#20262e", column + 0.5, row + 0.5
            axes.text(x, y, f"{share:.2f}", color=colour, **CENTRED)


@styled
def loss_by_position(panels: Mapping[str, Sequence[tuple[str, int, Sequence[Mapping]]]], trained: Sequence[int]) -> Figure:
    """Loss by position, a panel for each name; a line has a name, the number of its run, and buckets from `first` to `end`.

    A line has a gap where no token was scored, and around it the interval of 95% that the losses of rows leave.
    """
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.9, 3.0) if across < 3 else (3.7 * across, 3 * down + 0.5), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        for label, number, buckets in lines:
            losses, spreads, edges = _steps(buckets)
            colour = RUNS[number % len(RUNS)]
            axes.stairs(losses, edges, baseline=None, color=colour, linewidth=1.6, label=_label(label))
            axes.stairs(losses + spreads, edges, baseline=losses - spreads, fill=True, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)) if x >= 1 else "")
        _mark(axes, trained)
        axes.set_title(name)
        axes.set_xlabel("position (tokens)")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss (nats per token)")
    _legend(figure)
    return figure


def _steps(buckets: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Losses, half their intervals, NaN between buckets that do not meet, and the edges around them: a logarithm has no 0."""
    found, edges = [], [max(buckets[0]["first"], 1)]
    for bucket in buckets:
        if bucket["first"] > edges[-1]:
            found.append((None, None))
            edges.append(bucket["first"])
        found.append((bucket["loss"], bucket.get("stderr")))
        edges.append(bucket["end"])
    losses, errors = np.array(found, float).T
    return losses, statistics.Z * errors, edges


@styled
def attention_by_layer(layers: Sequence[tuple[int, str, bool, Mapping[str, float]]]) -> Figure:
    """Stacked shares of attention, a bar for each layer: its number, its kind, whether the needle is in reach, the shares."""
    figure = Figure(figsize=(4.9, 3.0), layout="constrained")
    axes = figure.subplots()
    places, bottom = np.arange(len(layers)), np.zeros(len(layers))
    for segment, colour in SEGMENTS.items():
        heights = np.array([shares[segment] or 0 for *_, shares in layers])
        if heights.any():
            axes.bar(places, heights, 0.82, bottom, color=colour, label=SEGMENT_NAMES[segment])
        bottom += heights
    every = -(-len(layers) // 16)
    axes.set_xticks(places[::every], [f"{number}\n{kind}" for number, kind, *_ in layers[::every]])
    far = [place for place, (_, _, reach, _) in zip(places, layers, strict=True) if not reach]
    if far:
        axes.plot(far, [1.035] * len(far), "x", color=MUTED, markersize=5, clip_on=False, label="needle out of reach")
    axes.set_ylim(0, 1.06)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("layer and its kind")
    axes.set_ylabel("share of attention")
    _legend(figure)
    return figure


@styled
def weight_by_position(
    weights: Mapping[str, Sequence[float]], edges: Sequence[float], length: int, kinds: Sequence[str]
) -> Figure:
    """The mean weight of a key by its position, a line for each kind of layer, beside equal weights of all `length` keys.

    A kind's colour is that of its place in `kinds`, the same in every picture of a report.
    """
    figure = Figure(figsize=(4.9, 3.0), layout="constrained")
    axes = figure.subplots()
    for kind, of_kind in weights.items():
        seen = [weight if weight > 0 else math.nan for weight in of_kind]
        colour = RUNS[-1 - kinds.index(kind) % len(RUNS)]
        axes.stairs(seen, edges, baseline=None, color=colour, linewidth=1.6, label=f"layers {kind}")
    axes.axhline(1 / length, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="all alike")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)))
    axes.set_xlabel("position of the key (tokens)")
    axes.set_ylabel("mean weight of a key")
    _legend(figure)
    return figure


@styled
def heads(values: np.ndarray, rows: Sequence[str], most: float, label: str) -> Figure:
    """A heat map of layers down and heads across; `rows` names the layers, the scale is 0 to `most`.

    A layer without a number has a window that does not reach the needle.
    """
    figure = Figure(figsize=(4.9, 1.4 + 0.24 * min(max(len(rows), 5), 16)), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(values, cmap=AMOUNTS, vmin=0, vmax=most, edgecolors=PAPER, linewidth=0.8)
    _cells_named(axes, [str(head) for head in range(values.shape[1])], rows)
    for row in np.flatnonzero(np.isnan(values).all(1)):
        axes.text(values.shape[1] / 2, row + 0.5, "out of reach", color=MUTED, **CENTRED)
    axes.set_xlabel("head")
    axes.set_ylabel("layer and its kind")
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure


@styled
def differences(found: Sequence[Difference], number: int) -> Figure:
    """Tasks down, lengths across: the difference of scores, in the colour of the better run where it is clear.

    `number` is that of the run which is compared with the first.
    """
    tasks, lengths = list(dict.fromkeys(x.task for x in found)), sorted({x.length for x in found})
    cells = np.full((len(tasks), len(lengths)), math.nan)
    figure = Figure(figsize=(4.9, 1.2 + 0.27 * max(len(tasks), 3)), layout="constrained")
    axes = figure.subplots()
    for x in found:
        row, column = tasks.index(x.task), lengths.index(x.length)
        clear = contents.verdict(x) != "unclear"
        cells[row, column] = x.difference if clear else 0
        colour = "#ffffff" if clear and abs(x.difference) > 0.45 else "#20262e"
        weight = "bold" if clear else "normal"
        axes.text(column + 0.5, row + 0.5, signed(2)(x.difference), color=colour, fontweight=weight, **CENTRED)
    towards = LinearSegmentedColormap.from_list("towards", (RUNS[0], "#eef0f2", RUNS[number % len(RUNS)]))
    image = axes.pcolormesh(cells, cmap=towards, vmin=-1, vmax=1, edgecolors=PAPER, linewidth=0.8)
    _cells_named(axes, [tokens(length) for length in lengths], tasks)
    axes.set_xlabel("length (tokens)")
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02, ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    return figure


def wilson_curve(name: str, number: int, cells: Mapping[int, tuple[float, float]]) -> Curve:
    """A curve through shares of right answers: `cells` has right answers and answers by length."""
    lengths = sorted(cells)
    shares = [cells[length][0] / cells[length][1] for length in lengths]
    return Curve(name, number, lengths, shares, [statistics.wilson(*cells[length]) for length in lengths])


def mean_curve(run: Run, number: int, belongs: Callable[[int], bool]) -> Curve:
    """RULER's mean over tasks, with the intervals of its tasks combined."""
    means, tasks = contents.ruler_means(run, belongs), contents.ruler_tasks_of(run, belongs)
    cells: dict[int, list[tuple[float, int]]] = {length: [] for length in means}
    for r in run.of("ruler"):
        if r["length"] in cells and r["task"] in tasks:
            cells[r["length"]].append((r["score"] / 100 * r["samples"], r["samples"]))
    bands = [(100 * low, 100 * high) for low, high in map(statistics.mean_interval, cells.values())]
    return Curve(run.name, number, list(means), list(means.values()), bands)
