import ast
import contextlib
import dataclasses
import errno
import glob
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REFERENCE, tiny
from trained import STEPS, config_of, losses, stage, train_until

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.data import corpora
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.evals.records import is_total
from hybrid_attn.evals.table import EVALS
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train import loop, resume
from hybrid_attn.train import step as step_module
from hybrid_attn.train.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("known_peak_and_no_pictures")


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("straight")
    assert loop.train(config_of(corpus, **{"evals.lengths": (1.0, 2.0)}), workdir)
    return workdir


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_resumed_run_has_the_losses_of_a_straight_one_bit_for_bit(corpus, straight, tmp_path, capsys, step):
    train_until(step, config_of(corpus), tmp_path)
    stopped = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert step <= stopped < STEPS
    assert f"stopped after step {stopped}" in capsys.readouterr().out
    assert loop.train(config_of(corpus), tmp_path)
    assert f"step {stopped} found" in capsys.readouterr().out
    assert losses(tmp_path) == losses(straight)
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))


def test_resume_from_an_older_checkpoint_replays_the_same_losses(corpus, straight, tmp_path):
    assert loop.train(config_of(corpus), tmp_path)
    newest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    for file in (tmp_path / "checkpoints" / str(newest) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert loop.train(config_of(corpus), tmp_path)
    assert losses(tmp_path) == losses(straight)


@pytest.mark.slow
def test_resume_over_the_edge_of_a_stage_and_its_mixture_equals_a_straight_run(corpus, tmp_path, capsys):
    sources = {"all": base.source(paths=(corpus,)), "long": base.source(paths=(corpus,), min_length=600)}
    stages = [stage(3, 24, 16) | {"mixture": {"all": 1.0}}, stage(3, 48, 8) | {"mixture": {"all": 0.4, "long": 0.6}}]
    stages[1]["name"] = "extension"
    c = config_of(corpus, stages=stages, **{"data.sources": sources, "data.packing": "best_fit"})
    assert loop.train(c, tmp_path / "straight")
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("source ")]
    rows = corpora.load(c.data, ["all"], load_tokenizer("bytes"))["all"].training.lengths.sum() / 24
    named = ["stage 1, all", "stage 2 extension, all", "stage 2 extension, long"]
    assert [line.removeprefix("source       ").split(":")[0] for line in lines] == named
    assert float(lines[0].split("; ")[-1].removesuffix(" epochs")) == pytest.approx(3 * 16 / rows, rel=0.02)
    evals = [json.loads(line) for line in (tmp_path / "straight" / "evals.jsonl").read_text().splitlines()]
    assert [record["source"] for record in evals if record["eval"] == "bigram"] == ["all", "long"]
    steps = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [x["stage_name"] for x in steps] == ["1"] * 3 + ["extension"] * 3
    assert [x["tokens_seen"] for x in steps] == [384 * i for i in range(1, 7)]
    assert {(x["stage_name"], x["tokens_seen"]) for x in evals} == {("extension", 6 * 384)}
    assert "\nstep 4/6  stage 2/2 extension of 48  loss " in said
    for step in (2, 3):
        train_until(step, c, tmp_path / f"stopped{step}")
        assert loop.train(c, tmp_path / f"stopped{step}")
        assert losses(tmp_path / f"stopped{step}") == losses(tmp_path / "straight")


@pytest.mark.slow
def test_a_run_on_synthetic_sequences_resumes_and_ends_with_its_share_of_right_answers(corpus, tmp_path, capsys):
    sources = {"probe": base.source(task="recall", pairs=2), "text": base.source(paths=(corpus,))}
    mixed = stage(STEPS, 48, 8) | {"mixture": {"probe": 0.5, "text": 0.5}}
    c = config_of(corpus, stages=[mixed], **{"data.sources": sources, "evals.lengths": (1.0, 2.0)})
    assert loop.train(c, tmp_path / "straight")
    assert "source       probe: recall of 2 pairs, sequences of 24 to 48 tokens, new in every step\n" in capsys.readouterr().out
    evals = [json.loads(line) for line in (tmp_path / "straight" / "evals.jsonl").read_text().splitlines()]
    printed = [(line["source"], line["length"], line["answers"]) for line in evals if line["eval"] == "recall"]
    assert printed == [("probe", 48, 17), ("probe", 96, 10)]  # nine and five rows, of whose two pairs one is not asked for
    assert all(0 <= line["accuracy"] <= 1 for line in evals if line["eval"] == "recall")
    assert {line["source"] for line in evals if line["eval"] != "recall"} == {"text"}
    train_until(2, c, tmp_path / "stopped")
    assert loop.train(c, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_a_run_is_evaluated_as_often_as_the_config_says_and_each_time_once(corpus, tmp_path):
    c = config_of(corpus, **{"evals.every": 2, "train.log_every": 1})
    train_until(4, c, tmp_path)
    assert loop.train(c, tmp_path)
    evals = [json.loads(line) for line in (tmp_path / "evals.jsonl").read_text().splitlines()]
    whole = [(line["step"], line["loss"]) for line in evals if line["eval"] == "position" and is_total(line)]
    assert [step for step, _ in whole] == [*range(2, STEPS, 2), STEPS] and whole[0][1] > whole[-1][1]
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_the_batches_of_a_stage_in_its_middle_cannot_change_and_those_of_the_next_can(corpus, tmp_path, monkeypatch):
    sources = {"all": base.source(paths=(corpus,)), "long": base.source(paths=(corpus,), min_length=600)}
    mixed = stage(3, 24, 16) | {"mixture": {"all": 0.5, "long": 0.5}}

    def with_stages(*stages, sources=sources):
        return config_of(corpus, stages=list(stages), **{"data.sources": sources})

    train_until(1, with_stages(mixed), tmp_path)
    (done,) = checkpoint.steps(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=rf"mixture.long: 0.5 -> 0.2\n.*stages\[0\].steps={done}"):
        loop.train(with_stages(mixed | {"mixture": {"all": 0.8, "long": 0.2}}), tmp_path)
    with pytest.raises(ValueError, match=r"(?s)documents.long: \w+ -> \w+\n"):
        loop.train(with_stages(mixed, sources=sources | {"long": base.source(paths=(corpus,), min_length=700)}), tmp_path)
    with pytest.raises(ValueError, match=r"(?s)batch: 16 -> 8\n.*seq_len: 24 -> 48\n"):
        loop.train(with_stages(stage(3, 48, 8) | {"mixture": mixed["mixture"]}), tmp_path)
    monkeypatch.setitem(OBJECTIVES, "another", OBJECTIVES["next_token"])
    with pytest.raises(
        ValueError, match=rf"(?s)another objective.*objective: next_token -> another\n.*stages\[0\].steps={done}"
    ):
        loop.train(with_stages(mixed | {"objective": "another"}), tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in glob.glob(corpus):
        shutil.copy(path, elsewhere)
    moved = {name: base.source(paths=(f"{elsewhere}/*.txt",), min_length=x.min_length) for name, x in sources.items()}
    ended = mixed | {"steps": done}
    assert loop.train(with_stages(ended, stage(1, 48, 8) | {"mixture": {"all": 1.0}}, sources=moved), tmp_path)
    assert list(losses(tmp_path)) == list(range(1, done + 2))


@pytest.mark.parametrize(
    "identity", [pytest.param({}, id="older", marks=pytest.mark.slow), pytest.param({"objective": "next_token"}, id="saved")]
)
def test_the_objective_of_a_stage_in_its_middle_cannot_change_and_older_checkpoints_have_next_token(identity, tmp_path):
    c = tiny({"stages": [stage(4, 48, 8)]})
    mesh = make_mesh(c.mesh)
    with jax.set_mesh(mesh), contextlib.closing(checkpoint.Checkpoints(tmp_path, 1, 1)) as checkpoints:
        state = jax.jit(step_module.init_state, static_argnums=0)(c)
        checkpoints.save(2, state, {"stage_steps": [2], "stage": identity}, config.to_dict(c), wait=True)
        assert loop.first_state(c, [resume.OLDER_STAGE], mesh, checkpoints)[1] == 2
        with pytest.raises(ValueError, match=r"another objective there \(saved -> new\):\n  objective: next_token -> other\n"):
            loop.first_state(c, [resume.OLDER_STAGE | {"objective": "other"}], mesh, checkpoints)


def test_training_lowers_the_loss_and_ends_with_the_held_out_report(straight, capsys):
    values = losses(straight)
    assert values[STEPS] < values[1]
    evals = [json.loads(line) for line in (straight / "evals.jsonl").read_text().splitlines()]
    totals = [record for record in evals if record["eval"] == "position" and is_total(record)]
    assert [record["length"] for record in totals] == [48, 96]
    assert [record["eval"] for record in evals].count("bigram") == 1
    first = json.loads((straight / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s", "step_time", "mfu", "data_wait"} <= set(first)


@pytest.mark.slow
def test_a_run_takes_the_product_of_its_execution(corpus, tmp_path):
    """The products of training have 48 tokens of a sequence, those of evaluation 96."""
    lengths = set()

    def dot(x, weight, dimension_numbers, **options):
        lengths.add(x.shape[1])
        return jax.lax.dot_general(x, weight, dimension_numbers, **options)

    c = config_of(corpus, **{"stages": [stage(1, 48, 8)], "evals.names": ("position",)})
    assert loop.train(c, tmp_path, execution=REFERENCE._replace(dot=dot))
    assert {48, 96} <= lengths


def poisoned_at(monkeypatch, number):
    """Has the step of that number, from 1, meet parameters that are no numbers."""
    make_steps = loop.make_steps

    def poisoned(*arguments, **options):
        (step,) = make_steps(*arguments, **options)

        def poison(state, batch):
            if int(state.step) == number - 1:
                bad = jax.tree.map(lambda x: x * np.float32("nan"), state.params)
                state = state._replace(params=bad)
            return step(state, batch)

        return [poison]

    monkeypatch.setattr(loop, "make_steps", poisoned)


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    poisoned_at(monkeypatch, 4)
    with pytest.raises(FloatingPointError, match="step 4: loss is nan.*the checkpoint of step 2 is kept"):
        loop.train(config_of(corpus), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]


def test_a_batch_that_gives_nan_is_skipped_and_who_resumes_without_the_flag_keeps_it_skipped(
    corpus, straight, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        poisoned_at(patch, 4)
        with pytest.raises(FloatingPointError, match="pass over the batch with --skip_steps=4$"):
            loop.train(config_of(corpus), tmp_path)
        train_until(4, config_of(corpus), tmp_path, skip_steps=[(4, 4)])
    assert checkpoint.read_data(tmp_path / "checkpoints")["skipped_steps"] == [[4, 4]]
    with pytest.raises(ValueError, match="--skip_steps=3:5: the checkpoint of step 4 was trained on steps 3 to 4"):
        loop.train(config_of(corpus), tmp_path, skip_steps=[(3, 5)])
    capsys.readouterr()
    assert loop.train(config_of(corpus), tmp_path)
    assert "skipped      steps 4: their batches are passed over\n" in capsys.readouterr().out
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (tmp_path, straight)
    )
    assert [line["loss"] for line in ours[:3]] == [line["loss"] for line in theirs[:3]]
    position = {"stage": 1, "stages": 1, "stage_name": "1", "tokens_seen": 3 * 48 * 8}
    reason = "its batch is passed over, as --skip_steps or a rollback says"
    assert ours[3] == {"step": 4, **position, "skipped": True, "reason": reason}
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in ours[4:]] == [line["lr"] for line in theirs[4:]]
    assert all(a["loss"] != b["loss"] for a, b in zip(ours[4:], theirs[4:], strict=True))
    assert ours[-1]["tokens_seen"] == theirs[-1]["tokens_seen"] - 48 * 8
    assert checkpoint.read_data(tmp_path / "checkpoints")["skipped_steps"] == [[4, 4]]


@pytest.mark.slow
def test_a_finished_run_goes_on_at_its_last_rate_or_is_allowed_to_jump(corpus, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    longer = {"stages": [stage(STEPS + 2, 48, 8)], "evals.names": ()}
    with pytest.raises(ValueError, match=r"(?s)jump from 0.0006 to 0.00\d+ at step 7.*stages\[0\].steps: 6 -> 8\n") as refused:
        loop.train(config_of(corpus, **longer), tmp_path / "run")
    assert not (tmp_path / "run/config_until_6.json").exists()
    held = dict(re.findall(r"--config\.(optim\.\w+)=(\S+)", str(refused.value)))
    held = {key: value if key == "optim.schedule" else ast.literal_eval(value) for key, value in held.items()}
    capsys.readouterr()
    assert loop.train(config_of(corpus, **longer, **held), tmp_path / "run")
    said = capsys.readouterr().out
    assert "             optim.lr: 0.006 -> 0.0006\n" in said and "             evals.names: ['position'" in said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[STEPS]["lr"] == pytest.approx(lines[STEPS - 1]["lr"])
    assert (tmp_path / "run/config_until_6.json").read_text() == (straight / "config.json").read_text()
    assert json.loads((tmp_path / "run/config.json").read_text())["optim"]["schedule"] == "wsd"
    shutil.copytree(straight, tmp_path / "allowed")
    assert loop.train(config_of(corpus, **longer), tmp_path / "allowed", allow_lr_jump=True)
    assert re.search(r"rate +jumps from 0.0006 to 0.00\d+ at step 7, as --allow_lr_jump", capsys.readouterr().out)


@pytest.mark.parametrize("changes", [{}, {"optim.lr": 0.5, "mesh.fsdp": 4}], ids=["as_before", "other_rate_and_mesh"])
def test_a_finished_run_with_nothing_left_to_train_says_so_and_changes_nothing(corpus, straight, monkeypatch, capsys, changes):
    before = {path: path.read_bytes() for path in straight.rglob("*.json*")}
    failing = EVALS["position"]._replace(measure=lambda *_: pytest.fail("measured again"))
    monkeypatch.setitem(EVALS, "position", failing)
    assert loop.train(config_of(corpus, **{"evals.lengths": (1.0, 2.0)}, **changes), straight)
    said = capsys.readouterr().out
    assert f"nothing left to train: {STEPS} steps are done; add steps or a stage\n" in said
    assert f"report       {straight}/evals/{STEPS}/report.html\n" in said and "tools/generate.py" in said
    assert before == {path: path.read_bytes() for path in straight.rglob("*.json*")}


@pytest.mark.parametrize(
    "records, said",
    [
        ({"imported": "cohere2 from a/directory"}, "step 0 found; restored parameters of cohere2 from a/directory\n"),
        (
            {},
            "step 0 found: a run that was stopped before its first step\n"
            "config       differs from that of the checkpoint of step 0 (old -> new):\n"
            "             optim.lr: 0.006 -> 0.5\n             seed: 0 -> 1\n",
        ),
    ],
    ids=["import", "stopped"],
)
def test_a_run_that_starts_from_parameters_says_whose_they_are(corpus, tmp_path, capsys, records, said):
    c = config_of(corpus, stages=[stage(1, 48, 8)], **{"evals.names": ()})
    with jax.set_mesh(make_mesh(c.mesh)):
        state = jax.jit(loop.init_state, static_argnums=0)(c)
        checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
        checkpoints.save(0, state, {"stage_steps": [], "stage": {}, **records}, config.to_dict(c), wait=True)
        checkpoints.close()
    other = dataclasses.replace(c, seed=1, optim=dataclasses.replace(c.optim, lr=0.5))
    assert loop.train(other, tmp_path)
    printed = capsys.readouterr().out
    assert f"checkpoint   {said}" in printed and ("differs" in printed) == ("imported" not in records)
    assert checkpoint.read_data(tmp_path / "checkpoints").items() >= records.items()


def test_the_config_of_a_run_is_in_its_workdir(corpus, straight):
    c = config_of(corpus, **{"evals.lengths": (1.0, 2.0)})
    assert json.loads((straight / "config.json").read_text()) == config.to_dict(c)


def test_workdir_of_another_model_is_refused_by_field(corpus, straight):
    with pytest.raises(ValueError, match=r"(?s)model\.d_ff: 48 -> 56.*another --workdir"):
        loop.train(config_of(corpus, **{"model.d_ff": 56}), straight)


def test_another_function_of_the_same_parameters_is_refused_until_the_stage_names_it(corpus, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    more = stage(2, 48, 8)
    changes = {"model.kinds.L.window": 7, "optim.schedule": "wsd", "optim.lr": 6e-4, "optim.warmup_steps": 0, "evals.names": ()}
    with pytest.raises(ValueError, match=r"model.kinds.L.window: 5 -> 7\n.*stages\[1\].model_changes=model.kinds.L.window$"):
        loop.train(config_of(corpus, stages=[stage(STEPS, 48, 8), more], **changes), tmp_path / "run")
    more["model_changes"] = ("model.kinds.L.window",)
    assert loop.train(config_of(corpus, stages=[stage(STEPS, 48, 8), more], **changes), tmp_path / "run", allow_lr_jump=True)
    assert "model        model.kinds.L.window: 5 -> 7, as stages[1].model_changes says\n" in capsys.readouterr().out
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 3))


def test_a_full_disk_at_a_line_of_metrics_saves_first_and_records_outlive_their_checkpoints(
    corpus, straight, tmp_path, monkeypatch, capsys
):
    def full(self, number, *_, log=loop.Metrics.log):
        if number >= 3:
            raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/metrics.jsonl")
        log(self, number, *_)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Metrics, "log", full)
        with pytest.raises(OSError, match=rf"^{tmp_path}/metrics.jsonl: No space left on device; step \d is saved; "):
            loop.train(config_of(corpus), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] in (3, 4)
    shutil.rmtree(tmp_path / "checkpoints")
    capsys.readouterr()
    assert loop.train(config_of(corpus, **{"train.keep": 7}), tmp_path)
    said = capsys.readouterr().out
    assert f"kept         the old metrics.jsonl as {tmp_path}/metrics.jsonl.old; the run starts at step 0\n" in said
    assert f"kept         the old config.json as {tmp_path}/config.json.old\n" in said
    keeps = [json.loads((tmp_path / name).read_text())["train"]["keep"] for name in ("config.json.old", "config.json")]
    assert keeps == [config_of(corpus).train.keep, 7]
    assert len((tmp_path / "metrics.jsonl.old").read_text().splitlines()) == 2
    assert losses(tmp_path) == losses(straight)


def test_processes_that_read_other_documents_from_the_same_paths_do_not_agree(corpus, tmp_path, monkeypatch):
    class Recorder:
        def agree(self, run):
            found.append(run)
            raise ValueError("compared")

    found = []
    for name, added in (("a", ""), ("b", ""), ("c", "x")):
        (tmp_path / name).mkdir()
        for path in glob.glob(corpus):
            (tmp_path / name / os.path.basename(path)).write_text(Path(path).read_text() + added)
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(ValueError, match="compared"):
            loop.train(config_of("*.txt"), "run", Recorder())
    same, ours, theirs = found
    assert same == ours
    different = {field for field in ours if ours[field] != theirs[field]}
    assert different == {"training documents of text", "held-out documents of text"} and ours["tokenizer"] == "bytes"


def test_a_signal_in_the_evaluation_ends_it_with_everything_saved(corpus, straight, monkeypatch, capsys):
    stopping = EVALS["position"]._replace(measure=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setitem(EVALS, "position", stopping)
    assert not loop.train(config_of(corpus), straight)
    assert f"stopped in the evaluation; all {STEPS} steps are saved" in capsys.readouterr().out
