"""The byte bigram: the simplest model that a trained one must beat."""

import numpy as np

from hybrid_attn.data.documents import Documents
from hybrid_attn.data.rows import Rows
from hybrid_attn.evals.subject import Spec
from hybrid_attn.model.loss import bits_per_byte

MOST_WORDS = 1024  # a table of pairs beyond that is no small baseline


def log_probabilities(documents: Documents, vocab_size: int) -> np.ndarray:
    """Log-probability of each word after each word [vocab_size, vocab_size], from pairs counted in `documents` plus one."""
    tokens = documents.tokens.astype(np.int64)
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    pairs = np.delete(pairs, documents.offsets[1:-1] - 1)  # from one document to the next
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size) + 1.0
    return np.log(counts / counts.sum(1, keepdims=True))


def score(log_probs: np.ndarray, spec: Spec, byte_lengths: np.ndarray) -> float:
    """Bits per byte of the tokens that `position.run` scores under the same `spec`."""
    rows = Rows(spec.documents, spec.length, None, byte_lengths)
    nll = num_bytes = 0.0
    for i in range(min(-(-spec.tokens // spec.length), len(rows))):
        row = rows[i]
        nll -= float((row["weights"] * log_probs[row["tokens"], row["targets"]]).sum())
        num_bytes += float(row["bytes"])
    return bits_per_byte(nll, num_bytes)
