"""What a report writes: pictures, a page that works in a browser, and files beside it."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from evaluated import LENGTHS, TRAINED, everything, run_of, store, two
from PIL import Image

from hybrid_attn.evals import report
from hybrid_attn.evals.report import escape, losses, needle, pictures, sections, statistics
from hybrid_attn.evals.report.section import Picture


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report of two runs, and the runs."""
    out = tmp_path_factory.mktemp("report")
    runs = two(out)
    report.write(out, runs)
    return out, runs


def test_a_report_that_is_cut_short_leaves_the_one_before_it(tmp_path, monkeypatch):
    run = store(tmp_path / "run", everything(1.0)[0][:1], [])
    report.write(tmp_path, [run])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    rename = Path.rename

    def interrupted(path, target):
        if target.name == "report.html":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path, [run._replace(name="another")])
    page = tmp_path / "report.html"
    assert page.read_bytes() == before[page]


def test_a_report_leaves_nothing_of_the_one_before_it(tmp_path):
    records, answers = everything(1.0)
    kept = [record for record in records if record["eval"] in ("ruler", "recall")]
    both = [run_of(name, answers[:9], kept) for name in ("one", "two")]
    for out, several in (("again", both), ("again", both[:1]), ("once", both[:1])):
        report.write(tmp_path / out, several)
    again, once = ({x.relative_to(tmp_path / out) for x in (tmp_path / out).rglob("*")} for out in ("again", "once"))
    assert again == once and Path("tables/ruler/one/8192/summary.csv") in once


def test_the_heat_map_has_a_fixed_scale_and_marks_the_length_of_training():
    scale, cells = needle.SCALE, {("0", 2048): 0.4, ("100", 8192): 0.5}
    axes = pictures.heat_maps({"run": cells}, ("0", "100"), LENGTHS, scale, {"run": TRAINED}).axes[0]
    (image,) = axes.collections
    assert image.get_clim() == (0, 1) and axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["0.40", "0.50"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2K", "4K", "8K"]
    white = [line for line in axes.lines if line.get_color() == "white"]
    assert [set(line.get_xdata()) for line in white] == [{2}] and white[0].get_linestyle() == "--"
    assert not pictures.heat_maps({"run": cells}, ("0",), LENGTHS, scale, {"run": 8192}).axes[0].lines


def test_points_have_their_intervals_and_a_mark_divides_the_lengths_beyond_training():
    half = statistics.share(1, 2)
    curves = [pictures.Line("a", number, {length: half for length in LENGTHS}) for number in range(2)]
    axes = pictures.lines({"": curves}, "length", "score", "share", [TRAINED, 8192]).axes[0]
    bars = [segment[:, 1] for bars in axes.collections for segment in bars.get_segments()]
    assert bars == [pytest.approx((half.low, half.high))] * 6
    marks = {line.get_label(): line.get_xdata() for line in axes.lines if line.get_linestyle() == "--"}
    assert marks == {"trained at 4K": [1.5, 1.5]}


@pytest.mark.filterwarnings("error")
def test_names_of_runs_stand_in_legends_as_they_are():
    names = ["_first", r"a$\x$b", "cost $5", "plain"]
    half = statistics.share(1, 2)
    curves = [pictures.Line(name, i, {4096: half, 8192: half}) for i, name in enumerate(names)]
    for panels in ({"": curves}, dict.fromkeys((r"$\x$", "other"), curves)):
        figure = pictures.lines(panels, "length", "score", "share")
        drawn = pictures.svg(Picture("names", "", figure))
        assert pictures.png(Picture("names", "", figure))
        assert [text.strip(pictures.NOTHING) for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn)][-4:] == names


def test_a_line_of_losses_has_a_gap_where_no_token_was_scored():
    buckets = [{"first": 0, "end": 16, "loss": 3.0, "stderr": 0.1}, {"first": 64, "end": 128, "loss": 2.0, "stderr": None}]
    position = {"eval": "position", "source": "text", "length": 128, "tokens": 9}
    (picture,) = losses.sections([run_of("run", [], [position | bucket for bucket in buckets])])[0].pictures
    (axes,) = picture.figure.axes
    (line,) = axes.lines
    assert [x.get_text() for x in axes.get_xticklabels()] == ["16", "64", "128"]
    assert np.array_equal(line.get_ydata(), [3.0, np.nan, 2.0], equal_nan=True)
    (bar,) = [segment[:, 1] for segment in axes.collections[0].get_segments() if len(segment)]
    assert bar == pytest.approx([3.0 - statistics.Z * 0.1, 3.0 + statistics.Z * 0.1])


def test_files_of_names_that_differ_differ():
    assert escape.file_name("rnope_swa-2.b") == "rnope_swa-2.b"
    names = [escape.file_name(name) for name in ("a b", "a_b", "a/b", "a b ")]
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\w.-]+", name) for name in names)


def test_attention_sums_to_one_in_each_layer_and_is_weighed_by_kind(written):
    _, (run, _) = written
    (section,) = (x for x in sections.sections([run]) if x.name == "attention")
    drawn = {picture.name: picture.figure for picture in section.pictures}
    assert {*drawn} == {f"attention_0_probe_4096{x}" for x in ("", "_weights", "_retrieval", "_entropy_bits")}
    shares = drawn["attention_0_probe_4096"].axes[0].collections[0].get_array()
    assert shares.shape == (2, 4) and np.allclose(shares.sum(1), 1)
    lines = {line.get_label(): line.get_ydata() for line in drawn["attention_0_probe_4096_weights"].axes[0].lines}
    assert list(lines["layers G"]) == [0.01, 0.002]
    grid = drawn["attention_0_probe_4096_retrieval"].axes[0].collections[0].get_array()
    assert np.ma.getmaskarray(grid)[0].all() and (grid[1] == 0.4).all()


def test_what_is_written_follows_from_the_runs_alone(tmp_path):
    records, answers = everything(0.5)
    kept = [record for record in records if record["eval"] in ("recall", "key_tokens")]
    run = store(tmp_path / "one", kept, answers[:3])
    for out in ("first", "second"):
        report.write(tmp_path / out, [run])
    first, second = ([path for path in sorted((tmp_path / x).rglob("*")) if path.is_file()] for x in ("first", "second"))
    assert [path.name for path in first] == [path.name for path in second] and len(first) > 6
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    page = (tmp_path / "first" / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == ["overview", "recall", "key_tokens", "provenance"]


def test_the_page_asks_for_no_other_file_and_runs_nothing_that_a_model_said(written):
    page = (written[0] / "report.html").read_text()
    files = set(re.findall(r'<a class="file" href="([^"]*)"', page))
    assert files and all((written[0] / path).is_file() for path in files)
    asked = set(re.findall(r'(?:src|href)="([^#"][^"]*)"', page)) - files
    assert all(x.startswith("data:image/png;base64,") for x in asked)
    assert "@import" not in page and set(re.findall(r"url\((?!#)[^)]*\)", page)) == set()
    assert set(re.findall(r"\w+://[\w.]+", page)) <= {"http://www.w3.org", "https://www.w3.org"}
    assert page.count("<script>") == 1 and "&lt;script&gt;" in page and "hybrid &lt;3:1&gt;" in page
    assert "\\x00\\x1b?|" in page and not re.search(r"[\x00-\x08\x0b-\x1f]", page)


def test_pictures_follow_the_page_into_the_dark_and_share_no_names(written):
    page = (written[0] / "report.html").read_text()
    assert ".picture svg, .dot { filter: invert" in page and 'class="dot" style="background:#d55e00"' in page
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)) > 50
    assert set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', page)) <= set(names)


def test_files_beside_the_page_hold_the_same_numbers(written):
    out, runs = written
    names = {picture.name for section in sections.sections(runs) for picture in section.pictures}
    assert {path.stem for path in (out / "pictures").iterdir()} == names and len(names) > 12
    for path in (out / "pictures").iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(image.convert("RGB").getcolors(10**6)) > 5
    whole = json.loads((out / "results.json").read_text())
    assert whole["runs"]["rope"]["records"] == list(runs[1].records)
    table = list(csv.DictReader((out / "tables" / "ruler.csv").read_text().splitlines()))
    assert [row["8K"] for row in table] == [str(row["8K"]) for row in whole["tables"]["ruler"]] == ["75.0", "25.0"]
    text = (out / "report.md").read_text()
    assert "| rope | 4K | 4K | **100.0** | 25.0 |" in re.sub(" +", " ", text)
    assert all((out / path).is_file() for path in re.findall(r"\]\((.*?)\)", text))


def test_rulers_own_files_have_rulers_form(written):
    out = written[0] / "tables" / "ruler" / "rope" / "8192"
    assert (out / "summary.csv").read_text() == "0,1,2\nTasks,niah_single_1,vt\nScore,25.0,25.0\nNulls,1/8,1/8\n"
    submission = list(csv.DictReader((out / "submission.csv").open(newline="")))
    assert [*submission[0]] == ["Task", "ID", "Prediction"] and len(submission) == 16
    assert submission[7]["ID"] == "7" and submission[7]["Prediction"].endswith("</script>\n\n?|")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHECK = """
<script>
const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent);
const said = { errors, title: document.title };
const table = document.querySelector("[data-name=overview] table");
const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent);
said.before = column(table, 0);
for (const name of ["once", "twice"]) {
  table.tHead.rows[0].cells[heads.indexOf("RULER Avg.")].querySelector("button").click();
  said[name] = column(table, 0);
}
const cells = document.querySelector("[data-name=needle_cells] table");
const share = [...cells.tHead.rows[0].cells].find((head) => head.textContent === "right");
share.querySelector("button").click();
said.shares = column(cells, share.cellIndex).map(Number);
said.sorted = share.getAttribute("aria-sort");
said.pictures = [...document.querySelectorAll(".picture svg")].map((svg) => {
  const box = svg.getBoundingClientRect(), page = svg.parentNode.getBoundingClientRect();
  return [box.width, box.height, box.left - page.left];
});
const scroll = table.closest(".scroll");
scroll.scrollLeft = 120;
said.scrolled = scroll.scrollLeft;
said.first = table.tBodies[0].rows[0].cells[0].getBoundingClientRect().left - scroll.getBoundingClientRect().left;
said.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const out = document.createElement("output");
out.id = "said";
out.textContent = JSON.stringify(said);
document.body.append(out);
</script>
</body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [1400, 500])
def test_in_a_browser_tables_sort_and_pictures_load(written, tmp_path, width):
    page = (written[0] / "report.html").read_text()
    catch = "<script>const errors = []; addEventListener('error', (event) => errors.push(event.message));</script>"
    path = tmp_path / "page.html"
    path.write_text(page.replace("<head>", f"<head>{catch}").replace("</body>\n", CHECK))
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
    )
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60)
    said = json.loads(re.search(r'<output id="said">(.*?)</output>', done.stdout)[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert (said["errors"], said["title"]) == ([], "Long-context report")
    assert said["before"] == ["hybrid <3:1>", "rope"]
    assert said["once"] == ["rope", "hybrid <3:1>"] and said["twice"] == ["hybrid <3:1>", "rope"]
    assert said["shares"] == sorted(said["shares"]) and len(said["shares"]) == 27 and said["sorted"] == "ascending"
    assert len(said["pictures"]) > 12 and all(w > 200 and h > 100 and x >= 0 for w, h, x in said["pictures"])
    assert said["overflow"] <= 0
    assert 0 <= said["first"] <= 1 and said["scrolled"] > 50  # the first column stays in sight
