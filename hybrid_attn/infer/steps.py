"""The programs that an engine compiles: a chunk read, a chunk scored, some tokens decoded.

Letters: B rows, T tokens of a chunk, D model, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType, Model
from hybrid_attn.infer.cache.attend import attend as cached_attend
from hybrid_attn.infer.cache.shapes import Cache, Layer
from hybrid_attn.infer.sampling import Sampling, sample
from hybrid_attn.model import Run, logits, unembedding
from hybrid_attn.model.attention import Attend
from hybrid_attn.model.extend import layer_by_layer
from hybrid_attn.model.loss import token_losses
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT, spec_of

SLICE = 32  # most tokens of a row between two looks at what came


class Program(NamedTuple):
    """What programs are compiled for, besides shapes."""

    model: Model
    run: Run
    span: int  # slots that a shard of `context` takes in its turn: its part of a chunk


def extend(
    model: Model, weights: dict, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache, run: Run, span: int
) -> tuple[jax.Array, Cache, tuple[jax.Array | None, ...]]:
    """Final normed activations [B, T, D] of the next `counts_B` tokens of each row, and the cache that has read them.

    Tokens beyond a row's count are padding. `weights` are `unstacked`'s; the cache must have room (`cache.attend`, which says
    what `span` is). Last come each layer's queries [B, T, N, H] as they enter the scores; None for a ring.
    """
    spec = spec_of(tokens_BT)
    T = tokens_BT.shape[1]
    pos_BT = jax.reshard(jax.reshard(cache.lengths_B, P(BATCH))[:, None] + jnp.arange(T), spec)

    def in_cache(layer: Layer) -> Attend:
        def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, kind: LayerType, scale: float):
            o_BTNH, new = cached_attend(
                q_BTNH, k_BTKH, v_BTKH, layer, cache.lengths_B, counts_B, sinks_N,
                kind=kind, scale=scale, kernel=run.kernel, span=span,
            )  # fmt: skip
            return o_BTNH, (new, None if new.dropped_BK is None else q_BTNH)

        return attend

    x_BTD, kept = layer_by_layer(model, weights, tokens_BT, pos_BT, [in_cache(layer) for layer in cache.layers], run)
    layers, queries = zip(*kept, strict=True)
    return x_BTD, Cache(layers, cache.lengths_B + counts_B), queries


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5, 6))
def read(program: Program, with_queries: bool, weights, tokens_BT, counts_B, cache: Cache, last_BD):
    """The cache after a chunk, each row's last activations [B, D] (`last_BD` where it has nothing to read), and its queries."""
    x_BTD, cache, queries = extend(program.model, weights, tokens_BT, counts_B, cache, program.run, program.span)
    ends_BT = jax.reshard(jnp.arange(tokens_BT.shape[1]) == counts_B[:, None] - 1, TOKENS_BT)
    # A sum over one: the token may be on another shard.
    here_BD = jnp.einsum("BT,BTD->BD", ends_BT.astype(x_BTD.dtype), x_BTD, out_sharding=P(BATCH, None))
    return cache, jnp.where(counts_B[:, None] > 0, here_BD, last_BD), queries if with_queries else ()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def score(program: Program, weights, tokens_BT, targets_BT, counts_B, cache: Cache) -> tuple[Cache, jax.Array]:
    """The cache after a chunk, and the negative log-probability [B, T] of each token's target, on every device."""
    x_BTD, cache, _ = extend(program.model, weights, tokens_BT, counts_B, cache, program.run, program.span)
    table_VD = unembedding(program.model, weights)
    return cache, jax.reshard(token_losses(program.model, table_VD, x_BTD, targets_BT, program.run.loss_chunk)[0], P())


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def decode(program: Program, sampling: Sampling, weights, cache: Cache, last_BD, done_B, seeds_B, stops, number, steps):
    """Up to `steps` tokens of each row that is not done, of which the first is the row's `number`-th, from 0.

    Returns the cache, the last activations, and (tokens [B, SLICE], log-probabilities, how many, which rows are done), these on
    every device.
    """
    zeros_BT = jnp.zeros((done_B.shape[0], SLICE), jnp.int32, out_sharding=P(BATCH, None))

    def go_on(carry):
        i, *_, done_B = carry
        return (i < steps) & ~jnp.all(done_B)

    def step(carry):
        i, cache, last_BD, tokens_BT, logprobs_BT, counts_B, done_B = carry
        logits_BV = logits(program.model, weights, last_BD[:, None])[:, 0]
        logits_BV = jax.reshard(logits_BV, P(BATCH, None))
        numbers_B = jnp.full_like(counts_B, number) + i
        new_B, logprob_B = sample(logits_BV, sampling, seeds_B, numbers_B)
        tokens_BT = jax.lax.dynamic_update_index_in_dim(tokens_BT, new_B, i, 1)
        logprobs_BT = jax.lax.dynamic_update_index_in_dim(logprobs_BT, logprob_B, i, 1)
        counts_B += ~done_B
        x_B1D, cache, _ = extend(
            program.model, weights, new_B[:, None], (~done_B).astype(jnp.int32), cache, program.run, program.span
        )
        done_B |= (new_B[:, None] == stops).any(1)
        return i + 1, cache, x_B1D[:, 0], tokens_BT, logprobs_BT, counts_B, done_B

    counts_B = jnp.zeros_like(done_B, jnp.int32)
    start = (jnp.int32(0), cache, last_BD, zeros_BT, zeros_BT.astype(jnp.float32), counts_B, done_B)
    _, cache, last_BD, *new = jax.lax.while_loop(go_on, step, start)
    return cache, last_BD, jax.reshard(tuple(new), P())
