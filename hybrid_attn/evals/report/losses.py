"""Sections of losses: by position, and of key tokens."""

import math
from collections.abc import Sequence

from hybrid_attn.evals.report import contents, escape, pictures
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.descriptions import PARTS
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.tables import tokens
from hybrid_attn.evals.report.verdict import gain

NEAR = 0.75  # of the loss by chance, from where on a picture shows it
INTERVALS = "Bands are intervals of 95%: a normal one from the losses of rows."


def position(runs: Sequence[Run]) -> list[Section]:
    """Loss by position, a picture for each source and part of the tokens, a panel for each length of rows."""
    drawn, marks = [], [run.trained for run in runs]
    buckets = [(i, run.name, r) for i, run in enumerate(runs) for r in run.of("position") if "first" in r]
    for source in dict.fromkeys(r["source"] for *_, r in buckets):
        of_source = [(i, name, r) for i, name, r in buckets if r["source"] == source]
        for part in dict.fromkeys(contents.part(r) for *_, r in of_source):
            panels: dict[str, dict[tuple[str, int], list[dict]]] = {}
            for i, name, r in sorted(of_source, key=lambda x: (x[2]["length"], x[0])):
                if contents.part(r) == part:
                    panels.setdefault(f"rows of {tokens(r['length'])}", {}).setdefault((name, i), []).append(r)
            lines = {title: [(*line, several) for line, several in x.items()] for title, x in panels.items()}
            beside = (bigrams(runs, source) if part == "all" else {}) | chance(runs, [r["loss"] for *_, r in of_source])
            figure = pictures.loss_by_position(lines, marks, beside)
            caption = _finding(runs, source, part) or f"{source}: {PARTS.get(part, part)}."
            name = f"loss_{escape.file_name(source)}_{part}"
            note = f"{source}, {PARTS.get(part, part)}. {INTERVALS}"
            drawn.append(Picture(name, caption, figure, len(panels) > 2, note, "loss_by_position"))
    words = [
        "What a token costs by its position in the document: a model that reads its context pays less further on, and one "
        "that cannot go beyond its length of training pays more there. Chance is the loss where all tokens of the vocabulary "
        f"are equally likely, and drawn where a loss exceeds {NEAR:.0%} of it."
    ]
    words += _unreached(runs) + _unlike(runs, "position")
    return [Section("loss", "Loss", words, drawn, [contents.position(runs)], [contents.positions(runs)], "position")]


def _finding(runs: Sequence[Run], source: str, part: str) -> str:
    """What the first run that knows gains from its context, or what a part of its tokens costs, at the length of training."""
    for run in runs:
        totals = [r for r in run.of("position") if "first" not in r and (r["source"], contents.part(r)) == (source, part)]
        record = next((r for r in totals if r["length"] == run.trained), totals[0] if totals else None)
        if record and part == "all" and (told := gain(run, record)):
            return f"{run.name}, {source}: {told}."
        if record and part != "all" and record["loss"] is not None:
            return f"{run.name}, {source}: {PARTS[part]} cost {record['loss']:.2f} nats in rows of {tokens(record['length'])}."
    return ""


def bigrams(runs: Sequence[Run], source: str) -> dict[str, float]:
    """What bigram models lose on a source, in nats per token of the runs' own tokenizers; once where they agree."""
    found: dict[str, float] = {}
    for run in runs:
        totals = [r for r in run.of("position") if contents.is_total(r) and r["source"] == source]
        rates = [r["loss"] / r["bits_per_byte"] for r in totals if r["loss"] and r.get("bits_per_byte")]
        for r in run.of("bigram"):
            if r["source"] == source and rates:
                found[f"bigram of {run.name}"] = r["bits_per_byte"] * rates[0]
    values = [*found.values()]
    if values and all(math.isclose(values[0], value, rel_tol=1e-3) for value in values):
        return {"bigram": values[0]}
    return found


def chance(runs: Sequence[Run], losses: Sequence[float | None]) -> dict[str, float]:
    """The losses by chance of the runs' vocabularies, once where all have the same.

    Only where one of `losses` is near: far above the curves, such a line would flatten them.
    """
    found = {f"chance of {run.name}": run.chance for run in runs if run.of("position") and run.chance is not None}
    highest = max((x for x in losses if x is not None), default=0.0)
    if len({*found.values()}) == 1:
        found = {"chance": next(iter(found.values()))}
    return {name: loss for name, loss in found.items() if highest > NEAR * loss}


def _unreached(runs: Sequence[Run]) -> list[str]:
    """Which rows are longer than all that was read of documents in them."""
    short: dict[tuple[str, str, int], list[int]] = {}
    for run in runs:
        for (source, length), end in contents.ends(run).items():
            if end < length:
                short.setdefault((run.name, source, end), []).append(length)
    return [
        f"{name}, {source}: in rows of {', '.join(map(tokens, lengths))} no document that was read reaches beyond "
        f"{end:,} tokens; more --tokens read more documents."
        for (name, source, end), lengths in short.items()
    ]


def _unlike(runs: Sequence[Run], evaluation: str) -> list[str]:
    """What keeps the losses of an evaluation from being compared: other documents of the same name, or other tokens."""
    read: dict[str, set] = {}
    for run in runs:
        for source in {r["source"] for r in run.of(evaluation)}:
            read.setdefault(source, set()).add(run.provenance.get("heldout", {}).get(source))
    words = [
        f"{source}: the runs read other held-out documents of this name; their losses do not compare."
        for source in sorted(read)
        if len(read[source]) > 1
    ]
    if len({run.provenance.get("tokenizer") for run in runs if run.of(evaluation)}) > 1:
        words.append("The runs have other tokenizers: the loss of a token does not compare, bits per byte do.")
    return words


def key_tokens(runs: Sequence[Run]) -> list[Section]:
    words = [
        "Tokens that the context farther away than the near one makes likely: the loss is over these alone. Each model says "
        "for itself which they are, so that losses of two models are not over the same tokens."
    ]
    words += _unlike(runs, "key_tokens")
    return [Section("key_tokens", "Key tokens", words, [], [contents.key_tokens(runs)], [], "key_tokens")]
