"""Pictures of where attention goes, by layer, by position and by head."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hybrid_attn.evals.report import contents, escape, heatmaps, layers
from hybrid_attn.evals.report.canvas import MUTED, RUNS, Picture, single, styled
from hybrid_attn.evals.report.pictures import DOTTED, legend
from hybrid_attn.evals.report.records import grouped
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.tables import tokens

SEGMENTS = {"begin": "#3b4a5a", "needle": "#d9822b", "context": "#8fb3cf", "qc": "#c7cfd6", "nothing": "#ebe3d3"}
SEGMENT_NAMES = {
    "begin": "first tokens",
    "needle": "needle",
    "context": "context",
    "qc": "question",
    "nothing": "nothing (sink)",
}
LAYER_TYPES = (*RUNS[2:4], *RUNS[5:], RUNS[4])  # colours unlike those of segments
MOST_BARS = 16  # layers whose numbers all fit below their bars
STRIP = 0.035  # height of the strip below the bars that shows the layer types


class Layer(NamedTuple):
    """The mean share of attention that each segment gets in a layer, and whether the needle is within its window."""

    number: int
    layer_type: str
    reach: bool
    shares: Mapping[str, float | None]


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Of every run, source and length; single heads and positions at the longest."""
    records = [[r | {"kind": _layer_type(run, r), "run": run.name} for r in run.of("attention_mass")] for run in runs]
    layer_types, drawn = sorted({r["kind"] for of_run in records for r in of_run}), []
    for number, of_run in enumerate(records):
        for source, of_source in grouped(of_run, itemgetter("source")).items():
            by_length = grouped(of_source, itemgetter("length"))
            for length in sorted(by_length):
                name = f"attention_{number}_{escape.file_name(source)}_{length}"
                drawn += _of_length(name, by_length[length], layer_types, length == max(by_length))
    return drawn


def _layer_type(run: Run, record: Mapping) -> str:
    name = contents.kind_name(run, record)
    return name if name != record["kind"] else f"layers {name}"


def _of_length(name: str, records: Sequence[dict], layer_types: Sequence[str], by_head: bool) -> list[Picture]:
    """Of one source at one length; `layer_types` are those of all runs."""
    by_layer = dict(sorted(grouped(records, itemgetter("layer")).items()))
    shown = [Layer(i, x[0]["kind"], x[0]["reach"], {s: contents.mean_of(x, s) for s in SEGMENTS}) for i, x in by_layer.items()]
    length = records[0]["length"]
    where = f"{records[0]['run']}, {records[0]['source']}, {tokens(length)}"

    def picture(suffix: str, finding: str, figure: Figure, note: str) -> Picture:
        return Picture(f"{name}{suffix}", f"{where}: {finding}.", figure, note, "attention")

    note = "Where the question's tokens look, by layer; the strip below shows the type of each layer."
    drawn = [picture("", _most_on_needle(shown), attention_by_layer(shown, layer_types), note)]
    if not by_head:
        return drawn
    if all("weights" in r for r in records) and len({tuple(r["edges"]) for r in records}) == 1:
        figure = weight_by_position(_weights(records), records[0]["edges"], length, layer_types)
        note = "The mean weight of a key by its position, over the heads of each layer type."
        drawn.append(picture("_weights", _first_and_last(records), figure, note))
    names = [f"{x.number} {layers.short(x.layer_type)}" for x in shown]
    for field, label, most in (("retrieval", "retrieval score", 1.0), ("entropy_bits", "entropy (bits)", math.log2(length))):
        finding, note = FINDINGS[field]
        figure = heatmaps.heads(_grid(by_layer, field), names, most or 1.0, label)
        drawn.append(picture(f"_{field}", finding(records), figure, note))
    return drawn


def _most_on_needle(shown: Sequence[Layer]) -> str:
    shares = [(x.shares["needle"], x.number, x.layer_type) for x in shown if x.reach and x.shares["needle"] is not None]
    if not shares:
        return "no layer reaches the needle"
    most, layer, layer_type = max(shares)
    return f"the needle gets {most:.1%} at most, in layer {layer} ({layer_type})"


def _heads_that_copy(records: Sequence[Mapping]) -> str:
    scores = [r["retrieval"] for r in records if r["retrieval"] is not None and r["reach"]]
    number = sum(score > contents.RETRIEVES for score in scores)
    return f"{number} of {len(records)} heads copy from the needle (score over {contents.RETRIEVES})"


def _range_of_entropy(records: Sequence[Mapping]) -> str:
    bits = [r["entropy_bits"] for r in records if r["entropy_bits"] is not None]
    return f"entropy of a head from {min(bits):.1f} to {max(bits):.1f} bits" if bits else "no entropy is known"


FINDINGS = {
    "retrieval": (_heads_that_copy, "Retrieval score: of the answer's tokens, the share that a head copies from the needle."),
    "entropy_bits": (
        _range_of_entropy,
        "Entropy of the attention of the question's tokens: 0 bits is one key, more bits are more keys.",
    ),
}


def _first_and_last(records: Sequence[Mapping]) -> str:
    """What a key weighs in the first and the last interval that the layer type with the farthest reach sees."""
    visible = {layer_type: weights[weights > 0].tolist() for layer_type, weights in _weights(records).items()}
    layer_type, weights = max(visible.items(), key=lambda item: len(item[1]))
    if not weights:
        return "no key has a weight"
    return f"a key of {layer_type} weighs {weights[0]:.1e} early and {weights[-1]:.1e} late"


def _weights(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Mean weights of keys between neighbouring edges, over the heads of each layer type."""
    by_type = sorted(grouped(records, itemgetter("kind")).items())
    return {layer_type: np.mean(np.array([r["weights"] for r in heads], float), axis=0) for layer_type, heads in by_type}


def _grid(by_layer: dict[int, list[dict]], field: str) -> np.ndarray:
    """Layers down, heads across; NaN where there is no number."""
    grid = np.full((len(by_layer), 1 + max(r["head"] for rs in by_layer.values() for r in rs)), math.nan)
    for row, records in enumerate(by_layer.values()):
        for r in records:
            known = r[field] is not None and (r["reach"] or field == "entropy_bits")
            grid[row, r["head"]] = r[field] if known else math.nan
    return grid


@styled
def attention_by_layer(shown: Sequence[Layer], layer_types: Sequence[str]) -> Figure:
    """Stacked shares of attention, a bar for each layer."""
    figure, axes = single(3.2)
    positions, bottom = np.arange(len(shown)), np.zeros(len(shown))
    for segment, colour in SEGMENTS.items():
        heights = np.array([layer.shares[segment] or 0 for layer in shown])
        if heights.any():
            axes.bar(positions, heights, 0.82, bottom, color=colour, label=SEGMENT_NAMES[segment])
        bottom += heights
    step = -(-len(shown) // MOST_BARS)
    axes.set_xticks(positions[::step], [str(layer.number) for layer in shown[::step]])
    for layer_type, bars in grouped(positions, lambda i: shown[i].layer_type).items():
        colour = _colour(layer_type, layer_types)
        axes.bar(bars, -STRIP, 1.0, -STRIP / 2, color=colour, label=escape.label(layer_type))
    far = [i for i, layer in enumerate(shown) if not layer.reach]
    if far:
        axes.plot(far, [1.035] * len(far), "x", color=MUTED, markersize=5, clip_on=False, label="needle out of reach")
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(-2 * STRIP, 1.06), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", visible=False)
    legend(figure)
    return figure


def _colour(layer_type: str, layer_types: Sequence[str]) -> str:
    return LAYER_TYPES[layer_types.index(layer_type) % len(LAYER_TYPES)]


@styled
def weight_by_position(
    weights: Mapping[str, Sequence[float]], edges: Sequence[float], length: int, layer_types: Sequence[str]
) -> Figure:
    """The mean weight of a key by its position, a line for each layer type, beside equal weights of all `length` keys.

    The index of a layer type in `layer_types` gives its colour, the same in every picture of a report.
    """
    figure, axes = single(3.2)
    for layer_type, of_type in weights.items():
        positive = [weight if weight > 0 else math.nan for weight in of_type]
        colour = _colour(layer_type, layer_types)
        axes.stairs(positive, edges, baseline=None, color=colour, linewidth=1.6, label=escape.label(layer_type))
    axes.axhline(1 / length, color=MUTED, linewidth=1, linestyle=DOTTED, label="all alike")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="position of the key (tokens)", ylabel="mean weight of a key")
    legend(figure)
    return figure
