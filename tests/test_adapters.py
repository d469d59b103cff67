"""An adapter is weights beside the matrices of a model: it starts as nothing, trains alone, and can be merged."""

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
    loss_and_grads,
    mesh_of,
    on_mesh,
    optimised,
    random_params,
    tiny,
)
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from test_seams import check_answers

from hybrid_attn import config
from hybrid_attn.config import NO_ADAPTER
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.model import abstract_params, flops, init, specs, transforms
from hybrid_attn.model.params import linear
from hybrid_attn.model.transforms.transform import SETTINGS
from hybrid_attn.train import trainable
from hybrid_attn.train.objectives import objective_of
from hybrid_attn.train.optim import OPTIMISERS
from hybrid_attn.train.step import init_state, loss_and_gradient, make_step

WITH_BYTES = BATCH | {"bytes": np.ones_like(BATCH["weights"])}
TYPE = "model.adapter.type"
LORA = {TYPE: "lora", "model.adapter.rank": 3, "model.adapter.alpha": 12.0}
EVERYWHERE = {"model.adapter.targets": ("*/attention/*", "*/mlp/*")}
SIZES = {"model.num_layers": 3, "model.num_heads": 4, "model.num_kv_heads": 2}


# Of all types: ia3 and molora hold in part what mov does.
MARKS = dict.fromkeys(transforms.TRANSFORMS, pytest.mark.slow) | {"mov": pytest.mark.exhaustive}
TYPES = [pytest.param(x, marks=mark) for x, mark in MARKS.items()]


def config_of(changes=None):
    """Without the settings that the type of the adapter does not read."""
    values = SIZES | LORA | EVERYWHERE | (changes or {})
    read = transforms.TRANSFORMS[values[TYPE]].reads if values[TYPE] in transforms.TRANSFORMS else ()
    unread = {f"model.adapter.{name}" for name in SETTINGS if name not in read}
    return tiny({key: x for key, x in values.items() if key not in unread}, G={"gate": "head"})


def merged(model: config.Model, params: dict) -> dict:
    """Parameters of the model without an adapter that compute the same function."""
    flat, of = flatten_dict(params, sep="/"), flatten_dict(specs(model), sep="/")
    one = transforms.transform_of(model.adapter).merged
    weights = {name: np.asarray(x) for name, x in flat.items() if not transforms.is_added(name)}
    for name in {name.rpartition("/")[0] for name in flat if transforms.is_added(name)}:
        base = name.removesuffix(transforms.SUFFIX)
        added = {x.removeprefix(f"{name}/"): np.asarray(y) for x, y in flat.items() if x.startswith(f"{name}/")}
        if base.startswith("periods"):
            periods = [
                one(model.adapter, of[base], weight, {key: x[i] for key, x in added.items()})
                for i, weight in enumerate(weights[base])
            ]
            weights[base] = np.stack(periods)
        else:
            weights[base] = one(model.adapter, of[base], weights[base], added)
    sharded = {name: jax.device_put(x, flat[name].sharding) for name, x in weights.items()}
    return unflatten_dict(sharded, sep="/")


def without(c: config.Config) -> config.Config:
    return dataclasses.replace(c, model=dataclasses.replace(c.model, adapter=NO_ADAPTER))


@pytest.mark.parametrize("type", TYPES)
def test_an_adapter_starts_as_nothing_and_the_model_beside_it_as_without_one(type, one_device):
    c = config_of({"model.adapter.type": type, "model.adapter.experts": 2, "model.num_layers": 2})
    params, plain = (init(x.model, jax.random.key(1)) for x in (c, without(c)))
    names, of_plain = flatten_dict(params, sep="/"), flatten_dict(plain, sep="/")
    assert {name for name in names if not transforms.is_added(name)} == of_plain.keys()
    for name, x in of_plain.items():
        np.testing.assert_array_equal(x, names[name])
    batch = on_mesh(BATCH)
    loss, grads = loss_and_grads(c.model, BLOCKED, params, batch)
    assert loss == pytest.approx(float(loss_and_grads(without(c).model, REFERENCE, plain, batch)[0]), rel=1e-6)
    for name, grad in flatten_dict(grads, sep="/").items():
        if transforms.is_added(name):  # others have one as soon as B is not zero, or as vectors differ
            assert bool(jnp.abs(grad).max() > 1e-7) == name.endswith(("/b", "/scale", "/scales")), name


@pytest.mark.parametrize("type", ["lora", pytest.param("ia3", marks=pytest.mark.slow)])
def test_every_matrix_of_a_layer_can_have_an_adapter_and_the_merged_model_is_the_same(type, one_device):
    c = config_of({"model.adapter.type": type})
    params, batch = random_params(c.model), on_mesh(BATCH)
    groups = {name.rpartition("/")[0] for name in flatten_dict(params, sep="/") if transforms.is_added(name)}
    assert len(groups) == 7 + 8 + 7  # L0 and G1 of the period, which has a gate, and the layer after them
    loss, grads = jax.device_get(loss_and_grads(c.model, BLOCKED, params, batch))
    expected, dense = jax.device_get(loss_and_grads(without(c).model, REFERENCE, merged(c.model, params), batch))
    assert loss == pytest.approx(float(expected), rel=1e-5)
    leaves, of_merged = (x["periods"]["L0"]["attention"] for x in (grads, dense))
    if type == "ia3":
        q, o = (params["periods"]["L0"]["attention"][name] for name in "qo")
        assert_close(leaves["q_adapter"]["scale"], (of_merged["q"] * q).sum(1), 1e-4)
        assert_close(leaves["o_adapter"]["scale"], (of_merged["o"] * o).sum(-1), 1e-4)
        return
    b = params["periods"]["L0"]["attention"]["o_adapter"]["b"]
    scale = c.model.adapter.alpha / c.model.adapter.rank
    assert_close(leaves["o_adapter"]["a"], scale * np.einsum("pnhd,prd->pnhr", of_merged["o"], b), 1e-4)


@pytest.mark.parametrize("type", TYPES)
def test_a_step_on_eight_devices_is_that_on_one(type):
    some = {"model.num_layers": 2, "model.adapter.targets": ("*/L0/attention/[kvo]", "*/G1/mlp/*"), "model.adapter.experts": 2}
    c = config_of(some | {"optim.lr": 0.01, "optim.warmup_steps": 0, "model.adapter.type": type})
    results = []
    for mesh in (mesh_of(), mesh_of(fsdp=2, context=2, tensor=2)):
        with jax.set_mesh(mesh):
            state = jax.jit(init_state, static_argnums=0)(c, random_params(c.model))
            state, metrics = make_step(c.at(0), BLOCKED)(state, on_mesh(WITH_BYTES))
            results.append(jax.device_get((metrics["loss"], metrics["grad_norm"], state.params)))
    assert_close(results[1], results[0], 1e-4)


def test_only_the_adapter_trains_unless_a_stage_says_otherwise(one_device):
    c = config_of({"optim.lr": 0.1, "optim.warmup_steps": 0, "optim.schedule": "constant"})
    state = jax.jit(init_state, static_argnums=0)(c, random_params(c.model))
    gradient = functools.partial(loss_and_gradient, c.at(0), BLOCKED, objective_of(c.at(0)))
    _, grads = jax.eval_shape(gradient, state, on_mesh(WITH_BYTES))
    is_none = jax.tree.map(lambda x: x is None, grads, is_leaf=lambda x: x is None)
    assert all(x != transforms.is_added(name) for name, x in flatten_dict(is_none, sep="/").items())
    before = jax.device_get(state)
    after, metrics = make_step(c.at(0), BLOCKED._replace(statistics=True))(state, on_mesh(WITH_BYTES))
    assert metrics["statistics"]["update_norm/L/attention/q_adapter/b"] > 0
    for name, x in flatten_dict(jax.device_get(after.params), sep="/").items():
        same = np.array_equal(x, flatten_dict(before.params, sep="/")[name])
        assert same != transforms.is_added(name), name
    stage = dataclasses.replace(c.stages[0], trainable=("final_norm",))
    other = dataclasses.replace(c, stages=(stage,)).at(0)
    trained = flatten_dict(trainable.is_trained(other, specs(c.model)), sep="/")
    assert [name for name, yes in trained.items() if yes] == ["final_norm/weight"]


@pytest.mark.slow
def test_a_step_computes_no_gradient_of_the_base_and_copies_none_of_it(one_device):
    wide = {"model.d_model": 64, "model.d_ff": 512, "model.adapter.targets": ("*/q",), "model.num_layers": 2}
    flops_of, batch = [], on_mesh(WITH_BYTES)
    for names in ((), ("*",)):
        c = config_of(wide)
        c = dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], trainable=names),))
        state = jax.jit(init_state, static_argnums=0)(c)
        compiled = optimised(make_step(c.at(0), REFERENCE).lower(state, batch))
        flops_of.append(compiled.cost_analysis()["flops"])
        assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))
    assert flops_of[0] < 0.8 * flops_of[1]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_only_what_a_stage_trains_has_optimiser_state(optimiser, one_device):
    c = config_of({"optim.optimiser": optimiser})
    state = jax.eval_shape(lambda: init_state(c))
    added = sum(x.size for name, x in flatten_dict(state.params, sep="/").items() if transforms.is_added(name))
    moments = {"adamw": 2, "muon": 1, "lion": 1, "adafactor": 1}[optimiser]  # of muon: of its matrices
    arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    if optimiser == "adafactor":  # also one number in place of each sum that it does not keep
        arrays = [x for x in arrays if x.size > 1]
    assert sum(x.size * x.dtype.itemsize for x in arrays) == 4 * moments * added
    stage = dataclasses.replace(c.stages[0], trainable=("final_norm",))
    both = dataclasses.replace(c, stages=(c.stages[0], dataclasses.replace(stage, name="norm")))
    more = jax.eval_shape(lambda: init_state(both))
    sizes = [sum(x.size for x in jax.tree.leaves(of.opt_state)) for of in (state, more)]
    assert sizes[1] - sizes[0] >= 32


def test_flops_and_parameters_count_the_adapter(one_device):
    c = config_of({"model.adapter.targets": ("periods/L0/attention/q",)})
    added = 3 * (32 + 4 * 8)
    assert flops.parameters(c.model) - flops.parameters(without(c).model) == added
    counts = [flops.forward_flops_per_token(x.model, 16) for x in (c, without(c))]
    assert counts[0] - counts[1] == 2 * added


@pytest.mark.parametrize("type", TYPES)
def test_decoding_takes_the_adapter(type, one_device):
    targets = {"model.adapter.targets": ("*/q", "*/o", "*/down")}
    c = config_of(targets | {"model.adapter.type": type, "model.adapter.experts": 2})
    params = random_params(c.model)
    check_answers(Engine(params, c, EngineOptions(chunk=16), execution=REFERENCE), params, REFERENCE)


PAIRS = {  # of a mixture of one, and the leaves that the adapter without a mixture has in its place
    "mov": ("ia3", {"scale": lambda added: np.squeeze(added["scales"], -2)}),
    "molora": ("lora", {"a": lambda added: np.squeeze(added["a"], -2), "b": lambda added: np.squeeze(added["b"], 1)}),
}


@pytest.mark.parametrize(
    "type", [pytest.param("molora", marks=pytest.mark.slow), pytest.param("mov", marks=pytest.mark.exhaustive)]
)
def test_a_mixture_of_one_is_the_adapter_without_a_mixture(type, one_device):
    c, (other, leaves) = config_of({"model.adapter.type": type, "model.adapter.experts": 1, "model.num_layers": 2}), PAIRS[type]
    params = random_params(c.model)
    groups, plain = {}, {}
    for name, x in flatten_dict(params, sep="/").items():
        if transforms.is_added(name):
            groups.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = np.asarray(x)
        else:
            plain[name] = x
    plain |= {f"{group}/{leaf}": of(added) for group, added in groups.items() for leaf, of in leaves.items()}
    alone = dataclasses.replace(c.model, adapter=dataclasses.replace(c.model.adapter, type=other, experts=NO_ADAPTER.experts))
    batch = on_mesh(BATCH)
    shapes = jax.tree.map(lambda x: x.shape, abstract_params(alone))
    assert shapes == jax.tree.map(np.shape, unflatten_dict(plain, sep="/"))
    loss, grads = jax.device_get(loss_and_grads(c.model, REFERENCE, params, batch))
    plain = jax.tree.map(jnp.asarray, unflatten_dict(plain, sep="/"))
    expected, expected_grads = jax.device_get(loss_and_grads(alone, REFERENCE, plain, batch))
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_close(grads["embed"], expected_grads["embed"], 1e-5)


@pytest.mark.parametrize("type", ["mov", "molora"])
def test_a_mixture_is_that_of_its_products_one_by_one(type, one_device):
    """Of one matrix [D, K, H], token by token: the gates of a softmax times what each part computes alone."""
    adapter = dataclasses.replace(NO_ADAPTER, type=type, rank=2, alpha=6.0, experts=3)
    rng, D, K, H = np.random.default_rng(0), 6, 2, 4
    x_BTD, w = rng.normal(size=(1, 5, D)).astype(np.float32), rng.normal(size=(D, K, H)).astype(np.float32)
    matrix = linear(nnx.Rngs(0), (D, K, H), ("embed", "heads", "head_dim"), 1.0)
    matrix[...] = w
    transform = transforms.transform_of(adapter)
    shapes = {name: y.shape for name, y in transform.weights(adapter, matrix.spec, nnx.Rngs(1)).items()}
    added = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    expected = np.einsum("btd,dkh->btkh", x_BTD, w)
    if type == "mov":
        p = np.asarray(jax.nn.softmax(expected @ added["router"], -1))
        expected = sum(p[..., e, None] * expected * added["scales"][:, e] for e in range(3))
    else:
        p = np.asarray(jax.nn.softmax(x_BTD @ added["router"], -1))
        for e in range(3):
            expected = expected + 3 * p[..., e, None, None] * np.einsum(
                "btd,dr,rkh->btkh", x_BTD, added["a"][:, e], added["b"][e]
            )
    got = transform.product(adapter, matrix, jax.tree.map(jnp.asarray, added), jnp.asarray(x_BTD), None)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.adapter.type": "lor"}, "^model.adapter.type='lor' is not one of 'lora', 'ia3'.*; did you mean 'lora'"),
        (
            {"model.adapter.targets": ("*/q", "periods/L0/atention/v")},
            "^model.adapter.targets names 'periods/L0/atention/v', and this model, among the matrices that can have an "
            "adapter, has no such parameter; did you mean 'periods/L0/attention/v'",
        ),
        ({"model.adapter.targets": ("embed",)}, "targets names 'embed', and this model, among the matrices"),
        ({"model.adapter.targets": ("*/norm/weight",)}, r"targets names '\*/norm/weight', and this model, among the matrices"),
        ({"model.adapter.targets": ()}, "^adapter.targets is empty; name the matrices"),
        ({"optim.ema_half_life": 0.5}, "ema_half_life=0.5 averages all parameters, .*; leave it at None"),
        (
            {
                "stages": [
                    {
                        "steps": 1,
                        "seq_len": 48,
                        "batch": 8,
                        "microbatches": 1,
                        "mixture": {},
                        "override": {"train": {"mlp_chunk": 9}},
                    }
                ]
            },
            "^train.mlp_chunk=9 and model.adapter.type='lora': .*; leave train.mlp_chunk at None",
        ),
        ({"train.mlp_chunk": 7}, "^train.mlp_chunk=7 and model.adapter.type='lora': .*; leave train.mlp_chunk at None"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        specs(config_of(changes).model)
    assert "\n" not in str(caught.value)


def test_a_setting_that_the_type_does_not_read_is_refused():
    with pytest.raises(ValueError, match="^model.adapter.rank=4, and the type 'mov' does not read it; leave it at 8"):
        specs(tiny({TYPE: "mov", "model.adapter.rank": 4}).model)


def test_experts_and_routers_take_no_adapter():
    moe = {"mlp.type": "moe", "mlp.shared_experts": 1}
    c = tiny(LORA | {"model.adapter.targets": ("*/mlp/*",)}, L=moe, G=moe)
    added = {name for name in flatten_dict(specs(c.model), sep="/") if transforms.is_added(name)}
    matrices = {name.rpartition("/")[0] for name in added}
    assert matrices == {f"periods/{x}/mlp/shared/{y}_adapter" for x in ("L0", "G1") for y in ("gate", "up", "down")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimiser", ["adamw", "muon", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("lion", "adafactor"))]
)
def test_every_optimiser_takes_a_mixture_of_adapters(optimiser, one_device):
    mixture = {"model.adapter.type": "molora", "model.adapter.experts": 2, "optim.optimiser": optimiser}
    c = config_of(mixture)
    state = jax.eval_shape(lambda: init_state(c))
    after, _ = jax.eval_shape(make_step(c.at(0), BLOCKED), state, on_mesh(WITH_BYTES))
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
