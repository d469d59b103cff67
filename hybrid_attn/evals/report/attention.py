"""Attention in a report: where it goes, by layer, by position and by head."""

import itertools
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hybrid_attn.evals.records import grouped, mean_of
from hybrid_attn.evals.report import escape, layers, pictures
from hybrid_attn.evals.report.canvas import MUTED, RUNS, single, style
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, SOURCE, Column, Table, tokens

RETRIEVES = 0.1  # a head whose retrieval score is larger is a retrieval head
SEGMENTS = {  # of keys: name, colour
    "begin": ("first tokens", "#3b4a5a"),
    "needle": ("needle", "#d9822b"),
    "context": ("context", "#8fb3cf"),
    "qc": ("question", "#c7cfd6"),
    "nothing": ("nothing (sink)", "#ebe3d3"),
}
HEADINGS = {"begin": "begin", "needle": "needle", "context": "context", "question": "qc"}  # of segments in the table
MEANS = [  # over heads; a segment's share per token beside the whole, for other segments grow with the length
    *(Column(heading, ",.4f", segment) for heading, segment in HEADINGS.items()),
    *(Column("entropy (bits)", ",.2f", "entropy_bits"), Column("needle lift", ",.2f", "needle_lift")),
    *(Column(f"{heading} per token", ".3g", f"{segment}_per_token") for heading, segment in HEADINGS.items()),
    Column("token 0", ",.4f", "sink_rate"),
]
LAYER_TYPES = (*RUNS[2:4], *RUNS[5:], RUNS[4])  # colours unlike those of segments
MOST_BARS = 16  # layers whose numbers all fit below their bars
STRIP = 0.035  # height of the strip below the bars that shows the layer types


def table(runs: Sequence[Run]) -> Table:
    """Where the question's attention goes, by layer type."""
    columns = [RUN, SOURCE, LENGTH, Column("layer type"), Column("heads", ","), *MEANS]
    columns += [Column("retrieval heads", ","), Column("reach")]
    groups: dict[tuple, list[dict]] = {}
    for run, r in records_of(runs, "attention_mass"):
        groups.setdefault((run.name, r["source"], r["length"], run.layer_types.get(r["kind"], r["kind"])), []).append(r)
    rows = []
    for key, heads in groups.items():
        reach = "yes" if any(head["reach"] for head in heads) else "no"
        rows.append([*key, len(heads), *(mean_of(heads, x.value) for x in MEANS), sum(map(_retrieves, heads)), reach])
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
    return [Section("attention", "Attention", [text], _pictures(runs), [table(runs)], "attention_mass")]


def _pictures(runs: Sequence[Run]) -> list[Picture]:
    """Of every run, source and length; single heads and positions at the longest."""
    records = [
        [r | {"kind": run.layer_types.get(r["kind"], f"layers {r['kind']}"), "run": run.name} for r in run.of("attention_mass")]
        for run in runs
    ]
    layer_types = sorted({r["kind"] for of_run in records for r in of_run})
    colours, images = dict(zip(layer_types, itertools.cycle(LAYER_TYPES), strict=False)), []
    for number, of_run in enumerate(records):
        for source, of_source in grouped(of_run, itemgetter("source")).items():
            by_length = grouped(of_source, itemgetter("length"))
            for length in sorted(by_length):
                name = f"attention_{number}_{escape.file_name(source)}_{length}"
                images += _of_length(name, by_length[length], colours, length == max(by_length))
    return images


def _of_length(name: str, records: Sequence[dict], colours: Mapping[str, str], by_head: bool) -> list[Picture]:
    """Of one source at one length; `colours` are those of the layer types of all runs."""
    by_layer = [heads for _, heads in sorted(grouped(records, itemgetter("layer")).items())]
    means = [heads[0] | {segment: mean_of(heads, segment) for segment in SEGMENTS} for heads in by_layer]
    length = records[0]["length"]
    where = f"{records[0]['run']}, {records[0]['source']}, {tokens(length)}"

    def picture(suffix: str, finding: str, figure: Figure, note: str) -> Picture:
        return Picture(f"{name}{suffix}", f"{where}: {finding}.", figure, note, "attention")

    note = "Where the question's tokens look, by layer; the strip below shows the type of each layer."
    images = [picture("", _most_on_needle(means), attention_by_layer(means, colours), note)]
    if not by_head:
        return images
    if all("weights" in r for r in records) and len({tuple(r["edges"]) for r in records}) == 1:
        by_type = sorted(grouped(records, itemgetter("kind")).items())
        weights = {kind: np.mean(np.array([r["weights"] for r in heads], float), axis=0) for kind, heads in by_type}
        figure = weight_by_position(weights, records[0]["edges"], length, colours)
        note = "The mean weight of a key by its position, over the heads of each layer type."
        images.append(picture("_weights", _first_and_last(weights), figure, note))
    names = [f"{layer['layer']} {layers.short(layer['kind'])}" for layer in means]
    figure = pictures.heads(_grid(by_layer, "retrieval"), names, 1.0, "retrieval score")
    copying = sum(r["reach"] and _retrieves(r) for r in records)
    finding = f"{copying} of {len(records)} heads copy from the needle (score over {RETRIEVES})"
    note = "Retrieval score: of the answer's tokens, the share that a head copies from the needle."
    images.append(picture("_retrieval", finding, figure, note))
    figure = pictures.heads(_grid(by_layer, "entropy_bits"), names, math.log2(length) or 1.0, "entropy (bits)")
    bits = [r["entropy_bits"] for r in records if r["entropy_bits"] is not None]
    finding = f"entropy of a head from {min(bits):.1f} to {max(bits):.1f} bits" if bits else "no entropy is known"
    note = "Entropy of the attention of the question's tokens: 0 bits is one key, more bits are more keys."
    return [*images, picture("_entropy_bits", finding, figure, note)]


def _retrieves(head: Mapping) -> bool:
    return (head["retrieval"] or 0) > RETRIEVES


def _most_on_needle(means: Sequence[Mapping]) -> str:
    shares = [(x["needle"], x["layer"], x["kind"]) for x in means if x["reach"] and x["needle"] is not None]
    if not shares:
        return "no layer reaches the needle"
    most, layer, layer_type = max(shares)
    return f"the needle gets {most:.1%} at most, in layer {layer} ({layer_type})"


def _first_and_last(weights: Mapping[str, np.ndarray]) -> str:
    """What a key weighs in the first and the last interval that the layer type with the farthest reach sees."""
    visible = {layer_type: of_type[of_type > 0] for layer_type, of_type in weights.items()}
    layer_type, seen = max(visible.items(), key=lambda item: len(item[1]))
    return f"a key of {layer_type} weighs {seen[0]:.1e} early and {seen[-1]:.1e} late" if len(seen) else "no key has a weight"


def _grid(by_layer: Sequence[Sequence[Mapping]], field: str) -> np.ndarray:
    """Layers down, heads across; NaN where there is no number."""
    grid = np.full((len(by_layer), 1 + max(r["head"] for heads in by_layer for r in heads)), math.nan)
    for row, heads in enumerate(by_layer):
        for r in heads:
            if r[field] is not None and (r["reach"] or field == "entropy_bits"):
                grid[row, r["head"]] = r[field]
    return grid


@style()
def attention_by_layer(means: Sequence[Mapping], colours: Mapping[str, str]) -> Figure:
    """Stacked shares of attention, a bar for each layer's means over its heads; `colours` are those of layer types."""
    figure, axes = single(3.2)
    positions, bottom = np.arange(len(means)), np.zeros(len(means))
    for segment, (name, colour) in SEGMENTS.items():
        heights = np.array([layer[segment] or 0 for layer in means])
        if heights.any():
            axes.bar(positions, heights, 0.82, bottom, color=colour, label=name)
        bottom += heights
    step = -(-len(means) // MOST_BARS)
    axes.set_xticks(positions[::step], [str(layer["layer"]) for layer in means[::step]])
    for layer_type, bars in grouped(positions, lambda i: means[i]["kind"]).items():
        axes.bar(bars, -STRIP, 1.0, -STRIP / 2, color=colours[layer_type], label=escape.label(layer_type))
    far = [i for i, layer in enumerate(means) if not layer["reach"]]
    if far:
        axes.plot(far, [1.035] * len(far), "x", color=MUTED, markersize=5, clip_on=False, label="needle out of reach")
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(-2 * STRIP, 1.06), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", visible=False)
    return pictures.with_legend(figure, pictures.LONGEST_LABEL)


@style()
def weight_by_position(weights: dict[str, np.ndarray], edges: Sequence[float], length: int, colours: dict[str, str]) -> Figure:
    """The mean weight of a key by its position, a line for each layer type, beside equal weights of all `length` keys."""
    figure, axes = single(3.2)
    for layer_type, of_type in weights.items():
        positive, label = np.where(of_type > 0, of_type, math.nan), escape.label(layer_type)
        axes.stairs(positive, edges, baseline=None, color=colours[layer_type], linewidth=1.6, label=label)
    pictures.level_line(axes, "all alike", 1 / length, pictures.DOTTED)
    pictures.positions_across(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="position of the key (tokens)", ylabel="mean weight of a key")
    return pictures.with_legend(figure, pictures.LONGEST_LABEL)


REPORT = EvaluationReport(sections, columns=())
