"""Cross-entropy of the next token, in packed sequences whose tokens have weights."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hybrid_attn.config import StageConfig
from hybrid_attn.model import Execution, expert_metrics, losses_and_aux
from hybrid_attn.model.loss import bits_per_byte, weighted_sum
from hybrid_attn.train.objectives.objective import Batch, Objective

FIELDS = "tokens", "targets", "positions", "segments", "weights", "bytes"


def weight(config: StageConfig, batch: Batch) -> jax.Array:
    """The sum of the weights of the tokens."""
    return batch["weights"].sum()


def loss(config: StageConfig, params: dict, extras: Mapping, batch: Batch, execution: Execution) -> tuple[jax.Array, dict]:
    """The weighted sum over the tokens, z-loss included, and the sum of their negative log-probabilities alone."""
    return weighted_loss(config, params, batch, execution, batch["weights"], batch["weights"])


def weighted_loss(
    config: StageConfig, params: dict, batch: Batch, execution: Execution, weights_BT: jax.Array, trained_BT: jax.Array
) -> tuple[jax.Array, dict]:
    """The sum over the tokens with `weights_BT`, z-loss included, and that of negative log-probabilities with `trained_BT`."""
    nll_BT, lse_BT, aux = losses_and_aux(config.model, params, batch, execution)
    total = weighted_sum(nll_BT, lse_BT, weights_BT, config.optim.z_loss)
    return total, {"nll": (trained_BT * nll_BT).sum(), **aux}


def metrics(sums: dict, batch: Batch) -> dict:
    """Bits per byte of the tokens with a weight; 0, like the loss, where there are none. And those of experts."""
    return {"bits_per_byte": bits_per_byte(sums["nll"], jnp.maximum(batch["bytes"].sum(), 1.0))} | expert_metrics.metrics(sums)


NEXT_TOKEN = Objective(weight, loss, metrics, FIELDS)
