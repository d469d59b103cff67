"""Effective ranks are those of the singular values that numpy computes, of matrices and of products of factors."""

import functools

import jax
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, ONE_LAYER, assert_close, mesh_of, on_mesh, random_params, tiny
from test_low_rank import dense, groups_of, matrix, products

from hybrid_attn import config
from hybrid_attn.model import ranks, specs
from hybrid_attn.train.step import init_state, make_step
from hybrid_attn.train.tensorboard import charts

LAYERS = {"model.prefix": "G", "model.pattern": "L", "model.num_layers": 3}
LOW = {"model.low_rank.rank_fraction": 0.25, "model.low_rank.targets": ("*/q", "*/up")}


def of_numpy(w):
    s = np.linalg.svd(w, compute_uv=False)
    p = s / s.sum()
    return (s**2).sum() / s.max() ** 2, np.exp(-(p * np.log(np.maximum(p, 1e-30))).sum())


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}], ids=["one", "four"])
def test_the_ranks_of_a_layer_type_are_means_over_its_layers_and_those_of_factors_are_of_their_product(sizes):
    model = tiny(LAYERS | LOW).model
    with jax.set_mesh(mesh_of(**sizes)):
        params = random_params(model)
        got = jax.device_get(jax.jit(functools.partial(ranks.effective_ranks, model))(params))
    params = jax.device_get(params)
    assert len(groups_of(params)) == 4
    of_dense, weights = specs(dense(model)), products(model, params)
    for i, rank in enumerate(ranks.NAMES):
        of_matrices = []
        for name in ("attention/q", "attention/k", "mlp/up"):
            block, leaf = name.split("/")
            spec, w = of_dense["periods"]["L0"][block][leaf], weights["periods"]["L0"][block][leaf]
            expected = np.mean([of_numpy(matrix(spec, w[period][None]))[i] for period in range(2)])
            assert got[f"{rank}/L/{name}"] == pytest.approx(expected, rel=1e-4), name
            assert got[f"{rank}/L/{name}"] < (8.01 if name != "attention/k" else 16)
        of_matrices = [x for name, x in got.items() if name.startswith(f"{rank}/L/")]
        assert len(of_matrices) == 7 and got[f"{rank}/L"] == pytest.approx(np.mean(of_matrices))
        q = matrix(of_dense["prefix"]["G0"]["attention"]["q"], weights["prefix"]["G0"]["attention"]["q"])
        assert got[f"{rank}/G/attention/q"] == pytest.approx(of_numpy(q)[i], rel=1e-4)


@pytest.mark.parametrize("kind", ["lora", "molora"])
def test_an_adapter_and_a_matrix_of_one_column_change_no_rank(kind, one_device):
    mixture = {"mlp.type": "moe", "mlp.experts": 4, "mlp.shared_experts": 1}
    plain = tiny(ONE_LAYER, L=mixture).model
    changed = tiny(ONE_LAYER | {"model.adapter.type": kind}, L=mixture | {"mlp.shared_gate": True}).model
    params = random_params(changed)
    assert {"q_adapter"} < params["periods"]["L0"]["attention"].keys() and "shared_gate" in params["periods"]["L0"]["mlp"]
    expected, got = (jax.jit(functools.partial(ranks.effective_ranks, model))(params) for model in (plain, changed))
    assert got.keys() == expected.keys() and "stable_rank/L/mlp/shared/up" in got
    assert_close(got, expected, 1e-6)


def test_ranks_of_an_orthogonal_matrix_a_product_of_vectors_and_zeros():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 5)))
    for w, expected in ((q, 5), (np.outer(np.arange(1.0, 5), np.arange(1.0, 4)), 1)):
        np.testing.assert_allclose(ranks.of_matrix(np.float32(w)), expected, rtol=1e-4)
    np.testing.assert_allclose(ranks.of_matrix(np.zeros((3, 2), np.float32)), [0, 1])


def test_a_step_with_statistics_has_ranks_if_the_config_says_so(one_device):
    expected = {f"{rank}/{letter}" for rank in ranks.NAMES for letter in "LG"}
    for yes in (False, True):
        c = tiny({"train.statistics_every": 2, "train.rank_statistics": yes})
        batch = on_mesh(BATCH | {"bytes": np.ones_like(BATCH["weights"])})
        step = make_step(c.at(0), BLOCKED._replace(statistics=True))
        _, metrics = jax.eval_shape(step, jax.eval_shape(functools.partial(init_state, c)), batch)
        assert (expected & metrics["statistics"].keys()) == (expected if yes else set())
        assert ("stable_rank" in charts(c)["layer types"]) == yes
    with pytest.raises(
        ValueError, match="^train.rank_statistics=True measures nothing with train.statistics_every=None; use a"
    ):
        config.build(config.to_dict(tiny()) | {"train": config.to_dict(tiny())["train"] | {"rank_statistics": True}})
