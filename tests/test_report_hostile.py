"""A directory that somebody else has written cannot leave --out, put code into a page, or stop the report without a reason."""

import csv
import functools
import itertools
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
from evaluated import TRAINED, answer, everything, run_of, store

from hybrid_attn.evals import report
from hybrid_attn.evals.report import escape, pictures, runs, sections, statistics
from hybrid_attn.evals.report.section import Picture

TAG = '"><script>alert(1)</script><img src=x onerror=alert(2)><!--'
HOSTILE = (
    "../../../outside",
    "..",
    "/etc/passwd",
    TAG,
    "$\\frac{$x$_^{",
    "=cmd|' /C calc'!A0",
    "`|**[link](javascript:alert(3))** <b>|\n# heading\n---",
    "\x00\x1b[31m\ud800\u202e\r\n\t%s{0}${title}",
    "#20262d url(#a) ]]> &amp; \\",
    "",
    "-",
    "_hidden",
    "名前 größe 🙂 " + "x" * 300,
)
PROVENANCE = {
    "checkpoint": "a",
    "tokenizer": "a",
    "revision": "a",
    "device": "a",
    "heldout": {"a": "a"},
    "model": {"seq_len": TRAINED, "layers": "a", "parameters": 9, "kinds": {"a": "a"}},
    "data": {"heldout": ["a"], "text": ["a"], "squad": "a"},
    "mesh": "a",
    "settings": {"absent": [["a", "a", 9, "a"]], "lengths": [9], "evals": ["a"], "more": {"a": "a"}},
}
KEPT = ("eval", "part", "experts")  # texts that must be one of a few


@functools.cache
def few() -> tuple[list[dict], list[dict]]:
    """Some records of every evaluation, and answers."""
    records, answers = everything(0.25)
    bigram = {"eval": "bigram", "source": "a b/c", "length": TRAINED, "bits_per_byte": 3.4}
    return [r for r in records if r["length"] == TRAINED and r.get("needles") != 4] + [
        r for r in records if r["eval"] == "harness"
    ] + [bigram], answers[:20]


JUDGED = next(r for r in few()[0] if r["eval"] == "win_rate")


def replaced(value, change):
    """`value` with `change` of each text in it, keys of objects in run.json too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {(change(k) if k == "a" else k): x if k in KEPT else replaced(x, change) for k, x in value.items()}
    return [replaced(x, change) for x in value] if isinstance(value, list) else value


class Page(HTMLParser):
    """Collects what a browser would run."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.attributes, self.tags, self.ids = 0, [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.tags.add(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]


@pytest.fixture(scope="module", params=range(2))
def written(request, tmp_path_factory):
    """A report of runs whose every text is hostile, another one in each field."""
    root = tmp_path_factory.mktemp("hostile")
    texts = itertools.cycle(HOSTILE[request.param :: 2])
    seen: dict[str, str] = {}

    def change(text):  # the same text stays the same, so that records belong together
        return seen.setdefault(text, next(texts) + text * (text in ("recall", "mqar")))

    records, answers = replaced(few()[0], change), replaced(few()[1], change)
    run = store(root / "evaluated", records, answers, **replaced(PROVENANCE, change))
    out = root / "a" / "b" / "out"
    runs = [run._replace(name=next(texts) + TAG), run._replace(name=next(texts) + "2")]
    report.write(out, runs[request.param :])  # two, then one
    return root, out


def test_nothing_is_written_outside_the_directory_of_the_report(written):
    root, out = written
    outside = [path for path in root.rglob("*") if path.is_file() and out not in path.parents]
    assert sorted(path.name for path in outside) == ["answers.jsonl", "records.jsonl", "run.json"]
    names = [path.relative_to(out).parts for path in out.rglob("*")]
    assert len(names) > 20 and all(escape.SAFE.fullmatch(part) and len(part) < 100 for parts in names for part in parts)


def test_a_page_runs_no_code_of_a_file(written):
    text = (written[1] / "report.html").read_text()
    page = Page(text)
    assert page.scripts == 1 and not {"img", "b", "iframe", "object", "embed", "base", "form"} & page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(re.fullmatch(r"[\w.-]+", name) for name in page.ids) and len(set(page.ids)) == len(page.ids)
    links = {value for name, value in page.attributes if name in ("href", "xlink:href", "src")}
    assert all(re.fullmatch(r"(#|pictures/|tables/)[\w.-]+|data:image/png;base64,[\w+/=\s]+", link) for link in links)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    labels = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", text))
    assert "var(--" not in labels and ("#20262d url(#a)" in labels or "url(" not in labels)  # a label stays what it is


def test_markdown_has_no_html_link_or_table_row_of_a_file(written):
    out = written[1]
    text = (out / "report.md").read_text()
    assert not re.search(r"<[A-Za-z/!?]|(?<!\\)`", text)
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", text)
    assert links and all((out / link).is_file() for link in links)
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    assert not [line for line in headings if line.endswith("heading")]


def test_no_cell_of_a_table_is_a_formula(written):
    for path in (written[1] / "tables").rglob("*.csv"):
        cells = [cell for row in csv.reader(path.open(newline="")) for cell in row]
        assert not [x for x in cells if x[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"[+-]?\d.*", x)], path


def test_names_of_files_differ_where_names_do():
    names = [escape.file_name(name) for name in (*HOSTILE, "a b", "a_b", "a/b", "x" * 300, "x" * 301, "a..b", ".hidden", "-rf")]
    assert len(set(names)) == len(names)
    assert all(escape.SAFE.fullmatch(name) and len(name) <= escape.LONGEST and ".." not in name for name in names)


@pytest.mark.filterwarnings("error")
def test_dollars_and_foreign_letters_in_a_label_do_not_stop_a_picture():
    half = statistics.share(1, 2)
    curves = [pictures.Line(name, i, {4096: half, 8192: half}) for i, name in enumerate(HOSTILE)]
    for of_panel in (curves, [x._replace(values={1: half}) for x in curves]):
        figure = pictures.lines(dict.fromkeys(HOSTILE[:5], of_panel), "", "score", "share")
        picture = Picture("a", TAG, figure)
        assert "$\\frac{$x$_^{" in pictures.svg(picture) and pictures.png(picture)
    assert not plt.get_fignums()


WRONG = [None, "x", -1, 1.5, True, [], {}, [None], 10**400, 2**60, float("inf"), "9" * 600]


def fits(record: dict, check) -> bool:
    try:
        check(record, "here")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return False
    return True


def test_every_field_of_a_record_has_a_type_and_one_that_does_not_fit_is_named():
    by_name = {r["eval"]: r for r in few()[0]}
    assert set(by_name) == set(runs.required())
    refused = 0
    for name, record in by_name.items():
        for field, wrong in itertools.product(runs.required()[name], WRONG):
            refused += not fits(record | {field: wrong}, runs.check_record)
        for wrong in WRONG:
            assert not fits(record | {"length": wrong}, runs.check_record)
            assert not fits(record | {"part": wrong}, runs.check_record)
    assert refused > 300
    for field, wrong in itertools.product(runs.ANSWER, [None, -1.5, True, {}, [None]]):
        assert not fits(few()[1][0] | {field: wrong}, runs.check_answer)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "[]", "run.json must hold an object and holds a list"),
        ("run.json", '{"model": {"seq_len": true}}', "model: seq_len=True"),
        ("run.json", '{"model": {"seq_len": 8}, "heldout": [1]}', "heldout"),
        ("run.json", '{"model": {"seq_len": 8}, "settings": {"absent": [1]}}', "settings: absent"),
        ("run.json", '{"model": {"seq_len": 8}, "data": 7}', "data=7 is no object"),
        ("run.json", '{"model": {"seq_len": 8}, "vocab_size": 0}', "vocab_size=0 is no whole number"),
        ("run.json", "[" * 100_000, "run.json is nested too deeply to be read"),
        ("records.jsonl", b"\xff", "not JSON: 'utf-8' codec can't decode"),
        ("records.jsonl", "[" * 100_000, "nested too deep"),
        ("records.jsonl", '{"eval": ["ruler"]}', "is not known"),
        ("records.jsonl", json.dumps(JUDGED | {"answers": ["a"]}), "12 prompts, 12 log_probs, 1 answers, 12 prompt_ends are"),
        ("records.jsonl", json.dumps(JUDGED | {"ead": []}), "5 numbers of distinct n-grams and 0 of ead are not equally many"),
        ("records.jsonl", '{"eval": "needle", "length": 9, "depth": 0, "needles": 4, "answers": 2, "right": 1}', "4 needles"),
    ],
)
def test_a_file_that_no_evaluation_wrote_is_refused_with_its_name(tmp_path, file, content, message):
    store(tmp_path / "run", few()[0][:1], [])
    path = tmp_path / "run" / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        report.read(tmp_path / "run")
    assert file in str(caught.value)


@pytest.mark.parametrize("wrong", [{"a": [None]}, *(pytest.param(x, marks=pytest.mark.slow) for x in ([1], "--out=/etc"))])
def test_values_of_run_json_that_are_only_shown_may_be_anything(tmp_path, wrong):
    data = dict.fromkeys(("text", "heldout", "squad", "trust_checkpoint_data"), wrong)
    settings = dict.fromkeys(("compat", "asked", "samples", "depths", "tasks", "task_path"), wrong)
    run = store(tmp_path / "run", *few(), mesh=wrong, checkpoint=wrong, jax=wrong, data=data, settings=settings)
    assert report.write(tmp_path / "out", [run])


def test_attention_without_any_number_is_drawn():
    unknown = dict.fromkeys(("begin", "needle", "context", "qc", "entropy_bits", "retrieval"))
    heads = [r | unknown for r in few()[0] if r["eval"] == "attention_mass"]
    (section,) = (x for x in sections.sections([run_of("run", [], heads)]) if x.name == "attention")
    assert any("no entropy is known" in picture.caption for picture in section.pictures)
    assert all(pictures.png(picture) for picture in section.pictures)


def test_a_number_too_large_for_a_float_is_missing_as_one_that_is_not_finite(tmp_path):
    line = json.dumps(few()[0][0] | {"stderr": 7}).replace("7", "1e999")
    store(tmp_path / "run", [few()[0][0]], [])
    (tmp_path / "run" / "records.jsonl").write_text(line + "\n")
    run = report.read(tmp_path / "run")
    assert run.records[0]["stderr"] is None
    report.write(tmp_path / "out", [run])


def test_tasks_that_ruler_does_not_have_are_drawn_without_a_mean(tmp_path):
    known = {"eval": "ruler", "samples": 8, "score": 50.0, "nulls": 0}
    records = [known | {"task": "$\\frac{$", "length": length} for length in (2048, 4096, 8192)]
    report.write(tmp_path, [run_of("run", [], records)])
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"ruler_map"}


def test_a_run_whose_length_is_a_path_cannot_name_a_file(tmp_path):
    record = {"eval": "ruler", "task": "vt", "length": 4096, "samples": 8, "score": 50.0, "nulls": 0}
    run = run_of("run", [answer("vt", 4096, 0, 1.0)], [record])
    with pytest.raises(ValueError, match="no whole number"):
        runs.check_record(record | {"length": "../../x"}, "here")
    report.write(tmp_path, [run._replace(name="../..")])
    assert [path.name for path in (tmp_path / "tables" / "ruler").iterdir()] == [escape.file_name("../..")]


def test_links_in_the_directory_of_a_report_are_replaced_and_what_they_point_to_stays(tmp_path):
    record = {"eval": "ruler", "task": "vt", "length": 4096, "samples": 8, "score": 50.0, "nulls": 0}
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    names = ("pictures", "pictures.part", "tables")
    for folder in (elsewhere, out):
        folder.mkdir()
    (elsewhere / "holiday.png").touch()
    for name in names:
        (out / name).symlink_to(elsewhere if name != "tables" else tmp_path / "nowhere")
    for _ in range(2):
        report.write(out, [run_of("run", [], [record])])
    assert [path.name for path in elsewhere.iterdir()] == ["holiday.png"]
    assert not any((out / name).is_symlink() for name in names)
