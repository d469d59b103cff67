"""The chunked loss is the plain cross-entropy, over any mesh, without ever holding the logits of a batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, biggest_array, mean_loss, mesh_of, on_mesh, temporary_bytes, tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.model import loss
from hybrid_attn.model.loss import bits_per_byte, token_losses

B, T, D, V, CHUNK = 8, 13, 32, 384, 9  # 104 tokens are no multiple of 9, nor are 384, 192 and 96 entries of 70
CASES = {"plain": (1.0, None, 0.0), "scale, softcap, z-loss": (0.5, 3.0, 1e-2)}


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    monkeypatch.setattr(loss, "ENTRIES", 70)


def model_of(scale, softcap):
    return tiny({"model.logit_scale": scale, "model.logit_softcap": softcap}).model


def inputs(seed=0):
    """Activations, table, targets and weights; rows weigh from nothing to everything, and one of them nothing at all."""
    rng = np.random.default_rng(seed)
    weights = (rng.random((B, T)) < np.arange(B)[:, None] / (B - 1)).astype(np.float32)
    x, table = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T), np.int32)
    targets[0, :4] = 0, 69, 70, V - 1
    return x, table, targets, weights


@functools.partial(jax.jit, static_argnums=(0, 1))
def chunked(model, z_loss, x, table, targets, weights):
    """Loss, its gradients by the activations and the table, and the losses by token."""

    def total(x, table):
        nll, lse = token_losses(model, table, x, targets, CHUNK)
        return mean_loss(nll, lse, weights, z_loss), (nll, lse)

    (value, by_token), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(x, table)
    return value, grads, by_token


def by_hand(model, z_loss, x, table, targets, weights):
    """The same in float64 with all logits at once and the derivatives written out."""
    x, table = np.float64(x).reshape(-1, D), np.float64(table)
    targets, weights = targets.ravel(), np.float64(weights).ravel()
    logits, slope = model.logit_scale * x @ table.T, model.logit_scale
    if model.logit_softcap is not None:
        t = np.tanh(logits / model.logit_softcap)
        logits, slope = model.logit_softcap * t, model.logit_scale * (1 - t**2)
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - logits[np.arange(B * T), targets]
    share = weights / weights.sum()
    d = np.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None] - np.eye(V)[targets]
    d = d * share[:, None] * slope
    value = (share * (nll + z_loss * lse**2)).sum()
    return value, ((d @ table).reshape(B, T, D), d.T @ x), (nll.reshape(B, T), lse.reshape(B, T))


def run(model, z_loss, x, table, targets, weights):
    """`chunked` on the mesh in force."""
    table = jax.device_put(table, NamedSharding(jax.sharding.get_mesh(), P("tensor", "fsdp")))
    batch = on_mesh({"x": x, "targets": targets, "weights": weights})
    return jax.device_get(chunked(model, z_loss, batch["x"], table, batch["targets"], batch["weights"]))


MESHES = [(1, 1, 1, 1), (1, 1, 1, 2), (1, 2, 1, 4), (8, 1, 1, 1)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_all_logits_at_once_whatever_the_mesh(sizes, case):
    scale, softcap, z_loss = CASES[case]
    model = model_of(scale, softcap)
    with jax.set_mesh(mesh_of(*sizes)):
        got = run(model, z_loss, *inputs())
    wanted = by_hand(model, z_loss, *inputs())
    assert_close(got, wanted, 1e-6)
    rows = inputs()[3] * wanted[2][0]
    means = rows.sum(1) / np.maximum(inputs()[3].sum(1), 1)
    assert abs(means.mean() - wanted[0]) > 0.05 * wanted[0]  # so that a mean of the shards' means is not the mean


def test_tokens_of_no_weight_change_no_bit_and_get_no_gradient(one_device):
    model = model_of(1.0, None)
    x, table, targets, weights = inputs()
    value, (dx, dtable), _ = run(model, 1e-2, x, table, targets, weights)
    other_x, _, other_targets, _ = inputs(seed=1)
    silent = weights == 0
    x, targets = np.where(silent[..., None], 3 * other_x, x), np.where(silent, other_targets, targets)
    value_after, (dx_after, dtable_after), (nll, _) = run(model, 1e-2, x, table, targets, weights)
    assert 20 < silent.sum() < 84 and value == value_after
    np.testing.assert_array_equal(dx, dx_after)
    np.testing.assert_array_equal(dtable, dtable_after)
    assert not np.any(dx[silent]) and np.all(np.any(dx[~silent], -1))
    assert np.all(nll[silent] != run(model, 1e-2, *inputs())[2][0][silent])
    assert run(model, 1e-2, x, table, targets, np.zeros_like(weights))[0] == 0


def test_activations_in_bfloat16_lose_no_more_than_their_own_rounding(one_device):
    model = model_of(0.5, None)
    x, table, targets, weights = inputs()
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, table)]
    value, grads, by_token = run(model, 0.0, x.astype(jnp.bfloat16), table, targets, weights)
    wanted = by_hand(model, 0.0, *rounded, targets, weights)
    assert_close((value, by_token), (wanted[0], wanted[2]), 1e-6)
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == np.float32
    assert_close(grads, wanted[1], 1e-2)


def test_no_array_holds_the_logits_of_a_batch(one_device, monkeypatch):
    x, table, targets, weights = inputs()
    whole = biggest_array(jax.grad(lambda x, table: jnp.exp(x.reshape(-1, D) @ table.T).sum(), (0, 1)), x, table)
    assert whole >= B * T * V

    def biggest():
        batch = on_mesh({"x": x, "targets": targets, "weights": weights})
        sharded = jax.device_put(table, NamedSharding(jax.sharding.get_mesh(), P("tensor", "fsdp")))
        grad = functools.partial(chunked.__wrapped__, model_of(1.0, 3.0), 1e-2)
        return biggest_array(grad, batch["x"], sharded, batch["targets"], batch["weights"])

    assert biggest() <= V * D < B * T * V / 3
    monkeypatch.setattr(loss, "ENTRIES", 10**6)
    monkeypatch.setattr("test_loss.CHUNK", 10**6)
    assert biggest() >= B * T * V


def test_256000_entries_and_8192_tokens_take_less_than_a_gib_of_temporaries(one_device):
    model = tiny({"model.vocab_size": 256_000, "model.d_model": 512}).model

    def loss(table, x, targets, weights):
        return mean_loss(*token_losses(model, table, x, targets, 1024), weights, 1e-4)

    table = jax.ShapeDtypeStruct((256_000, 512), "float32", sharding=NamedSharding(one_device, P("tensor", "fsdp")))
    x, targets, weights = (
        jax.ShapeDtypeStruct((1, 8192, *rest), dtype) for rest, dtype in (((512,), "float32"), ((), "int32"), ((), "float32"))
    )
    assert temporary_bytes(jax.jit(jax.grad(loss, (0, 1))).lower(table, x, targets, weights)) < 2**30


def test_bits_per_byte_is_one_where_every_byte_costs_one_bit():
    assert bits_per_byte(math.log(2) * 7, 7) == pytest.approx(1.0)
    assert bits_per_byte(12.0, 3) == pytest.approx(2 * bits_per_byte(12.0, 6))
