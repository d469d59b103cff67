"""Losses in a report: by position in the document, beside a bigram model and chance; and of key tokens."""

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.records import grouped, is_total, part
from hybrid_attn.evals.report import escape, pictures
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Section
from hybrid_attn.evals.report.statistics import Z
from hybrid_attn.evals.report.tables import LENGTH, SOURCE, Column, of_records, tokens

PART_NAMES = {"all": "all tokens", "recall": "tokens whose bigram was seen before", "rest": "the other tokens"}
NEAR = 0.75  # of the loss by chance, from where on a picture shows it
INTERVALS = "Bands are normal intervals of 95% from the losses of single sequences."
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
    for source, of_source in grouped(buckets, lambda x: x[1]["source"]).items():
        levels = chance(runs, max((r["loss"] for _, r in of_source if r["loss"] is not None), default=0))
        for name, of_part in grouped(of_source, lambda x: part(x[1])).items():
            lines: dict[str, list[tuple[str, int, list[dict]]]] = {}
            for (length, i), line in sorted(grouped(of_part, lambda x: (x[1]["length"], x[0])).items()):
                lines.setdefault(f"sequences of {tokens(length)}", []).append((runs[i].name, i, [r for _, r in line]))
            of_bigrams = bigrams(runs, source) if name == "all" else []
            figure = pictures.loss_by_position(lines, [run.trained for run in runs], of_bigrams + levels)
            note = f"{source}, {PART_NAMES[name]}. {INTERVALS}"
            file = f"loss_{escape.file_name(source)}_{name}"
            images.append(Picture(file, _caption(runs, source, name), figure, note, "loss_by_position"))
    return images


def _caption(runs: Sequence[Run], source: str, name: str) -> str:
    """What the first run that knows gains from its context, or what a part of its tokens costs, at the length of training."""
    for run in runs:
        of_part = [r for r in run.of("position") if "first" not in r and (r["source"], part(r)) == (source, name)]
        record = next((r for r in of_part if r["length"] == run.trained), of_part[0] if of_part else None)
        if record and name == "all" and (text := gain(run, record)):
            return f"{run.name}, {source}: {text}."
        if record and name != "all" and record["loss"] is not None:
            where = f"in sequences of {tokens(record['length'])}"
            return f"{run.name}, {source}: {PART_NAMES[name]} cost {record['loss']:.2f} nats {where}."
    return f"{source}: {PART_NAMES[name]}."


def bigrams(runs: Sequence[Run], source: str) -> list[pictures.Level]:
    """What bigram models lose on a source, in nats per token of the runs' own tokenizers; once where they agree."""
    losses: dict[str, float] = {}
    for run in runs:
        of_source = [r for r in run.of("position") if is_total(r) and r["source"] == source]
        rates = [r["loss"] / r["bits_per_byte"] for r in of_source if r["loss"] and r.get("bits_per_byte")]
        bits = [r["bits_per_byte"] for r in run.of("bigram") if r["source"] == source]
        if rates and bits:
            losses[run.name] = bits[-1] * rates[0]
    return _levels("bigram", losses, pictures.LONG_DASHED, 1e-3)


def chance(runs: Sequence[Run], highest: float) -> list[pictures.Level]:
    """The losses by chance of the runs' vocabularies, if the `highest` loss is near: far above, they would flatten curves."""
    losses = {run.name: run.chance for run in runs if run.of("position") and run.chance is not None}
    return [level for level in _levels("chance", losses, pictures.DASH_DOT) if highest > NEAR * level[1]]


def _levels(name: str, losses: dict[str, float], dashes: tuple, tolerance: float = 0) -> list[pictures.Level]:
    first = next(iter(losses.values()), 0)
    if losses and all(math.isclose(first, loss, rel_tol=tolerance) for loss in losses.values()):
        return [(name, first, dashes)]
    return [(f"{name} of {run}", loss, dashes) for run, loss in losses.items()]


def _unreached(runs: Sequence[Run]) -> Iterator[str]:
    """Which sequences are longer than all that was read of documents in them."""
    ends: dict[tuple[str, str, int], int] = {}
    for run, r in records_of(runs, "position"):
        key = run.name, r["source"], r["length"]
        ends[key] = max(ends.get(key, 0), r.get("end", 0))
    short = grouped((key for key in ends if 0 < ends[key] < key[2]), lambda key: (*key[:2], ends[key]))
    for (name, source, end), keys in short.items():
        lengths, more = ", ".join(tokens(length) for *_, length in keys), "set --tokens higher to read more"
        yield f"{name}, {source}: in sequences of {lengths} no document that was read is longer than {end:,} tokens; {more}."


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


def sentences(run: Run) -> list[str]:
    """Loss at the length of training, beside a bigram model's; and what the context before a token gains."""
    records = [r for r in run.of("position") if is_total(r) and r["loss"] is not None]
    if not records:
        return []
    source = records[0]["source"]
    of_source = sorted((r for r in records if r["source"] == source), key=itemgetter("length"))
    record, longest = min(of_source, key=lambda r: abs(math.log(r["length"] / run.trained))), of_source[-1]
    bits = record.get("bits_per_byte")
    scale, unit = (bits / record["loss"], "bits per byte") if bits and record["loss"] else (1.0, "nats per token")
    where = f"{tokens(record['length'])}{', its trained length' * (record['length'] == run.trained)}"
    number = f" (n = {len(record['by_row']):,} sequences)" if "by_row" in record else ""
    text = f"{run.name} reads {source} at {_loss(record, scale)} {unit} in sequences of {where}{number}"
    bigram = {r["bits_per_byte"] for r in run.of("bigram") if r["source"] == source}
    if bits and len(bigram) == 1:
        text += f", {'below' if bits < min(bigram) else 'no better than'} a bigram model's {min(bigram):.2f}"
    texts = [f"{text}."]
    if context := gain(run, record):
        texts.append(f"{context[0].upper()}{context[1:]}.")
    if longest["length"] > record["length"]:
        clear = longest["loss"] - record["loss"] > Z * math.hypot(*(r.get("stderr") or 0 for r in (longest, record)))
        higher = "higher" if clear else "not clearly higher"
        texts.append(f"In sequences of {tokens(longest['length'])} the loss is {higher}: {_loss(longest, scale)} {unit}.")
    return texts


def gain(run: Run, total: dict) -> str | None:
    """How much less a token late in a sequence costs than one of the first."""
    buckets = [r for r in run.of("position") if "first" in r and part(r) == "all" and r["loss"] is not None]
    buckets = [r for r in buckets if (r["source"], r["length"]) == (total["source"], total["length"])]
    if len(buckets) < 2:
        return None
    first, last = min(buckets, key=itemgetter("first")), max(buckets, key=itemgetter("first"))
    errors = [r.get("stderr") for r in (first, last)]
    less, half = first["loss"] - last["loss"], None if None in errors else Z * math.hypot(*errors)
    amount = f"{abs(less):.2f}{'' if half is None else f' ± {half:.2f}'} nats"
    verb, than = ("gains", "less") if less >= 0 else ("costs", "more")
    late, than = tokens(last["first"]), f"{than} than the first {first['end']:,}"
    if half is not None and abs(less) <= half:
        return f"context makes no clear difference: tokens from position {late} on cost {amount} {than}"
    return f"context {verb} {amount}: a token from position {late} on costs that much {than}"


def _loss(record: dict, scale: float) -> str:
    error = record.get("stderr")
    return f"{scale * record['loss']:.2f}" + (f" ± {scale * Z * error:.2f}" if error is not None else "")


def _at_training(run: Run) -> dict:
    """The loss of the first source at the length of training."""
    return next((r for r in run.of("position") if is_total(r) and r["length"] == run.trained), {})


def _bigram(run: Run, _: Mapping) -> float | None:
    return next((r["bits_per_byte"] for r in run.of("bigram") if r["source"] == _at_training(run).get("source")), None)


MEANING = "nats per token on held-out text of one source, at the length of training"
COLUMNS = [
    LOSS._replace(name="loss", value=lambda run, _: _at_training(run).get("loss"), meaning=MEANING),
    BITS._replace(value=lambda run, _: _at_training(run).get("bits_per_byte"), meaning="the same loss per byte of the text"),
    Column("bigram", ",.3f", _bigram, meaning="the bits per byte of a bigram model on that text"),
    Column("of source", value=lambda run, _: _at_training(run).get("source")),
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
