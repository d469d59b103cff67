"""The CPU kernel in C++, built here from its source, computes what the reference computes."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, layout
from test_kernels import assert_same, outcome

from hybrid_attn import kernels
from hybrid_attn.kernels import AttentionOptions, Keys, Queries, native

# Blocks of 64 queries and tiles of 384 keys, of which no length here is a multiple.
LAYOUTS = {
    "packed": "a" * 310 + "b" + "c" * 150 + "d" * 120 + "." * 20,
    "padding": "." * 30 + "a" * 70 + "." * 65 + "b" * 420 + "." * 16,
}
S, H = 601, 24  # a head is padded to 32


@pytest.fixture(autouse=True, scope="module")
def library(tmp_path_factory):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("native") / native.LIBRARY.name
    native.build(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", path)
        yield


def arrays(*names, heads=(6, 2), dtype="float32", seed=0):
    rng, (N, K) = np.random.default_rng(seed), heads
    q, k, v = (rng.normal(size=(len(names), S, n, H)).astype(dtype) for n in (N, K, K))
    pos, seg = (np.stack(x) for x in zip(*(layout(LAYOUTS[name]) for name in names), strict=True))
    return q, k, v, pos, seg


@pytest.mark.parametrize(
    "window, heads, dtype",
    [
        (None, (6, 2), "float32"),
        (1, (6, 2), "float32"),
        (300, (2, 1), "float32"),
        (400, (6, 2), "float32"),
        (70, (6, 2), "bfloat16"),
    ],
)
def test_it_equals_the_reference_in_values_and_gradients(window, heads, dtype):
    """Threads share the keys of one sequence with one key/value head, and sum what each adds to their gradients.

    A window of 400 is longer than a tile of keys.
    """
    names = ("packed", "padding") if heads[1] > 1 else ("packed",)
    q, k, v, pos, seg = arrays(*names, heads=heads, dtype=dtype)
    got, expected = (outcome(q, k, v, pos, pos, seg, seg, None, kernel, window) for kernel in ("native", "reference"))
    assert got["o"].dtype == dtype and got["lse"].dtype == jnp.float32
    assert_same(got, expected, {"float32": 1e-5, "bfloat16": 1e-2}[dtype])
    np.testing.assert_array_equal(np.isneginf(got["lse"][..., 0]), seg == 0)
    assert not any(np.any(np.asarray(x, np.float32)[seg == 0]) for x in (got["o"], *got["grads"][:3]))


def test_threads_that_share_keys_give_the_same_bits_every_time():
    q, k, v, pos, seg = arrays("packed", heads=(2, 1))
    first, *others = (outcome(q, k, v, pos, pos, seg, seg, None, "native", None) for _ in range(8))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize("window", [None, 90])
def test_queries_may_be_the_last_of_the_keys(window):
    q, k, v, pos, seg = arrays("packed", "padding")
    last_q, q_pos, q_seg = (x[:, -130:] for x in (q, pos, seg))
    got, expected = (outcome(last_q, k, v, q_pos, pos, q_seg, seg, None, kernel, window) for kernel in ("native", "reference"))
    assert_same(got, expected, 1e-5)


def test_gradients_of_parts_of_the_keys_add_up_to_those_of_all_keys():
    q, k, v, pos, seg = arrays("packed", "padding")
    options, queries = AttentionOptions(None, 0.3), Queries(q, pos, seg)

    @jax.jit
    def gradients(q, k, v):
        outputs = native.forward(options, queries, Keys(k, v, pos, seg))
        grads = jnp.cos(outputs[0]), jnp.where(jnp.isfinite(outputs[1]), 0.3, 0.0)
        parts = [Keys(*(x[:, part] for x in (k, v, pos, seg))) for part in (slice(0, 333), slice(333, S), slice(0, S))]
        return [native.backward(options, queries, keys, outputs, grads) for keys in parts]

    first, second, both = gradients(q, k, v)
    sums = first[0] + second[0], *(jnp.concatenate(x, 1) for x in zip(first[1:], second[1:], strict=True))
    assert_close(sums, both, 1e-5)


def test_a_document_reads_no_bit_of_another():
    (q, k, v, pos, seg), (other_q, other_k, other_v, *_) = arrays("packed"), arrays("packed", seed=1)
    changed = seg == 3
    mix = [np.where(changed[..., None, None], y, x) for x, y in ((q, other_q), (k, other_k), (v, other_v))]
    before, after = (outcome(*x, pos, pos, seg, seg, None, "native", None) for x in ((q, k, v), mix))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[~changed], new[~changed])
    assert not np.array_equal(before["o"][changed], after["o"][changed])


def test_scores_far_below_the_largest_vanish_and_large_ones_do_not_overflow():
    q, k, v, pos, seg = arrays("packed")
    got, expected = (outcome(40 * q, k, v, pos, pos, seg, seg, None, kernel, None) for kernel in ("native", "reference"))
    assert_same({"o": got["o"], "lse": got["lse"]}, {"o": expected["o"], "lse": expected["lse"]}, 1e-4)


def test_a_soft_cap_is_left_to_blocked():
    q, k, v, pos, seg = arrays("packed")
    got, expected = (outcome(q, k, v, pos, pos, seg, seg, None, kernel, 70, 1.5) for kernel in ("native", "blocked"))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


FAILING = [("no-such-compiler", "there is no compiler no-such-compiler"), ("false", "ended with 1")]


@pytest.mark.parametrize("compiler, says", FAILING)
def test_a_build_that_fails_says_why_and_leaves_the_library_as_it_was(compiler, says, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    (tmp_path / "library.so").write_text("before")
    with pytest.raises(ValueError, match=says):
        native.build(tmp_path / "library.so")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("library.so", "before")]


def test_without_its_library_auto_means_blocked_and_its_name_is_refused_with_the_cure(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels.choose.cache_clear()
    assert kernels.choose("auto", "cpu") == "blocked"
    cure = "needs the package hybrid_attn.kernels.native_library: hybrid-build-kernel"
    with pytest.raises(NotImplementedError, match=f'kernel "native" {cure}'):
        kernels.choose("native", "cpu")
    kernels.choose.cache_clear()


@pytest.mark.parametrize("visible_heads", [1, 2])
def test_a_decoded_token_sees_what_the_plain_products_see(visible_heads):
    """A cache of more than one part, of which a request sees a range, another some slots of each part, a third nothing."""
    rng, (B, K, G, slots, size) = np.random.default_rng(0), (3, 2, 3, 4500, 32)
    q = jnp.asarray(8 * rng.normal(size=(B, K, G, size)), jnp.float32)
    kv = tuple(jnp.asarray(rng.normal(size=(B, K, slots, size)), jnp.float32) for _ in range(2))
    visible = np.zeros((B, visible_heads, slots), bool)
    visible[0, :, 70:4300], visible[1] = True, rng.random((visible_heads, slots)) < 0.1
    o, lse = kernels.decode("native", AttentionOptions(None, 0.2), False, q, kv, jnp.asarray(visible))
    o_plain, lse_plain = kernels.decode("blocked", AttentionOptions(None, 0.2), False, q, kv, jnp.asarray(visible))
    assert_close(o, o_plain, 1e-5)
    assert_close(lse[:2], lse_plain[:2], 1e-6)
    assert not np.any(o[2]) and np.all(np.isneginf(lse[2]))
