"""The byte bigram: the simplest model that a trained one must beat."""

from collections.abc import Iterator

import numpy as np

from hybrid_attn.data.documents import Documents
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.evals.evaluation import BaselineModel
from hybrid_attn.evals.records import NAME, SIZE, number
from hybrid_attn.evals.types import EvalContext, Settings, Spec
from hybrid_attn.model.loss import bits_per_byte

MAX_VOCABULARY = 1024  # tokens; a larger table of pairs is no small baseline
READ_TOKENS = 2**22  # at a time
MAX_TOKENS = 2**28  # counted: more than a table of pairs needs, and read within a minute


def log_probabilities(documents: Documents, vocab_size: int) -> np.ndarray:
    """Log-probability of each token after each token [vocab_size, vocab_size], from pairs counted in `documents` plus one.

    Of a large corpus only the first documents are counted, those that begin within `MAX_TOKENS`.
    """
    counts = np.ones(vocab_size**2)
    ends = np.cumsum(documents.lengths)
    counted = np.count_nonzero(ends - documents.lengths < MAX_TOKENS)
    groups = ends[:counted] // READ_TOKENS
    for group in np.split(np.arange(counted), np.flatnonzero(np.diff(groups)) + 1):
        pieces = documents.read((i, 0, documents.lengths[i]) for i in group)
        pairs = [piece[:-1].astype(np.int64) * vocab_size + piece[1:] for piece in pieces]
        counts += np.bincount(np.concatenate(pairs), minlength=vocab_size**2)
    counts = counts.reshape(vocab_size, vocab_size)
    return np.log(counts / counts.sum(1, keepdims=True))


def score(log_probs: np.ndarray, spec: Spec, byte_lengths: np.ndarray) -> float:
    """Bits per byte of the tokens that `position.records_of` scores under the same `spec`."""
    sequences = PackedSequences(spec.documents, spec.length, None, byte_lengths)
    nll = num_bytes = 0.0
    for i in sequences.spread(-(-spec.tokens // spec.length)):
        sequence = sequences[i]
        nll -= float((sequence["weights"] * log_probs[sequence["tokens"], sequence["targets"]]).sum())
        num_bytes += float(sequence["bytes"].sum())
    return bits_per_byte(nll, num_bytes)


def records(context: EvalContext, settings: Settings) -> Iterator[dict]:
    """The bits per byte of each source's held-out documents; of a vocabulary above `MAX_VOCABULARY` none."""
    tokenizer = context.eval_model.tokenizer
    if tokenizer.vocab_size > MAX_VOCABULARY:
        return
    for source, training in context.training.items():
        log_probs = log_probabilities(training, tokenizer.vocab_size)
        spec = Spec(context.heldout[source], context.trained, settings.tokens)
        bits = score(log_probs, spec, tokenizer.byte_lengths)
        yield {"eval": "bigram", "source": source, "length": context.trained, "bits_per_byte": bits}


BASELINE = BaselineModel("bigram", {"source": NAME, "length": SIZE, "bits_per_byte": number()}, records)
