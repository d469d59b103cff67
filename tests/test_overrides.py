"""A stage overrides keys of the config: the model, the data, how it is computed, and the mesh."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny
from test_processes import ends, start_processes
from trained import EDGE, STEPS, config_of, config_of_two_meshes, losses, stage, train_until

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.data import documents, pipeline
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.infer import loading
from hybrid_attn.infer.loading import trained_length
from hybrid_attn.train import loop
from hybrid_attn.train.evaluation import Evaluations
from hybrid_attn.train.resume import check_function
from hybrid_attn.train.step import executions

pytestmark = pytest.mark.usefixtures("known_peak_and_no_pictures")
WINDOW, THETA = {"model.kinds.L.window": 9}, {"model.kinds.L.rope_theta": 500.0}


def two_stages(*overrides: dict) -> config.Config:
    return tiny({"stages": [stage(EDGE, 48, 8) | {"override": base.override(keys)} for keys in overrides]})


def test_a_stage_has_the_overridden_keys_and_the_others_of_the_run():
    c = two_stages({}, WINDOW | {"train.remat": "none", "mesh.context": 2, "optim.weight_decay": 0.3})
    first, second = c.each_stage
    assert first == dataclasses.replace(c.at(1), **{name: getattr(c, name) for name in ("model", "train", "mesh", "optim")})
    assert second.model == dataclasses.replace(
        c.model, kinds=c.model.kinds | {"L": dataclasses.replace(c.model.kinds["L"], window=9)}
    )
    assert (second.train.remat, second.mesh.context, second.mesh.data, second.optim.weight_decay) == ("none", 2, -1, 0.3)
    assert (c.train.remat, c.mesh.context, c.optim.weight_decay) == ("layer", 1, 0.1)
    assert config.build(config.to_dict(c)) == c


def test_a_group_may_be_dropped_by_none():
    """As DroPE does with RoPE (arXiv 2512.12167)."""
    assert two_stages({}, {"model.kinds.L.rope_theta": None}).at(1).model.kinds["L"].rope_theta is None


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"model.kinds.L.windw": 3},
            "config.stages[1].override.model.kinds.L.windw; did you mean",
        ),
        ({"model.kinds.Q.window": 3}, "stages[1].override.model.kinds.Q: there is no 'Q'; there are "),
        ({"model.kinds.L.window": -3}, "stages[1].override.model: model.kinds.L.window=-3 must be at least 1"),
        ({"model.kinds.L.window": "x"}, "config.stages[1].override.model.kinds.L.window='x' must be of type int"),
        ({"model.kinds.L.chunk": 8}, "stages[1].override.model: model.kinds.L: a layer type has a window or a chunk, not both"),
        (
            {"train.keep": 3},
            "override.train.keep is not possible: all stages share train.keep; of train a stage may override",
        ),
        (
            {"optim.lr": 1.0},
            "override.optim.lr is not possible: all stages share optim.lr; of optim a stage may override optim.b1",
        ),
        ({"train.context": "G=halo"}, "stages[1].override: train.context: G=halo needs a window or a chunk"),
        ({"mesh.fsdp": -1}, "stages[1].override.mesh: mesh axes data and fsdp are both -1"),
        ({"data.sources.txt.min_length": 5}, "stages[1].override.data.sources.txt: there is no 'txt'; did you mean 'text'?"),
        ({"model.init_std": 0.5}, "stages[1].override.model.init_std is not possible: all stages share model.init_std"),
        ({"seed": 3}, "unknown key config.stages[1].override.seed; did you mean config.seed?"),
    ],
)
def test_a_wrong_override_is_refused_with_its_stage_and_key(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        two_stages({}, keys)


def test_a_stage_cannot_admit_documents_that_the_run_leaves_out():
    sources = {"text": base.source(min_length=10)}
    stages = [stage(1, 48, 8) | {"override": base.override({"data.sources.text.min_length": 9})}]
    message = r"stages\[0\].override.data.sources.text.min_length=9 is below data.sources.text.min_length=10, .*; lower"
    with pytest.raises(ValueError, match=message):
        tiny({"data.sources": sources, "stages": stages})


def test_a_stage_that_would_change_the_arrays_is_refused_before_anything_is_written(corpus, tmp_path):
    stages = [stage(2, 48, 8), stage(2, 48, 8) | {"override": base.override({"model.d_ff": 64, "model.kinds.L.window": 9})}]
    with pytest.raises(ValueError, match=r"stages\[1\].override changes the arrays .*\n  model.d_ff: 48 -> 64$"):
        loop.train(config_of(corpus, stages=stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_mesh_of_each_stage_must_fit_its_batch(corpus, tmp_path):
    stages = [stage(2, 48, 8), stage(2, 48, 4) | {"override": base.override({"mesh.data": 8, "mesh.fsdp": 1})}]
    with pytest.raises(ValueError, match=r"stages\[1\]: batch 4 does not split over 8 slice \* data \* fsdp \* expert "):
        loop.train(config_of(corpus, stages=stages), tmp_path / "run")


def test_packing_and_documents_follow_the_stage():
    tokenizer = load_tokenizer("bytes")
    lengths = [7, 40, 12, 30, 21]
    text = documents.in_memory([np.full(n, n, np.uint16) for n in lengths], [1] * len(lengths))
    c = two_stages({}, {"data.packing": "best_fit", "data.sources.text.min_length": 21})
    sequences = pipeline.stage_sequences(c, {"text": text}, tokenizer)
    first, second = (x.sources["text"].counts()["documents"] for x in sequences)
    assert (first, second) == (5, 3)
    identities = pipeline.identities(c, {"text": text}, tokenizer)
    assert [x["packing"] for x in identities] == ["concat", "best_fit"]
    assert identities[0]["documents"] != identities[1]["documents"]
    read = sequences[1].read([(i, 0, 48) for i in range(6)])
    assert {int(x) for sequence in read for x in sequence["tokens"]} - {tokenizer.bos, tokenizer.eos, 0} == {21, 30, 40}


@pytest.fixture(scope="module")
def of_two_stages(corpus, tmp_path_factory):
    """Config and workdir of an uninterrupted run whose first stage has another window and microbatches; no evaluation."""
    workdir = tmp_path_factory.mktemp("two_stages")
    first = stage(EDGE, 24, 16) | {"microbatches": 2, "override": base.override(WINDOW)}
    c = config_of(corpus, stages=[first, stage(STEPS - EDGE, 48, 8)], **{"train.checkpoint_every": EDGE, "evals.names": ()})
    assert loop.train(c, workdir)
    return c, workdir


@pytest.mark.slow
def test_a_run_that_stops_at_the_edge_of_a_stage_with_another_window_and_microbatches_goes_on_as_a_straight_one(
    of_two_stages, tmp_path, capsys
):
    c, straight = of_two_stages
    train_until(EDGE, c, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == EDGE
    assert loop.train(c, tmp_path) and f"step {EDGE} found" in capsys.readouterr().out
    assert losses(tmp_path) == losses(straight) and list(losses(tmp_path)) == [*range(1, STEPS + 1)]
    assert [loading.saved_of(straight / "checkpoints", x).config.model.kinds["L"].window for x in (EDGE, STEPS)] == [9, 5]


@pytest.mark.slow
def test_stages_already_begun_cannot_change(of_two_stages):
    c, workdir = of_two_stages
    first, second = c.stages

    def train(*stages):
        loop.train(dataclasses.replace(c, stages=stages), workdir)

    shorter = dataclasses.replace(first, steps=2)
    with pytest.raises(ValueError, match=r"has done \[3, 3\] steps of each stage.*would have done \[2, 4\]"):
        train(shorter, dataclasses.replace(second, steps=4))
    with pytest.raises(ValueError, match=r"has done \[3, 3\] steps of each stage.*would have done \[2\]"):
        train(shorter)
    with pytest.raises(ValueError, match=r"done 3 steps of stages\[1\], and this config has 2 there; give --steps=3 or more$"):
        train(first, dataclasses.replace(second, steps=2))


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """An uninterrupted run whose second stage has another window and another mesh, and its config."""
    workdir = tmp_path_factory.mktemp("straight")
    c = config_of_two_meshes(corpus)
    assert loop.train(c, workdir)
    return workdir, c


@pytest.mark.slow
def test_a_mesh_that_changes_at_the_edge_changes_no_result(corpus, straight, tmp_path):
    workdir, c = straight
    window_alone = dataclasses.replace(c.stages[1], override=config.Partial({"model": c.stages[1].override["model"]}))
    one_mesh = dataclasses.replace(c, mesh=c.at(1).mesh, stages=(c.stages[0], window_alone))
    assert loop.train(one_mesh, tmp_path)
    expected = losses(tmp_path)
    assert losses(workdir).keys() == expected.keys()
    assert max(abs(loss - expected[step]) for step, loss in losses(workdir).items()) < 1e-6 * max(expected.values())


@pytest.mark.slow
def test_two_processes_change_the_mesh_at_the_edge_and_resume_there_as_one_process_does(corpus, straight, tmp_path):
    (tmp_path / "corpus").symlink_to(Path(corpus).parent)
    for part in ("stop_near_the_edge", "go_on_near_the_edge"):
        with start_processes(part, tmp_path) as started:
            (status0, _, error0), (status1, _, error1) = ends(started, 300)
        assert (status0, status1) == (0, 0), error0 + error1
    assert losses(tmp_path / "meshes") == pytest.approx(losses(straight[0]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("step", [EDGE, EDGE + 1, pytest.param(EDGE - 1, marks=pytest.mark.exhaustive)])
def test_a_run_that_stops_around_the_edge_has_the_losses_of_one_that_does_not(straight, tmp_path, step):
    workdir, c = straight
    train_until(step, c, tmp_path)
    assert loop.train(c, tmp_path)
    assert losses(tmp_path) == losses(workdir)


@pytest.mark.slow
def test_a_checkpoint_is_read_with_the_model_of_its_stage(straight):
    workdir, c = straight
    with jax.set_mesh(mesh_of()):
        windows = {step: loading.load(workdir, step).config.model.kinds["L"].window for step in (2, 4, STEPS)}
    assert windows == {2: 5, 4: 9, STEPS: 9}
    assert [trained_length(c, workdir, step)[0] for step in (2, 4)] == [48, 96]
    assert json.loads((workdir / "config.json").read_text())["model"]["kinds"]["L"]["window"] == 5


@pytest.mark.slow
def test_an_evaluation_measures_the_model_of_the_stage_that_trained_it(corpus, straight, tmp_path):
    _, c = straight
    meshes = [mesh_of(fsdp=2, data=4), mesh_of(fsdp=2, context=2, tensor=2)]
    data = loop.load_data(c)
    evaluations = Evaluations(c, executions(c, "cpu"), meshes, data.tokenizer, data.corpora, tmp_path)
    measured = {step: evaluations.context_of(step).eval_model for step in (EDGE, EDGE + 1)}
    assert [(x.model.kinds["L"].window, x.mesh) for x in measured.values()] == [(5, meshes[0]), (9, meshes[1])]


def test_a_planned_change_is_no_surprise_and_an_unplanned_one_within_a_stage_is_refused():
    saved = config.to_dict(two_stages({}, WINDOW))
    assert check_function(saved, two_stages({}, WINDOW), EDGE) == []  # the stage begins as it was planned
    (line,) = check_function(saved, two_stages({}, WINDOW | THETA), EDGE)  # more is overridden now
    assert line == "model        model.kinds.L.rope_theta: 100.0 -> 500.0, as stages[1].override says"
    with pytest.raises(ValueError, match="(?s)parameters of step 4 .*model.kinds.L.rope_theta: 100.0 -> 500.0"):
        check_function(saved, two_stages({}, WINDOW | THETA), EDGE + 1)
    back = config.to_dict(two_stages(WINDOW, {}))
    assert check_function(back, two_stages(WINDOW, {}), EDGE) == []
