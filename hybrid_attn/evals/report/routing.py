"""Routing in a report: the share of each expert, by source and layer."""

from collections.abc import Sequence
from operator import itemgetter

from hybrid_attn.evals.records import grouped, lengths_of
from hybrid_attn.evals.report import layers, pictures
from hybrid_attn.evals.report.pictures import AMOUNTS, Scale
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, SOURCE, Column, Table, of_records, tokens

EXPERTS, LAYER = Column("experts"), Column("layer")
LAYERS = [
    *(SOURCE, LENGTH, EXPERTS, LAYER, Column("layer type", value=lambda run, r: run.layer_types.get(r["kind"], r["kind"]))),
    *(Column("number", ",", lambda run, r: len(r["shares"])), Column("tokens", ","), Column("load", ",.2f")),
    Column("most used", value=lambda run, r: r["shares"].index(max(r["shares"]))),
    Column("entropy (bits)", ",.2f", "entropy_bits"),
]
TEXT = (
    "Of experts of feed-forwards the share is that of the copies of tokens, of experts of attention it is the mean gate; those "
    "of a layer sum to 1, and padding has none. The load is the largest share over the mean: 1 is balanced. The entropy is "
    "that of one token's probabilities or gates, a mean over tokens. Heat maps show the longest length."
)


def shares(runs: Sequence[Run]) -> Table:
    """A line for each expert."""
    columns = [RUN, SOURCE, LENGTH, EXPERTS, LAYER, Column("expert"), Column("share", ",.4f")]
    rows = [
        [run.name, r["source"], r["length"], r["experts"], r["layer"], expert, share]
        for run, r in records_of(runs, "routing")
        for expert, share in enumerate(r["shares"])
    ]
    return Table("routing_shares", "The share of each expert", columns, rows, is_folded=True)


def sections(runs: Sequence[Run]) -> list[Section]:
    table = of_records("routing", "Experts by source and layer", records_of(runs, "routing"), LAYERS)
    images = [
        _picture(run, records, f"routing_{number}_{experts.replace('-', '_')}")
        for number, run in enumerate(runs)
        for experts, records in grouped(run.of("routing"), itemgetter("experts")).items()
    ]
    return [Section("routing", "Routing", [TEXT], images, [table, shares(runs)], "routing")]


def _picture(run: Run, records: Sequence[dict], name: str) -> Picture:
    """The shares of one run at its longest length: a panel for each source, a row for each layer."""
    longest = lengths_of(records)[-1]
    records = [r for r in records if r["length"] == longest]
    rows = {r["layer"]: f"{r['layer']} {layers.short(run.layer_types.get(r['kind'], r['kind']))}" for r in records}
    panels = {
        source: {(rows[r["layer"]], expert): share for r in of_source for expert, share in enumerate(r["shares"])}
        for source, of_source in grouped(records, itemgetter("source")).items()
    }
    experts = range(max(len(r["shares"]) for r in records))
    scale = Scale("expert", "layer", 0, max(max(r["shares"]) for r in records), "{:.2f}".format, AMOUNTS, "share")
    figure = pictures.heat_maps(panels, [*rows.values()], experts, scale)
    most = max(records, key=itemgetter("load"))
    caption = (
        f"{run.name}, experts of {records[0]['experts']}, {tokens(longest)}: the largest load is {most['load']:.2f} times the "
        f"mean, in layer {most['layer']} on {most['source']}."
    )
    return Picture(name, caption, figure, "The share of each expert, by layer.", "routing_shares")


REPORT = EvaluationReport(sections)
