"""Recall: the share of answers in a synthetic task's held-out rows that are the likeliest token of the model.

Only bytes have such tasks: a vocabulary of a few hundred words, so that all logits of a batch take little memory.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.data.synthetic import SyntheticSequences
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals.evaluation import Evaluation, Headline, check_row, check_task_fits, first_total, measured_of_source
from hybrid_attn.evals.fields import NAME, SHARE, SIZE, list_of
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution, apply, logits
from hybrid_attn.parallel.mesh import BATCH

TOKENS = 8192  # of a batch on each of its shards: their logits all exist at once


def records_of(eval_model: EvalModel, spec: Spec) -> Iterator[dict]:
    """One record: of the answers in `spec.tokens` tokens of rows of `spec.length` the share that is right, in all and by row.

    The row holds the right answers, so that one does not suffer from another.
    """
    rows = SyntheticSequences(spec.documents, spec.length, None)
    batch = max(1, TOKENS // spec.length) * math.prod(eval_model.mesh.shape[axis] for axis in BATCH)
    number = -(-spec.tokens // spec.length)
    batches = [
        jax.device_get(_right(eval_model.model, eval_model.execution, eval_model.params, arrays))
        for arrays in heldout_batches(rows, number, batch, eval_model.mesh)
    ]
    sums = np.concatenate(batches, 1)[:, :number]
    check_finite(sums, "a logit of an answer")
    right_B, answers_B, _ = sums.astype(int)
    shares = {"accuracy": right_B.sum() / answers_B.sum(), "by_row": (right_B / answers_B).tolist()}
    yield {"task": spec.documents.fingerprint(), "length": spec.length, "answers": int(answers_B.sum()), **shares}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(model: Model, execution: Execution, params: dict, batch: dict):
    """Right answers, answers, and the log-sum-exp over the answers' logits, which shows NaN, of each row: [3, B]."""
    x_BTD = apply(model, params, batch["tokens"], batch["positions"], batch["segments"], execution)
    logits_BTV, weights_BT = logits(model, params, x_BTD, execution.dot), batch["weights"]
    right_BT = jnp.argmax(logits_BTV, -1) == batch["targets"]
    lse_BT = jax.nn.logsumexp(logits_BTV, -1)
    counts = [(weights_BT * right_BT).sum(1), weights_BT.sum(1), jnp.where(weights_BT > 0, lse_BT, 0).sum(1)]
    return jax.reshard(jnp.stack(counts), P())


def parts(context: EvalContext, settings: Settings) -> tuple[str, ...]:
    return tuple(context.tasks) if isinstance(context.eval_model.tokenizer, ByteTokenizer) else ()


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    spec = Spec(context.tasks[unit.part], unit.length, settings.tokens)
    return measured_of_source(unit, records_of(context.eval_model, spec))


def empty(context: EvalContext) -> tuple[str, str]:
    if isinstance(context.eval_model.tokenizer, ByteTokenizer):
        return "tasks", "no source of this run is a task"
    return "tasks", "the tasks are in bytes, and this model has another tokenizer"


def check_fits(context: EvalContext, settings: Settings, unit: Unit) -> None:
    check_row(context, settings, unit)
    check_task_fits(unit, context.tasks[unit.part])


def section(runs: Sequence) -> list:
    from hybrid_attn.evals.report import questions  # matplotlib takes a second to import

    return questions.recall(runs)


EVALUATION = Evaluation(
    name="recall",
    parts=parts,
    measure=measure,
    fields={
        **{"source": NAME, "task": NAME, "length": SIZE, "answers": SIZE, "accuracy": SHARE},
        "by_row": list_of(SHARE, 1),
    },
    headline=Headline(first_total("accuracy"), "recall_accuracy_share", "{:.1%} right", higher_is_better=True),
    section=section,
    section_order=2,
    in_quick_suite=True,
    all_logits=True,
    empty=empty,
    check_fits=check_fits,
)
