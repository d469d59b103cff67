"""An objective keeps arrays in the state; a checkpoint carries them, and one without them, or with others, restores."""

import dataclasses
from collections import namedtuple

import jax
import numpy as np
import pytest
from conftest import BATCH, ONE_LAYER, REFERENCE, mesh_of, on_mesh, tiny

from hybrid_attn import checkpoint, config, stored
from hybrid_attn.train import loop
from hybrid_attn.train.objectives import OBJECTIVES
from hybrid_attn.train.objectives.next_token import NEXT_TOKEN
from hybrid_attn.train.objectives.objective import Extra
from hybrid_attn.train.step import init_state, make_step

STAGE = {"steps": 2, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
PLAIN = tiny(ONE_LAYER | {"stages": [STAGE] * 2})
AVERAGED = ONE_LAYER | {"stages": [STAGE, STAGE | {"objective": "averaged"}]}


def halfway(average, params, *_):
    return jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, average, params)


@pytest.fixture
def averaged(monkeypatch):
    """A config whose objective keeps a moving average of the parameters."""
    extras = {"average": Extra(lambda params: params, halfway)}
    monkeypatch.setitem(OBJECTIVES, "averaged", NEXT_TOKEN._replace(extras=extras))
    with jax.set_mesh(mesh_of(data=2)):
        yield tiny(AVERAGED)


def trained(c, state, steps):
    step, batch = make_step(c.at(1), REFERENCE), on_mesh(BATCH | {"bytes": np.ones_like(BATCH["weights"])})
    for _ in range(steps):
        state, _ = step(state, batch)
    return state


def started(c):
    return jax.jit(init_state, static_argnums=0)(c)


def saved(directory, c, state):
    checkpoints = checkpoint.Checkpoints(directory, keep=1, every=1)
    checkpoints.save(int(state.step), state, {"stage_steps": [2], "stage": {}}, config.to_dict(c), wait=True)
    return checkpoints


def restored(checkpoints, c):
    """The state that `c` continues from, and the lines that say what became of extras."""
    state, step, recorded = loop.first_state(c, [{}, {}], jax.sharding.get_mesh(), checkpoints)
    lines = loop.past(c, checkpoints, step, recorded, False)
    return state, [line for line in lines if line.startswith("extras")]


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
def test_a_run_that_is_stopped_continues_with_its_extras_bit_for_bit(averaged, tmp_path):
    straight = trained(averaged, started(averaged), 4)
    assert not np.array_equal(straight.extras["average"]["embed"], straight.params["embed"])
    state, lines = restored(saved(tmp_path, averaged, trained(averaged, started(averaged), 2)), averaged)
    assert lines == [] and checkpoint.extras(tmp_path) == {"average"}
    assert_equal(trained(averaged, state, 2), straight)


@pytest.mark.slow
def test_a_loss_reads_the_extras_of_the_state(averaged, monkeypatch):
    def distance(params, average):
        return ((params["embed"] - average["embed"]) ** 2).sum()

    def pulled(config, params, extras, batch, execution):
        total, sums = NEXT_TOKEN.loss(config, params, extras, batch, execution)
        return total, sums | {"aux_loss": distance(params, extras["average"])}

    c = dataclasses.replace(averaged.at(1), microbatches=2)
    batch = on_mesh(BATCH | {"bytes": np.ones_like(BATCH["weights"])})
    states = [trained(averaged, started(averaged), 1) for _ in range(2)]  # a step donates its state
    expected = distance(states[0].params, states[0].extras["average"])
    _, plain = make_step(c, REFERENCE)(states[0], batch)
    monkeypatch.setitem(OBJECTIVES, "averaged", OBJECTIVES["averaged"]._replace(loss=pulled))
    _, metrics = make_step(c, REFERENCE)(states[1], batch)
    assert expected > 0.01
    np.testing.assert_allclose(metrics["loss"] - plain["loss"], expected, rtol=1e-3)


def test_an_extra_that_a_checkpoint_lacks_starts_from_its_initial_value_and_is_reported(averaged, tmp_path):
    before = trained(PLAIN, started(PLAIN), 2)
    state, lines = restored(saved(tmp_path, PLAIN, before), averaged)
    assert lines == ["extras       average: not in the checkpoint of step 2; starts from its initial value"]
    assert_equal(state.extras["average"], before.params)
    after = trained(averaged, state, 1)
    assert_equal(after.extras["average"], halfway(jax.device_get(before.params), jax.device_get(after.params), None))


def test_of_two_extras_whose_names_begin_alike_either_is_left_out(monkeypatch, tmp_path):
    extras = {name: Extra(lambda params: params, halfway) for name in ("average", "average_slow")}
    with jax.set_mesh(mesh_of()):
        monkeypatch.setitem(OBJECTIVES, "averaged", NEXT_TOKEN._replace(extras=extras))
        checkpoints = saved(tmp_path, tiny(AVERAGED), trained(tiny(AVERAGED), started(tiny(AVERAGED)), 2))
        for name in extras:
            monkeypatch.setitem(OBJECTIVES, "averaged", NEXT_TOKEN._replace(extras={name: extras[name]}))
            state, _ = restored(checkpoints, tiny(AVERAGED))
            assert state.extras.keys() == {name}
            assert state.extras[name]["embed"].shape == state.params["embed"].shape


def test_an_extra_without_arrays_is_no_damage(monkeypatch, tmp_path):
    empty = Extra(lambda params: {}, lambda extra, *_: extra)
    monkeypatch.setitem(OBJECTIVES, "averaged", NEXT_TOKEN._replace(extras={"empty": empty}))
    with jax.set_mesh(mesh_of()):
        c = tiny(AVERAGED | {"seed": 1})  # jit has compiled the first state of the other one
        state, _ = restored(saved(tmp_path, c, trained(c, started(c), 2)), c)
    assert state.extras == {"empty": {}}


def test_an_extra_that_a_config_lacks_is_left_out_and_reported(averaged, tmp_path):
    before = trained(averaged, started(averaged), 2)
    state, lines = restored(saved(tmp_path, averaged, before), PLAIN)
    assert lines == ["extras       average: in the checkpoint of step 2, and not in this config; left out"]
    assert_equal(state, before._replace(extras={}))
    with pytest.raises(stored.AnotherModelError, match="opt_state/1/mu/embed: .* -> not expected"):
        checkpoint.Checkpoints(tmp_path, keep=1, every=1).restore(jax.eval_shape(lambda: state._replace(opt_state=())))


def test_a_checkpoint_without_extras_is_that_of_a_version_without_them(averaged, tmp_path):
    state = started(PLAIN)
    saved(tmp_path / "new", PLAIN, state)
    sums = stored.read_sums(tmp_path / "new" / "0")
    assert not any(name.startswith("extras") for name in sums.arrays) and checkpoint.extras(tmp_path / "new") == set()
    fields = {name: value for name, value in state._asdict().items() if name != "extras"}
    read, lines = restored(saved_as(tmp_path / "old", fields), PLAIN)
    assert lines == []
    assert_equal(read, state)


def saved_as(directory, fields):
    """A checkpoint of step 0 as a named tuple of three fields."""
    checkpoints = checkpoint.Checkpoints(directory, keep=1, every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "fields_of", lambda state: state)
        checkpoints.save(
            0, namedtuple("TrainState", fields)(**fields), {"stage_steps": [], "stage": {}}, config.to_dict(PLAIN), wait=True
        )
    return checkpoints
