"""Loss by position is the trainer's loss, sorted into buckets; the bigram is what a hand would count."""

import math

import jax
import numpy as np
import pytest
from conftest import BLOCKED, mean_loss, mesh_of, on_mesh, random_params, tiny

from hybrid_attn.data.documents import in_memory
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.synthetic import Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import EvalModel, Spec, attention, bigram, keytokens, position, recall
from hybrid_attn.model import losses

LENGTH = 48


def documents_of(*tokens):
    return in_memory([np.array(x, np.uint16) for x in tokens], range(len(tokens)))


def text_documents(*lengths):
    rng = np.random.default_rng(0)
    return documents_of(*([256, *rng.integers(0, 256, length - 2), 257] for length in lengths))


def eval_model_on(mesh):
    model = tiny({"model.pattern": "LG"}).model
    return EvalModel(model, random_params(model), BLOCKED._replace(kernel="reference"), mesh, ByteTokenizer())


@pytest.mark.parametrize("data, fsdp", [(1, 1), (2, 2)])
def test_losses_by_position_are_the_trainers_losses_sorted_into_buckets(data, fsdp):
    spec = Spec(text_documents(70, 9, 2, 40, 90, 30), LENGTH, 2 * LENGTH + 5)  # scores three rows of six
    mesh = mesh_of(data, fsdp)
    with jax.set_mesh(mesh):
        eval_model = eval_model_on(mesh)
        *buckets, total = [record for record in position.records_of(eval_model, spec) if "part" not in record]
    rows = [PackedSequences(spec.documents, LENGTH, None, ByteTokenizer().byte_lengths)[i] for i in (0, 2, 4)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    with jax.set_mesh(mesh_of()):
        by_token = {name: x for name, x in batch.items() if name != "bytes"}
        params = random_params(eval_model.model)
        nll, lse = jax.jit(losses, static_argnums=(0, 3))(eval_model.model, params, on_mesh(by_token), eval_model.execution)
        mean = float(mean_loss(*jax.device_get((nll, lse)), batch["weights"], 0.0))
    nll, counts = np.asarray(nll), batch["weights"] > 0

    assert total["loss"] == pytest.approx(mean, rel=1e-5)
    assert total["tokens"] == counts.sum() and total["length"] == LENGTH
    scored_bytes = (batch["targets"][counts] < 256).sum()
    assert scored_bytes < counts.sum()  # the ends of documents are scored and stand for no byte
    assert total["bits_per_byte"] == pytest.approx(nll[counts].sum() / math.log(2) / scored_bytes, rel=1e-5)

    assert [(b["first"], b["end"]) for b in buckets] == [(0, 16), (16, 32), (32, 48)]
    assert sum(b["tokens"] for b in buckets) == total["tokens"]
    for b in buckets:
        inside = counts & (batch["positions"] >= b["first"]) & (batch["positions"] < b["end"])
        assert b["tokens"] == inside.sum()
        assert b["loss"] == pytest.approx(nll[inside].mean(), rel=1e-5)
        inside_bytes = (batch["targets"][inside] < 256).sum()
        assert b["bits_per_byte"] == pytest.approx(nll[inside].sum() / math.log(2) / inside_bytes, rel=1e-5)
    by_row = [nll[i][counts[i]].mean() for i in range(3)]
    np.testing.assert_allclose(total["by_row"], by_row, rtol=1e-5)
    shares = counts.sum(1) / counts.sum()
    error = math.sqrt(1.5 * sum((share * (x - mean)) ** 2 for share, x in zip(shares, by_row, strict=True)))
    assert total["stderr"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    "measure, documents",
    [
        (position.records_of, text_documents(70, 90)),
        (lambda eval_model, spec: keytokens.records_of(eval_model, spec, 16), text_documents(70, 90)),
        (recall.records_of, Task("recall", 4)),
        (attention.records_of, Task("recall", 4)),
    ],
    ids=["position", "key_tokens", "recall", "attention_mass"],
)
def test_what_is_not_finite_is_an_error_and_never_a_record(one_device, measure, documents):
    eval_model = eval_model_on(one_device)
    broken = eval_model._replace(params=jax.tree.map(lambda x: x * np.nan, eval_model.params))
    with pytest.raises(FloatingPointError, match="is nan: the parameters are not finite"):
        list(measure(broken, Spec(documents, LENGTH, LENGTH)))


def test_one_row_alone_has_no_standard_error(one_device):
    records = list(position.records_of(eval_model_on(one_device), Spec(text_documents(LENGTH), LENGTH, 1)))
    assert records and not any("stderr" in record for record in records)


def test_a_bucket_without_tokens_has_no_record(one_device):
    spec = Spec(text_documents(10, 12, 11, 13), LENGTH, 10**6)
    *buckets, total = [record for record in position.records_of(eval_model_on(one_device), spec) if "part" not in record]
    assert [(b["first"], b["end"]) for b in buckets] == [(0, 16)]
    assert buckets[0]["tokens"] == total["tokens"] == 46 - 4


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "context": 2}])
def test_tokens_that_a_pair_foretells_are_apart_from_the_rest(sizes):
    rng = np.random.default_rng(1)
    documents = documents_of(*([256, *rng.integers(97, 101, length - 2), 257] for length in (40, 30, 70, 20, 56, 40)))
    spec = Spec(documents, LENGTH, 10**6)
    with jax.set_mesh(mesh_of(**sizes)):
        records = list(position.records_of(eval_model_on(mesh_of(**sizes)), spec))
    found = {name: [r for r in records if r.get("part") == name] for name in (None, *position.BIGRAM_PARTS)}
    rows = PackedSequences(documents, LENGTH, None, ByteTokenizer().byte_lengths)
    wanted = {name: 0 for name in position.BIGRAM_PARTS}
    for row in (rows[i] for i in range(len(rows))):
        seen = set()
        for triple, weight in zip(
            zip(row["segments"], row["tokens"], row["targets"], strict=True), row["weights"], strict=True
        ):
            wanted["recall" if triple in seen else "rest"] += int(weight)
            seen.add(triple)
    assert {name: found[name][-1]["tokens"] for name in position.BIGRAM_PARTS} == wanted and min(wanted.values()) > 20
    for name in position.BIGRAM_PARTS:
        *buckets, whole = found[name]
        assert sum(b["tokens"] for b in buckets) == whole["tokens"]
        assert sum(b["tokens"] * b["loss"] for b in buckets) == pytest.approx(whole["tokens"] * whole["loss"], rel=1e-5)
    both = sum(found[name][-1]["tokens"] * found[name][-1]["loss"] for name in position.BIGRAM_PARTS)
    assert both == pytest.approx(found[None][-1]["tokens"] * found[None][-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "length, edges",
    [(1, (0, 1)), (16, (0, 16)), (17, (0, 16, 17)), (64, (0, 16, 32, 64)), (100, (0, 16, 32, 64, 100))],
)
def test_buckets_double_from_16_tokens_and_end_at_the_length(length, edges):
    assert position.bucket_edges(length) == edges


def test_bigram_probabilities_are_counts_plus_one_without_pairs_across_documents():
    log_probs = bigram.log_probabilities(documents_of([0, 1, 0, 1], [1, 0], [2], [2, 2]), 4)
    counts = np.array([[1, 3, 1, 1], [3, 1, 1, 1], [1, 1, 2, 1], [1, 1, 1, 1]])
    np.testing.assert_allclose(np.exp(log_probs), counts / counts.sum(1, keepdims=True), rtol=1e-12)


def test_of_a_large_corpus_the_bigram_counts_the_first_documents(monkeypatch):
    first, rest = [[0, 1], [1, 1, 0]], [[0, 0], [1, 0]]
    monkeypatch.setattr(bigram, "MAX_TOKENS", 5)
    monkeypatch.setattr(bigram, "READ_TOKENS", 2)
    wanted = bigram.log_probabilities(documents_of(*first), 2)
    np.testing.assert_array_equal(bigram.log_probabilities(documents_of(*first, *rest), 2), wanted)


@pytest.mark.parametrize("tokens, pairs", [(3, "01 10 01"), (6, "01 10 01 10")])
def test_the_bigram_scores_the_pairs_of_the_rows_that_the_model_would_score(tokens, pairs):
    spec = Spec(documents_of([0, 1, 0, 1], [1, 0]), 3, tokens)  # rows 010 and 1|10: the row's edge cuts no pair
    log_probs, byte_lengths = np.log([[0.5, 0.5], [0.125, 0.875]]), np.array([1, 2])
    bits = sum({"01": 1, "10": 3}[pair] for pair in pairs.split())
    num_bytes = sum(byte_lengths[int(pair[1])] for pair in pairs.split())
    assert bigram.score(log_probs, spec, byte_lengths) == pytest.approx(bits / num_bytes, rel=1e-6)
