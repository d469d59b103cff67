"""A run that starts from the parameters of another checkpoint: what is copied, what is new, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import mesh_of, random_params, tiny
from flax.traverse_util import flatten_dict

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.model import abstract_params
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train import init_from, loop
from hybrid_attn.train.step import init_state

HASH = "0" * 64
pytestmark = pytest.mark.usefixtures("known_peak_and_no_pictures")


def save(workdir, c, step=0, data=None):
    """A checkpoint of random parameters alone, as an import writes one; returns the parameters by name."""
    with jax.set_mesh(mesh_of()):
        params = random_params(c.model)
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=5, every=1)
        data = {"stage_steps": [], "stage": {}} | (data or {})
        checkpoints.save(step, {"params": params}, data, config.to_dict(c), wait=True)
        checkpoints.close()
    return flat(params)


def flat(params):
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}


def start(c, mesh=None):
    """The parameters that a run of `c` starts with, and the record of their origin."""
    with jax.set_mesh(mesh or mesh_of()):
        state, record = init_from.first_state(c, jax.sharding.get_mesh(), HASH)
        assert int(state.step) == 0
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))
        return flat(state.params), record


def own(c):
    with jax.set_mesh(mesh_of()):
        return flat(jax.jit(init_state, static_argnums=0)(c).params)


def assert_equal(params, expected):
    assert params.keys() == expected.keys()
    for name, x in params.items():
        assert x.dtype == expected[name].dtype and np.array_equal(x, expected[name]), name


def error_of(c):
    with pytest.raises(ValueError) as error:
        start(c)
    return str(error.value)


def following(path, changes=None, **kinds):
    return tiny({"init_from.path": str(path)} | (changes or {}), **kinds)


@pytest.mark.parametrize("path, step", [("", 3), ("checkpoints/1/", 1)])
def test_every_parameter_of_the_newest_or_the_named_checkpoint_is_copied(tmp_path, path, step):
    older = save(tmp_path, tiny(), 1)
    newer = save(tmp_path, tiny({"seed": 1}), 3)
    params, record = start(following(tmp_path / path))
    assert_equal(params, {1: older, 3: newer}[step])
    assert (record["path"], record["step"]) == (str(tmp_path / "checkpoints"), step)
    assert (record["copied"], record["new"], record["ignored"], record["notes"]) == (len(params), [], [], [])
    assert record["fingerprint"] == checkpoint.fingerprint(tmp_path / "checkpoints", step)
    assert start(following(tmp_path, {"init_from.step": 1}))[1]["step"] == 1


def test_the_chat_template_of_the_other_run_is_recorded(tmp_path):
    save(tmp_path, tiny(), 3, {"chat_template": "mine"})
    record = start(following(tmp_path))[1]
    assert checkpoint.chat_template({"init_from": record}) == "mine"
    assert checkpoint.chat_template({"init_from": record, "chat_template": "newer"}) == "newer"


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}])
def test_a_mesh_gets_the_same_bits_in_its_own_shards(tmp_path, axes):
    saved = save(tmp_path, tiny(G={"qk_norm": "rms"}))
    changes = {"init_from.new": ("unembed", "*/sink"), "model.tie_embeddings": False}
    c = following(tmp_path, changes, G={"qk_norm": "rms", "sink": True})
    with jax.set_mesh(mesh_of(**axes)):
        state, _ = init_from.first_state(c, jax.sharding.get_mesh(), HASH)
        expected = jax.eval_shape(lambda: init_state(c))
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding.spec == y.sharding.spec, state.params, expected.params))
        assert jax.tree.structure(state) == jax.tree.structure(expected)
    params = flat(state.params)
    assert_equal({name: params[name] for name in saved}, saved)
    assert_equal(params, start(c)[0])


def test_new_parameters_have_the_initial_values_of_the_run_and_the_others_are_copied(tmp_path):
    saved = save(tmp_path, tiny())
    c = following(tmp_path, {"init_from.new": ("periods/*/attention/?_norm",), "seed": 5}, G={"qk_norm": "rms"})
    params, record = start(c)
    norms = ["periods/G1/attention/k_norm/weight", "periods/G1/attention/q_norm/weight"]
    assert record["new"] == norms and record["copied"] == len(saved)
    assert_equal(params, saved | {name: own(c)[name] for name in norms})
    assert "model.kinds.G.qk_norm: none -> rms" in record["notes"]


def test_a_head_is_ignored_new_or_a_copy_of_the_embeddings(tmp_path):
    untied = {"model.tie_embeddings": False}
    two, one = save(tmp_path / "untied", tiny(untied)), save(tmp_path / "tied", tiny())
    params, record = start(following(tmp_path / "untied", {"init_from.ignore": ("unembed",)}))
    assert record["ignored"] == ["unembed"]
    assert_equal(params | {"unembed": two["unembed"]}, two)
    c = following(tmp_path / "tied", untied | {"init_from.new": ("unembed",)})
    assert_equal(start(c)[0], one | {"unembed": own(c)["unembed"]})
    c = following(tmp_path / "tied", untied | {"init_from.rename": ("embed -> unembed",)})
    params, record = start(c)
    assert_equal(params, one | {"unembed": one["embed"]})
    assert record["copied"] == len(params)


def test_a_group_may_have_another_name_and_parameters_of_another_shape_start_anew(tmp_path):
    saved = save(tmp_path, tiny())
    changes = {"model.pattern": "SG", "init_from.rename": ("periods/L0->periods/S0",)}
    params, record = start(following(tmp_path, changes, S={"window": 5, "rope_theta": 100.0}))
    assert_equal(params, {name.replace("L0", "S0"): x for name, x in saved.items()})
    c = following(tmp_path, {"model.vocab_size": 512, "init_from.new": ("embed",), "init_from.ignore": ("embed",)})
    assert_equal(start(c)[0], saved | {"embed": own(c)["embed"]})


def test_parameters_that_are_not_accounted_for_are_refused_with_the_lines_that_account_for_them(tmp_path):
    save(tmp_path, tiny({"model.tie_embeddings": False, "model.num_layers": 3}))
    error = error_of(following(tmp_path, {"init_from.ignore": ("tail",)}, G={"qk_norm": "rms"}))
    assert f"the checkpoint of step 0 in {tmp_path}/checkpoints does not have the parameters of this model" in error
    norms = "('periods/G1/attention/k_norm', 'periods/G1/attention/q_norm')"
    assert "only this model has periods/G1/attention/k_norm/weight, periods/G1/attention/q_norm/weight; " in error
    assert f"c.init_from.new = {norms}" in error
    assert "only the checkpoint has unembed; without them: c.init_from.ignore = ('tail', 'unembed')" in error
    start(following(tmp_path, {"init_from.new": eval(norms), "init_from.ignore": ("tail", "unembed")}, G={"qk_norm": "rms"}))


def test_layers_of_another_letter_are_refused_with_the_names_to_change(tmp_path):
    save(tmp_path, tiny())
    changes = {"model.pattern": "SG"}
    error = error_of(following(tmp_path, changes, S={}))
    assert "c.init_from.new = ('periods/S0',)" in error and "c.init_from.ignore = ('periods/L0',)" in error
    assert "c.init_from.rename = ('periods/L0 -> periods/S0',)" in error


def test_other_shapes_are_refused_with_both(tmp_path):
    save(tmp_path, tiny({"model.num_layers": 4}))
    error = error_of(following(tmp_path, {"model.d_ff": 64, "model.num_layers": 4}))
    assert "periods/G1/mlp/down has (2, 48, 32) there and (2, 64, 32) here" in error
    assert "for initial values name them in both init_from.new and init_from.ignore" in error and "repetition" not in error
    error = error_of(following(tmp_path, {"model.num_layers": 6}))
    assert "the first axis is the repetition of model.pattern: 2 there and 3 here; all of them are copied, or none" in error


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("new", "unembd", "init_from.new names 'unembd', and this model has no such parameter; did you mean 'unembed'?"),
        ("ignore", "tail/*", "init_from.ignore names 'tail/*', and the checkpoint of step 0 in "),
        ("rename", "periods/L1 -> periods/L0", "init_from.rename names 'periods/L1', and the checkpoint of step 0"),
        ("rename", "periods/L0 -> periods/L1", "init_from.rename names 'periods/L1', and this model has no such"),
    ],
)
def test_a_name_that_no_parameter_has_is_refused(tmp_path, key, value, message):
    c = {"model.tie_embeddings": False}
    save(tmp_path, tiny(c))
    assert message in error_of(following(tmp_path, c | {f"init_from.{key}": (value,)}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"step": 1}, "init_from.step=1 needs an init_from.path"),
        ({"new": ("embed",)}, r"init_from.new=\('embed',\) needs an init_from.path"),
        ({"path": ""}, "init_from.path='' names no checkpoint"),
        ({"path": "a", "rename": ("embed",)}, "init_from.rename has 'embed'; write 'OLD NAME -> NEW NAME'"),
        ({"path": "a", "rename": ("a -> b -> c",)}, "init_from.rename has 'a -> b -> c'"),
        ({"path": "a", "step": -1}, "init_from.step=-1 must be at least 0"),
        ({"path": "a", "only": ()}, "unknown key config.init_from.only"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    values = config.to_dict(tiny())
    values["init_from"] |= changes
    with pytest.raises(ValueError, match=message):
        config.build(values)


def test_a_config_of_before_the_key_starts_from_initial_parameters():
    values = config.to_dict(tiny())
    del values["init_from"]
    assert config.build(values) == tiny() and config.upgraded(values) == config.to_dict(tiny())


def test_paths_without_a_checkpoint_that_can_be_read_are_refused(tmp_path):
    save(tmp_path / "run", tiny())
    missing = tmp_path / "missing"
    assert f"init_from: {missing} is no directory" in error_of(following(missing))
    (tmp_path / "empty").mkdir()
    assert "empty has no complete checkpoint" in error_of(following(tmp_path / "empty"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert "hf is a Hugging Face model; make a checkpoint of it: tools/import_hf.py" in error_of(following(tmp_path / "hf"))
    assert "has no complete checkpoint of step 7; it has 0" in error_of(following(tmp_path / "run", {"init_from.step": 7}))
    path = tmp_path / "run/checkpoints/0"
    assert "is of step 0, and init_from.step=7" in error_of(following(path, {"init_from.step": 7}))


def test_a_checkpoint_of_which_nothing_is_copied_is_refused(tmp_path):
    save(tmp_path, tiny())
    error = error_of(following(tmp_path, {"init_from.new": ("*",), "init_from.ignore": ("*",)}))
    assert f"nothing is copied from the checkpoint of step 0 in {tmp_path}/checkpoints" in error


@pytest.mark.parametrize("item", ["checksums", "config", "data", "state"])
def test_a_damaged_checkpoint_is_refused_and_stays_as_it_is(tmp_path, item):
    save(tmp_path, tiny())
    path = tmp_path / "checkpoints/0" / item
    if item == "state":
        biggest = max((x for x in path.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
        content = bytearray(biggest.read_bytes())
        content[len(content) // 2] ^= 1
        biggest.write_bytes(content)
    else:
        (path / "metadata").unlink()
    error = error_of(following(tmp_path))
    assert f"init_from: the checkpoint of step 0 in {tmp_path}/checkpoints cannot be read: " in error
    assert "; use another init_from.step, or copy it again" in error
    assert [x.name for x in (tmp_path / "checkpoints").iterdir()] == ["0"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    save(tmp_path, tiny())
    path = tmp_path / "checkpoints/0/checksums/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    assert "cannot be read: checksums: " in error_of(following(tmp_path))


def test_embeddings_of_another_tokenizer_are_reported_unless_they_are_new(tmp_path):
    save(tmp_path, tiny(), data={"stage": {"tokenizer": "1" * 64}})
    note = f"tokenizer: {'1' * 12} -> {'0' * 12} (hashes): the copied embeddings may be of other tokens"
    assert start(following(tmp_path))[1]["notes"] == [note]
    both = {"init_from.new": ("embed",), "init_from.ignore": ("embed",)}
    assert start(following(tmp_path, both))[1]["notes"] == []


def trained(tmp_path, path=None, **changes):
    """The config of a run of two steps on small files."""
    (tmp_path / "text").mkdir(exist_ok=True)
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(10 + i)))
    stage = {"steps": 2, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
    values = {"data.sources": {"text": base.source(paths=(str(tmp_path / "text/*.txt"),))}, "stages": [stage]}
    values |= {"train.log_every": 1, "train.checkpoint_every": 1, "evals.names": (), "optim.warmup_steps": 2}
    return tiny(values | {"mesh.fsdp": 2, "init_from.path": path and str(path)} | changes)


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_a_run_starts_with_the_loss_of_its_source_says_so_and_goes_on_from_its_own_checkpoints(tmp_path, capsys):
    c = trained(tmp_path)
    assert loop.train(c, tmp_path / "source")
    capsys.readouterr()
    first = trained(tmp_path, tmp_path / "source", **{"init_from.step": 0})
    with jax.set_mesh(make_mesh(c.mesh)):  # the source as it was before its first step
        checkpoints = checkpoint.Checkpoints(tmp_path / "source/checkpoints", keep=5, every=1)
        state = jax.jit(init_state, static_argnums=0)(c)
        data = checkpoint.read_data(tmp_path / "source/checkpoints") | {"stage_steps": []}
        checkpoints.save(0, state, data, config.to_dict(c), wait=True)
        checkpoints.close()
    assert loop.train(first, tmp_path / "same")
    printed = capsys.readouterr().out
    number = len(jax.tree.leaves(abstract_params(c.model)))
    source = f"{tmp_path}/source/checkpoints"
    assert f"parameters   {number} leaves copied from {source} step 0; new: none; ignored: none\n" in printed
    assert "saved -> new" not in printed
    assert losses(tmp_path / "same") == losses(tmp_path / "source")
    record = checkpoint.read_data(tmp_path / "same/checkpoints")["init_from"]
    assert (record["path"], record["step"], record["copied"]) == (source, 0, number)

    later = trained(tmp_path, tmp_path / "source")
    longer = dataclasses.replace(later, stages=(dataclasses.replace(later.stages[0], steps=3),))
    assert loop.train(longer, tmp_path / "same", allow_lr_jump=True)
    printed = capsys.readouterr().out
    said = f"parameters   from this run's own checkpoint; init_from.path={tmp_path}/source is ignored\n"
    assert said in printed and "step 2 found" in printed and "leaves copied" not in printed
    assert checkpoint.read_data(tmp_path / "same/checkpoints")["init_from"] == record


def test_a_wrong_path_is_one_line_that_names_it(tmp_path):
    c = trained(tmp_path, tmp_path / "missing", **{"init_from.new": ("unembed",)})
    with pytest.raises(ValueError, match=f"^init_from: {tmp_path}/missing is no directory") as error:
        loop.train(c, tmp_path / "run")
    assert "\n" not in str(error.value)
