"""The tool that evaluates checkpoints: from flags to a report, and what it refuses."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import conftest
import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import mesh_of, random_params, tiny

from configs import base
from hybrid_attn import checkpoint, config, files
from hybrid_attn.data import corpora
from hybrid_attn.data.synthetic import Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import heldout, provenance, report, suite, types
from hybrid_attn.evals.report import render, runs
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.programs import parse
from hybrid_attn.train import evaluation


@pytest.fixture(scope="module")
def tool():
    with conftest.tool("evaluate") as module:
        yield module


def models_config(folder, **changes):
    return tiny({"data.sources": {"text": base.source(paths=(f"{folder}/*.txt",))}} | changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Workdirs of untrained models, of which one has two checkpoints and trades tokens for heads, and the text of all."""
    folder = tmp_path_factory.mktemp("models")
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of document {i}.\n" for j in range(20)))
    ulysses = {"train.context": "G=ulysses"}
    for name, seed, steps, changes in (("one", 0, [7], {}), ("two", 1, [7], {}), ("three", 2, [7, 8], ulysses)):
        c = models_config(folder, **changes)
        with jax.set_mesh(mesh_of()):
            checkpoints = checkpoint.Checkpoints(folder / name / "checkpoints", keep=2, every=1)
            state = {"params": random_params(c.model, seed)}
            for step in steps:
                checkpoints.save(step, state, {"stage_steps": [step], "stage": {"tokenizer": "bytes"}}, config.to_dict(c))
            checkpoints.close()
    return folder


TRUSTED = ("--trust_checkpoint_data",)  # the models' sources are files


def run(tool, *arguments, trust=TRUSTED):
    with flagsaver.flagsaver():
        tool.main(parse(["evaluate.py", *trust, *map(str, arguments)]))


def refused(tool, capsys, *arguments, trust=TRUSTED):
    """The one line and the exit code of a command that ends with an error."""
    with pytest.raises(SystemExit) as ended:
        run(tool, *arguments, trust=trust)
    (line,) = capsys.readouterr().err.splitlines()
    return line, ended.value.code


def test_checkpoints_are_evaluated_compared_and_reported(tool, models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    checkpoints = [f"--checkpoint={models}/one", f"--checkpoint={models}/two/checkpoints/"]
    sizes = ["--suite=position,recall", "--lengths=32,96", "--tokens=300", f"--out={tmp_path}"]
    run(tool, *checkpoints, *sizes)
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
def test_several_checkpoints_have_one_step_or_one_each(tool, models, checkpoints, steps, wanted):
    with flagsaver.flagsaver():
        parse(["", "--out=x", *(f"--checkpoint={models}/{name}" for name in checkpoints), *(f"--step={x}" for x in steps)])
        assert tool.models() == [(f"{models}/{name}", step) for name, step in wanted]


def test_every_checkpoint_has_a_name_of_its_own_and_no_other_files(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["a/x", "b/x-3", "c/x/", "d/x", "e/checkpoints", "samples", ".", "pictures.old", "f/report.md"]
    named = ["x", "x-3", "x-2", "x-4", "e", "samples-2", tmp_path.name, "pictures.old-2", "report.md-2"]
    assert tool.names([(path, 7) for path in paths]) == named
    assert tool.names([("a/x", 7), ("a/x", 8), ("b/x", 7)]) == ["x-7", "x-8", "x"]


def records_of(directory, name="records"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_on_a_mesh_the_same_is_measured(tool, models, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.report, "write", lambda out, runs: None)
    arguments = [f"--checkpoint={models}/one", f"--text={models}/*.txt", "--suite=position,needle"]
    arguments += ["--lengths=840", "--tokens=1700", "--samples=1", "--depths=50", "--chunk=256"]
    run(tool, *arguments, f"--out={tmp_path}/alone")
    run(tool, *arguments, f"--out={tmp_path}/mesh", "--mesh=data=1,fsdp=2,tensor=2,context=2")
    alone, mesh = (tmp_path / name / "one" for name in ("alone", "mesh"))
    assert json.loads((mesh / "run.json").read_text())["mesh"] == "fsdp 2 x context 2 x tensor 2"
    assert len(records_of(alone, "answers")) == 2 and records_of(mesh, "answers") == records_of(alone, "answers")
    found, wanted = records_of(mesh), records_of(alone)
    measured = ("loss", "bits_per_byte", "stderr", "by_row")
    assert [x | dict.fromkeys(measured) for x in found] == [x | dict.fromkeys(measured) for x in wanted]
    for name in ("loss", "bits_per_byte"):
        numbers = [[x[name] for x in records if name in x] for records in (found, wanted)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5) and numbers[0]


def test_what_does_not_fit_a_length_is_absent_and_said(tool, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "SHORTEST", 600)
    planned, units = [], tool.suite.units
    monkeypatch.setattr(tool.suite, "measure_units", lambda context, settings, *_: planned.append(units(settings, context)))
    monkeypatch.setattr(tool.report, "read", lambda directory: None)
    monkeypatch.setattr(tool.report, "write", lambda out, runs: None)
    arguments = [f"--checkpoint={models}/one", f"--text={models}/*.txt", f"--out={tmp_path}", "--suite=ruler,attention_mass"]
    run(tool, *arguments, "--samples=1")
    said = capsys.readouterr().out
    assert "one  absent  ruler-vt-600  sample 0 of vt does not fit into 600 tokens: its smallest prompt, " in said
    assert "one  absent  ruler-qa_1-600  needs the file of its questions" in said
    absent = {line.split()[2] for line in said.splitlines() if "absent" in line}
    measured = {unit.name for unit in planned[0]}
    assert len(absent | measured) == 16 and not absent & measured and "ruler-niah_single_1-600" in measured
    assert {x for x in absent if x.startswith("attention_mass")} == {f"attention_mass-text-{n}" for n in (12, 48, 96)}
    run(tool, *arguments, "--samples=1", "--lengths=600", "--ruler_tasks=vt,niah_single_1")
    assert [unit.name for unit in planned[1]] == ["ruler-niah_single_1-600", "attention_mass-text-600"]
    said, code = refused(tool, capsys, *arguments, "--samples=1", "--lengths=600", "--ruler_tasks=vt,qa_1", "--suite=ruler")
    assert (code, said[:88]) == (2, "error: nothing to measure at lengths 600; ruler of qa_1: needs the file of its questions")
    assert "; ruler of vt: sample 0 of vt does not fit into 600 tokens" in said and len(planned) == 2


@pytest.mark.parametrize(
    "content",
    [
        {"notes.txt": ""},
        {"pictures/mine.png": ""},
        {"report.md": ""},
        {"run.json": "{}"},
        {"a/run.json": '{"a": 1}'},
        {"pictures/mine.png": "", "a/run.json": '{"revision": "a", "settings": {}, "generator": 4}'},  # a copied run
    ],
)
def test_a_directory_with_files_of_others_is_refused_and_left_as_it_is(tool, models, tmp_path, capsys, content):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    said, code = refused(tool, capsys, f"--checkpoint={models}/one", "--suite=recall", "--lengths=32", f"--out={tmp_path}")
    assert code == 2 and "has files that no evaluation wrote" in said and "name a new or an empty directory" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_of_evaluations_is_new_or_known_by_its_marker_and_has_no_links(tool, tmp_path):
    new, marked = tmp_path / "new", tmp_path / "marked"
    files.write_atomically(marked / tool.MARKER, tool.MARKED)
    (marked / "notes.txt").touch()
    for directory in (new, marked):
        tool.check_ours(directory)
    assert not new.exists()
    (marked / "pictures").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"marked has links \(pictures\), which lead to files elsewhere; remove them"):
        tool.check_ours(marked)


@pytest.mark.parametrize("name", ["evals", "evals/40", "mine"])
def test_nothing_is_evaluated_into_the_workdir_of_a_training(tool, tmp_path, name):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    files.write_atomically(tmp_path / name / tool.MARKER, tool.MARKED)
    with pytest.raises(ValueError, match=f"{name} is in the workdir of a training, which writes there itself; name a"):
        tool.check_ours(tmp_path / name)
    tool.check_ours(tmp_path / "evals" / "of" / "others")


def test_one_program_at_a_time_measures_into_a_directory(tool, models, tmp_path, capsys):
    arguments = [f"--checkpoint={models}/one", "--suite=recall", "--lengths=32", "--tokens=300", f"--out={tmp_path}"]
    with files.lock(tmp_path):
        said, code = refused(tool, capsys, *arguments)
    assert code == 1 and said.startswith(f"error: {tmp_path} is in use by process {os.getpid()} on ")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def planned_of(tool, monkeypatch):
    """A list to which (context, settings, provenance) of every model are added that would be measured."""
    planned = []
    monkeypatch.setattr(tool.suite, "measure_units", lambda *arguments: planned.append(arguments[:3]))
    monkeypatch.setattr(tool.report, "read", lambda directory: None)
    monkeypatch.setattr(tool.report, "write", lambda out, runs: None)
    return planned


def test_files_that_only_a_checkpoint_names_are_read_when_the_user_says_so(tool, models, tmp_path, monkeypatch, capsys):
    planned, opened = planned_of(tool, monkeypatch), []
    arguments = [f"--checkpoint={models}/one", "--lengths=32", f"--out={tmp_path}/out"]
    monkeypatch.setattr(corpora, "load", lambda *_: opened.append(1) or {})
    for names in ("position", "attention_mass,recall", "quick"):
        said, code = refused(tool, capsys, *arguments, f"--suite={names}", trust=())
        assert code == 2 and f"(text: {models}/*.txt); add --trust_checkpoint_data" in said and "--heldout=NAME=FILES" in said
    run(tool, *arguments, "--suite=recall", trust=())
    assert not opened and len(planned) == 1
    run(tool, *arguments, "--suite=position,recall")
    assert opened and len(planned) == 2


def test_losses_are_measured_on_the_files_that_a_flag_names(tool, models, tmp_path, monkeypatch):
    planned = planned_of(tool, monkeypatch)
    (tmp_path / "mine.txt").write_text("A text of mine. " * 30)
    arguments = [f"--checkpoint={models}/one", "--suite=position", "--lengths=32", f"--out={tmp_path}/out"]
    run(tool, *arguments, f"--heldout=mine={tmp_path}/mine.txt", trust=())
    context, wanted, about = planned[0]
    assert [unit.name for unit in suite.units(wanted, context)] == ["position-mine-32"]
    assert context.heldout["mine"].lengths.tolist() == [30 * 16 + 2] and [*about["heldout"]] == ["mine"]


def test_the_command_beside_a_figure_measures_the_same(tool, models, tmp_path, monkeypatch):
    planned = planned_of(tool, monkeypatch)
    question = {"question": "What?", "answers": [{"text": "words"}], "is_impossible": False}
    paragraphs = [{"context": "Some words.", "qas": [question]}] * 40
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    asked = ["--suite=position,needle,ruler", "--ruler_tasks=qa_1,vt", "--lengths=900", "--samples=1", "--tokens=100"]
    asked += ["--text=[01].txt", f"--squad={tmp_path}/squad.json", "--depths=50", "--mesh=fsdp=2"]
    for number, data in enumerate((TRUSTED, ["--heldout=mine=3.txt"])):
        monkeypatch.chdir(models)  # some paths are relative
        planned.clear()
        run(tool, "--checkpoint=one", *asked, *data, f"--out={tmp_path}/{number}", trust=())
        context, wanted, about = planned[0]
        monkeypatch.chdir(tmp_path)
        described = suite.described(wanted, about)
        runs.check_provenance(described, "run.json")
        found = report.Run("one", (), (), described)
        for name in wanted.evals:
            program, *arguments = shlex.split(render.command([found], name))[1:]
            assert program == "tools/evaluate.py" and arguments.pop() == "--out=DIR"
            run(tool, *arguments, f"--out={tmp_path}/{number}-{name}", trust=())
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


def test_the_trained_length_of_an_imported_model_is_that_of_its_own_config(tool, models, tmp_path, monkeypatch, capsys):
    planned, c = planned_of(tool, monkeypatch), models_config(models)
    with jax.set_mesh(mesh_of()):
        checkpoints = checkpoint.Checkpoints(tmp_path / "model", keep=1, every=1)
        checkpoints.save(0, {"params": random_params(c.model)}, {"stage_steps": [], "stage": {}}, config.to_dict(c))
        checkpoints.close()
    path = tmp_path / "model" / "companions" / "config.json"
    path.parent.mkdir()
    arguments = [f"--checkpoint={tmp_path}/model", "--suite=recall", f"--out={tmp_path}/out"]
    for values, trained in (({"max_position_embeddings": 256}, 256), ({}, 48)):
        path.write_text(json.dumps(values))
        run(tool, *arguments)
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
        said, code = refused(tool, capsys, *arguments)
        assert code == 2 and "companions/config.json" in said
    assert provenance.trained_length(c, tmp_path / "model", 5)[0] == 48  # trained on, by us


def test_by_default_loss_is_measured_around_the_trained_length_and_questions_are_asked_up_to_it(tool):
    with flagsaver.flagsaver():
        parse(["", "--out=x", "--checkpoint=y"])
        assert tool.lengths([64]) == {"lengths": (16, 64, 128), "engine_lengths": (2048,)}
        assert tool.lengths([16_384]) == {"lengths": (4096, 16_384, 32_768), "engine_lengths": (4096, 16_384)}
        assert tool.lengths([16_384, 64, 64])["lengths"] == (16, 64, 128, 4096, 16_384, 32_768)
    assert "twice as many; of needle, ruler, harness the first two, from 2,048 on." in flags.FLAGS["lengths"].help


def test_a_run_and_the_tool_ask_the_same_where_nobody_says_otherwise(tool, models):
    with flagsaver.flagsaver(), jax.set_mesh(mesh_of()):
        parse(["", "--out=x", "--checkpoint=y"])
        assert (tool.settings([64]).depths, tool.settings([64]).seed) == (suite.DEPTHS, suite.SEED)
        c, params, _ = tool.loading.load(f"{models}/one", 7)
        engine = Engine(params, c, EngineOptions(tool.CHUNK.value, batch_size=tool.BATCH_SIZE.value))
    options = evaluation._engine_options(models_config(models), engine.mesh, [48])
    assert (options.chunk, options.batch_size) == (engine.chunk, engine.batch_size)


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_measures_the_rest(tool, models, tmp_path, capsys):
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
    run(tool, *arguments)
    assert capsys.readouterr().out.splitlines()[-1] == f"report  {tmp_path}/report.html"
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [(r["source"], r["length"]) for r in records_of(tmp_path / "one")] == [
        (task, length) for length in (32, 64) for task in ("recall", "mqar", "copy", "tracking")
    ]


def test_answers_end_where_the_files_of_an_imported_model_say(tool, models, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.loading, "stop_tokens", lambda checkpoint, tokenizer: [5, tokenizer.eos])
    monkeypatch.setattr(tool.suite, "measure_units", lambda context, *_: found.append(context.stop_tokens))
    monkeypatch.setattr(tool.report, "read", lambda directory: None)
    monkeypatch.setattr(tool.report, "write", lambda out, runs: None)
    found = []
    run(tool, f"--checkpoint={models}/one", "--suite=recall", f"--out={tmp_path}")
    assert found == [[5, ByteTokenizer.eos]]


def test_a_run_is_the_same_however_its_checkpoint_is_written_and_tells_each_revision(tool, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    monkeypatch.setattr(tool.report, "write", lambda out, runs: None)
    arguments = ["--suite=position", "--lengths=32", "--tokens=100", f"--out={tmp_path}"]
    run(tool, "--checkpoint=one/", *arguments, "--heldout=text=0.txt", trust=())
    (unit,) = (tmp_path / "one" / "units").iterdir()
    about, before = tmp_path / "one" / "run.json", unit.stat().st_mtime_ns
    about.write_text(json.dumps(json.loads(about.read_text()) | {"revision": "of before"}))
    (tmp_path / "copied.txt").write_bytes((models / "0.txt").read_bytes())
    run(tool, f"--checkpoint={models}/one", *arguments, f"--heldout=text={tmp_path}/copied.txt", trust=())
    assert unit.stat().st_mtime_ns == before and json.loads(about.read_text())["revision"] == "of before"
    assert json.loads(about.read_text())["data"]["heldout"] == [f"text={tmp_path}/copied.txt"]
    monkeypatch.setattr(provenance, "revision", lambda file: "of now")
    for _ in range(2):
        unit.unlink()
        run(tool, "--checkpoint=one/", *arguments, "--heldout=text=0.txt", trust=())
        assert unit.exists() and json.loads(about.read_text())["revision"] == "of before, of now"


def test_other_weights_under_the_same_name_are_another_evaluation(tool, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.report, "write", lambda out, runs: None)
    (tmp_path / "one").symlink_to(models / "one")
    arguments = [f"--checkpoint={tmp_path}/one", "--suite=position", "--lengths=32", "--tokens=100", f"--out={tmp_path}/out"]
    run(tool, *arguments)
    (tmp_path / "one").unlink()
    (tmp_path / "one").symlink_to(models / "two")
    said, code = refused(tool, capsys, *arguments)
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


def test_what_is_wrong_with_one_model_is_said_before_another_is_measured(tool, models, tmp_path, monkeypatch, capsys):
    described = tool.loading.described

    def broken(directory, step):
        if "two" in directory:
            raise ValueError("two is broken")
        return described(directory, step)

    monkeypatch.setattr(tool.loading, "described", broken)
    monkeypatch.setattr(tool.suite, "measure_units", lambda *_: pytest.fail("measured the first"))
    models = [f"--checkpoint={models}/{name}" for name in ("one", "two")]
    assert refused(tool, capsys, *models, "--suite=recall", f"--out={tmp_path}") == ("error: two is broken", 2)


def test_parameters_are_loaded_once_and_one_model_after_the_other(tool, models, tmp_path, monkeypatch):
    steps, load, read_params = [], tool.loading.load, checkpoint.read_params
    monkeypatch.setattr(tool.suite, "measure_units", lambda context, *_: steps.append(sorted(context.eval_model.params)))
    monkeypatch.setattr(tool.report, "read", lambda directory: None)
    monkeypatch.setattr(tool.report, "write", lambda out, runs: None)
    monkeypatch.setattr(checkpoint, "read_params", lambda *arguments: steps.append("load") or read_params(*arguments))
    run(tool, *(f"--checkpoint={models}/{name}" for name in ("one", "two")), "--suite=recall", f"--out={tmp_path}")
    with jax.set_mesh(mesh_of()):
        params = sorted(load(f"{models}/one").params)
    assert steps[:-1] == ["load", params, "load", params]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite=needel"], "'harness'; did you mean 'needle'?"),
        (["--lengths=4K"], "--lengths=4K has '4K', which is no number of tokens"),
        (["--lengths=1"], "--lengths=1: 1 tokens hold no question; use more"),
        (["--depths=50,120"], "--depths=50,120 must lie between 0 and 100 percent"),
        (["--lengths="], "--lengths= names none; leave it out for the default"),
        (["--depths="], "--depths= names none"),
        (["--lengths=4096", f"--batch_size={2**50}"], "use shorter --lengths, or a smaller --batch_size"),
        (["--rows=2"], "--rows is now called --batch_size"),
        (["--text=blank.txt"], "blank.txt has no word; name files with text"),
        (["--text=empty.txt"], "empty.txt has no word; name files with text"),
        (["--out="], "--out= is empty; name a directory"),
        (["--checkpoint="], "--checkpoint= is empty; name a directory"),
        (["--out=blank.txt"], "--out=blank.txt is a file; name a directory"),
        (["--out=blank.txt/x"], "blank.txt/x: Not a directory"),
        (["--checkpoint=blank.txt"], "blank.txt is no directory; name a run's workdir"),
        (["--mesh=tensors=2"], "--mesh=tensors=2 names 'tensors', and has only slice, data, fsdp, context, tensor"),
        (["--suite=recall", "--lengths=50", "--mesh=context=4"], "recall of recall: length 50 does not split over 4 context"),
        (["--checkpoint=three", "--suite=recall", "--lengths=48", "--mesh=context=4"], "ulysses splits the 2 key/value heads"),
        (["--compat", "--suite=position"], "--compat is of --suite=ruler, and this is --suite=position"),
        (["--compat", "--suite=ruler"], "RULER's own words need the package wonderwords; pip install wonderwords"),
        (["--english_words=x.json"], "--english_words is for RULER's own prompts; give --compat, too"),
        (["--samples=0"], "flag --samples=0: 0 is not a positive integer"),
        (["--text=nowhere/*.txt"], "'nowhere/*.txt' matches no file"),
        (["--squad=nowhere.json"], "nowhere.json"),
        (["--suite=needle", "--lengths=64"], "sample 0 of needle at depth 0 does not fit into 64 tokens"),
        (["--step=3"], "has no complete checkpoint of step 3; it has 7"),
        (["--checkpoint=x", "--step=7", "--step=8", "--step=9"], "--step is given 3 times for 2 checkpoints; give one for all"),
        (["--suite=position", "--depths=50"], "--depths is of --suite=needle, and this is --suite=position"),
        (["--suite=position", "--text=x"], "--text is of --suite=needle or ruler, and this is --suite=position"),
        (
            ["--suite=recall", "--heldout=a=x.txt"],
            "--heldout is of --suite=position or attention_mass or key_tokens, and this is",
        ),
        (["--heldout=a=blank.txt", *TRUSTED], "--heldout replaces them; leave one out"),
        (["--suite=full", "--task_path=x"], "--task_path=x is where --tasks lie, and there are none; name some"),
        (["--tasks=arc"], "--tasks=arc is of --suite=harness or full, and this is --suite=quick"),
        (["--suite=harness"], "--suite=harness asks lm-evaluation-harness, and for no task; name some with --tasks"),
        (["more"], "'more' is no flag"),
        (["--samples=1000000000"], "questions take"),
        (["--suite=ruler", "--lengths=1000000000000"], "use fewer --samples, or shorter --lengths"),
        (["--suite=position", "--lengths=1000000000000"], "activations of a sequence of 1,000,000,000,000 tokens take"),
        (["--suite=recall", "--lengths=500000000"], "activations of a sequence of 500,000,000 tokens take"),
        (["--suite=recall", "--tokens=1000000000000000", "--lengths=64"], "sequences of 64 tokens; use at most 67108864"),
        (["--suite=ruler", "--ruler_tasks=cvt"], "did you mean 'vt'?"),
        (["--suite=ruler", "--ruler_tasks="], "--ruler_tasks= names none"),
        (["--suite=position", "--ruler_tasks=vt"], "--ruler_tasks is of --suite=ruler, and this is --suite=position"),
        (["--heldout=x.txt"], "--heldout=x.txt has not the form NAME=FILES"),
        (["--heldout=a=x.txt", "--heldout=a=y.txt"], "--heldout names 'a' twice"),
        (["--heldout=a=nowhere.txt"], "nowhere.txt' matches no file"),
        (["--heldout=../a=x.txt"], "has not the form NAME=FILES"),
        (["--mesh=context=0"], "context=0"),
        (["--mesh=context=1000000"], "devices"),
        (["--mesh=context"], "context='' must be of type int"),
        (["--seed=100000000000000000000"], "seed"),
        (["--squad=deep.json"], "deep.json is no file of SQuAD 2.0"),
        (["--text=records.jsonl"], "records.jsonl is packed or has records; name files of plain text"),
        (["--depths=nan"], "--depths=nan must lie between 0 and 100 percent"),
    ],
)
def test_what_cannot_be_evaluated_is_a_line(tool, models, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wonderwords.random_word", None)
    Path("blank.txt").write_text(" \n")
    Path("empty.txt").touch()
    Path("deep.json").write_text("[" * 100_000)
    Path("records.jsonl").write_text('{"text": "a"}')
    no_text = any(x.startswith("--text") or x in ("--suite=position", "--suite=recall", "--suite=harness") for x in arguments)
    text = [] if no_text else [f"--text={models}/*.txt"]
    trust = () if any(x.startswith("--heldout") for x in arguments) else TRUSTED
    Path("three").symlink_to(models / "three")
    error, code = refused(tool, capsys, f"--checkpoint={models}/one", f"--out={tmp_path}/out", *text, *arguments, trust=trust)
    assert code == 2 and said in error and not list(tmp_path.glob("**/run.json"))
