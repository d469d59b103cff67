"""Recall: how many answers of a synthetic task's held-out rows a model gives, each the likeliest token where it is wanted.

Only bytes have such tasks: a vocabulary of a few hundred words, so that all logits of a batch are little beside the rest.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.data.synthetic import SyntheticSequences
from hybrid_attn.evals.subject import Spec, Subject, check_finite
from hybrid_attn.model import Run, apply, logits
from hybrid_attn.parallel.mesh import BATCH

TOKENS = 8192  # of a batch on each of its shards: their logits all exist at once


def run(subject: Subject, spec: Spec) -> Iterator[dict]:
    """One record: of the answers in `spec.tokens` tokens of rows of `spec.length` the share that is right, in all and by row.

    The row holds the right answers, so that one does not suffer from another.
    """
    rows = SyntheticSequences(spec.documents, spec.length, None)
    batch = max(1, TOKENS // spec.length) * math.prod(subject.mesh.shape[axis] for axis in BATCH)
    number = -(-spec.tokens // spec.length)
    found = [
        jax.device_get(_right(subject.model, subject.run, subject.params, arrays))
        for arrays in heldout_batches(rows, number, batch, subject.mesh)
    ]
    sums = np.concatenate(found, 1)[:, :number]
    check_finite(sums, "a logit of an answer")
    right_B, answers_B, _ = sums.astype(int)
    shares = {"accuracy": right_B.sum() / answers_B.sum(), "by_row": (right_B / answers_B).tolist()}
    yield {"task": spec.documents.fingerprint(), "length": spec.length, "answers": int(answers_B.sum()), **shares}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(model: Model, run: Run, params: dict, batch: dict):
    """Right answers, answers, and the log-sum-exp over the answers' logits, which shows NaN, of each row: [3, B]."""
    x_BTD = apply(model, params, batch["tokens"], batch["positions"], batch["segments"], run)
    logits_BTV, weights_BT = logits(model, params, x_BTD), batch["weights"]
    right_BT = jnp.argmax(logits_BTV, -1) == batch["targets"]
    lse_BT = jax.nn.logsumexp(logits_BTV, -1)
    counts = [(weights_BT * right_BT).sum(1), weights_BT.sum(1), jnp.where(weights_BT > 0, lse_BT, 0).sum(1)]
    return jax.reshard(jnp.stack(counts), P())
