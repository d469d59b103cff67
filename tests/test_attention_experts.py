"""Attention experts are a gated sum of attentions, on every mesh, in training and decoding; BAM has the sizes of its paper."""

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
    batch_of,
    every,
    loss_and_grads,
    mesh_of,
    on_mesh,
    random_params,
    tiny,
)

from configs import base
from hybrid_attn import config
from hybrid_attn.convert import families
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.model import abstract_params, apply, attention_experts, expert_metrics, flops, losses, losses_and_aux, specs
from hybrid_attn.model.attention_experts import AttentionExperts
from hybrid_attn.parallel import fit
from hybrid_attn.train import muon

EXPERTS = {"mixer": "attention_experts", "attention_experts": 3}
LOCAL = {"window": 5, "rope_theta": 100.0, "temperature.type": "learned", "gate": "head"}
GLOBAL = {"qk_norm": "rms", "qk_norm_scope": "projection", "sink": True}


def models(**changes) -> tuple[config.Model, config.Model]:
    """A dense model, and one with three attention experts in each layer; the local ones have keys and values of their own."""
    return tiny(changes, L=LOCAL, G=GLOBAL).model, tiny(changes, L=LOCAL | EXPERTS, G=GLOBAL | EXPERTS).model


def of_dense(dense: list[dict], router) -> dict:
    """Parameters with the attention of one dense model in each expert, and the first one's shared keys and all else."""
    params = jax.tree.map(lambda x: x, dense[0])
    for name, layer in params["periods"].items():
        attentions = [x["periods"][name]["attention"] for x in dense]
        del layer["attention"]
        of_keys = ("k", "v", "k_norm") if name == "G1" else ()
        mixture = {f"expert{i}": {k: x for k, x in a.items() if k not in of_keys} for i, a in enumerate(attentions)}
        mixture |= {"shared": {k: attentions[0][k] for k in of_keys if k in attentions[0]}} if of_keys else {}
        layer["attention_experts"] = mixture | {"router": router}
    return params


def activations(model, params, seed=0):
    batch = on_mesh(BATCH)
    run = jax.jit(functools.partial(apply, model, execution=REFERENCE))  # anew in each call: a test replaces the gates
    return np.asarray(run(params, batch["tokens"], batch["positions"], batch["segments"]))


@pytest.mark.parametrize("block, kv_heads", [("parallel", 2), pytest.param("pre", 1, marks=pytest.mark.slow)])
def test_identical_experts_are_the_dense_model_for_any_router(block, kv_heads, one_device):
    dense, mixture = models(**{"model.block": block, "model.num_kv_heads": kv_heads})
    params = random_params(dense)
    router = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 3)), jnp.float32)
    got = activations(mixture, of_dense([params] * 3, router))
    np.testing.assert_allclose(got, activations(dense, params), atol=1e-6 * np.abs(got).max(), rtol=1e-5)


def test_the_entropy_of_equal_gates_is_that_of_all_experts_and_of_one_hot_ones_zero():
    real_BT = jnp.asarray([[True, True, False]])
    padding = jnp.full(3, jnp.nan)
    cases = {
        "equal": (jnp.stack([jnp.full(3, 1 / 3)] * 2), [1 / 3] * 3, np.log2(3)),
        "one-hot": (jnp.eye(3)[:2], [0.5, 0.5, 0], 0.0),
        "half": (jnp.asarray([[0.5, 0.5, 0], [0, 0, 1]]), [0.25, 0.25, 0.5], 0.5),
    }
    for gates_TE, shares, bits in cases.values():
        got = attention_experts.statistics_of(jnp.concatenate([gates_TE, padding[None]])[None], real_BT)
        np.testing.assert_allclose(got["gate_shares"], shares, rtol=1e-6)
        assert got["gate_entropy_bits"] == pytest.approx(bits, rel=1e-6)


def test_the_metric_of_equal_logits_is_a_mean_over_the_layers_with_attention_experts(one_device):
    _, model = models()
    params = random_params(model)
    for layer in params["periods"].values():
        layer["attention_experts"]["router"] *= 0
    _, _, aux = jax.jit(losses_and_aux, static_argnums=(0, 3))(model, params, on_mesh(BATCH), REFERENCE)
    assert set(aux) == {"attention_expert_layers", "gate_entropy_bits"}  # arrays of a layer are no sums over layers
    assert expert_metrics.metrics(aux)["gate_entropy_bits"] == pytest.approx(np.log2(3), rel=1e-6)
    assert expert_metrics.metrics({"nll": 1.0}) == {}


@pytest.mark.parametrize("expert", [2, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_gates_that_are_all_on_one_expert_give_the_model_of_that_expert(expert, one_device, monkeypatch):
    dense, mixture = models()
    dense_params = [random_params(dense, seed) for seed in range(3)]
    for params in dense_params[1:]:  # they differ in nothing but their attention, and share keys in global layers
        for name, x in dense_params[0]["periods"]["G1"]["attention"].items():
            if name in ("k", "v", "k_norm"):
                params["periods"]["G1"]["attention"][name] = x
        params |= {"embed": dense_params[0]["embed"], "final_norm": dense_params[0]["final_norm"]}
        for name, layer in params["periods"].items():
            layer |= {"mlp": dense_params[0]["periods"][name]["mlp"], "norm": dense_params[0]["periods"][name]["norm"]}
    one_hot = jax.nn.one_hot(expert, 3)
    monkeypatch.setattr(AttentionExperts, "gates", lambda self, x_BTD: jnp.broadcast_to(one_hot, (*x_BTD.shape[:2], 3)))
    got = activations(mixture, of_dense(dense_params, jnp.zeros((1, 32, 3))))
    expected = activations(dense, dense_params[expert])
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-5)


@pytest.fixture(scope="module")
def on_one_device():
    model = wide_model()
    with jax.set_mesh(mesh_of()):
        return jax.device_get(loss_and_grads(model, REFERENCE, random_params(model), on_mesh(BATCH)))


def wide_model() -> config.Model:
    """Attention experts of both kinds, with heads that eight devices can share."""
    heads = {"model.num_heads": 8, "model.num_kv_heads": 4, "model.head_dim": 8}
    return tiny(heads, L=LOCAL | EXPERTS, G=GLOBAL | EXPERTS | {"mlp.type": "moe", "mlp.experts": 4}).model


@pytest.mark.parametrize(
    "sizes, scheme, remat",
    [
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, "gather", "layer", marks=pytest.mark.slow),
        pytest.param({"data": 2, "context": 4}, "ring", "attention", marks=pytest.mark.exhaustive),
        pytest.param({"expert": 2, "tensor": 4}, "gather", "none", marks=pytest.mark.slow),
        pytest.param({"context": 4, "fsdp": 2}, "ulysses", "none", marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_every_mesh_computes_the_loss_and_the_gradients_of_one_device(sizes, scheme, remat, on_one_device):
    model = wide_model()
    context = config.Table({"L": "halo" if scheme == "gather" else "gather", "G": scheme})
    with jax.set_mesh(mesh_of(**sizes)):
        execution = BLOCKED._replace(context=context, zigzag=scheme == "ring", remat=every(remat))
        got = jax.device_get(loss_and_grads(model, execution, random_params(model), on_mesh(BATCH)))
    assert_close(got, on_one_device, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"context": 2, "tensor": 2}], ids=str)
def test_prefill_and_decoding_compute_the_forward_pass(sizes):
    c = tiny(L=LOCAL | EXPERTS, G=GLOBAL | EXPERTS)
    prompts, score = [[5, 6, 7], list(range(40, 61))], jax.jit(losses, static_argnums=(0, 3))
    with jax.set_mesh(mesh_of(**sizes)):
        params = random_params(c.model)
        answers = Engine(params, c, EngineOptions(chunk=16), execution=BLOCKED).generate(prompts, 6)
        for prompt, answer in zip(prompts, answers, strict=True):
            batch = batch_of("a" * (len(prompt) + len(answer.tokens)) + "." * (48 - len(prompt) - len(answer.tokens)))
            tokens = [*prompt, *answer.tokens]
            batch["tokens"][0, : len(tokens)] = tokens
            batch["targets"] = np.roll(batch["tokens"], -1)
            nll_BT = np.asarray(score(c.model, params, on_mesh(batch), REFERENCE)[0])
            np.testing.assert_allclose(answer.logprobs, -nll_BT[0, len(prompt) - 1 : len(tokens) - 1], atol=1e-4)


def bam(**fields) -> config.Model:
    """The small model of BAM's paper (arXiv 2408.08274, table 8), whose "FFN 4096" is gate and up side by side."""
    c = base.get_config()
    c.model.update(pattern="G", prefix="", num_layers=6, d_model=1024, num_heads=8, num_kv_heads=8, head_dim=128, d_ff=2048)
    c.model.update(vocab_size=256_000, tie_embeddings=False)
    c.model.kinds = {"G": base.kind(rope_theta=10_000.0, **fields)}
    return config.build(c).model


MOE = {"mlp": base.moe(experts=4, top_k=1, renormalise=False)}
OWN = {"mixer": "attention_experts", "attention_experts": 4, "share_kv": False}


@pytest.mark.parametrize(
    "fields, parameters",
    [({}, 587_209_728), (MOE, 700_480_512), (MOE | OWN, 776_002_560), (MOE | OWN | {"share_kv": True}, 738_253_824)],
    ids=["dense", "BTX", "BAM", "BAM, shared keys and values"],
)
def test_models_of_bams_paper_have_its_numbers_of_parameters(fields, parameters):
    assert flops.parameters(bam(**fields)) == parameters


def test_a_config_costs_the_flops_and_the_cache_of_all_experts():
    (dense, mixture), length = models(), 40
    D, N, K, H, pairs = 32, 4, 2, 8, {"L": 5 * 6 // 2 + 35 * 5, "G": 40 * 41 // 2}
    queries, keys = 2 * D * N * H, 2 * D * K * H
    products = 2 * (queries + keys + D * N) + 2 * queries + 2 * 3 * D  # two more experts of each layer, and routers
    scores = 2 * 4 * N * H * sum(pairs.values()) / length
    got = flops.forward_flops_per_token(mixture, length) - flops.forward_flops_per_token(dense, length)
    assert got == pytest.approx(2 * products + scores)
    assert flops.cache_bytes(mixture, length) - flops.cache_bytes(dense, length) == 2 * 2 * K * H * 2 * 5
    assert flops.active_parameters(mixture) == flops.parameters(mixture)


def test_keys_and_values_are_shared_where_the_config_says_so_and_by_default_where_a_query_sees_all():
    layers = abstract_params(models()[1])["periods"]
    assert "shared" not in layers["L0"]["attention_experts"] and "k" in layers["L0"]["attention_experts"]["expert2"]
    assert set(layers["G1"]["attention_experts"]["shared"]) == {"k", "v", "k_norm"}
    assert "k" not in layers["G1"]["attention_experts"]["expert2"]
    own = tiny(G=EXPERTS | {"share_kv": False}).model
    assert "shared" not in abstract_params(own)["periods"]["G1"]["attention_experts"]


def test_the_optimisers_read_experts_as_they_read_an_attention():
    changes = {"model.mup_base_width": 8, "model.mup_base_depth": 1}
    dense, mixture = (specs(model)["periods"]["L0"] for model in models(**changes))
    assert all(mixture["attention_experts"][f"expert{i}"] == dense["attention"] for i in range(3))
    router = mixture["attention_experts"]["router"]
    assert router.width == 4 and router.decay and not router.cast and muon.batch_axes(router) == ()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"share_kv": True}, "kinds.G: share_kv=True does nothing without mixer='attention_experts'; leave it at None"),
        (EXPERTS | {"attention_experts": 0}, "kinds.G.attention_experts=0 must be at least 1"),
        (EXPERTS | {"share_kv": "yes"}, "kinds.G.share_kv='yes' must be of type bool"),
    ],
)
def test_a_config_of_attention_experts_that_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as error:
        tiny(G=changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_ulysses_divides_the_heads_of_all_experts_that_have_keys_of_their_own():
    own, shared = (tiny(G=EXPERTS | {"attention_experts": 4, "share_kv": share}).model for share in (False, True))
    fit.check_schemes(own, {"G": "ulysses"}, {"tensor": 1, "context": 8})
    with pytest.raises(ValueError, match="G=ulysses splits the 2 key/value heads of a tensor shard over 8 context shards"):
        fit.check_schemes(shared, {"G": "ulysses"}, {"tensor": 1, "context": 8})


def test_a_family_refuses_a_model_with_attention_experts():
    with pytest.raises(ValueError, match=r"cohere2 cannot express(.|\n)*mixer: attention_experts -> attention"):
        families.config_json(models()[1], "cohere2", 64)
