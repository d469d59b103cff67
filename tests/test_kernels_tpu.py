"""Splash in Pallas' interpreter computes what the reference computes.

The interpreter's matrix products are exact in the inputs' dtype, float32 in full; a TPU's are at its default precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import layout
from test_kernels import assert_same, outcome

from hybrid_attn.kernels import AttentionOptions, Keys, Queries, reference, tpu

S, N, K, H = 300, 4, 2, 8  # three tiles of 128, the last one of padding for the most part
LAYOUTS = {
    "one document": "a" * 300,
    "packed": "a" * 50 + "b" * 131 + "c" + "d" * 60 + "." * 58,
    "padding in front": "." * 140 + "a" * 100 + "b" * 60,
    "padding between": "a" * 100 + "." * 140 + "b" * 60,
    "only padding": "." * 300,
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", True)
    monkeypatch.setattr(tpu, "BLOCK", 128)


def arrays(*names, dtype=jnp.float32, seed=0):
    """q, k and v [B, S, heads, H], positions and segments [B, S], a sequence for each name of a layout."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(len(names), S, heads, H)).astype(dtype) for heads in (N, K, K))
    pos, seg = (np.stack(x) for x in zip(*(layout(LAYOUTS[name]) for name in names), strict=True))
    return q, k, v, pos, seg


@pytest.mark.parametrize(
    "window, softcap, dtype",
    [
        (None, None, "float32"),
        (1, None, "float32"),
        (100, 1.5, "bfloat16"),
        pytest.param(100, 1.5, "float32", marks=pytest.mark.exhaustive),
        pytest.param(400, None, "float32", marks=pytest.mark.slow),
    ],
)
def test_splash_equals_reference_in_values_and_gradients(window, softcap, dtype):
    q, k, v, pos, seg = arrays(*LAYOUTS, dtype=dtype)
    got, expected = (outcome(q, k, v, pos, pos, seg, seg, None, kernel, window, softcap) for kernel in ("splash", "reference"))
    assert got["o"].dtype == dtype and got["lse"].dtype == jnp.float32
    assert_same(got, expected, {"float32": 1e-5, "bfloat16": 1e-2}[dtype])
    np.testing.assert_array_equal(np.isneginf(got["lse"][..., 0]), seg == 0)
    assert not np.any(np.asarray(got["o"], np.float32)[seg == 0])
    assert not any(np.any(np.asarray(grad, np.float32)[seg == 0]) for grad in got["grads"][:3])


def test_sinks_have_the_gradients_of_the_reference():
    q, k, v, pos, seg = arrays("packed")
    got, expected = (
        outcome(q, k, v, pos, pos, seg, seg, jnp.linspace(-1.0, 2.0, N), kernel, 100) for kernel in ("splash", "reference")
    )
    assert_same(got, expected, 1e-5)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_queries_may_be_any_run_of_the_sequence(window):
    """A slice of the gathered keys, a slice that begins before them, and one after all of them: a shard, a halo, a ring."""
    q, k, v, pos, seg = arrays("one document", "packed", "padding between")
    for queries, keys in [((130, 230), (90, 240)), ((40, 140), (90, 240)), ((190, 290), (30, 180))]:
        q_part, q_pos, q_seg = (x[:, slice(*queries)] for x in (q, pos, seg))
        k_part, v_part, k_pos, k_seg = (x[:, slice(*keys)] for x in (k, v, pos, seg))
        got, expected = (
            outcome(q_part, k_part, v_part, q_pos, k_pos, q_seg, k_seg, None, kernel, window)
            for kernel in ("splash", "reference")
        )
        assert_same(got, expected, 1e-5)


def test_sequences_that_break_the_condition_give_nan():
    q, k, v, pos, seg = arrays("one document", "packed", "packed")
    gap = np.where(np.arange(S) < 40, pos, pos + 3)
    swapped = pos.copy()
    swapped[:, [200, 201]] = swapped[:, [201, 200]]
    shifted = np.where(seg == 2, 0, seg)  # the queries of the second document meet keys of padding
    cases = [(gap, gap, seg), (swapped, pos, seg), (pos, swapped, seg), (pos, pos, shifted)]
    for q_pos, k_pos, k_seg in cases:
        o, lse = tpu.forward(AttentionOptions(100, 1.0), Queries(q, q_pos, seg), Keys(k, v, k_pos, k_seg))
        o, lse = (o, lse) if k_seg is seg else (o[1:], lse[1:])
        assert np.all(np.isnan(o)) and np.all(np.isnan(lse))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_a_document_reads_no_bit_of_another(window):
    q, k, v, pos, seg = arrays("packed", "padding between")
    other_q, other_k, other_v, *_ = arrays("packed", "padding between", seed=1)
    before = outcome(q, k, v, pos, pos, seg, seg, None, "splash", window)
    for b, segment in [(0, 2), (0, 3), (1, 0), (1, 1)]:
        changed = (np.arange(2)[:, None] == b) & (seg == segment)
        mix = [np.where(changed[..., None, None], y, x) for x, y in ((q, other_q), (k, other_k), (v, other_v))]
        after = outcome(*mix, pos, pos, seg, seg, None, "splash", window)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old[~changed], new[~changed])
        assert (segment == 0) == np.array_equal(before["o"][changed], after["o"][changed])


@pytest.mark.parametrize("window", [None, 1, 100, 129, 130])
@pytest.mark.parametrize("at, T", [(0, 300), (130, 140), (-90, 200), (250, 300)])
def test_the_tables_visit_every_tile_with_a_visible_pair_and_none_of_other_documents(window, at, T):
    pos, seg = layout(LAYOUTS["packed"])
    tokens = np.arange(at, at + T)
    inside = (tokens >= 0) & (tokens < S)
    tokens = np.clip(tokens, 0, S - 1)
    q_pos, q_seg = np.where(inside, pos[tokens], 0), np.where(inside, seg[tokens], 0)
    see = np.asarray(reference.visible_BTS(q_pos[None], pos[None], q_seg[None], seg[None], window))[0]
    pads = (0, -T % 128), (0, -S % 128)
    q_pos, q_seg, pos, seg = (np.pad(x, (0, -len(x) % 128)) for x in (q_pos, q_seg, pos, seg))
    queries, keys = Queries(None, q_pos, q_seg), Keys(None, None, pos, seg)
    masks, valid = tpu.make_masks(tpu.SplashOptions(window, None, S, 128, 128), queries, keys)
    needed = np.pad(see, pads).reshape(-1, 128, len(seg) // 128, 128).any((1, 3))
    assert valid
    for (following, run), expected in ((masks.by_query, needed), (masks.by_key, needed.T)):
        following, run = (np.asarray(x if expected is needed else x.T) for x in (following, run))
        visited = np.zeros_like(expected)
        for i, v in np.argwhere(run):
            assert not visited[i, following[i, v]]
            visited[i, following[i, v]] = True
        assert not np.any(expected & ~visited)
        assert visited.sum() <= expected.sum() + 1  # a block whose end is padding may visit one tile for nothing


def test_a_window_visits_as_many_tiles_at_any_length():
    widths = {tpu.visits(S // 512, S // 512, 512, 512, 4096) for S in (16384, 65536, 1048576)}
    assert widths == {(10, 10)}


def test_lengths_beyond_the_scalar_memory_are_refused_with_the_cure(monkeypatch):
    monkeypatch.undo()
    assert tpu.block_sizes(32768, 262144, None) == (512, 512)
    assert tpu.block_sizes(131072, 1048576, None) == (1024, 1024)
    with pytest.raises(NotImplementedError, match=r"mesh.context.*train.kernel=\"blocked\""):
        tpu.block_sizes(2**21, 2**21, None)
