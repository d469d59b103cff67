"""The bias of a router balances the load outside the gradient: it chooses experts, and never enters a gate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, assert_close, mesh_of, on_mesh, random_params, tiny
from flax import nnx
from test_moe import inputs, layer_of, loss_and_grads

from hybrid_attn.model import specs
from hybrid_attn.train import optim
from hybrid_attn.train.step import init_state, make_step, skip_step

RATE = 0.25  # of which every multiple is exact
MLP = {"mlp.type": "moe", "mlp.d_ff": 16, "mlp.experts": 6, "mlp.top_k": 2, "mlp.bias_rate": RATE}
STAGE = {"steps": 99, "seq_len": 48, "batch": 8, "microbatches": 2, "mixture": {}}
WITH_BYTES = BATCH | {"bytes": np.ones_like(BATCH["weights"])}


def config_of(changes=None, **of_mlp):
    layers = {"model.pattern": "L", "model.num_layers": 2, "stages": [STAGE], "optim.warmup_steps": 0}
    fields = MLP | {f"mlp.{name}": x for name, x in of_mlp.items()}
    return tiny(layers | (changes or {}), L={"window": 5, "rope_theta": 100.0} | fields)


def biases(params):
    return {name: np.asarray(layer["mlp"]["bias"]) for name, layer in params["periods"].items()}


def without(params):
    """The parameters but for the biases."""
    by_layer = {name: layer | {"mlp": layer["mlp"] | {"bias": 0}} for name, layer in params["periods"].items()}
    return params | {"periods": by_layer}


def stepped(c, sizes=(), batch=WITH_BYTES):
    """The parameters before and after a step, and its metrics."""
    with jax.set_mesh(mesh_of(**dict(sizes))):
        state = jax.jit(init_state, static_argnums=0)(c, random_params(c.model))
        before = jax.device_get(state.params)
        state, metrics = make_step(c.at(0), BLOCKED)(state, on_mesh(batch))
        return before, *jax.device_get((state.params, metrics))


@functools.cache
def gradient(model):
    """That of the whole batch on one device."""
    with jax.set_mesh(mesh_of()):
        _, grads = loss_and_grads(model, BLOCKED, random_params(model), on_mesh(BATCH))
        return jax.device_get(grads)


def test_the_gradient_of_a_bias_is_experts_times_the_load_above_the_mean_and_the_loss_is_that_without_it(one_device):
    settings, graph, state = layer_of(experts=6, top_k=2, bias_rate=RATE)
    x_BTD, seg_BT = inputs()

    def loss(state):
        return nnx.merge(graph, state)(x_BTD, seg_BT, None)[1]["aux_loss"]

    value, grads = jax.jit(jax.value_and_grad(loss))(state)
    real = np.asarray(seg_BT) > 0
    logits = np.asarray(x_BTD)[real] @ np.asarray(state["router"][...])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probabilities - np.asarray(state["bias"][...]))[:, : settings.top_k]
    load_E = np.bincount(chosen.ravel(), minlength=6)
    np.testing.assert_array_equal(grads["bias"][...], 6 * load_E - load_E.sum())
    share_E = load_E / load_E.sum()
    z = np.square(np.log(np.exp(logits).sum(-1))).mean()
    assert value == pytest.approx(0.01 * 6 * (share_E * probabilities.mean(0)).sum() + 0.001 * z, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimiser, sizes",
    [
        *(pytest.param(name, {}, marks=pytest.mark.exhaustive) for name in ("lion", "adafactor", "muon", "adamw")),
        ("muon", {"fsdp": 2, "context": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_a_step_moves_each_bias_against_the_load_of_the_whole_batch_and_nothing_else_by_it(optimiser, sizes):
    changes = {"optim.optimiser": optimiser, "optim.clip_norm": 1e-3, "optim.weight_decay": 0.3, "model.mup_base_width": 16}
    losses = {"balance_loss": 0.0, "z_loss": 0.0}  # which are means over a microbatch
    c = config_of(changes, **losses)
    before, after, metrics = stepped(c, sizes.items())
    grads = gradient(c.model)
    for name, old in biases(before).items():
        load = biases(grads)[name]
        assert np.abs(load).max() > 10 and old.shape == (2, 6)
        np.testing.assert_allclose(biases(after)[name], old - RATE * np.sign(load), atol=1e-6)
    squares = jax.tree.map(lambda x: np.square(x, dtype=np.float64).sum(), without(grads))
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum(jax.tree.leaves(squares))), rel=1e-5)
    _, others, _ = stepped(config_of(changes, bias_rate=0.0, **losses), sizes.items())
    assert_close(without(after), without(others), 1e-6)
    assert_close(biases(others), biases(before), 0)


@pytest.mark.slow
def test_a_stage_that_does_not_train_a_bias_and_a_step_without_an_update_leave_it(one_device):
    c = config_of({"stages": [STAGE | {"trainable": ("embed",)}], "optim.spike_factor": 3.0})
    before, after, _ = stepped(c)
    assert_close(biases(after), biases(before), 0)
    c = config_of({"optim.spike_factor": 3.0})
    before, after, metrics = stepped(c, batch=WITH_BYTES | {"weights": np.float32(np.nan) * BATCH["weights"]})
    assert metrics["consecutive_spikes"] == 1
    assert_close(after, before, 0)
    state = init_state(c, random_params(c.model))
    assert_close(biases(jax.device_get(skip_step(state).params)), biases(before), 0)


@pytest.mark.slow
def test_biases_balance_a_router_that_prefers_one_expert(one_device):
    c = config_of({"optim.lr": 1e-6}, bias_rate=0.03, balance_loss=0.0)
    params = random_params(c.model)
    for layer in params["periods"].values():
        layer["mlp"]["bias"] = jnp.zeros_like(layer["mlp"]["bias"]).at[:, 2].set(0.5)
    state, step, batch = init_state(c, params), make_step(c.at(0), BLOCKED), on_mesh(WITH_BYTES)
    loads = []
    for _ in range(40):
        state, metrics = step(state, batch)
        loads.append(float(metrics["expert_load"]))
    assert loads[0] > 2.5 and max(loads[-5:]) < 1.5


def test_a_bias_is_in_no_optimiser_and_in_float32(one_device):
    spec = specs(config_of().model)["periods"]["L0"]["mlp"]["bias"]
    assert spec.sign_rate == RATE and not spec.cast and not spec.decay and spec.multiplications == 0
    moments = optim.optimiser(config_of()).init(random_params(config_of().model))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(moments)}
    assert any("['router']" in name for name in names) and not any("['bias']" in name for name in names)
