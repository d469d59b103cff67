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
from hybrid_attn.parallel.mesh import TOKENS_BT
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


def parts(batch: dict, number: int) -> dict:
    """The [B, T] arrays of a batch as [number, B / number, T]: every device cuts the rows that it has."""

    def shard(x_BT):
        return x_BT.reshape(number, -1, x_BT.shape[1])

    cut = jax.shard_map(shard, in_specs=TOKENS_BT, out_specs=P(None, *TOKENS_BT))
    return {name: cut(jax.reshard(x_BT, TOKENS_BT)) for name, x_BT in batch.items()}


def make_step(config: Config, run: Run):
    """The jitted `step(state, batch, microbatches) -> (state, metrics)`; it donates its state.

    `microbatches` is a stage's: the step's function is that of 1, in the memory of a part of the rows. The
    norms are those of the gradient and of the new parameters, which an update that is not finite makes so as well; the norm of
    the update itself would keep the whole update in memory.
    """
    tx, rate = optimiser(config.optim, config.total_steps), schedule(config.optim, config.total_steps)

    def loss_fn(params, batch, total_weight):
        nll_BT, lse_BT = losses(config.model, params, batch, run)
        nll_sum = (batch["weights"] * nll_BT).sum()
        return mean_loss(nll_BT, lse_BT, batch["weights"], config.optim.z_loss, total_weight), nll_sum

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def summed(params, batch, microbatches, total_weight):
        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradient(params, part, total_weight)), None

        zeros = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, parts(batch, microbatches))[0]

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
    def step(state: TrainState, batch: dict, microbatches: int) -> tuple[TrainState, dict]:
        total_weight = batch["weights"].sum()
        if microbatches == 1:
            (loss, nll_sum), grads = gradient(state.params, batch, total_weight)
        else:
            (loss, nll_sum), grads = summed(state.params, batch, microbatches, total_weight)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "bits_per_byte": bits_per_byte(nll_sum, batch["bytes"].sum()),
            "grad_norm": optax.tree.norm(grads),
            "lr": rate(state.step),
            "param_norm": optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


@functools.partial(jax.jit, donate_argnums=0)
def skip_step(state: TrainState) -> TrainState:
    """The state after a step that trains on nothing: the step and the schedule go on, parameters and moments stay."""

    def advance(x):
        return x._replace(count=x.count + 1) if isinstance(x, optax.ScaleByScheduleState) else x

    opt_state = jax.tree.map(advance, state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
    return TrainState(state.step + 1, state.params, opt_state)
