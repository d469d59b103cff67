"""Tokens sampled from logits: each filter by hand, frequencies against exact probabilities, independence of requests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.infer.sampling import GREEDY, Sampling, filtered, sample
from hybrid_attn.parallel.mesh import BATCH

PROBS = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)
draw = jax.jit(sample, static_argnums=1)


def allowed_tokens(probs, **options):
    """Tokens that a sampling of logits log(probs) may give."""
    logits_BV = filtered(jnp.log(jnp.array([probs], jnp.float32)), Sampling(**({"temperature": 1.0} | options)))
    return np.flatnonzero(np.isfinite(logits_BV[0])).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.37}, [1, 3, 4]),
        ({"min_p": 0.38}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 2, "top_p": 0.56}, [1]),  # of the two left the first has 4/7
        ({"top_k": 2, "top_p": 0.58}, [1, 3]),
        ({"temperature": 0.5, "top_p": 0.56}, [1]),  # squared and normed the first has 0.16 of 0.285
        ({"temperature": 0.5, "top_p": 0.57}, [1, 3]),
        ({"temperature": 2.0, "min_p": 0.49}, [1, 2, 3, 4]),
        ({"temperature": 2.0, "min_p": 0.51}, [1, 3, 4]),
    ],
)
def test_filters_allow_the_tokens_of_their_definitions(options, expected):
    assert allowed_tokens(PROBS, **options) == expected


def test_tokens_of_equal_probability_are_allowed_together():
    assert allowed_tokens([0.3, 0.2, 0.3, 0.2], top_k=1) == [0, 2]
    assert allowed_tokens([0.3, 0.2, 0.3, 0.2], top_p=0.7) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.75}, {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.3}],
)
def test_tokens_come_as_often_as_their_probabilities_say(options, one_device):
    sampling, draws = Sampling(**({"temperature": 1.0} | options)), 20_000
    probs = PROBS.astype(np.float64) ** (1 / sampling.temperature)
    probs *= np.isin(np.arange(5), allowed_tokens(PROBS, **options))
    expected = draws * probs / probs.sum()
    logits_BV = jnp.broadcast_to(jnp.log(PROBS), (draws, 5))
    tokens_B, _ = draw(logits_BV, sampling, jnp.full(draws, 7, jnp.uint32), jnp.arange(draws))
    counts, possible = np.bincount(tokens_B, minlength=5), expected > 0
    assert not counts[~possible].any()
    chi_square = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    assert chi_square < 27.9  # exceeded once in 100,000 at 4 degrees of freedom


def test_greedy_takes_the_likeliest_and_log_probabilities_are_the_models_own(one_device):
    logits_BV = jax.random.normal(jax.random.key(0), (3, 11))
    seeds_B, numbers_B = jnp.arange(3, dtype=jnp.uint32), jnp.zeros(3, jnp.int32)
    expected_BV = jax.nn.log_softmax(logits_BV)
    for sampling in (GREEDY, Sampling(temperature=3.0, top_k=4)):
        tokens_B, logprobs_B = draw(logits_BV, sampling, seeds_B, numbers_B)
        np.testing.assert_allclose(logprobs_B, expected_BV[np.arange(3), tokens_B], rtol=1e-5)
        assert (tokens_B.dtype, logprobs_B.dtype) == (jnp.int32, jnp.float32)
        if sampling is GREEDY:
            assert tokens_B.tolist() == np.argmax(logits_BV, -1).tolist()
    cold, _ = draw(logits_BV, Sampling(temperature=1e-30), seeds_B, numbers_B)
    assert cold.tolist() == np.argmax(logits_BV, -1).tolist()


def test_a_sampled_token_depends_on_seed_and_number_and_not_on_the_batch_or_the_mesh(one_device):
    sampling = Sampling(temperature=1.0, top_k=60, top_p=0.99)
    logits_BV = jax.random.normal(jax.random.key(1), (8, 64))
    seeds_B, numbers_B = np.array([0, 1, 2, 3, 0, 2**32 - 1, 5, 1], np.uint32), np.array([0, 0, 4, 0, 1, 9, 9, 0], np.int32)
    expected_B, _ = draw(logits_BV, sampling, seeds_B, numbers_B)
    for rows in ([3], [7, 2], [5, 4, 0, 1]):
        tokens_B, _ = draw(logits_BV[jnp.array(rows)], sampling, seeds_B[rows], numbers_B[rows])
        assert tokens_B.tolist() == expected_B[jnp.array(rows)].tolist()
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        split_BV = jax.device_put(np.asarray(logits_BV), NamedSharding(mesh, P(BATCH, "tensor")))
        assert draw(split_BV, sampling, seeds_B, numbers_B)[0].tolist() == expected_B.tolist()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01)])
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_are_sharded_as_the_logits(rows, sampling, one_device):
    logits_BV = np.random.default_rng(0).normal(size=(rows, 12)).astype(np.float32)
    seeds_B, numbers_B = np.arange(rows, dtype=np.uint32), np.zeros(rows, np.int32)
    logits, seeds, numbers = jax.device_put((logits_BV, seeds_B, numbers_B), NamedSharding(one_device, P(BATCH)))
    tokens_B, logprobs_B = draw(logits, sampling, seeds, numbers)
    assert jax.typeof(tokens_B).sharding.spec == jax.typeof(logprobs_B).sharding.spec == P(BATCH)
    np.testing.assert_array_equal((tokens_B, logprobs_B), draw(logits_BV, sampling, seeds_B, numbers_B))


def test_other_seeds_and_numbers_give_other_tokens(one_device):
    logits_BV, zeros_B = jnp.zeros((64, 1000)), np.zeros(64, np.int32)
    by_seed, _ = draw(logits_BV, Sampling(temperature=1.0), np.arange(64, dtype=np.uint32), zeros_B)
    by_number, _ = draw(logits_BV, Sampling(temperature=1.0), zeros_B.astype(np.uint32), np.arange(64, dtype=np.int32))
    assert min(len(set(by_seed.tolist())), len(set(by_number.tolist()))) > 50


def test_a_loop_samples_the_same_as_separate_calls(one_device):
    logits_BV, sampling = jax.random.normal(jax.random.key(2), (2, 50)), Sampling(temperature=1.0, min_p=0.01)
    seeds_B = jnp.array([3, 4], jnp.uint32)

    @jax.jit
    def loop(logits_BV):
        def body(carry):
            n, tokens_Bn = carry
            tokens_B, _ = sample(logits_BV, sampling, seeds_B, jnp.full(2, n))
            return n + 1, jax.lax.dynamic_update_slice(tokens_Bn, tokens_B[:, None], (0, n))

        return jax.lax.while_loop(lambda carry: carry[0] < 6, body, (0, jnp.zeros((2, 6), jnp.int32)))[1]

    alone = [draw(logits_BV, sampling, seeds_B, jnp.full(2, n))[0] for n in range(6)]
    assert loop(logits_BV).T.tolist() == [tokens_B.tolist() for tokens_B in alone]


@pytest.mark.parametrize(
    ("sampling", "sorts"),
    [(GREEDY, []), (Sampling(1.0, min_p=0.1), []), (Sampling(1.0, top_k=2), ["top_k"]), (Sampling(1.0, top_p=0.5), ["sort"])],
)
def test_the_vocabulary_is_sorted_only_where_a_filter_needs_it(sampling, sorts, one_device):
    traced = jax.make_jaxpr(functools.partial(sample, sampling=sampling))(
        jnp.zeros((2, 9)), seeds_B=jnp.zeros(2, jnp.uint32), numbers_B=jnp.zeros(2, jnp.int32)
    )
    assert [name for name in ("sort", "top_k") if f" {name}[" in str(traced)] == sorts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"top_k": 5, "min_p": 0.1}, "top_k=5, min_p=0.1 changes nothing at temperature=0; use temperature=1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1 token"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_wrong_sampling_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
