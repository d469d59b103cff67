"""Supervised fine-tuning: cross-entropy of the tokens that are trained on, averaged over tokens or over documents.

The loss masks of a token store say which tokens those are: of conversations the turns of some roles. Averaged over documents, a
short conversation counts as much as a long one. Of a document that is cut, each part counts as a document of its own.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hybrid_attn.config import StageConfig
from hybrid_attn.model import Execution
from hybrid_attn.model.documents import of_each_token, sums_of_documents
from hybrid_attn.train.objectives import next_token
from hybrid_attn.train.objectives.objective import Batch, Objective, reads


def token_weights(config: StageConfig, batch: Batch) -> jax.Array:
    """The weights [B, T] of the tokens, which sum to one in every document with a trained token where those are averaged."""
    if config.average_over == "tokens":
        return batch["weights"]
    sums_BP = sums_of_documents(batch["weights"], batch["segments"])
    return batch["weights"] / jnp.maximum(of_each_token(sums_BP, batch["segments"]), 1.0)


def weight(config: StageConfig, batch: Batch) -> jax.Array:
    """The number of trained tokens, or of documents with one."""
    return token_weights(config, batch).sum()


def loss(config: StageConfig, params: dict, extras: Mapping, batch: Batch, execution: Execution) -> tuple[jax.Array, dict]:
    """`next_token.loss` with these weights; the sum of negative log-probabilities is that of the trained tokens as they are."""
    weights_BT, trained_BT = token_weights(config, batch), batch["weights"]
    return next_token.weighted_loss(config, params, batch, execution, weights_BT, trained_BT)


SFT = Objective(weight, loss, next_token.metrics, next_token.FIELDS, check=reads("average_over"))
