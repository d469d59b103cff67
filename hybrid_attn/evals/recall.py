"""Recall: how many answers of a synthetic task's held-out rows a model gives, each the likeliest token where it is wanted."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from hybrid_attn.config import Model
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.data.synthetic import SyntheticRows
from hybrid_attn.evals.subject import Spec, Subject
from hybrid_attn.model import Run, apply, logits
from hybrid_attn.parallel.mesh import BATCH

TOKENS = 8192  # of a batch on each of its shards: their logits all exist at once


def run(subject: Subject, spec: Spec) -> Iterator[dict]:
    """One record: of the answers in `spec.tokens` tokens of rows of `spec.length`, the share that is right.

    The row holds the right answers, so that one does not suffer from another.
    """
    rows = SyntheticRows(spec.documents, spec.length, None)
    batch = max(1, TOKENS // spec.length) * math.prod(subject.mesh.shape[axis] for axis in BATCH)
    right = answers = 0
    for arrays in heldout_batches(rows, -(-spec.tokens // spec.length), batch, subject.mesh):
        new = jax.device_get(_right(subject.model, subject.run, subject.params, arrays))
        right, answers = right + int(new[0]), answers + int(new[1])
    yield {"length": spec.length, "answers": answers, "accuracy": right / answers}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(model: Model, run: Run, params: dict, batch: dict):
    """Right answers, and answers."""
    x_BTD = apply(model, params, batch["tokens"], batch["positions"], batch["segments"], run)
    likeliest_BT = jnp.argmax(logits(model, params, x_BTD), -1)
    weights_BT = batch["weights"]
    return (weights_BT * (likeliest_BT == batch["targets"])).sum(), weights_BT.sum()
