"""Compression of a cache keeps the slots of the papers' algorithms, which are written here as loops over single numbers."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import biggest_array, mesh_of
from jax.sharding import PartitionSpec as P

from hybrid_attn.infer.cache import compress
from hybrid_attn.infer.cache.compress import METHODS, VOTING, Compression, Scoring

B, N, K, H, S, W = 4, 6, 2, 8, 41, 5
LENGTHS = np.array([41, 23, 13, 3], np.int32)  # the whole cache, less, a little more than the cap of 12, less than the window
SCALE, SOFTCAP = 0.6, 1.7


scored = jax.jit(compress.scores, static_argnums=0)
counted = jax.jit(compress.counts, static_argnums=0)
chosen = jax.jit(compress.kept_slots, static_argnums=2)
compacted = jax.jit(compress.compacted)


def small(method="snapkv", **changes) -> Compression:
    return Compression(method, **{"cap": 12, "window": W, "sinks": 2} | changes)


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, W, N, H), (B, K, S, H), (B, K, S, H)))
    past = np.arange(S) >= LENGTHS[:, None, None]
    return q, np.where(past[..., None], np.nan, k), np.where(past[..., None], np.nan, v), rng.normal(size=N).astype(np.float32)


def scores_of(c, q, k, lengths=LENGTHS, compiled=True, **options):
    function = scored if compiled else compress.scores
    scoring = Scoring(SCALE, **options)
    return np.asarray(function(c, jax.random.key(3), q, jnp.asarray(k), jnp.asarray(lengths), scoring))


def paper_votes(c, q_BWNH, k_BKSH, lengths_B, softcap=None, sinks_N=None) -> np.ndarray:
    """SnapKV for each request, query head and query separately; slots without votes are NaN."""
    votes_BKS = np.full(k_BKSH.shape[:3], np.nan)
    for b, length in enumerate(lengths_B):
        prefix = max(0, length - c.window)
        for h in range(K):
            heads = []
            for n in range(h * N // K, (h + 1) * N // K):
                total = np.zeros(prefix)
                for j in range(c.window):
                    at = length - c.window + j
                    if at < 0:
                        continue
                    s = np.array([SCALE * float(np.dot(q_BWNH[b, j, n], k_BKSH[b, h, t])) for t in range(at + 1)])
                    s = s if softcap is None else softcap * np.tanh(s / softcap)
                    mass = np.exp(s).sum() + (0 if sinks_N is None else math.exp(sinks_N[n]))
                    total += np.exp(s[:prefix]) / mass
                near = [total[max(0, t - c.kernel // 2) : t + c.kernel // 2 + 1] for t in range(prefix)]
                heads.append([x.max() if c.pooling == "max" else x.sum() / c.kernel for x in near])
            votes_BKS[b, h, :prefix] = np.mean(heads, axis=0)
    return votes_BKS


def best(scores_S, count) -> list[int]:
    """The slots with the highest scores; among equal scores the lowest slot comes first."""
    return sorted(sorted(range(len(scores_S)), key=lambda s: (-scores_S[s], s))[:count])


def kept_of(c, scores, lengths=LENGTHS, slots=None):
    """(slots kept by each head as lists, their indices), composed as the engine does for a single layer."""
    kept_BK = np.asarray(counted(c, scores, compress.budgets(c, lengths, 1)[0]))
    index_BKC = np.asarray(chosen(scores, kept_BK, slots or int(kept_BK.max())))
    return [
        [index_BKC[b, h, : kept_BK[b, h]].tolist() for h in range(kept_BK.shape[1])] for b in range(len(kept_BK))
    ], index_BKC


@pytest.mark.parametrize(
    "keys, pooling, kernel, softcap, with_sinks",
    [(16, "avg", 5, None, False), (1024, "avg", 1, SOFTCAP, False), (16, "max", 5, SOFTCAP, True), (41, "max", 7, None, True)],
)
def test_scores_are_the_papers_for_requests_of_unequal_lengths_and_shared_heads(
    monkeypatch, keys, pooling, kernel, softcap, with_sinks
):
    monkeypatch.setattr(compress, "BLOCK", keys)
    q, k, _, sinks = arrays()
    c, sinks_N = small(pooling=pooling, kernel=kernel), sinks if with_sinks else None
    got = scores_of(c, q, k, compiled=False, softcap=softcap, sinks_N=sinks_N)
    expected = paper_votes(c, q, k, LENGTHS, softcap, sinks_N)
    for b, length in enumerate(LENGTHS):
        prefix = max(0, length - W)
        np.testing.assert_allclose(got[b, :, :prefix], expected[b, :, :prefix], rtol=2e-5)
        assert np.all(got[b, :, prefix:length] == np.inf) and np.all(got[b, :, length:] == -np.inf)


@pytest.mark.parametrize("method", ["snapkv", "streaming"])
def test_kept_slots_are_the_papers_in_reading_order(method):
    q, k, _, _ = arrays()
    c, votes = small(method), paper_votes(small(), q, k, LENGTHS)
    kept, _ = kept_of(c, scores_of(c, q, k))
    for b, length in enumerate(int(n) for n in LENGTHS):
        for h in range(K):
            if length <= 12:
                expected = list(range(length))
            elif method == "streaming":
                expected = [0, 1, *range(length - 10, length)]
            else:
                expected = best(votes[b, h, : length - W], 12 - W) + list(range(length - W, length))
            assert kept[b][h] == expected


def test_the_votes_of_shared_heads_are_not_those_of_one_of_them():
    q, k, _, _ = arrays()
    alone = paper_votes(small(), np.repeat(q[:, :, :1], N, axis=2), k, LENGTHS)
    assert not np.allclose(alone[0, 0, : S - W], scores_of(small(), q, k)[0, 0, : S - W], rtol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_request_no_longer_than_the_cap_is_unchanged(method):
    q, k, v, _ = arrays()
    c, lengths = small(method, cap=23), np.array([41, 23, 13, 3], np.int32)
    scores = scores_of(c, q, k)
    for budget_B in compress.budgets(c, lengths, 3):
        kept_BK = counted(c, scores, budget_B)
        index_BKC = chosen(scores, kept_BK, S)
        assert np.array_equal(kept_BK[1:], np.repeat(lengths[1:, None], K, 1)) and np.all(kept_BK[0] < 41)
        for before, after in zip((k, v), compacted((k, v), index_BKC), strict=True):
            assert np.array_equal(after[1:], np.nan_to_num(before[1:]))


@pytest.mark.parametrize("method", VOTING)
def test_one_slot_less_than_the_length_drops_the_lowest_score(method):
    q, k, _, _ = arrays()
    lengths, c = LENGTHS[:1], small(method, cap=S - 1)
    scores = scores_of(c, q[:1], k[:1], lengths)
    kept, _ = kept_of(c, scores, lengths)
    dropped = [set(range(S)) - set(kept[0][h]) for h in range(K)]
    if method == "adakv":  # two slots of all heads
        lowest = sorted((scores[0, h, s], h, s) for h in range(K) for s in range(S))[:K]
        assert sorted((h, s) for h in range(K) for s in dropped[h]) == sorted((h, s) for _, h, s in lowest)
    else:
        assert dropped == [{int(np.argmin(scores[0, h]))} for h in range(K)]


def test_among_equal_scores_the_lowest_slot_is_kept_first_and_then_the_lowest_head():
    scores = np.zeros((1, 3, 9), np.float32)
    scores[0, :, 7:] = np.inf
    kept, _ = kept_of(small(cap=6, window=2), scores, [9])
    assert kept[0] == [[0, 1, 2, 3, 7, 8]] * 3
    scores[0, 0, 6] = 1.0  # of 15 slots 6 are the windows', one is the highest, and 8 are equal
    kept, _ = kept_of(small("adakv", cap=5, window=2, floor=0.0), scores, [9])
    assert kept[0] == [[0, 1, 2, 6, 7, 8], [0, 1, 2, 7, 8], [0, 1, 7, 8]]


@pytest.mark.parametrize("floor", [0.0, 0.7, 1.0])
def test_adakv_shares_the_slots_of_a_layer_among_its_heads(floor):
    rng, c = np.random.default_rng(1), small("adakv", floor=floor)
    scores = rng.uniform(size=(B, K, S)).astype(np.float32)
    scores[:, 1] *= 0.2
    slot_S, length_B11 = np.arange(S), LENGTHS[:, None, None]
    scores = np.where(slot_S < length_B11, np.where(slot_S >= length_B11 - W, np.inf, scores), -np.inf)
    kept, _ = kept_of(c, scores)
    for b, length in enumerate(int(n) for n in LENGTHS):
        safe = {(h, s) for h in range(K) for s in best(scores[b, h, :length], max(1, int(floor * 12)))}
        rest = sorted((-scores[b, h, s], s, h) for h in range(K) for s in range(length) if (h, s) not in safe)
        expected = safe | {(h, s) for _, s, h in rest[: K * min(12, length) - len(safe)]}
        assert {(h, s) for h in range(K) for s in kept[b][h]} == expected
        assert sum(map(len, kept[b])) == K * min(12, length)
    assert [len(heads[0]) for heads in kept] == {0.0: [19, 18, 13, 3], 0.7: [16, 16, 13, 3], 1.0: [12, 12, 12, 3]}[floor]


def test_random_keeps_the_window_and_other_slots_of_each_head():
    q, k, _, _ = arrays()
    c, draw = small("random"), functools.partial(scored, lengths_B=jnp.asarray(LENGTHS), scoring=Scoring(SCALE))
    kept = [kept_of(c, draw(c, jax.random.key(seed), None, jnp.asarray(k)))[0] for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    for b, length in enumerate(int(n) for n in LENGTHS[:2]):
        assert kept[0][b][0] != kept[0][b][1]
        assert all(head[-W:] == list(range(length - W, length)) and len(head) == 12 for head in kept[0][b])
    many = [kept_of(c, draw(c, jax.random.key(seed), None, jnp.asarray(k)))[0][0][0] for seed in range(40)]
    assert len({s for head in many for s in head}) == S


def test_a_pyramid_has_the_same_total_budget_as_uniform_layers():
    c = Compression("pyramid", cap=70, window=10, beta=6)
    got = compress.budgets(c, [1000, 95, 71, 70, 7], 5)
    assert [list(row) for row in got.T] == [
        [120, 95, 70, 45, 20],  # from 2 x 60 - 10 down to 10 beside the window of 10
        [95, 82, 70, 58, 45],  # the first layer keeps all 95: halves go to the even number
        [71, 70, 70, 70, 69],
        [70] * 5,
        [7] * 5,
    ]
    assert compress.budgets(c, [1000], 1) == 70
    for layers in range(1, 12):
        for beta in (1, 3, 20):
            c = Compression("pyramid", cap=101, window=16, beta=beta)
            got = compress.budgets(c, range(1, 400, 7), layers)
            assert np.array_equal(got.sum(0), layers * np.minimum(101, np.arange(1, 400, 7)))
            assert np.all(np.diff(got, axis=0) <= 0) and np.all(got <= np.arange(1, 400, 7))
    most = 2 * Fraction(101 - 16) - Fraction(101 - 16, 20)
    assert got[0, -1] == 16 + round(most)


@pytest.mark.parametrize("method", ["snapkv", "pyramid"])
def test_other_methods_give_each_head_its_layers_budget(method):
    q, k, _, _ = arrays()
    budget_LB = compress.budgets(small(method), LENGTHS, 2)
    first = counted(small(method), scores_of(small(method), q, k), budget_LB[0])
    assert np.array_equal(first, np.repeat(budget_LB[0][:, None], K, 1))
    assert (budget_LB[0] == budget_LB[1]).all() == (method == "snapkv")


def test_attention_over_the_compacted_cache_is_attention_over_the_kept_slots():
    q, k, v, _ = arrays()
    c = small("adakv")
    kept, index_BKC = kept_of(c, scores_of(c, q, k), slots=50)  # more than there were: room for tokens to come
    new_k, new_v = compacted((k, v), index_BKC)
    assert new_k.shape == (B, K, 50, H)

    def attended(query, keys, values):
        p = np.exp(keys @ query)
        return p @ values / p.sum()

    for b in range(B):
        for h in range(K):
            count = len(kept[b][h])
            got = attended(q[b, 0, h], new_k[b, h, :count], new_v[b, h, :count])
            np.testing.assert_allclose(got, attended(q[b, 0, h], k[b, h, kept[b][h]], v[b, h, kept[b][h]]), rtol=1e-4)
            assert not np.any(new_k[b, h, count:]) and not np.any(new_v[b, h, count:])


def test_the_scales_of_an_int8_cache_count_in_the_scores_and_follow_their_slots():
    q, _, _, _ = arrays()
    rng = np.random.default_rng(2)
    k = rng.integers(-127, 128, (B, K, S, H)).astype(np.int8)
    scales = rng.uniform(0.001, 0.02, (B, K, S)).astype(np.float32)
    scores = scores_of(small(), q, k, k_scales_BKS=jnp.asarray(scales))
    np.testing.assert_allclose(scores, scores_of(small(), q, k * scales[..., None]), rtol=2e-5)
    kept, index_BKC = kept_of(small(), scores)
    new_k, new_scales = compacted((k, scales), index_BKC)
    assert new_k.dtype == jnp.int8 and new_scales.shape == (B, K, 12)
    for b in range(B):
        for h in range(K):
            assert np.array_equal(new_k[b, h, : len(kept[b][h])], k[b, h, kept[b][h]])
            assert np.array_equal(new_scales[b, h, : len(kept[b][h])], scales[b, h, kept[b][h]])


def test_scores_hold_no_more_than_a_block_of_the_windows_attention(monkeypatch):
    monkeypatch.setattr(compress, "BLOCK", 64)
    long = 64 * 32
    q, k = jnp.zeros((1, W, N, H)), jnp.zeros((1, K, long, H))
    biggest = biggest_array(lambda q, k, n: compress.scores(small(), None, q, k, n, Scoring(1.0)), q, k, jnp.array([long]))
    assert biggest == N * long


@pytest.mark.parametrize(
    "method, inside", [("snapkv", "explicit"), ("adakv", "explicit"), ("random", "explicit"), ("adakv", "shard_map")]
)
def test_sharded_requests_and_heads_keep_the_slots_of_one_device(method, inside):
    q, k, v, sinks = (jnp.asarray(x) for x in arrays())
    c = small(method)

    def score(q, k, lengths, sinks):
        key = jax.random.key(3)
        return compress.scores(c, key, q, k, lengths, Scoring(SCALE, SOFTCAP, sinks))

    def compressed(score, q, k, v, lengths, sinks):
        scores_BKS = score(q, k, lengths, sinks)
        kept_BK = compress.counts(c, scores_BKS, compress.budgets(c, LENGTHS, 1)[0])
        index_BKC = compress.kept_slots(scores_BKS, kept_BK, 24)
        return kept_BK, index_BKC, compress.compacted((k, v, k[..., 0]), index_BKC)

    specs = P("data", None, "tensor"), P("data", "tensor"), P("data", "tensor"), P("data"), P("tensor")
    args = q, k, v, jnp.asarray(LENGTHS), sinks
    expected = compressed(score, *args)
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        args = [jax.device_put(x, spec) for x, spec in zip(args, specs, strict=True)]
        if inside == "shard_map":
            score = jax.shard_map(score, in_specs=(*specs[:2], *specs[3:]), out_specs=P("data", "tensor"))
        got = jax.jit(compressed, static_argnums=0)(score, *args)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("method", METHODS)
def test_one_program_serves_all_lengths_and_budgets(method):
    q, k, v, _ = (jnp.asarray(x) for x in arrays())
    c, traced = small(method), []

    @jax.jit
    def compressed(q, k, v, lengths, budget):
        traced.append(lengths)
        scores = compress.scores(c, jax.random.key(3), q, k, lengths, Scoring(SCALE))
        kept_BK = compress.counts(c, scores, budget)
        return kept_BK, compress.compacted((k, v), compress.kept_slots(scores, kept_BK, 24))

    for lengths in (LENGTHS, LENGTHS[::-1] // 2 + W):
        kept_BK, (new_k, _) = compressed(q, k, v, lengths, compress.budgets(c, lengths, 1)[0])
        expected, index_BKC = kept_of(c, scores_of(c, q, k, lengths), lengths, 24)
        assert [[len(head) for head in row] for row in expected] == kept_BK.tolist()
        assert np.array_equal(new_k, compacted(k, index_BKC), equal_nan=True)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "snapvk"}, "method='snapvk' is not one of 'snapkv', 'pyramid'"),
        ({"pooling": "mean"}, "pooling='mean' is not one of 'avg', 'max'"),
        ({"cap": 64}, "cap=64 slots leave none beside window=64; use a cap above 64"),
        ({"cap": 4, "method": "streaming"}, "cap=4 slots leave none beside sinks=4"),
        ({"cap": 0, "method": "streaming", "sinks": 0}, "cap=0 slots leave none beside sinks=0"),
        ({"window": 0}, "window=0 must be at least 1 token"),
        ({"kernel": 6}, "kernel=6 has no middle; use an odd number, as 7"),
        ({"kernel": -1}, "kernel=-1 has no middle; use an odd number, as 1"),
        ({"sinks": -2}, "sinks=-2 must not be negative"),
        ({"beta": 0}, "beta=0 must be at least 1"),
        ({"floor": 1.2}, "floor=1.2 must be a share from 0 to 1"),
    ],
)
def test_wrong_compression_options_are_refused_with_their_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        Compression(**{"method": "snapkv", "cap": 320} | changes)
