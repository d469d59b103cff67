"""What the program that evaluates checkpoints refuses, in one line and before it writes anything."""

import os
import sys
from pathlib import Path

import pytest
from evaluate_program import TRUSTED, refused

from hybrid_attn import files


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
def test_a_directory_with_files_of_others_is_refused_and_left_as_it_is(evaluate, models, tmp_path, capsys, content):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    said, code = refused(evaluate, capsys, f"--checkpoint={models}/one", "--suite=recall", "--lengths=32", f"--out={tmp_path}")
    assert code == 2 and "has files that no evaluation wrote" in said and "name a new or an empty directory" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_of_evaluations_is_new_or_known_by_its_marker_and_has_no_links(evaluate, tmp_path):
    new, marked = tmp_path / "new", tmp_path / "marked"
    files.write_atomically(marked / evaluate.MARKER, evaluate.MARKED)
    (marked / "notes.txt").touch()
    for directory in (new, marked):
        evaluate.check_ours(directory)
    assert not new.exists()
    (marked / "pictures").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"marked has links \(pictures\), which lead to files elsewhere; remove them"):
        evaluate.check_ours(marked)


@pytest.mark.parametrize("name", ["evals", "evals/40", "mine"])
def test_nothing_is_evaluated_into_the_workdir_of_a_training(evaluate, tmp_path, name):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    files.write_atomically(tmp_path / name / evaluate.MARKER, evaluate.MARKED)
    with pytest.raises(ValueError, match=f"{name} is in the workdir of a training, which writes there itself; name a"):
        evaluate.check_ours(tmp_path / name)
    evaluate.check_ours(tmp_path / "evals" / "of" / "others")


def test_one_program_at_a_time_measures_into_a_directory(evaluate, models, tmp_path, capsys):
    arguments = [f"--checkpoint={models}/one", "--suite=recall", "--lengths=32", "--tokens=300", f"--out={tmp_path}"]
    with files.lock(tmp_path):
        said, code = refused(evaluate, capsys, *arguments)
    assert code == 1 and said.startswith(f"error: {tmp_path} is in use by process {os.getpid()} on ")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_is_wrong_with_one_model_is_said_before_another_is_measured(evaluate, models, tmp_path, monkeypatch, capsys):
    described = evaluate.loading.described

    def broken(directory, step):
        if "two" in directory:
            raise ValueError("two is broken")
        return described(directory, step)

    monkeypatch.setattr(evaluate.loading, "described", broken)
    monkeypatch.setattr(evaluate.suite, "measure_units", lambda *_: pytest.fail("measured the first"))
    models = [f"--checkpoint={models}/{name}" for name in ("one", "two")]
    assert refused(evaluate, capsys, *models, "--suite=recall", f"--out={tmp_path}") == ("error: two is broken", 2)


JUDGED = ["--suite=win_rate", "--judge=three"]


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
        (["--mesh=tensors=2"], "--mesh=tensors=2 names 'tensors', and has only slice, data, fsdp, expert, context, tensor"),
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
            "--heldout is of --suite=position or attention_mass or key_tokens or languages or routing or preferences, and",
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
        (["--suite=routing"], "12, 48, 96; routing of experts: no layer of the model has any"),
        (["--suite=preferences"], "12, 48, 96; preferences of pairs: the model's sources hold none out"),
        (["--suite=win_rate"], "--suite=win_rate needs --prompts=FILE and --judge=CHECKPOINT"),
        (["--suite=full", "--prompts=p.jsonl"], "--suite=full needs --prompts=FILE and --judge=CHECKPOINT"),
        (["--suite=position", "--judge=x"], "--judge is of --suite=win_rate, and this is --suite=position"),
        (["--suite=position", "--temperature=1"], "--temperature is of --suite=win_rate, and this is --suite=position"),
        (["--suite=position", "--temperature=0"], "--temperature is of --suite=win_rate, and this is --suite=position"),
        (["--suite=full", "--max_new_tokens=9"], "--max_new_tokens: no answers are judged; give --prompts=FILE and --judge="),
        ([*JUDGED, "--prompts=none.jsonl"], "none.jsonl: No such file or directory"),
        ([*JUDGED, "--prompts=bad.jsonl"], "bad.jsonl:2: the field 'messages' has no message"),
        ([*JUDGED, "--prompts=p.jsonl", "--judge=none"], "none is no directory; name a run's workdir"),
        ([*JUDGED, "--prompts=p.jsonl", "--top_p=2"], "top_p=2.0 must be above 0 and at most 1"),
        ([*JUDGED, "--prompts=p.jsonl", "--temperature=0", "--top_p=0.5"], "top_p=0.5 changes nothing at temperature=0"),
        ([*JUDGED, "--prompts=p.jsonl", "--lengths=32"], "p.jsonl:1 and 256 new ones do not fit into 32"),
        ([*JUDGED, "--prompts=p.jsonl"], "p.jsonl:1 and 256 of an answer do not fit into the 48 tokens of a sequence"),
        (["--mesh=context=1000000"], "devices"),
        (["--mesh=context"], "context='' must be of type int"),
        (["--seed=100000000000000000000"], "seed"),
        (["--squad=deep.json"], "deep.json is no file of SQuAD 2.0"),
        (["--text=records.jsonl"], "records.jsonl is packed or has records; name files of plain text"),
        (["--depths=nan"], "--depths=nan must lie between 0 and 100 percent"),
    ],
)
def test_what_cannot_be_evaluated_is_a_line(evaluate, models, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wonderwords.random_word", None)
    Path("blank.txt").write_text(" \n")
    Path("empty.txt").touch()
    Path("deep.json").write_text("[" * 100_000)
    Path("records.jsonl").write_text('{"text": "a"}')
    Path("p.jsonl").write_text('{"prompt": "one"}\n')
    Path("bad.jsonl").write_text('{"prompt": "one"}\n{"messages": []}\n')
    without_text = [f"--suite={name}" for name in ("position", "recall", "routing", "preferences", "win_rate", "harness")]
    no_text = any(x.startswith("--text") or x in without_text for x in arguments)
    text = [] if no_text else [f"--text={models}/*.txt"]
    trust = () if any(x.startswith("--heldout") for x in arguments) else TRUSTED
    Path("three").symlink_to(models / "three")
    error, code = refused(
        evaluate, capsys, f"--checkpoint={models}/one", f"--out={tmp_path}/out", *text, *arguments, trust=trust
    )
    assert code == 2 and said in error and not list(tmp_path.glob("**/run.json"))


@pytest.mark.parametrize("arguments", [["--prompts=none.jsonl", "--judge=one"], ["--prompts=p.jsonl", "--judge=none"]])
def test_nothing_is_written_where_there_are_no_prompts_or_there_is_no_judge(evaluate, models, tmp_path, capsys, arguments):
    named = [x.replace("=", f"={tmp_path}/" if "prompts" in x else f"={models}/") for x in arguments]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n')
    flags = [f"--checkpoint={models}/one", f"--out={tmp_path}/out", "--suite=win_rate", *named]
    _, code = refused(evaluate, capsys, *flags, trust=())
    assert code == 2 and not (tmp_path / "out").exists()
