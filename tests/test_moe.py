"""The mixture of experts is a loop over dense feed-forwards, on every mesh, in training and decoding, and drops no token."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BATCH,
    BLOCKED,
    REFERENCE,
    assert_close,
    batch_of,
    biggest_array,
    mesh_of,
    on_mesh,
    random_params,
    tensorboard_events,
    tiny,
)
from flax import nnx
from trained import config_of

from configs import base
from hybrid_attn import config
from hybrid_attn.convert import families
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.model import flops, losses, moe, specs
from hybrid_attn.model.execution import Chunks
from hybrid_attn.model.grouped import blocks_of, rows_of_block
from hybrid_attn.model.parametrisation import with_multipliers
from hybrid_attn.model.transformer import losses_and_aux
from hybrid_attn.parallel import fit
from hybrid_attn.train import loop, muon

D = 32
ZIGZAG = BLOCKED._replace(kernel="reference", zigzag=True)
SHARED = {"shared_experts": 2, "shared_combine": "average", "shared_gate": True}
CASES = {
    "Mixtral": {"experts": 5},
    "Switch": {"experts": 5, "top_k": 1, "renormalise": False},
    "all": {"experts": 3, "top_k": 3, "shared_experts": 1},
    "DeepSeek": {"experts": 7, "top_k": 3, "router": "sigmoid", "route_scale": 2.5, "shared_experts": 2, "bias_rate": 0.01},
    "gpt-oss": {"experts": 5, "biases": True, "swiglu_limit": 0.6},
    "Qwen": {"experts": 7, "top_k": 4, "router": "sigmoid", "renormalise": False} | SHARED,
}


def with_experts() -> config.Config:
    """A local layer with experts, and a global one with others."""
    local = {f"mlp.{name}": x for name, x in ({"type": "moe", "d_ff": 24} | CASES["DeepSeek"]).items()}
    return tiny(L={"window": 5, "rope_theta": 100.0} | local, G={"mlp.type": "moe", "mlp.experts": 6, "qk_norm": "rms"})


def layer_of(kernel="blocked", **settings):
    """(settings, graph, state) of a layer with experts, whose weights are large enough that experts differ."""
    fields = {f"mlp.{name}": x for name, x in ({"type": "moe", "d_ff": 24} | settings).items()}
    model = tiny({"model.init_std": 0.4}, L=fields).model
    layer = moe.MoE(model, model.kinds["L"], rngs=nnx.Rngs(0))
    layer.kernel = kernel
    if hasattr(layer, "bias"):
        layer.bias[...] = jnp.asarray(np.random.default_rng(2).normal(size=settings["experts"]), jnp.float32)
    for i, name in enumerate(("router_bias", "gate_bias", "up_bias", "down_bias")):
        if hasattr(layer, name):
            weight = getattr(layer, name)
            weight[...] = jnp.asarray(np.random.default_rng(3 + i).normal(size=weight.shape), jnp.float32)
    return model.kinds["L"].mlp, *nnx.split(layer)


def inputs():
    """Activations [8, 48, D], and segments with padding."""
    x_BTD = np.random.default_rng(0).normal(size=(8, 48, D)).astype(np.float32)
    return on_mesh({"x": x_BTD})["x"], on_mesh(BATCH)["segments"]


def gated(x, p, limit):
    gate, up = x @ p["gate"] + p.get("gate_bias", 0), x @ p["up"] + p.get("up_bias", 0)
    hidden = jax.nn.silu(gate) * up
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.maximum(jnp.minimum(up, limit), -limit)
        hidden = gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)
    return hidden @ p["down"] + p.get("down_bias", 0)


def dense(settings: config.MLP, p: dict, x_BTD: jax.Array) -> jax.Array:
    """Every expert for every token, times a gate that is zero where the expert is not chosen."""
    logits, limit = x_BTD @ p["router"] + p.get("router_bias", 0), settings.swiglu_limit
    scores = jax.nn.softmax(logits) if settings.router == "softmax" else 1 / (1 + jnp.exp(-logits))
    place = jnp.argsort(jnp.argsort(-scores - p.get("bias", 0), stable=True), stable=True)
    gates = jnp.where(place < settings.top_k, scores, 0.0)
    gates = settings.route_scale * (gates / gates.sum(-1, keepdims=True) if settings.renormalise else gates)
    names = [name for name in p if name.split("_")[0] in ("gate", "up", "down")]
    experts = [{name: p[name][e] for name in names} for e in range(settings.experts)]
    y = sum(gates[..., e, None] * gated(x_BTD, expert, limit) for e, expert in enumerate(experts))
    if settings.shared_experts:
        y += gated(x_BTD, p["shared"], limit) * (jax.nn.sigmoid(x_BTD @ p["shared_gate"]) if settings.shared_gate else 1)
    return y / 2 if settings.shared_combine == "average" else y


def check_dense_loop(case, kernel):
    """A layer and all its gradients are those of `dense`."""
    settings, graph, state = layer_of(kernel, **CASES[case])
    x_BTD, seg_BT = inputs()
    real_BT = seg_BT > 0

    def ours(state, x_BTD):
        y_BTD, _ = nnx.merge(graph, state)(x_BTD, seg_BT, Chunks(7, saves_products=True))
        return jnp.sin(y_BTD * real_BT[..., None]).sum(), y_BTD

    def reference(state, x_BTD):
        y_BTD = dense(settings, nnx.to_pure_dict(state), x_BTD)
        return jnp.sin(y_BTD * real_BT[..., None]).sum(), y_BTD

    gradients = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    (_, y_BTD), grads = jax.device_get(jax.jit(gradients(ours))(state, x_BTD))
    (_, expected_BTD), expected = jax.device_get(jax.jit(gradients(reference))(*jax.device_get((state, x_BTD))))
    is_real_BT = np.asarray(seg_BT) > 0
    assert_close(y_BTD[is_real_BT], expected_BTD[is_real_BT], 1e-5)
    assert_close(grads, expected, 1e-5)


# What DeepSeek and gpt-oss hold in part.
MARKS = dict.fromkeys(("Qwen", "all"), pytest.mark.slow) | dict.fromkeys(("Mixtral", "Switch"), pytest.mark.exhaustive)
ALL_CASES = [pytest.param(x, marks=MARKS.get(x, ())) for x in CASES]


@pytest.mark.parametrize("case", ALL_CASES)
def test_a_layer_and_its_gradients_are_those_of_a_dense_loop_over_experts(case, one_device):
    check_dense_loop(case, "blocked")


def test_of_equal_scores_the_first_experts_win_and_experts_without_tokens_get_no_gradient(one_device):
    settings, graph, state = layer_of(experts=5, top_k=2)
    x_BTD, seg_BT = inputs()
    state["router"] = state["router"].replace(jnp.zeros_like(state["router"][...]))

    def total(state):
        y_BTD, aux = nnx.merge(graph, state)(x_BTD, seg_BT, None)
        return jnp.sin(y_BTD).sum(), (y_BTD, aux)

    grads, (y_BTD, aux) = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(state))
    real_BT = np.asarray(seg_BT) > 0
    assert_close(y_BTD[real_BT], dense(settings, jax.device_get(nnx.to_pure_dict(state)), np.asarray(x_BTD))[real_BT], 1e-5)
    for name in ("gate", "up", "down"):
        assert np.all(grads[name][...][2:] == 0) and np.all(np.abs(grads[name][...][:2]).max((1, 2)) > 0)
    assert aux["expert_load"] == 5 / 2 and aux["router_entropy_bits"] == pytest.approx(math.log2(5))


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_grads(model, execution, params, batch):
    """((loss with that of the routers, their scalars), gradients)."""

    def loss(params):
        nll_BT, _, aux = losses_and_aux(model, params, batch, execution)
        return (batch["weights"] * nll_BT).sum() / batch["weights"].sum() + aux["aux_loss"], aux

    return jax.value_and_grad(loss, has_aux=True)(params)


def results_on(sizes, model, execution):
    """Loss, metrics and gradients of a batch on a mesh."""
    with jax.set_mesh(mesh_of(**sizes)):
        return jax.device_get(loss_and_grads(model, execution, random_params(model), on_mesh(BATCH)))


@pytest.fixture(scope="module")
def on_one_device():
    return results_on({}, with_experts().model, REFERENCE)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "context": 2}, marks=pytest.mark.exhaustive),
        pytest.param({"slices": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_every_mesh_computes_the_loss_the_metrics_and_the_gradients_of_one_device(sizes, on_one_device):
    assert_close(results_on(sizes, with_experts().model, ZIGZAG), on_one_device, 1e-5)


@pytest.mark.slow
def test_another_product_is_used_with_the_matrices_of_experts(one_device, on_one_device):
    c, shapes = with_experts(), set()

    def dot(x, weight, *args, **options):
        shapes.add(weight.shape)
        return jax.lax.dot_general(x, weight, *args, **options)

    got = loss_and_grads(c.model, REFERENCE._replace(dot=dot), random_params(c.model), on_mesh(BATCH))
    assert_close(jax.device_get(got), on_one_device, 1e-5)
    assert {(D, 7), (D, 24), (24, D), (D, 48), (48, D), (D, 6)} <= shapes


@pytest.mark.slow
def test_padding_is_routed_nowhere_and_changes_nothing(one_device, on_one_device):
    c = with_experts()
    tokens = np.where(BATCH["segments"] == 0, (BATCH["tokens"] + 77) % 384, BATCH["tokens"])
    got = jax.device_get(loss_and_grads(c.model, REFERENCE, random_params(c.model), on_mesh(BATCH | {"tokens": tokens})))
    assert_close(got, on_one_device, 1e-6)
    _, graph, state = layer_of(experts=5)
    x_BTD, seg_BT = inputs()
    y_BTD, _ = jax.jit(lambda *arrays: nnx.merge(graph, state)(*arrays, None))(x_BTD, seg_BT)
    is_zero_BT = np.all(np.asarray(y_BTD) == 0, axis=-1)
    np.testing.assert_array_equal(is_zero_BT, np.asarray(seg_BT) == 0)


@pytest.mark.parametrize(
    "tokens, k, experts",
    [(1, 2, 64), (40, 3, 5), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((3, 2, 64), (640, 8, 32)))],
)
def test_blocks_hold_every_copy_of_every_real_token_once(tokens, k, experts):
    rng = np.random.default_rng(0)
    expert_nk = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])
    real_n = np.arange(tokens) % 7 != 3
    rows = rows_of_block(tokens, -(-tokens * k // experts))
    blocks = jax.device_get(blocks_of(jnp.where(real_n[:, None], expert_nk, experts), experts, rows))
    load_E = np.bincount(expert_nk[real_n].ravel(), minlength=experts)
    np.testing.assert_array_equal(blocks.load_E, load_E)
    first_E, end_E = blocks.span_E2.T
    np.testing.assert_array_equal(end_E - first_E, -(-load_E // rows))
    assert first_E[0] == 0 and np.all(first_E[1:] == end_E[:-1]) and end_E[-1] <= len(blocks.token_Ir)
    assert set(blocks.expert_E[: blocks.used]) == set(np.flatnonzero(load_E))
    token_R, expert_R = blocks.token_Ir.ravel(), np.repeat(np.arange(experts), (end_E - first_E) * rows)
    for n, of_token in enumerate(expert_nk):
        if real_n[n]:
            np.testing.assert_array_equal(token_R[blocks.row_nk[n]], n)
            np.testing.assert_array_equal(expert_R[blocks.row_nk[n]], of_token)
    assert (token_R < tokens).sum() == load_E.sum()


@pytest.mark.slow
def test_one_token_reads_the_matrices_of_its_own_experts_alone(one_device):
    settings, graph, state = layer_of(experts=64, top_k=2)
    x_BTD, seg_BT = (x[:1, :1] for x in inputs())
    chosen = np.argsort(-np.asarray(x_BTD[0, 0] @ state["router"][...]))[:2]
    y_BTD, _ = nnx.merge(graph, state)(x_BTD, seg_BT, None)
    is_other_E11 = ~np.isin(np.arange(64), chosen)[:, None, None]
    for name in ("gate", "up", "down"):
        state[name] = state[name].replace(jnp.where(is_other_E11, jnp.nan, state[name][...]))
    np.testing.assert_array_equal(nnx.merge(graph, state)(x_BTD, seg_BT, None)[0], y_BTD)
    blocks = blocks_of(jnp.asarray([chosen]), 64, 1)
    assert blocks.used == len(blocks.token_Ir) == settings.top_k


def test_no_array_has_the_hidden_activations_of_all_tokens(one_device):
    _, graph, state = layer_of(experts=4, d_ff=512)
    x_BTD, seg_BT = inputs()

    def total(state, x_BTD):
        return nnx.merge(graph, state)(x_BTD, seg_BT, None)[0].sum()

    assert biggest_array(jax.grad(total, (0, 1)), state, x_BTD) < seg_BT.size * 512 // 2


def test_losses_of_the_router_are_their_closed_forms(one_device):
    c = with_experts()
    settings, seg_BT = c.model.kinds["L"].mlp, on_mesh(BATCH)["segments"]
    logits_BTE = np.random.default_rng(1).normal(size=(8, 48, 7)).astype(np.float32)
    real, k = np.asarray(seg_BT) > 0, settings.top_k
    load_E = np.bincount(np.argsort(-logits_BTE[real])[:, :k].ravel(), minlength=7)
    got = moe.scalars(settings, on_mesh({"x": logits_BTE})["x"], seg_BT > 0, jnp.asarray(load_E))
    scores = 1 / (1 + np.exp(-logits_BTE[real]))
    probabilities = scores / scores.sum(-1, keepdims=True)
    balance = 7 * (load_E / load_E.sum() * probabilities.mean(0)).sum()
    z = np.square(np.log(np.exp(logits_BTE[real]).sum(-1))).mean()
    assert got["aux_loss"] == pytest.approx(0.01 * balance + 0.001 * z, rel=1e-5)
    assert got["router_z"] == pytest.approx(z, rel=1e-5)
    assert got["expert_load"] == pytest.approx(load_E.max() / load_E.mean()) and got["dropped_copies"] == 0
    assert moe.scalars(settings, on_mesh({"x": logits_BTE})["x"], seg_BT > 0, jnp.asarray(load_E - 1))["dropped_copies"] == 7
    for share_E, expected in ((jnp.full(7, 1 / 7), 1), (jnp.eye(7)[0], 7)):
        assert moe.balance_loss(share_E, share_E) == pytest.approx(expected)


@pytest.mark.slow
def test_decoding_computes_the_forward_pass(one_device):
    c = with_experts()
    params, prompts = random_params(c.model), [[5, 6, 7], list(range(40, 61))]
    score = jax.jit(losses, static_argnums=(0, 3))
    answers = Engine(params, c, EngineOptions(chunk=16), execution=BLOCKED).generate(prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        batch = batch_of("a" * (len(prompt) + len(answer.tokens)) + "." * 9)
        batch["tokens"][0, :-9] = [*prompt, *answer.tokens]
        batch["targets"] = np.roll(batch["tokens"], -1)
        nll_BT = np.asarray(score(c.model, params, on_mesh(batch), REFERENCE)[0])
        np.testing.assert_allclose(answer.logprobs, -nll_BT[0, len(prompt) - 1 : -10], atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("known_peak_and_no_pictures")
def test_a_run_lowers_its_loss_and_records_what_the_routers_do(corpus, tmp_path, capsys):
    mlp = {"model.kinds.L.mlp": base.moe(experts=4, d_ff=16)}
    mlp |= {"model.kinds.L.mixer": "attention_experts", "model.kinds.L.attention_experts": 2}
    changes = {"train.statistics_every": 1, "evals.names": (), "optim.lr": 1e-2, "model.mup_base_width": 16}
    assert loop.train(config_of(corpus, **mlp, **changes), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    for line in lines:
        assert 1 <= line["expert_load"] <= 2 and 0 < line["router_entropy_bits"] <= 2
        assert line["dropped_copies"] == 0 and 0 < line["gate_entropy_bits"] <= 1
    measured = [json.loads(line) for line in (tmp_path / "statistics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["expert_load"] for line in lines}
    assert all(record["expert_load/L"] == pytest.approx(by_step[record["step"]]) for record in measured) and measured
    for record in measured:
        shares = [record[f"expert_shares/L/layer0/expert{e}"] for e in range(4)]
        assert sum(shares) == pytest.approx(1) and max(shares) * 4 == pytest.approx(record["expert_load/L/layer0"])
        assert sum(record[f"gate_shares/L/layer0/expert{e}"] for e in range(2)) == pytest.approx(1)
    tags = {value.tag for event in tensorboard_events(tmp_path) for value in event.summary.value}
    assert {"experts/gate_entropy_bits", "experts/load_max_over_mean", "L/expert_shares/layer0/expert3"} <= tags
    shown = capsys.readouterr().out
    assert "of which a token uses" in shown
    assert f"experts      largest load {lines[-1]['expert_load']:.2f} x mean, entropy of routers" in shown


def test_a_config_costs_the_parameters_and_flops_of_the_experts_that_a_token_uses():
    c = with_experts()
    expert = {letter: 3 * D * width for letter, width in (("L", 24), ("G", 48))}
    unused = 4 * expert["L"] + 4 * expert["G"]
    assert flops.parameters(c.model) - flops.active_parameters(c.model) == unused
    assert flops.active_parameters(tiny().model) == flops.parameters(tiny().model)
    both = [flops.forward_flops_per_token(config.build_model(config.to_dict(m)), 48) for m in (c.model, tiny().model)]
    experts = 3 * expert["L"] + 2 * expert["L"] + 7 * D + 2 * expert["G"] + 6 * D  # chosen, shared and routers
    assert both[0] - both[1] == pytest.approx(2 * (experts - 2 * 3 * D * 48))


def test_rates_initial_values_and_orthogonal_updates_are_those_of_each_expert(one_device):
    c = tiny({"model.mup_base_width": 8, "model.mup_base_depth": 1, "model.block": "pre"}, L={"mlp.type": "moe"})
    leaves = specs(c.model)["periods"]["L0"]["mlp"]
    assert [leaves[name].width for name in ("router", "gate", "up", "down")] == [4] * 4
    assert [leaves[name].depth for name in ("router", "gate", "up", "down")] == [1, 1, 1, 2]
    assert not leaves["router"].cast and leaves["gate"].cast
    spec = leaves["down"]
    assert spec == with_multipliers(c.model, spec.__class__(spec.shape, spec.axes, spec.group, c.model.init_std, 1, 2))
    x_EFD = jnp.asarray(np.random.default_rng(0).normal(size=spec.shape), jnp.float32)
    one = spec.__class__(spec.shape[1:], spec.axes[1:], spec.group, spec.std, 1)
    expected = jnp.stack([muon.orthogonalise(one, x_FD) for x_FD in x_EFD])
    assert_close(muon.orthogonalise(spec, x_EFD), expected, 1e-5)
    assert_close(muon.orthogonalise(spec, x_EFD[None]), expected[None], 1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": 9}, "kinds.G: mlp.top_k=9 is above mlp.experts=8; use at most 8"),
        ({"top_k": 0}, "kinds.G.mlp.top_k=0 must be at least 1"),
        ({"router": "relu"}, "kinds.G.mlp.router='relu' is not one of 'softmax', 'sigmoid'"),
        ({"balance_loss": -0.1}, "kinds.G.mlp.balance_loss=-0.1 must be at least 0"),
        ({"shared_gate": True}, "mlp.shared_gate=True does nothing with mlp.shared_experts=0; use 1 or more"),
        ({"num_experts": 4}, "unknown key config.model.kinds.G.mlp.num_experts; did you mean config.model.kinds.G.mlp.experts"),
    ],
)
def test_a_config_of_experts_that_cannot_be_is_refused_in_one_line(changes, message):
    values = config.to_dict(tiny(G={"mlp.type": "moe"}))
    values["model"]["kinds"]["G"]["mlp"] |= changes
    with pytest.raises(ValueError) as error:
        config.build(values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_width_of_experts_that_does_not_split_over_the_mesh_is_refused():
    model = tiny(G={"mlp.type": "moe", "mlp.d_ff": 21}).model
    with pytest.raises(ValueError, match=r"model.kinds.G.mlp.d_ff 21 does not split over 2 tensor shards; use 20 or 22"):
        fit.check_model(model, {"fsdp": 1, "tensor": 2})


def test_a_family_without_experts_refuses_a_model_with_them():
    with pytest.raises(ValueError, match=r"cohere2 cannot express(.|\n)*mlp.type: moe -> gated"):
        families.config_json(with_experts().model, "cohere2", 64)
