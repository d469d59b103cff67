"""Pictures of where attention goes, by layer, by position and by head."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hybrid_attn.evals.report import contents, escape, heatmaps, layers
from hybrid_attn.evals.report.canvas import MUTED, RUNS, Picture, styled
from hybrid_attn.evals.report.pictures import DOTTED, legend
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
KINDS = (*RUNS[2:4], *RUNS[5:], RUNS[4])  # colours unlike those of segments
MOST_BARS = 16  # layers whose numbers all fit below their bars
STRIP = 0.035  # height of the strip below the bars that shows the kinds of layers
TABLE = "attention"


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Of every run, source and length; single heads and positions at the longest."""
    found, kinds = [], sorted({_kind(run, r) for run in runs for r in run.of("attention_mass")})
    for number, run in enumerate(runs):
        for source in dict.fromkeys(r["source"] for r in run.of("attention_mass")):
            every = [r | {"kind": _kind(run, r)} for r in run.of("attention_mass") if r["source"] == source]
            longest = contents.lengths_of(every)[-1]
            for length in contents.lengths_of(every):
                name = f"attention_{number}_{escape.file_name(source)}_{length}"
                where = f"{run.name}, {source}, {tokens(length)}"
                found += _of_source(name, where, [r for r in every if r["length"] == length], kinds, length == longest)
    return found


def _kind(run: Run, record: Mapping) -> str:
    name = contents.kind_name(run, record)
    return name if name != record["kind"] else f"layers {name}"


def _of_source(name: str, where: str, records: Sequence[dict], kinds: Sequence[str], by_head: bool) -> list[Picture]:
    """Of one source at one length; `kinds` are those of all runs."""
    length = records[0]["length"]
    by_layer = {layer: [r for r in records if r["layer"] == layer] for layer in sorted({r["layer"] for r in records})}
    shares = [
        (layer, rs[0]["kind"], rs[0]["reach"], {x: contents.mean_of(rs, x) for x in SEGMENTS}) for layer, rs in by_layer.items()
    ]
    note = "Where the question's tokens look, by layer; the strip below is the kind of each layer."
    figure = attention_by_layer(shares, kinds)
    found = [Picture(name, f"{where}: {_most_on_needle(shares)}.", figure, False, note, TABLE)]
    if not by_head:
        return found
    if all("weights" in r for r in records) and len({tuple(r["edges"]) for r in records}) == 1:
        figure = weight_by_position(_weights(records), records[0]["edges"], length, kinds)
        note = "The mean weight of a key by its position, over the heads of a kind of layer."
        found.append(Picture(f"{name}_weights", f"{where}: {_first_and_last(records)}.", figure, False, note, TABLE))
    rows = [f"{layer} {layers.short(kind)}" for layer, kind, *_ in shares]
    for field, label, most in (("retrieval", "retrieval score", 1.0), ("entropy_bits", "entropy (bits)", math.log2(length))):
        figure = heatmaps.heads(_grid(by_layer, field), rows, most or 1.0, label)
        finding, note = FINDINGS[field]
        found.append(Picture(f"{name}_{field}", f"{where}: {finding(records)}.", figure, False, note, TABLE))
    return found


def _most_on_needle(shares: Sequence[tuple]) -> str:
    known = [(each["needle"], layer, kind) for layer, kind, reach, each in shares if reach and each["needle"] is not None]
    if not known:
        return "no layer reaches the needle"
    most, layer, kind = max(known)
    return f"the needle gets {most:.1%} at most, in layer {layer} ({kind})"


def _heads_that_copy(records: Sequence[Mapping]) -> str:
    known = [r["retrieval"] for r in records if r["retrieval"] is not None and r["reach"]]
    number = sum(score > contents.RETRIEVES for score in known)
    return f"{number} of {len(records)} heads copy from the needle (score over {contents.RETRIEVES})"


def _range_of_entropy(records: Sequence[Mapping]) -> str:
    known = [r["entropy_bits"] for r in records if r["entropy_bits"] is not None]
    return f"entropy of a head from {min(known):.1f} to {max(known):.1f} bits" if known else "no entropy is known"


FINDINGS = {
    "retrieval": (_heads_that_copy, "Retrieval score: of the answer's tokens, the share that a head copies from the needle."),
    "entropy_bits": (_range_of_entropy, "Entropy of the attention of the question's tokens: 0 is one key, more is more keys."),
}


def _first_and_last(records: Sequence[Mapping]) -> str:
    """What a key weighs in the first and the last interval that the kind of layer with the farthest reach sees."""
    seen = {kind: [x for x in weights.tolist() if x > 0] for kind, weights in _weights(records).items()}
    kind = max(seen, key=lambda kind: len(seen[kind]))
    if not seen[kind]:
        return "no key has a weight"
    return f"a key of {kind} weighs {seen[kind][0]:.1e} early and {seen[kind][-1]:.1e} late"


def _weights(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Mean weights of keys between neighbouring edges, over the heads of each kind of layer."""
    kinds = sorted({r["kind"] for r in records})
    return {kind: np.mean(np.array([r["weights"] for r in records if r["kind"] == kind], float), axis=0) for kind in kinds}


def _grid(by_layer: dict[int, list[dict]], field: str) -> np.ndarray:
    """Layers down, heads across; NaN where there is no number."""
    grid = np.full((len(by_layer), 1 + max(r["head"] for rs in by_layer.values() for r in rs)), math.nan)
    for row, records in enumerate(by_layer.values()):
        for r in records:
            known = r[field] is not None and (r["reach"] or field == "entropy_bits")
            grid[row, r["head"]] = r[field] if known else math.nan
    return grid


@styled
def attention_by_layer(shares: Sequence[tuple[int, str, bool, Mapping[str, float]]], kinds: Sequence[str]) -> Figure:
    """Stacked shares of attention, a bar for each layer: its number, its kind, whether the needle is in reach, the shares."""
    figure = Figure(figsize=(4.9, 3.2), layout="constrained")
    axes = figure.subplots()
    places, bottom = np.arange(len(shares)), np.zeros(len(shares))
    for segment, colour in SEGMENTS.items():
        heights = np.array([each[segment] or 0 for *_, each in shares])
        if heights.any():
            axes.bar(places, heights, 0.82, bottom, color=colour, label=SEGMENT_NAMES[segment])
        bottom += heights
    every = -(-len(shares) // MOST_BARS)
    axes.set_xticks(places[::every], [str(number) for number, *_ in shares[::every]])
    _kinds_below(axes, [kind for _, kind, *_ in shares], kinds)
    far = [place for place, (_, _, reach, _) in zip(places, shares, strict=True) if not reach]
    if far:
        axes.plot(far, [1.035] * len(far), "x", color=MUTED, markersize=5, clip_on=False, label="needle out of reach")
    axes.set_ylim(-2 * STRIP, 1.06)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of attention")
    legend(figure)
    return figure


def _kinds_below(axes: Axes, of_layers: Sequence[str], kinds: Sequence[str]) -> None:
    """A strip in the colour of each layer's kind."""
    for kind in dict.fromkeys(of_layers):
        places = [place for place, other in enumerate(of_layers) if other == kind]
        axes.bar(places, -STRIP, 1.0, -STRIP / 2, color=_colour(kind, kinds), label=escape.label(kind))


def _colour(kind: str, kinds: Sequence[str]) -> str:
    return KINDS[kinds.index(kind) % len(KINDS)]


@styled
def weight_by_position(
    weights: Mapping[str, Sequence[float]], edges: Sequence[float], length: int, kinds: Sequence[str]
) -> Figure:
    """The mean weight of a key by its position, a line for each kind of layer, beside equal weights of all `length` keys.

    A kind's colour is that of its place in `kinds`, the same in every picture of a report.
    """
    figure = Figure(figsize=(4.9, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind, of_kind in weights.items():
        seen = [weight if weight > 0 else math.nan for weight in of_kind]
        axes.stairs(seen, edges, baseline=None, color=_colour(kind, kinds), linewidth=1.6, label=escape.label(kind))
    axes.axhline(1 / length, color=MUTED, linewidth=1, linestyle=DOTTED, label="all alike")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("position of the key (tokens)")
    axes.set_ylabel("mean weight of a key")
    legend(figure)
    return figure
