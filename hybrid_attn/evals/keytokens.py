"""Key tokens: the loss on those tokens that only the far context makes likely.

LongPPL (arXiv 2410.23771): a token is key where a model finds it likely in its whole context (loss below 2 nats) and much
less so in a short one (more than 2 nats above that). Here that model is the evaluated one. The short contexts of
neighbours are shared: windows that slide by a quarter of them.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.evals import evaluation
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, first_total, report_of
from hybrid_attn.evals.records import ANY, COUNT, NAME, SIZE
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution, losses
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT, batch_shards

GAIN = 2.0  # nats that the far context takes off a key token's loss, at least
LIKELY = 2.0  # nats, which a key token's loss in the whole context is below
SLIDE = 4  # windows for each short context


def records_of(eval_model: EvalModel, spec: Spec, short: int) -> Iterator[dict]:
    """One record: of the tokens with `short` tokens before them in a sequence, the number that are key, and their loss.

    Without key tokens `loss` (nats) and `perplexity` are None. Each model finds key tokens of its own.
    """
    if not 0 < short < spec.length:
        raise ValueError(f"short={short} is no part of sequences of {spec.length} tokens; use 1 to {spec.length - 1}")
    sequences = PackedSequences(spec.documents, spec.length, None, eval_model.tokenizer.byte_lengths)
    slices = 2 * eval_model.mesh.shape["context"]  # a mesh may want two for each of its shards
    size = -(-(short + max(1, short // SLIDE)) // slices) * slices
    number, batch_size = -(-spec.tokens // spec.length), batch_shards(eval_model.mesh)
    nll_of = functools.partial(_token_losses, eval_model.model, eval_model.execution, eval_model.params)
    sums = np.zeros(4)
    for batch in heldout_batches(sequences, number, batch_size, eval_model.mesh):
        nll_BT = nll_of(batch)
        for first in range(0, spec.length - short, size - short):
            short_BT = nll_of(window(size, first, batch))
            sums += jax.device_get(_sums(short, first, nll_BT, batch["weights"], short_BT))
    check_finite(sums, "the loss")
    nll, keys, tokens, _ = sums
    loss = float(nll / keys) if keys else None
    record = {"length": spec.length, "short": short, "tokens": int(tokens), "key_tokens": int(keys), "loss": loss}
    yield record | {"perplexity": None if loss is None else math.exp(loss)}


@functools.partial(jax.jit, static_argnums=0)
def window(size: int, first: int, batch: dict) -> dict:
    """The tokens [first, first + size) of each sequence: a document that began before them begins at the first of them."""
    arrays = {name: _slice(x_BT, first, size) for name, x_BT in batch.items()}
    segments_BT, positions_BT = arrays["segments"], arrays["positions"]
    arrays["positions"] = positions_BT - jnp.where(segments_BT == segments_BT[:, :1], positions_BT[:, :1], 0)
    return {name: jax.reshard(x_BT, TOKENS_BT) for name, x_BT in arrays.items()}


def _slice(x_BT: jax.Array, first: int, size: int) -> jax.Array:
    """The tokens [first, first + size) on every context shard; zeros, which are padding, where the sequences have ended."""
    padded_BT = jnp.pad(jax.reshard(x_BT, P(BATCH, None)), [(0, 0), (0, size)])
    return jax.lax.dynamic_slice_in_dim(padded_BT, first, size, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_losses(model: Model, execution: Execution, params: dict, batch: dict) -> jax.Array:
    return losses(model, params, batch, execution)[0]


@functools.partial(jax.jit, static_argnums=0)
def _sums(short: int, first, nll_BT, weights_BT, short_BT) -> jax.Array:
    """Over the tokens after the first `short` of a window at `first`: loss of the key ones, their number, that of all.

    The last entry sums both losses of all tokens, so that NaN is seen: a token whose loss is NaN never counts as a key token.
    """
    short_BT = jax.reshard(short_BT, P(BATCH, None))[:, short:]
    nll_BT, weights_BT = (_slice(x_BT, first + short, short_BT.shape[1]) for x_BT in (nll_BT, weights_BT))
    keys_BT = weights_BT * ((short_BT - nll_BT > GAIN) & (nll_BT < LIKELY))
    all_BT = jnp.where(weights_BT > 0, nll_BT + short_BT, 0)
    return jnp.stack([(keys_BT * nll_BT).sum(), keys_BT.sum(), weights_BT.sum(), all_BT.sum()])


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    """The short context is half of what a sequence of training had, and half of a shorter sequence."""
    spec = Spec(context.heldout[unit.part], unit.length, settings.tokens)
    return evaluation.measured_of_source(unit, records_of(context.eval_model, spec, min(unit.length, context.trained) // 2))


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    for record in records:
        if record["loss"] is not None:
            number = f"{record['key_tokens']:,} tokens"
            yield Line("loss of key tokens (nats)", record["source"], f"{record['loss']:.3f}", number=number)


EVALUATION = Evaluation(
    name="key_tokens",
    parts=evaluation.texts,
    measure=measure,
    fields={
        **{"source": NAME, "length": SIZE, "short": SIZE, "key_tokens": COUNT, "tokens": COUNT},
        **{"loss": ANY, "perplexity": ANY},
    },
    headline=Headline(first_total("loss"), "key_tokens_loss_nats", "loss {:.3f} nats", higher_is_better=False),
    report=report_of("losses", "KEY_TOKENS_REPORT"),
    lines=lines,
    section_order=4,
    flags=("tokens", "heldout"),
    sequences=lambda settings, length: evaluation.sequences_of_tokens(settings, length) * (1 + SLIDE),
    empty=evaluation.without_documents,
    check_fits=evaluation.check_sequence,
)
