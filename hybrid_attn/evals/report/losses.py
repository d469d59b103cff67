"""Losses in a report: by position in the document, beside a bigram model and chance; and of key tokens."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.records import grouped, is_total, part
from hybrid_attn.evals.report import escape, pictures
from hybrid_attn.evals.report.pictures import Line
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Section
from hybrid_attn.evals.report.statistics import Z
from hybrid_attn.evals.report.tables import LENGTH, SOURCE, Column, of_records, tokens

PART_NAMES = {"all": "all tokens", "recall": "tokens whose bigram was seen before", "rest": "the other tokens"}
NEAR = 0.75  # of the loss by chance, from where on a picture shows it
INTERVALS = "Bars are normal intervals of 95% from the losses of single sequences."
LOSS, BITS = Column("loss (nats)", ",.3f", "loss"), Column("bits per byte", ",.3f", "bits_per_byte")
SCORED, NUMBER = Column("tokens scored", value=lambda run, r: part(r)), Column("number", ",", "tokens")
WHOLE = [SOURCE, LENGTH, SCORED, NUMBER, LOSS, BITS, Column("chance (nats)", ",.3f", lambda run, r: run.chance)]
BUCKETS = [SOURCE, LENGTH, SCORED, Column("from", ",", "first"), Column("to", ",", "end"), NUMBER, LOSS, BITS]
KEYS = Column("near context", tokens, "short"), Column("key tokens", ",", "key_tokens"), Column("of tokens", ",", "tokens")
KEY_TOKENS = [SOURCE, LENGTH, *KEYS, LOSS, Column("perplexity", ",.2f")]


def sections(runs: Sequence[Run]) -> list[Section]:
    records = records_of(runs, "position")
    sequences, buckets = ([x for x in records if ("first" in x[1]) == is_bucket] for is_bucket in (False, True))
    totals = of_records("loss", "Held-out loss of whole sequences", sequences, WHOLE)
    by_position = of_records("loss_by_position", "Held-out loss by position in the document", buckets, BUCKETS)
    paragraphs = [
        "The loss of a token by its position in the document. If a model reads its context, the loss is lower at later "
        "positions; if it cannot go beyond its length of training, the loss is higher there. Chance is the loss when all "
        f"tokens of the vocabulary are equally likely; its line is shown where a loss exceeds {NEAR:.0%} of it."
    ]
    paragraphs += [*_unreached(runs), *incomparable(runs, "position")]
    return [Section("loss", "Loss", paragraphs, _pictures(runs), [totals, by_position._replace(is_folded=True)], "position")]


def _pictures(runs: Sequence[Run]) -> list[Picture]:
    """Loss by position, a picture for each source and part of the tokens, a panel for each length of sequences."""
    buckets = [(i, r) for i, run in enumerate(runs) for r in run.of("position") if "first" in r]
    images = []
    for (source, name), of_picture in grouped(buckets, lambda x: (x[1]["source"], part(x[1]))).items():
        panels: dict[str, list[Line]] = {}
        for (length, i), records in sorted(grouped(of_picture, lambda x: (x[1]["length"], x[0])).items()):
            line = Line(runs[i].name, i, _by_end([r for _, r in records]))
            panels.setdefault(f"sequences of {tokens(length)}", []).append(line)
        title, curves = [*panels.items()][-1]
        caption = f"{source}, {PART_NAMES[name]}, {title}: {pictures.ends(curves, '{:.2f}'.format)}"
        highest = max(r["loss"] or 0 for _, r in of_picture)
        for of_panel in panels.values():
            keys = {key for line in of_panel for key in line.values}
            for label, loss in levels(runs, source).items():
                if highest > NEAR * loss and (name == "all" or not label.startswith("bigram")):
                    of_panel.append(Line(label, None, dict.fromkeys(keys, [loss] * 3)))
        figure = pictures.lines(panels, "position, up to (tokens)", "nats per token", "linear", [run.trained for run in runs])
        file = f"loss_{escape.file_name(source)}_{name}"
        images.append(Picture(file, caption, figure, f"Loss by position. {INTERVALS}", "loss_by_position"))
    return images


def _by_end(buckets: Sequence[Mapping]) -> dict[int, list[float]]:
    """Losses with their intervals by the ends of their buckets; NaN at the end of a gap, in which no token was scored."""
    losses: dict[int, list[float]] = {}
    for bucket in sorted(buckets, key=itemgetter("first")):
        loss, half = (math.nan if x is None else x for x in (bucket["loss"], bucket.get("stderr")))
        if bucket["first"]:
            losses.setdefault(bucket["first"], [math.nan] * 3)
        losses[bucket["end"]] = [loss, loss - Z * half, loss + Z * half]
    return losses


def levels(runs: Sequence[Run], source: str) -> dict[str, float]:
    """Losses by chance and of bigram models, in nats per token of the runs' own tokenizers; once where they are the same."""
    named: dict[str, float] = {}
    for run in runs:
        nats = next((r["loss"] / r["bits_per_byte"] for r in totals(run, source) if r.get("bits_per_byte")), None)
        bigram = bigram_bits(run, source)
        for name, loss in (("chance", run.chance), ("bigram", nats and bigram and nats * bigram)):
            same = any(math.isclose(loss or 0, x, rel_tol=1e-3) for known, x in named.items() if known.startswith(name))
            if loss is not None and not same:
                named[f"{name} of {run.name}" if name in named else name] = loss
    return named


def _unreached(runs: Sequence[Run]) -> Iterator[str]:
    """Which sequences are longer than all that was read of documents in them."""
    of_sequences = grouped(records_of(runs, "position"), lambda x: (x[0].name, x[1]["source"], x[1]["length"]))
    ends = {key: max(r.get("end", 0) for _, r in records) for key, records in of_sequences.items()}
    for (name, source, end), keys in grouped(ends, lambda key: (*key[:2], ends[key])).items():
        if lengths := ", ".join(tokens(length) for *_, length in keys if 0 < end < length):
            text = f"{name}, {source}: in sequences of {lengths} no document that was read is longer than {end:,} tokens"
            yield f"{text}; set --tokens higher to read more."


def incomparable(runs: Sequence[Run], evaluation: str) -> Iterator[str]:
    """What keeps the losses of an evaluation from being compared: other documents of the same name, or other tokens."""
    documents: dict[str, set] = {}
    for run, r in records_of(runs, evaluation):
        documents.setdefault(r["source"], set()).add(run.provenance.get("heldout", {}).get(r["source"]))
    for source in sorted(documents):
        if len(documents[source]) > 1:
            yield f"{source}: the runs read different held-out documents under this name; their losses cannot be compared."
    if len({run.provenance.get("tokenizer") for run in runs if run.of(evaluation)}) > 1:
        yield "The runs have different tokenizers: compare their bits per byte, not their losses per token."


def totals(run: Run, source: str | None) -> list[dict]:
    """The losses of all tokens of whole sequences of a source, by length."""
    records = [r for r in run.of("position") if is_total(r) and r["source"] == source and r["loss"]]
    return sorted(records, key=itemgetter("length"))


def at_training(run: Run) -> dict:
    """The loss of the first source at the length that is nearest to that of training."""
    source = next((r["source"] for r in run.of("position")), None)
    return min(totals(run, source), key=lambda r: abs(math.log(r["length"] / run.trained)), default={})


def bigram_bits(run: Run, source: str | None) -> float | None:
    """The bits per byte of a bigram model on a source."""
    return next((r["bits_per_byte"] for r in run.of("bigram") if r["source"] == source), None)


def sentences(run: Run) -> Iterator[str]:
    """Loss at the length of training, beside a bigram model's; and what the context before a token gains."""
    if not (total := at_training(run)):
        return
    bits, source = total.get("bits_per_byte"), total["source"]
    bigram = bigram_bits(run, source)
    scale, unit = (bits / total["loss"], "bits per byte") if bits else (1.0, "nats per token")
    where = f"{tokens(total['length'])}{', its trained length' * (total['length'] == run.trained)}"
    number = f" (n = {len(total['by_row']):,} sequences)" if "by_row" in total else ""
    beside = f", {'below' if bits < bigram else 'no better than'} a bigram model's {bigram:.2f}" if bits and bigram else ""
    yield f"{run.name} reads {source} at {_loss(total, scale)} {unit} in sequences of {where}{number}{beside}."
    yield from gain([r for r in run.of("position") if (r["source"], r["length"]) == (source, total["length"])])
    if (longest := totals(run, source)[-1])["length"] > total["length"]:
        clear = longest["loss"] - total["loss"] > Z * math.hypot(*(r.get("stderr") or 0 for r in (longest, total)))
        higher = "higher" if clear else "not clearly higher"
        yield f"In sequences of {tokens(longest['length'])} the loss is {higher}: {_loss(longest, scale)} {unit}."


def gain(records: Sequence[Mapping]) -> Iterator[str]:
    """How much less a token late in a sequence costs than one of the first."""
    buckets = [r for r in records if "first" in r and part(r) == "all" and r["loss"] is not None]
    if len(buckets) < 2:
        return
    first, last = (choose(buckets, key=itemgetter("first")) for choose in (min, max))
    less, errors = first["loss"] - last["loss"], [r.get("stderr") for r in (first, last)]
    half = math.nan if None in errors else Z * math.hypot(*errors)
    amount = f"{abs(less):.2f}{'' if math.isnan(half) else f' ± {half:.2f}'} nats {'less' if less >= 0 else 'more'}"
    verb = "makes no clear difference" if abs(less) <= half else "helps" if less >= 0 else "harms"
    yield f"Context {verb}: tokens from position {tokens(last['first'])} on cost {amount} than the first {first['end']:,}."


def _loss(record: Mapping, scale: float) -> str:
    error = record.get("stderr")
    return f"{scale * record['loss']:.2f}" + (f" ± {scale * Z * error:.2f}" if error is not None else "")


def _value(field: str) -> Callable[[Run, Mapping], float | str | None]:
    return lambda run, _: at_training(run).get(field)


def _bigram(run: Run, _: Mapping) -> float | None:
    return bigram_bits(run, at_training(run).get("source"))


MEANING = "nats per token on held-out text of one source, at the length of training or the nearest"
COLUMNS = [
    LOSS._replace(name="loss", value=_value("loss"), meaning=MEANING),
    BITS._replace(value=_value("bits_per_byte"), meaning="the same loss per byte of the text"),
    BITS._replace(name="bigram", value=_bigram, meaning="that of a bigram model on the same text"),
    Column("of source", value=_value("source")),
]


def key_tokens(runs: Sequence[Run]) -> list[Section]:
    title = "Tokens whose loss depends on the far context"
    table = of_records("key_tokens", title, records_of(runs, "key_tokens"), KEY_TOKENS)
    text = (
        "Key tokens are those that the far context makes more likely than the near context alone does; the loss is over these "
        "tokens only. Each model has its own key tokens, so that the losses of two models are not over the same tokens."
    )
    return [Section("key_tokens", "Key tokens", [text, *incomparable(runs, "key_tokens")], [], [table], "key_tokens")]


REPORT = EvaluationReport(sections, COLUMNS, sentences)
KEY_TOKENS_REPORT = EvaluationReport(key_tokens, columns=())
