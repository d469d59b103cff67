"""A run evaluates its model with the suite: each unit once, whoever stops it, and as the tool evaluates its checkpoint."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import conftest
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import tensorboard_events, tiny

from configs import base
from hybrid_attn import checkpoint
from hybrid_attn.data import corpora
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.evals import haystack, report, suite
from hybrid_attn.evals.records import is_total
from hybrid_attn.evals.table import EVALS
from hybrid_attn.programs import parse
from hybrid_attn.train import evaluation, loop

LENGTH = 960
TAGS = ("position_loss_nats/text", "needle_found_share/1", "needle_found_share/4")
UNITS = [f"{name}-{LENGTH}" for name in ("position-text", "needle-1", "needle-4")]


def config_of(folder, **changes):
    """Four steps on eight devices, evaluated after two and at the end, at twenty times the length of training."""
    values = {
        "mesh.fsdp": 2,
        "mesh.context": 2,
        "train.remat": "none",  # less to compile
        "data.sources": {"text": base.source(paths=(f"{folder}/*.txt",))},
        "stages": [{"steps": 4, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}],
        "evals.names": ("position", "needle"),
        "evals.every": 2,
        "evals.lengths": (20.0,),
        "evals.tokens": 400,
        "evals.samples": 1,
    }
    return tiny(values | changes)


def measured(patch, after=lambda unit: None):
    """The units that are measured from now on; `after` hears of each."""
    units = []

    def counted(measure):
        def counting(context, settings, unit, asked):
            units.append(unit.name)
            found = measure(context, settings, unit, asked)
            after(unit)
            return found

        return counting

    for name, record in EVALS.items():
        patch.setitem(EVALS, name, record._replace(measure=counted(record.measure)))
    return units


@pytest.fixture(scope="module", autouse=True)
def two_depths():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "DEPTHS", (0.0, 50.0))
        yield


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(f"This is line {j} of document {i}.\n" for j in range(10 + i)))
    return folder


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    """That of a run which a signal stops in its first evaluation, and which goes on to the end."""
    workdir = tmp_path_factory.mktemp("run")

    def stop(unit):
        if unit.part == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        units = measured(patch, stop)
        assert not loop.train(config_of(corpus), workdir)
        assert units == UNITS[:2]
    assert checkpoint.steps(workdir / "checkpoints") == [2]
    assert names(workdir / "evals/2") == ["run.json", "units"]
    with pytest.MonkeyPatch.context() as patch:
        units = measured(patch)
        assert loop.train(config_of(corpus), workdir)
        assert units == [UNITS[2], *UNITS]
    return workdir


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_with_what_is_not_done(workdir):
    assert names(workdir / "evals") == ["2", "4", "samples"]
    for step in (2, 4):
        folder = workdir / "evals" / str(step)
        assert names(folder / "units") == sorted(f"{unit}.json" for unit in UNITS)
        assert json.loads((folder / "run.json").read_text())["step"] == step
        needles = [x for x in lines(folder / "records.jsonl") if x["eval"] == "needle"]
        told = [x for x in lines(workdir / "evals.jsonl") if (x["eval"], x["step"]) == ("needle", step)]
        position = {key: told[0][key] for key in ("step", "stage", "stages", "stage_name", "tokens_seen")}
        assert [x | position for x in needles] == told and len(told) == 4
        assert len(lines(folder / "answers.jsonl")) == 4
        assert (folder / "report.html").exists()


@pytest.mark.slow
def test_tensorboard_has_a_score_of_each_unit_and_the_pictures(workdir):
    pytest.importorskip("matplotlib")
    values = [(event.step, value) for event in tensorboard_events(workdir) for value in event.summary.value]
    (whole,) = [x for x in lines(workdir / "evals/4/records.jsonl") if x["eval"] == "position" and is_total(x)]
    scores = {(step, x.tag): x.simple_value for step, x in values if x.tag.endswith(f"/{LENGTH}")}
    assert {tag for _, tag in scores} == {f"{name}/{LENGTH}" for name in TAGS}
    assert {step for step, _ in scores} == {2, 4}
    assert scores[4, f"position_loss_nats/text/{LENGTH}"] == pytest.approx(whole["loss"])
    assert 0 <= scores[4, f"needle_found_share/4/{LENGTH}"] <= 1
    pictures = {x.tag: x.image for step, x in values if step == 4 and x.HasField("image")}
    assert {"needle_0_1", "needle_0_4", "loss_text_all"} <= set(pictures)
    assert {f"{name}.png" for name in pictures} == set(names(workdir / "evals/4/pictures"))
    assert all(image.encoded_image_string.startswith(b"\x89PNG") and image.width > 300 for image in pictures.values())


def unreported(workdir, folder):
    """A copy of the finished run that was killed before the report of its last step was written."""
    shutil.copytree(workdir, folder)
    (folder / "evals/4/report.html").unlink()


@pytest.mark.slow
def test_pictures_are_of_the_run_that_a_report_would_read_with_a_bigram_model_beside_it(corpus, workdir, tmp_path, monkeypatch):
    sections = pytest.importorskip("hybrid_attn.evals.report.sections")
    unreported(workdir, tmp_path / "run")
    drawn = []
    monkeypatch.setattr(sections, "sections", lambda runs: drawn.extend(runs) or [])
    assert loop.train(config_of(corpus), tmp_path / "run")
    read = report.read(tmp_path / "run/evals/4")._replace(name="run, step 4")
    *records, baseline = drawn[0].records
    assert [run._replace(records=tuple(records)) for run in drawn] == [read]
    assert baseline["eval"] == "bigram" and baseline["bits_per_byte"] > 0
    assert drawn[0].provenance["settings"]["lengths"] == [LENGTH]


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_ends_no_run(corpus, workdir, tmp_path, monkeypatch, capsys):
    pictures = pytest.importorskip("hybrid_attn.evals.report.pictures")
    unreported(workdir, tmp_path / "run")
    monkeypatch.setattr(pictures, "lines", lambda *_: np.array([[1], [2, 3]]))
    assert loop.train(config_of(corpus), tmp_path / "run")
    said = capsys.readouterr().out
    assert "evaluation of step 4 is not all drawn: ValueError: setting an array element with a sequence" in said
    assert "\n  bigram model, at 48" in said


@pytest.mark.slow
def test_the_tool_finds_the_same_of_the_checkpoint(corpus, workdir, tmp_path):
    pytest.importorskip("matplotlib")
    tokenizer = load_tokenizer("bytes")
    heldout = corpora.load(config_of(corpus).data, ["text"], tokenizer)["text"].heldout
    (tmp_path / "haystack").write_text(haystack.of_documents([heldout], tokenizer))
    with conftest.tool("evaluate") as tool, flagsaver.flagsaver():
        sizes = [f"--lengths={LENGTH}", "--tokens=400", "--samples=1", "--depths=0,50", "--suite=position,needle"]
        flags = [f"--checkpoint={workdir}", f"--text={tmp_path}/haystack", f"--out={tmp_path}/out", "--trust_checkpoint_data"]
        tool.main(parse(["evaluate.py", *flags, *sizes]))
    ours, theirs = ([lines(x / name) for name in ("records.jsonl", "answers.jsonl")] for x in folders(workdir, tmp_path))
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a == {name: x if isinstance(x, str) else pytest.approx(x, rel=1e-5) for name, x in b.items()}
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a | {"given": ""} == b | {"given": ""}


def folders(workdir, tmp_path):
    return workdir / "evals/4", tmp_path / "out" / Path(workdir).name


def longer(corpus, workdir, folder, **changes):
    """A copy of the finished run in `folder`, and its config with two steps more."""
    shutil.copytree(workdir, folder)
    c = config_of(corpus, **changes)
    return dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], steps=6),))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, units",
    [
        pytest.param({}, UNITS, id="as_before"),
        pytest.param({"evals.names": ()}, [], id="unmeasured", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_goes_on_longer_keeps_what_was_measured_of_it(corpus, workdir, tmp_path, monkeypatch, changes, units):
    c = longer(corpus, workdir, tmp_path / "run", **changes)
    (tmp_path / "run/evals/9/units").mkdir(parents=True)
    found = measured(monkeypatch)
    assert loop.train(c, tmp_path / "run", allow_lr_jump=True)
    assert found == units and names(tmp_path / "run/evals") == ["2", "4", *(["6"] if units else []), "9.old", "samples"]
    old, new = (lines(folder / "evals.jsonl") for folder in (workdir, tmp_path / "run"))
    assert [line for line in new if line["step"] <= 4] == old
    for name in ("run.json", "records.jsonl", "answers.jsonl"):
        assert (tmp_path / "run/evals/4" / name).read_bytes() == (workdir / "evals/4" / name).read_bytes()


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_does_not_end_the_run(corpus, workdir, tmp_path, monkeypatch, capsys):
    def measure(*_):
        raise FloatingPointError("position-text-16: the loss is nan")

    c = longer(corpus, workdir, tmp_path / "run", **{"evals.every": 5})
    monkeypatch.setattr(evaluation.suite, "measure_units", measure)
    assert loop.train(c, tmp_path / "run")
    said = capsys.readouterr().out
    for step in (5, 6):
        assert f"evaluation of step {step} failed: position-text-16: the loss is nan; training is not affected" in said
    assert (tmp_path / "run/checkpoints/6").is_dir()


@pytest.mark.slow
def test_a_finished_run_measures_again_what_has_other_settings_and_says_what_is_left_out(corpus, workdir, monkeypatch, capsys):
    (workdir / "evals/9/units").mkdir(parents=True)
    units = measured(monkeypatch)
    assert loop.train(config_of(corpus), workdir)
    assert units == [] and names(workdir / "evals") == ["2", "4", "9.old", "samples"]
    capsys.readouterr()
    assert loop.train(config_of(corpus, **{"evals.names": ("attention_mass", "recall")}), workdir)
    said = capsys.readouterr().out
    assert said.count("\nevals        without recall of tasks: no source of this run is a task\n") == 1
    again = f"\n{workdir}/evals/4 cannot be continued (other settings, or a damaged run.json); measuring again\n"
    assert said.count(again) == 1
    assert said.count(f"\nkept         the old one as {workdir}/evals/4.old\n") == 1
    assert units == [f"attention_mass-text-{LENGTH}"] and names(workdir / "evals/4/units") == [f"{units[0]}.json"]
    told = [x for x in lines(workdir / "evals.jsonl") if x["step"] == 4]
    assert [(x["eval"], x["kind"]) for x in told] == [("attention_mass", "G"), ("attention_mass", "L")]
    for x in told:
        assert sum(x[name] for name in ("begin", "needle", "context", "qc")) == pytest.approx(1, abs=1e-4)
        assert x["begin_per_token"] == pytest.approx(x["begin"] / 10)
        assert x["needle_lift"] == pytest.approx(x["needle_per_token"] * LENGTH, rel=0.1)
        assert 0 < x["sink_rate"] < x["begin"] or (x["kind"], x["sink_rate"], x["begin"]) == ("L", 0, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"evals.lengths": (1.0,)}, "sample 0 of needle at depth 0 does not fit into 48 tokens: .* use a length of at least"),
        ({"evals.names": ("attention_mass",), "evals.lengths": (2000.0,)}, "which fill no prompt of 96,000"),
        (
            {"evals.names": ("position",), "data.sources": {"probe": base.source(task="recall", pairs=2)}},
            r"evals.names=\('position',\) measures nothing of the last stage's probe: position needs documents, and the",
        ),
    ],
    ids=["needle", "attention_mass", "position"],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config_of(corpus, **changes), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [] and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_run_whose_config_is_refused_has_all_that_it_had(corpus, workdir, tmp_path):
    c = longer(corpus, workdir, tmp_path / "run", **{"evals.lengths": (1.0,)})
    for name in ("metrics.jsonl", "evals.jsonl"):
        with (tmp_path / "run" / name).open("a") as file:
            file.write('{"step": 5}\n')  # after the newest checkpoint
    (tmp_path / "run/evals/5").mkdir()
    before = sorted((path, path.is_file() and path.read_bytes()) for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="needle at depth 0 does not fit into 48 tokens"):
        loop.train(c, tmp_path / "run", allow_lr_jump=True)
    assert before == sorted((path, path.is_file() and path.read_bytes()) for path in (tmp_path / "run").rglob("*"))


def test_how_far_a_needle_stands_out_is_told_of_the_layers_that_reach_it():
    heads = [{"reach": True, "needle_lift": 3.0}, {"reach": False, "needle_lift": 0.0}, {"reach": True, "needle_lift": 6.0}]
    headline = EVALS["attention_mass"].headline
    assert headline.value(heads) == 4.5
    assert headline.value(heads[1:2]) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("position", "needel"), r"evals.names\[1\]='needel' is not one of .*; did you mean 'needle'\?"),
        (("harness",), r"evals.names\[0\]='harness' is not one of 'position', 'recall', .*'key_tokens'"),
    ],
)
def test_an_unknown_evaluation_is_refused_before_anything_is_read(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config_of("/nowhere", **{"evals.names": names}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
