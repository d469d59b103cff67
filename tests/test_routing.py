"""Routing is measured over the real tokens of each source: a router that is set by hand gives the shares that are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BLOCKED, ONE_LAYER, mesh_of, random_params, tiny

from hybrid_attn.data.documents import in_memory
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import EvalModel, Spec, routing
from hybrid_attn.evals.table import EVALS
from hybrid_attn.evals.types import EvalContext, Settings
from hybrid_attn.model.attention_experts import AttentionExperts

LENGTH = 48
MOE = {"mlp.type": "moe", "mlp.experts": 4, "mlp.d_ff": 16}
ATTENTIONS = {"mixer": "attention_experts", "attention_experts": 3}
LOCAL = {"window": 5, "rope_theta": 100.0}


def documents():
    """Letters a and b in unequal numbers, in documents that leave padding in the last sequence."""
    rng = np.random.default_rng(0)
    return in_memory([np.where(rng.random(n) < 0.7, 97, 98).astype(np.uint16) for n in (70, 9, 35, 44)], range(4))


def eval_model_on(mesh, model, params=None):
    execution = BLOCKED._replace(kernel="reference", zigzag=mesh.shape["context"] > 1)
    return EvalModel(model, params or random_params(model), execution, mesh, ByteTokenizer())


def records(mesh, model, params=None, tokens=10**6):
    return [*routing.records_of(eval_model_on(mesh, model, params), Spec(documents(), LENGTH, tokens))]


def real_tokens():
    sequences = PackedSequences(documents(), LENGTH, None, ByteTokenizer().byte_lengths)
    arrays = [sequences[i] for i in range(len(sequences))]
    tokens, segments = (np.concatenate([x[name] for x in arrays]) for name in ("tokens", "segments"))
    assert (segments == 0).any()
    return tokens[segments > 0]


def by_letter(model, embedding, router):
    """Parameters with which the first layer routes a to expert 2 and b to expert 0: their embeddings are two directions."""
    params = jax.tree.map(np.array, random_params(model))
    params["embed"] = np.zeros_like(params["embed"])
    params["embed"][97, 0], params["embed"][98, 1] = embedding, embedding
    layer = params["periods"]["L0"]
    layer["norm"]["weight"] = np.ones_like(layer["norm"]["weight"])
    weights = layer["mlp"] if router == "mlp" else layer["attention_experts"]
    weights["router"] = np.zeros_like(weights["router"])
    weights["router"][0, 0, 2], weights["router"][0, 1, 0] = 10.0, 10.0
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("kind, part", [(MOE | {"mlp.top_k": 1}, "feed-forward"), (ATTENTIONS, "attention")])
def test_a_router_that_reads_the_letter_has_the_share_of_each_letter(kind, part, one_device):
    model = tiny(ONE_LAYER | {"model.norm": "rms"}, L=LOCAL | kind).model
    router = "mlp" if part == "feed-forward" else "mixer"
    (record,) = records(one_device, model, by_letter(model, 1.0, router))
    tokens = real_tokens()
    assert (record["layer"], record["kind"], record["experts"], record["tokens"]) == (0, "L", part, len(tokens))
    share = np.mean(tokens == 97)
    expected = {2: share, 0: 1 - share}
    assert 0.5 < share < 0.9
    np.testing.assert_allclose(record["shares"], [expected.get(e, 0.0) for e in range(len(record["shares"]))], atol=1e-6)
    assert record["load"] == pytest.approx(share * len(record["shares"]))
    assert record["entropy_bits"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_mesh_measures_what_one_device_does_in_layers_before_and_in_the_periods():
    layers = {"model.prefix": "G", "model.pattern": "L", "model.num_layers": 3}
    model = tiny(layers, L=LOCAL | MOE | ATTENTIONS, G=MOE | {"mlp.experts": 6, "mlp.top_k": 3}).model
    results = []
    for sizes in ({}, {"data": 2, "expert": 2, "context": 2}):
        with jax.set_mesh(mesh_of(**sizes)):
            results.append(records(mesh_of(**sizes), model))
    one, eight = results
    of_periods = [(i, "L", experts) for i in (1, 2) for experts in routing.PARTS]
    assert [(r["layer"], r["kind"], r["experts"]) for r in one] == [(0, "G", "feed-forward"), *of_periods]
    assert [len(r["shares"]) for r in one] == [6, 4, 3, 4, 3]
    assert all(sum(r["shares"]) == pytest.approx(1, abs=1e-6) for r in one)
    assert len({str(r["shares"]) for r in one}) == len(one)
    for a, b in zip(one, eight, strict=True):
        assert {name: b[name] for name in ("layer", "kind", "experts", "tokens")}.items() <= a.items()
        for name in ("shares", "load", "entropy_bits"):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-6)


def test_one_hot_gates_have_no_entropy_and_equal_logits_have_all(one_device, monkeypatch):
    model, other = (tiny(ONE_LAYER, L=LOCAL | ATTENTIONS | {"window": window}).model for window in (5, 6))
    params = random_params(model)
    params["periods"]["L0"]["attention_experts"]["router"] *= 0
    (equal,) = records(one_device, model, params, LENGTH)
    np.testing.assert_allclose(equal["shares"], 1 / 3, rtol=1e-6)
    assert equal["entropy_bits"] == pytest.approx(np.log2(3), rel=1e-6) and equal["load"] == pytest.approx(1)
    one_hot = jax.nn.one_hot(1, 3)
    monkeypatch.setattr(AttentionExperts, "gates", lambda self, x_BTD: jnp.broadcast_to(one_hot, (*x_BTD.shape[:2], 3)))
    (single,) = records(one_device, other, params, LENGTH)
    assert single["shares"] == [0, 1, 0] and single["entropy_bits"] == 0 and single["load"] == 3


def test_a_model_without_experts_has_nothing_to_measure():
    settings = Settings(("routing",), (LENGTH,), 1, LENGTH, (0.0,), 0)
    for model, parts in ((tiny().model, []), (tiny(G=MOE).model, ["text"])):
        context = EvalContext(EvalModel(model, {}, BLOCKED, None, ByteTokenizer()), None, {"text": documents()}, "", {}, LENGTH)
        assert [unit.part for unit in EVALS["routing"].units(context, settings)] == parts
    assert EVALS["routing"].empty(context._replace(eval_model=context.eval_model._replace(model=tiny().model))) == (
        "experts",
        "no layer of the model has any",
    )
