"""A short convolution is a loop over the tokens of a document: on every mesh, in a cache, and in its costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BATCH,
    BLOCKED,
    REFERENCE,
    assert_close,
    every,
    layout,
    loss_and_grads,
    mesh_of,
    on_mesh,
    random_params,
    tiny,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import config, upcycle
from hybrid_attn.convert import families
from hybrid_attn.infer.cache import Compression
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.session import Session
from hybrid_attn.model import abstract_params, apply, flops, init, logits, losses_and_aux, short_conv, specs
from hybrid_attn.model.transformer import STATISTICS
from hybrid_attn.parallel import context
from hybrid_attn.parallel.mesh import ACT_BTD, TOKENS_BT
from hybrid_attn.stored import digest
from hybrid_attn.train import resume

T, D = 96, 6  # a slice of 8 shards in zigzag order has 6 tokens
SEQUENCES = [
    "a" * T,
    "a" * 37 + "b" * 9 + "." * 50,
    "." * 3 + "abbccccddddddddeeeeeeeeee" + "f" * 68,
    "a" * 12 + "b" * 36 + "c" * 48,
]
WIDTH = 4
PROGRAMS = {}


def loop(weight_WD, x_BTD, dy_BTD, seg_BT):
    """Output, and gradients of weights and input for those of the output, token by token in float64."""
    weight_WD, x_BTD, dy_BTD = (np.float64(x) for x in (weight_WD, x_BTD, dy_BTD))
    y_BTD, dweight_WD, dx_BTD = x_BTD.copy(), np.zeros_like(weight_WD), dy_BTD.copy()
    for b, t in np.ndindex(seg_BT.shape):
        for i in range(len(weight_WD)):
            if seg_BT[b, t] == 0 or t < i or seg_BT[b, t - i] != seg_BT[b, t]:
                break
            y_BTD[b, t] += weight_WD[i] * x_BTD[b, t - i]
            dweight_WD[i] += dy_BTD[b, t] * x_BTD[b, t - i]
            dx_BTD[b, t - i] += weight_WD[i] * dy_BTD[b, t]
    return y_BTD, (dweight_WD, dx_BTD)


@functools.cache
def arrays(width):
    """Weights, input, gradient of the output, segments, and what the loop makes of them."""
    rng, seg_BT = np.random.default_rng(0), np.stack([layout(row)[1] for row in SEQUENCES])
    shapes = (width, D), (*seg_BT.shape, D), (*seg_BT.shape, D)
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return *inputs, seg_BT, loop(*inputs, seg_BT)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"context": 8}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("width", [2, 4, 17])
def test_it_is_a_loop_over_the_tokens_of_each_document_however_the_mesh_splits_the_sequence(width, sizes, zigzag):
    *inputs, seg, expected = arrays(width)
    mesh, splits = mesh_of(**sizes), (P(), ACT_BTD, ACT_BTD, TOKENS_BT)
    with jax.set_mesh(mesh):
        put = (jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((*inputs, seg), splits, strict=True))

        @jax.jit
        def both(weight, x, dy, seg):
            def convolve(weight, x):
                x_BTD, seg_BT = context.to_zigzag((x, seg), zigzag)
                return context.from_zigzag(short_conv.convolve_packed(weight, x_BTD, seg_BT, zigzag), zigzag)

            y, pull = jax.vjp(convolve, weight, x)
            return y, pull(dy)

        assert_close(jax.device_get(both(*put)), expected, 1e-6)


def models(**changes) -> tuple[config.Model, config.Model]:
    """A model of a local layer with RoPE and a global one without positions, and the same with a convolution in both."""
    local, other = {"window": 5, "rope_theta": 100.0}, {"qk_norm": "rms"}
    return tuple(tiny(changes, L=local | conv, G=other | conv).model for conv in ({}, {"short_conv": WIDTH}))


forward = jax.jit(apply, static_argnums=(0, 5))


@pytest.mark.parametrize("block, dtype", [("parallel", "float32"), ("sandwich", "bfloat16")])
def test_a_model_starts_as_the_one_without_it(block, dtype, one_device):
    (plain, model), execution = models(**{"model.block": block}), REFERENCE._replace(dtype=jnp.dtype(dtype))
    assert not np.any(init(model, jax.random.key(0))["periods"]["L0"]["short_conv"])
    params = random_params(plain)
    layers = {name: leaves | {"short_conv": jnp.zeros((1, WIDTH, 32))} for name, leaves in params["periods"].items()}
    inputs = [on_mesh(BATCH)[name] for name in ("tokens", "positions", "segments")]
    got, expected = forward(model, params | {"periods": layers}, *inputs, execution), forward(plain, params, *inputs, execution)
    np.testing.assert_array_equal(got, expected)
    assert np.any(forward(model, random_params(model), *inputs, execution) != expected)


MESHES = [
    ({"fsdp": 2, "context": 2, "tensor": 2}, True),
    pytest.param({"data": 2, "context": 4}, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes, zigzag", MESHES, ids=str)
@pytest.mark.parametrize("mixer", ["attention", pytest.param("attention_experts", marks=pytest.mark.slow)])
def test_loss_and_gradients_of_a_model_are_those_of_one_device(mixer, sizes, zigzag):
    model = models(**{"model.block": "pre", "model.kinds.G.mixer": mixer})[1]
    execution = BLOCKED._replace(context=config.Table({"L": "halo", "G": "gather"}), remat=every("layer"), zigzag=zigzag)

    def on(mesh, execution):
        with jax.set_mesh(mesh):
            return jax.device_get(loss_and_grads(model, execution, random_params(model), on_mesh(BATCH)))

    got, expected = on(mesh_of(**sizes), execution), on(mesh_of(), REFERENCE)
    assert_close(got, expected, 5e-6)
    assert np.abs(got[1]["periods"]["L0"]["short_conv"]).min() > 0


def last_activations(model, params, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)[None]
    return np.asarray(forward(model, params, tokens, jnp.arange(tokens.size)[None], jnp.ones_like(tokens), REFERENCE))[0, -1]


def test_it_tells_the_order_of_tokens_where_one_layer_of_attention_without_positions_does_not(one_device):
    one = {"model.pattern": "G", "model.num_layers": 1}
    plain, model = tiny(one).model, tiny(one, G={"short_conv": 2}).model
    tokens, swapped = [5, 6, 7, 8, 9, 10], [5, 7, 6, 8, 9, 10]
    for each, tells in ((plain, False), (model, True)):
        a, b = (last_activations(each, random_params(each), x) for x in (tokens, swapped))
        assert (np.abs(a - b).max() > 1e-3 * np.abs(a).max()) == tells


def test_statistics_of_layers_are_measured_with_it(one_device):
    model = models()[1]
    measured = jax.jit(losses_and_aux, static_argnums=(0, 3))
    aux = measured(model, random_params(model), on_mesh(BATCH), REFERENCE._replace(statistics=True))[2]
    assert aux[STATISTICS]["periods"]["G1"].attention.max_logit_BN.shape == (1, 8, 4)


def sequences_of(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 384, n).tolist() for n in lengths]


PROMPTS, NEW = sequences_of(1, 2, 3, 4, 16, 17, 40), 6  # shorter than the convolution, and longer than a chunk


def config_of(model, **changes):
    return dataclasses.replace(tiny({"train.kernel": "reference", "train.dtype": "float32"} | changes), model=model)


def engine_of(model, make=Engine, params=None, **options):
    params = random_params(model) if params is None else params
    return make(params, config_of(model), EngineOptions(chunk=16, **options), PROGRAMS.setdefault(jax.sharding.get_mesh(), {}))


@functools.cache
def expected_answers():
    """Tokens of greedy answers and the log-probability of each, by the forward pass of one device."""
    model = models()[1]

    @jax.jit
    def log_probs(params, tokens_BT, seg_BT):
        pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return jax.nn.log_softmax(logits(model, params, apply(model, params, tokens_BT, pos_BT, seg_BT, REFERENCE)))

    with jax.set_mesh(mesh_of()):
        params, sequences, scores = random_params(model), [[*x] for x in PROMPTS], [[] for _ in PROMPTS]
        for _ in range(NEW):
            tokens, seg = np.zeros((2, len(PROMPTS), 48), np.int32)
            for b, sequence in enumerate(sequences):
                tokens[b, : len(sequence)], seg[b, : len(sequence)] = sequence, 1
            of_all = np.asarray(log_probs(params, tokens, seg))
            for b, sequence in enumerate(sequences):
                of_last = of_all[b, len(sequence) - 1]
                scores[b].append(of_last.max())
                sequence.append(int(of_last.argmax()))
    return [x[-NEW:] for x in sequences], scores


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_answers_and_scores_are_those_of_the_forward_pass(sizes):
    answers, scores = expected_answers()
    with jax.set_mesh(mesh_of(**sizes)):
        engine = engine_of(models()[1])
        for generated, tokens, logprobs in zip(engine.generate(PROMPTS, NEW), answers, scores, strict=True):
            assert generated.tokens.tolist() == tokens
            np.testing.assert_allclose(generated.logprobs, logprobs, atol=1e-4)
        for got, logprobs in zip(engine.score(PROMPTS, answers), scores, strict=True):
            np.testing.assert_allclose(got, logprobs, atol=1e-4)


def test_a_shared_prefix_is_read_once_and_changes_nothing(one_device):
    engine = engine_of(models()[1])
    prompts = [[*PROMPTS[6], *more] for more in ([1, 2], [3, 4])]
    expected = [engine.generate([prompt], NEW)[0] for prompt in prompts]
    for a, b in zip(engine.generate(prompts, NEW), expected, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_a_session_goes_on_and_begins_anew(one_device):
    model = models()[1]
    session, prompt = engine_of(model, Session), []
    for more, unread in ((30, 30), (1, 1), (7, 7)):  # the first prompt and its answer get 64 slots, which hold all that follows
        prompt += sequences_of(more)[0]
        (generated,), (expected,) = (x.generate([prompt], NEW) for x in (session, engine_of(model)))
        assert generated.tokens.tolist() == expected.tokens.tolist() and session.timing.prompt_tokens == unread
        np.testing.assert_allclose(generated.logprobs, expected.logprobs, atol=1e-4)
        prompt += generated.tokens.tolist()
    (generated,), (expected,) = (x.generate([[5, 3]], NEW) for x in (session, engine_of(model)))
    assert generated.tokens.tolist() == expected.tokens.tolist() and session.timing.prompt_tokens == 2


def test_compression_drops_keys_and_leaves_the_inputs_of_the_convolution(one_device):
    """One global layer without positions, which sees the first 2 and the last 10 tokens of a prompt and what follows."""
    model = tiny({"model.pattern": "G", "model.num_layers": 1}, G={"short_conv": WIDTH}).model
    params, prompt, question = random_params(model), PROMPTS[6], [9, 4]
    compressed = GenerateOptions(compression=Compression("streaming", cap=12, sinks=2))
    (answer,) = engine_of(model, params=params).generate([prompt], 1, compressed, questions=[question])

    all_tokens = jnp.asarray([*prompt, *question], jnp.int32)
    hidden = (jnp.arange(len(all_tokens)) >= 2) & (jnp.arange(len(all_tokens)) < len(prompt) - 10)
    scores = attended_by_hand(model, params, np.asarray(all_tokens), ~np.asarray(hidden))
    assert answer.tokens.tolist() == [scores.argmax()]
    np.testing.assert_allclose(answer.logprobs, [scores.max() - np.logaddexp.reduce(scores)], atol=1e-4)


def attended_by_hand(model, params, tokens_T, seen_T):
    """The logits [V] after the last token of one layer in the form parallel, whose queries see some tokens alone."""
    layer = jax.tree.map(lambda x: np.float64(x[0]), params["periods"]["G0"])
    embed_VD = np.float64(params["embed"])

    def normed(x_TD, weight_D):
        x_TD = x_TD - x_TD.mean(-1, keepdims=True)
        return weight_D * x_TD / np.sqrt(np.square(x_TD).mean(-1, keepdims=True) + model.norm_eps)

    x_TD = embed_VD[tokens_T]
    h_TD = normed(x_TD, layer["norm"]["weight"])
    y_TD = h_TD.copy()
    for t in range(len(h_TD)):
        for i in range(min(WIDTH, t + 1)):
            y_TD[t] += layer["short_conv"][i] * h_TD[t - i]
    q_NH, k_TKH, v_TKH = (
        np.einsum("...D,DNH->...NH", x, layer["attention"][n]) for x, n in ((y_TD[-1], "q"), (y_TD, "k"), (y_TD, "v"))
    )
    groups = model.num_heads // model.num_kv_heads
    k_TNH, v_TNH = (np.repeat(x, groups, 1) for x in (k_TKH, v_TKH))
    scores_NT = np.where(seen_T, np.einsum("NH,TNH->NT", q_NH, k_TNH) * model.head_dim**-0.5, -np.inf)
    shares_NT = np.exp(scores_NT - np.logaddexp.reduce(scores_NT, 1, keepdims=True))
    mixed_D = np.einsum("NT,TNH,NHD->D", shares_NT, v_TNH, layer["attention"]["o"])
    gate_F, up_F = (h_TD[-1] @ layer["mlp"][name] for name in ("gate", "up"))
    out_D = x_TD[-1] + mixed_D + (gate_F / (1 + np.exp(-gate_F)) * up_F) @ layer["mlp"]["down"]
    return embed_VD @ normed(out_D, np.float64(params["final_norm"]["weight"]))


def test_the_cache_has_the_last_inputs_of_each_request(one_device):
    plain, model = models()
    sizes = []
    for each in (plain, model):
        engine = engine_of(each)
        engine.generate(PROMPTS[:1], NEW)
        sizes.append(engine.timing.cache_bytes)
    inputs = 2 * (WIDTH - 1) * 32 * 4
    assert sizes[1] - sizes[0] == inputs
    assert flops.cache_bytes(model, 50, 4) - flops.cache_bytes(plain, 50, 4) == inputs
    assert flops.cache_bytes(model, 1, 4) - flops.cache_bytes(plain, 1, 4) == 2 * 32 * 4


def test_it_costs_a_multiplication_for_each_tap_and_dimension():
    plain, model = tiny().model, tiny({"model.kinds.L.short_conv": WIDTH}).model
    assert flops.parameters(model) - flops.parameters(plain) == WIDTH * 32
    assert flops.forward_flops_per_token(model, 20) - flops.forward_flops_per_token(plain, 20) == 2 * WIDTH * 32


def test_its_weights_are_not_decayed_cast_split_or_scaled_by_width():
    model = tiny({"model.kinds.L.short_conv": WIDTH, "model.mup_base_width": 8, "model.mup_base_depth": 1}).model
    spec = specs(model)["periods"]["L0"]["short_conv"]
    assert not spec.decay and not spec.cast and spec.rate == 1.0 and spec.std == 0.0
    assert spec.shape == (WIDTH, 32) and not any(spec.sharding)
    assert specs(model)["periods"]["L0"]["attention"]["q"].rate == 1 / 4


@pytest.mark.parametrize("part", ["adapter", "low_rank"])
def test_neither_adapters_nor_factors_can_have_it_as_a_target(part):
    changes = {"adapter.type": "lora"} if part == "adapter" else {"low_rank.rank_fraction": 0.5}
    changes |= {f"{part}.targets": ("*/short_conv",)}
    model = tiny({f"model.{name}": x for name, x in changes.items()} | {"model.kinds.L.short_conv": WIDTH}).model
    with pytest.raises(ValueError, match=rf"{part}.targets.*short_conv"):
        abstract_params(model)


def test_references_that_a_store_has_of_a_model_without_it_still_hold():
    model = tiny().model
    fields = resume.fields_of(config.to_dict(tiny())).items()
    names_of_before = {
        key: x for key, x in fields if key.startswith("model.") and key not in resume.INITIAL and "short_conv" not in key
    }
    assert resume.function_of(model) == digest(names_of_before)
    assert resume.function_of(tiny({"model.kinds.L.short_conv": WIDTH}).model) != digest(names_of_before)


def test_no_family_can_express_it_and_the_error_names_the_field():
    model = tiny({"model.kinds.L.short_conv": WIDTH}).model
    with pytest.raises(ValueError, match=r"cohere2 cannot express(.|\n)*kinds.L.short_conv: 4 -> None"):
        families.config_json(model, "cohere2", 64)


@pytest.mark.parametrize("method, models", [("sparse", 1), ("btx", 2), ("bam", 2)])
def test_a_mixture_that_is_made_of_models_has_their_mean_convolution(method, models):
    recipe = upcycle.METHODS[method](models, 2)
    values = config.to_dict(tiny({"model.kinds.L.short_conv": WIDTH}))
    assert upcycle.mixture(values, recipe, {})["model"]["kinds"]["L"]["short_conv"] == WIDTH
    name = "periods/L0/short_conv"
    assert upcycle.origin(recipe, name) == upcycle.Origin(upcycle.MEAN, tuple((i, name) for i in range(models)))
