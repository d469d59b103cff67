"""Sections of losses: by position, and of key tokens."""

import math
from collections.abc import Sequence

from hybrid_attn.evals.report import contents, escape, pictures
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.descriptions import PART_NAMES
from hybrid_attn.evals.report.records import grouped
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.tables import tokens
from hybrid_attn.evals.report.verdict import gain

NEAR = 0.75  # of the loss by chance, from where on a picture shows it
INTERVALS = "Bands are normal intervals of 95% from the losses of single rows."


def position(runs: Sequence[Run]) -> list[Section]:
    """Loss by position, a picture for each source and part of the tokens, a panel for each length of rows."""
    drawn, buckets = [], [(i, run, r) for i, run in enumerate(runs) for r in run.of("position") if "first" in r]
    for source, of_source in grouped(buckets, lambda x: x[2]["source"]).items():
        level = chance(runs, [r["loss"] for *_, r in of_source])
        for part, of_part in grouped(of_source, lambda x: contents.part(x[2])).items():
            lines: dict[str, list[tuple[str, int, list[dict]]]] = {}
            for (length, i), line in sorted(grouped(of_part, lambda x: (x[2]["length"], x[0])).items()):
                lines.setdefault(f"rows of {tokens(length)}", []).append((runs[i].name, i, [r for *_, r in line]))
            baselines = (bigrams(runs, source) if part == "all" else {}) | level
            figure = pictures.loss_by_position(lines, [run.trained for run in runs], baselines)
            what = f"{source}, {PART_NAMES.get(part, part)}."
            caption = _finding(runs, source, part) or what.replace(f"{source}, ", f"{source}: ", 1)
            name = f"loss_{escape.file_name(source)}_{part}"
            drawn.append(Picture(name, caption, figure, f"{what} {INTERVALS}", "loss_by_position"))
    paragraphs = [
        "The loss of a token by its position in the document. If a model reads its context, the loss is lower at later "
        "positions; if it cannot go beyond its length of training, the loss is higher there. Chance is the loss when all "
        f"tokens of the vocabulary are equally likely; its line is shown where a loss exceeds {NEAR:.0%} of it."
    ]
    paragraphs += _unreached(runs) + _unlike(runs, "position")
    return [Section("loss", "Loss", paragraphs, drawn, [contents.position(runs)], [contents.positions(runs)], "position")]


def _finding(runs: Sequence[Run], source: str, part: str) -> str:
    """What the first run that knows gains from its context, or what a part of its tokens costs, at the length of training."""
    for run in runs:
        totals = [r for r in run.of("position") if "first" not in r and (r["source"], contents.part(r)) == (source, part)]
        record = next((r for r in totals if r["length"] == run.trained), totals[0] if totals else None)
        if record and part == "all" and (text := gain(run, record)):
            return f"{run.name}, {source}: {text}."
        if record and part != "all" and record["loss"] is not None:
            cost = f"{PART_NAMES[part]} cost {record['loss']:.2f} nats"
            return f"{run.name}, {source}: {cost} in rows of {tokens(record['length'])}."
    return ""


def bigrams(runs: Sequence[Run], source: str) -> dict[str, float]:
    """What bigram models lose on a source, in nats per token of the runs' own tokenizers; once where they agree."""
    losses: dict[str, float] = {}
    for run in runs:
        totals = [r for r in run.of("position") if contents.is_total(r) and r["source"] == source]
        rates = [r["loss"] / r["bits_per_byte"] for r in totals if r["loss"] and r.get("bits_per_byte")]
        bits = [r["bits_per_byte"] for r in run.of("bigram") if r["source"] == source]
        if rates and bits:
            losses[f"bigram of {run.name}"] = bits[-1] * rates[0]
    values = [*losses.values()]
    agree = values and all(math.isclose(values[0], value, rel_tol=1e-3) for value in values)
    return {"bigram": values[0]} if agree else losses


def chance(runs: Sequence[Run], losses: Sequence[float | None]) -> dict[str, float]:
    """The losses by chance of the runs' vocabularies, once where all have the same.

    Only where one of `losses` is near: far above the curves, such a line would flatten them.
    """
    levels = {f"chance of {run.name}": run.chance for run in runs if run.of("position") and run.chance is not None}
    highest = max((x for x in losses if x is not None), default=0.0)
    if len({*levels.values()}) == 1:
        levels = {"chance": next(iter(levels.values()))}
    return {name: loss for name, loss in levels.items() if highest > NEAR * loss}


def _unreached(runs: Sequence[Run]) -> list[str]:
    """Which rows are longer than all that was read of documents in them."""
    ends = [(run.name, source, end, length) for run in runs for (source, length), end in contents.ends(run).items()]
    short = grouped((x for x in ends if x[2] < x[3]), lambda x: x[:3])
    return [
        f"{name}, {source}: in rows of {', '.join(tokens(x[3]) for x in items)} no document that was read is longer than "
        f"{end:,} tokens; set --tokens higher to read more."
        for (name, source, end), items in short.items()
    ]


def _unlike(runs: Sequence[Run], evaluation: str) -> list[str]:
    """What keeps the losses of an evaluation from being compared: other documents of the same name, or other tokens."""
    read: dict[str, set] = {}
    for run in runs:
        for source in {r["source"] for r in run.of(evaluation)}:
            read.setdefault(source, set()).add(run.provenance.get("heldout", {}).get(source))
    paragraphs = [
        f"{source}: the runs read different held-out documents under this name; their losses cannot be compared."
        for source in sorted(read)
        if len(read[source]) > 1
    ]
    if len({run.provenance.get("tokenizer") for run in runs if run.of(evaluation)}) > 1:
        paragraphs.append("The runs have different tokenizers: compare their bits per byte, not their losses per token.")
    return paragraphs


def key_tokens(runs: Sequence[Run]) -> list[Section]:
    paragraphs = [
        "Key tokens are those that the far context makes more likely than the near context alone does; the loss is over these "
        "tokens only. Each model has its own key tokens, so that the losses of two models are not over the same tokens."
    ]
    paragraphs += _unlike(runs, "key_tokens")
    return [Section("key_tokens", "Key tokens", paragraphs, [], [contents.key_tokens(runs)], [], "key_tokens")]
