"""One training step: a pure function of state and batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Config
from hybrid_attn.model import Run, init, losses
from hybrid_attn.model.loss import bits_per_byte, mean_loss
from hybrid_attn.train.optim import optimiser, schedule


class TrainState(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def init_state(config: Config) -> TrainState:
    """The state before the first step, laid out on the mesh in force; the same values on every mesh."""
    params = init(config.model, jax.random.key(config.seed))
    return TrainState(jnp.int32(0), params, optimiser(config.optim, config.total_steps).init(params))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on `mesh`, which must be in force."""

    def place(x):
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.eval_shape(lambda: init_state(config)))


def make_step(config: Config, run: Run):
    """The jitted `step(state, batch) -> (state, metrics)`; it donates its state."""
    tx, rate = optimiser(config.optim, config.total_steps), schedule(config.optim, config.total_steps)

    def loss_fn(params, batch):
        nll_BT, lse_BT = losses(config.model, params, batch, run)
        nll_sum = (batch["weights"] * nll_BT).sum()
        return mean_loss(nll_BT, lse_BT, batch["weights"], config.optim.z_loss), nll_sum

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        (loss, nll_sum), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "bits_per_byte": bits_per_byte(nll_sum, batch["bytes"].sum()),
            "grad_norm": optax.tree.norm(grads),
            "lr": rate(state.step),
        }
        state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        return state, metrics

    return step
