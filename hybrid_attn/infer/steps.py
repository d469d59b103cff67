"""The functions that an engine compiles: prefill of a chunk, scores of a chunk, a few decoded tokens.

Letters: B requests, T tokens of a chunk, D model, N query heads, K key/value heads, H head size, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.infer.cache.attend import attend as attend_in_cache
from hybrid_attn.infer.cache.convolve import convolve as convolve_in_cache
from hybrid_attn.infer.cache.shapes import Cache, LayerCache, LayerSettings
from hybrid_attn.infer.products import for_one_token
from hybrid_attn.infer.sampling import Sampling, sample
from hybrid_attn.model import Execution, logits
from hybrid_attn.model.attention import attention_options
from hybrid_attn.model.loss import token_losses
from hybrid_attn.model.token_mixing import TokenMixing
from hybrid_attn.model.transformer import Tokens, layer_by_layer, unembedding
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT, spec_of

SLICE = 32  # the most tokens of a request that are decoded before the host looks at them


class StepConfig(NamedTuple):
    """What a step is compiled for, besides shapes."""

    model: Model
    execution: Execution
    span: int  # a `context` shard's part of a chunk, in slots; see infer/cache/attend.py


class DecodeState(NamedTuple):
    """What decoding replaces: the cache, and the activations of each request's last token."""

    cache: Cache
    last_BD: jax.Array


class DecodeSlice(NamedTuple):
    """What is decoded: up to `steps` tokens of each request that is not done, of which the first is its `first`-th, from 0."""

    done_B: jax.Array
    seeds_B: jax.Array
    stop_tokens: jax.Array
    first: jax.Array
    steps: jax.Array


def extend(
    config: StepConfig, weights: dict, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache, tuple]:
    """(x_BTD, cache, queries) after the next `counts_B` tokens of each request; the tokens after those are padding.

    x_BTD are the final normed activations. `weights` come from `unstacked`; the cache must have room for the tokens. `queries`
    are each layer's [B, T, N, H] as they enter the scores, with its sinks [N] or None; or None for a ring.
    """
    T = tokens_BT.shape[1]
    position_BT = jax.reshard(cache.lengths_B, P(BATCH))[:, None] + jnp.arange(T)
    position_BT = jax.reshard(position_BT, spec_of(tokens_BT))

    def cached(letter: str, layer: LayerCache, inputs_BUD: jax.Array | None) -> TokenMixing:
        options, chunk = attention_options(config.model, letter), config.model.kinds[letter].chunk
        settings = LayerSettings(options, chunk, config.execution.kernel, config.span, config.execution.vector_products)

        def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N):
            qkv = q_BTNH, k_BTKH, v_BTKH
            o_BTNH, new_layer = attend_in_cache(settings, layer, qkv, cache.lengths_B, counts_B, sinks_N)
            return o_BTNH, (new_layer, None if settings.is_ring else (q_BTNH, sinks_N))

        def convolve(weight_WD, x_BTD):
            return convolve_in_cache(weight_WD, x_BTD, inputs_BUD, counts_B)

        return TokenMixing(attend, convolve)

    mixings = list(map(cached, config.model.layers, cache.layers, cache.inputs))
    segment_BT = (jnp.arange(T) < jax.reshard(counts_B, P(BATCH))[:, None]).astype(jnp.int32)
    tokens = Tokens(tokens_BT, position_BT, jax.reshard(segment_BT, spec_of(tokens_BT)))
    x_BTD, states = layer_by_layer(config.model, weights, tokens, mixings, config.execution)
    layers, queries = zip(*(state.attention for state in states), strict=True)
    return x_BTD, Cache(layers, tuple(state.inputs_BUD for state in states), cache.lengths_B + counts_B), queries


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def prefill(config: StepConfig, with_queries: bool, weights, state: DecodeState, tokens_BT, counts_B):
    """(state, queries) after a chunk. A request without tokens in it keeps its last activations."""
    x_BTD, cache, queries = extend(config, weights, tokens_BT, counts_B, state.cache)
    is_last_BT = jax.reshard(jnp.arange(tokens_BT.shape[1]) == counts_B[:, None] - 1, TOKENS_BT)
    # A sum over one token, because the token may be on another shard.
    last_BD = jnp.einsum("BT,BTD->BD", is_last_BT.astype(x_BTD.dtype), x_BTD, out_sharding=P(BATCH, None))
    last_BD = jnp.where(counts_B[:, None] > 0, last_BD, state.last_BD)
    return DecodeState(cache, last_BD), queries if with_queries else ()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def score(config: StepConfig, weights, cache: Cache, tokens_BT, targets_BT, counts_B) -> tuple[Cache, jax.Array]:
    """The cache after a chunk, and the negative log-probability [B, T] of each token's target, on every device."""
    x_BTD, cache, _ = extend(config, weights, tokens_BT, counts_B, cache)
    table_VD, execution = unembedding(config.model, weights), config.execution
    nll_BT, _ = token_losses(config.model, table_VD, x_BTD, targets_BT, execution.loss_chunk, execution.dot)
    return cache, jax.reshard(nll_BT, P())


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def decode(config: StepConfig, sampling: Sampling, weights, state: DecodeState, part: DecodeSlice):
    """(state, (tokens [B, SLICE], log-probabilities, number of tokens, done requests)), the latter on every device."""
    config = config._replace(execution=for_one_token(config.execution))
    zeros_BT = jnp.zeros((part.done_B.shape[0], SLICE), jnp.int32, out_sharding=P(BATCH, None))

    def unfinished(carry):
        i, *_, done_B = carry
        return (i < part.steps) & ~jnp.all(done_B)

    def step(carry):
        i, cache, last_BD, tokens_BT, logprobs_BT, counts_B, done_B = carry
        logits_B1V = logits(config.model, weights, last_BD[:, None], config.execution.dot)
        logits_BV = jax.reshard(logits_B1V[:, 0], P(BATCH, None))
        numbers_B = jnp.full_like(counts_B, part.first) + i
        new_B, logprob_B = sample(logits_BV, sampling, part.seeds_B, numbers_B)
        tokens_BT = jax.lax.dynamic_update_index_in_dim(tokens_BT, new_B, i, 1)
        logprobs_BT = jax.lax.dynamic_update_index_in_dim(logprobs_BT, logprob_B, i, 1)
        counts_B += ~done_B
        x_B1D, cache, _ = extend(config, weights, new_B[:, None], (~done_B).astype(jnp.int32), cache)
        done_B |= (new_B[:, None] == part.stop_tokens).any(1)
        return i + 1, cache, x_B1D[:, 0], tokens_BT, logprobs_BT, counts_B, done_B

    counts_B = jnp.zeros_like(part.done_B, jnp.int32)
    start = (jnp.int32(0), *state, zeros_BT, zeros_BT.astype(jnp.float32), counts_B, part.done_B)
    _, cache, last_BD, *new = jax.lax.while_loop(unfinished, step, start)
    return DecodeState(cache, last_BD), jax.reshard(tuple(new), P())
