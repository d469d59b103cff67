"""Matrices of low rank: two factors in place of a matrix, from their initial values to their weight decay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import BATCH, BLOCKED, REFERENCE, assert_close, loss_and_grads, mesh_of, on_mesh, random_params, tiny, tool
from converted import HYBRID, read
from flax.traverse_util import flatten_dict, unflatten_dict
from test_adapter_files import export, saved
from test_init_from import save, start
from test_seams import check_answers

from hybrid_attn import config, upcycle
from hybrid_attn.infer import loading
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.model import flops, init, losses, specs
from hybrid_attn.model.transforms import low_rank
from hybrid_attn.programs import parse
from hybrid_attn.train import init_from
from hybrid_attn.train.optim import OPTIMISERS
from hybrid_attn.train.step import init_state, make_step

WITH_BYTES = BATCH | {"bytes": np.ones_like(BATCH["weights"])}
EVERYWHERE = {"model.low_rank.rank_fraction": 0.5, "model.low_rank.targets": ("*/attention/*", "*/mlp/*")}
ONE_G = {"model.pattern": "G", "model.num_layers": 1}


def config_of(changes=None, **kinds):
    return tiny(EVERYWHERE | (changes or {}), G={"gate": "head"}, **kinds)


def dense(model: config.Model) -> config.Model:
    return dataclasses.replace(model, low_rank=config.DENSE)


def groups_of(params: dict) -> dict[str, dict]:
    """The two factors of each matrix that has some, by its name."""
    flat = flatten_dict(params, sep="/")
    names = [name.removesuffix("/u") for name in flat if name.endswith("/u")]
    return {name: {leaf: np.asarray(flat[f"{name}/{leaf}"], np.float64) for leaf in "uv"} for name in names}


def products(model: config.Model, params: dict) -> dict:
    """Parameters of the dense model: the product of the factors of each matrix, which numpy takes."""
    flat = flatten_dict(params, sep="/")
    pairs = groups_of(params)
    out = {name: x for name, x in flat.items() if name.rpartition("/")[0] not in pairs}
    for name, pair in pairs.items():
        if name.startswith("periods"):
            product = np.stack([np.tensordot(u, v, 1) for u, v in zip(pair["u"], pair["v"], strict=True)])
        else:
            product = np.tensordot(pair["u"], pair["v"], 1)
        out[name] = jnp.asarray(product, jnp.float32)
    return unflatten_dict(out, sep="/")


def matrix(spec, x: np.ndarray) -> np.ndarray:
    """A matrix [n, m] of the first period."""
    x = x[0] if x.ndim > len(spec.shape) else x
    return np.asarray(x, np.float64).reshape(np.prod(spec.shape[: spec.fan_in]), -1)


@functools.partial(jax.jit, static_argnums=0)
def token_losses(model: config.Model, params: dict, batch: dict) -> jax.Array:
    return losses(model, params, batch, REFERENCE)[0]


@pytest.mark.slow
def test_at_full_rank_the_spectral_model_is_the_dense_one(one_device):
    layers = {"model.prefix": "G", "model.pattern": "L"}
    c = config_of(layers | {"model.low_rank.rank_fraction": 1.0, "model.low_rank.init": "spectral"})
    params, plain = (jax.jit(init, static_argnums=0)(x, jax.random.key(1)) for x in (c.model, dense(c.model)))
    assert len(groups_of(params)) == 8 + 7  # the layer before the periods, which has a gate, and the layer of the period
    assert_close(products(c.model, params), jax.device_get(plain), 2e-6)
    batch = on_mesh(BATCH)
    assert_close(token_losses(c.model, params, batch), token_losses(dense(c.model), plain, batch), 1e-6)


def test_factors_compute_what_their_product_does_forward_and_backward(one_device):
    c = config_of(ONE_G)
    params, batch = random_params(c.model), on_mesh(BATCH)
    loss, grads = jax.device_get(loss_and_grads(c.model, BLOCKED, params, batch))
    expected, of_product = jax.device_get(loss_and_grads(dense(c.model), REFERENCE, products(c.model, params), batch))
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for name, n, m in (("q", "d", "nh"), ("o", "nh", "d")):
        pair, got, w = (x["periods"]["G0"]["attention"][name] for x in (params, grads, of_product))
        assert_close(got["u"], np.einsum(f"p{n}{m},pr{m}->p{n}r", w, pair["v"]), 1e-4)
        assert_close(got["v"], np.einsum(f"p{n}{m},p{n}r->pr{m}", w, pair["u"]), 1e-4)


@pytest.mark.parametrize("kind", ["spectral", "spectral_ones", "he"])
def test_the_initial_values_are_those_of_the_paper(kind, one_device):
    c = config_of(ONE_G | {"model.low_rank.init": kind, "model.low_rank.targets": ("*/q", "*/o")})
    params, plain = (init(x, jax.random.key(0)) for x in (c.model, dense(c.model)))
    of_dense, weights, of_factors = (flatten_dict(x, sep="/") for x in (specs(dense(c.model)), plain, specs(c.model)))
    for name, pair in groups_of(params).items():
        w = matrix(of_dense[name], weights[name])
        u, v = (matrix(of_factors[f"{name}/{leaf}"], pair[leaf]) for leaf in "uv")
        assert (len(w), len(v), w.shape[1]) == (len(u), 16, v.shape[1]) == (32, 16, 32)
        if kind == "he":
            np.testing.assert_allclose([u.std(), v.std()], [(2 / 32) ** 0.5, (2 / 16) ** 0.5], rtol=0.15)
            continue
        p, s, q = np.linalg.svd(w)
        expected = (p[:, :16] * (s[:16] if kind == "spectral" else 1.0)) @ q[:16]
        np.testing.assert_allclose(u @ v, expected, atol=1e-5)
        np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-5)  # balanced: neither factor is larger
        if kind == "spectral":
            assert np.linalg.norm(w - u @ v) == pytest.approx(np.linalg.norm(s[16:]), rel=1e-4)


def test_the_decay_of_a_product_is_the_gradient_of_its_norm_by_finite_differences(one_device):
    c = config_of({"model.low_rank.targets": ("*/q", "*/o", "*/down"), "model.num_layers": 3})
    params, rng, step = random_params(c.model), np.random.default_rng(0), 1e-4
    gradients = low_rank.frobenius_gradients(specs(c.model), params)
    assert gradients["embed"] is params["embed"]

    def half_square(name: str, pair: dict) -> float:
        pairs = zip(pair["u"], pair["v"], strict=True) if name.startswith("periods") else [(pair["u"], pair["v"])]
        return sum(np.square(np.tensordot(u, v, 1)).sum() for u, v in pairs) / 2

    for name, pair in groups_of(params).items():
        for leaf in "uv":
            direction = rng.normal(size=pair[leaf].shape)
            ends = [half_square(name, pair | {leaf: pair[leaf] + sign * step * direction}) for sign in (1, -1)]
            along = (groups_of(gradients)[name][leaf] * direction).sum()
            assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4), (name, leaf)


@pytest.mark.parametrize("decay, optimiser", [("frobenius", "adamw"), ("frobenius", "muon"), ("l2", "adamw")])
def test_a_step_without_a_gradient_takes_the_decay_off_the_factors(decay, optimiser, one_device):
    changes = {"optim.optimiser": optimiser, "optim.low_rank_decay": decay, "optim.weight_decay": 0.5}
    c = config_of(ONE_G | changes | {"model.low_rank.targets": ("*/q",), "model.mup_base_width": 8})
    of_params = specs(c.model)["periods"]["G0"]["attention"]
    of_params = {name: of_params[name] for name in ("q", "v")}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: jnp.asarray(rng.normal(size=(1, *spec.shape)), jnp.float32), of_params)
    tx = OPTIMISERS[optimiser](c.optim, of_params, optax.constant_schedule(0.1))
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    u, v = (np.asarray(params["q"][leaf][0], np.float64) for leaf in "uv")
    flat = v.reshape(len(v), -1)
    by_hand = {"u": u @ (flat @ flat.T), "v": (u.T @ u @ flat).reshape(v.shape)} if decay == "frobenius" else {"u": u, "v": v}
    assert_close({leaf: x[0] for leaf, x in updates["q"].items()}, {leaf: -0.1 * 0.5 * x for leaf, x in by_hand.items()}, 1e-5)
    assert_close(updates["v"], -0.1 * 0.5 * params["v"], 1e-6)  # the matrix of the values is dense here


def test_factors_follow_the_parametrisation_of_their_matrix(one_device):
    base = ONE_G | {"model.pattern": "GG", "model.num_layers": 2, "model.low_rank.init": "spectral"}
    base |= {"model.low_rank.targets": ("*/q", "*/o")}  # two layers: half of a matrix has exactly its singular vectors
    model = config_of(base | {"model.mup_base_width": 8, "model.mup_base_depth": 1}).model
    attention = specs(model)["periods"]["G0"]["attention"]
    rates = {f"{name}/{leaf}": attention[name][leaf].rate for name in "qo" for leaf in "uv"}
    assert rates == {"q/u": 1 / 4, "q/v": 1 / 4, "o/u": 1 / 4, "o/v": 1 / 8}
    shallow = config_of(base | {"model.mup_base_width": 8}).model
    one, other = (init(x, jax.random.key(0))["periods"]["G0"]["attention"]["o"] for x in (model, shallow))
    assert_close({"u": one["u"], "v": 2 * one["v"]}, other, 1e-5)
    decay, of_shallow = (
        low_rank.frobenius_gradients(specs(x)["periods"]["G0"]["attention"]["o"], pair)
        for x, pair in ((model, one), (shallow, other))
    )
    assert_close({"u": decay["u"], "v": 2 * decay["v"]}, of_shallow, 1e-5)


@pytest.mark.slow
def test_a_step_of_muon_on_eight_devices_is_that_on_one():
    small = {"model.num_layers": 1, "model.pattern": "L", "model.low_rank.targets": ("*/attention/[qo]", "*/down")}
    # At the usual eps AdamW, which has the embeddings, turns rounding errors of small gradients into whole steps.
    c = config_of(small | {"optim.optimiser": "muon", "optim.lr": 0.01, "optim.warmup_steps": 0, "optim.eps": 1e-5})
    results = []
    for mesh in (mesh_of(), mesh_of(fsdp=2, context=2, tensor=2)):
        with jax.set_mesh(mesh):
            state = jax.jit(init_state, static_argnums=0)(c)
            state, metrics = make_step(c.at(0), BLOCKED)(state, on_mesh(WITH_BYTES))
            results.append(jax.device_get((metrics["loss"], metrics["grad_norm"], state.params)))
    assert_close(results[1], results[0], 1e-4)


def test_a_matrix_of_one_column_has_no_factors():
    shared = {"mlp.type": "moe", "mlp.experts": 4, "mlp.shared_experts": 1, "mlp.shared_gate": True}
    mlp = specs(config_of(L=shared).model)["periods"]["L0"]["mlp"]
    assert mlp["shared_gate"].shape == (32, 1) and mlp["shared"]["up"].keys() == {"u", "v"}


def test_flops_and_parameters_count_the_factors():
    c = config_of({"model.low_rank.targets": ("periods/L0/attention/q",), "model.low_rank.rank_fraction": 0.25})
    fewer = 32 * 32 - 2 * 8 * 32
    assert flops.parameters(dense(c.model)) - flops.parameters(c.model) == fewer
    counts = [flops.forward_flops_per_token(x, 16) for x in (dense(c.model), c.model)]
    assert counts[0] - counts[1] == 2 * fewer


def test_decoding_multiplies_with_the_factors(one_device):
    c = config_of(ONE_G | {"model.low_rank.targets": ("*/q", "*/o", "*/down")})
    params = random_params(c.model)
    engine = Engine(params, c, EngineOptions(chunk=16), execution=REFERENCE)
    check_answers(engine, params, REFERENCE)


def test_a_run_starts_from_the_nearest_products_to_the_matrices_of_another(tmp_path):
    there = save(tmp_path, tiny(ONE_G, G={"gate": "head"}))
    v = ("periods/G0/attention/v",)
    changes = {"init_from.path": str(tmp_path), "init_from.new": v, "init_from.ignore": v, "model.low_rank.init": "he"}
    c = config_of(ONE_G | changes)
    params, record = start(c, mesh_of(fsdp=2, tensor=2))
    of_dense, of_factors = (flatten_dict(specs(x), sep="/") for x in (dense(c.model), c.model))
    pairs = groups_of(unflatten_dict(params, sep="/"))
    assert len(pairs) == 8 and record["new"] == [*v] and record["copied"] == len(there) - 1
    assert record["factorised"] == 7
    (line,) = init_from.lines(c.init_from, {"init_from": record | {"notes": []}}, new=True)
    assert "; 7 matrices taken apart into factors, whose products are the nearest of their rank; new: periods/G0/" in line
    for name, pair in pairs.items():
        w, *uv = (matrix(*x) for x in ((of_dense[name], there[name]), *((of_factors[f"{name}/{x}"], pair[x]) for x in "uv")))
        p, s, q = np.linalg.svd(w, full_matrices=False)
        r = len(uv[1])
        error = np.abs(uv[0] @ uv[1] - (p[:, :r] * s[:r]) @ q[:r]).max()
        assert (error < 1e-5) == (not name.endswith("/v")), name
    for name in there.keys() - pairs.keys():
        np.testing.assert_array_equal(params[name], there[name])


def test_new_parameters_are_named_by_their_matrix(tmp_path):
    save(tmp_path, tiny(ONE_G, G={"gate": "head"}))
    c = config_of(ONE_G | {"init_from.path": str(tmp_path), "init_from.new": ("periods/G0/attention/v/u",)})
    with pytest.raises(ValueError, match="names 'periods/G0/attention/v/u', .*; did you mean 'periods/G0/attention/v'"):
        start(c)


def test_an_export_has_the_products(tmp_path, one_device):
    model = dataclasses.replace(HYBRID, low_rank=dataclasses.replace(config.DENSE, rank_fraction=0.25))
    params = random_params(model)
    saved(tmp_path / "saved", model, params)
    export(f"--checkpoint={tmp_path / 'saved'}", f"--out={tmp_path / 'out'}")
    expected = jax.device_get(products(model, params))
    assert len(groups_of(params)) == 5 * model.num_layers
    assert_close(read(tmp_path / "out")[1], expected, 1e-6)


def test_factors_of_several_runs_are_not_averaged_and_those_of_one_run_are():
    saved = loading.Saved(config_of(), None, [], None)
    with tool("merge") as merge:
        models = [merge.Model(name, step, "params", saved) for name, step in (("one", 1), ("one", 2), ("two", 2))]
        merge.check_same_factors(models[:2])
        with pytest.raises(ValueError, match="^one/1 has factors of low rank; merge checkpoints of one stage of one run, or"):
            merge.check_same_factors(models)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_the_base_of_a_merge_counts_as_one_of_its_runs(method, tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, config_of(ONE_G))
    flags = f"--method={method}", f"--base={tmp_path / 'two'}", f"--out={tmp_path / 'out'}"
    with tool("merge") as merge, pytest.raises(ValueError, match="^.*/one/checkpoints/0 has factors of low rank; merge"):
        parse(["merge", f"--checkpoint={tmp_path / 'one'}", *flags])
        merge.merge_models()


def test_a_mixture_is_not_made_of_factors():
    with pytest.raises(ValueError, match="^m: model.low_rank.rank_fraction=0.5, and only matrices become those of a mixture"):
        upcycle.check_dense(config_of().model, "m")


def test_a_config_without_the_keys_is_that_of_a_dense_model():
    values = config.to_dict(tiny())
    del values["model"]["low_rank"], values["optim"]["low_rank_decay"]
    assert config.build(values) == tiny()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model.low_rank.targets": ("*/q", "periods/L0/atention/o")},
            "^model.low_rank.targets names 'periods/L0/atention/o', and this model, among the matrices that can have factors, "
            "has no such parameter; did you mean 'periods/L0/attention/o'",
        ),
        ({"model.low_rank.targets": ("embed",)}, "targets names 'embed', and this model, among the matrices"),
        ({"model.low_rank.targets": ()}, "^low_rank.targets is empty; name the matrices"),
        ({"model.low_rank.rank_fraction": 1.5}, "low_rank.rank_fraction=1.5 must be positive and at most 1"),
        (
            {"model.adapter.type": "lora"},
            "^model.adapter.type='lora' stands beside matrices, and model.low_rank.rank_fraction=0.5 has factors instead; use",
        ),
        (
            {"model.depth_init": True, "model.low_rank.init": "he"},
            "^model.depth_init=True makes .*init='he' does not read them; use init='spectral'",
        ),
        ({"train.mlp_chunk": 7}, "^train.mlp_chunk=7 and model.low_rank.rank_fraction=0.5: .*; leave train.mlp_chunk at None"),
    ],
)
def test_factors_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        specs(config_of(changes).model)
    assert "\n" not in str(caught.value)
