"""The next token of each request from its logits.

Letters: B requests, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.parallel.mesh import spec_of
from hybrid_attn.trees import check


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the most likely one at temperature 0, otherwise at random among those that pass the filters.

    In this order: logits / temperature; the `top_k` largest; the fewest tokens whose probabilities reach `top_p` (arXiv
    1904.09751); tokens of at least `min_p` times the largest probability (arXiv 2407.01082). None turns a filter off.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        used = ", ".join(f"{name}={value}" for name, value in filters.items() if value is not None)
        finite = 0 <= self.temperature < float("inf")
        check(finite, f"temperature={self.temperature} must be finite and at least 0, which takes the most likely token")
        check(self.temperature > 0 or not used, f"{used} changes nothing at temperature=0; use temperature=1, or leave it out")
        enough = self.top_k is None or self.top_k >= 1
        check(enough, f"top_k={self.top_k} must be at least 1 token; leave it out to sample from all")
        for name in ("top_p", "min_p"):
            is_share = filters[name] is None or 0 < filters[name] <= 1
            check(is_share, f"{name}={filters[name]} must be above 0 and at most 1; leave it out to sample from all")


GREEDY = Sampling()


def sample(logits_BV: jax.Array, sampling: Sampling, seeds_B: jax.Array, numbers_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B], and their log-probabilities float32 [B] under the unfiltered logits.

    The noise follows from a request's uint32 seed and the int32 number of the token alone: not from the batch.
    """

    def gumbel(seed, number):  # the argmax of logits + noise is each token with the token's probability
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), number), logits_BV.shape[1:])

    batch_axes = spec_of(logits_BV)[0]
    logits_BV = jax.reshard(logits_BV.astype(jnp.float32), P(batch_axes, None))
    noisy_BV = logits_BV
    if sampling.temperature > 0:
        seeds_B, numbers_B = jax.reshard((seeds_B, numbers_B), P(batch_axes))
        noisy_BV = filtered(logits_BV, sampling) + jax.vmap(gumbel)(seeds_B, numbers_B)
    tokens_B = jnp.argmax(noisy_BV, -1).astype(jnp.int32)
    chosen_BV = jnp.arange(logits_BV.shape[1]) == tokens_B[:, None]  # a gather would lose the sharding of a batch of 1
    return tokens_B, jnp.where(chosen_BV, logits_BV, 0).sum(-1) - jax.nn.logsumexp(logits_BV, -1)


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits less their maximum, divided by the temperature of `sampling`, and -inf where its filters forbid the token."""
    logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        largest_Bk, _ = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[1]))
        logits_BV = _at_least(logits_BV, largest_Bk[:, -1:])
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, -1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, -1)
        before_BV = jnp.cumsum(probs_BV, -1) - probs_BV
        logits_BV = _at_least(logits_BV, jnp.where(before_BV < sampling.top_p, sorted_BV, 0).min(-1, keepdims=True))
    if sampling.min_p is not None:
        logits_BV = _at_least(logits_BV, jnp.log(sampling.min_p))
    return logits_BV


def _at_least(logits_BV: jax.Array, least_B1: jax.Array) -> jax.Array:
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
