"""The program that evaluates checkpoints: from flags to a report."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import mesh_of, models_config, random_params, tiny
from evaluate_program import TRUSTED, refused, run

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.data import corpora
from hybrid_attn.data.synthetic import Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import heldout, provenance, report, suite, types
from hybrid_attn.evals.report import render, runs
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.programs import parse
from hybrid_attn.train import evaluation


def test_checkpoints_are_evaluated_compared_and_reported(evaluate, models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    checkpoints = [f"--checkpoint={models}/one", f"--checkpoint={models}/two/checkpoints/"]
    sizes = ["--suite=position,recall", "--lengths=32,96", "--tokens=300", f"--out={tmp_path}"]
    run(evaluate, *checkpoints, *sizes)
    said = capsys.readouterr().out.splitlines()
    read = {length: -(-300 // length) * length for length in (32, 96)}  # tokens of a unit: rows are whole
    share = read[32] / (5 * sum(read.values()))
    assert said[0] == "one  trained at 48 tokens (seq_len of the checkpoint's stage)"
    assert said[1] == f"one  1/10  {share:.0%} of tokens  position-text-32" and said[-1] == f"report  {tmp_path}/report.html"
    assert [line.split()[0] for line in said[:22]] == ["one"] * 11 + ["two"] * 11
    assert said[10].startswith("one  10/10  100% of tokens")
    assert said[23].split()[1] == "run" and [line.split()[1] for line in said[25:27]] == ["one", "two"]
    assert "two against one:" in " ".join(said[27:])
    for name in ("one", "two"):
        about = json.loads((tmp_path / name / "run.json").read_text())
        assert about["step"] == 7 and about["model"]["seq_len"] == 48 and about["settings"]["lengths"] == [32, 96]
        assert len(about["config"]) == len(about["haystack"]) == 64 and about["dtype"] == "float32"
        heldout = corpora.load(models_config(models).data, ("text",), ByteTokenizer())["text"].heldout
        assert about["heldout"] == {"text": heldout.fingerprint()}
        records = [json.loads(line) for line in (tmp_path / name / "records.jsonl").read_text().splitlines()]
        assert {(r["eval"], r["length"]) for r in records} == {(e, n) for e in ("position", "recall") for n in (32, 96)}
    page = (tmp_path / "report.html").read_text()
    assert ">one<" in page and ">two<" in page and "http" not in page.replace("http://www.w3.org/", "")


@pytest.mark.parametrize(
    ("checkpoints", "steps", "wanted"),
    [
        (["three"], [], [("three", 8)]),
        (["three"], [8, 7], [("three", 8), ("three", 7)]),
        (["one", "three"], [7], [("one", 7), ("three", 7)]),
        (["three", "one", "three"], [8, 7, 7], [("three", 8), ("one", 7), ("three", 7)]),
    ],
)
def test_several_checkpoints_have_one_step_or_one_each(evaluate, models, checkpoints, steps, wanted):
    with flagsaver.flagsaver():
        parse(["", "--out=x", *(f"--checkpoint={models}/{name}" for name in checkpoints), *(f"--step={x}" for x in steps)])
        assert evaluate.models() == [(f"{models}/{name}", step) for name, step in wanted]


def test_every_checkpoint_has_a_name_of_its_own_and_no_other_files(evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["a/x", "b/x-3", "c/x/", "d/x", "e/checkpoints", "samples", ".", "pictures.old", "f/report.md"]
    named = ["x", "x-3", "x-2", "x-4", "e", "samples-2", tmp_path.name, "pictures.old-2", "report.md-2"]
    assert evaluate.names([(path, 7) for path in paths]) == named
    assert evaluate.names([("a/x", 7), ("a/x", 8), ("b/x", 7)]) == ["x-7", "x-8", "x"]


def records_of(directory, name="records"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_on_a_mesh_the_same_is_measured(evaluate, models, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.report, "write", lambda out, runs: None)
    arguments = [f"--checkpoint={models}/one", f"--text={models}/*.txt", "--suite=position,needle"]
    arguments += ["--lengths=840", "--tokens=1700", "--samples=1", "--depths=50", "--chunk=256"]
    run(evaluate, *arguments, f"--out={tmp_path}/alone")
    run(evaluate, *arguments, f"--out={tmp_path}/mesh", "--mesh=data=1,fsdp=2,tensor=2,context=2")
    alone, mesh = (tmp_path / name / "one" for name in ("alone", "mesh"))
    assert json.loads((mesh / "run.json").read_text())["mesh"] == "fsdp 2 x context 2 x tensor 2"
    assert len(records_of(alone, "answers")) == 2 and records_of(mesh, "answers") == records_of(alone, "answers")
    found, wanted = records_of(mesh), records_of(alone)
    measured = ("loss", "bits_per_byte", "stderr", "by_row")
    assert [x | dict.fromkeys(measured) for x in found] == [x | dict.fromkeys(measured) for x in wanted]
    for name in ("loss", "bits_per_byte"):
        numbers = [[x[name] for x in records if name in x] for records in (found, wanted)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5) and numbers[0]


def test_what_does_not_fit_a_length_is_absent_and_said(evaluate, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "SHORTEST", 600)
    planned, units = [], evaluate.suite.units
    monkeypatch.setattr(evaluate.suite, "measure_units", lambda context, settings, *_: planned.append(units(settings, context)))
    monkeypatch.setattr(evaluate.report, "read", lambda directory: None)
    monkeypatch.setattr(evaluate.report, "write", lambda out, runs: None)
    arguments = [f"--checkpoint={models}/one", f"--text={models}/*.txt", f"--out={tmp_path}", "--suite=ruler,attention_mass"]
    run(evaluate, *arguments, "--samples=1")
    said = capsys.readouterr().out
    assert "one  absent  ruler-vt-600  sample 0 of vt does not fit into 600 tokens: its smallest prompt, " in said
    assert "one  absent  ruler-qa_1-600  needs the file of its questions" in said
    absent = {line.split()[2] for line in said.splitlines() if "absent" in line}
    measured = {unit.name for unit in planned[0]}
    assert len(absent | measured) == 16 and not absent & measured and "ruler-niah_single_1-600" in measured
    assert {x for x in absent if x.startswith("attention_mass")} == {f"attention_mass-text-{n}" for n in (12, 48, 96)}
    run(evaluate, *arguments, "--samples=1", "--lengths=600", "--ruler_tasks=vt,niah_single_1")
    assert [unit.name for unit in planned[1]] == ["ruler-niah_single_1-600", "attention_mass-text-600"]
    said, code = refused(evaluate, capsys, *arguments, "--samples=1", "--lengths=600", "--ruler_tasks=vt,qa_1", "--suite=ruler")
    assert (code, said[:88]) == (2, "error: nothing to measure at lengths 600; ruler of qa_1: needs the file of its questions")
    assert "; ruler of vt: sample 0 of vt does not fit into 600 tokens" in said and len(planned) == 2


def planned_of(evaluate, monkeypatch):
    """A list to which (context, settings, provenance) of every model are added that would be measured."""
    planned = []
    monkeypatch.setattr(evaluate.suite, "measure_units", lambda *arguments: planned.append(arguments[:3]))
    monkeypatch.setattr(evaluate.report, "read", lambda directory: None)
    monkeypatch.setattr(evaluate.report, "write", lambda out, runs: None)
    return planned


def test_files_that_only_a_checkpoint_names_are_read_when_the_user_says_so(evaluate, models, tmp_path, monkeypatch, capsys):
    planned, opened = planned_of(evaluate, monkeypatch), []
    arguments = [f"--checkpoint={models}/one", "--lengths=32", f"--out={tmp_path}/out"]
    monkeypatch.setattr(corpora, "load", lambda *_: opened.append(1) or {})
    for names in ("position", "attention_mass,recall", "quick"):
        said, code = refused(evaluate, capsys, *arguments, f"--suite={names}", trust=())
        assert code == 2 and f"(text: {models}/*.txt); add --trust_checkpoint_data" in said and "--heldout=NAME=FILES" in said
    run(evaluate, *arguments, "--suite=recall", trust=())
    assert not opened and len(planned) == 1
    run(evaluate, *arguments, "--suite=position,recall")
    assert opened and len(planned) == 2


def test_losses_are_measured_on_the_files_that_a_flag_names(evaluate, models, tmp_path, monkeypatch):
    planned = planned_of(evaluate, monkeypatch)
    (tmp_path / "mine.txt").write_text("A text of mine. " * 30)
    arguments = [f"--checkpoint={models}/one", "--suite=position", "--lengths=32", f"--out={tmp_path}/out"]
    run(evaluate, *arguments, f"--heldout=mine={tmp_path}/mine.txt", trust=())
    context, wanted, about = planned[0]
    assert [unit.name for unit in suite.units(wanted, context)] == ["position-mine-32"]
    assert context.heldout["mine"].lengths.tolist() == [30 * 16 + 2] and [*about["heldout"]] == ["mine"]


@pytest.mark.slow
def test_the_command_beside_a_figure_measures_the_same(evaluate, models, tmp_path, monkeypatch):
    planned = planned_of(evaluate, monkeypatch)
    question = {"question": "What?", "answers": [{"text": "words"}], "is_impossible": False}
    paragraphs = [{"context": "Some words.", "qas": [question]}] * 40
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    asked = ["--suite=position,needle,ruler", "--ruler_tasks=qa_1,vt", "--lengths=900", "--samples=1", "--tokens=100"]
    asked += ["--text=[01].txt", f"--squad={tmp_path}/squad.json", "--depths=50", "--mesh=fsdp=2"]
    for number, data in enumerate((TRUSTED, ["--heldout=mine=3.txt"])):
        monkeypatch.chdir(models)  # some paths are relative
        planned.clear()
        run(evaluate, "--checkpoint=one", *asked, *data, f"--out={tmp_path}/{number}", trust=())
        context, wanted, about = planned[0]
        monkeypatch.chdir(tmp_path)
        described = suite.described(wanted, about)
        runs.check_provenance(described, "run.json")
        found = report.Run("one", (), (), described)
        for name in wanted.evals:
            program, *arguments = shlex.split(render.command([found], name))[1:]
            assert program == "tools/evaluate.py" and arguments.pop() == "--out=DIR"
            run(evaluate, *arguments, f"--out={tmp_path}/{number}-{name}", trust=())
            again, settings_again, about_again = planned[-1]
            units = [unit for unit in suite.units(wanted, context) if unit.eval == name]
            assert suite.units(settings_again, again) == units != []
            assert again.questions == (context.questions if name == "ruler" else {})
            same = ("mesh", "step", "weights", "vocab_size", "heldout" if name == "position" else "haystack")
            assert [about_again[x] for x in same] == [about[x] for x in same]


def test_the_standard_library_and_tasks_are_read_without_a_flag_and_urls_are_not():
    for source in (base.source(), base.source(task="recall", pairs=2)):
        heldout.check_trusted("runs/hybrid_8k", tiny({"data.sources": {"text": source}}))
    stored = tiny({"data.sources": {"text": base.source(store="gs://somewhere/else")}})
    with pytest.raises(ValueError, match="x names the data .*text: gs://somewhere/else"):
        heldout.check_trusted("x", stored)


def test_the_trained_length_of_an_imported_model_is_that_of_its_own_config(evaluate, models, tmp_path, monkeypatch, capsys):
    planned, c = planned_of(evaluate, monkeypatch), models_config(models)
    with jax.set_mesh(mesh_of()):
        checkpoints = checkpoint.Checkpoints(tmp_path / "model", keep=1, every=1)
        checkpoints.save(0, {"params": random_params(c.model)}, {"stage_steps": [], "stage": {}}, config.to_dict(c))
        checkpoints.close()
    path = tmp_path / "model" / "companions" / "config.json"
    path.parent.mkdir()
    arguments = [f"--checkpoint={tmp_path}/model", "--suite=recall", f"--out={tmp_path}/out"]
    for values, trained in (({"max_position_embeddings": 256}, 256), ({}, 48)):
        path.write_text(json.dumps(values))
        run(evaluate, *arguments)
        context, wanted, about = planned.pop()
        said = capsys.readouterr().out
        assert context.trained == about["model"]["seq_len"] == trained
        assert wanted.lengths == (trained // 4, trained, 2 * trained)
        assert f"model  trained at {trained} tokens ({about['model']['seq_len_from']})\n" in said
        assert ("max_position_embeddings" in said) == (trained == 256)
    for content in (
        b'{"max_position_embeddings": "8K"}',
        b"[" * 100_000,
        b'{"max_position_embeddings": 1000000000000}',
        b"\xff",
    ):
        path.write_bytes(content)
        said, code = refused(evaluate, capsys, *arguments)
        assert code == 2 and "companions/config.json" in said
    assert evaluate.loading.trained_length(c, tmp_path / "model", 5)[0] == 48  # trained on, by us


def test_by_default_loss_is_measured_around_the_trained_length_and_questions_are_asked_up_to_it(evaluate):
    with flagsaver.flagsaver():
        parse(["", "--out=x", "--checkpoint=y"])
        assert evaluate.lengths([64]) == {"lengths": (16, 64, 128), "engine_lengths": (2048,)}
        assert evaluate.lengths([16_384]) == {"lengths": (4096, 16_384, 32_768), "engine_lengths": (4096, 16_384)}
        assert evaluate.lengths([16_384, 64, 64])["lengths"] == (16, 64, 128, 4096, 16_384, 32_768)
    assert "twice as many; of needle, ruler, win_rate, harness the first two, from 2,048 on." in flags.FLAGS["lengths"].help


def test_a_run_and_the_tool_ask_the_same_where_nobody_says_otherwise(evaluate, models):
    with flagsaver.flagsaver(), jax.set_mesh(mesh_of()):
        parse(["", "--out=x", "--checkpoint=y"])
        assert (evaluate.settings([64]).depths, evaluate.settings([64]).seed) == (suite.DEPTHS, suite.SEED)
        c, params, _ = evaluate.loading.load(f"{models}/one", 7)
        engine = Engine(params, c, EngineOptions(evaluate.CHUNK.value, batch_size=evaluate.BATCH_SIZE.value))
    options = evaluation._engine_options(models_config(models), engine.mesh, [48])
    assert (options.chunk, options.batch_size) == (engine.chunk, engine.batch_size)


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_measures_the_rest(evaluate, models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    root = Path(__file__).parents[1]
    arguments = [f"--checkpoint={models}/one", f"--out={tmp_path}", "--suite=recall", "--lengths=32,64", "--tokens=300"]
    with subprocess.Popen(
        [sys.executable, "tools/evaluate.py", *arguments], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as first:  # fmt: skip
        watch = threading.Timer(240, first.kill)
        watch.start()
        assert first.stdout.readline().startswith("one  trained at 48 tokens (")
        assert first.stdout.readline() == "one  1/8  12% of tokens  recall-recall-32\n"
        first.send_signal(signal.SIGINT)
        _, said = first.communicate()
        watch.cancel()
    assert (first.returncode, said) == (130, "error: interrupted; the same command goes on with what is not done\n")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "units").glob("*.json")}
    assert 1 <= len(done) < 8 and not (tmp_path / "one" / "records.jsonl").exists()
    run(evaluate, *arguments)
    assert capsys.readouterr().out.splitlines()[-1] == f"report  {tmp_path}/report.html"
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [(r["source"], r["length"]) for r in records_of(tmp_path / "one")] == [
        (task, length) for length in (32, 64) for task in ("recall", "mqar", "copy", "tracking")
    ]


def test_answers_end_where_the_files_of_an_imported_model_say(evaluate, models, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.loading, "stop_tokens", lambda checkpoint, tokenizer: [5, tokenizer.eos])
    monkeypatch.setattr(evaluate.suite, "measure_units", lambda context, *_: found.append(context.stop_tokens))
    monkeypatch.setattr(evaluate.report, "read", lambda directory: None)
    monkeypatch.setattr(evaluate.report, "write", lambda out, runs: None)
    found = []
    run(evaluate, f"--checkpoint={models}/one", "--suite=recall", f"--out={tmp_path}")
    assert found == [[5, ByteTokenizer.eos]]


def test_a_run_is_the_same_however_its_checkpoint_is_written_and_tells_each_revision(evaluate, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    monkeypatch.setattr(evaluate.report, "write", lambda out, runs: None)
    arguments = ["--suite=position", "--lengths=32", "--tokens=100", f"--out={tmp_path}"]
    run(evaluate, "--checkpoint=one/", *arguments, "--heldout=text=0.txt", trust=())
    (unit,) = (tmp_path / "one" / "units").iterdir()
    about, before = tmp_path / "one" / "run.json", unit.stat().st_mtime_ns
    about.write_text(json.dumps(json.loads(about.read_text()) | {"revision": "of before"}))
    (tmp_path / "copied.txt").write_bytes((models / "0.txt").read_bytes())
    run(evaluate, f"--checkpoint={models}/one", *arguments, f"--heldout=text={tmp_path}/copied.txt", trust=())
    assert unit.stat().st_mtime_ns == before and json.loads(about.read_text())["revision"] == "of before"
    assert json.loads(about.read_text())["data"]["heldout"] == [f"text={tmp_path}/copied.txt"]
    monkeypatch.setattr(provenance, "revision", lambda file: "of now")
    for _ in range(2):
        unit.unlink()
        run(evaluate, "--checkpoint=one/", *arguments, "--heldout=text=0.txt", trust=())
        assert unit.exists() and json.loads(about.read_text())["revision"] == "of before, of now"


def test_other_weights_under_the_same_name_are_another_evaluation(evaluate, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.report, "write", lambda out, runs: None)
    (tmp_path / "one").symlink_to(models / "one")
    arguments = [f"--checkpoint={tmp_path}/one", "--suite=position", "--lengths=32", "--tokens=100", f"--out={tmp_path}/out"]
    run(evaluate, *arguments)
    (tmp_path / "one").unlink()
    (tmp_path / "one").symlink_to(models / "two")
    said, code = refused(evaluate, capsys, *arguments)
    assert "holds another evaluation (there -> wanted):   weights: " in said and said.count("->") == 2 and code == 2


def test_a_model_is_asked_its_own_tasks_and_those_of_the_others_that_it_was_not_trained_on():
    own = {"probe": Task("recall", 4), "mine": Task("mqar", 8)}
    found = types.with_own(own)
    assert [*found.items()] == [*own.items(), *((name, types.RECALL[name]) for name in ("mqar", "copy", "tracking"))]
    assert types.with_own({}) == types.RECALL and types.with_own({"copy": Task("recall", 2)})["copy"].name == "recall"


def test_a_signal_that_is_swallowed_ends_the_program_nevertheless():
    swallowing = """
import os, signal, time
from hybrid_attn import programs

def program():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        time.sleep(60)

programs.GRACE = 0.1
programs.run(program, [""], "all")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", swallowing], env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_parameters_are_loaded_once_and_one_model_after_the_other(evaluate, models, tmp_path, monkeypatch):
    steps, load, read_params = [], evaluate.loading.load, checkpoint.read_params
    monkeypatch.setattr(evaluate.suite, "measure_units", lambda context, *_: steps.append(sorted(context.eval_model.params)))
    monkeypatch.setattr(evaluate.report, "read", lambda directory: None)
    monkeypatch.setattr(evaluate.report, "write", lambda out, runs: None)
    monkeypatch.setattr(checkpoint, "read_params", lambda *arguments: steps.append("load") or read_params(*arguments))
    run(evaluate, *(f"--checkpoint={models}/{name}" for name in ("one", "two")), "--suite=recall", f"--out={tmp_path}")
    with jax.set_mesh(mesh_of()):
        params = sorted(load(f"{models}/one").params)
    assert steps[:-1] == ["load", params, "load", params]
