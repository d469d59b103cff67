"""Preferences: how likely the held-out pairs of completions are, and indicators of over-optimisation.

A model that is trained on preferences for too long makes both completions less likely, while their difference still grows. The
study of arXiv 2410.11677, section 5, has two warnings, of the distribution over the next token in the chosen completions: the
entropy of the ten most likely tokens, H = -sum p log2 p, turns from rising to falling (dpo, ipo), or their probability, the
sum of p, falls (hinge). Whether p sums to one over the ten is not said there, so the entropy is measured both ways.
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
from hybrid_attn.evals.records import NAME, SHARE, SIZE, mean_of, number
from hybrid_attn.evals.samples import Sample, TooLongError
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution
from hybrid_attn.model.documents import halves_of_pairs
from hybrid_attn.model.transformer import losses_and_most_likely
from hybrid_attn.parallel.mesh import batch_shards

MOST_LIKELY = 10  # tokens


def indicators(log_probs_BTk: jax.Array) -> dict[str, jax.Array]:
    """Of the log-probabilities of the most likely tokens, largest first: entropies in bits and probability, each [B, T]."""

    def entropy(log_probs_BTk):
        return -(jnp.exp(log_probs_BTk) * log_probs_BTk).sum(-1) / jnp.log(2)

    log_mass_BT = jax.nn.logsumexp(log_probs_BTk, -1)
    return {
        "entropy_bits": entropy(log_probs_BTk),
        "renormalised_entropy_bits": entropy(log_probs_BTk - log_mass_BT[..., None]),
        "mass": jnp.exp(log_mass_BT),
    }


def record_of(eval_model: EvalModel, spec: Spec) -> dict:
    """Means over the pairs in sequences of `spec`, whose documents are pairs.

    `chosen` and `rejected` are the log-probabilities of the completions in nats, sums over their tokens; `margin` is the mean
    difference, and `accuracy` the share of pairs whose chosen completion is more likely by a token's mean. The indicators are
    means over the tokens of the chosen completions.
    """
    sequences = PackedSequences(spec.documents, spec.length, None, eval_model.tokenizer.byte_lengths)
    count, batch_size = -(-spec.tokens // spec.length), batch_shards(eval_model.mesh)
    score = functools.partial(_sums, eval_model.model, eval_model.execution, eval_model.params)
    batches = heldout_batches(sequences, count, batch_size, eval_model.mesh)
    sums = jax.tree.map(lambda *x: np.sum(x, dtype=np.float64), *(jax.device_get(score(batch)) for batch in batches))
    check_finite([*sums.values()], "the log-probability of a completion")
    pairs, tokens = sums["pairs"], sums["tokens"]
    record = {"length": spec.length, "pairs": int(pairs), "tokens": int(tokens)}
    record |= {name: float(sums[name] / pairs) for name in ("chosen", "rejected", "accuracy")}
    means = {name: float(sums[name] / tokens) for name in ("entropy_bits", "renormalised_entropy_bits", "mass")}
    return record | {"margin": record["chosen"] - record["rejected"]} | means


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model: Model, execution: Execution, params: dict, batch: dict) -> dict[str, jax.Array]:
    """Sums over the pairs of a batch, and over the tokens of their chosen completions, on every device."""
    nll_BT, best_BTk = losses_and_most_likely(model, params, batch, execution, min(MOST_LIKELY, model.vocab_size))
    weights_BT, segments_BT = batch["weights"], batch["segments"]
    chosen, rejected = halves_of_pairs(-nll_BT * weights_BT, segments_BT)
    tokens = halves_of_pairs(weights_BT, segments_BT)
    is_pair, means = tokens[1] > 0, [x / jnp.maximum(n, 1.0) for x, n in zip((chosen, rejected), tokens, strict=True)]
    sums = {"pairs": is_pair, "chosen": chosen, "rejected": rejected, "accuracy": is_pair & (means[0] > means[1])}
    of_chosen_BT = weights_BT * (segments_BT % 2 == 1)
    sums |= {name: x_BT * of_chosen_BT for name, x_BT in indicators(best_BTk).items()} | {"tokens": of_chosen_BT}
    return jax.tree.map(lambda x: jax.reshard(x.sum(dtype=jnp.float32), P()), sums)


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    spec = Spec(context.pairs[unit.part], unit.length, settings.tokens)
    return evaluation.measured_of_source(unit, [record_of(context.eval_model, spec)])


def check_fits(context: EvalContext, settings: Settings, unit: Unit) -> None:
    """TooLongError where a pair is longer than a sequence, and ValueError where the mesh does not split such a sequence."""
    evaluation.check_sequence(context, settings, unit)
    longest = int(context.pairs[unit.part].joint_lengths().max())
    if longest > unit.length:
        raise TooLongError(
            f"{unit.eval} of {unit.part}: its longest pair has {longest:,} tokens, and {unit.length:,} are asked for"
        )


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    for r in records:
        of = r["source"]
        yield Line("chosen completion more likely", of, f"{r['accuracy']:.0%}", number=f"{r['pairs']:,} pairs")
        yield Line("  log-probability, chosen less rejected (nats)", of, f"{r['margin']:+.3f}")
        yield Line("  log-probability of the chosen (nats)", of, f"{r['chosen']:.3f}")
        yield Line(
            "  entropy of its 10 most likely tokens (bits)", of, f"{r['entropy_bits']:.3f}", number=f"mass {r['mass']:.3f}"
        )


EVALUATION = Evaluation(
    name="preferences",
    parts=lambda context, settings: list(context.pairs),
    measure=measure,
    fields={
        **{"source": NAME, "length": SIZE, "pairs": SIZE, "tokens": SIZE, "accuracy": SHARE, "mass": number(0, 1.001)},
        **dict.fromkeys(("chosen", "rejected", "margin", "entropy_bits", "renormalised_entropy_bits"), number()),
    },
    headline=Headline(
        lambda records: mean_of(records, "accuracy"), "preferences_chosen_more_likely_share", "chosen more likely {:.0%}", True
    ),
    report=report_of("preferences"),
    lines=lines,
    section_order=8,
    flags=("tokens", "heldout"),
    empty=lambda context: ("pairs", "the model's sources hold none out"),
    check_fits=check_fits,
)
