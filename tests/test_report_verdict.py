"""The sentences, intervals and names of a report: they say what the numbers say, and no more."""

import re

import numpy as np
import pytest
from evaluated import TRAINED, answer, everything, run_of

from hybrid_attn import config
from hybrid_attn.evals import report
from hybrid_attn.evals.recall import guess
from hybrid_attn.evals.report import (
    comparison,
    harness,
    layers,
    render,
    ruler,
    sections,
    statistics,
    verdict,
)
from hybrid_attn.evals.ruler.tasks import NAMES


def needles(name, *shares, number=50):
    """A run that found these shares of single needles at 1K, 2K, 4K, …"""
    cells = [{"length": 1024 * 2**i, "right": share * number, "answers": number} for i, share in enumerate(shares)]
    return run_of(name, [], [{"eval": "needle", "depth": 0, "needles": 1} | cell for cell in cells])


def test_the_verdict_says_up_to_which_length_a_model_reads_and_where_it_falls():
    (falls,) = verdict.sentences([needles("run", 1.0, 0.96, 0.2)])
    low, high = statistics.wilson(48, 50)
    half = round(100 * max(0.96 - low, high - 0.96))
    assert f"run (trained at 4K) reads up to 2K: it has 96% ± {half} (n = 50) of single needles right at 2K" in falls
    assert "it falls to 20% ±" in falls and "at 4K" in falls
    (holds,) = verdict.sentences([needles("run", 1.0, 0.96)])
    assert "reads up to 2K" in holds and "no longer text was tested" in holds
    (unclear,) = verdict.sentences([needles("run", 1.0, 0.6, number=5)])
    assert "too few answers to tell whether that is less" in unclear and "falls" not in unclear
    (nothing,) = verdict.sentences([needles("run", 0.0, 0.0)])
    assert "0% ± 7 (n = 50) of single needles right at 1K, no more than a guess (0%)" in nothing
    (one,) = verdict.sentences([needles("run", 0.9)])
    assert "other lengths were not tested" in one


def test_recall_at_chance_is_called_chance():
    records = [
        {"eval": "recall", "source": "own", "task": "recall of 4 pairs", "length": length, "answers": 100}
        | {"accuracy": share, "by_row": [share + 0.1, share - 0.1] * 25}
        for length, share in ((1024, 0.27), (2048, 0.25))
    ]
    (text,) = verdict.sentences([run_of("run", [], records)])
    assert "no more than a guess (25%)" in text
    known = {name: guess(f"{name} of 4 pairs") for name in ("recall", "mqar", "tracking")}
    assert known == {"recall": 1 / 4, "mqar": 1 / 4, "tracking": 1 / 16} and guess("copy") == 1 / 16
    assert guess("needle of 4 pairs in 0123456789abcdef") == 1 / 10
    assert set(known) | {"copy", "needle"} == set(config.TASKS)
    assert guess("something else") is None and guess("recall of 0 pairs") is None
    (section,) = (x for x in sections.sections([run_of("run", [], records)]) if x.name == "recall")
    assert levels(section.pictures[0])["chance"] == 0.25


def levels(picture):
    """The heights of the horizontal lines of a picture by their names."""
    return {x.get_label(): x.get_segments()[0][0, 1] for x in picture.figure.axes[0].collections}


def losses(name, **more):
    total = {"eval": "position", "source": "text", "length": TRAINED, "tokens": 99, "loss": 2.0, "stderr": 0.01, **more}
    total |= {"bits_per_byte": 3.0, "by_row": [2.0, 2.1]}
    buckets = [{"first": 0, "end": 16, "loss": 3.0, "stderr": 0.03}, {"first": 2048, "end": 4096, "loss": 1.9, "stderr": 0.04}]
    known = {"eval": "position", "source": "text", "length": TRAINED, "tokens": 9}
    bigram = {"eval": "bigram", "source": "text", "length": TRAINED, "bits_per_byte": 3.5}
    return run_of(name, [], [*(known | bucket for bucket in buckets), total, bigram])


def test_of_losses_alone_the_verdict_says_bits_the_bigram_and_what_context_gains(tmp_path):
    run = losses("step 3")
    first, second = verdict.sentences([run])
    half = statistics.Z * 0.01 * 3 / 2
    assert f"reads text at 3.00 ± {half:.2f} bits per byte in sequences of 4K, its trained length (n = 2 sequences)" in first
    assert first.endswith(", below a bigram model's 3.50.")
    assert second == "Context helps: tokens from position 2K on cost 1.10 ± 0.10 nats less than the first 16."
    (section,) = (x for x in sections.sections([run]) if x.name == "loss")
    lines = levels(section.pictures[0])
    assert lines["bigram"] == pytest.approx(3.5 * 2 / 3)  # in nats per token, at the model's bytes per token
    table = section.tables[0]
    assert (table.columns[-1].name, table.rows[0][-1]) == ("chance (nats)", None) and "chance" not in lines
    for run.provenance["vocab_size"], near in ((40, True), (260, False)):  # its highest loss is 3 nats
        (section,) = (x for x in sections.sections([run]) if x.name == "loss")
        lines = levels(section.pictures[0])
        chance = np.log(run.provenance["vocab_size"])
        assert section.tables[0].rows[0][-1] == pytest.approx(chance)
        assert lines.get("chance") == (pytest.approx(chance) if near else None)
    said = report.write(tmp_path, [run])
    assert first in said and "3.500" in said and first in (tmp_path / "report.md").read_text().replace("\\", "")
    page = (tmp_path / "report.html").read_text()
    assert f"<p>{first.replace(chr(39), '&#39;')}</p>" in page.replace("\N{NO-BREAK SPACE}", " ")
    assert "3.00 ± " in first and "3.00\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}" in page  # no line ends before a spread
    assert "(n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}2 sequences)" in page


def test_a_difference_that_context_or_longer_sequences_may_not_make_is_called_unclear():
    run = losses("run")
    first, last, total, _ = run.records
    longer = total | {"length": 2 * TRAINED, "loss": 2.01, "bits_per_byte": 3.015}
    half = statistics.Z * np.hypot(0.03, 0.04)
    for loss, than in ((2.96, "0.04 ± {:.2f} nats less"), (3.04, "0.04 ± {:.2f} nats more")):
        records = (first, last | {"loss": loss}, total, longer)
        assert verdict.sentences([run._replace(records=records)])[1:] == [
            f"Context makes no clear difference: tokens from position 2K on cost {than.format(half)} than the first 16.",
            f"In sequences of 8K the loss is not clearly higher: 3.01 ± {statistics.Z * 0.015:.2f} bits per byte.",
        ]
    *_, text = verdict.sentences([run._replace(records=(total, longer | {"loss": 4.0}))])
    assert text.startswith("In sequences of 8K the loss is higher: 6.00 ± ")


def test_of_two_runs_the_verdict_says_which_is_better_where_by_how_much():
    first = run_of("a", [answer("vt", 4096, i, float(i < 10)) for i in range(40)], needles("a", 0.5).records)
    better = run_of("b", [answer("vt", 4096, i, float(i < 30)) for i in range(40)], needles("b", 0.6).records)
    *_, text = verdict.sentences([first, better])
    (found,) = comparison.compare(first, better, {"mean": {"vt"}})
    half = 100 * max(0.5 - found.low, found.high - 0.5)
    assert f"b against a: better on vt at 4K (+50 ± {half:.0f} points, n = 40). Of 1 comparisons: 1 better." == text
    assert "worse on vt" in verdict.sentences([better, first])[-1]
    assert "unclear on vt" in verdict.sentences([first, first._replace(name="c")])[-1]
    other = first._replace(name="d", answers=())
    assert (
        verdict.sentences([first, other])[-1] == "d and a have no question and no sequence in common: they cannot be compared."
    )


def test_too_few_samples_are_warned_of():
    assert verdict.warnings([needles("run", 0.5, number=200)]) == []
    (text,) = verdict.warnings([needles("run", 0.5, number=5)])
    assert "n = 5 answers per length for single needles" in text and "n = 97 gives ± 10" in text
    (text,) = verdict.warnings([needles("run", 1.0, number=1)])
    assert "run has n = 1 answers per length for single needles, which gives ±" in text
    low, high = statistics.wilson(48.5, 97)
    assert (high - low) / 2 == pytest.approx(0.1, abs=0.003)


def test_equal_differences_leave_an_interval_with_a_width():
    for n, difference in ((20, 0.0), (12, 1.0), (1, 0.0)):
        a = run_of("a", [answer("vt", 4096, i, 0.0) for i in range(n)])
        b = run_of("b", [answer("vt", 4096, i, difference) for i in range(n)])
        (found,) = comparison.compare(a, b, {"mean": {"vt"}})
        share = statistics.wilson(0, n)[1]
        assert (found.low, found.high) == pytest.approx(
            (difference - share * (1 + difference), difference + share * (1 - difference))
        )
        assert found.difference == difference
    same = [answer(task, 4096, i, float(i < 20 and task == "vt")) for task in ("vt", "cwe") for i in range(20)]
    (mean, *each) = comparison.compare(run_of("a", same), run_of("b", same), {"mean": {"vt", "cwe"}})
    assert (mean.low, mean.high) == pytest.approx((each[0].low / np.sqrt(2), each[0].high / np.sqrt(2)))
    loss = {"eval": "position", "source": "text", "length": 64, "tokens": 99, "loss": 2.0, "by_row": [2.0, 2.5, 3.0]}
    run = run_of("a", [], [loss])
    (found,) = comparison.compare_sequences(run, run)
    assert (found.low, found.high, found.verdict) == (None, None, "unclear")


def test_a_share_of_the_harness_that_is_none_or_all_has_wilsons_interval():
    record = {"value": 0.0, "stderr": 0.0, "documents": 20}
    assert harness.value_interval(record) == statistics.wilson(0, 20)
    assert harness.value_interval(record | {"value": 1.0}) == statistics.wilson(20, 20)
    assert harness.value_interval(record | {"value": 7.5}) == (None, None)
    assert harness.value_interval({"value": 0.5}) == (None, None)


def test_layers_are_named_by_what_they_see():
    base = {"window": None, "chunk": None, "rope_theta": None, "short_conv": None}
    kinds = {
        letter: type("Kind", (), base | fields)
        for letter, fields in {
            "L": {"window": 512, "rope_theta": 1e4},
            "G": {},
            "C": {"chunk": 8192, "rope_theta": 1e4},
            "F": {"rope_theta": 1e6},
            "H": {"rope_theta": 1e7},
            "N": {"short_conv": 4},
        }.items()
    }
    assert layers.names(kinds) == {
        **{"L": "local, window 512, RoPE", "G": "global, NoPE", "C": "local, chunks of 8,192, RoPE"},
        **{"F": "global, RoPE (F)", "H": "global, RoPE (H)", "N": "global, NoPE, short convolution of 4"},
    }
    layouts = {
        **{"LG": "LG", "LLLG" * 8: "8×LLLG", "LLLG" * 8 + "LL": "8×LLLG + LL", "L" * 12: "12×L", None: None},
        **{"GG" + "LLLG" * 10: "GG + 10×LLLG", "LGGLGLLGLGGG": "LGGLGLLGLGGG", "GLR" + "LGR" + "LGGRG" * 8: "GLRLGR + 8×LGGRG"},
    }
    assert {letters: layers.layout(letters) for letters in layouts} == layouts
    records, _ = everything(1.0)
    run = run_of("run", [], records)
    run.provenance["model"] |= {"layers": "LG", "kinds": {"L": "local, window 512, RoPE", "G": "global, NoPE"}}
    drawn = [picture for section in sections.sections([run]) if section.name == "attention" for picture in section.pictures]
    ticks = {text.get_text() for picture in drawn for axes in picture.figure.axes for text in axes.get_yticklabels()}
    labels = {x.get_text() for picture in drawn for legend in picture.figure.legends for x in legend.get_texts()}
    assert {"0 local", "1 global"} <= ticks and {"local, window 512, RoPE", "global, NoPE"} <= labels
    assert "Layers: L is local, window 512, RoPE; G is global, NoPE." in sections.sections([run])[0].paragraphs


def test_tasks_are_a_heat_map_by_length_and_points_at_one_length():
    one = {"eval": "ruler", "samples": 8, "nulls": 0}
    records = [one | {"task": task, "length": length, "score": 50.0} for task in ("vt", "cwe") for length in (4096, 8192)]
    both = run_of("run", [], records)
    single = run_of("run", [], [r for r in records if r["length"] == 4096])
    mean, tasks = next(x for x in sections.sections([both]) if x.name == "ruler").pictures
    assert mean.caption == "Right answers, RULER: run 50% at 4K, 50% at 8K."
    assert tasks.figure.axes[0].collections[0].get_clim() == (0, 100)
    assert [x.get_text() for x in tasks.figure.axes[0].get_yticklabels()] == ["vt", "cwe"]
    (points,) = next(x for x in sections.sections([single]) if x.name == "ruler").pictures
    axes = points.figure.axes[0]
    assert [x.get_text() for x in axes.get_xticklabels()] == ["RULER", "vt", "cwe"]
    bars = [segment[:, 1] for segment in axes.collections[0].get_segments()]
    assert bars[1:] == [pytest.approx(statistics.wilson(4, 8))] * 2


def test_every_task_of_ruler_is_described():
    assert tuple(ruler.DESCRIPTIONS) == NAMES
    run = run_of("run", [], [{"eval": "ruler", "task": "vt", "length": 4096, "samples": 8, "score": 50.0, "nulls": 0}])
    section = next(x for x in sections.sections([run]) if x.name == "ruler")
    assert section.tables[-1].rows == [["vt", ruler.DESCRIPTIONS["vt"]]]


def test_a_figure_has_the_command_that_measures_it_anew():
    run = needles("run", 1.0)
    assert render.command([run], "needle") == ""
    settings = {"lengths": [1024, 4096], "asked": [2048], "samples": 5, "tokens": 99, "depths": [0.0, 50.0], "seed": 0}
    run.provenance.update(checkpoint="/runs/my run", step=7, settings=settings)
    assert render.command([run], "needle") == (
        "python tools/evaluate.py '--checkpoint=/runs/my run' --step=7 --suite=needle --lengths=2048 --samples=5 --seed=0 "
        "--depths=0,50 --out=DIR"
    )
    assert "--lengths=1024,4096 --tokens=99 --out" in render.command([run], "position")
    data = {
        "trust_checkpoint_data": True,
        "heldout": [],
        "text": ["/texts/*.txt", "/b"],
        "squad": "/squad.json",
        "hotpot": None,
    }
    run.provenance.update(data=data | {"english_words": "/words.json"}, mesh="fsdp 2 x context 4")
    run.provenance["settings"] |= {"tasks": ["copy"], "task_path": "/tasks", "compat": True}
    texts, of_all = "'--text=/texts/*.txt' --text=/b", "--mesh=fsdp=2,context=4 --out=DIR"
    assert render.command([run], "needle").endswith(f" --depths=0,50 {texts} {of_all}")
    asked = f" --seed=0 {texts} --squad=/squad.json --english_words=/words.json --mesh=fsdp=2,context=4 --compat --out=DIR"
    assert render.command([run], "ruler").endswith(asked)
    assert render.command([run], "harness").endswith(f" --tasks=copy --task_path=/tasks {of_all}")
    for name in ("position", "key_tokens", "attention_mass"):
        assert render.command([run], name).endswith(of_all.replace(" --out", " --trust_checkpoint_data --out"))
    assert render.command([run], "recall").endswith(f" --tokens=99 {of_all}")
    run.provenance["data"] = {"text": None, "trust_checkpoint_data": True, "heldout": ["a=/b"]}
    assert render.command([run], "position").endswith(f" --tokens=99 --heldout=a=/b {of_all}")
    assert render.command([run], "needle") == render.command([run], "ruler") == ""  # no flag names their text
    run.provenance.update(data={}, mesh="one device")
    page = render.page(render.content("title", [run], sections.sections([run])))
    assert "<code>python tools/evaluate.py &#39;--checkpoint=/runs/my run&#39;" in page
    assert 'href="pictures/needle_0_1.png">PNG</a> <a class="file" href="tables/needle_cells.csv">CSV' in page


def test_an_answer_of_whitespace_alone_is_called_that():
    run = run_of("run", [answer("vt", 4096, i, 0.0, given=given) for i, given in enumerate(("", " \n ", "words"))], [])
    run = run._replace(records=needles("run", 0.5).records)
    page = render.page(render.content("title", [run], sections.sections([run])))
    given = re.findall(r"<dd>(.*?)</dd>", page)
    assert {"<i>nothing</i>", "<i>only whitespace (3)</i>", "<code>words</code>"} <= set(given)


def test_the_overview_of_a_terminal_is_aligned():
    runs = [needles("run", 1.0), needles("a longer name", 0.5)]
    head, rule, *rows = sections.terminal(render.content("title", runs, [])).splitlines()[:4]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert head.index("trained at") + len("trained at") == rows[0].index("4K") + 2 == rows[1].index("4K") + 2
    assert rows[0].endswith("1.000 |") and rows[1].startswith("| a longer name |")
