"""Pictures of a report: lines with intervals, heat maps, and how they come into a page or a file."""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from hybrid_attn.characters import visible
from hybrid_attn.evals.report import escape
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Picture, Reading
from hybrid_attn.evals.report.tables import tokens

INK, MUTED, GRID = "#20262d", "#66707b", "#dde2e7"
# Okabe and Ito's, without yellow: apart for every eye.
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31")
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("savefig.facecolor", "figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "svg.fonttype": "none"},
    **{"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "font.size": 9.5},
    "text.parse_math": False,  # names of runs and tasks may have dollars
}
DASHES = {"chance": "-.", "bigram": (0, (7, 2))}  # of levels; others are dotted
WIDTH = 4.9  # inches of a figure in one column of the page
MOST_INCHES = 12  # of panels in a line
CHARACTERS, LEGEND_LINE = 15, 0.18  # characters to the inch, and inches of a line of a legend
LONGEST_NAME = 34  # characters
MOST_TICKS = 32  # names beside an axis
MOST_NUMBERS = (40, 14)  # rows and columns of a heat map that still have room for numbers
NOTHING = "\u200b"  # a character without a width: matplotlib leaves labels out that begin with an underscore
WILSON = "Intervals of 95% (Wilson)"
BEYOND = " Right of the dashed line: beyond the length of training."


class Line(NamedTuple):
    """Numbers of one run by category, which is a number of tokens or a name: each with the ends of its interval.

    `number` is that of the colour; None makes a level, such as chance.
    """

    label: str
    number: int | None
    values: Mapping[int | str, Sequence[float]]


class Scale(NamedTuple):
    """What columns and rows of a heat map are; its numbers from `low` to `high`: how they are written, and their colours."""

    across: str
    down: str
    low: float
    high: float
    show: Callable[[float], str]
    colours: Colormap
    label: str = ""


Cells = Mapping[tuple[str, int | str], float | None]  # numbers by row and column
# Vermilion, sand, blue: wrong and right are apart for every eye, and in grey.
SCORES = LinearSegmentedColormap.from_list("scores", ("#c8501e", "#e8a565", "#f1e8d6", "#7fb0d3", "#14568f"))
AMOUNTS = LinearSegmentedColormap.from_list("amounts", ("#e9eff4", "#a9cbe2", "#4f93c4", "#14568f", "#0b2f52"))


@contextlib.contextmanager
def style(**more: str) -> Iterator[None]:
    """This report's fonts, lines and colours; `@style()` before a function makes it draw with them."""
    with matplotlib.rc_context(STYLE | more), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has other fonts for an SVG
        yield


def svg(picture: Picture) -> Markup:
    """An element of a page. Ids meet no other picture's: they are hashes with the picture's name, and those of groups go."""
    out = io.StringIO()
    with style(**{"svg.hashsalt": picture.name}):
        picture.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub('<g id="[^"]*"', "<g", out.getvalue())
    start = Markup('<svg role="img" aria-label="{}" style="max-width:{:.0f}px"')
    start = start.format(visible(picture.caption), 110 * picture.figure.get_figwidth())
    return Markup(text[text.index("<svg") :].replace("<svg", start, 1))


@style()
def png(picture: Picture) -> bytes:
    """On white."""
    out = io.BytesIO()
    picture.figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()


def by_length(name: str, runs: Sequence[Run], readings: Callable[[Run], Sequence[Reading]], note: str, table: str) -> Picture:
    """The shares of right answers of each run by length, a panel for each reading, beside those of a guess."""
    panels: dict[str, list[Line]] = {}
    for number, run in enumerate(runs):
        for questions, shares, chance in readings(run):
            guess = [Line("chance", None, dict.fromkeys(shares, [chance] * 3))] if chance else []
            panels.setdefault(questions, []).extend([Line(run.name, number, shares), *guess])
    first, of_first = next(iter(panels.items()))
    caption = f"Right answers, {first}: {ends(of_first, '{:.0%}'.format)}"
    figure = lines(panels, "length (tokens)", "right answers", "share", [run.trained for run in runs])
    return Picture(name, caption, figure, f"{WILSON}{note}", table)


def ends(of_panel: Sequence[Line], show: Callable[[float], str]) -> str:
    """The first and the last number of each curve, of the first three where there are many."""
    texts, curves = [], [line for line in of_panel if line.number is not None]
    for line in curves[:3]:
        known = sorted((key, show(x[0])) for key, x in line.values.items() if not math.isnan(x[0]))
        shown = dict([*known[:1], *known[-1:]])
        texts.append(f"{line.label} {', '.join(f'{x} at {tokens(key)}' for key, x in shown.items()) or 'without a number'}")
    return f"{'; '.join(texts)}{f'; and {len(curves) - 3} more' * (len(curves) > 3)}."


@style()
def lines(panels: Mapping[str, Sequence[Line]], across: str, up: str, scale: str, trained: Sequence[int] = ()) -> Figure:
    """A panel for each name, or one in which the names are the categories if each line has one and the same.

    `scale` is "share", "linear" or "log"; a line stands between the lengths up to that of training and longer ones.
    """
    if len({key for of_panel in panels.values() for line in of_panel for key in line.values}) == 1:
        panels, across, trained = _transposed(panels), "", ()
    names = max(len({key for line in of_panel for key in line.values}) for of_panel in panels.values())
    figure, grid = _grid(len(panels), max(2.15, 0.35 * min(names, MOST_TICKS)), 2.4 if trained else 3.4)
    for axes, (name, of_panel) in zip(grid, panels.items(), strict=True):
        keys = [*dict.fromkeys(key for line in of_panel for key in line.values)]
        keys.sort(key=lambda key: key if isinstance(key, int) else 0)
        for i, line in enumerate(of_panel):
            x = np.arange(len(keys)) + (i - (len(of_panel) - 1) / 2) * min(0.1, 0.6 / len(of_panel)) * (line.number is not None)
            y, low, high = np.array([[*line.values.get(key, [None] * 3)][:3] for key in keys], float).T
            if line.number is None:
                dashes = DASHES.get(line.label.partition(" ")[0], ":")
                axes.hlines(y, x - 0.5, x + 0.5, MUTED, dashes, label=_short(line.label))
                continue
            colour, is_joined = RUNS[line.number % len(RUNS)], isinstance(keys[0], int)
            joined = {"linestyle": ("-", "--", ":")[line.number // len(RUNS) % 3] if is_joined else "none", "linewidth": 1.6}
            axes.plot(x, y, "o", color=colour, markersize=4, label=_short(line.label), **joined)
            axes.vlines(x, low, high, colour, linewidth=3, alpha=0.35)
        for length in sorted(length for length in {*trained} if keys[-1] > length):
            boundary = sum(key <= length for key in keys) - 0.5
            axes.axvline(boundary, color=INK, linewidth=1, linestyle="--", alpha=0.6, label=f"trained at {tokens(length)}")
        axes.set(title=_short(name) if len(panels) > 1 else "", xlim=(-0.5, len(keys) - 0.5))
        _name(axes.xaxis, keys)
        if scale == "share":
            axes.set_ylim(-0.02, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        elif scale == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:.0e}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    figure.supylabel(up, fontsize="medium")
    figure.supxlabel(across, fontsize="medium")
    return _with_legend(figure)


def _with_legend(figure: Figure) -> Figure:
    """Names the lines of all panels."""
    handles = {label: x for axes in figure.axes for x, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = int(figure.get_figwidth() // 2.3)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * (len(handles) // columns))
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=columns, handlelength=1.6)
    return figure


def _transposed(panels: Mapping[str, Sequence[Line]]) -> dict[str, list[Line]]:
    """One panel, in which the names of panels are the categories."""
    by_label: dict[tuple, dict] = {}
    for name, of_panel in panels.items():
        for label, number, values in of_panel:
            by_label.setdefault((label, number), {}).update((name, x) for x in values.values())
    return {"": [Line(*key, values) for key, values in by_label.items()]}


@style()
def heat_maps(
    panels: Mapping[str, Cells], rows: Sequence[str], columns: Sequence, scale: Scale, trained: Mapping = {}
) -> Figure:
    """Rows down, columns across, and a panel for each name; a white dashed line before lengths beyond that of training."""
    beside = 0.08 * max(len(_short(row)) for row in rows)  # inches
    width = max(1.4, 0.42 * min(len(columns), 20), 0.14 * max(len(_short(name)) for name in panels) if len(panels) > 1 else 0)
    figure, grid = _grid(len(panels), width, 0.5 + 0.24 * np.clip(len(rows), 3, 28), beside)
    for axes, (name, cells) in zip(grid, panels.items(), strict=True):
        values = np.array([[cells.get((row, column)) for column in columns] for row in rows], float)
        limits = {"vmin": scale.low, "vmax": scale.high}
        image = axes.pcolormesh(values, cmap=scale.colours, edgecolors="white", linewidth=0.8, **limits)
        for (i, j), value in np.ndenumerate(values):
            if len(rows) <= MOST_NUMBERS[0] and len(columns) <= MOST_NUMBERS[1] and not math.isnan(value):
                colour = "white" if np.dot(image.to_rgba(value)[:3], (0.3, 0.59, 0.11)) < 0.5 else INK
                axes.text(j + 0.5, i + 0.5, scale.show(value), color=colour, ha="center", va="center", fontsize=8)
        beyond = sum(column <= trained[name] for column in columns) if name in trained else len(columns)
        if beyond < len(columns):
            axes.axvline(beyond, color=INK, linewidth=4.5, clip_on=False)  # not cut off at the edge
            axes.axvline(beyond, color="white", linewidth=2.2, linestyle=(0, (3, 1.6)), clip_on=False)
        _name(axes.xaxis, columns, 0.5)
        _name(axes.yaxis, rows, 0.5)
        axes.set(title=_short(name) if len(panels) > 1 else "", xlabel=scale.across, ylim=(len(rows), 0))
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.supylabel(scale.down, fontsize="medium")
    figure.colorbar(image, ax=grid, fraction=0.035, pad=0.02, label=scale.label).outline.set_visible(False)
    return figure


def _grid(number: int, width: float, height: float, beside: float = 0.6) -> tuple[Figure, list[Axes]]:
    """A figure with panels of so many inches, and so many inches beside them; they share their vertical axis."""
    across = int(np.clip(MOST_INCHES // width, 1, number))
    down = -(-number // across)
    figure = Figure(figsize=(max(WIDTH, beside + across * width), 0.7 + down * height), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    return figure, [*grid.flat[:number]]


def _name(axis: Axis, names: Sequence[int | str], first: float = 0) -> None:
    """Names categories, of which the first is at `first`: some of them where there are many, aslant where they are long."""
    every = -(-len(names) // MOST_TICKS)
    texts = [tokens(name) if isinstance(name, int) else _short(name) for name in names[::every]]
    inches = axis.axes.figure.get_figwidth() / axis.axes.get_gridspec().ncols
    is_slanted = axis.axis_name == "x" and sum(len(text) + 2 for text in texts) > 0.8 * CHARACTERS * inches
    look = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
    axis.set_ticks(np.arange(0, len(names), every) + first, texts, **look)


def _short(name: str) -> str:
    """A name in one line without its middle: names of runs differ at their ends."""
    line, half = escape.label(name), LONGEST_NAME // 2
    shown = line if len(line) <= LONGEST_NAME else f"{line[:half]}…{line[-half:]}"
    return f"{NOTHING}{shown}" if shown.startswith("_") else shown
