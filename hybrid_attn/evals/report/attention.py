"""Attention in a report: where it goes, by layer, by position and by head."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

import numpy as np

from hybrid_attn.evals.records import grouped, mean_of
from hybrid_attn.evals.report import escape, layers, pictures
from hybrid_attn.evals.report.pictures import AMOUNTS, Line, Scale
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, SOURCE, Column, Table, tokens

RETRIEVES = 0.1  # a head whose retrieval score is larger is a retrieval head
SEGMENTS = {"begin": "begin", "needle": "needle", "context": "context", "question": "qc"}  # of keys
NOTES = {  # of a picture, by the end of its name
    "": "Where the question's tokens look, by layer.",
    "_retrieval": "Retrieval score: of the answer's tokens, the share that a head copies from the needle, if it is reached.",
    "_entropy_bits": "Entropy of the attention of the question's tokens: 0 bits is one key, more bits are more keys.",
}
MEANS = [  # over heads; a segment's share per token beside the whole, for other segments grow with the length
    *(Column(heading, ",.4f", segment) for heading, segment in SEGMENTS.items()),
    *(Column("entropy (bits)", ",.2f", "entropy_bits"), Column("needle lift", ",.2f", "needle_lift")),
    *(Column(f"{heading} per token", ".3g", f"{segment}_per_token") for heading, segment in SEGMENTS.items()),
    Column("token 0", ",.4f", "sink_rate"),
]
SHARE = Scale("head", "layer", 0, 1, "{:.2f}".format, AMOUNTS)


def table(runs: Sequence[Run]) -> Table:
    """Where the question's attention goes, by layer type."""
    columns = [RUN, SOURCE, LENGTH, Column("layer type"), Column("heads", ","), *MEANS]
    columns += [Column("retrieval heads", ","), Column("reach")]
    rows = []
    for run in runs:
        for (*key, letter), heads in grouped(run.of("attention_mass"), itemgetter("source", "length", "kind")).items():
            reach = "yes" if any(head["reach"] for head in heads) else "no"
            row = [run.name, *key, run.layer_types.get(letter, letter), len(heads)]
            rows.append([*row, *(mean_of(heads, x.value) for x in MEANS), sum(map(_retrieves, heads)), reach])
    return Table("attention", "Attention of the question's tokens, by layer type", columns, rows)


def sections(runs: Sequence[Run]) -> list[Section]:
    prompts = sorted({r["prompts"] for _, r in records_of(runs, "attention_mass")})
    text = (
        "Shares of the attention of the question's tokens, means over heads and over so many prompts: "
        f"{', '.join(map(str, prompts))}. The needle's lift is its share over the share of the tokens that it has; a retrieval "
        f"head (score over {RETRIEVES}) looks at the token that it copies. Per token: a segment's share over its "
        "tokens; token 0 is the share of the very first. Single heads, and weights by position without the first 10 and the "
        "last 3% of the keys, are shown at the longest length."
    )
    images = []
    for number, run in enumerate(runs):
        for source, of_source in grouped(run.of("attention_mass"), itemgetter("source")).items():
            for length, records in sorted(grouped(of_source, itemgetter("length")).items()):
                name = f"attention_{number}_{escape.file_name(source)}_{length}"
                of_length = _pictures(run, records, name, f"{run.name}, {source}, {tokens(length)}: ")
                images += of_length if length == max(r["length"] for r in of_source) else of_length[:1]
    return [Section("attention", "Attention", [text], images, [table(runs)], "attention_mass")]


def _pictures(run: Run, records: Sequence[dict], name: str, where: str) -> list[Picture]:
    """Of one run and source at one length: shares of segments by layer, weights by position, and numbers of single heads."""
    types = {letter: run.layer_types.get(letter, f"layers {letter}") for letter in sorted({r["kind"] for r in records})}
    by_layer = sorted(grouped(records, itemgetter("layer", "kind")).items())
    rows = {layer: f"{layer} {layers.short(types[letter])}" for (layer, letter), _ in by_layer}
    fields = {**SEGMENTS, "nothing (sink)": "nothing"}
    segments = {(rows[key[0]], column): mean_of(x, field) for key, x in by_layer for column, field in fields.items()}
    columns = [x for x in fields if x in SEGMENTS or any(segments[row, x] is not None for row in rows.values())]
    heads = range(1 + max(r["head"] for r in records))
    retrieval = {(rows[r["layer"]], r["head"]): r["retrieval"] for r in records if r["reach"]}
    bits = {(rows[r["layer"]], r["head"]): r["entropy_bits"] for r in records if r["entropy_bits"] is not None}
    copying = f"{sum(r['reach'] and _retrieves(r) for r in records)} of {len(records)} heads copy from the needle"
    spread = (
        f"heads have {min(bits.values()):.1f} to {max(bits.values()):.1f} bits of entropy" if bits else "no entropy is known"
    )
    most_bits = SHARE._replace(label="entropy (bits)", high=math.log2(records[0]["length"]) or 1.0, show="{:.1f}".format)
    heat_maps = {  # cells, columns, scale, finding
        "": (segments, columns, SHARE._replace(across=""), _most_on_needle(by_layer, types)),
        "_retrieval": (retrieval, heads, SHARE, copying),
        "_entropy_bits": (bits, heads, most_bits, spread),
    }
    images = []
    for suffix, (cells, across, scale, finding) in heat_maps.items():
        figure = pictures.heat_maps({"": cells}, [*rows.values()], across, scale)
        images.append(Picture(f"{name}{suffix}", f"{where}{finding}.", figure, NOTES[suffix], "attention"))
    if all("weights" in r for r in records) and len({tuple(r["edges"]) for r in records}) == 1:
        images.append(_weights(records, types, f"{name}_weights", where))
    return images


def _retrieves(head: Mapping) -> bool:
    return (head["retrieval"] or 0) > RETRIEVES


def _most_on_needle(by_layer: Sequence[tuple[tuple[int, str], Sequence[Mapping]]], types: Mapping[str, str]) -> str:
    reaching = [(mean_of(heads, "needle") or 0, *key) for key, heads in by_layer if any(r["reach"] for r in heads)]
    if not reaching:
        return "no layer reaches the needle"
    most, layer, letter = max(reaching)
    return f"the needle gets {most:.1%} at most, in layer {layer} ({types[letter]})"


def _weights(records: Sequence[dict], types: Mapping[str, str], name: str, where: str) -> Picture:
    """The mean weight of a key by its position, a line for each layer type, beside equal weights of all keys."""
    ends, length = records[0]["edges"][1:], records[0]["length"]
    curves = []
    for number, (letter, label) in enumerate(types.items(), 2):  # in other colours than the first two runs
        weights = np.mean(np.array([r["weights"] for r in records if r["kind"] == letter], float), axis=0)
        values = np.where(weights > 0, weights, math.nan).tolist()
        curves.append(Line(label, number, {end: [x] * 3 for end, x in zip(ends, values, strict=True)}))
    level = Line("all alike", None, {end: [1 / length] * 3 for end in ends})
    figure = pictures.lines({"": [*curves, level]}, "position of the key, up to (tokens)", "mean weight of a key", "log")
    note = "The mean weight of a key by its position, over the heads of each layer type."
    caption = f"{where}weight of a key: {pictures.ends(curves, '{:.1e}'.format)}"
    return Picture(name, caption, figure, note, "attention")


REPORT = EvaluationReport(sections, columns=())
