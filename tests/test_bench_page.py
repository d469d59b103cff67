"""The page of speed is made of the JSON files beside it: figures of the code before and after a change, and their targets."""

import json
from pathlib import Path

import pytest

from hybrid_attn.bench import results

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "speed"
WATCH = {"load_start": 0.1, "load_end": 1.9, "others": 0.004}


def decode_part(ours: float, other: float) -> dict:
    """The part `decode` of one length, as a run of it writes it."""
    common = {"tokens": 2048, "prompt": 2016, "new": 2, "memory": 10**8, "answer": [3, 5]}
    how = {"options": {"new": 2}, "repeats": 5, "revision": "abc"}
    records = [
        {"contender": name, **common, "seconds": x, "best": x / 2, "calls": [x], **how}
        for name, x in {"ours": ours, "transformers": other}.items()
    ]
    model = {"config": "configs/bench.py", "parameters": 6_392_064, "layers": "LG", "dtype": "float32"}
    return {"model": model, "watch": WATCH, "records": records}


def result(ours: float, other: float, cores: int = 2) -> dict:
    part = decode_part(ours, other)
    part["figures"] = results.figures_of(results.table.find("decode"), part)
    machine = {"processor": "EPYC", "cores": cores, "memory_gib": 23.4, "platform": "cpu"}
    about = {"command": "python tools/bench.py --part=decode", "date": "2026-11-29", "revision": "abc"}
    return {**about, "machine": machine, "versions": {"jax": "0.10.2"}, "parts": {"decode": part}}


def cells(text: str, name: str) -> list[list[str]]:
    """The rows of tables that have a cell `name`."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in table if name in row]


def test_the_page_is_made_of_the_results_beside_it():
    assert (FOLDER.parent / "speed.md").read_text() == results.page(FOLDER)


def test_a_figure_stands_beside_its_target_before_and_after_by_machine(tmp_path):
    for path, values in {
        "before/a.json": result(0.002, 0.004),
        "after/a.json": result(0.001, 0.0035),
        "after/b.json": result(0.002, 0.005, cores=8),
    }.items():
        results.write(tmp_path / path, values)
    page = results.page(tmp_path)
    rows = cells(page, "transformers / ours, 2,048 tokens")
    assert [row[2:] for row in rows] == [["2.00", "3.50", "≥ 3.00", "yes"], ["—", "2.50", "≥ 3.00", "no"]]
    assert "## EPYC, 2 cores, 23 GiB" in page and "## EPYC, 8 cores, 23 GiB" in page
    assert page.count("The machine was idle otherwise: other programs took 0.4%") == 3


def test_a_machine_that_others_use_is_said_to_be_busy():
    assert "was NOT idle" in results.machine.idleness(WATCH | {"others": 0.3})


def test_two_results_are_compared_figure_by_figure_and_another_machine_is_named():
    text = results.compared(result(0.002, 0.004), result(0.001, 0.004))
    assert cells(text, "decode") == [["decode", "transformers / ours, 2,048 tokens", "2.00", "4.00", "2.000"]]
    assert "Not measured alike" not in text
    assert "Not measured alike: machine old processor EPYC, cores 2" in results.compared(result(1, 2), result(1, 2, cores=4))


def test_records_are_added_to_those_of_the_same_code_on_the_same_machine():
    old, new = result(0.002, 0.004), result(0.001, 0.005)
    new["command"] += " --add"
    for r in new["parts"]["decode"]["records"]:
        r |= {"options": {"new": 3}, "repeats": 2}
    both = results.joined(old, new)
    part = both["parts"]["decode"]
    assert [r["seconds"] for r in part["records"]] == [0.002, 0.004, 0.001, 0.005]
    assert [(r["options"]["new"], r["repeats"]) for r in part["records"]] == [(2, 5), (2, 5), (3, 2), (3, 2)]
    assert "medians of 5 or 2 calls of each contender" in results.section("decode", part)
    assert part["figures"] == results.figures_of(results.table.find("decode"), part)
    assert both["command"] == "python tools/bench.py --part=decode && python tools/bench.py --part=decode --add"
    assert results.joined(old | {"parts": {}}, new)["parts"] == new["parts"]


def test_a_file_of_other_code_or_of_another_model_is_refused_before_records_are_added():
    old, path = result(0.002, 0.004), Path("x.json")
    model = old["parts"]["decode"]["model"]
    results.check_can_add(old, old, {"decode": model, "long": None}, path)
    with pytest.raises(ValueError, match="--add to x.json: its revision differs"):
        results.check_can_add(old, old | {"revision": "abd"}, {"decode": model}, path)
    with pytest.raises(ValueError, match=r"--add to x.json: its parts.decode.model differs"):
        results.check_can_add(old, old, {"decode": model | {"digest": "abc"}}, path)


HALF = '{"machine": {"processor": "x", "cores": 1, "memory_gib": 1}, "versions": {}, "parts": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "{", '{"machine": {}, "versions": {}}', '{"machine": {}, "versions": {}, "parts": {}}', HALF % "[]",
        HALF % '{"decode": {"records": []}}', HALF % '{"older": {}}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json"):
        results.read(tmp_path / "x.json")


def test_numbers_are_written_with_seven_digits_and_a_list_is_one_line(tmp_path):
    results.write(tmp_path / "x.json", result(0.00123456789, 1 / 3))
    text = (tmp_path / "x.json").read_text()
    assert '"seconds": 0.001234568' in text and '"answer": [3, 5]' in text
    assert json.loads(text)["parts"]["decode"]["records"][1]["seconds"] == 0.3333333
