"""What the two sizes of this study share: metrics of loss, needles and attention by length, claims, and the figure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hybrid_attn.evals.report.tables import tokens
from hybrid_attn.studies import SHARE, Cell, Claim, Metric, Reach, Study, Trained, evaluated, evaluations
from hybrid_attn.studies.results import Results
from hybrid_attn.studies.statistics import mean_of
from hybrid_attn.trees import check

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIG = "studies/text/config.py"
LAYOUTS = ("rope", "hybrid")
TRAINED, LONGEST = 8192, 32_768
LENGTHS = (8192, 16_384, LONGEST)
FIRSTS = (256, 512, 1024, 2048, 4096, 8192, 16_384)  # of intervals of positions in sequences of 32,768 tokens
DEPTHS = (0, 25, 50, 75, 100)
LETTERS = {"full attention": ("R", "G"), "window": ("L",)}  # layer types: RoPE and NoPE; local

LOSS = {x: f"bits per byte, {tokens(x)} to {tokens(2 * x)}" for x in FIRSTS}
DIGITS = {x: f"digits right at {tokens(x)}" for x in LENGTHS}
RETRIEVED = {x: f"needles found at {tokens(x)}" for x in LENGTHS}
GRID = {(x, depth): f"needles found at {tokens(x)}, depth {depth}%" for x in LENGTHS for depth in DEPTHS}
MASS = {(x, name): f"attention to the needle at {tokens(x)}, {name}" for x in LENGTHS for name in LETTERS}


def retrieved(length: int, depths: tuple[int, ...] = DEPTHS) -> Metric:
    """The share of single needles that the answers contain, at these depths."""

    def read(run: Trained) -> float:
        cells = _lines(run, "needle", {"length": length, "needles": 1})
        cells = [x for x in cells if x["depth"] in depths]
        check(bool(cells), f"{run.workdir} has no needles at {length:,} tokens and depths {depths}")
        return sum(x["right"] for x in cells) / sum(x["answers"] for x in cells)

    return Metric(read, bounds=SHARE)


def mass(length: int, letters: tuple[str, ...]) -> Metric:
    """The share of the attention of question and answer that goes to the needle, in the layers of these types; None without."""

    def read(run: Trained) -> float | None:
        lines = _lines(run, "attention_mass", {"source": "text", "length": length})
        return next((x["needle"] for x in lines if x["kind"] in letters), None)

    return Metric(read, "{:.4f}", SHARE)


def _lines(run: Trained, evaluation: str, where: Mapping[str, object]) -> list[dict]:
    """The lines of an evaluation after the last step that have these values."""
    values = {"eval": evaluation, "step": run.step, **where}
    return [x for x in evaluations(run.workdir) if all(x.get(key) == value for key, value in values.items())]


def loss(first: int) -> Metric:
    """Of the tokens from position `first` of their documents to twice that, all parts together."""
    where = {"source": "text", "length": LONGEST, "first": first, "part": None}
    return evaluated("position", "bits_per_byte", where, higher_is_better=False)


METRICS = (
    {name: loss(x) for x, name in LOSS.items()}
    | {name: evaluated("recall", "accuracy", {"source": "needles", "length": x}, bounds=SHARE) for x, name in DIGITS.items()}
    | {name: retrieved(x) for x, name in RETRIEVED.items()}
    | {name: retrieved(x, (depth,)) for (x, depth), name in GRID.items()}
    | {name: mass(x, LETTERS[layers]) for (x, layers), name in MASS.items()}
)
SHOWN = (
    *(LOSS[x] for x in (TRAINED // 2, TRAINED, LONGEST // 2)), *DIGITS.values(), *RETRIEVED.values(),
    *(MASS[x, "full attention"] for x in (TRAINED, LONGEST)), MASS[TRAINED, "window"],
)  # fmt: skip


def study(size: str, title: str) -> Study:
    """The study with the cells of a size of studies/text/config.py."""
    return Study(
        title=title,
        question="Does the hybrid read as well as RoPE in every layer up to the length of training, and does it go on beyond?",
        cells={name: Cell(f"{CONFIG}:{name}{size}") for name in LAYOUTS},
        metrics=METRICS,
        table=SHOWN,
        learned=(DIGITS[TRAINED], 0.5),
        claims=(
            Claim("Up to the length of training RoPE in every layer has the lower loss.", "rope", "hybrid", LOSS[TRAINED // 2]),
            Claim("From there to twice the length the hybrid has the lower loss.", "hybrid", "rope", LOSS[TRAINED]),
            Claim("From two to four times the length the hybrid has the lower loss.", "hybrid", "rope", LOSS[LONGEST // 2]),
            Claim("At four times the length the hybrid predicts more digits.", "hybrid", "rope", DIGITS[LONGEST], True),
            Claim("At four times the length the hybrid finds more needles.", "hybrid", "rope", RETRIEVED[LONGEST], True),
            Reach("At four times the length the hybrid still predicts nine digits of ten.", "hybrid", DIGITS[LONGEST], 0.9),
        ),
        plot=figure,
        seeds=3,
    )


def figure(results: Results) -> "Figure":
    """The loss by position of both cells, and the needle grid of each."""
    from matplotlib.figure import Figure

    from hybrid_attn.evals.report import pictures

    with pictures.style():
        canvas = Figure(figsize=(11, 3.4), layout="constrained")
        across, *grids = canvas.subplots(1, 1 + len(LAYOUTS), width_ratios=(1.6, 1, 1))
        for cell, colour in zip(LAYOUTS, pictures.RUNS, strict=False):
            means = [_mean(results, cell, name) for name in LOSS.values()]
            across.plot(range(len(LOSS)), means, marker="o", color=colour, label=cell)
        across.axvline(FIRSTS.index(TRAINED) - 0.5, color=pictures.MUTED, linestyle="--")
        across.set_xticks(range(len(LOSS)), [f"{tokens(x)}–{tokens(2 * x)}" for x in FIRSTS], rotation=40, ha="right")
        across.set(xlabel="position in the document", ylabel="bits per byte", title="held-out loss")
        across.legend()
        for axes, cell in zip(grids, LAYOUTS, strict=True):
            _needle_grid(axes, cell, [[_mean(results, cell, GRID[x, depth]) for x in LENGTHS] for depth in DEPTHS])
    return canvas


def _mean(results: Results, cell: str, name: str) -> float:
    """Over seeds; NaN without a number."""
    return mean_of([*results.values(cell, name).values()], results.study.metrics[name].bounds).mean


def _needle_grid(axes: "Axes", cell: str, shares: list[list[float]]) -> None:
    """Shares of needles found, by depth and length."""
    from hybrid_attn.evals.report import pictures

    axes.pcolormesh(np.array(shares), cmap=pictures.SCORES, vmin=0, vmax=1, edgecolors="white")
    for (i, j), value in np.ndenumerate(np.array(shares)):
        if not np.isnan(value):
            ink = "black" if 0.2 < value < 0.8 else "white"
            axes.text(j + 0.5, i + 0.5, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(np.arange(len(LENGTHS)) + 0.5, [tokens(x) for x in LENGTHS])
    axes.set_yticks(np.arange(len(DEPTHS)) + 0.5, [f"{x}%" for x in DEPTHS])
    axes.set(xlabel="length", ylabel="depth", title=f"needles found, {cell}", ylim=(len(DEPTHS), 0))
    axes.grid(False)
