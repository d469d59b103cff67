"""Attention in a report: where it goes, by layer, by position and by head."""

import itertools
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hybrid_attn.evals.records import grouped, mean_of
from hybrid_attn.evals.report import escape, heatmaps, layers
from hybrid_attn.evals.report.canvas import MUTED, RUNS, Picture, single, style
from hybrid_attn.evals.report.pictures import DOTTED, LONGEST_LABEL, legend
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Section
from hybrid_attn.evals.report.tables import RUN, Column, Table, count, fixed, significant, tokens

RETRIEVES = 0.1  # a head whose retrieval score is larger is a retrieval head
SEGMENTS = {  # of keys: name, heading in the table, colour
    "begin": ("first tokens", "begin", "#3b4a5a"),
    "needle": ("needle", "needle", "#d9822b"),
    "context": ("context", "context", "#8fb3cf"),
    "qc": ("question", "question", "#c7cfd6"),
    "nothing": ("nothing (sink)", "", "#ebe3d3"),
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


def table(runs: Sequence[Run]) -> Table:
    """Where the question's attention goes, by layer type: means over its heads.

    The share of a segment beside that of one of its tokens: other segments grow with the length, and take from the first.
    """
    segments = {heading: field for field, (_, heading, _) in SEGMENTS.items() if heading}
    means = {
        **{heading: (field, fixed(4)) for heading, field in segments.items()},
        **{"entropy (bits)": ("entropy_bits", fixed(2)), "needle lift": ("needle_lift", fixed(2))},
        **{f"{heading} per token": (f"{field}_per_token", significant(3)) for heading, field in segments.items()},
        "token 0": ("sink_rate", fixed(4)),
    }
    columns = [
        *(RUN, Column("source"), Column("length", tokens), Column("layer type"), Column("heads", count)),
        *(Column(name, show) for name, (_, show) in means.items()),
        *(Column("retrieval heads", count), Column("reach")),
    ]
    groups: dict[tuple, list[dict]] = {}
    for run, r in records_of(runs, "attention_mass"):
        groups.setdefault((run.name, r["source"], r["length"], run.layer_type(r)), []).append(r)
    rows = []
    for key, heads in groups.items():
        retrieving = sum((head["retrieval"] or 0) > RETRIEVES for head in heads)
        numbers = [mean_of(heads, field) for field, _ in means.values()]
        rows.append([*key, len(heads), *numbers, retrieving, "yes" if any(head["reach"] for head in heads) else "no"])
    return Table("attention", "Attention of the question's tokens, by layer type", columns, rows)


def sections(runs: Sequence[Run]) -> list[Section]:
    prompts = sorted({r["prompts"] for _, r in records_of(runs, "attention_mass")})
    text = (
        "Shares of the attention of the question's tokens, means over heads and over so many prompts: "
        f"{', '.join(map(str, prompts))}. The needle's lift is its share over the share of the tokens that it has; a retrieval "
        f"head (score over {RETRIEVES}) looks at the token that it copies. Per token: a segment's share over its "
        "tokens; token 0 is the share of the very first. Crosses: layers whose window does not reach the needle. Single heads, "
        "and weights by position without the first 10 and the last 3% of the keys, are drawn at the longest length."
    )
    return [Section("attention", "Attention", [text], pictures(runs), [table(runs)], [], "attention_mass")]


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Of every run, source and length; single heads and positions at the longest."""
    records = [[r | {"kind": _layer_type(run, r), "run": run.name} for r in run.of("attention_mass")] for run in runs]
    layer_types = sorted({r["kind"] for of_run in records for r in of_run})
    colours, images = dict(zip(layer_types, itertools.cycle(LAYER_TYPES), strict=False)), []
    for number, of_run in enumerate(records):
        for source, of_source in grouped(of_run, itemgetter("source")).items():
            by_length = grouped(of_source, itemgetter("length"))
            for length in sorted(by_length):
                name = f"attention_{number}_{escape.file_name(source)}_{length}"
                images += _of_length(name, by_length[length], colours, length == max(by_length))
    return images


def _layer_type(run: Run, record: Mapping) -> str:
    name = run.layer_type(record)
    return name if name != record["kind"] else f"layers {name}"


def _of_length(name: str, records: Sequence[dict], colours: Mapping[str, str], by_head: bool) -> list[Picture]:
    """Of one source at one length; `colours` are those of the layer types of all runs."""
    by_layer = dict(sorted(grouped(records, itemgetter("layer")).items()))
    shown = [Layer(i, x[0]["kind"], x[0]["reach"], {s: mean_of(x, s) for s in SEGMENTS}) for i, x in by_layer.items()]
    length = records[0]["length"]
    where = f"{records[0]['run']}, {records[0]['source']}, {tokens(length)}"

    def picture(suffix: str, finding: str, figure: Figure, note: str) -> Picture:
        return Picture(f"{name}{suffix}", f"{where}: {finding}.", figure, note, "attention")

    note = "Where the question's tokens look, by layer; the strip below shows the type of each layer."
    images = [picture("", _most_on_needle(shown), attention_by_layer(shown, colours), note)]
    if not by_head:
        return images
    if all("weights" in r for r in records) and len({tuple(r["edges"]) for r in records}) == 1:
        figure = weight_by_position(_weights(records), records[0]["edges"], length, colours)
        note = "The mean weight of a key by its position, over the heads of each layer type."
        images.append(picture("_weights", _first_and_last(records), figure, note))
    names = [f"{x.number} {layers.short(x.layer_type)}" for x in shown]
    figure = heatmaps.heads(_grid(by_layer, "retrieval"), names, 1.0, "retrieval score")
    note = "Retrieval score: of the answer's tokens, the share that a head copies from the needle."
    images.append(picture("_retrieval", _heads_that_copy(records), figure, note))
    figure = heatmaps.heads(_grid(by_layer, "entropy_bits"), names, math.log2(length) or 1.0, "entropy (bits)")
    note = "Entropy of the attention of the question's tokens: 0 bits is one key, more bits are more keys."
    images.append(picture("_entropy_bits", _range_of_entropy(records), figure, note))
    return images


def _most_on_needle(shown: Sequence[Layer]) -> str:
    shares = [(x.shares["needle"], x.number, x.layer_type) for x in shown if x.reach and x.shares["needle"] is not None]
    if not shares:
        return "no layer reaches the needle"
    most, layer, layer_type = max(shares)
    return f"the needle gets {most:.1%} at most, in layer {layer} ({layer_type})"


def _heads_that_copy(records: Sequence[Mapping]) -> str:
    scores = [r["retrieval"] for r in records if r["retrieval"] is not None and r["reach"]]
    number = sum(score > RETRIEVES for score in scores)
    return f"{number} of {len(records)} heads copy from the needle (score over {RETRIEVES})"


def _range_of_entropy(records: Sequence[Mapping]) -> str:
    bits = [r["entropy_bits"] for r in records if r["entropy_bits"] is not None]
    return f"entropy of a head from {min(bits):.1f} to {max(bits):.1f} bits" if bits else "no entropy is known"


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


@style()
def attention_by_layer(shown: Sequence[Layer], colours: Mapping[str, str]) -> Figure:
    """Stacked shares of attention, a bar for each layer; `colours` are those of layer types."""
    figure, axes = single(3.2)
    positions, bottom = np.arange(len(shown)), np.zeros(len(shown))
    for segment, (name, _, colour) in SEGMENTS.items():
        heights = np.array([layer.shares[segment] or 0 for layer in shown])
        if heights.any():
            axes.bar(positions, heights, 0.82, bottom, color=colour, label=name)
        bottom += heights
    step = -(-len(shown) // MOST_BARS)
    axes.set_xticks(positions[::step], [str(layer.number) for layer in shown[::step]])
    for layer_type, bars in grouped(positions, lambda i: shown[i].layer_type).items():
        axes.bar(bars, -STRIP, 1.0, -STRIP / 2, color=colours[layer_type], label=escape.label(layer_type))
    far = [i for i, layer in enumerate(shown) if not layer.reach]
    if far:
        axes.plot(far, [1.035] * len(far), "x", color=MUTED, markersize=5, clip_on=False, label="needle out of reach")
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(-2 * STRIP, 1.06), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", visible=False)
    legend(figure, LONGEST_LABEL)
    return figure


@style()
def weight_by_position(
    weights: Mapping[str, Sequence[float]], edges: Sequence[float], length: int, colours: Mapping[str, str]
) -> Figure:
    """The mean weight of a key by its position, a line for each layer type, beside equal weights of all `length` keys."""
    figure, axes = single(3.2)
    for layer_type, of_type in weights.items():
        positive = [weight if weight > 0 else math.nan for weight in of_type]
        label = escape.label(layer_type)
        axes.stairs(positive, edges, baseline=None, color=colours[layer_type], linewidth=1.6, label=label)
    axes.axhline(1 / length, color=MUTED, linewidth=1, linestyle=DOTTED, label="all alike")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: tokens(round(x)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="position of the key (tokens)", ylabel="mean weight of a key")
    legend(figure, LONGEST_LABEL)
    return figure


REPORT = EvaluationReport(sections, columns=())
