"""Small checkpoints that tests write, read and damage."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_attn import config
from hybrid_attn.checkpoint import Checkpoints

LAYER_TYPE = {"mixer": "attention", "mlp": "gated", "window": 4}
CONFIG = config.completed({"seed": 3, "model": {"d_model": 16, "pattern": "LLLG", "kinds": {"L": LAYER_TYPE}}})
DATA = {"stage": 0, "rows": [7, 11]}


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def sharding_of(rows: int, columns: int, *spec: str | None) -> NamedSharding:
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    return NamedSharding(jax.sharding.Mesh(devices, ("data", "tensor")), PartitionSpec(*spec))


def state_of(step: int = 0, width: int = 16) -> State:
    """Other numbers at every step; bfloat16 and float32, sharded and replicated arrays, an optimiser's named tuples."""
    rng = np.random.default_rng(step)
    replicated, split = sharding_of(8, 1), sharding_of(8, 1, None, "data")
    params = {
        "embed": jax.device_put(rng.normal(size=(24, width)).astype(np.float32), split),
        "periods": {"L0": {"q": jax.device_put(jnp.asarray(rng.normal(size=(2, width, 5)), jnp.bfloat16), replicated)}},
    }
    opt_state = jax.jit(optax.adamw(1e-3).init)(params)
    return State(jax.device_put(jnp.int32(step), replicated), params, opt_state)


def abstract_of(tree, sharding=None, dtype=None):
    def like(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, dtype if dtype and floating else x.dtype, sharding=sharding or x.sharding)

    return jax.tree.map(like, tree)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def write(directory, *steps: int, keep: int = 9) -> None:
    checkpoints = Checkpoints(directory, keep=keep, every=1)
    for step in steps:
        checkpoints.save(step, state_of(step), {**DATA, "step": step}, CONFIG)
    checkpoints.close()


def reopen(directory) -> Checkpoints:
    return Checkpoints(directory, keep=9, every=10)


def truncate(directory, step: int) -> None:
    """Cuts every array file of a checkpoint in half."""
    for path in (pathlib.Path(directory) / str(step) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
