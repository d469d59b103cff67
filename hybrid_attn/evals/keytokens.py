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
from hybrid_attn.data.packed import PackedSequences, padding_arrays
from hybrid_attn.data.pipeline import Slice, heldout_batches
from hybrid_attn.evals.evaluation import (
    Baselines,
    Evaluation,
    Headline,
    Line,
    check_sequence,
    first_total,
    measured_of_source,
    sequences_of_tokens,
    texts,
    without_documents,
)
from hybrid_attn.evals.fields import ANY, COUNT, NAME, SIZE
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution, losses
from hybrid_attn.parallel.mesh import BATCH, batch_shards

GAIN = 2.0  # nats that the far context takes off a key token's loss, at least
LIKELY = 2.0  # nats, which a key token's loss in the whole context is below
SLIDE = 4  # windows for each short context


def records_of(eval_model: EvalModel, spec: Spec, short: int) -> Iterator[dict]:
    """One record: of the tokens with `short` tokens before them in a sequence, the number that are key, and their loss.

    Without key tokens `loss` (nats) and `perplexity` are None. Each model finds key tokens of its own.
    """
    if not 0 < short < spec.length:
        raise ValueError(f"short={short} is no part of sequences of {spec.length} tokens; use 1 to {spec.length - 1}")
    sums = np.zeros(4)
    for batch, windows in _batches(eval_model, spec, short):
        nll_BT = _losses(eval_model, batch)
        for first, window in windows:
            sums += jax.device_get(_sums(short, first, nll_BT, batch["weights"], _losses(eval_model, window)))
    check_finite(sums, "the loss")
    nll, keys, tokens, _ = sums
    loss = float(nll / keys) if keys else None
    record = {"length": spec.length, "short": short, "tokens": int(tokens), "key_tokens": int(keys), "loss": loss}
    yield record | {"perplexity": None if loss is None else math.exp(loss)}


class Window:
    """Sequences of the tokens [first, first + seq_len) of `sequences`: a document that begins before `first` begins there."""

    def __init__(self, sequences: PackedSequences, first: int, seq_len: int):
        self.first, self.seq_len = first, seq_len
        self._sequences = sequences

    def spread(self, number: int) -> list[int]:
        """The numbers of the sequences that `sequences` gives."""
        return self._sequences.spread(number)

    def read(self, slices: Sequence[Slice]) -> list[dict[str, np.ndarray]]:
        """As `PackedSequences.read` gives them; padding where the sequences have ended."""
        return [self._slice(index, start, stop) for index, start, stop in slices]

    def _slice(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        here, end = self.first + start, min(self.first + stop, self._sequences.seq_len)
        if end <= here:
            return padding_arrays(stop - start)
        edge, sequence = self._sequences.read([(index, self.first, self.first + 1), (index, here, end)])
        sequence["positions"] = sequence["positions"] - np.where(sequence["segments"] == edge["segments"], edge["positions"], 0)
        padding = padding_arrays(stop - start - (end - here))
        return {name: np.concatenate([sequence[name], x]) for name, x in padding.items()}


def _batches(eval_model: EvalModel, spec: Spec, short: int) -> Iterator[tuple[dict, list[tuple[int, dict]]]]:
    """Batches of full-length sequences, each with the windows of the same sequences and where they begin."""
    sequences = PackedSequences(spec.documents, spec.length, None, eval_model.tokenizer.byte_lengths)
    slices = 2 * eval_model.mesh.shape["context"]  # a mesh may want two for each of its shards
    size = -(-(short + max(1, short // SLIDE)) // slices) * slices
    windows = [Window(sequences, first, size) for first in range(0, spec.length - short, size - short)]
    batch_size = batch_shards(eval_model.mesh)
    batches = (heldout_batches(x, -(-spec.tokens // spec.length), batch_size, eval_model.mesh) for x in (sequences, *windows))
    for batch, *parts in zip(*batches, strict=True):
        yield batch, [(window.first, arrays) for window, arrays in zip(windows, parts, strict=True)]


def _losses(eval_model: EvalModel, batch: dict) -> jax.Array:
    return _token_losses(eval_model.model, eval_model.execution, eval_model.params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_losses(model: Model, execution: Execution, params: dict, batch: dict) -> jax.Array:
    return losses(model, params, batch, execution)[0]


@functools.partial(jax.jit, static_argnums=0)
def _sums(short: int, first, nll_BT, weights_BT, short_BT) -> jax.Array:
    """Over the tokens after the first `short` of a window at `first`: loss of the key ones, their number, that of all.

    The last entry sums both losses of all tokens, so that NaN is seen: a token whose loss is NaN never counts as a key token.
    """
    short_BT = jax.reshard(short_BT, P(BATCH, None))[:, short:]

    def of_window(x_BT):
        padded_BT = jnp.pad(jax.reshard(x_BT, P(BATCH, None)), [(0, 0), (0, short_BT.shape[1])])
        return jax.lax.dynamic_slice_in_dim(padded_BT, first + short, short_BT.shape[1], 1)

    nll_BT, weights_BT = map(of_window, (nll_BT, weights_BT))
    keys_BT = weights_BT * ((short_BT - nll_BT > GAIN) & (nll_BT < LIKELY))
    all_BT = jnp.where(weights_BT > 0, nll_BT + short_BT, 0)
    return jnp.stack([(keys_BT * nll_BT).sum(), keys_BT.sum(), weights_BT.sum(), all_BT.sum()])


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    """The short context is half of what a sequence of training had, and half of a shorter sequence."""
    spec = Spec(context.heldout[unit.part], unit.length, settings.tokens)
    return measured_of_source(unit, records_of(context.eval_model, spec, min(unit.length, context.trained) // 2))


def sequences(settings: Settings, length: int) -> int:
    return sequences_of_tokens(settings, length) * (1 + SLIDE)


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    for record in records:
        if record["loss"] is not None:
            number = f"{record['key_tokens']:,} tokens"
            yield Line("loss of key tokens (nats)", record["source"], f"{record['loss']:.3f}", number=number)


def report():
    from hybrid_attn.evals.report import losses  # it imports the table of evaluations, and matplotlib

    return losses.KEY_TOKENS_REPORT


EVALUATION = Evaluation(
    name="key_tokens",
    parts=texts,
    measure=measure,
    fields={
        **{"source": NAME, "length": SIZE, "short": SIZE, "key_tokens": COUNT, "tokens": COUNT},
        **{"loss": ANY, "perplexity": ANY},
    },
    headline=Headline(first_total("loss"), "key_tokens_loss_nats", "loss {:.3f} nats", higher_is_better=False),
    report=report,
    lines=lines,
    section_order=4,
    flags=("tokens", "heldout"),
    sequences=sequences,
    empty=without_documents,
    check_fits=check_sequence,
)
