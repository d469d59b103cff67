"""The whole model: scanned or not, rematerialised or not, on any mesh, it is one function; blocks against plain NumPy."""

import dataclasses
import functools
import importlib
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BATCH,
    BLOCKED,
    REFERENCE,
    assert_close,
    biggest_array,
    every,
    everything,
    loss_and_grads,
    mesh_of,
    on_mesh,
    random_params,
    tiny,
)
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import config
from hybrid_attn.model import abstract_params, apply, execution_on, flops, init, losses
from hybrid_attn.model.execution import Chunks
from hybrid_attn.model.mlp import GatedMLP
from hybrid_attn.model.params import MESH_AXES, Norm
from hybrid_attn.model.transformer import Block, packed_mixing, unembedding, unstacked
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import AXES, TOKENS_BT, abstract_mesh, axis_sizes
from hybrid_attn.train.step import init_state, make_step


@pytest.mark.parametrize("prefix, num_layers, groups", [("", 5, (2, "L")), ("G", 6, (2, "L")), ("GG", 3, (0, "L"))])
def test_a_prefix_scanned_periods_and_a_tail_equal_a_loop_over_layers(prefix, num_layers, groups, one_device):
    scanned = tiny({"model.num_layers": num_layers, "model.prefix": prefix, "model.pattern": "LG"}).model
    looped = dataclasses.replace(scanned, prefix="", pattern=scanned.layers)
    assert ((scanned.num_periods, scanned.tail), looped.num_periods, looped.tail) == (groups, 1, "")
    assert looped.layers == prefix + "LGLGL"[: num_layers - len(prefix)]
    params, batch = random_params(scanned), on_mesh(BATCH)

    def outputs(model, params):
        arrays = (batch[name] for name in ("tokens", "positions", "segments"))
        return jax.device_get(jax.jit(functools.partial(apply, model, execution=REFERENCE))(params, *arrays))

    weights = unstacked(scanned, params, jnp.float32)
    names = [f"{letter}{i}" for i, letter in enumerate(scanned.layers)]
    weights["periods"] = jax.tree.map(lambda x: x[None], dict(zip(names, weights.pop("layers"), strict=True)))
    assert_close(outputs(scanned, params), outputs(looped, weights), 2e-6)
    for cost in (flops.parameters, functools.partial(flops.cache_bytes, length=9)):
        assert cost(scanned) == cost(looped)
    assert flops.train_flops_per_token(scanned, 9) == flops.train_flops_per_token(looped, 9)


@functools.cache
def outputs_and_grads(execution):
    """Outputs of one model and a gradient of them, on one device; and what was traced."""
    model = tiny({"model.pattern": "L"}).model
    params, batch = random_params(model), on_mesh(BATCH)

    def value(params):
        x_BTD = apply(model, params, batch["tokens"], batch["positions"], batch["segments"], execution)
        return jnp.sin(x_BTD.astype(jnp.float32)).sum(), x_BTD

    traced = jax.jit(jax.grad(value, has_aux=True)).trace(params)
    grads, x_BTD = jax.device_get(traced.lower().compile()(params))
    return x_BTD, grads, str(traced.jaxpr)


@pytest.mark.parametrize("choice", ["layer", "attention", "offload"])
def test_remat_changes_neither_the_outputs_nor_a_gradient(choice, one_device):
    *plain, plain_jaxpr = outputs_and_grads(BLOCKED)
    *remat, remat_jaxpr = outputs_and_grads(BLOCKED._replace(remat=every(choice)))
    assert_close(remat, plain, 1e-6)
    assert "remat" in remat_jaxpr and "remat" not in plain_jaxpr
    assert ("<host>" in remat_jaxpr) == (choice == "offload")


@pytest.mark.parametrize("unroll", [2, 3])
def test_more_periods_in_an_iteration_of_the_loop_are_the_same_function(unroll, one_device):
    *plain, plain_jaxpr = outputs_and_grads(BLOCKED)
    *unrolled, jaxpr = outputs_and_grads(BLOCKED._replace(unroll=unroll))
    assert f"unroll={unroll}" in jaxpr and f"unroll={unroll}" not in plain_jaxpr
    assert_close(unrolled, plain, 1e-6)


@pytest.mark.parametrize("kernel, primitive, forward, backward", [("blocked", "while", 1, 1), ("splash", "pallas_call", 1, 2)])
def test_a_kind_whose_attention_is_kept_runs_no_attention_forward_in_its_backward_pass(kernel, primitive, forward, backward):
    model = dataclasses.replace(tiny().model, head_dim=128)
    mesh = abstract_mesh(fsdp=2, context=2, tensor=2)

    def calls(**remat):
        execution = BLOCKED._replace(kernel=kernel, mlp_chunk=None, remat=config.Table(every("none") | remat))

        def total(params, tokens_BT):
            return apply(model, params, tokens_BT, tokens_BT, tokens_BT, execution).sum()

        with jax.sharding.use_abstract_mesh(mesh):
            params = jax.eval_shape(lambda: init(model, jax.random.key(0)))
            tokens_BT = jax.ShapeDtypeStruct((2, 512), jnp.int32, sharding=NamedSharding(mesh, TOKENS_BT))
            return str(jax.make_jaxpr(jax.grad(total))(params, tokens_BT)).count(f"{primitive}[")

    once = 2 * (forward + backward)  # an L and a G
    assert calls() == calls(L="attention", G="attention") == calls(L="offload", G="attention") == once
    assert calls(L="layer", G="offload") == once + forward
    assert calls(L="layer", G="layer") == once + 2 * forward


@pytest.mark.parametrize("kernel", ["cudnn", "reference"])
def test_what_a_kernel_does_not_keep_is_refused(kernel):
    c = tiny({"train.kernel": kernel, "train.remat": "G=offload"})
    with pytest.raises(NotImplementedError, match='train.remat=offload keeps its outputs.*train.kernel="blocked" or "tokamax"'):
        execution_on("gpu", c.model, c.train)
    assert execution_on("gpu", c.model, tiny({"train.kernel": kernel}).train).remat == {"G": "layer", "L": "layer"}


def test_a_chunk_bounds_the_hidden_activations_of_the_feed_forward_backward_too(one_device):
    model = dataclasses.replace(tiny({"model.num_layers": 1, "model.pattern": "L"}).model, d_ff=512)
    params, batch = random_params(model), on_mesh(BATCH)
    arrays = (batch["tokens"], batch["positions"], batch["segments"])

    def biggest(mlp_chunk):
        def total(params):
            return apply(model, params, *arrays, BLOCKED._replace(mlp_chunk=mlp_chunk, remat=every("layer"))).sum()

        return biggest_array(jax.grad(total), params)

    tokens = BATCH["tokens"].size
    assert biggest(None) >= tokens * 512 and biggest(16) < tokens * 512 // 2


def test_bfloat16_activations_give_nearly_the_outputs_and_the_gradient_of_float32(one_device):
    x_BTD, grads, _ = outputs_and_grads(REFERENCE)
    half_BTD, half_grads, _ = outputs_and_grads(BLOCKED._replace(dtype=jnp.dtype("bfloat16")))
    assert half_BTD.dtype == jnp.bfloat16
    real = BATCH["segments"] > 0
    assert_close(half_BTD[real], x_BTD[real], 3e-2)
    for g, h in zip(jax.tree.leaves(grads), jax.tree.leaves(half_grads), strict=True):
        assert h.dtype == np.float32
        assert np.vdot(g, h) > 0.99 * np.linalg.norm(g) * np.linalg.norm(h)


def test_gradients_are_the_slopes_of_the_loss(one_device):
    model = everything("LG", window=5)
    params, batch, rng = jax.device_get(random_params(model)), on_mesh(BATCH), np.random.default_rng(7)
    sharding = jax.tree.map(lambda x: x.sharding, random_params(model))
    way = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

    def at(distance):
        moved = jax.tree.map(lambda x, d: (x + distance * d).astype(np.float32), params, way)
        return jax.device_get(loss_and_grads(model, REFERENCE, jax.device_put(moved, sharding), batch))

    slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(at(0.0)[1]), jax.tree.leaves(way), strict=True))
    assert (at(1e-3)[0] - at(-1e-3)[0]) / 2e-3 == pytest.approx(slope, rel=1e-2)


def test_initial_parameters_are_the_same_bits_on_every_mesh():
    model = tiny({"model.num_layers": 5, "model.tie_embeddings": False}).model

    @jax.jit
    def some_leaves():
        params = init(model, jax.random.key(5))
        layers = params["periods"]["L0"], params["periods"]["G1"], params["tail"]["L0"]
        return params["embed"], params["unembed"], *(layer["attention"]["q"] for layer in layers)

    drawn = []
    for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)):
        with jax.set_mesh(mesh_of(*sizes)):
            drawn.append(jax.device_get(some_leaves()))
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    embed, unembed, local, full, tail = drawn[0]
    assert embed.std() == pytest.approx(model.init_std, rel=0.05)
    draws = [embed[:32].ravel(), unembed[:32].ravel(), *(x.ravel() for x in (*local, *full, tail))]
    assert np.abs(np.corrcoef(draws) - np.eye(7)).max() < 0.2


def norm_by_hand(x, kind, weight, eps):
    x = np.asarray(x, np.float64)
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (weight + 1 if kind == "rms_plus1" else weight)


ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z * (1 + ERF(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
}


def mlp_by_hand(x, p, activation):
    x, p = np.asarray(x, np.float64), jax.tree.map(np.float64, p)
    return (ACTIVATIONS[activation](x @ p["gate"]) * (x @ p["up"])) @ p["down"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_its_formula(activation, one_device):
    model = tiny({"model.activation": activation, "model.init_std": 0.4}).model
    mlp = GatedMLP(model, model.kinds["L"], rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(8, 48, 32)).astype(np.float32)
    x_BTD, seg_BT = on_mesh({"x": x})["x"], on_mesh(BATCH)["segments"]
    wanted = mlp_by_hand(x, jax.device_get(nnx.to_pure_dict(nnx.state(mlp))), activation)
    for chunks in (None, Chunks(7, saves_products=True), Chunks(1000, saves_products=False)):
        assert_close(jax.device_get(mlp(x_BTD, seg_BT, chunks)[0]), wanted, 1e-6)


def test_the_backward_pass_of_a_chunk_computes_two_products_again_unless_they_are_saved(one_device):
    """Nine products are needed: three forward, and of each the gradients by both factors."""
    model, seg_BT = tiny().model, on_mesh(BATCH)["segments"]
    graph, state = nnx.split(GatedMLP(model, model.kinds["L"], rngs=nnx.Rngs(0)))
    x_BTD = on_mesh({"x": np.random.default_rng(0).normal(size=(8, 48, 32)).astype(np.float32)})["x"]

    def gradient(saved):
        def total(state, x_BTD):
            return jnp.sin(nnx.merge(graph, state)(x_BTD, seg_BT, Chunks(7, saved))[0]).sum()

        return jax.grad(total, (0, 1))

    products = [str(jax.make_jaxpr(gradient(saved))(state, x_BTD)).count("dot_general[") for saved in (True, False)]
    assert products == [9, 11]
    assert_close(*(jax.device_get(jax.jit(gradient(saved))(state, x_BTD)) for saved in (True, False)), 1e-6)


@pytest.mark.parametrize("norm_type", ["layernorm", "rms", "rms_plus1", "rms_weightless"])
@pytest.mark.parametrize("axes, number", [(("norm",), 1), (("heads", "head_dim"), 2), (("heads", "head_dim"), 1)])
def test_the_gradient_of_a_norm_is_that_of_its_definition(norm_type, axes, number, one_device):
    shape = (4, 8)[-len(axes) :]
    rng, norm = np.random.default_rng(0), Norm(norm_type, shape, axes, 1e-2, dims=number)
    sharding = P(None, None, *(MESH_AXES[axis] for axis in axes))
    x, dy = (jax.device_put(rng.normal(size=(2, 5, *shape)).astype(np.float32), sharding) for _ in range(2))
    graph, state = nnx.split(norm)
    state = jax.tree.map(lambda w: w + rng.normal(size=w.shape).astype(np.float32), state)

    def by_definition(state, x):
        dims = tuple(range(-number, 0))
        z = x - x.mean(dims, keepdims=True) if norm_type == "layernorm" else x
        z /= jnp.sqrt((z * z).mean(dims, keepdims=True) + 1e-2)
        weights = jax.tree.leaves(state)
        return z * (weights[0] + (norm_type == "rms_plus1")) if weights else z

    results, pulls = zip(*(jax.vjp(f, state, x) for f in (lambda s, x: nnx.merge(graph, s)(x), by_definition)), strict=True)
    assert_close(*results, 1e-6)
    assert_close(*(pull(dy) for pull in pulls), 1e-5)
    low = jax.vjp(lambda s, x: nnx.merge(graph, s)(x), state, x.astype(jnp.bfloat16))
    assert [g.dtype for g in jax.tree.leaves(low[1](low[0]))][-1] == jnp.bfloat16 == low[0].dtype


@pytest.mark.parametrize("kind", ["layernorm", "rms", "rms_plus1"])
def test_norms_are_their_formulas_computed_in_float32(kind, one_device):
    norm = Norm(kind, (32,), ("norm",), 1e-2)
    assert np.all(np.asarray(norm.weight[...]) == (0.0 if kind == "rms_plus1" else 1.0))
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=32), jnp.asarray(rng.normal(300.0, 1.0, size=(5, 32)), jnp.bfloat16)
    nnx.update(norm, {"weight": jnp.asarray(w, jnp.float32)})
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    assert_close(got, norm_by_hand(x, kind, w, 1e-2), 2**-8)


BLOCKS = {
    "parallel": lambda x, n, attend, mlp: x + attend(n("norm", x)) + mlp(n("norm", x)),
    "pre": lambda x, n, attend, mlp: (h := x + attend(n("attention_norm", x))) + mlp(n("mlp_norm", h)),
    "post": lambda x, n, attend, mlp: (h := x + n("attention_post_norm", attend(x))) + n("mlp_post_norm", mlp(h)),
    "sandwich": lambda x, n, attend, mlp: (
        (h := x + n("attention_post_norm", attend(n("attention_norm", x)))) + n("mlp_post_norm", mlp(n("mlp_norm", h)))
    ),
}
BLOCK_NORMS = {
    "parallel": {"norm"},
    "pre": {"attention_norm", "mlp_norm"},
    "post": {"attention_post_norm", "mlp_post_norm"},
    "sandwich": {"attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"},
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_layer_of_every_block_is_its_formula_with_embedding_scale_and_final_norm(block, one_device):
    changes = {"block": block, "norm": "rms_plus1", "embed_scale": 1.7, "num_layers": 1, "pattern": "L"}
    model = dataclasses.replace(tiny().model, **changes)
    params, batch = random_params(model), on_mesh(BATCH)
    assert {name for name in params["periods"]["L0"] if "norm" in name} == BLOCK_NORMS[block]
    tokens, pos, seg = (batch[name] for name in ("tokens", "positions", "segments"))
    got = jax.jit(functools.partial(apply, model, execution=REFERENCE))(params, tokens, pos, seg)

    layer = Block(model, "L", rngs=nnx.Rngs(0))
    mine = jax.tree.map(lambda x: x[0], params["periods"]["L0"])
    nnx.update(layer, mine)
    mine = jax.device_get(mine)
    attention = jax.jit(lambda x: layer.attention(x, pos, seg, packed_mixing(model, "L", pos, seg, REFERENCE).attend)[0])
    wanted = BLOCKS[block](
        1.7 * np.asarray(params["embed"])[BATCH["tokens"]],
        lambda name, x: norm_by_hand(x, "rms_plus1", mine[name]["weight"], model.norm_eps),
        lambda x: np.asarray(attention(on_mesh({"x": np.float32(x)})["x"])),
        lambda x: mlp_by_hand(x, mine["mlp"], "silu"),
    )
    wanted = norm_by_hand(wanted, "rms_plus1", np.asarray(params["final_norm"]["weight"]), model.norm_eps)
    assert_close(jax.device_get(got), wanted, 1e-5)


def test_an_untied_table_is_the_one_that_the_logits_come_from(one_device):
    tied, untied = (tiny({"model.pattern": "G", "model.tie_embeddings": tie}).model for tie in (True, False))
    params, batch = random_params(untied), on_mesh(BATCH)
    unembed = params.pop("unembed")
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(tied))
    assert unembedding(tied, params) is params["embed"]
    score = jax.jit(losses, static_argnums=(0, 3))
    nll, lse = jax.device_get(score(tied, params, batch, REFERENCE))
    nll_same, lse_same = jax.device_get(score(untied, params | {"unembed": params["embed"]}, batch, REFERENCE))
    np.testing.assert_array_equal((nll, lse), (nll_same, lse_same))
    nll_other, _ = jax.device_get(score(untied, params | {"unembed": unembed}, batch, REFERENCE))
    assert np.median(np.abs(nll_other - nll)) > 0.1


CONFIGS = Path(__file__).parents[1] / "configs"
DEVICES = {"small": 1, "150m": 8, "1b": 64, "8b": 64}
OTHERS = {"command_a": {"full": 1024, "tiny": 1}, "end_to_end": {"tiny": 1}}
OTHERS |= dict.fromkeys(("extend", "adapt"), {})  # they need a checkpoint


def training_configs():
    """A getter for each config that trains, and a number of devices."""
    for path in sorted(CONFIGS.glob("*.py")):
        if path.stem != "base":
            get_config = importlib.import_module(f"configs.{path.stem}").get_config
            has_argument = "size" in inspect.signature(get_config).parameters or path.stem in OTHERS
            for size, devices in OTHERS.get(path.stem, DEVICES if has_argument else {"small": 1}).items():
                getter = functools.partial(get_config, size) if has_argument else get_config
                # Sizes differ in numbers alone, and the slow tests train most configs.
                others = pytest.mark.exhaustive if size in ("small", "150m", "1b") and has_argument else pytest.mark.slow
                marks = () if size == "8b" else others
                yield pytest.param(getter, devices, id=f"{path.stem}:{size}", marks=marks)


def test_overlap_gives_options_to_the_compiler_for_tpus_alone():
    c = tiny()
    options = {platform: dict(execution_on(platform, c.model, c.train).compiler_options) for platform in ("tpu", "cpu")}
    assert options["tpu"]["xla_tpu_enable_async_collective_fusion"] == "true" and options["cpu"] == {}
    assert execution_on("tpu", c.model, tiny({"train.overlap": False}).train).compiler_options == ()


@pytest.mark.parametrize("get_config, devices", list(training_configs()))
def test_the_training_step_of_every_config_gives_back_the_state_as_it_took_it(get_config, devices):
    c = config.build(get_config())
    mesh = abstract_mesh(**dict(zip(AXES, axis_sizes(c.mesh, devices), strict=True)))
    fit.check(c, devices)
    rows, length = c.stages[0].batch, c.stages[0].seq_len

    def array(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    batch = {key: array(jnp.int32, TOKENS_BT, rows, length) for key in ("tokens", "targets", "positions", "segments")}
    batch |= {name: array(jnp.float32, TOKENS_BT, rows, length) for name in ("weights", "bytes")}
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(c))
        step = make_step(c.at(0), execution_on("tpu", c.model, c.train))
        after, metrics = jax.eval_shape(step, state, batch)

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, P() if x.sharding is None else x.sharding.spec), tree)

    assert described(state) == described(after)
    assert {(x.shape, x.dtype.name) for x in metrics.values()} == {((), "float32")}


def test_configs_refuse_a_size_that_they_do_not_have():
    with pytest.raises(ValueError, match="'9b'.*it has small, 150m, 1b, 8b"):
        importlib.import_module("configs.hybrid_8k").get_config("9b")
