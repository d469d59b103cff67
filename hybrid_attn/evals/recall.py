"""Recall: the share of answers in a synthetic task's held-out sequences that are the likeliest token of the model.

Only bytes have such tasks: a vocabulary of a few hundred words, so that all logits of a batch take little memory.
"""

import functools
import re
import string
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import HOPS, Model
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.data.synthetic import KEYS, VALUES, SyntheticSequences
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import evaluation
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, first_total, report_of
from hybrid_attn.evals.records import NAME, SHARE, SIZE, list_of
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution, apply, logits
from hybrid_attn.parallel.mesh import batch_shards

TASK = re.compile(r"(\w+)(?: of (\d{1,4}) pairs)?(?: in [0-9a-f]+)?")  # its name, its number of pairs, and its text
SYMBOLS = {"copy": len(KEYS) + len(VALUES), "needle": len(string.digits)}  # of which an answer is one
TOKENS = 8192  # of a batch on each of its shards: their logits all exist at once


def records_of(eval_model: EvalModel, spec: Spec) -> Iterator[dict]:
    """One record: the share of the answers in `spec.tokens` tokens that is right, in all and by sequence of `spec.length`.

    The sequence holds the right answers, so that one does not suffer from another.
    """
    sequences = SyntheticSequences(spec.documents, spec.length, None)
    batch_size = max(1, TOKENS // spec.length) * batch_shards(eval_model.mesh)
    number = -(-spec.tokens // spec.length)
    right = functools.partial(_right, eval_model.model, eval_model.execution, eval_model.params)
    batches = heldout_batches(sequences, number, batch_size, eval_model.mesh)
    sums = np.concatenate([jax.device_get(right(batch)) for batch in batches], 1)[:, :number]
    check_finite(sums, "a logit of an answer")
    right_B, answers_B, _ = sums.astype(int)
    shares = {"accuracy": right_B.sum() / answers_B.sum(), "by_row": (right_B / answers_B).tolist()}
    yield {"task": spec.documents.fingerprint(), "length": spec.length, "answers": int(answers_B.sum()), **shares}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(model: Model, execution: Execution, params: dict, batch: dict):
    """Right answers, answers, and the log-sum-exp over the answers' logits, which shows NaN, of each sequence: [3, B]."""
    x_BTD = apply(model, params, batch["tokens"], batch["positions"], batch["segments"], execution)
    logits_BTV, weights_BT = logits(model, params, x_BTD, execution.dot), batch["weights"]
    right_BT = jnp.argmax(logits_BTV, -1) == batch["targets"]
    lse_BT = jax.nn.logsumexp(logits_BTV, -1)
    counts = [(weights_BT * right_BT).sum(1), weights_BT.sum(1), jnp.where(weights_BT > 0, lse_BT, 0).sum(1)]
    return jax.reshard(jnp.stack(counts), P())


def guess(task: str) -> float | None:
    """The share of answers that a guess has right in a task, "recall of 4 pairs": among what its sequence names, or letters."""
    match = TASK.fullmatch(task)
    name, pairs = match.groups() if match else (None, None)
    if name in SYMBOLS:
        return 1 / SYMBOLS[name]
    if not pairs or not int(pairs):
        return None
    return {"recall": 1 / int(pairs), "mqar": 1 / int(pairs), "tracking": 1 / (int(pairs) * (HOPS + 1))}.get(name)


def parts(context: EvalContext, settings: Settings) -> tuple[str, ...]:
    return tuple(context.tasks) if isinstance(context.eval_model.tokenizer, ByteTokenizer) else ()


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    spec = Spec(context.tasks[unit.part], unit.length, settings.tokens)
    return evaluation.measured_of_source(unit, records_of(context.eval_model, spec))


def empty(context: EvalContext) -> tuple[str, str]:
    if isinstance(context.eval_model.tokenizer, ByteTokenizer):
        return "tasks", "no source of this run is a task"
    return "tasks", "the tasks are in bytes, and this model has another tokenizer"


def check_fits(context: EvalContext, settings: Settings, unit: Unit) -> None:
    evaluation.check_sequence(context, settings, unit)
    evaluation.check_task_fits(unit, context.tasks[unit.part])


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    for record in records:
        yield Line("recall", record["source"], f"{record['accuracy']:.1%}", number=f"{record['answers']:,} answers")
        if (share := guess(record["task"])) is not None:
            yield Line("  chance", record["source"], f"{share:.1%}")


EVALUATION = Evaluation(
    name="recall",
    parts=parts,
    measure=measure,
    fields={"source": NAME, "task": NAME, "length": SIZE, "answers": SIZE, "accuracy": SHARE, "by_row": list_of(SHARE, 1)},
    headline=Headline(first_total("accuracy"), "recall_accuracy_share", "{:.1%} right", higher_is_better=True),
    report=report_of("recall"),
    lines=lines,
    section_order=3,
    in_quick_suite=True,
    all_logits=True,
    empty=empty,
    check_fits=check_fits,
)
