"""Rows that come in pieces through caches give what whole rows give."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, RUN, assert_close, everything, mesh_of, random_params, tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.convert.families import model_of
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer.cache import int8
from hybrid_attn.infer.steps import extend
from hybrid_attn.model import apply
from hybrid_attn.model.extend import unstacked
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT

W = 5
GOLDEN = Path(__file__).parent / "golden"
# Every kind of layer and block that a family needs, two layers or three.
MODELS = {
    "window and prefix": tiny().model,
    "everything": everything("LG", W),
    "tail": dataclasses.replace(everything("LLG", W), num_layers=5),
    "chunks": tiny({}, L={"chunk": 6, "rope_theta": 50.0, "temperature.type": "steps", "temperature.scale": 0.1}).model,
    "caps": tiny({"model.block": "sandwich"}, L={"window": W, "softcap": 1.5, "rope_theta": 100.0}, G={"softcap": 2.0}).model,
    "sinks": tiny({"model.block": "pre"}, L={"window": W, "sink": True, "rope_theta": 9.0}, G={"gate": "projection"}).model,
    "rotated": tiny({"model.pattern": "GGL", "model.num_layers": 3, "model.block": "post"}, G={"rope_theta": 1e4}).model,
}


def place(x, spec):
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))


def whole(model, params, rows, run=REFERENCE):
    """Activations of each row, by the forward pass."""
    size = -(-max(map(len, rows)) // 8) * 8
    tokens_BT = np.stack([np.pad(row, (0, size - len(row))) for row in rows]).astype(np.int32)
    pos_BT = np.tile(np.arange(size, dtype=np.int32), (len(rows), 1))
    seg_BT = np.stack([np.arange(size) < len(row) for row in rows]).astype(np.int32)
    placed = (place(x, TOKENS_BT) for x in (tokens_BT, pos_BT, seg_BT))
    x_BTD = np.asarray(jax.jit(functools.partial(apply, model, run=run))(params, *placed))
    return [x_BTD[b, : len(row)] for b, row in enumerate(rows)]


def in_pieces(model, params, rows, pieces, capacity, quantised=False, run=REFERENCE):
    """The same through the cache, `pieces` tokens at a time one piece after the other."""
    context = jax.sharding.get_mesh().shape["context"]
    weights = jax.jit(functools.partial(unstacked, model, dtype=run.dtype))(params)
    span = max(pieces) // context
    cache = caches.empty(model, len(rows), capacity, max(pieces), run.dtype, quantised)
    found, read = [[] for _ in rows], np.zeros(len(rows), int)

    @jax.jit
    def more(tokens, counts, cache):
        return extend(model, weights, tokens, counts, cache, run, span)[:2]

    for size in pieces:
        tokens, counts = np.zeros((len(rows), size), np.int32), np.zeros(len(rows), np.int32)
        for b, row in enumerate(rows):
            part = row[read[b] : read[b] + size]
            tokens[b, : len(part)], counts[b] = part, len(part)
        spec = TOKENS_BT if size == max(pieces) else P(BATCH, None)
        x_BTD, cache = more(place(tokens, spec), place(counts, P(BATCH)), cache)
        for b, count in enumerate(counts):
            found[b].append(np.asarray(x_BTD)[b, :count])
        read += counts
    assert (read == [len(row) for row in rows]).all()
    return [np.concatenate(parts) for parts in found], cache


def rows_of(*lengths, words=384):
    rng = np.random.default_rng(1)
    return [rng.integers(0, words, n) for n in lengths]


@pytest.mark.parametrize(
    "name, pieces, run",
    [*((name, [4] * 8 + [1] * 4, REFERENCE) for name in MODELS), ("everything", [16] * 2 + [4], RUN)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rows_in_pieces_are_the_rows(name, pieces, run, one_device):
    model = MODELS[name]
    params = random_params(model)
    rows = rows_of(sum(pieces), 3, W, W + 1, 17)
    found, _ = in_pieces(model, params, rows, pieces, capacity=64)
    assert_close(found, whole(model, params, rows), 1e-5)


def test_leaves_are_as_precise_in_the_cache_as_in_the_forward_pass(one_device):
    """In bfloat16, with sinks and temperatures that it cannot hold: rounded, they would shift what every token sees."""
    model = tiny({"model.block": "pre"}, L={"window": W, "sink": True}, G={"sink": True, "temperature.type": "learned"}).model
    params, rows, pieces = random_params(model), rows_of(29, 17), [16, 8, 1, 1, 1, 1, 1]
    for layer in params["periods"].values():
        attention = layer["attention"]
        attention["sink"] = jnp.full_like(attention["sink"], 129.45)  # bfloat16: 129
        attention["v"] = 100 * attention["v"]
    params["periods"]["G1"]["attention"]["temperature"] += 40.11
    run = REFERENCE._replace(dtype=jnp.dtype("bfloat16"))
    found, _ = in_pieces(model, params, rows, pieces, 64, run=run)
    wanted = whole(model, params, rows, run)
    assert_close(found, wanted, 1e-2)


@pytest.mark.parametrize(
    "family", ["afmoe", "cohere", "cohere2", "exaone4", "gemma3_text", "llama_llama3", "olmo3", "smollm3_window"]
)
def test_rows_of_every_family_in_pieces_are_the_rows(family, one_device):
    """Shorter than a window, as long, one longer, 20 times that, in pieces that are longer than it and do not divide them."""
    model = model_of(json.loads((GOLDEN / family / "config.json").read_text()))
    window = min((kind.window for kind in model.kinds.values() if kind.window), default=6)
    params, rows = random_params(model), rows_of(window - 1, window, window + 1, 20 * window, words=model.vocab_size)
    pieces = [window + 3] * -(-20 * window // (window + 3)) + [1]
    found, _ = in_pieces(model, params, rows, pieces, capacity=32 * (window + 3))
    assert_close(found, whole(model, params, rows), 1e-5)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("everything", {"context": 4}),
        ("everything", {"context": 2, "tensor": 2, "fsdp": 2}),
        ("chunks", {"data": 2, "context": 3}),
    ],
)
def test_a_mesh_reads_pieces_as_one_device_does(name, sizes):
    model = MODELS[name]
    pieces, rows = [12] * 3 + [1] * 3, rows_of(39, 20, W, 1)
    with jax.set_mesh(mesh_of()):
        wanted, _ = in_pieces(model, random_params(model), rows, pieces, capacity=48)
    with jax.set_mesh(mesh_of(**sizes)):
        found, _ = in_pieces(model, random_params(model), rows, pieces, capacity=48)
    assert_close(found, wanted, 1e-5)


def test_pieces_may_begin_anywhere_on_a_mesh():
    model, rows = MODELS["window and prefix"], rows_of(41, 30, 7, 2)
    pieces = [12, 1, 1, 12, 1, 12, 1, 1]
    with jax.set_mesh(mesh_of(context=4)):
        found, _ = in_pieces(model, random_params(model), rows, pieces, capacity=60)
    with jax.set_mesh(mesh_of()):
        assert_close(found, whole(model, random_params(model), rows), 1e-5)


def test_int8_slots_are_within_half_a_step(one_device):
    model, rows = MODELS["window and prefix"], rows_of(40, 9)
    params = random_params(model)
    exact, cache = in_pieces(model, params, rows, [16, 16, 8], 64)
    found, quantised = in_pieces(model, params, rows, [16, 16, 8], 64, quantised=True)
    scale = np.abs(np.concatenate(exact)).max()
    assert 0 < max(np.abs(a - b).max() for a, b in zip(exact, found, strict=True)) < 0.05 * scale
    ring, slots = quantised.layers
    assert ring.k_step_BKS is None and slots.k_BKSH.dtype == jnp.int8
    steps = np.asarray(slots.k_step_BKS)[..., None]
    near = np.abs(np.asarray(slots.k_BKSH) * steps - np.asarray(cache.layers[1].k_BKSH)) <= 0.5001 * steps
    assert near[0, :, :40].all() and near[1, :, :9].all()


@pytest.mark.parametrize("size", [24, 40])
def test_int8_slots_are_all_seen_where_no_number_of_parts_holds_them(size, one_device, monkeypatch):
    model, rows, pieces = MODELS["window and prefix"], rows_of(61, 30), [16, 16, 16, 12, 1]
    wanted, _ = in_pieces(model, random_params(model), rows, pieces, 64, quantised=True)
    monkeypatch.setattr(int8, "QUANTISED_SLOTS", size)
    found, _ = in_pieces(model, random_params(model), rows, pieces, 64, quantised=True)
    assert_close(found, wanted, 1e-5)


def test_a_ring_turned_smaller_and_larger_keeps_what_a_window_sees(one_device):
    model = MODELS["window and prefix"]
    _, cache = in_pieces(model, random_params(model), rows_of(29, 3), [16, 16], 64)
    assert cache.layers[0].k_BKSH.shape[2] == 32  # 16 + 5 - 1 tokens, in a power of two
    small = caches.resized(model, cache, 64, 1)
    assert small.layers[0].k_BKSH.shape[2] == 8
    large = caches.resized(model, small, 128, 60)
    assert large.layers[0].k_BKSH.shape[2] == 64
    for row, length in enumerate((29, 3)):
        for position in range(max(0, length - 8), length):
            wanted = np.asarray(cache.layers[0].k_BKSH)[row, :, position % 32]
            assert (np.asarray(small.layers[0].k_BKSH)[row, :, position % 8] == wanted).all()
            assert (np.asarray(large.layers[0].k_BKSH)[row, :, position % 64] == wanted).all()
