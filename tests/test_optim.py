"""Learning rates by step, what decays, and AdamW after clipping against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, mesh_of, tiny

from hybrid_attn.config import Piece
from hybrid_attn.model import specs
from hybrid_attn.model.params import EMBEDDING, MATRIX, ParamSpec
from hybrid_attn.train.optim import OPTIMISERS, adamw
from hybrid_attn.train.schedule import schedule


def optim_of(**changes):
    return dataclasses.replace(tiny().optim, **changes)


def spec_of(group):
    return ParamSpec((), (), group, 1.0, 0)


def rates(total_steps, **changes):
    rate = schedule(optim_of(lr=2.0, final_lr_ratio=0.1, decay_fraction=0.2, **changes), [Piece(total_steps, None)])
    return np.asarray(jax.vmap(rate)(jnp.arange(total_steps)))


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_schedule_rises_to_its_peak_in_equal_steps_and_ends_on_its_last_rate(kind):
    r = rates(50, schedule=kind, warmup_steps=10)
    np.testing.assert_allclose(r[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert r.max() == pytest.approx(2.0) and r.min() == pytest.approx(0.2)
    assert r[-1] == pytest.approx(0.2, rel=1e-5)
    assert np.all(np.diff(r[10:]) <= 1e-6)


def test_cosine_is_half_way_down_in_the_middle():
    r = rates(51, schedule="cosine", warmup_steps=10)
    assert r[10] == pytest.approx(2.0) and r[30] == pytest.approx(1.1, rel=1e-5)
    assert r[15] + r[45] == pytest.approx(2.2, rel=1e-5)


def test_wsd_is_constant_until_it_falls_in_a_line_over_the_last_share_of_the_steps():
    r = rates(50, schedule="wsd", warmup_steps=10)
    np.testing.assert_allclose(r[10:40], 2.0, rtol=1e-6)
    np.testing.assert_allclose(np.diff(r[40:]), np.diff(r[40:]).mean(), rtol=1e-4)
    assert r[41] < 2.0


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("total_steps, warmup_steps", [(1, 0), (1, 20), (2, 20), (5, 0), (5, 4)])
def test_short_runs_have_rates_that_train(kind, total_steps, warmup_steps):
    r = rates(total_steps, schedule=kind, warmup_steps=warmup_steps)
    assert np.all(r > 0) and r.max() == pytest.approx(2.0)


def test_decay_shrinks_the_matrices_and_neither_norms_nor_embeddings_nor_scalars_of_heads():
    everything = {"sink": True, "gate": "head", "temperature.type": "learned", "qk_norm": "rms", "qk_norm_scope": "head"}
    changes = {"model.tie_embeddings": False, "model.num_layers": 5, "model.block": "sandwich"}
    model = tiny(changes, G=everything, L=everything | {"gate": "projection"}).model
    names = {True: set(), False: set()}
    for path, decays in jax.tree.leaves_with_path(jax.tree.map(lambda spec: spec.decay, specs(model))):
        place = {"periods": "stacked", "tail": "tail"}.get(path[0].key, "alone")
        names[decays].add((place, *(key.key for key in path[-2:])))
    attention, mlp = ("q", "k", "v", "o", "gate"), ("gate", "up", "down")
    matrices = [("attention", name) for name in attention] + [("mlp", name) for name in mlp]
    assert names[True] == {(place, *name) for place in ("stacked", "tail") for name in matrices}
    assert {name[-1] for name in names[False]} == {"weight", "embed", "unembed", "sink", "temperature"}


def test_updates_are_those_of_adamw_after_clipping_by_the_norm_of_all_gradients():
    optim = optim_of(lr=0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=2.0, warmup_steps=2)
    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(6, 4)), "mlp": {"up": rng.normal(size=(4, 5))}}
    tx = adamw(optim, {"embed": spec_of(EMBEDDING), "mlp": {"up": spec_of(MATRIX)}}, schedule(optim, [Piece(10, None)]))
    got = jax.tree.map(jnp.float32, params)
    state, update = tx.init(got), jax.jit(tx.update)
    moments = jax.tree.map(lambda p: (np.zeros_like(p), np.zeros_like(p)), params)
    for step, size in enumerate((0.05, 7.0, 0.3)):
        grads = jax.tree.map(lambda p, size=size: size * rng.normal(size=p.shape), params)
        updates, state = update(jax.tree.map(jnp.float32, grads), state, got)
        got = optax.apply_updates(got, updates)

        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        assert (norm > 2.0) == (step == 1)  # only the second gradient is clipped
        lr = float(schedule(optim, [Piece(10, None)])(step))
        for group, name, decay in ((params, "embed", 0.0), (params["mlp"], "up", 0.3)):
            g, mv = (grads, moments) if name == "embed" else (grads["mlp"], moments["mlp"])
            g, (m, v) = g[name] * min(1.0, 2.0 / norm), mv[name]
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            mv[name] = (m, v)
            m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
            group[name] = group[name] - lr * (m_hat / (np.sqrt(v_hat) + 1e-3) + decay * group[name])
        assert_close(got, params, 1e-5)


def after_a_step(optimiser, shape=(256, 128), **changes):
    """The update of a matrix of ones by a gradient of rank one, and the state of the scaling."""
    rng, spec = np.random.default_rng(0), ParamSpec(shape, ("embed", "mlp"), MATRIX, 1.0, 1)
    optim = optim_of(warmup_steps=0, clip_norm=1e9, **changes)
    tx = OPTIMISERS[optimiser](optim, {"up": spec}, schedule(optim, [Piece(10, None)]))
    with jax.set_mesh(mesh_of()):
        gradient = jnp.asarray(np.outer(*(rng.normal(size=n) for n in shape)), jnp.float32, out_sharding=spec.sharding)
        params = {"up": jnp.ones_like(gradient)}
        updates, state = tx.update({"up": gradient}, tx.init(params), params)
        return np.asarray(gradient), np.asarray(updates["up"]), state[1]


def test_lion_moves_by_the_sign_of_its_momentum():
    gradient, update, _ = after_a_step("lion", lr=0.1, weight_decay=0.0)
    np.testing.assert_allclose(update, -0.1 * np.sign(gradient), rtol=1e-6)


def test_adafactor_keeps_sums_of_rows_and_columns_and_divides_a_gradient_of_rank_one_by_its_size():
    gradient, update, state = after_a_step("adafactor", lr=0.1, weight_decay=0.0)
    np.testing.assert_allclose(update, -0.1 * np.sign(gradient), rtol=1e-4)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * (256 + 128)


@pytest.mark.parametrize("optimiser", ["adamw", "lion", "muon"])
def test_first_moments_in_bfloat16_take_half_the_bytes(optimiser):
    def dtypes(dtype):
        _, _, state = after_a_step(optimiser, shape=(16, 8), moment_dtype=dtype)
        return [x.dtype for x in jax.tree.leaves(state) if x.ndim == 2]

    first, *others = zip(dtypes("float32"), dtypes("bfloat16"), strict=True)
    assert first == (jnp.float32, jnp.bfloat16) and all(a == b == jnp.float32 for a, b in others)


def test_independent_decay_is_a_share_of_the_schedule_whatever_the_peak():
    for lr in (0.1, 0.01):
        _, without, _ = after_a_step("lion", lr=lr, weight_decay=0.0)
        _, coupled, _ = after_a_step("lion", lr=lr, weight_decay=0.3)
        _, independent, _ = after_a_step("lion", lr=lr, weight_decay=0.3, independent_decay=True)
        np.testing.assert_allclose(coupled - without, -0.3 * lr, rtol=1e-4)
        np.testing.assert_allclose(independent - without, -0.3, rtol=1e-4)
