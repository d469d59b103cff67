"""Muon: its matrices are orthogonal, those of stacked layers and of heads are separate, and every mesh has the same update."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import BLOCKED, ONE_LAYER, batch_of, mesh_of, on_mesh, random_params, tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from hybrid_attn.model.params import MATRIX, ParamSpec
from hybrid_attn.train.muon import newton_schulz, orthogonalise, scale_by_muon
from hybrid_attn.train.step import init_state, make_step


def matrix(shape, axes, fan_in=1):
    return ParamSpec(shape, axes, MATRIX, 1.0, fan_in)


SPECS = {
    "q": matrix((16, 4, 8), ("embed", "heads", "head_dim")),
    "o": matrix((4, 8, 16), ("heads", "head_dim", "embed"), 2),
    "gate": matrix((16, 4), ("embed", "heads")),
    "up": matrix((16, 24), ("embed", "mlp")),
    "down": matrix((24, 16), ("mlp", "embed")),
}
# The axes that optax contracts and those of the output; it takes all others for separate matrices.
NUMBERS = {"q": (1, 3), "o": (2, 3), "gate": (1, 2), "up": (1, 2), "down": (1, 2)}
RNG = np.random.default_rng(0)
STACKED = {name: RNG.normal(size=(3, *spec.shape)).astype(np.float32) for name, spec in SPECS.items()}


def sharded(mesh, stacked):
    periods = (None,) if stacked else ()
    shards = {name: NamedSharding(mesh, P(*periods, *spec.sharding)) for name, spec in SPECS.items()}
    return {name: jax.device_put(x if stacked else x[0], shards[name]) for name, x in STACKED.items()}


@jax.jit
def update(x):
    return {name: orthogonalise(SPECS[name], leaf) for name, leaf in x.items()}


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 20), (2, 20, 8)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    u, _, v = np.linalg.svd(np.asarray(x), full_matrices=False)
    inside = np.swapaxes(u, -1, -2) @ np.asarray(newton_schulz(x)) @ np.swapaxes(v, -1, -2)
    diagonal = np.diagonal(inside, axis1=-2, axis2=-1)
    assert np.all((0.5 < diagonal) & (diagonal < 1.3))
    np.testing.assert_allclose(inside - diagonal[..., None] * np.eye(diagonal.shape[-1]), 0, atol=1e-4)


def test_a_zero_matrix_stays_zero(one_device):
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((2, 4, 6))), 0)


MESHES = [({"data": 2, "fsdp": 2, "tensor": 2}, False), ({"fsdp": 4, "tensor": 2}, True), ({"fsdp": 8}, True)]


@pytest.mark.parametrize("sizes, stacked", MESHES, ids=str)
def test_every_mesh_has_the_update_of_one_device_in_the_sharding_of_the_weight(sizes, stacked):
    """Three periods: neither 4 nor 8 shards divide them."""
    with jax.set_mesh(mesh_of()) as _:
        expected = jax.device_get(update(sharded(mesh_of(), stacked)))
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        x = sharded(mesh, stacked)
        actual = update(x)
        assert {name: y.sharding for name, y in actual.items()} == {name: y.sharding for name, y in x.items()}
        text = update.lower(x).compile().as_text()
    for name, y in expected.items():
        np.testing.assert_allclose(actual[name], y, atol=1e-6, err_msg=name)
    assert not re.search(r"all-reduce(-start)?\(", text)


def test_a_stacked_layer_has_the_update_that_it_has_alone(one_device):
    together, alone = update(sharded(one_device, True)), update(sharded(one_device, False))
    for name in SPECS:
        np.testing.assert_allclose(together[name][0], alone[name], atol=1e-6)


def test_two_updates_are_those_of_optax_with_the_root_mean_square_of_moonlight(one_device):
    numbers = {name: MuonDimensionNumbers((rows,), (columns,)) for name, (rows, columns) in NUMBERS.items()}
    theirs = optax.contrib.scale_by_muon(beta=0.9, weight_dimension_numbers=numbers)
    ours = scale_by_muon(SPECS, 0.9, "float32")
    grads = sharded(one_device, True)
    state, expected_state = ours.init(grads), theirs.init(STACKED)
    for factor in (1.0, -0.3):
        gradient = {name: factor * x**2 for name, x in STACKED.items()}
        expected, expected_state = jax.jit(theirs.update)(gradient, expected_state)
        actual, state = jax.jit(ours.update)(jax.tree.map(jnp.asarray, gradient), state)
        for name, (rows, columns) in NUMBERS.items():
            scale = 0.2 * max(STACKED[name].shape[rows], STACKED[name].shape[columns]) ** 0.5
            np.testing.assert_allclose(actual[name], scale * expected[name], atol=5e-6)


@pytest.mark.slow
def test_matrices_take_muon_and_the_other_parameters_adam(one_device):
    """At the first step AdamW moves by the rate in every element, and Muon by about 0.2 of it in the mean."""
    c = tiny(ONE_LAYER | {"optim.optimiser": "muon", "optim.weight_decay": 0.0, "optim.lr": 0.01, "optim.warmup_steps": 0})
    batch = batch_of(*["a" * 48] * 8)
    batch["bytes"] = np.ones_like(batch["weights"])
    before = jax.device_get(random_params(c.model))
    state = jax.jit(init_state, static_argnums=0)(c, random_params(c.model))
    state, _ = make_step(c.at(0), BLOCKED)(state, on_mesh(batch))
    moved = jax.tree.map(lambda a, b: float(np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2))), state.params, before)
    layer = moved["periods"]["L0"]
    for name, leaf in {**layer["attention"], **layer["mlp"]}.items():
        assert leaf == pytest.approx(0.002, rel=0.25), name
    assert layer["norm"]["weight"] == pytest.approx(0.01, rel=0.01)
