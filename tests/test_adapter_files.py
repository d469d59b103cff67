"""An adapter in files: checkpoints of it alone, beside a base; merged into the matrices of a Hugging Face model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import flagsaver
from conftest import mesh_of, random_params, tool
from converted import HYBRID, assert_same, read, write
from flax.traverse_util import unflatten_dict
from test_adapters import LORA, merged
from test_init_from import flat, save
from trained import config_of, losses, stage, train_until

from hybrid_attn import checkpoint, config, programs
from hybrid_attn.config import NO_ADAPTER
from hybrid_attn.convert import hf, peft
from hybrid_attn.infer import loading
from hybrid_attn.infer.merged import Merged
from hybrid_attn.model import abstract_params, transforms
from hybrid_attn.train import loop

TARGETS = ("*/attention/q", "*/attention/o", "*/mlp/down")


def with_adapter(type="lora", targets=TARGETS):
    settings = {"rank": 3, "alpha": 6.0} if type == "lora" else {}
    return dataclasses.replace(HYBRID, adapter=dataclasses.replace(NO_ADAPTER, type=type, targets=targets, **settings))


def saved(folder, model, params):
    c = config.to_dict(dataclasses.replace(config.build(config.base.get_config()), model=model))
    checkpoints = checkpoint.Checkpoints(folder, keep=1, every=1)
    checkpoints.save(3, {"params": params}, {}, c)
    checkpoints.close()


def split(params):
    """Parameters without those of adapters, and these."""
    flat = hf.flat(params)
    of = [{name: x for name, x in flat.items() if transforms.is_added(name) == yes} for yes in (False, True)]
    return [unflatten_dict(x, sep="/") for x in of]


def export(*arguments):
    with tool("export_hf") as module, flagsaver.flagsaver():
        module.main(programs.parse(["export_hf.py", *arguments]))


def test_an_export_has_the_adapter_merged(tmp_path, one_device):
    model = with_adapter()
    params = random_params(model)
    saved(tmp_path / "saved", model, params)
    export(f"--checkpoint={tmp_path / 'saved'}", f"--out={tmp_path / 'out'}")
    assert len(hf.flat(params)) - len(hf.flat(merged(model, params))) == 2 * 5 * len(TARGETS)
    assert_same(read(tmp_path / "out")[1], merged(model, params))


def imported(folder, model, adapter):
    """The parameters and the config of a model with an adapter in PEFT's files, read into a checkpoint."""
    with tool("import_hf") as module, flagsaver.flagsaver():
        module.main(programs.parse(["import_hf.py", f"--model={model}", f"--adapter={adapter}", f"--out={folder}"]))
    c = config.build_checkpoint_config(checkpoint.read_config(folder))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_params(c.model))
    return checkpoint.read_params(folder, shapes), c.model


def test_lora_is_written_as_peft_stores_it_and_read_back(tmp_path, one_device):
    model = with_adapter()
    params = random_params(model)
    saved(tmp_path / "saved", model, params)
    write(tmp_path / "base", HYBRID, split(params)[0])
    export(f"--checkpoint={tmp_path / 'saved'}", "--peft", f"--out={tmp_path / 'out'}")
    stored = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == 2 * model.num_layers * len(TARGETS)
    q = stored["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(q, params["tail"]["L0"]["attention"]["q_adapter"]["a"].T)
    got, read_model = imported(tmp_path / "again", tmp_path / "base", tmp_path / "out")
    assert_same(got, params)
    assert (read_model.adapter.rank, read_model.adapter.alpha) == (3, 6.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "adapter_config.json has use_dora=True; only use_dora=False is supported"),
        ({"r": 4}, r"lora_A.weight has the shape \(3, 32\), and \(4, 32\) fits r=4 and this model"),
        ({"r": None}, "has r=None and lora_alpha=6.0, which must be numbers"),
        ({"r": 0}, "has r=0 and lora_alpha=6.0, which must be numbers, and r positive"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa'; only init_lora_weights=True is supported"),
        ("another length", "has an adapter of some layers of periods/L0/attention/q alone: it lacks base_model"),
        ("nothing", "cannot be read"),
    ],
)
def test_files_of_another_adapter_are_refused_in_one_line(change, message, tmp_path, one_device):
    model = with_adapter()
    params = random_params(model)
    parts = params["periods"]["L0"]["attention"]["q_adapter"]
    peft.write(tmp_path, model, "cohere2", {"periods/L0/attention/q": (1, 32, 4, 8)}, lambda _, part: np.asarray(parts[part]))
    if isinstance(change, dict):
        values = json.loads((tmp_path / peft.CONFIG).read_text())
        (tmp_path / peft.CONFIG).write_text(json.dumps(values | change))
    elif change == "nothing":
        (tmp_path / peft.TENSORS).write_bytes(b"x")
    matrices = {"periods/L0/attention/q": peft.Matrix((32, 4, 8), 1)}
    longer = dataclasses.replace(HYBRID, num_layers=6 if change == "another length" else 5)
    with pytest.raises(ValueError, match=message) as caught:
        peft.read(tmp_path, longer, "cohere2", matrices)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_depends_on_the_token_is_not_merged(tmp_path, one_device, capsys):
    model = with_adapter("mov")
    saved(tmp_path / "saved", model, random_params(model))
    with pytest.raises(SystemExit) as end:
        export(f"--checkpoint={tmp_path / 'saved'}", f"--out={tmp_path / 'out'}")
    message = "model.adapter.type='mov' depends on the token, and no matrix has the same products; lora and ia3 can be merged"
    assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


CHANGES = LORA | {"evals.names": (), "optim.lr": 0.05, "stages": [stage(4, 48, 8)], "train.keep": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, known_peak_and_no_pictures):
    """The folder of a base and of a run of an adapter on it, the run's config, and the parameters of the base."""
    folder = tmp_path_factory.mktemp("adapter")
    base = save(folder / "base", config_of(corpus), 7)
    c = config_of(corpus, **CHANGES | {"init_from.path": str(folder / "base")})
    assert loop.train(c, str(folder / "run"))
    return folder, c, base


def test_checkpoints_of_an_adapter_have_its_arrays_alone_and_are_read_with_the_base(run):
    folder, c, base = run
    directory = folder / "run" / "checkpoints"
    arrays = checkpoint.stored.read_sums(checkpoint._path(directory, 4)).arrays
    names = {name.removeprefix("params/") for name in arrays if name.startswith("params/")}
    assert names == {f"periods/L0/attention/{x}_adapter/{y}" for x in "qv" for y in "ab"}
    assert not any(name.startswith("opt_state") and "adapter" not in name for name in arrays if "mu" in name or "nu" in name)
    with jax.set_mesh(mesh_of(fsdp=2)):
        params = flat(loading.load(folder / "run").params)
    for name, x in base.items():
        np.testing.assert_array_equal(params[name], x)
    assert np.abs(params["periods/L0/attention/q_adapter/b"]).max() > 0
    shapes = checkpoint.read_shapes(directory, 4)
    assert {name: x.shape for name, x in params.items()} == shapes
    q = "periods/L0/attention/q"
    (slices,) = Merged(directory, 4, c.model).slices(q)
    a, b = params[f"{q}_adapter/a"][0], params[f"{q}_adapter/b"][0]
    np.testing.assert_allclose(slices, params[q][0] + 4 * np.tensordot(a, b, 1), rtol=1e-6)


def test_a_run_that_is_stopped_goes_on_from_the_adapter_and_its_base(run, tmp_path):
    folder, c, _ = run
    train_until(2, c, str(tmp_path / "run"))
    assert loop.train(c, str(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(folder / "run")
    of = [checkpoint.fingerprint(x / "checkpoints") for x in (tmp_path / "run", folder / "run")]
    assert of[0] == of[1]


def test_a_run_starts_from_an_adapter_and_another_one_has_another_fingerprint(run, tmp_path):
    folder, c, _ = run
    more = dataclasses.replace(c, init_from=dataclasses.replace(c.init_from, path=str(folder / "run")))
    with jax.set_mesh(mesh_of()):
        state, record = loop.init_from.first_state(more, jax.sharding.get_mesh(), "0")
        loaded = loading.load(folder / "run").params
    assert record["new"] == [] and record["fingerprint"] == checkpoint.fingerprint(folder / "run" / "checkpoints")
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_base_alone_is_read_from_a_checkpoint_of_an_adapter(run):
    folder, c, base = run
    ignoring = dataclasses.replace(c.init_from, path=str(folder / "run"), ignore=("*_adapter",), new=("*_adapter",))
    more = dataclasses.replace(c, init_from=ignoring)
    with jax.set_mesh(mesh_of()):
        state, record = loop.init_from.first_state(more, jax.sharding.get_mesh(), "0")
    params = flat(state.params)
    for name, x in base.items():
        np.testing.assert_array_equal(params[name], x)
    assert not params["periods/L0/attention/q_adapter/b"].any() and len(record["ignored"]) == 4


def test_checkpoints_of_adapters_are_not_averaged(run, capsys):
    with tool("merge") as merge, pytest.raises(ValueError, match="has an adapter of type 'lora', whose matrices have no mean"):
        merge.model_at(str(run[0] / "run"))


def test_another_base_is_refused_by_its_fingerprint_and_a_missing_one_by_its_path(run, corpus, tmp_path):
    folder, c, _ = run
    shutil.copytree(folder / "base", tmp_path / "base")
    own = dataclasses.replace(c, init_from=dataclasses.replace(c.init_from, path=str(tmp_path / "base")))
    assert loop.train(own, str(tmp_path / "run"))
    before = checkpoint.fingerprint(tmp_path / "base" / "checkpoints")
    shutil.rmtree(tmp_path / "base")
    where = f"is an adapter of the checkpoint of step 7 in {tmp_path}/base/checkpoints"
    more = dataclasses.replace(own, stages=(dataclasses.replace(own.stages[0], steps=6),))
    for restore in (lambda: loop.train(more, str(tmp_path / "run")), lambda: loading.load(tmp_path / "run")):
        with jax.set_mesh(mesh_of()), pytest.raises(ValueError, match=f"{where}, which is not there; put it back"):
            restore()
    with jax.set_mesh(mesh_of()):
        params = random_params(config_of(corpus).model, seed=1)
    checkpoints = checkpoint.Checkpoints(tmp_path / "base" / "checkpoints", keep=1, every=1)
    checkpoints.save(7, {"params": params}, {}, config.to_dict(config_of(corpus)), wait=True)
    checkpoints.close()
    for restore in (lambda: loop.train(more, str(tmp_path / "run")), lambda: loading.load(tmp_path / "run")):
        message = f"{where}, which had the fingerprint {before[:12]} and has .* now: it is another model"
        with jax.set_mesh(mesh_of()), pytest.raises(ValueError, match=message) as caught:
            restore()
        assert "\n" not in str(caught.value)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 4  # it is not set aside
