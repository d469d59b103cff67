"""Loss by position: what a token gains from the tokens of its document before it."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.evals import bigram, evaluation
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, first_total, report_of
from hybrid_attn.evals.records import ANY, COUNT, NAME, SIZE, grouped, is_total, part
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution, losses
from hybrid_attn.model.loss import bits_per_byte
from hybrid_attn.parallel.mesh import BATCH, batch_shards, spec_of

BIGRAM_PARTS = ("recall", "rest")
FIRST_EDGE = 16  # tokens; the edges after it double


def records_of(eval_model: EvalModel, spec: Spec) -> Iterator[dict]:
    """One record per bucket of positions, [first, end) tokens into the document within its sequence, then one for all.

    Losses are nats per token, and bits per byte over the UTF-8 bytes of the scored tokens; `stderr` is the loss' standard
    error over sequences, where there are two or more, for tokens of a sequence are not independent. Records of repeated bigrams
    ("recall", see `recalled`) and of the other tokens ("rest") come last, by bucket and in all. The record of all tokens has
    the mean loss of each sequence, too.
    """
    sequences = PackedSequences(spec.documents, spec.length, None, eval_model.tokenizer.byte_lengths)
    edges = bucket_edges(spec.length)
    number, batch_size = -(-spec.tokens // spec.length), batch_shards(eval_model.mesh)
    score = functools.partial(_score, eval_model.model, eval_model.execution, edges, eval_model.params)
    batches = heldout_batches(sequences, number, batch_size, eval_model.mesh)
    sums = np.concatenate([jax.device_get(score(batch)) for batch in batches], -1).astype(float)
    check_finite(sums, "the loss")
    *buckets, total = _records(spec.length, edges, sums.sum(0), {})
    nll_B, count_B, _ = sums.sum((0, 2))
    yield from (*buckets, total | {"by_row": (nll_B[count_B > 0] / count_B[count_B > 0]).tolist()})
    for name, of_part in zip(BIGRAM_PARTS, sums, strict=True):
        yield from _records(spec.length, edges, of_part, {"part": name})


def _records(length: int, edges: tuple[int, ...], sums, names: dict) -> Iterator[dict]:
    """Of `sums` [3, buckets, sequences]."""
    buckets = [{"first": first, "end": end} for first, end in itertools.pairwise(edges)]
    for bucket, (nll_B, count_B, bytes_B) in zip((*buckets, {}), (*sums.swapaxes(0, 1), sums.sum(1)), strict=True):
        if count := count_B.sum():
            record = {"length": length, **bucket, **names, "tokens": int(count), "loss": nll_B.sum() / count}
            bits = bits_per_byte(nll_B.sum(), bytes_B.sum()) if bytes_B.any() else None
            spread = {"stderr": _stderr(nll_B, count_B)} if (count_B > 0).sum() > 1 else {}
            yield record | spread | {"bits_per_byte": bits}


def _stderr(nll_B, count_B) -> float:
    """Standard error of a ratio of sums over two sequences or more (Cochran, Sampling Techniques, section 6.3)."""
    n, count = (count_B > 0).sum(), count_B.sum()
    off_B = nll_B - nll_B.sum() / count * count_B
    return math.sqrt(n / (n - 1) * (off_B**2).sum()) / count


def bucket_edges(length: int) -> tuple[int, ...]:
    """0, 16, 32, 64, … up to `length`."""
    doubling = [FIRST_EDGE * 2**i for i in range(length.bit_length())]
    return (0, *(edge for edge in doubling if edge < length), length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(model: Model, execution: Execution, edges: tuple[int, ...], params: dict, batch: dict):
    """Summed loss, number of scored tokens and their bytes, of each part, bucket and sequence: [parts, 3, buckets, B]."""
    nll_BT, _ = losses(model, params, batch, execution)
    pos_BT, weights_BT = batch["positions"], batch["weights"]
    recalled_BT = recalled(batch["tokens"], batch["targets"], batch["segments"])
    sums = [
        [
            [(x_BT * (part_BT & (pos_BT >= first) & (pos_BT < end))).sum(1) for first, end in itertools.pairwise(edges)]
            for x_BT in (weights_BT * nll_BT, weights_BT, batch["bytes"])
        ]
        for part_BT in (recalled_BT, ~recalled_BT)
    ]
    return jax.reshard(jnp.array(sums), P())


def recalled(tokens_BT: jax.Array, targets_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Repeated bigrams: where the pair of a token and its target occurred earlier in the same document of the sequence, [B, T].

    They need associative recall (Arora et al., Zoology, 2312.04927), and explain most of the difference between architectures.
    """
    spec = spec_of(tokens_BT)
    keys = tuple(jax.reshard(x_BT, P(BATCH, None)) for x_BT in (segments_BT, tokens_BT, targets_BT))
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    *keys, index_BT = jax.lax.sort((*keys, jax.reshard(index_BT, P(BATCH, None))), dimension=1, num_keys=3, is_stable=True)
    same_BT = functools.reduce(jnp.logical_and, [x_BT[:, 1:] == x_BT[:, :-1] for x_BT in keys])
    again_BT = jnp.pad(same_BT, ((0, 0), (1, 0)))
    return jax.reshard(jax.lax.sort((index_BT, again_BT), dimension=1, num_keys=1)[1], spec)


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    spec = Spec(context.heldout[unit.part], unit.length, settings.tokens)
    return evaluation.measured_of_source(unit, records_of(context.eval_model, spec))


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    """The loss of all tokens, the losses of a bigram model and of chance, then losses by position."""
    for source, of_source in grouped((r for r in records if part(r) == "all"), itemgetter("source")).items():
        for record in filter(is_total, of_source):
            yield _line("loss (nats)", record)
            for other in (x for x in baselines.records if (x["eval"], x["source"]) == ("bigram", source)):
                at = "" if other["length"] == record["length"] else f", at {other['length']:,}"
                yield Line(f"  bigram model{at}", source, bits=f"{other['bits_per_byte']:.3f}")
            chance, bits = math.log(baselines.vocab_size), record["bits_per_byte"]
            yield Line("  chance", source, f"{chance:.3f}", bits=f"{bits * chance / record['loss']:.3f}" if bits else "")
        for record in of_source:
            if not is_total(record):
                yield _line(f"  positions {record['first']:,} to {record['end'] - 1:,}", record)


def _line(name: str, record: Mapping) -> Line:
    spread = f"{record['stderr']:.3f}" if "stderr" in record else ""
    bits = "" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.3f}"
    return Line(name, record["source"], f"{record['loss']:.3f}", spread, bits, f"{record['tokens']:,} tokens")


EVALUATION = Evaluation(
    name="position",
    parts=evaluation.texts,
    measure=measure,
    fields={"source": NAME, "length": SIZE, "tokens": COUNT, "loss": ANY},
    headline=Headline(first_total("loss"), "position_loss_nats", "loss {:.3f} nats", higher_is_better=False),
    report=report_of("losses"),
    baseline=bigram.BASELINE,
    lines=lines,
    section_order=2,
    in_quick_suite=True,
    flags=("tokens", "heldout"),
    empty=evaluation.without_documents,
    check_fits=evaluation.check_sequence,
)
