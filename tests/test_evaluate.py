"""The tool that evaluates checkpoints: from flags to a report, and what it refuses."""

import json

import conftest
import jax
import pytest
from absl.testing import flagsaver
from conftest import mesh_of, random_params, tiny

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.programs import parse


@pytest.fixture(scope="module")
def tool():
    with conftest.tool("evaluate") as module:
        yield module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two workdirs of untrained models, and the text that is theirs."""
    folder = tmp_path_factory.mktemp("models")
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of document {i}.\n" for j in range(20)))
    c = tiny({"data.sources": {"text": base.source(paths=(f"{folder}/*.txt",))}})
    for name, seed in (("one", 0), ("two", 1)):
        with jax.set_mesh(mesh_of()):
            checkpoints = checkpoint.Checkpoints(folder / name / "checkpoints", keep=1, every=1)
            state = {"params": random_params(c.model, seed)}
            checkpoints.save(7, state, {"stage_steps": [7], "stage": {"tokenizer": "bytes"}}, config.to_dict(c))
            checkpoints.close()
    return folder


def run(tool, *arguments):
    with flagsaver.flagsaver():
        tool.main(parse(["evaluate.py", *map(str, arguments)]))


def test_checkpoints_are_evaluated_compared_and_reported(tool, models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    checkpoints = [f"--checkpoint={models}/one", f"--checkpoint={models}/two/checkpoints/"]
    sizes = ["--suite=position,recall", "--lengths=32,96", "--tokens=300", f"--out={tmp_path}"]
    run(tool, *checkpoints, *sizes)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "one  1/10  position-text-32" and said[-1] == f"report  {tmp_path}/report.html"
    assert [line.split()[0] for line in said[:-1]] == ["one"] * 10 + ["two"] * 10
    for name in ("one", "two"):
        about = json.loads((tmp_path / name / "run.json").read_text())
        assert about["step"] == 7 and about["model"]["seq_len"] == 48 and about["settings"]["lengths"] == [32, 96]
        assert len(about["config"]) == len(about["haystack"]) == 64 and about["dtype"] == "float32"
        records = [json.loads(line) for line in (tmp_path / name / "records.jsonl").read_text().splitlines()]
        assert {(r["eval"], r["length"]) for r in records} == {(e, n) for e in ("position", "recall") for n in (32, 96)}
    page = (tmp_path / "report.html").read_text()
    assert ">one<" in page and ">two<" in page and "http" not in page.replace("http://www.w3.org/", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite=needel"], "--suite=needel names 'needel'; did you mean 'needle'?"),
        (["--lengths=4K"], "--lengths=4K has what is no number of tokens"),
        (["--lengths=1"], "--lengths=1: 1 tokens hold no question; use more"),
        (["--depths=50,120"], "--depths=50,120 must lie between 0 and 100 percent"),
        (["--samples=0"], "flag --samples=0: 0 is not a positive integer"),
        (["--text=nowhere/*.txt"], "'nowhere/*.txt' matches no file"),
        (["--squad=nowhere.json"], "nowhere.json"),
        (["--suite=needle", "--lengths=64"], "sample 0 of needle at depth 0 does not fit into 64 tokens"),
        (["--step=3"], "has no complete checkpoint of step 3; it has 7"),
        (["--tasks=arc"], "--tasks=arc is of --suite=harness or full, and this is --suite=quick"),
        (["--suite=harness"], "nothing to measure"),
        (["more"], "'more' is no flag"),
    ],
)
def test_what_cannot_be_evaluated_is_a_line(tool, models, tmp_path, capsys, arguments, said):
    text = [] if any(x.startswith("--text") for x in arguments) else [f"--text={models}/*.txt"]
    with pytest.raises(SystemExit) as ended:
        run(tool, f"--checkpoint={models}/one", f"--out={tmp_path}", *text, *arguments)
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1) and said in error
    assert not list(tmp_path.glob("*/run.json"))
