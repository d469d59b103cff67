"""Every kernel computes what the reference computes, and the reference what a loop over queries computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, biggest_array, layout, temporary_bytes

from hybrid_attn import kernels
from hybrid_attn.kernels import AttentionOptions, Keys, Queries, blocked, reference
from hybrid_attn.kernels.interface import intervals

S, N, K, H, SCALE = 23, 6, 2, 8, 0.41  # S is no multiple of a block of 4 queries or a tile of 5 keys; three queries a key
CASES = [(None, None), (6, 1.5), (1, None), (9, None), (40, None)]  # window and softcap; a window of 9 takes two tiles
LAYOUTS = {
    "one document": "a" * 23,
    "packed": "a" * 7 + "b" + "c" * 9 + "d" * 6,
    "padding at the end": "a" * 9 + "b" * 8 + "." * 6,
    "padding in front": "." * 6 + "a" * 10 + "b" * 7,
    "padding between": "a" * 6 + "." * 5 + "b" * 12,
    "only padding": "." * 23,
}
HERE = [name for name, kernel in kernels.KERNELS.items() if "cpu" in kernel.platforms and kernel.needs is None]
FAST = [name for name in HERE if name != "reference"]
PAIRS = [("one document", "packed"), ("padding at the end", "padding in front"), ("padding between", "only padding")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "QUERIES", (4, 4))
    for name, size in {"FULL": 5, "EDGE": 3, "WINDOW": 10, "LINE": 2}.items():
        monkeypatch.setattr(blocked, name, size)


def arrays(*names, dtype=jnp.float32, seed=0):
    """q, k and v [B, S, heads, H], positions and segments [B, S], a sequence for each name of a layout."""
    rng, B = np.random.default_rng(seed), len(names)
    q, k, v = (rng.normal(size=(B, S, heads, H)).astype(dtype) for heads in (N, K, K))
    pos, seg = (np.stack(x) for x in zip(*(layout(LAYOUTS[name]) for name in names), strict=True))
    return q, k, v, pos, seg


def outcome(q, k, v, q_pos, k_pos, q_seg, k_seg, sinks, kernel, window, softcap=None):
    """o, lse and the gradients by q, k, v and the sinks of a loss that uses both."""
    return jax.device_get(_outcome(q, k, v, q_pos, k_pos, q_seg, k_seg, sinks, kernel, window, softcap))


@functools.partial(jax.jit, static_argnames=("kernel", "window", "softcap"))
def _outcome(q, k, v, q_pos, k_pos, q_seg, k_seg, sinks, kernel, window, softcap):
    def loss(q, k, v, sinks):
        options = AttentionOptions(window, SCALE, softcap)
        o, lse = kernels.attend(kernel, options, Queries(q, q_pos, q_seg), Keys(k, v, k_pos, k_seg), sinks)
        pull = jnp.cos(jnp.arange(o.size)).reshape(o.shape)
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (pull * o).sum() + (pull[..., 0] * jnp.sin(finite)).sum(), (o, lse)

    grads, (o, lse) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, sinks)
    return {"o": o, "lse": lse, "grads": grads}


def assert_same(got, expected, tolerance):
    """Equal to `tolerance`, with -inf for the same queries in lse and nothing else that is not finite."""
    sees_none = np.isneginf(expected["lse"])
    np.testing.assert_array_equal(np.isneginf(got["lse"]), sees_none)
    assert_close({**got, "lse": got["lse"][~sees_none]}, {**expected, "lse": expected["lse"][~sees_none]}, tolerance)


def check_merged_gradients(kernel, softcap=None):
    """The backward function over parts of the keys, given the result over all keys, adds up to the gradients of autodiff."""
    q, k, v, pos, seg = arrays("packed", "padding in front")
    options, queries = AttentionOptions(None, SCALE, softcap), Queries(q, pos, seg)

    def attend(q, k, v):
        return reference.forward(options, Queries(q, pos, seg), Keys(k, v, pos, seg))

    result, pull = jax.vjp(attend, q, k, v)
    grads = jnp.cos(jnp.arange(result[0].size)).reshape(result[0].shape), jnp.where(jnp.isfinite(result[1]), 0.3, 0.0)
    parts = []
    for part in np.split(np.arange(S), (5, S // 2)):
        keys = Keys(*(x[:, part] for x in (k, v, pos, seg)))
        parts.append(kernels.KERNELS[kernel].backward(options, queries, keys, result, grads))
    dq, dk, dv = zip(*parts, strict=True)
    assert_close((sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), pull(grads), 1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "reference"))
        for name in HERE
        if kernels.KERNELS[name].backward
    ],
)
def test_gradients_of_parts_of_the_keys_add_up_to_those_of_all_keys(kernel, softcap):
    check_merged_gradients(kernel, softcap)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("window, softcap, dtype", [(*c, "float32") for c in CASES] + [(6, 1.5, "bfloat16")])
def test_every_kernel_equals_reference_in_values_and_gradients(kernel, window, softcap, dtype):
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for names in PAIRS:
        q, k, v, pos, seg = arrays(*names, dtype=dtype)
        got, expected = (outcome(q, k, v, pos, pos, seg, seg, None, name, window, softcap) for name in (kernel, "reference"))
        assert got["o"].dtype == dtype and got["lse"].dtype == jnp.float32
        assert_same(got, expected, tolerance)
        np.testing.assert_array_equal(np.isneginf(got["lse"][..., 0]), seg == 0)
        assert not np.any(np.asarray(got["o"], np.float32)[seg == 0])
        assert not any(np.any(np.asarray(grad, np.float32)[seg == 0]) for grad in got["grads"][:3])


@pytest.mark.parametrize("window", [300, pytest.param(None, marks=pytest.mark.slow)])
def test_blocked_equals_reference_over_several_blocks_and_tiles_of_the_sizes_that_it_runs_with(window, monkeypatch):
    monkeypatch.undo()
    rng, lengths = np.random.default_rng(0), (1500, 1, 1700, 100)  # the last of padding
    q, k, v = (rng.normal(size=(1, sum(lengths), heads, H)).astype("float32") for heads in (2, 1, 1))
    pos, seg = (x[None] for x in layout("".join(name * n for name, n in zip("abc.", lengths, strict=True))))
    assert pos.size > 3 * max(*blocked.QUERIES, blocked.FULL)
    got, expected = (outcome(q, k, v, pos, pos, seg, seg, None, kernel, window) for kernel in ("blocked", "reference"))
    assert_same(got, expected, 1e-5)


def by_hand(q, k, v, q_pos, k_pos, q_seg, k_seg, sinks, window, softcap=None):
    """o and lse in float64, one query of one head at a time, the sink a column of scores whose value is zero."""
    q, k, v, sinks = (np.asarray(x, np.float64) for x in (q, k, v, sinks))
    o, lse = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    for b, t, n in np.ndindex(*q.shape[:3]):
        visible = [
            s
            for s in range(k.shape[1])
            if q_seg[b, t] == k_seg[b, s] != 0
            and k_pos[b, s] <= q_pos[b, t]
            and (window is None or k_pos[b, s] > q_pos[b, t] - window)
        ]
        if q_seg[b, t] == 0 or not visible and not sinks.size:
            continue
        group = n // (N // K)
        scores = np.array([SCALE * q[b, t, n] @ k[b, s, group] for s in visible])
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        mass = np.exp(np.append(scores, sinks[n : n + 1]))
        o[b, t, n] = sum((p * v[b, s, group] for p, s in zip(mass, visible, strict=False)), np.zeros(H)) / mass.sum()
        lse[b, t, n] = np.log(mass.sum())
    return {"o": o, "lse": lse}


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("window, softcap, with_sinks", [(None, None, False), (6, 1.5, False), (6, 1.5, True)])
def test_every_kernel_is_the_softmax_of_each_query_with_the_sink_as_one_more_column(kernel, window, softcap, with_sinks):
    for names in PAIRS:
        q, k, v, pos, seg = arrays(*names)
        sinks = jnp.linspace(-1.0, 2.0, N) if with_sinks else None
        got = outcome(q, k, v, pos, pos, seg, seg, sinks, kernel, window, softcap)
        expected = by_hand(q, k, v, pos, pos, seg, seg, np.array([]) if sinks is None else sinks, window, softcap)
        assert_same({"o": got["o"], "lse": got["lse"]}, expected, 1e-5)


def test_sinks_have_the_gradients_of_an_explicit_softmax():
    window, softcap = 6, 1.5
    q, k, v, pos, seg = arrays("packed", "padding in front")
    sinks = jnp.linspace(-1.0, 2.0, N)

    def explicit(q, k, v, sinks):
        scores_BTNS = SCALE * jnp.einsum("BTNH,BSNH->BTNS", q, k.repeat(N // K, 2), precision="highest")
        scores_BTNS = softcap * jnp.tanh(scores_BTNS / softcap)
        see_BT1S = reference.visible_BTS(pos, pos, seg, seg, window)[:, :, None]
        scores_BTNS = jnp.where(see_BT1S, scores_BTNS, -1e30)
        column_BTN1 = jnp.broadcast_to(sinks[:, None], (*scores_BTNS.shape[:3], 1))
        p_BTNS = jax.nn.softmax(jnp.concatenate([scores_BTNS, column_BTN1], -1), -1)[..., :-1]
        o_BTNH = jnp.einsum("BTNS,BSNH->BTNH", p_BTNS, v.repeat(N // K, 2), precision="highest")
        lse_BTN = jnp.logaddexp(jax.nn.logsumexp(scores_BTNS, -1), sinks)
        pull = jnp.cos(jnp.arange(o_BTNH.size)).reshape(o_BTNH.shape)
        real_BT1 = seg[..., None] > 0
        return (pull * o_BTNH * real_BT1[..., None]).sum() + (pull[..., 0] * jnp.sin(lse_BTN * real_BT1)).sum()

    expected = jax.jit(jax.grad(explicit, (0, 1, 2, 3)))(q, k, v, sinks)
    for kernel in HERE:
        assert_close(outcome(q, k, v, pos, pos, seg, seg, sinks, kernel, window, softcap)["grads"], expected, 1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_queries_may_be_the_last_of_the_keys_and_one_that_sees_none_gives_zeros(window):
    T = 10
    q, k, v, pos, seg = arrays("one document", "packed")
    q, q_pos, q_seg = q[:, -T:], pos[:, -T:].copy(), seg[:, -T:].copy()
    q_seg[0, 3] = 9  # of a document that has no keys here
    q_pos[1, 5] = -1  # before the first key of its document
    sees_none = np.zeros((2, T), bool)
    sees_none[0, 3] = sees_none[1, 5] = True
    got, expected = (outcome(q, k, v, q_pos, pos, q_seg, seg, None, kernel, window) for kernel in ("blocked", "reference"))
    assert_same(got, expected, 1e-5)
    np.testing.assert_array_equal(np.isneginf(got["lse"]), np.repeat(sees_none[..., None], N, -1))
    assert not np.any(got["o"][sees_none]) and not np.any(got["grads"][0][sees_none])
    if window is None:
        all_queries = outcome(*arrays("one document", "packed")[:3], pos, pos, seg, seg, None, "blocked", window)
        assert_close(got["o"][~sees_none], all_queries["o"][:, -T:][~sees_none], 1e-5)


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("window", [None, 9])
def test_a_document_reads_no_bit_of_another(kernel, window):
    q, k, v, pos, seg = arrays("packed", "padding between")
    other_q, other_k, other_v, *_ = arrays("packed", "padding between", seed=1)
    before = outcome(q, k, v, pos, pos, seg, seg, None, kernel, window)
    for b, segment in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2)]:
        changed = (np.arange(2)[:, None] == b) & (seg == segment)
        mix = [np.where(changed[..., None, None], y, x) for x, y in ((q, other_q), (k, other_k), (v, other_v))]
        after = outcome(*mix, pos, pos, seg, seg, None, kernel, window)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old[~changed], new[~changed])
        assert (segment == 0) == np.array_equal(before["o"][changed], after["o"][changed])


def random_sequences(count, rng):
    """Positions and segments of sequences of S tokens: documents of random lengths between padding, some of it inside."""
    sequences = []
    for _ in range(count):
        text = "".join(chr(ord("a") + i) * length for i, length in enumerate(rng.integers(1, 12, 6)))
        front, inside, end = rng.integers(0, 7, 3)
        cut = 1 + max(i for i in range(len(text)) if text[i] == "b")  # padding between documents b and c
        sequences.append(layout(("." * front + text[:cut] + "." * inside + text[cut:])[: S - end] + "." * end))
    pos, seg = (np.stack([np.pad(x, (0, S - len(x))) for x in xs]) for xs in zip(*sequences, strict=True))
    pos[seg == 0] = rng.integers(0, 99, (seg == 0).sum())  # the positions of padding mean nothing
    return pos, seg


@pytest.mark.parametrize("window", [None, 1, 6, 40])
def test_intervals_hold_exactly_the_keys_that_a_query_sees(window):
    rng = np.random.default_rng(3)
    pos, seg = random_sequences(200, rng)
    pos[100:] += 5 * (seg[100:] > 0)  # documents that go on from an earlier sequence
    q_pos, q_seg = pos[:, -9:], rng.permuted(seg[:, -9:], axis=1)
    for queries in ((pos, seg), (q_pos, q_seg)):
        keys = Keys(None, None, pos, seg)
        first, end = jax.device_get(jax.jit(intervals, static_argnums=0)(window, Queries(None, *queries), keys))
        inside = (first[..., None] <= np.arange(S)) & (np.arange(S) < end[..., None])
        np.testing.assert_array_equal(inside, reference.visible_BTS(queries[0], pos, queries[1], seg, window))
        np.testing.assert_array_equal(first == end, ~inside.any(-1))


@pytest.mark.parametrize("window", [None, 1, 6, 9])
def test_a_block_of_queries_walks_over_the_keys_that_it_sees_without_a_mask_where_all_of_them_do(window, monkeypatch):
    visits, slices = [], blocked._slices

    def counted(tile, arrays):
        jax.debug.callback(lambda first: visits.append((tile.size, tile.see_BQC is None, int(first))), tile.first, ordered=True)
        return slices(tile, arrays)

    monkeypatch.setattr(blocked, "_slices", counted)
    q, k, v, pos, seg = arrays("packed", seed=2)
    options, queries, keys = AttentionOptions(window, SCALE), Queries(q, pos, seg), Keys(k, v, pos, seg)
    jax.block_until_ready(jax.jit(blocked.forward, static_argnums=0)(options, queries, keys))
    jax.effects_barrier()
    see, expected = np.asarray(reference.visible_BTS(pos, pos, seg, seg, window))[0], []
    one_tile = window in (1, 6)  # of 4, or 9, keys, which LINE makes 10
    edge = {None: 3, 1: 4, 6: 10, 9: 3}[window]
    for t in range(0, S, 4):
        some, every = see[t : t + 4].any(0).nonzero()[0], see[t : t + 4].all(0).nonzero()[0]
        start, end, full = some[0], some[-1] + 1, 0 if one_tile else every.size // 5
        full_start = every[0] if full else start
        full_end = full_start + 5 * full
        expected += [(5, True, first) for first in range(full_start, full_end, 5)]
        expected += [
            (edge, False, min(first, S - edge)) for first in (*range(start, full_start, edge), *range(full_end, end, edge))
        ]
    assert visits == expected


@pytest.mark.parametrize("window", [None, 500])
def test_no_array_has_as_many_elements_as_pairs_of_tokens(window, monkeypatch):
    monkeypatch.undo()
    length = 4096
    q, kv = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def biggest(kernel):
        def loss(q, k, v, pos, seg):
            o, lse = kernels.attend(kernel, AttentionOptions(window, 1.0), Queries(q, pos, seg), Keys(k, v, pos, seg))
            return o.sum() + lse.sum()

        return biggest_array(jax.grad(loss, (0, 1, 2)), q, kv, kv, tokens, tokens)

    assert biggest("reference") >= length**2
    assert biggest("blocked") <= length**2 // 16


def test_a_window_over_131072_tokens_of_8_heads_compiles_to_less_than_2_gib(monkeypatch):
    monkeypatch.undo()
    heads, tokens = jax.ShapeDtypeStruct((1, 131072, 8, 32), jnp.float32), jax.ShapeDtypeStruct((1, 131072), jnp.int32)

    def loss(q, k, v, pos, seg):
        options, queries, keys = AttentionOptions(1024, 1.0), Queries(q, pos, seg), Keys(k, v, pos, seg)
        return kernels.attend("blocked", options, queries, keys)[0].sum()

    assert temporary_bytes(jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads, heads, heads, tokens, tokens)) < 2**31


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_means_a_kernel_of_the_platform_and_a_named_one_must_run_there(platform):
    assert platform in kernels.KERNELS[kernels.choose("auto", platform)].platforms
    for name, kernel in kernels.KERNELS.items():
        if platform not in kernel.platforms:
            with pytest.raises(NotImplementedError, match=f'kernel "{name}" runs on .*, not on {platform}; use "blocked"'):
                kernels.choose(name, platform)
        elif kernel.needs is None:
            assert kernels.choose(name, platform) == name


def test_a_kernel_whose_package_is_missing_falls_back_loudly_and_is_refused_by_name(monkeypatch, caplog):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels.choose.cache_clear()
    assert kernels.choose("auto", "gpu") == "blocked"
    assert [r.levelname for r in caplog.records if "tokamax is not installed" in r.message] == ["WARNING"]
    with pytest.raises(NotImplementedError, match='needs the package tokamax: pip install "hybrid-attn.gpu."'):
        kernels.choose("tokamax", "gpu")
    kernels.choose.cache_clear()
