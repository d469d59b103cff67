"""Attention of one query for each request to its cache, by plain products: a kernel's `decode` where it has no faster one.

Letters: B requests, N query heads, K key/value heads, G = N/K, H head size, S slots of the cache.
"""

import jax
import jax.numpy as jnp

from hybrid_attn.kernels.interface import AttentionOptions, Pair
from hybrid_attn.kernels.softmax import finite_or_zero, log_sum_exp, soft_cap

MIN_SIZE = 2**16  # entries of a matrix: `vector_products` gain nothing for smaller ones
MOST_QUERY_HEADS = 2  # query heads of a key/value head: each reads the keys, so for more of them one product is faster


def decode(options: AttentionOptions, vector_products: bool, q_BKGH: jax.Array, kv_BKSH: Pair, visible_BKS: jax.Array) -> Pair:
    """(o_BKGH, lse_BKG) in float32. `visible_BKS` says which slots a query sees; where K is 1, in all of its heads."""
    k_BKSH, v_BKSH = kv_BKSH
    s_BKGS, _ = soft_cap(options.scale * _scores(vector_products, q_BKGH, k_BKSH), options.softcap)
    s_BKGS = jnp.where(visible_BKS[:, :, None], s_BKGS, -jnp.inf)
    max_BKG = s_BKGS.max(-1)
    p_BKGS = jnp.exp(s_BKGS - finite_or_zero(max_BKG)[..., None])
    safe_denominator_BKG, lse_BKG = log_sum_exp(max_BKG, p_BKGS.sum(-1))
    o_BKGH = jnp.einsum("BKGS,BKSH->BKGH", p_BKGS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return o_BKGH / safe_denominator_BKG[..., None], lse_BKG


def _scores(vector_products: bool, q_BKGH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """Scores [B, K, G, S] in float32, without the scale; of many keys, with `vector_products`, for one query head at a time."""
    G = q_BKGH.shape[2]
    if vector_products and G <= MOST_QUERY_HEADS and k_BKSH.size >= MIN_SIZE and k_BKSH.dtype == jnp.float32:
        return jnp.stack([jnp.einsum("BKSH,BKH->BKS", k_BKSH, q_BKGH[:, :, g]) for g in range(G)], 2)
    # This order of the einsum is the faster one on a CPU.
    return jnp.einsum("BKSH,BKGH->BKSG", k_BKSH, q_BKGH, preferred_element_type=jnp.float32).swapaxes(2, 3)
