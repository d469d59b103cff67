"""A new evaluation is one record and one row of the table: training logs it, the suite writes it, the report shows it."""

import json

import pytest
from conftest import tensorboard_events
from test_evaluation import config_of

from hybrid_attn.evals import report, suite
from hybrid_attn.evals.evaluation import (
    BaselineModel,
    Evaluation,
    Headline,
    check_sequence,
    measured_of_source,
    texts,
    without_documents,
)
from hybrid_attn.evals.records import COUNT, NAME, SIZE
from hybrid_attn.evals.report import render
from hybrid_attn.evals.table import EVALS
from hybrid_attn.train import evaluation, loop


def measure(context, settings, unit, samples):
    """How many parameters the model has, and how many tokens its source holds out."""
    parameters = sum(leaf.size for leaf in context.eval_model.params["periods"]["L0"]["attention"].values())
    tokens = int(context.heldout[unit.part].lengths.sum())
    return measured_of_source(unit, [{"length": unit.length, "parameters": parameters, "heldout_tokens": tokens}])


def toy_report():
    from hybrid_attn.evals.report.section import EvaluationReport

    def verdict(run):
        return [f"{run.name} has a toy of {r['parameters']:,}." for r in run.of("toy")]

    def files(run):
        return {"toy/parameters.csv": "".join(f"{r['parameters']}\n" for r in run.of("toy"))}

    return EvaluationReport(sections, verdict=verdict, files=files)


def sections(runs):
    from hybrid_attn.evals.report.section import Column, Section, Table

    columns = [Column("run"), Column("parameters", ","), Column("held-out tokens", ",")]
    rows = [[run.name, r["parameters"], r["heldout_tokens"]] for run in runs for r in run.of("toy")]
    return [Section("toy", "Toy title", ["A toy."], [], [Table("toy", "Toy table", columns, rows)], "toy")]


def totals(records):
    return [{"source": "sum", "length": 48, "parameters": sum(r["parameters"] for r in records), "heldout_tokens": 0}]


def documents_of_a_small_model(context, settings):
    return [{"eval": "small", "source": name, "length": 48, "documents": len(x)} for name, x in context.training.items()]


TOY = Evaluation(
    name="toy",
    parts=texts,
    measure=measure,
    fields={"source": NAME, "length": SIZE, "parameters": SIZE, "heldout_tokens": COUNT},
    headline=Headline(lambda records: records[0]["parameters"], "toy_parameters", "{:,} parameters", higher_is_better=False),
    report=toy_report,
    flags=("heldout",),
    empty=without_documents,
    check_fits=check_sequence,
    totals=totals,
    baseline=BaselineModel("small", {"source": NAME, "length": SIZE, "documents": SIZE}, documents_of_a_small_model),
)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_an_evaluation_is_added_with_one_record_and_removed_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"This is document {i}.\n" * (10 + i))
    with monkeypatch.context() as patch:
        patch.setitem(EVALS, "toy", TOY)
        changes = {"evals.names": ("toy",), "evals.every": None, "evals.lengths": (1.0,)}
        assert loop.train(config_of(tmp_path / "text", **changes), tmp_path / "run")
        folder = tmp_path / "run/evals/4"
        (record,) = lines(folder / "records.jsonl")
        assert (record["eval"], record["source"], record["length"]) == ("toy", "text", 48) and record["heldout_tokens"] > 0
        shown, headline = capsys.readouterr().out, f"{record['parameters']:,} parameters"
        assert f"evals        step 4: toy of text at 48: {headline}\n" in shown
        assert f"toy  text  {headline}\n" in shown  # of the table at the end
        of_source, total, small = lines(tmp_path / "run/evals.jsonl")
        assert [(x["eval"], x["source"], x["parameters"]) for x in (of_source, total)] == [
            ("toy", "text", record["parameters"]),
            ("toy", "sum", record["parameters"]),
        ]
        assert (small["eval"], small["step"]) == ("small", 4) and 0 < small["documents"] < 40
        tags = {value.tag for event in tensorboard_events(tmp_path / "run") for value in event.summary.value}
        assert {"toy_parameters/text/48", "toy_parameters/sum/48"} <= tags
        (reported,) = json.loads((folder / "results.json").read_text())["runs"].values()
        assert [x["eval"] for x in reported["records"]] == ["toy", "small"]
        page = (folder / "report.html").read_text()
        assert "Toy title" in page and "Toy table" in page and f"{record['heldout_tokens']:,}" in page
        assert (folder / "tables/toy/parameters.csv").read_text() == f"{record['parameters']}\n"
        summary = report.write(tmp_path / "again", [report.read(folder)])
        assert "toy" in summary.splitlines()[0].split() and headline in summary.splitlines()[2]  # the overview has its headline
        assert summary.splitlines()[-1] == f"4 has a toy of {record['parameters']:,}."  # and the verdict its sentence
        assert "--suite=toy" in render.command([report.read(folder)], "toy") and "toy" in suite.names_of("full")
    with pytest.raises(ValueError, match=r"evals.names\[0\]='toy' is not one of"):
        evaluation.check_names(("toy",))
    with pytest.raises(ValueError, match="eval='toy' is not known"):
        report.read(folder)
