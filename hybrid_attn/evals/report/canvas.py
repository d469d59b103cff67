"""What all pictures of a report have in common: colours, fonts, and how they come into a page or a file."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybrid_attn.characters import visible
from hybrid_attn.evals.report import escape
from hybrid_attn.evals.report.section import Picture

WIDTH = 4.9  # inches of a figure in one column of the page
INK, MUTED, GRID, PAPER = "#20262d", "#66707b", "#dde2e7", "#fffffe"
# Okabe and Ito's, without yellow: apart for every eye.
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31")
# The page replaces colours by its own of these names, so that a picture follows it into the dark.
COLOURS = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "card"} | {colour: f"run-{i}" for i, colour in enumerate(RUNS)}
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"), INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("savefig.facecolor", "figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8},
    **{"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "font.size": 9.5},
    "text.parse_math": False,  # names of runs and tasks may have dollars
    **{"svg.fonttype": "none", "svg.hashsalt": "report"},
}


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
    name = escape.file_name(picture.name)

    def in_page(tag: re.Match) -> str:
        text = re.sub("|".join(COLOURS), lambda colour: f"var(--{COLOURS[colour[0]]})", tag[0])
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)

    text = re.sub(r"<[^>]*>", in_page, out.getvalue())  # in tags alone: labels stand between them
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2)
    size = f"max-width:{110 * picture.figure.get_figwidth():.0f}px"
    label = Markup('<svg role="img" aria-label="{}" style="{}"').format(visible(picture.caption), size)
    return Markup(text.replace("<svg", label, 1))


@style()
def png(picture: Picture) -> bytes:
    """On white."""
    out = io.BytesIO()
    picture.figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()
