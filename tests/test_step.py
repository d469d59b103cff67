"""A step in parts of the batch's rows is the step of the whole batch, in less memory."""

import jax
import numpy as np
import pytest
from conftest import BLOCKED, ONE_LAYER, assert_close, batch_of, mesh_of, on_mesh, temporary_bytes, tiny
from jax.sharding import PartitionSpec as P

from hybrid_attn.parallel.mesh import TOKENS_BT
from hybrid_attn.train.step import init_state, make_step, parts, skip_step

# Rows of 48, 39, …, 3 weighted tokens: parts of unequal weight, of which the mean of means would be another number.
ROWS = ("a" * 48, "a" * 40 + "." * 8, "a" * 30 + "b" * 10 + "." * 8, "a" * 25 + "." * 23) + tuple(
    "a" * n + "." * (48 - n) for n in (20, 11, 7, 4)
)
BATCH = batch_of(*ROWS)
BATCH["bytes"] = np.ones_like(BATCH["weights"])
STAGE = {"steps": 5, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}


def config_of(microbatches):
    """One config in all tests of this file, of which the step is compiled once for each number of parts."""
    changes = {"optim.z_loss": 1e-3, "optim.warmup_steps": 4, "stages": [STAGE | {"microbatches": microbatches}]}
    return tiny(ONE_LAYER | changes)


def stepped(mesh, microbatches, batch=BATCH):
    """Metrics of the first step and the gradient that it took, as the optimiser's mean has it after one step."""
    c = config_of(microbatches)
    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=0)(c)
        state, metrics = make_step(c.at(0), BLOCKED)(state, on_mesh(batch))
        return jax.device_get((metrics, state.opt_state[1].mu, state.params["embed"].sharding.spec))


@pytest.fixture(scope="module")
def whole():
    return stepped(mesh_of(), 1)


@pytest.mark.parametrize(
    "sizes, microbatches",
    [
        ({}, 8),
        pytest.param({"data": 2, "fsdp": 2}, 2, marks=pytest.mark.exhaustive),
        pytest.param({"slices": 2, "context": 2, "tensor": 2}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parts_of_a_batch_give_the_metrics_and_the_gradient_of_the_whole(sizes, microbatches, whole):
    metrics, mean, spec = stepped(mesh_of(**sizes), microbatches)
    assert_close(metrics, whole[0], 1e-5)
    assert_close(mean, whole[1], 1e-5)
    assert spec == whole[2]


def test_a_state_has_one_type_before_and_after_a_step_or_the_second_step_would_be_compiled_again(one_device):
    c = tiny({}, L={"temperature.type": "learned", "gate": "head"}, G={"qk_norm": "rms_plus1", "sink": True})
    before = jax.eval_shape(lambda: init_state(c))
    batch = on_mesh(BATCH)
    after, _ = jax.eval_shape(lambda state: make_step(c.at(0), BLOCKED)(state, batch), before)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    types = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)] for state in (before, after)]
    assert types[0] == types[1]


def test_a_skipped_step_moves_the_schedule_on_and_nothing_else(one_device):
    c = config_of(1)
    state, step = jax.jit(init_state, static_argnums=0)(c), make_step(c.at(0), BLOCKED)
    state, first = step(state, on_mesh(BATCH))
    before = jax.device_get(state)
    types = [(x.shape, x.dtype, x.weak_type, x.sharding) for x in jax.tree.leaves(state)]
    state = skip_step(state)
    assert [(x.shape, x.dtype, x.weak_type, x.sharding) for x in jax.tree.leaves(state)] == types
    after = jax.device_get(state)
    changed = {
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if not np.array_equal(a, b)
    }
    assert changed == {".step", ".opt_state[3].count"}
    state, third = step(state, on_mesh(BATCH))
    assert third["lr"] == pytest.approx(3 * first["lr"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(state.params), after.params)
    assert max(jax.tree.leaves(moved)) > 2 * first["lr"]


def test_the_norm_of_the_parameters_is_of_those_that_the_update_gives(one_device):
    c = config_of(1)
    state = jax.jit(init_state, static_argnums=0)(c)
    before = jax.device_get(state.params)
    state, metrics = make_step(c.at(0), BLOCKED)(state, on_mesh(BATCH))
    old, new = (
        np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(params)))
        for params in (before, jax.device_get(state.params))
    )
    assert metrics["param_norm"] == pytest.approx(new, rel=1e-6) and metrics["param_norm"] != pytest.approx(old, rel=1e-6)


def test_each_token_weighs_the_same_whatever_part_it_is_in():
    weights = BATCH["weights"].sum(1)

    def loss(rows, microbatches):
        kept = np.isin(np.arange(8), rows)[:, None]
        return stepped(mesh_of(), microbatches, BATCH | {"weights": BATCH["weights"] * kept})[0]["loss"]

    means = [loss([0, 1], 1), loss([6, 7], 1)]
    both = loss([0, 1, 6, 7], 8)
    assert both == pytest.approx(np.average(means, weights=[weights[[0, 1]].sum(), weights[[6, 7]].sum()]), rel=1e-5)
    assert abs(both - np.mean(means)) > 1e-4 * both


def test_parts_hold_every_row_once_and_no_device_sends_one():
    with jax.set_mesh(mesh_of(data=2, fsdp=2, context=2)):
        batch = on_mesh({"tokens": np.arange(8 * 4, dtype=np.int32).reshape(8, 4)})
        compiled = jax.jit(parts, static_argnums=1).lower(batch, 2).compile()
        cut = compiled(batch)["tokens"]
    assert not any(word in compiled.as_text() for word in ("all-", "collective", "reduce-scatter"))
    assert cut.sharding.spec == P(None, *TOKENS_BT) and cut.shape == (2, 4, 4)
    assert sorted(np.asarray(cut)[..., 0].ravel()) == list(range(0, 32, 4))
    assert {shard.data.shape for shard in cut.addressable_shards} == {(2, 1, 2)}


@pytest.mark.slow
def test_the_memory_of_a_step_falls_with_the_number_of_parts(one_device):
    state = jax.jit(init_state, static_argnums=0)(config_of(1))

    def temporaries(microbatches):
        step = make_step(config_of(microbatches).at(0), BLOCKED)
        return temporary_bytes(step.lower(state, on_mesh(BATCH)))

    one, eight = temporaries(1), temporaries(8)
    assert eight < 0.4 * one, (one, eight)
