"""RULER's scores against cases by hand, and its averages and effective lengths against rows of its own table."""

import pytest

from hybrid_attn.evals.report import ruler
from hybrid_attn.evals.ruler import scores
from hybrid_attn.evals.table import EVALS


@pytest.mark.parametrize(
    ("prediction", "wanted", "every", "one"),
    [
        ("", ["7"], 0, 0),
        (" 1234567 and 7654321.", ["1234567", "7654321"], 100, 100),
        ("1234567", ["1234567", "7654321"], 50, 100),
        ("123456", ["1234567"], 0, 0),
        ("12345678", ["1234567"], 100, 100),
        ("1234568", ["1234567"], 0, 0),
        ("ABCDE", ["abcde"], 100, 100),
        ("the MILL", ["Mill", "forge", "quay"], 100 / 3, 100),
        ("\x00\x1f 12\x0034567 \t", ["1234567"], 0, 0),
        ("first\x07second", ["first\nsecond"], 100, 100),
        ("One of the special magic numbers for a-b is: 1234567. One of the", ["1234567"], 100, 100),
    ],
)
def test_a_prediction_is_right_where_it_contains_the_answers(prediction, wanted, every, one):
    assert scores.score("vt", prediction, wanted) == pytest.approx(every)
    assert scores.score("qa_1", prediction, wanted) == one


def test_control_characters_become_line_breaks_and_the_ends_are_bare():
    assert scores.postprocess(" \x01a\x02\tb\x1f \n") == "a\n\nb"
    assert scores.postprocess("\x00 \x00") == ""
    assert scores.postprocess("é\x7f") == "é\x7f"


LENGTHS = [2**i for i in range(12, 18)]
ROWS = [  # scores, average, rising and falling weights, effective length by the rule
    ([93.8, 93.3, 92.4, 89.5, 84.9, 76.0], 88.3, 85.5, 91.1, "32K"),
    ([94.7, 93.7, 93.1, 90.8, 86.6, 74.7], 88.9, 86.0, 91.9, "64K"),
    ([96.7, 95.8, 96.0, 95.9, 95.9, 94.4], 95.8, 95.5, 96.1, ">128K"),
    ([82.3, 78.4, 73.7, 69.1, 68.1, 65.0], 72.8, 69.9, 75.7, "<4K"),
]


@pytest.mark.parametrize(("row", "average", "rising", "falling", "effective"), ROWS)
def test_averages_and_effective_lengths_are_those_of_the_published_rows(row, average, rising, falling, effective):
    by_length = dict(zip(LENGTHS, row, strict=True))
    assert list(scores.averages(by_length).values()) == pytest.approx([average, rising, falling], abs=0.1)
    assert ruler.effective(by_length) == effective


def test_a_length_after_a_failed_one_does_not_count():
    assert ruler.effective({4096: 87.0, 8192: 81.1, 16384: 88.8}) == "4K"
    by_length = {8192: 85.59, 4096: 85.6, 16384: 99.0}
    assert scores.effective_length(by_length) == 4096
    assert scores.effective_length({4096: 85.59}) is None
    assert scores.relative_length({4096: 20.0, 8192: 17.0, 16384: 16.9}) == 8192
    assert scores.relative_length({4096: 0.0, 8192: 0.0}) is None


def test_a_training_logs_the_mean_of_the_tasks_at_each_length():
    tasks = {"vt": 10.0, "cwe": 20.0, "fwe": 90.0}
    records = [{"task": task, "length": length, "score": x} for length in (8192, 4096) for task, x in tasks.items()]
    totals = EVALS["ruler"].totals(records)
    assert totals == [{"task": "mean", "length": length, "score": 40.0} for length in (4096, 8192)]
    assert [EVALS["ruler"].headline.value([total]) for total in totals] == [40.0, 40.0]
