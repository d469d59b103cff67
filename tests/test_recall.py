"""Recall counts the answers that the model's own logits give, on any mesh, each row once."""

import jax
import numpy as np
import pytest
from conftest import BLOCKED, mesh_of, on_mesh, random_params, tiny

from hybrid_attn.data.synthetic import VALUES, SyntheticSequences, Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import EvalModel, Spec, recall
from hybrid_attn.model import apply, logits

LENGTH, NUM_ROWS = 40, 45


def eval_model_on(mesh):
    """A model of random weights that says nothing but letters, so that some answers are right."""
    model = tiny({"model.pattern": "LG"}).model
    params = random_params(model)
    letters = np.isin(np.arange(model.vocab_size), VALUES)[:, None]
    params["embed"] = jax.device_put(np.asarray(params["embed"]) * letters, params["embed"].sharding)
    return EvalModel(model, params, BLOCKED._replace(kernel="reference"), mesh, ByteTokenizer())


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2, "context": 2}])
def test_accuracy_is_the_share_of_answers_that_have_the_greatest_logit(sizes, monkeypatch):
    monkeypatch.setattr(recall, "TOKENS", 8 * LENGTH)  # six batches or three, and the last of them is not full
    spec = Spec(Task("recall", 4), LENGTH, NUM_ROWS * LENGTH - 1)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        (record,) = recall.records_of(eval_model_on(mesh), spec)
    rows = SyntheticSequences(spec.documents, LENGTH, None).read([(i, 0, LENGTH) for i in range(NUM_ROWS)])
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        eval_model, placed = eval_model_on(mesh), on_mesh(batch)
        arrays = (placed["tokens"], placed["positions"], placed["segments"])
        x_BTD = jax.jit(apply, static_argnums=(0, 5))(eval_model.model, eval_model.params, *arrays, eval_model.execution)
        said_BT = np.asarray(logits(eval_model.model, eval_model.params, x_BTD)).argmax(-1)
    counts = batch["weights"] > 0
    right = (said_BT == batch["targets"]) & counts
    assert 0 < right.sum() < counts.sum() and record["by_row"] == list(right.sum(1) / counts.sum(1))
    known = {"task": spec.documents.fingerprint(), "length": LENGTH, "answers": counts.sum()}
    assert record == known | {"accuracy": right.sum() / counts.sum(), "by_row": record["by_row"]}
