"""A mixer, a feed-forward, an objective and an optimiser enter by one row of a table each; nothing else knows of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import BATCH, REFERENCE, assert_close, loss_and_grads, mesh_of, on_mesh, random_params, tiny
from flax import nnx

from hybrid_attn.infer.cache import Compression
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.model import abstract_params, flops, init, losses, specs
from hybrid_attn.model.params import linear, vector
from hybrid_attn.model.transformer import MIXERS, MLPS, unstacked
from hybrid_attn.parallel.mesh import spec_of
from hybrid_attn.train.objectives import OBJECTIVES, next_token
from hybrid_attn.train.optim import OPTIMISERS
from hybrid_attn.train.step import executions, init_state, make_step, make_steps


class Shift(nnx.Module):
    """A mixer that adds the token before, in the same document, through a matrix."""

    def __init__(self, model, layer_type, *, rngs):
        self.previous = linear(rngs, (model.d_model, model.d_model), ("embed", "norm"), model.init_std)

    def __call__(self, x_BTD, pos_BT, seg_BT, attend):
        before_BTD = jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return self.previous(jnp.where(pos_BT[..., None] > 0, before_BTD, 0), spec_of(x_BTD)), {}, None

    @staticmethod
    def sequence_flops(model, layer_type, length):
        return 0


class Scale(nnx.Module):
    """A feed-forward that scales each dimension, and an auxiliary loss that pulls the scales to zero."""

    def __init__(self, model, layer_type, *, rngs):
        self.scale = vector((model.d_model,), ("norm",), 0.5)

    def __call__(self, x_BTD, seg_BT, chunks):
        return x_BTD * self.scale[...].astype(x_BTD.dtype), {"aux_loss": jnp.square(self.scale[...]).sum()}


def sgd(optim, specs, rate):
    return optax.sgd(optim.lr)


def first_half(config, params, extras, batch, execution):
    """The loss of the first half of each sequence."""
    early = jnp.arange(batch["weights"].shape[1]) < batch["weights"].shape[1] // 2
    return next_token.loss(config, params, extras, batch | {"weights": batch["weights"] * early}, execution)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(MIXERS, "shift", Shift)
    monkeypatch.setitem(MLPS, "scale", Scale)
    monkeypatch.setitem(OPTIMISERS, "sgd", sgd)
    objective = next_token.NEXT_TOKEN._replace(loss=first_half)
    monkeypatch.setitem(OBJECTIVES, "first half", objective)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_a_toy_of_each_kind_is_trained(toys, microbatches):
    stage = {"steps": 5, "seq_len": 48, "batch": 8, "microbatches": microbatches, "mixture": {}, "objective": "first half"}
    c = tiny(
        {"optim.optimiser": "sgd", "optim.lr": 0.1, "stages": [stage]},
        L={"mixer": "shift", "mlp.type": "scale"},
        G={"mlp.type": "scale"},
    )
    with jax.set_mesh(mesh_of(data=2)):
        state, batch = jax.jit(init_state, static_argnums=0)(c), on_mesh(BATCH | {"bytes": np.ones_like(BATCH["weights"])})
        assert set(state.params["periods"]["L0"]) == {"shift", "mlp", "norm"}
        before = jax.device_get(state.params)
        step = make_step(c.at(0), REFERENCE)
        observed = []
        for _ in range(2):
            state, values = step(state, batch)
            observed.append(jax.device_get(values))
        after = jax.device_get(state.params)
    aux = 2 * 32 * 0.5**2  # of both layers
    assert observed[0]["loss"] > aux and observed[1]["loss"] < observed[0]["loss"]
    for leaf in ("L0", "G1"):
        # Each step of the auxiliary loss takes 2 x 0.1 of a scale off it.
        assert np.all(np.abs(before["periods"][leaf]["mlp"]["scale"]) == 0.5)
        assert np.median(after["periods"][leaf]["mlp"]["scale"]) < 0.4
    assert not np.array_equal(before["periods"]["L0"]["shift"]["previous"], after["periods"]["L0"]["shift"]["previous"])


def test_specs_say_what_toys_cost_and_what_decays(toys):
    model = tiny(L={"mixer": "shift", "mlp.type": "scale"}, G={"mlp.type": "scale"}).model
    leaves = specs(model)["periods"]["L0"]
    assert leaves["shift"]["previous"].decay and not leaves["mlp"]["scale"].decay
    with jax.set_mesh(mesh_of(data=2)):
        assert jax.tree.structure(init(model, jax.random.key(0))) == jax.tree.structure(abstract_params(model))
    D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    attention = 2 * D * N * H + 2 * D * K * H
    pairs = 10 * 11 // 2
    expected = 2 * (model.vocab_size * D + D * D + attention) + 4 * N * H * pairs / 10
    assert flops.forward_flops_per_token(model, 10) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optim.optimiser": "adam"}, "optim.optimiser='adam' is not one of 'adamw', .*; did you mean 'adamw'"),
        (
            {"model.kinds.L.mixer": "atention"},
            "model.kinds.L.mixer='atention' is not one of 'attention', 'attention_experts'; did you mean",
        ),
        ({"model.kinds.G.mlp.type": "gate"}, "kinds.G.mlp.type='gate' is not one of 'gated', 'moe'; did you mean 'gated'"),
    ],
)
def test_a_name_that_no_table_has_is_an_error_with_the_nearest(changes, message):
    with jax.set_mesh(mesh_of()), pytest.raises(ValueError, match=message):
        init_state(tiny(changes))


def test_an_objective_that_no_table_has_is_an_error_before_the_first_step():
    c = tiny()
    c = dataclasses.replace(c, stages=(c.stages[0], dataclasses.replace(c.stages[0], objective="next_tokn")))
    with jax.set_mesh(mesh_of()), pytest.raises(ValueError, match=r"stages\[1\].objective='next_tokn' .*'next_token'"):
        make_steps(c, executions(c, "cpu"))


def test_an_objective_whose_batch_field_the_data_lacks_is_an_error_before_the_first_step(monkeypatch):
    objective = next_token.NEXT_TOKEN._replace(fields=("tokens", "rewards", "advantages"))
    monkeypatch.setitem(OBJECTIVES, "next_token", objective)
    message = "'next_token' needs the batch fields rewards, advantages, and the data makes tokens, targets"
    with jax.set_mesh(mesh_of()), pytest.raises(ValueError, match=message):
        make_step(tiny().at(0), REFERENCE)


def low_rank(leaves):
    """Adds the product of two small matrices to every weight that has them beside it."""

    def adapted(x):
        return isinstance(x, dict) and set(x) == {"weight", "down", "up"}

    def added(x):
        return x["weight"] + jnp.tensordot(x["down"], x["up"], 1) if adapted(x) else x

    return jax.tree.map(added, leaves, is_leaf=adapted)


@pytest.fixture(scope="module")
def with_low_rank():
    """A config, parameters with two small matrices beside one weight, and the same with their product added to it."""
    c = tiny({"model.num_layers": 4})
    with jax.set_mesh(mesh_of()):
        params = random_params(c.model)
        down, up = (0.1 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 32, 3), (2, 3, 48))))
        adapted, summed = (jax.tree.map(lambda x: x, params) for _ in range(2))
        mlp = summed["periods"]["G1"]["mlp"]
        mlp["up"] = mlp["up"] + jnp.einsum("pdr,prf->pdf", down, up)
        adapted["periods"]["G1"]["mlp"]["up"] = {"weight": params["periods"]["G1"]["mlp"]["up"], "down": down, "up": up}
        return c, adapted, summed


def test_a_transform_of_a_layers_leaves_is_applied_inside_the_scanned_body_and_has_gradients(with_low_rank):
    (c, adapted, summed), execution = with_low_rank, REFERENCE._replace(transform=low_rank)
    with jax.set_mesh(mesh_of()):
        batch = on_mesh(BATCH)
        loss, grads = jax.device_get(loss_and_grads(c.model, execution, adapted, batch))
        loss_of_sum, grads_of_sum = jax.device_get(loss_and_grads(c.model, REFERENCE, summed, batch))
    assert loss == pytest.approx(loss_of_sum, rel=1e-6)
    got, expected = grads["periods"]["G1"]["mlp"]["up"], grads_of_sum["periods"]["G1"]["mlp"]["up"]
    assert_close(got["weight"], expected, 1e-5)
    down = adapted["periods"]["G1"]["mlp"]["up"]["down"]
    assert_close(got["up"], np.einsum("pdr,pdf->prf", down, expected), 1e-5)


@pytest.mark.slow
def test_the_steps_of_a_run_train_the_leaves_that_a_transform_reads(with_low_rank):
    c, adapted, _ = with_low_rank
    with jax.set_mesh(mesh_of()):
        (step,) = make_steps(c, [REFERENCE._replace(transform=low_rank)])
        state = jax.jit(init_state, static_argnums=0)(c, jax.tree.map(jnp.copy, adapted))
        state, _ = step(state, on_mesh(BATCH | {"bytes": np.ones_like(BATCH["weights"])}))
        for x, before in zip(*(jax.tree.leaves(p["periods"]["G1"]["mlp"]["up"]) for p in (state.params, adapted)), strict=True):
            assert x.shape == before.shape and not np.array_equal(x, before)


PROMPTS = [[5, 6, 7], list(range(40, 61))]


def check_answers(engine, params, execution, c=None):
    """The engine's log-probabilities of its greedy answers are those of the forward pass of `params`, in the model of `c`."""
    model = engine.model if c is None else c.model
    score = jax.jit(losses, static_argnums=(0, 3))
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, 6), strict=True):
        n, pos_BT = len(prompt) + len(answer.tokens), np.arange(48)[None]
        tokens_BT = np.pad([*prompt, *answer.tokens], (0, 48 - n))[None]
        batch = {"tokens": tokens_BT, "targets": np.roll(tokens_BT, -1), "positions": pos_BT, "segments": pos_BT < n}
        batch = on_mesh({name: x.astype(np.int32) for name, x in batch.items()})
        nll_BT = np.asarray(score(model, params, batch, execution)[0])
        np.testing.assert_allclose(answer.logprobs, -nll_BT[0, len(prompt) - 1 : n - 1], atol=1e-4)


def test_a_transform_is_applied_in_decoding(with_low_rank):
    (c, adapted, summed), execution = with_low_rank, REFERENCE._replace(transform=low_rank)
    with jax.set_mesh(mesh_of()):
        engine = Engine(adapted, c, EngineOptions(chunk=16), execution=execution)
        check_answers(engine, adapted, execution)
        check_answers(engine, summed, REFERENCE)


def dequantised(leaves):
    """Multiplies every pair of int8 numbers and their scales."""

    def is_quantised(x):
        return isinstance(x, dict) and set(x) == {"q", "s"}

    return jax.tree.map(lambda x: x["q"] * x["s"] if is_quantised(x) else x, leaves, is_leaf=is_quantised)


@pytest.mark.slow
def test_int8_weights_that_a_transform_dequantises_stay_int8_in_decoding(with_low_rank):
    c, _, params = with_low_rank
    quantised, up = jax.tree.map(lambda x: x, params), params["periods"]["G1"]["mlp"]["up"]
    with jax.set_mesh(mesh_of()):
        scale = jnp.abs(up).max(1, keepdims=True) / 127
        quantised["periods"]["G1"]["mlp"]["up"] = {"q": jnp.round(up / scale).astype(jnp.int8), "s": scale}
        layers = unstacked(c.model, quantised, jnp.dtype("bfloat16"))["layers"]
        assert {name: x.dtype for name, x in layers[1]["mlp"]["up"].items()} == {"q": jnp.int8, "s": jnp.float32}
        assert layers[1]["mlp"]["down"].dtype == layers[0]["mlp"]["up"].dtype == jnp.bfloat16
        execution = REFERENCE._replace(transform=dequantised)
        check_answers(Engine(quantised, c, EngineOptions(chunk=16), execution=execution), quantised, execution)


@pytest.mark.slow
def test_compression_takes_the_sinks_that_a_transform_makes(one_device):
    c, options = tiny(G={"sink": True}), GenerateOptions(compression=Compression("snapkv", cap=16, window=8))
    params = random_params(c.model)
    attention = params["periods"]["G1"]["attention"]
    stored, execution = attention["sink"], REFERENCE._replace(transform=dequantised)
    attention["sink"] = {"q": jnp.full(stored.shape, 2, jnp.int8), "s": stored / 2}
    (got,) = Engine(params, c, EngineOptions(chunk=16), execution=execution).generate(PROMPTS[1:], 3, options)
    attention["sink"] = stored
    (expected,) = Engine(params, c, EngineOptions(chunk=16), execution=REFERENCE).generate(PROMPTS[1:], 3, options)
    assert got.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_array_equal(got.logprobs, expected.logprobs)


def rounded(weight):
    """The weight in steps of 1/8."""
    return jnp.round(8 * weight) / 8


def dot_of(shapes):
    """A product with rounded weights, whose gradients are those of the weights; it adds the shape of each to `shapes`."""

    def dot(x, weight, dimension_numbers, **options):
        shapes.add(weight.shape)
        weight = weight + jax.lax.stop_gradient(rounded(weight) - weight)
        return jax.lax.dot_general(x, weight, dimension_numbers, **options)

    return dot


# Shapes of the weights of `with_rounded_weights` that a product takes: q, k, o, the gates of heads, the MLP, and the logits.
MULTIPLIED = {(32, 4, 8), (32, 2, 8), (4, 8, 32), (32, 4), (32, 48), (48, 32), (384, 32)}


@pytest.fixture(scope="module")
def with_rounded_weights():
    """A model, its parameters, the same with every weight rounded that a product takes, and their loss and gradients."""
    model = tiny({"model.tie_embeddings": False, "model.num_layers": 3, "model.logit_softcap": 5.0}, G={"gate": "head"}).model
    with jax.set_mesh(mesh_of()):
        params = random_params(model)
        is_multiplied = jax.tree.map(lambda spec: spec.group == "matrix", specs(model)) | {"unembed": True}
        rounded_params = jax.tree.map(lambda yes, x: rounded(x) if yes else x, is_multiplied, params)
        return model, params, rounded_params, jax.device_get(loss_and_grads(model, REFERENCE, rounded_params, on_mesh(BATCH)))


@pytest.mark.parametrize("mlp_chunk", [None, pytest.param(7, marks=pytest.mark.exhaustive)])
def test_another_product_is_used_with_every_weight_in_training(mlp_chunk, with_rounded_weights):
    model, params, _, expected = with_rounded_weights
    execution = REFERENCE._replace(dot=dot_of(shapes := set()), mlp_chunk=mlp_chunk)
    with jax.set_mesh(mesh_of()):
        got = jax.device_get(loss_and_grads(model, execution, params, on_mesh(BATCH)))
        plain, _ = loss_and_grads(model, REFERENCE, params, on_mesh(BATCH))
    assert_close(got, expected, 1e-5)
    assert abs(plain - expected[0]) > 1e-3 * expected[0]
    assert shapes == MULTIPLIED


def test_another_product_is_used_with_every_weight_in_decoding(with_rounded_weights):
    model, params, rounded_params, _ = with_rounded_weights
    execution = REFERENCE._replace(dot=dot_of(shapes := set()))
    with jax.set_mesh(mesh_of()):
        c = dataclasses.replace(tiny(), model=model)
        check_answers(Engine(params, c, EngineOptions(chunk=16), execution=execution), rounded_params, REFERENCE)
    assert shapes == MULTIPLIED
