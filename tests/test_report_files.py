"""Files of evaluations that do not fit are named; of numbers that are not finite a report says that they are missing."""

import json

import pytest
from evaluated import answer, everything, run_of, store
from test_report import rows_of

from hybrid_attn.evals import report
from hybrid_attn.evals.report import losses


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("records", '{"eval": "ruler", "ta', "records.jsonl, line 2 is not JSON: .*; evaluate again, it goes on"),
        ("records", '{"eval": "neddle"}', "eval='neddle' is not known; did you mean 'needle'?"),
        ("records", '{"eval": "recall", "length": 4}', "line 2 lacks source, task, answers, accuracy, by_row"),
        ("records", '{"eval": "needle", "length": 4, "depth": 0, "needles": 1, "answers": 0, "right": 0}', "answers=0 is no"),
        ("records", "[]", "records.jsonl, line 2 must hold an object and holds a list"),
        ("answers", '{"task": "vt"}', "answers.jsonl, line 2 lacks length"),
        ("answers", json.dumps(answer("vt", 4096, 0, 100.0)), "score=100.0 is no share of right answers"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, name, line, message):
    store(tmp_path / "run", everything(1.0)[0][:1], [answer("vt", 4096, 0, 1.0)])
    path = tmp_path / "run" / f"{name}.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        report.read(tmp_path / "run")


def test_what_was_not_evaluated_cannot_be_reported(tmp_path):
    with pytest.raises(ValueError, match="run.json does not exist; evaluate the model"):
        report.read(tmp_path / "nothing")
    with pytest.raises(ValueError, match="records.jsonl is empty"):
        store(tmp_path / "empty", [], [])
    with pytest.raises(ValueError, match="model lacks seq_len"):
        store(tmp_path / "where", everything(1.0)[0][:1], [], model={})
    with pytest.raises(ValueError, match="0 runs"):
        report.write(tmp_path, [])
    with pytest.raises(ValueError, match="a name each, and these are a, a"):
        report.write(tmp_path, [run_of("a", []), run_of("a", [])])


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    records = [
        {
            "eval": "key_tokens",
            "source": "a",
            "short": 2,
            "length": 4,
            "key_tokens": 0,
            "tokens": 9,
            "loss": float("nan"),
            "perplexity": None,
        }
    ]
    run = store(tmp_path / "run", records, [])
    (table,) = losses.key_tokens([run])[0].tables
    (row,) = rows_of(table)
    assert row["loss (nats)"] is None and "–" in [text for _, text, _ in table.cells()[0]]
