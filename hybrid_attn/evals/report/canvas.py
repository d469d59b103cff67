"""What all pictures of a report have in common: colours, fonts, and how they come into a page or a file.

Colours are names that the page replaces by its own (`COLOURS`), so that a picture follows it into the dark.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybrid_attn.characters import visible
from hybrid_attn.evals.report import escape

WIDTH = 4.9  # inches of a figure in one column of the page
INK, MUTED, GRID, PAPER = "#20262d", "#66707b", "#dde2e7", "#fffffe"
# Okabe and Ito's, without yellow: apart for every eye.
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31")
COLOURS = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "card"} | {colour: f"run-{i}" for i, colour in enumerate(RUNS)}
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # names of runs and tasks may have dollars
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "savefig.facecolor": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
}


class Picture(NamedTuple):
    """A figure and its text.

    `name` is that of its file. The caption says what the figure shows, the note how to read it; `table` is the name of the
    table with its numbers.
    """

    name: str
    caption: str
    figure: Figure
    note: str = ""
    table: str = ""

    @property
    def wide(self) -> bool:
        """Whether it takes the full width of the page: a figure of more than two panels."""
        return len(self.figure.axes) > 2


def single(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one panel; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def panels(number: int, across: int, size: tuple[float, float], label: str = "", **shared: bool) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels that share their vertical axis and its label; those after `number` are hidden."""
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(-(-number // across), across, sharey=True, squeeze=False, **shared)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    return figure, grid


@contextlib.contextmanager
def style() -> Iterator[None]:
    """This report's fonts, lines and colours; `@style()` before a function makes it draw with them."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has other fonts for an SVG
        yield


@style()
def svg(picture: Picture) -> Markup:
    """An element of a page, whose colours and fonts are the page's, and whose names meet no other picture's."""
    out = io.StringIO()
    picture.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    file = out.getvalue()
    name = escape.file_name(picture.name)

    def in_page(tag: re.Match) -> str:
        text = tag[0]
        for colour, variable in COLOURS.items():
            text = text.replace(colour, f"var(--{variable})")
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)

    text = re.sub(r"<[^>]*>", in_page, file[file.index("<svg") :])  # in tags alone: labels stand between them
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    size = f"max-width:{110 * picture.figure.get_figwidth():.0f}px"
    label = Markup('<svg role="img" aria-label="{}" style="{}"').format(visible(picture.caption), size)
    return Markup(text.replace("<svg", label, 1))


@style()
def png(picture: Picture) -> bytes:
    """On white."""
    out = io.BytesIO()
    picture.figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()
