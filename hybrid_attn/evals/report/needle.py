"""Needles in a report: a heat map of each run and number of needles, and the share found by length."""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.needle import share_found
from hybrid_attn.evals.records import grouped, lengths_of
from hybrid_attn.evals.report import pictures, statistics
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Reading, Section
from hybrid_attn.evals.report.tables import LENGTH, Column, Table, interval, of_records

SCALE = pictures.Scale("context length (tokens)", "depth of the needle (%)", 0, 1, "{:.2f}".format, pictures.SCORES)


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


def by_needles(run: Run) -> dict[str, list[dict]]:
    """The fewest first."""
    groups = sorted(grouped(run.of("needle"), itemgetter("needles")).items())
    return {"single needles" if n == 1 else f"{n} needles at a time": records for n, records in groups}


def readings(run: Run) -> list[Reading]:
    return [Reading(name, shares(records)) for name, records in by_needles(run).items()]


def sections(runs: Sequence[Run]) -> list[Section]:
    maps = [_heat_map(i, run, *x) for i, run in enumerate(runs) for x in by_needles(run).items()]
    overall = pictures.by_length("needle", runs, readings, ", all depths together.", "needle_cells")
    sizes = sorted({questions(record)[1] for _, record in records_of(runs, "needle")})
    span = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    text = (
        "A sentence, the needle, is hidden at some depth of a text, and the prompt ends with a question about it. Questions "
        f"per cell: {span}. An answer is right if it contains the value of the needle; an answer about several needles "
        "is right in part for each of them. A guess finds none."
    )
    return [Section("needle", "Needle", [text], [*maps, overall], [table(runs)._replace(is_folded=True)], "needle")]


def _heat_map(number: int, run: Run, name: str, records: Sequence[dict]) -> Picture:
    cells = {(f"{r['depth']:g}", r["length"]): share_found([r]) for r in records}
    lengths, depths = lengths_of(records), [f"{depth:g}" for depth in sorted({r["depth"] for r in records})]
    figure = pictures.heat_maps({run.name: cells}, depths, lengths, SCALE, {run.name: run.trained})
    note = f"Share found by length and depth.{pictures.BEYOND * (lengths[-1] > run.trained)}"
    caption = f"{run.name}, {name}: {share_found(records):.1%} found overall."
    return Picture(f"needle_{number}_{records[0]['needles']}", caption, figure, note, "needle_cells")


MEANING = "the share of needles found, over all lengths, depths and numbers of needles"
FOUND = Column("needles", ",.3f", lambda run, _: share_found(run.of("needle")), meaning=MEANING)
REPORT = EvaluationReport(sections, [FOUND], readings)
