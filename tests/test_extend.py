"""Sequences that are read in chunks through a cache give what the forward pass gives for all their tokens."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BLOCKED, REFERENCE, assert_close, everything, mesh_of, random_params, tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.convert.families import model_of
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer.cache import attend
from hybrid_attn.infer.steps import StepConfig, extend
from hybrid_attn.model import apply
from hybrid_attn.model.transformer import unstacked
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT

W = 5
GOLDEN = Path(__file__).parent / "golden"
# Every layer type and block that a family needs, in two or three layers.
MODELS = {
    "window and full causal": tiny().model,
    "everything": everything("LG", W),
    "tail": dataclasses.replace(everything("LLG", W), num_layers=5),
    "first layers": dataclasses.replace(everything("LLG", W), prefix="GL", num_layers=6),
    "chunks": tiny({}, L={"chunk": 6, "rope_theta": 50.0, "temperature.type": "steps", "temperature.scale": 0.1}).model,
    "caps": tiny({"model.block": "sandwich"}, L={"window": W, "softcap": 1.5, "rope_theta": 100.0}, G={"softcap": 2.0}).model,
    "sinks": tiny({"model.block": "pre"}, L={"window": W, "sink": True, "rope_theta": 9.0}, G={"gate": "projection"}).model,
    "convolutions": tiny(L={"window": W, "rope_theta": 50.0, "short_conv": 3}, G={"short_conv": 7}).model,
    "rotated": tiny({"model.pattern": "GGL", "model.num_layers": 3, "model.block": "post"}, G={"rope_theta": 1e4}).model,
}

# What "everything" and "first layers" hold in part.
SLOW = {"first layers", "sinks", "tail", "caps", "exaone4", "gemma3_text", "afmoe"}
EXHAUSTIVE = {"window and full causal", "rotated", "cohere", "llama_llama3", "olmo3", "smollm3_window"}


def marks_of(name):
    return [pytest.mark.slow] * (name in SLOW) + [pytest.mark.exhaustive] * (name in EXHAUSTIVE)


def put(x, spec):
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))


def forward(model, params, sequences, execution=REFERENCE):
    """Activations of each sequence, by the forward pass."""
    size = -(-max(map(len, sequences)) // 8) * 8
    tokens_BT = np.stack([np.pad(sequence, (0, size - len(sequence))) for sequence in sequences]).astype(np.int32)
    pos_BT = np.tile(np.arange(size, dtype=np.int32), (len(sequences), 1))
    seg_BT = np.stack([np.arange(size) < len(sequence) for sequence in sequences]).astype(np.int32)
    sharded = (put(x, TOKENS_BT) for x in (tokens_BT, pos_BT, seg_BT))
    x_BTD = np.asarray(jax.jit(functools.partial(apply, model, execution=execution))(params, *sharded))
    return [x_BTD[b, : len(sequence)] for b, sequence in enumerate(sequences)]


def in_chunks(model, params, sequences, chunks, capacity, quantised=False, execution=REFERENCE):
    """(activations, cache): the same through the cache, in chunks of these sizes."""
    context = jax.sharding.get_mesh().shape["context"]
    weights = jax.jit(functools.partial(unstacked, model, dtype=execution.dtype))(params)
    span = max(chunks) // context
    cache = caches.empty(model, len(sequences), capacity, max(chunks), execution.dtype, quantised)
    outputs, read = [[] for _ in sequences], np.zeros(len(sequences), int)

    @jax.jit
    def extended(tokens, counts, cache):
        return extend(StepConfig(model, execution, span), weights, tokens, counts, cache)[:2]

    for size in chunks:
        tokens, counts = np.zeros((len(sequences), size), np.int32), np.zeros(len(sequences), np.int32)
        for b, sequence in enumerate(sequences):
            part = sequence[read[b] : read[b] + size]
            tokens[b, : len(part)], counts[b] = part, len(part)
        spec = TOKENS_BT if size == max(chunks) else P(BATCH, None)
        x_BTD, cache = extended(put(tokens, spec), put(counts, P(BATCH)), cache)
        for b, count in enumerate(counts):
            outputs[b].append(np.asarray(x_BTD)[b, :count])
        read += counts
    assert (read == [len(sequence) for sequence in sequences]).all()
    return [np.concatenate(parts) for parts in outputs], cache


def run(function, static_args, *arrays):
    return function(*static_args, *arrays)


def sequences_of(*lengths, vocab_size=384):
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab_size, n) for n in lengths]


@pytest.mark.parametrize(
    "name, chunks, execution",
    [
        *(pytest.param(name, [4] * 8 + [1] * 4, REFERENCE, id=name, marks=marks_of(name)) for name in MODELS),
        pytest.param("everything", [16] * 2 + [4], BLOCKED, id="everything, kernel by blocks"),
    ],
)
def test_sequences_in_chunks_give_what_the_forward_pass_gives(name, chunks, execution, one_device):
    model = MODELS[name]
    params = random_params(model)
    sequences = sequences_of(sum(chunks), 3, W, W + 1, 17)
    outputs, _ = in_chunks(model, params, sequences, chunks, capacity=64)
    assert_close(outputs, forward(model, params, sequences), 1e-5)


def test_a_cached_forward_pass_in_bfloat16_keeps_float32_leaves(one_device):
    """Sinks and temperatures that bfloat16 cannot represent: rounded, they would change the attention of every token."""
    model = tiny({"model.block": "pre"}, L={"window": W, "sink": True}, G={"sink": True, "temperature.type": "learned"}).model
    params, sequences, chunks = random_params(model), sequences_of(29, 17), [16, 8, 1, 1, 1, 1, 1]
    for layer in params["periods"].values():
        attention = layer["attention"]
        attention["sink"] = jnp.full_like(attention["sink"], 129.45)  # bfloat16: 129
        attention["v"] = 100 * attention["v"]
    params["periods"]["G1"]["attention"]["temperature"] += 40.11
    execution = REFERENCE._replace(dtype=jnp.dtype("bfloat16"))
    outputs, _ = in_chunks(model, params, sequences, chunks, 64, execution=execution)
    expected = forward(model, params, sequences, execution)
    assert_close(outputs, expected, 1e-2)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=marks_of(name))
        for name in ("afmoe", "cohere", "cohere2", "exaone4", "gemma3_text", "llama_llama3", "olmo3", "smollm3_window")
    ],
)
def test_sequences_of_every_family_in_chunks_give_what_the_forward_pass_gives(family, one_device):
    """Lengths below, at, above and 20 times a window, in chunks that are longer than it and do not divide the lengths."""
    model = model_of(json.loads((GOLDEN / family / "config.json").read_text()))
    window = min((kind.window for kind in model.kinds.values() if kind.window), default=6)
    params, sequences = (
        random_params(model),
        sequences_of(window - 1, window, window + 1, 20 * window, vocab_size=model.vocab_size),
    )
    chunks = [window + 3] * -(-20 * window // (window + 3))
    outputs, _ = in_chunks(model, params, sequences, chunks, capacity=32 * (window + 3))
    assert_close(outputs, forward(model, params, sequences), 1e-5)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("everything", {"context": 4}),
        pytest.param("everything", {"context": 2, "tensor": 2, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param("chunks", {"data": 2, "context": 3}, marks=pytest.mark.slow),
        ("convolutions", {"context": 4, "tensor": 2}),  # a shard has 3 tokens of a chunk, and a convolution 7
    ],
)
def test_a_mesh_reads_chunks_as_one_device_does(name, sizes):
    assert_close(on_a_mesh(name, **sizes), on_a_mesh(name), 1e-5)


@functools.cache
def on_a_mesh(name, **sizes):
    with jax.set_mesh(mesh_of(**sizes)):
        model = MODELS[name]
        return in_chunks(model, random_params(model), sequences_of(39, 20, W, 1), [12] * 3 + [1] * 3, capacity=48)[0]


def test_chunks_may_start_anywhere_on_a_mesh():
    model, sequences = MODELS["window and full causal"], sequences_of(41, 30, 7, 2)
    chunks = [12, 1, 1, 12, 1, 12, 1, 1]
    with jax.set_mesh(mesh_of(context=4)):
        outputs, _ = in_chunks(model, random_params(model), sequences, chunks, capacity=60)
    with jax.set_mesh(mesh_of()):
        assert_close(outputs, forward(model, random_params(model), sequences), 1e-5)


def test_int8_slots_are_within_half_a_step(one_device):
    model, sequences = MODELS["window and full causal"], sequences_of(40, 9)
    params = random_params(model)
    exact, cache = in_chunks(model, params, sequences, [16, 16, 8], 64)
    outputs, quantised = in_chunks(model, params, sequences, [16, 16, 8], 64, quantised=True)
    scale = np.abs(np.concatenate(exact)).max()
    assert 0 < max(np.abs(a - b).max() for a, b in zip(exact, outputs, strict=True)) < 0.05 * scale
    ring, slots = quantised.layers
    assert ring.k_scales_BKS is None and slots.k_BKSH.dtype == jnp.int8
    steps = np.asarray(slots.k_scales_BKS)[..., None]
    near = np.abs(np.asarray(slots.k_BKSH) * steps - np.asarray(cache.layers[1].k_BKSH)) <= 0.5001 * steps
    assert near[0, :, :40].all() and near[1, :, :9].all()


@pytest.mark.slow
def test_all_int8_slots_are_seen_if_their_parts_do_not_divide_them(one_device, monkeypatch):
    model, sequences, chunks = MODELS["window and full causal"], sequences_of(61, 30), [16, 16, 16, 12, 1]
    expected, _ = in_chunks(model, random_params(model), sequences, chunks, 64, quantised=True)
    for size in (24, 40):
        monkeypatch.setattr(attend, "QUANTISED_SLOTS", size)
        outputs, _ = in_chunks(model, random_params(model), sequences, chunks, 64, quantised=True)
        assert_close(outputs, expected, 1e-5)


def test_a_ring_made_smaller_and_larger_keeps_the_tokens_of_its_window(one_device):
    model = MODELS["window and full causal"]
    _, cache = in_chunks(model, random_params(model), sequences_of(29, 3), [16, 16], 64)
    assert cache.layers[0].k_BKSH.shape[2] == 20  # 16 + 5 - 1 tokens
    small = caches.resized(model, cache, 64, 1, run)
    assert small.layers[0].k_BKSH.shape[2] == 5
    large = caches.resized(model, small, 128, 60, run)
    assert large.layers[0].k_BKSH.shape[2] == 64
    for request, length in enumerate((29, 3)):
        for position in range(max(0, length - 5), length):
            expected = np.asarray(cache.layers[0].k_BKSH)[request, :, position % 20]
            assert (np.asarray(small.layers[0].k_BKSH)[request, :, position % 5] == expected).all()
            assert (np.asarray(large.layers[0].k_BKSH)[request, :, position % 64] == expected).all()
