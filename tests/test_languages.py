"""Loss and accuracy by language are those of the logits, and the mean gives each language the same weight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from evaluated import run_of
from test_position import LENGTH, eval_model_on, text_documents

from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import Spec, languages
from hybrid_attn.evals.evaluation import Baselines
from hybrid_attn.evals.report import comparison
from hybrid_attn.evals.report import languages as section
from hybrid_attn.evals.types import EvalContext, Settings, Unit
from hybrid_attn.model import apply, logits


def by_hand(eval_model, documents):
    """(loss sum, right, tokens, bytes) of each sequence, from its logits."""
    sequences = PackedSequences(documents, LENGTH, None, ByteTokenizer().byte_lengths)
    read = [sequences[i] for i in range(len(sequences))]
    batch = {name: np.stack([row[name] for row in read]) for name in read[0]}
    arrays = (jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments"))
    model = eval_model.model

    @jax.jit
    def score(params, *arrays):
        return logits(model, params, apply(model, params, *arrays, eval_model.execution))

    logits_BTV = np.asarray(score(eval_model.params, *arrays), np.float64)
    log_probs_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    nll_BT = -np.take_along_axis(log_probs_BTV, batch["targets"][..., None], -1)[..., 0]
    right_BT = logits_BTV.argmax(-1) == batch["targets"]
    return np.array([(x * batch["weights"]).sum(1) for x in (nll_BT, right_BT, 1.0, batch["bytes"])])


@pytest.mark.parametrize("sizes", [{}, pytest.param({"fsdp": 2, "context": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_language_has_the_loss_and_the_accuracy_of_its_logits(sizes):
    documents = text_documents(*[60, 9, 40] * 8)
    with jax.set_mesh(mesh_of(**sizes)) as _:
        eval_model = eval_model_on(mesh_of(**sizes))
        eval_model = eval_model._replace(execution=eval_model.execution._replace(zigzag="context" in sizes))
        record = languages.record_of(eval_model, Spec(documents, LENGTH, 10**6))
    with jax.set_mesh(mesh_of()):
        sums = by_hand(eval_model_on(mesh_of()), documents)
    nll, right, tokens, num_bytes = sums.sum(1)
    assert record["tokens"] == tokens and 0 < right < tokens
    assert record["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-5)
    assert record["accuracy"] == pytest.approx(right / tokens)
    np.testing.assert_allclose(record["by_row"], sums[1] / sums[2], rtol=1e-6)


def test_nothing_is_right_where_all_tokens_are_equally_likely(one_device):
    eval_model = eval_model_on(jax.sharding.get_mesh())
    eval_model = eval_model._replace(params=jax.tree.map(jnp.zeros_like, eval_model.params))
    record = languages.record_of(eval_model, Spec(text_documents(60), LENGTH, LENGTH))
    assert record["accuracy"] == 0 and record["loss"] == pytest.approx(math.log(eval_model.model.vocab_size))


def test_the_record_of_a_unit_is_of_its_source(one_device, monkeypatch):
    specs = []
    monkeypatch.setattr(languages, "record_of", lambda eval_model, spec: specs.append(spec) or {"length": spec.length})
    context = EvalContext(None, None, {"de": "documents of de", "fr": "documents of fr"}, "", {}, LENGTH)
    settings = Settings(("languages",), (LENGTH,), 1, 100, (), 0)
    units = languages.EVALUATION.units(context, settings)
    assert units == [Unit("languages", name, LENGTH) for name in ("de", "fr")]
    measured = [languages.measure(context, settings, unit, []).records for unit in units]
    assert measured == [[{"source": name, "length": LENGTH}] for name in ("de", "fr")]
    assert specs == [Spec(f"documents of {name}", LENGTH, 100) for name in ("de", "fr")]


def record_of(source, accuracy, tokens, bits=2.0):
    numbers = {"loss": 2 * bits, "bits_per_byte": bits, "accuracy": accuracy, "tokens": tokens, "by_row": [accuracy] * 12}
    return {"eval": "languages", "source": source, "length": LENGTH} | numbers


def test_the_mean_of_all_gives_each_language_the_same_weight():
    records = [record_of("de", 0.5, 900), record_of("fr", 0.1, 100, bits=3.0)]
    ((table,),) = (x.tables for x in section.sections([run_of("a", (), records)]))
    assert table.rows[-1] == ["a", section.MEAN, LENGTH, None, 5.0, 2.5, 0.3] and len(table.rows) == 3
    assert [x.score for x in languages.lines(records, Baselines([], 384))] == ["50.0%", "10.0%", "30.0%"]
    assert [x.bits for x in languages.lines(records[:1], Baselines([], 384))] == ["2.000"]
    better = [record_of("de", 0.6, 900) | {"by_row": [0.6, 0.7] * 6}, record_of("fr", 0.1, 100, bits=3.0)]
    differences = comparison.compare_sequences(run_of("a", (), records), run_of("b", (), better))
    assert [(x.task, x.verdict, x.loss) for x in differences] == [
        ("languages: de", "better", False),
        ("languages: fr", "unclear", False),
    ]
