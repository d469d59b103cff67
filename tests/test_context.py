"""Attention over a split sequence: every scheme, zigzag or not, is the attention of one device, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, biggest_array, layout, mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.kernels import AttentionOptions, Keys, Queries, tpu
from hybrid_attn.kernels.softmax import merged
from hybrid_attn.parallel import context
from hybrid_attn.parallel.mesh import BATCH, HEADS_BTNH, TOKENS_BT

B, T, N, K, H = 4, 96, 8, 4, 8  # tokens divide by 2 slices of 3, 4 and 8 shards
SHARD = T // 4
# A document over all shards; documents that end in the middle of shards, and two shards of nothing but padding; short ones
# after padding; documents that end where shards and slices do.
SEQUENCES = [
    "a" * T,
    "a" * 37 + "b" * 9 + "." * 50,
    "." * 3 + "abbccccddddddddeeeeeeeeee" + "f" * 68,
    "a" * 12 + "b" * 36 + "c" * 48,
]
WINDOWS = {"smaller": 5, "a slice": SHARD // 2, "a shard": SHARD, "larger": 55, "all": 10 * T}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N))
    pos, seg = (np.stack(x) for x in zip(*map(layout, SEQUENCES), strict=True))
    return q, k, v, do, pos, seg, rng.normal(size=N).astype(np.float32)


@functools.cache
def on_one_device(window, chunk, softcap, with_sinks):
    """Output and gradients by the reference."""
    q, k, v, do, pos, seg, sinks = arrays()
    with jax.set_mesh(mesh_of()):
        return value_and_grads(q, k, v, do, pos, seg, sinks if with_sinks else None, False, window=window, chunk=chunk,
            softcap=softcap, kernel="reference", scheme="gather")  # fmt: skip


def value_and_grads(q, k, v, do, pos, seg, sinks, zigzag, *, window, chunk, softcap, kernel, scheme):
    options = context.ContextOptions(AttentionOptions(chunk or window, 0.3, softcap), kernel, scheme, zigzag)
    mesh = jax.sharding.get_mesh()
    specs = {4: HEADS_BTNH, 2: TOKENS_BT, 1: P("tensor")}
    inputs = [x if x is None else jax.device_put(x, NamedSharding(mesh, specs[x.ndim])) for x in (q, k, v, sinks)]
    do, pos, seg = (jax.device_put(x, NamedSharding(mesh, specs[x.ndim])) for x in (do, pos, seg))

    def attend(q, k, v, sinks):
        q, k, v, *tokens = context.to_zigzag((q, k, v, pos, seg), zigzag)
        if chunk is not None:
            tokens[1] = context.chunk_segments(*tokens, chunk)
        return context.from_zigzag(context.attend(options, Queries(q, *tokens), Keys(k, v, *tokens), sinks), zigzag)

    @jax.jit
    def both(*inputs):
        o, pull = jax.vjp(attend, *inputs)
        return o, pull(do)

    return jax.device_get(both(*inputs))


def assert_as_on_one_device(
    scheme, zigzag, sizes=None, *, window=None, chunk=None, softcap=None, sinks=False, kernel="blocked", tolerance=2e-6
):
    q, k, v, do, pos, seg, sink_logits = arrays()
    with jax.set_mesh(mesh_of(**(sizes or {"context": 4}))):
        results = value_and_grads(
            q, k, v, do, pos, seg, sink_logits if sinks else None, zigzag,
            window=window, chunk=chunk, softcap=softcap, kernel=kernel, scheme=scheme,
        )  # fmt: skip
    assert_close(results, on_one_device(window, chunk, softcap, sinks), tolerance)


# In reading order: two windows of the five.
HALOS = [(window, True) for window in WINDOWS] + [("smaller", False), ("all", False)]
SLOW = ("larger", True), ("a shard", True), ("all", False)
HALOS = [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ()) for case in HALOS]


@pytest.mark.parametrize("window, zigzag", HALOS)
def test_a_window_with_a_halo_equals_one_device(window, zigzag):
    assert_as_on_one_device("halo", zigzag, window=WINDOWS[window], sinks=window == "smaller")


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("scheme", ["gather", "ring", "ulysses"])
def test_full_causal_attention_with_every_scheme_equals_one_device(scheme, zigzag):
    assert_as_on_one_device(scheme, zigzag, softcap=2.0 if zigzag else None, sinks=True)


@pytest.mark.parametrize("scheme", ["gather", "ulysses", pytest.param("ring", marks=pytest.mark.slow)])
def test_a_window_with_every_scheme_equals_one_device(scheme):
    assert_as_on_one_device(scheme, True, window=SHARD + 3)


@pytest.mark.parametrize("scheme", [pytest.param(x, marks=[pytest.mark.slow] * (x == "ring")) for x in context.SCHEMES])
def test_chunks_of_a_document_stay_apart(scheme):
    assert_as_on_one_device(scheme, True, chunk=11)


@pytest.mark.parametrize("start", [85, 11 * 10**6 + 4])
def test_documents_whose_positions_begin_anywhere_stay_apart_where_layers_have_chunks(start, one_device):
    """Against the same documents cut at the chunks by hand."""
    q, k, v, do, pos, seg, _ = arrays()
    begins = np.where(seg % 2 == 1, start, 3)
    chunks = np.int64(seg) * 2**32 + (pos + begins) // 11
    own = np.where(seg > 0, 1 + np.unique(chunks, return_inverse=True)[1].reshape(chunks.shape), 0).astype(np.int32)
    static = {"softcap": None, "kernel": "blocked", "scheme": "gather"}
    got = value_and_grads(q, k, v, do, (pos + begins).astype(np.int32), seg, None, False, window=None, chunk=11, **static)
    expected = value_and_grads(q, k, v, do, pos, own, None, False, window=11, chunk=None, **static)
    assert_close(got, expected, 2e-6)


SHARDS = ({"context": 3}, {"context": 2, "tensor": 2, "fsdp": 2}, {"context": 8})
FAST = [(scheme, SHARDS[1]) for scheme in ("halo", "ring", "ulysses")]  # Ulysses: not more shards than heads
# A ring of eight is in tests/test_meshes.py too, and gathering is simpler than a halo and a ring.
SLOW = [("halo", SHARDS[0]), ("ring", SHARDS[0]), ("gather", SHARDS[2])]
EXHAUSTIVE = [("halo", SHARDS[2]), ("ring", SHARDS[2]), ("gather", SHARDS[0]), ("gather", SHARDS[1])]
SHARDED = [
    *FAST,
    *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW),
    *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in EXHAUSTIVE),
]


@pytest.mark.parametrize("scheme, sizes", SHARDED, ids=str)
def test_it_holds_beside_other_axes_and_for_odd_numbers_of_shards(scheme, sizes):
    assert_as_on_one_device(scheme, True, sizes, window=37 if scheme == "halo" else None)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["halo", "ring"])
def test_slices_meet_the_condition_of_splash(scheme, monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", True)
    window = SHARD if scheme == "halo" else None
    sizes = {"context": 2}  # a slice is then before, at and after the keys of others
    assert_as_on_one_device(scheme, True, sizes, window=window, kernel="splash", sinks=True, tolerance=3e-6)


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_zigzag_gives_each_shard_an_early_and_a_late_slice_and_is_undone(shards):
    tokens = np.arange(2 * 48 * 3).reshape(2, 48, 3)
    mesh = mesh_of(context=shards)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(tokens, NamedSharding(mesh, P(BATCH, "context", None)))
        moved = context.to_zigzag(sharded, True)
        size = 48 // (2 * shards)
        for shard in moved.addressable_shards:
            i = (shard.index[1].start or 0) // (2 * size)
            expected = [tokens[:, j * size : (j + 1) * size] for j in (i, 2 * shards - 1 - i)]
            np.testing.assert_array_equal(shard.data, np.concatenate(expected, 1))
        np.testing.assert_array_equal(context.from_zigzag(moved, True), tokens)
        assert context.to_zigzag(sharded, False) is context.from_zigzag(sharded, False) is sharded


def work(zigzag):
    """Pairs of query and key that each of four shards computes for a sequence."""
    pairs = np.tril(np.ones((T, T))).sum(1)
    order = np.arange(T).reshape(8, -1)
    slices = [(i, 7 - i) if zigzag else (2 * i, 2 * i + 1) for i in range(4)]
    return [pairs[order[list(x)]].sum() for x in slices]


def test_shards_in_zigzag_order_have_the_same_work():
    assert len(set(work(True))) == 1 and max(work(False)) > 1.7 * np.mean(work(False))


@pytest.mark.parametrize("zigzag", [False, True])
def test_a_ring_never_holds_the_keys_of_all_shards_forward_or_backward(zigzag):
    """Autodiff of its loop would save the keys of every step."""
    mesh = mesh_of(context=8)
    with jax.set_mesh(mesh):
        q, k, _, _, pos, seg, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for x, spec in
                                   zip(arrays(), [HEADS_BTNH] * 4 + [TOKENS_BT] * 2 + [P("tensor")], strict=True))  # fmt: skip

        def total(scheme, q, k, v, pos, seg):
            options = context.ContextOptions(AttentionOptions(None, 1.0), "blocked", scheme, zigzag)
            return jnp.square(context.attend(options, Queries(q, pos, seg), Keys(k, v, pos, seg))).sum()

        def biggest(scheme):
            return biggest_array(jax.grad(functools.partial(total, scheme), (0, 1, 2)), q, k, k, pos, seg, inside="shard_map")

        assert biggest("ring") < B * T * K * H <= biggest("gather")


@pytest.mark.parametrize("kernel_pass", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_zigzag_ring_runs_a_kernel_for_each_pair_of_slices_that_see_each_other(kernel_pass, monkeypatch):
    calls, kernel, shards = [], kernels.KERNELS["blocked"], 4

    def counted(*arguments):
        jax.debug.callback(lambda: calls.append(None))
        return getattr(kernel, kernel_pass)(*arguments)

    monkeypatch.setitem(kernels.KERNELS, "blocked", kernel._replace(**{kernel_pass: counted}))
    assert_as_on_one_device("ring", True, {"context": shards})
    jax.effects_barrier()
    assert len(calls) == 2 * shards * (2 * shards + 1) // 2  # a slice sees itself and those before it


def test_a_ring_of_cudnn_is_refused():
    with pytest.raises(NotImplementedError, match="cudnn computes no gradients of merged results"):
        assert_as_on_one_device("ring", True, kernel="cudnn")


def test_a_merge_of_nothing_with_nothing_is_nothing():
    empty = jnp.zeros((1, 1, 1, 2)), jnp.full((1, 1, 1), -jnp.inf)
    result = jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1))
    o, lse = merged(empty, empty)
    assert not o.any() and np.isneginf(lse).all()
    for pair in ((empty, result), (result, empty)):
        o, lse = merged(*pair)
        assert (o == 1).all() and (lse == 0).all()
