"""Heat maps of a report: needles, tasks, heads and differences, each cell a colour and, where there is room, a number."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from hybrid_attn.evals.report.canvas import MUTED, PAPER, RUNS, WIDTH, panels, single, style
from hybrid_attn.evals.report.pictures import side_label
from hybrid_attn.evals.report.statistics import Difference
from hybrid_attn.evals.report.tables import signed, tokens

# Vermilion, sand, blue: wrong and right are apart for every eye, and in grey.
SCORES = LinearSegmentedColormap.from_list("scores", ("#c8501e", "#e8a565", "#f1e8d6", "#7fb0d3", "#14568f"))
AMOUNTS = LinearSegmentedColormap.from_list("amounts", ("#e9eff4", "#a9cbe2", "#4f93c4", "#14568f", "#0b2f52"))
MOST_CHARACTERS = 66  # below a heat map
CENTRED = {"ha": "center", "va": "center", "fontsize": 8}
MOST_NUMBERS = 14  # cells of a heat map in either direction that still have room for numbers
LIGHT, DARK = "#ffffff", "#20262e"


@style()
def heat_map(lengths: Sequence[int], names: Sequence[str], shares: Mapping[tuple[str, int], float], trained: int) -> Figure:
    """Lengths across, depths by their names down, shares of right answers by depth and length from 0 to 1."""
    width = WIDTH if len(lengths) > 2 else 2.1 + 0.9 * len(lengths)
    figure, axes = single(1.5 + 0.29 * min(max(len(names), 4), 16), width)
    _scale(figure, axes, _scores(axes, lengths, names, shares, 1), ticks=[0, 0.5, 1])
    axes.set(xlabel="context length (tokens)", ylabel="depth of the needle (%)")
    _mark_beyond(axes, lengths, trained)
    return figure


@style()
def task_map(runs: Sequence[tuple[str, Mapping[tuple[str, int], float], int]], tasks: Sequence[str]) -> Figure:
    """Tasks down, lengths across, scores from 0 to 100; a panel for each run: its name, scores by task and length, training."""
    lengths = sorted({length for _, scores, _ in runs for _, length in scores})
    across = min(len(runs), 3)
    beside = 0.5 + 0.085 * max(len(side_label(task)) for task in tasks)  # inches
    width = max(WIDTH if across < 3 else 0, beside + across * max(1.3, 0.62 * len(lengths)))
    height = 0.9 + -(-len(runs) // across) * (0.55 + 0.25 * max(len(tasks), 3))
    figure, grid = panels(len(runs), across, (width, height))
    for axes, (name, scores, trained) in zip(grid.flat, runs, strict=False):
        _scores(axes, lengths, tasks, scores, 100)
        _mark_beyond(axes, lengths, trained)
        axes.set(title=side_label(name) if len(runs) > 1 else "", xlabel="length (tokens)")
    grid[0, 0].set_ylim(len(tasks), 0)
    return figure


def _coloured(axes: Axes, cells: np.ndarray, colours: Colormap, low: float, high: float) -> QuadMesh:
    return axes.pcolormesh(cells, cmap=colours, vmin=low, vmax=high, edgecolors=PAPER, linewidth=0.8)


def _scores(
    axes: Axes, lengths: Sequence[int], names: Sequence[str], scores: Mapping[tuple[str, int], float], top: float
) -> QuadMesh:
    """Names down, lengths across; colours of a fixed scale from 0 to `top`, and numbers where there is room."""
    cells = np.array([[scores.get((name, length), math.nan) for length in lengths] for name in names])
    if max(cells.shape) <= MOST_NUMBERS:
        _numbers(axes, cells, top)
    image = _coloured(axes, cells, SCORES, 0, top)
    _name_cells(axes, [tokens(length) for length in lengths], names)
    return image


def _scale(figure: Figure, axes: Axes, image: QuadMesh, label: str = "", ticks: Sequence[float] | None = None) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02, ticks=ticks)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _mark_beyond(axes: Axes, lengths: Sequence[int], trained: int) -> None:
    """A white dashed line parts the lengths up to that of training from those beyond it."""
    beyond = sum(length <= trained for length in lengths)
    if beyond < len(lengths):
        axes.axvline(beyond, color=DARK, linewidth=4.5, clip_on=False)  # not cut off at the edge
        axes.axvline(beyond, color=LIGHT, linewidth=2.2, linestyle=(0, (3, 1.6)), clip_on=False)


def _name_cells(axes: Axes, across: Sequence[str], down: Sequence[str]) -> None:
    axes.grid(False)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    every = -(-len(across) * (1 + max(map(len, across))) // MOST_CHARACTERS)
    axes.set_xticks(np.arange(len(across))[::every] + 0.5, across[::every])
    every = -(-len(down) // 24)
    axes.set_yticks(np.arange(len(down))[::every] + 0.5, map(side_label, down[::every]))


def _numbers(axes: Axes, cells: np.ndarray, top: float) -> None:
    for (row, column), score in np.ndenumerate(cells):
        if not math.isnan(score):
            dark = score < 0.15 * top or score > 0.8 * top
            text = f"{score:.2f}" if top == 1 else f"{score:.0f}"
            axes.text(column + 0.5, row + 0.5, text, color=LIGHT if dark else DARK, **CENTRED)


@style()
def heads(values: np.ndarray, names: Sequence[str], most: float, label: str) -> Figure:
    """A heat map of layers down and heads across, with the names of the layers; the scale is 0 to `most`.

    A layer without a number has a window that does not reach the needle.
    """
    figure, axes = single(1.4 + 0.24 * min(max(len(names), 5), 28))
    image = _coloured(axes, values, AMOUNTS, 0, most)
    _name_cells(axes, [str(head) for head in range(values.shape[1])], names)
    size = 9.5 if len(names) <= 16 else 7 if len(names) <= 40 else 5
    axes.set_yticks(np.arange(len(names)) + 0.5, map(side_label, names), fontsize=size)
    for row in np.flatnonzero(np.isnan(values).all(1)):
        axes.text(values.shape[1] / 2, row + 0.5, "out of reach", color=MUTED, **CENTRED)
    axes.set(xlabel="head", ylabel="layer")
    _scale(figure, axes, image, label)
    return figure


@style()
def differences(differences: Sequence[Difference], number: int) -> Figure:
    """Tasks down, lengths across: the difference of scores, in the colour of the better run where it is clear.

    `number` is that of the run which is compared with the first.
    """
    tasks, lengths = list(dict.fromkeys(x.task for x in differences)), sorted({x.length for x in differences})
    cells = np.full((len(tasks), len(lengths)), math.nan)
    figure, axes = single(1.2 + 0.27 * max(len(tasks), 3))
    for x in differences:
        row, column = tasks.index(x.task), lengths.index(x.length)
        clear = x.verdict != "unclear"
        cells[row, column] = x.difference if clear else 0
        colour = LIGHT if clear and abs(x.difference) > 0.45 else DARK
        weight = "bold" if clear else "normal"
        axes.text(column + 0.5, row + 0.5, signed(2)(x.difference), color=colour, fontweight=weight, **CENTRED)
    towards = LinearSegmentedColormap.from_list("towards", (RUNS[0], "#eef0f2", RUNS[number % len(RUNS)]))
    image = _coloured(axes, cells, towards, -1, 1)
    _name_cells(axes, [tokens(length) for length in lengths], tasks)
    axes.set_xlabel("length (tokens)")
    _scale(figure, axes, image, ticks=[-1, 0, 1])
    return figure
