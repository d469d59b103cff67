"""Loss by position: what a token gains from the tokens of its document before it."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_attn.config import Model
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.data.rows import Rows
from hybrid_attn.evals.subject import Spec, Subject
from hybrid_attn.model import Run, losses
from hybrid_attn.model.loss import bits_per_byte
from hybrid_attn.parallel.mesh import BATCH

FIRST_EDGE = 16  # tokens; the edges after it double


def run(subject: Subject, spec: Spec) -> Iterator[dict]:
    """One record per bucket of positions, [first, end) tokens into the document within its row, then one for all.

    Losses are nats per token; `bits_per_byte` is over the UTF-8 bytes of all scored tokens.
    """
    rows = Rows(spec.documents, spec.length, None, subject.tokenizer.byte_lengths)
    edges = bucket_edges(spec.length)
    batch = math.prod(subject.mesh.shape[axis] for axis in BATCH)
    sums = np.zeros((2, len(edges) - 1))
    num_bytes = 0.0
    for arrays in heldout_batches(rows, -(-spec.tokens // spec.length), batch, subject.mesh):
        new_sums, new_bytes = jax.device_get(_score(subject.model, subject.run, edges, subject.params, arrays))
        sums, num_bytes = sums + new_sums, num_bytes + float(new_bytes)
    for first, end, nll, count in zip(edges[:-1], edges[1:], *sums, strict=True):
        if count:
            yield {"length": spec.length, "first": first, "end": end, "tokens": int(count), "loss": nll / count}
    nll, count = sums.sum(1)
    bits = bits_per_byte(nll, num_bytes)
    yield {"length": spec.length, "tokens": int(count), "loss": nll / count, "bits_per_byte": bits}


def bucket_edges(length: int) -> tuple[int, ...]:
    """0, 16, 32, 64, … up to `length`."""
    doubling = [FIRST_EDGE * 2**i for i in range(length.bit_length())]
    return (0, *(edge for edge in doubling if edge < length), length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(model: Model, run: Run, edges: tuple[int, ...], params: dict, batch: dict):
    """Summed loss and number of scored tokens of each bucket [2, buckets], and the bytes that they stand for."""
    nll_BT, _ = losses(model, params, batch, run)
    pos_BT, weights_BT = batch["positions"], batch["weights"]
    sums = [
        [(x_BT * ((pos_BT >= first) & (pos_BT < end))).sum() for first, end in zip(edges[:-1], edges[1:], strict=True)]
        for x_BT in (weights_BT * nll_BT, weights_BT)
    ]
    return jnp.array(sums), batch["bytes"].sum()
