"""Key tokens: the loss on those tokens that only the far context makes likely.

LongPPL (arXiv 2410.23771): a token is key where a model finds it likely in its whole context (loss below 2 nats) and much
less so in a short one (more than 2 nats above that). Here that model is the one whose loss is told. The short contexts of
neighbours are shared: windows that slide by a quarter of them.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.data.packed import PackedSequences, padding_arrays
from hybrid_attn.data.pipeline import Slice, heldout_batches
from hybrid_attn.evals.subject import Spec, Subject, check_finite
from hybrid_attn.model import Run, losses
from hybrid_attn.parallel.mesh import BATCH

GAIN = 2.0  # nats that the far context takes off a key token's loss, at least
LIKELY = 2.0  # nats, which a key token's loss in the whole context is below
SLIDE = 4  # windows for each short context


def run(subject: Subject, spec: Spec, short: int) -> Iterator[dict]:
    """One record: of the tokens with `short` tokens before them in their row, how many are key to `subject`, and their loss.

    Without key tokens `loss` (nats) and `perplexity` are None. Each model finds key tokens of its own.
    """
    if not 0 < short < spec.length:
        raise ValueError(f"short={short} is no part of rows of {spec.length} tokens; use 1 to {spec.length - 1}")
    found = np.zeros(4)
    for whole, windows in _batches(subject, spec, short):
        nll_BT = _losses(subject, whole)
        for first, window in windows:
            found += jax.device_get(_sums(short, first, nll_BT, whole["weights"], _losses(subject, window)))
    check_finite(found, "the loss")
    nll, keys, tokens, _ = found
    loss = float(nll / keys) if keys else None
    record = {"length": spec.length, "short": short, "tokens": int(tokens), "key_tokens": int(keys), "loss": loss}
    yield record | {"perplexity": None if loss is None else math.exp(loss)}


class Window:
    """Rows of the tokens [first, first + seq_len) of `rows`: a document that begins before `first` begins there."""

    def __init__(self, rows: PackedSequences, first: int, seq_len: int):
        self.first, self.seq_len = first, seq_len
        self._rows = rows

    def spread(self, wanted: int) -> list[int]:
        """The numbers of the rows that `rows` gives."""
        return self._rows.spread(wanted)

    def read(self, slices: Sequence[Slice]) -> list[dict[str, np.ndarray]]:
        """As `PackedSequences.read` gives them; padding where the rows have ended."""
        return [self._slice(index, start, stop) for index, start, stop in slices]

    def _slice(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        here, end = self.first + start, min(self.first + stop, self._rows.seq_len)
        if end <= here:
            return padding_arrays(stop - start)
        edge, row = self._rows.read([(index, self.first, self.first + 1), (index, here, end)])
        row["positions"] = row["positions"] - np.where(row["segments"] == edge["segments"], edge["positions"], 0)
        padding = padding_arrays(stop - start - (end - here))
        return {name: np.concatenate([row[name], x]) for name, x in padding.items()}


def _batches(subject: Subject, spec: Spec, short: int) -> Iterator[tuple[dict, list[tuple[int, dict]]]]:
    """Batches of whole rows, each with the windows of the same rows and where they begin."""
    rows = PackedSequences(spec.documents, spec.length, None, subject.tokenizer.byte_lengths)
    slices = 2 * subject.mesh.shape["context"]  # a mesh may want two for each of its shards
    size = -(-(short + max(1, short // SLIDE)) // slices) * slices
    windows = [Window(rows, first, size) for first in range(0, spec.length - short, size - short)]
    batch = math.prod(subject.mesh.shape[axis] for axis in BATCH)
    batches = (heldout_batches(x, -(-spec.tokens // spec.length), batch, subject.mesh) for x in (rows, *windows))
    for whole, *parts in zip(*batches, strict=True):
        yield whole, [(window.first, arrays) for window, arrays in zip(windows, parts, strict=True)]


def _losses(subject: Subject, batch: dict) -> jax.Array:
    return _token_losses(subject.model, subject.run, subject.params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_losses(model: Model, run: Run, params: dict, batch: dict) -> jax.Array:
    return losses(model, params, batch, run)[0]


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
