"""What a layer of each kind sees, and how positions, norms, temperatures, sinks and gates enter, against plain NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BLOCKED, REFERENCE, assert_close, layout, on_mesh, random_params, tiny
from flax import nnx

from hybrid_attn.config import RopeScaling
from hybrid_attn.model import apply
from hybrid_attn.model.attention import Attention, rope_angles, rope_frequencies, rotate
from hybrid_attn.model.transformer import packed_mixing

pytestmark = pytest.mark.usefixtures("one_device")

T = 48
PACKED = "a" * 17 + "b" * 9 + "c" * 15 + "." * 7
KINDS = {
    "L": {"window": 5, "rope_theta": 100.0},
    "C": {"chunk": 7, "rope_theta": 100.0, "qk_norm": "layernorm"},
    "G": {},
    "R": {"rope_theta": 100.0, "rope_fraction": 0.5, "qk_norm": "rms", "qk_norm_scope": "projection", "softcap": 5.0}
    | {"sink": True, "gate": "projection", "temperature.type": "learned"},
    "P": {"rope_theta": 100.0, "rope_fraction": 0.5},
}


def model_of(pattern, **changes):
    changes = {f"model.{name}": value for name, value in changes.items()}
    return tiny({"model.pattern": pattern, "model.num_layers": len(pattern)} | changes, **KINDS).model


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, tokens, positions, segments):
    return apply(model, params, tokens, positions, segments, BLOCKED)


def run(model, params, tokens, positions, segments):
    return jax.device_get(outputs(model, params, *on_mesh({"t": tokens, "p": positions, "s": segments}).values()))


def reach(model, row, kernel):
    """[T, S]: whether output t moves when input s does, by the gradient; each token of the row is another word."""
    positions, segments = layout(row)
    tokens = np.random.default_rng(1).permutation(384)[:T].astype(np.int32)
    batch = on_mesh({"t": tokens[None], "p": positions[None], "s": segments[None]})
    execution = BLOCKED._replace(kernel=kernel)
    return jax.device_get(_moves(model, execution, random_params(model), *batch.values()))[:, tokens] > 0


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moves(model, execution, params, tokens, positions, segments):
    pull_D = jnp.cos(jnp.arange(model.d_model))

    def output(embed_VD):
        x_BTD = apply(model, params | {"embed": embed_VD}, tokens, positions, segments, execution)
        return jnp.einsum("BTD,D->BT", x_BTD, pull_D)

    out_BT, pull = jax.vjp(output, params["embed"])
    one_hot = jnp.arange(T)
    return jax.lax.map(lambda t: jnp.abs(pull(jnp.zeros_like(out_BT) + (one_hot == t))[0]).max(-1), one_hot)


def sees(positions, segments, window=None, chunk=None):
    """The same by definition: a token reaches its own output, and those later in its document, window and chunk."""
    seen = np.eye(T, dtype=bool)
    for t, s in np.ndindex(T, T):
        back = positions[t] - positions[s]
        near = (window is None or back < window) and (chunk is None or positions[t] // chunk == positions[s] // chunk)
        seen[t, s] |= segments[t] == segments[s] != 0 and back >= 0 and near
    return seen


@pytest.mark.parametrize("letter", "LCR")  # G is in the test after this one
def test_a_layer_of_each_kind_reads_exactly_the_keys_of_its_definition(letter):
    window, chunk = KINDS[letter].get("window"), KINDS[letter].get("chunk")
    for row in ("a" * T, PACKED):
        np.testing.assert_array_equal(reach(model_of(letter), row, "blocked"), sees(*layout(row), window, chunk))


@pytest.mark.parametrize("block", ["pre", "post", "sandwich"])  # the other tests here have parallel ones
def test_the_model_of_every_block_is_causal_inside_each_document(block):
    np.testing.assert_array_equal(reach(model_of("G", block=block), PACKED, "reference"), sees(*layout(PACKED)))


def test_a_packed_document_gives_what_it_gives_alone():
    model = model_of("LCGR")
    tokens = np.random.default_rng(3).integers(0, 384, (4, T), np.int32)
    rows, places = [PACKED], {"a": slice(0, 17), "b": slice(17, 26), "c": slice(26, 41)}
    for row, (letter, place) in enumerate(places.items(), 1):
        length = place.stop - place.start
        rows.append(letter * length + "." * (T - length))
        tokens[row, :length] = tokens[0, place]
    positions, segments = (np.stack(x) for x in zip(*map(layout, rows), strict=True))
    out = run(model, random_params(model), tokens, positions, segments)
    for row, place in enumerate(places.values(), 1):
        assert_close(out[0, place], out[row, : place.stop - place.start], 2e-6)


@pytest.mark.parametrize("letter, knows_order", [("G", False), ("P", True)])
def test_rope_knows_the_order_of_the_past_by_distance_alone_and_nope_does_not(letter, knows_order):
    model, rng = model_of(letter), np.random.default_rng(4)
    tokens = np.tile(rng.integers(0, 384, T, np.int32), (4, 1))
    tokens[1, :-1] = rng.permutation(tokens[0, :-1])
    positions, segments = np.tile(np.arange(T, dtype=np.int32), (4, 1)), np.ones((4, T), np.int32)
    positions[2] += 37
    positions[3] *= 2
    first, shuffled, shifted, stretched = run(model, random_params(model), tokens, positions, segments)[:, -1]
    assert_close(shifted, first, 1e-5)
    for changed in (shuffled, stretched):
        moved = np.abs(changed - first).max() / np.abs(first).max()
        assert moved > 1e-2 if knows_order else moved < 2e-6


def scaling(type, factor=8.0, original_len=64, low=1.0, high=4.0, attention_factor=None):
    return RopeScaling(type, factor, original_len, low, high, attention_factor, True)


def frequencies_by_hand(theta, dims, s):
    """The formulas of each paper, one pair of dimensions at a time."""
    plain = [1.0 / theta ** (2 * i / dims) for i in range(dims // 2)]
    if s.type == "none":
        return plain
    if s.type == "linear":
        return [w / s.factor for w in plain]
    if s.type == "ntk":
        return [1.0 / (theta * s.factor ** (dims / (dims - 2))) ** (2 * i / dims) for i in range(dims // 2)]
    if s.type == "llama3":
        out = []
        for w in plain:
            wavelength = 2 * math.pi / w
            if wavelength < s.original_len / s.high:
                out.append(w)
            elif wavelength > s.original_len / s.low:
                out.append(w / s.factor)
            else:
                smooth = (s.original_len / wavelength - s.low) / (s.high - s.low)
                out.append((1 - smooth) * w / s.factor + smooth * w)
        return out

    def pair_with(turns):  # the pair, not a whole number, that turns so often in original_len tokens
        return dims * math.log(s.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair_with(s.high)), 0), min(math.ceil(pair_with(s.low)), dims - 1)
    ramp = [min(max((i - first) / (last - first), 0), 1) for i in range(dims // 2)]
    return [w / s.factor * r + w * (1 - r) for w, r in zip(plain, ramp, strict=True)]


@pytest.mark.parametrize("type", ["none", "linear", "ntk", "llama3", "yarn"])
@pytest.mark.parametrize("theta, dims, original_len, high", [(1e4, 64, 8192, 32.0), (100.0, 12, 64, 4.0)])
def test_every_rope_scaling_has_the_frequencies_of_its_formula(type, theta, dims, original_len, high):
    s = scaling(type, original_len=original_len, high=high)
    got, size = rope_frequencies(theta, dims, s)
    np.testing.assert_allclose(got, frequencies_by_hand(theta, dims, s), rtol=1e-12)
    assert size == (pytest.approx(0.1 * math.log(8) + 1) if type == "yarn" else 1.0)
    others = ["none", "linear", "ntk", "llama3", "yarn"]
    others.remove(type)
    assert all(np.abs(got / frequencies_by_hand(theta, dims, scaling(other)) - 1).max() > 0.05 for other in others)


def test_yarn_multiplies_rotated_queries_and_keys_by_its_attention_factor():
    assert rope_frequencies(1e4, 8, scaling("yarn"))[1] == pytest.approx(1.2079441541679836)
    assert rope_frequencies(1e4, 8, scaling("yarn", attention_factor=1.5))[1] == 1.5
    x = np.random.default_rng(0).normal(size=(1, 6, 2, 8)).astype(np.float32)
    angles = np.random.default_rng(1).normal(size=(1, 6, 3)).astype(np.float32)
    plain, scaled = (np.asarray(rotate(x, angles, size, "half")) for size in (1.0, 1.5))
    np.testing.assert_allclose(scaled[..., :6], 1.5 * plain[..., :6], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scaled[..., 6:], x[..., 6:])


@pytest.mark.parametrize(
    "original_len, dims, theta, stretched",  # from which pair on transformers 5.23 divides by the factor
    [(2, 32, 1e4, 16), (10**8, 8, 100.0, 0), (5, 8, 1e4, 1)],  # ramps from 0 to -1, from 11 to 7, from 0 to 0
)
def test_a_yarn_ramp_whose_ends_cross_is_that_of_the_library(original_len, dims, theta, stretched):
    got, _ = rope_frequencies(theta, dims, scaling("yarn", original_len=original_len, high=32.0))
    plain = theta ** (-np.arange(0, dims, 2) / dims)
    np.testing.assert_allclose(got, np.where(np.arange(dims // 2) < stretched, plain, plain / 8), rtol=1e-12)


def rotate_by_hand(x, positions, frequencies, rope_layout):
    """x [T, heads, H] in float64: pairs of dimensions as complex numbers, turned by position times frequency."""
    x, R = np.array(x, np.float64), len(frequencies)
    a, b = (slice(0, 2 * R, 2), slice(1, 2 * R, 2)) if rope_layout == "interleaved" else (slice(0, R), slice(R, 2 * R))
    turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * np.outer(positions, frequencies))[:, None]
    x[..., a], x[..., b] = turned.real, turned.imag
    return x


@pytest.mark.parametrize("rope_layout", ["interleaved", "half"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_turns_pairs_and_leaves_the_rest_bit_for_bit(rope_layout, fraction):
    rng = np.random.default_rng(5)
    x, positions = rng.normal(size=(1, 9, 3, 8)).astype(np.float32), rng.integers(0, 50, 9)
    kind, dims = tiny(L={"rope_theta": 100.0, "rope_fraction": fraction}).model.kinds["L"], round(8 * fraction)
    angles, size = rope_angles(kind, dims, jnp.asarray(positions)[None])
    got = np.asarray(rotate(jnp.asarray(x), angles, size, rope_layout))[0]
    frequencies = frequencies_by_hand(100.0, dims, scaling("none"))
    np.testing.assert_allclose(got, rotate_by_hand(x[0], positions, frequencies, rope_layout), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[..., dims:], x[0, ..., dims:])
    assert np.abs(got[1:, :, :dims] - x[0, 1:, :, :dims]).max() > 0.5


@pytest.mark.parametrize("dims", [8, 6])
def test_the_layouts_of_rope_are_one_rotation_of_permuted_dimensions(dims):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2, 7, 3, 8)).astype(np.float32)
    angles = jnp.asarray(rng.normal(size=(2, 7, dims // 2)), jnp.float32)
    to_half = [*range(0, dims, 2), *range(1, dims, 2), *range(dims, 8)]
    half, interleaved = rotate(x[..., to_half], angles, 1.0, "half"), rotate(x, angles, 1.0, "interleaved")
    np.testing.assert_array_equal(np.asarray(half), np.asarray(interleaved)[..., to_half])
    assert np.abs(np.asarray(rotate(x, angles, 1.0, "half") - interleaved)).max() > 0.1


@pytest.mark.parametrize("type", ["none", "linear", "ntk", "llama3", "yarn"])
def test_scores_of_rotated_queries_and_keys_depend_on_distance_alone(type):
    q, k = np.random.default_rng(7).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    fields = {"rope_theta": 100.0, "rope_scaling.type": type, "rope_scaling.factor": 4.0, "rope_scaling.high": 4.0}
    kind = tiny(L=fields | {"rope_scaling.original_len": 64}).model.kinds["L"]

    def score(q_position, k_position):
        turned = [
            rotate(jnp.asarray(x), *rope_angles(kind, 8, jnp.array([[position]])), "half")
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 1)) > 0.05


def test_a_single_pair_is_rotated_in_a_row_of_its_own_and_with_one_head():
    """Alone and in a batch, because a dimension of 1 hides from JAX how an array is split."""
    fields = {"model.num_heads": 1, "model.num_kv_heads": 1, "model.head_dim": 2}
    model = tiny(fields, L={"rope_theta": 100.0}, G={"rope_theta": 100.0}).model
    params, tokens = random_params(model), np.random.default_rng(9).integers(0, 384, (2, T), np.int32)
    positions, segments = np.tile(np.arange(T, dtype=np.int32), (2, 1)), np.ones((2, T), np.int32)
    both = run(model, params, tokens, positions, segments)
    assert_close(run(model, params, tokens[:1], positions[:1], segments[:1]), both[:1], 1e-5)
    halves = dataclasses.replace(model, rope_layout="half")  # of a single pair the layouts are the same
    assert_close(run(halves, params, tokens, positions, segments), both, 1e-5)


def norm_by_hand(x, kind, weight, eps, axes):
    x = np.asarray(x, np.float64)
    if kind == "layernorm":
        x = x - x.mean(axes, keepdims=True)
    x = x / np.sqrt((x**2).mean(axes, keepdims=True) + eps)
    return x if weight is None else x * (weight + 1 if kind == "rms_plus1" else weight)


def attention(letter_fields, **changes):
    """An `Attention` of one kind with random parameters, and these as float64 arrays."""
    model = tiny(changes, L=letter_fields).model
    layer = Attention(model, model.kinds["L"], rngs=nnx.Rngs(0))
    old, rng = nnx.to_pure_dict(nnx.state(layer)), np.random.default_rng(8)
    new = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape) + (0.5 if x.ndim < 2 else 0.0), old)
    nnx.update(layer, jax.tree.map(lambda x, y: jax.device_put(x.astype(np.float32), y.sharding), new, old))
    return layer, new


def place_by_hand(kind, model, params, q, k, positions):
    """Queries [T, N, H] and keys [T, K, H] in float64 as they enter the scores."""

    def normed(x, name):
        if kind.qk_norm == "none":
            return x
        axes = (-2, -1) if kind.qk_norm_scope == "projection" else -1
        return norm_by_hand(x, kind.qk_norm, params.get(name, {}).get("weight"), model.norm_eps, axes)

    def rotated(x):
        if kind.rope_theta is None:
            return x
        frequencies = frequencies_by_hand(kind.rope_theta, round(8 * kind.rope_fraction), kind.rope_scaling)
        return rotate_by_hand(x, positions, frequencies, model.rope_layout)

    if kind.qk_norm_after_rope:
        q, k = normed(rotated(q), "q_norm"), normed(rotated(k), "k_norm")
    else:
        q, k = rotated(normed(q, "q_norm")), rotated(normed(k, "k_norm"))
    n, t = positions[:, None, None] + 1.0, kind.temperature
    if t.type == "log_length":
        q = q * np.log(t.length + n) / np.log(t.length)
    elif t.type == "steps":
        q = q * (1 + t.scale * np.log(n // t.length + 1))
    elif t.type == "learned":
        q = q * params["temperature"][:, None] * np.log(n)
    return q, k


@pytest.mark.parametrize("qk_norm", ["layernorm", "rms", "rms_plus1", "rms_weightless"])
@pytest.mark.parametrize("scope", ["head_dim", "head", "projection"])
@pytest.mark.parametrize("after_rope", [False, True])
def test_every_query_key_norm_is_its_formula_before_or_after_the_rotation(qk_norm, scope, after_rope):
    fields = {"qk_norm": qk_norm, "qk_norm_scope": scope, "qk_norm_after_rope": after_rope, "rope_theta": 100.0}
    layer, params = attention(fields)
    rng = np.random.default_rng(9)
    q, k = rng.normal(size=(7, 4, 8)), rng.normal(1.0, 2.0, size=(7, 2, 8))
    pos = 3 * np.arange(7)
    angles, arrays = layer.angles(jnp.asarray(pos[None])), {"q_norm": q, "k_norm": k}
    got = tuple(layer.norm_and_rotate(jnp.asarray(x[None], jnp.float32), norm, angles) for norm, x in arrays.items())
    wanted = place_by_hand(layer.layer_type, layer.model, params, q, k, pos)
    assert_close(tuple(x[0] for x in jax.device_get(got)), wanted, 2e-6)
    shapes = {"head_dim": [(8,), (8,)], "head": [(4, 8), (2, 8)], "projection": [(4, 8), (2, 8)]}[scope]
    assert [params[name]["weight"].shape for name in ("q_norm", "k_norm") if name in params] == (
        [] if qk_norm == "rms_weightless" else shapes
    )


def test_temperatures_have_the_values_of_their_papers():
    def temperatures(type, scale, length, n):
        layer, params = attention({"temperature.type": type, "temperature.scale": scale, "temperature.length": length})
        got = np.asarray(layer.temperatures(jnp.asarray([n]) - 1))[0, :, :, 0]
        return (got, params["temperature"]) if type == "learned" else got[:, 0]

    swan = temperatures("log_length", 0.1, 16, [16, 240, 4080])
    np.testing.assert_allclose(swan, [1.25, 2.0, 3.0], rtol=1e-6)
    llama4 = temperatures("steps", 0.1, 8192, [1, 8191, 8192, 32768, 131072, 262144])
    np.testing.assert_allclose(llama4, [1, 1, 1.0693147, 1.1609438, 1.2833213, 1.3496508], rtol=1e-6)
    ministral = temperatures("position_steps", 0.1, 8192, [1, 8192, 8193, 262145])
    np.testing.assert_allclose(ministral, [1, 1, 1.0693147, 1.3496508], rtol=1e-6)
    learned, s_N = temperatures("learned", 0.3, 8192, [1, 1000])
    np.testing.assert_allclose(learned, np.outer([0.0, math.log(1000)], s_N), rtol=1e-5)


def test_a_learned_temperature_starts_at_its_scale():
    model = tiny(L={"temperature.type": "learned", "temperature.scale": 0.168}).model
    layer = Attention(model, model.kinds["L"], rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.asarray(layer.temperature[...]), np.full(4, 0.168), rtol=1e-6)


ATTENTIONS = {
    "window, rope, scale": {"window": 5, "rope_theta": 100.0, "scale": 0.7},
    "chunk, part of rope, softcap, weightless norm": {"chunk": 7, "rope_theta": 100.0, "rope_fraction": 0.5}
    | {"softcap": 1.1, "qk_norm": "rms_weightless"},
    "sink, gate by head, log-length": {"sink": True, "gate": "head"}
    | {"temperature.type": "log_length", "temperature.length": 4},
    "gate by projection, steps, norm by head": {"gate": "projection", "qk_norm": "layernorm", "qk_norm_scope": "head"}
    | {"temperature.type": "steps", "temperature.length": 4, "temperature.scale": 0.5},
    "learned temperature, norm after rope, sink": {"qk_norm": "rms", "qk_norm_after_rope": True, "rope_theta": 100.0}
    | {"temperature.type": "learned", "sink": True},
}


@pytest.mark.parametrize("fields", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_its_formula(fields):
    layer, params = attention(fields, **{"model.rope_layout": "half"})
    kind, model = layer.layer_type, layer.model
    x = np.random.default_rng(10).normal(size=(T, 32))
    positions, segments = layout(PACKED)
    row = on_mesh({"x": x[None].astype(np.float32), "p": positions[None], "s": segments[None]})
    attended = jax.jit(lambda layer, x, pos, seg: layer(x, pos, seg, packed_mixing(model, "L", pos, seg, REFERENCE).attend)[0])
    got = jax.device_get(attended(layer, *row.values()))[0]

    q, k, v = (np.einsum("TD,DNH->TNH", x, params[name]) for name in "qkv")
    q, k = place_by_hand(kind, model, params, q, k, positions)
    k, v = k.repeat(2, 1), v.repeat(2, 1)
    scores = np.einsum("TNH,SNH->TNS", q, k) * (8**-0.5 if kind.scale is None else kind.scale)
    if kind.softcap is not None:
        scores = kind.softcap * np.tanh(scores / kind.softcap)
    mask = sees(positions, segments, kind.window, kind.chunk) & (segments > 0)
    mass = np.exp(scores) * mask[:, None]
    total = mass.sum(-1, keepdims=True) + (np.exp(params["sink"])[:, None] if kind.sink else 0)
    o = np.einsum("TNS,SNH->TNH", mass / np.maximum(total, 1e-30), v)
    if kind.gate != "none":
        into = "TD,DN->TN" if kind.gate == "head" else "TD,DNH->TNH"
        gate = 1 / (1 + np.exp(-np.einsum(into, x, params["gate"])))
        o = o * (gate[..., None] if kind.gate == "head" else gate)
    assert_close(got, np.einsum("TNH,NHD->TD", o, params["o"]), 1e-5)
