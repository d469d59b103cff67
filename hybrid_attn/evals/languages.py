"""Languages: the loss and the accuracy of the next token in each held-out source, one for each language, and their means.

The loss of a token depends on how a tokenizer cuts a language, so bits per byte are beside it; these depend on the script. Both
compare models on the same language. The mean over the languages gives each the same weight, whatever its number of tokens.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.evals import evaluation
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, report_of
from hybrid_attn.evals.records import ANY, NAME, SHARE, SIZE, list_of, mean_of, number
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution
from hybrid_attn.model.loss import bits_per_byte
from hybrid_attn.model.transformer import losses_and_most_likely
from hybrid_attn.parallel.mesh import batch_shards

ROUNDING = 1e-4  # nats by which two computations of a token's log-probability may differ


def record_of(eval_model: EvalModel, spec: Spec) -> dict:
    """Loss in nats, bits per byte, and the share of tokens that are the most likely ones after those before, in `spec`.

    Where two tokens are equally likely and no other is likelier, neither is right: a model that finds all tokens equally likely
    has an accuracy of 0. `by_row` are the shares of single sequences.
    """
    sequences = PackedSequences(spec.documents, spec.length, None, eval_model.tokenizer.byte_lengths)
    count, batch_size = -(-spec.tokens // spec.length), batch_shards(eval_model.mesh)
    score = functools.partial(_sums, eval_model.model, eval_model.execution, eval_model.params)
    batches = heldout_batches(sequences, count, batch_size, eval_model.mesh)
    sums = np.concatenate([jax.device_get(score(batch)) for batch in batches], 1, dtype=np.float64)
    check_finite(sums, "the loss")
    nll, right, tokens, num_bytes = sums.sum(1)
    _, right_B, tokens_B, _ = sums[:, sums[2] > 0]
    bits = bits_per_byte(nll, num_bytes) if num_bytes else None
    record = {"length": spec.length, "tokens": int(tokens), "loss": nll / tokens, "bits_per_byte": bits}
    return record | {"accuracy": right / tokens, "by_row": (right_B / tokens_B).tolist()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model: Model, execution: Execution, params: dict, batch: dict) -> jax.Array:
    """Losses, tokens that are the most likely ones, tokens and bytes of each sequence, [4, B], on every device."""
    nll_BT, best_BT2 = losses_and_most_likely(model, params, batch, execution, 2)
    weights_BT, (first_BT, second_BT) = batch["weights"], jnp.moveaxis(best_BT2, -1, 0)
    is_best_BT = (-nll_BT >= first_BT - ROUNDING) & (second_BT < first_BT - ROUNDING)
    sums = [x_BT.sum(1) for x_BT in (weights_BT * nll_BT, weights_BT * is_best_BT, weights_BT, batch["bytes"])]
    return jax.reshard(jnp.array(sums), P())


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    spec = Spec(context.heldout[unit.part], unit.length, settings.tokens)
    return evaluation.measured_of_source(unit, [record_of(context.eval_model, spec)])


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    """Each language, and the mean if there are several."""
    for r in records:
        yield _line(r["source"], r["accuracy"], r["bits_per_byte"], f"{r['tokens']:,} tokens")
    if len(records) > 1:
        means = (mean_of(records, name) for name in ("accuracy", "bits_per_byte"))
        yield _line("mean", *means, f"{len(records)} sources")


def _line(source: str, accuracy: float, bits: float | None, what: str) -> Line:
    return Line("next token right", source, f"{accuracy:.1%}", bits="" if bits is None else f"{bits:.3f}", number=what)


EVALUATION = Evaluation(
    name="languages",
    parts=evaluation.texts,
    measure=measure,
    fields={
        **{"source": NAME, "length": SIZE, "tokens": SIZE, "loss": number(0), "accuracy": SHARE},
        **{"bits_per_byte": ANY, "by_row": list_of(SHARE, 1)},
    },
    headline=Headline(
        lambda records: mean_of(records, "accuracy"), "languages_accuracy", "next token {:.1%}", higher_is_better=True
    ),
    report=report_of("languages"),
    lines=lines,
    section_order=3,
    flags=("tokens", "heldout"),
    empty=evaluation.without_documents,
    check_fits=evaluation.check_sequence,
)
