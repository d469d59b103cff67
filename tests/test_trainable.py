"""A stage trains the parameters that it names: the others keep their bits, and the optimiser sees no gradient of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import BATCH, BLOCKED, assert_close, mesh_of, on_mesh, temporary_bytes, tiny
from flax.traverse_util import flatten_dict
from trained import losses, stage

from hybrid_attn import checkpoint, config
from hybrid_attn.config import Piece
from hybrid_attn.model.params import EMBEDDING, MATRIX, ParamSpec
from hybrid_attn.train import loop, trainable
from hybrid_attn.train.optim import OPTIMISERS
from hybrid_attn.train.schedule import schedule
from hybrid_attn.train.step import init_state, make_step

GROUPS = "params", "opt_state"
NAMES = "periods/L*", "*/q_norm", "final_norm/weight"
WITH_BYTES = BATCH | {"bytes": np.ones_like(BATCH["weights"])}


def config_of(names=NAMES, changes=None):
    values = {"stages": [stage(2, 48, 8), stage(3, 48, 8) | {"trainable": names, "microbatches": 2}]}
    return tiny(values | (changes or {}), G={"qk_norm": "rms"})


def named(names, optimiser):
    """An optimiser of parameters of these names, and so many arrays; the rate is constant."""
    optim = dataclasses.replace(tiny().optim, clip_norm=1.0, schedule="constant", warmup_steps=0, lr=0.1)
    shapes = {"embed": (6, 16), "a": (16, 128), "b": (128, 256), "c": (256, 128)}
    groups = {name: EMBEDDING if name == "embed" else MATRIX for name in names}
    specs = {name: ParamSpec(shapes[name], ("embed", "mlp"), groups[name], 1.0, 1) for name in names}
    return OPTIMISERS[optimiser](optim, specs, schedule(optim, [Piece(9, None)])), {name: shapes[name] for name in names}


FAST = "adamw", "adafactor"


@pytest.mark.parametrize("optimiser", [*FAST, *(pytest.param(x, marks=pytest.mark.slow) for x in OPTIMISERS if x not in FAST)])
def test_those_that_train_are_updated_as_if_they_were_alone_and_the_others_keep_bits_and_moments(optimiser, one_device):
    rng, trained = np.random.default_rng(0), ("embed", "b")
    tx, shapes = named(("a", "b", "c", "embed"), optimiser)
    alone, _ = named(trained, optimiser)
    arrays = lambda size: {name: jnp.float32(size * rng.normal(size=shape)) for name, shape in shapes.items()}  # noqa: E731
    first, large = arrays(1e-5), arrays(7.0)  # the first is not clipped
    params = start = arrays(1.0)
    update, update_alone, apply = map(jax.jit, (tx.update, alone.update, functools.partial(trainable.apply_gradient, tx)))
    updates, state = update(first, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    expected = {name: start[name] for name in trained}
    updates, alone_state = update_alone({name: first[name] for name in trained}, alone.init(expected), expected)
    expected = optax.apply_updates(expected, updates)
    before = params, state
    for _ in range(2):
        grads = {name: x if name in trained else None for name, x in large.items()}
        _, params, state = apply(grads, state, params)
        updates, alone_state = update_alone({name: large[name] for name in trained}, alone_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_close({name: params[name] for name in trained}, expected, 1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(before[1])
    for old, new in zip(*(jax.tree.leaves_with_path(x) for x in (before, (params, state))), strict=True):
        name = old[0][-1].key if isinstance(old[0][-1], jax.tree_util.DictKey) else None
        if name in ("a", "c"):
            np.testing.assert_array_equal(old[1], new[1], err_msg=jax.tree_util.keystr(old[0]))
        elif old[1].size > 1:
            assert not np.array_equal(old[1], new[1]), jax.tree_util.keystr(old[0])


def stepped(mesh, c, *stages):
    """The states on the host before and after the last of a step of each of the `stages`, and its metrics."""
    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=0)(c)
        for index in stages:
            before = jax.device_get(state)
            state, metrics = make_step(c.at(index), BLOCKED)(state, on_mesh(WITH_BYTES))
        return before, *jax.device_get((state, metrics))


def assert_only_named_changed(before, after):
    """In every tree of the state that has an array for each parameter, but for an average."""
    before, after = (x._replace(extras={}) for x in (before, after))
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str))
        if name:
            trains = name.startswith("periods/L") or "/q_norm/" in name or name == "final_norm/weight"
            trains &= old.size > 1  # Adafactor has an array of size one where it needs none
            assert np.array_equal(old, new) != trains, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_a_mesh_trains_those_named_and_no_others_and_the_norm_is_that_of_their_gradient():
    c = config_of(changes={"optim.ema_half_life": 0.5})
    many = stepped(mesh_of(fsdp=2, context=2, tensor=2), c, 1)
    assert_only_named_changed(*many[:2])
    assert many[2]["param_norm"] == pytest.approx(float(optax.tree.norm(many[1].params)), rel=1e-6)
    clipped = float(optax.tree.norm(many[1].opt_state[1].mu)) / (1 - c.optim.b1)
    assert clipped == pytest.approx(min(float(many[2]["grad_norm"]), c.optim.clip_norm), rel=1e-5)
    average, old, new = (flatten_dict(x, sep="/") for x in (many[1].extras["ema"], many[0].params, many[1].params))
    for name, x in average.items():  # a step is two half-lives
        np.testing.assert_allclose(x, 0.25 * old[name] + 0.75 * new[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "optimiser", [pytest.param(x, marks=pytest.mark.slow if x == "muon" else pytest.mark.exhaustive) for x in OPTIMISERS]
)
def test_every_optimiser_trains_those_named_alone_on_a_mesh_as_on_one_device(optimiser):
    c = config_of(changes={"optim.optimiser": optimiser})
    one, many = (stepped(mesh, c, 0, 1) for mesh in (mesh_of(), mesh_of(fsdp=2, context=2, tensor=2)))
    assert_only_named_changed(*many[:2])
    assert_close(many[2], one[2], 1e-4)


def test_stages_that_train_other_parameters_have_programs_of_their_own():
    same, other = config_of(changes={"stages": [stage(n, 48, 8) | {"trainable": NAMES} for n in (2, 3)]}), config_of()
    assert same.at(0) == same.at(1) and same.at(0) != dataclasses.replace(same.at(0), trainable=())
    assert other.at(0).trainable == () != other.at(1).trainable
    older = config.to_dict(other)
    for values in older["stages"]:
        del values["trainable"]
    assert [x.trainable for x in config.build(older).stages] == [(), ()]


def test_a_name_that_no_parameter_has_is_one_line_before_anything_is_written(corpus, tmp_path):
    c = config_of(("periods/L*", "periods/G1/attention/q_nrm"), {"data.sources.text.paths": (corpus,)})
    with pytest.raises(ValueError) as error:
        loop.train(c, str(tmp_path / "run"))
    assert str(error.value) == (
        "stages[1].trainable names 'periods/G1/attention/q_nrm', and this model has no such parameter; "
        "did you mean 'periods/G1/attention/q_norm'?"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_stopped_before_at_and_after_an_edge_a_run_ends_with_the_same_bits_and_takes_no_edge_for_a_spike(
    corpus, tmp_path, monkeypatch, known_peak_and_no_pictures
):
    stages = [stage(steps, 48, 8) | {"trainable": names} for steps, names in ((9, ("final_norm",)), (3, ()))]
    changes = {"optim.spike_factor": 3.0, "optim.warmup_steps": 0, "data.sources.text.paths": (corpus,), "evals.names": ()}
    c = config_of(changes=changes | {"stages": stages, "train.log_every": 1})
    assert loop.train(c, tmp_path / "straight")
    for step in (8, 9, 10):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Stop, "reached", lambda self, number, step=step: number == step)
            assert not loop.train(c, tmp_path / "stopped")
        assert checkpoint.steps(tmp_path / "stopped/checkpoints")[-1] == step
    assert loop.train(c, tmp_path / "stopped")
    ends = [
        [losses(tmp_path / name), *(checkpoint.fingerprint(tmp_path / name / "checkpoints", group=x) for x in GROUPS)]
        for name in ("straight", "stopped")
    ]
    assert ends[0] == ends[1] and list(ends[0][0]) == list(range(1, 13))


@pytest.mark.slow
def test_gradients_of_parameters_that_do_not_train_take_no_memory(one_device):
    def temporary(names):
        c = config_of(names, {"model.d_ff": 4096})
        state = jax.eval_shape(lambda: init_state(c))
        return temporary_bytes(make_step(c.at(1), BLOCKED).lower(state, on_mesh(WITH_BYTES)))

    matrices = 2 * 3 * 32 * 4096 * 4  # the bytes of the gradient of both feed-forwards
    assert temporary(()) - temporary(("*/q_norm", "embed")) > matrices
