"""Held-out pairs are measured as a loop over their completions measures them, by the model's own logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BLOCKED, ONE_LAYER, mesh_of, random_params, tiny

from hybrid_attn.data.documents import LossMask, in_memory
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import EvalModel, Spec, preferences
from hybrid_attn.evals.samples import TooLongError
from hybrid_attn.evals.types import EvalContext, Settings, Unit
from hybrid_attn.model import apply, logits, loss

LENGTH, BYTES = 48, ByteTokenizer()
PROMPTS = ("ab", "a longer prompt", "c")
HALVES = (("yes", "no"), ("maybe", "x"), ("1", "234567"))


def pairs():
    """Documents of prompts and completions, of which the mask has the completion and EOS, three times over."""
    texts = [(prompt, half) for prompt, of_pair in zip(PROMPTS, HALVES, strict=True) for half in of_pair] * 3
    ids = [np.array([BYTES.bos, *prompt.encode(), *half.encode(), BYTES.eos], np.uint16) for prompt, half in texts]
    masks = [np.arange(len(x)) > len(prompt.encode()) for x, (prompt, _) in zip(ids, texts, strict=True)]
    mask = LossMask(lambda spans: [masks[i][start:stop].astype(np.uint8) for i, start, stop in spans], "completions")
    documents = dataclasses.replace(in_memory(ids, np.repeat(np.arange(len(ids) // 2), 2)), loss_mask=mask, paired=True)
    return documents, list(zip(ids, masks, strict=True))


def by_hand(model, params, documents):
    """The record, from the logits of each document alone."""
    of_documents, indicators = [], []
    rows = np.stack([np.pad(ids, (0, LENGTH - len(ids))) for ids, _ in documents]).astype(np.int32)
    pos_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), rows.shape)
    score = jax.jit(lambda *arrays: logits(model, params, apply(model, params, *arrays, BLOCKED)))
    logits_BTV = np.asarray(score(jnp.asarray(rows), jnp.asarray(pos_BT), jnp.ones_like(rows)), np.float64)
    for (ids, mask), logits_TV in zip(documents, logits_BTV, strict=True):
        log_probs = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        places = np.flatnonzero(mask) - 1
        of_documents.append(log_probs[places, ids[mask]])
        for row in log_probs[places]:
            p = np.exp(np.sort(row)[::-1][:10])
            q = p / p.sum()
            indicators.append((len(of_documents) % 2, -(p * np.log2(p)).sum(), -(q * np.log2(q)).sum(), p.sum()))
    chosen, rejected = of_documents[::2], of_documents[1::2]
    means = np.mean([x[1:] for x in indicators if x[0]], 0)
    return {
        "pairs": len(chosen),
        "tokens": sum(map(len, chosen)),
        "chosen": np.mean([x.sum() for x in chosen]),
        "rejected": np.mean([x.sum() for x in rejected]),
        "accuracy": np.mean([a.mean() > b.mean() for a, b in zip(chosen, rejected, strict=True)]),
        **dict(zip(("entropy_bits", "renormalised_entropy_bits", "mass"), means, strict=True)),
    }


def measured(model, sizes, spec):
    with jax.set_mesh(mesh_of(**sizes)):
        execution = BLOCKED._replace(kernel="reference", zigzag="context" in sizes, loss_chunk=7)
        return preferences.record_of(EvalModel(model, random_params(model), execution, mesh_of(**sizes), BYTES), spec)


@pytest.mark.parametrize("sizes", [{}, pytest.param({"data": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("entries", [100, 16_384])
def test_pairs_are_measured_as_a_loop_over_their_completions_does(sizes, entries, monkeypatch):
    monkeypatch.setattr(loss, "ENTRIES", entries)  # parts of the vocabulary, which do not divide it
    model = tiny({"model.logit_softcap": 5.0} | ONE_LAYER).model
    documents, arrays = pairs()
    record = measured(model, sizes, Spec(documents, LENGTH, 10**6))
    with jax.set_mesh(mesh_of()):
        expected = by_hand(model, random_params(model), arrays)
    assert record["margin"] == pytest.approx(record["chosen"] - record["rejected"])
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=1e-4), name
    assert 0 < record["mass"] < 1 and record["entropy_bits"] < record["renormalised_entropy_bits"] < np.log2(10)


def test_indicators_have_the_values_of_a_uniform_and_of_a_certain_distribution():
    uniform = preferences.indicators(jnp.full((1, 1, 10), -jnp.log(384.0)))
    assert uniform["mass"] == pytest.approx(10 / 384) and uniform["renormalised_entropy_bits"] == pytest.approx(np.log2(10))
    assert uniform["entropy_bits"] == pytest.approx(10 / 384 * np.log2(384))
    certain = preferences.indicators(jnp.where(jnp.arange(10) == 0, 0.0, -200.0)[None, None])
    assert certain["mass"] == pytest.approx(1) and certain["entropy_bits"] == certain["renormalised_entropy_bits"] == 0


def test_a_pair_that_is_longer_than_a_sequence_does_not_fit(one_device):
    model = tiny(ONE_LAYER).model
    context = EvalContext(EvalModel(model, {}, BLOCKED, one_device, BYTES), None, {}, "", {}, LENGTH, pairs={"a": pairs()[0]})
    settings = Settings(("preferences",), (48, 24), 1, 100, (), 0)
    short, long = (unit for unit in reversed(preferences.EVALUATION.units(context, settings)))
    assert preferences.check_fits(context, settings, long) is None and isinstance(short, Unit)
    with pytest.raises(TooLongError, match="preferences of a: its longest pair has 40 tokens, and 24 are asked for"):
        preferences.check_fits(context, settings, short)
