"""An estimate of the memory of a training step, from the shapes of its arrays: nothing is compiled."""

import math

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import config
from hybrid_attn.data.packed import fields_of
from hybrid_attn.model import execution_on
from hybrid_attn.parallel.mesh import TOKENS_BT
from hybrid_attn.train.objectives import objective_of
from hybrid_attn.train.step import abstract_state
from hybrid_attn.train.trainable import part


def bytes_on_device(arrays, mesh: AbstractMesh) -> int:
    """Bytes of a shard of every array together."""
    total = 0
    for x in jax.tree.leaves(arrays):
        spec = P() if x.sharding is None else x.sharding.spec
        total += math.prod(NamedSharding(mesh, spec).shard_shape(x.shape)) * x.dtype.itemsize
    return total


def estimated_memory(c: config.Config, stage: config.StageConfig, mesh: AbstractMesh, platform: str) -> float:
    """An estimate of the bytes on a device: state, gradients, and the activations of a microbatch.

    State and gradients are exact. The activations are those that the backward pass keeps, and either all of one layer or one
    chunk of logits and its gradient. They are traced, not compiled: the compiler may need more, or less.
    """
    execution = execution_on(platform, stage.model, stage.train)
    everything = execution._replace(remat=config.Table(dict.fromkeys(execution.remat, "none")))
    objective, shape = objective_of(stage), (stage.batch // stage.microbatches, stage.seq_len)
    with jax.sharding.use_abstract_mesh(mesh):
        state, sharding = abstract_state(c, mesh, stage.index), NamedSharding(mesh, TOKENS_BT)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in fields_of(stage).items()}
        extras = {name: state.extras[name] for name in objective.extras}

        def residual_bytes(execution) -> int:
            def residuals(params, extras, batch):
                return jax.vjp(lambda params: objective.loss(stage, params, extras, batch, execution)[0], params)[1]

            return bytes_on_device(jax.eval_shape(residuals, state.params, extras, batch), mesh)

        gradients = [part(stage, state.params)] * min(stage.microbatches, 2)  # those of a microbatch, and their sum
        params = bytes_on_device(state.params, mesh)  # among the residuals
        layer = (residual_bytes(everything) - params) / stage.model.num_layers
        logits = 4 * execution.loss_chunk * stage.model.vocab_size / mesh.shape["tensor"]
        return bytes_on_device((state, gradients), mesh) + residual_bytes(execution) - params + max(layer, 2 * logits)
