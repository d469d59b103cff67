"""Needles in a report: a heat map of each run and number of needles, and the share found by length."""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.needle import share_found
from hybrid_attn.evals.records import grouped, lengths_of
from hybrid_attn.evals.report import pictures, statistics
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Reading, Section
from hybrid_attn.evals.report.tables import LENGTH, Column, Table, interval, of_records, tokens


def questions(record: Mapping) -> tuple[float, int]:
    """How many questions of a cell are right, some in part, and how many there are: needles of one are not independent."""
    return record["right"] / record["needles"], record["answers"] // record["needles"]


def table(runs: Sequence[Run]) -> Table:
    """The share of needles found in each cell; its interval is that of the questions, of which each is right in part."""
    columns = [
        *(Column("needles", ","), LENGTH, Column("depth %", ",.0f", "depth")),
        *(Column("questions", ",", lambda run, r: questions(r)[1]), Column("right", ",.3f", lambda run, r: share_found([r]))),
        *interval(lambda r: statistics.wilson(*questions(r))),
    ]
    return of_records("needle_cells", "Needles found, by length and depth", records_of(runs, "needle"), columns)


def shares(records: Iterable[Mapping]) -> dict[int, statistics.Share]:
    """The share of questions that are right, over the depths of each length."""
    cells = sorted(grouped(records, itemgetter("length")).items())
    return {length: statistics.share(*map(sum, zip(*map(questions, x), strict=True))) for length, x in cells}


def _by_needles(run: Run) -> list[tuple[int, list[dict]]]:
    return sorted(grouped(run.of("needle"), itemgetter("needles")).items())


def sections(runs: Sequence[Run]) -> list[Section]:
    maps, panels, records = [], {}, records_of(runs, "needle")
    for number, run in enumerate(runs):
        for needles, of_run in _by_needles(run):
            kind = "one needle" if needles == 1 else f"{needles} needles"
            maps.append(_heat_map(run, of_run, kind, f"needle_{number}_{needles}"))
            panels.setdefault(kind, []).append(pictures.Curve(run.name, number, shares(of_run)))
    first, curves = next(iter(panels.items()))
    figure, caption = pictures.shares(panels, [run.trained for run in runs], "found", {}), pictures.changes(curves)
    note = f"All depths together. {pictures.WILSON}."
    overall = Picture("needle", f"Found, {first}: {caption}", figure, note, "needle_cells")
    sizes = {questions(record)[1] for _, record in records}
    few = f" Fewer than {statistics.FEWEST} are noise." if min(sizes) < statistics.FEWEST else ""
    span = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    paragraphs = [
        "A sentence, the needle, is hidden at some depth of a text, and the prompt ends with a question about it. Questions "
        f"per cell: {span}.{few} An answer is right if it contains the value of the needle; an answer about several needles "
        "is right in part for each of them. A guess finds none."
    ]
    if any(r["length"] > run.trained for run, r in records):
        paragraphs.append("The white dashed line marks the length of training: texts to its right are longer.")
    return [Section("needle", "Needle", paragraphs, [*maps, overall], [table(runs)._replace(is_folded=True)], "needle")]


def _heat_map(run: Run, records: Sequence[dict], kind: str, name: str) -> Picture:
    by_cell = {(f"{r['depth']:g}", r["length"]): share_found([r]) for r in records}
    lengths, depths = lengths_of(records), sorted({r["depth"] for r in records})
    perfect = [x for x in lengths if all(share == 1 for (_, length), share in by_cell.items() if length <= x)]
    up_to = f", all of them up to {tokens(perfect[-1])}" if perfect and len(perfect) < len(lengths) else ""
    caption = f"{run.name}, {kind}: {share_found(records):.1%} found overall{up_to}."
    figure = pictures.heat_map(lengths, [f"{depth:g}" for depth in depths], by_cell, run.trained)
    return Picture(name, caption, figure, "Share found by length and depth.", "needle_cells")


def readings(run: Run) -> list[Reading]:
    """Of the fewest needles."""
    fewest = _by_needles(run)[:1]
    return [Reading(f"{n} needles at a time" if n > 1 else "single needles", shares(records)) for n, records in fewest]


MEANING = "the share of needles found, over all lengths, depths and numbers of needles"
FOUND = Column("needles", ",.3f", lambda run, _: share_found(run.of("needle")), meaning=MEANING)
REPORT = EvaluationReport(sections, [FOUND], readings)
