"""Attention mass: where a question about a needle far back, and its answer, look, in every head of every layer.

The analysis of "Rope to Nope and Back Again" (arXiv 2501.18795): the queries are the tokens of the question and of the right
answer; keys are the first tokens (`begin`), the needle, the queries' own tokens (`qc`) and all other tokens (`context`).

Letters: B prompts, T and S tokens, L layers, N heads, Q queries, A tokens of the answer, I intervals of keys.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType, Model, score_scale
from hybrid_attn.config_model import attention_heads
from hybrid_attn.data.synthetic import Task
from hybrid_attn.evals import evaluation, needle_prompts
from hybrid_attn.evals.attention_statistics import AttentionStatistics, Queries, oldest_key, statistics_of
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, report_of
from hybrid_attn.evals.needle_prompts import NeedlePrompt
from hybrid_attn.evals.records import ANY, COUNT, FLAG, NAME, SIZE, grouped, integer, mean_of
from hybrid_attn.evals.samples import Sample, TooLongError
from hybrid_attn.evals.types import EvalContext, EvalModel, Measured, Settings, Spec, Unit, check_finite
from hybrid_attn.model import Execution
from hybrid_attn.model.transformer import Tokens, layer_by_layer, packed_mixing, unstacked
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT, batch_shards, put

BEGIN = 10  # tokens; the weights by position leave them out
END = 0.03  # share of the tokens, the last ones, that the weights by position leave out
SEGMENTS = ("begin", "needle", "context", "qc")
PER_TOKEN = (*(f"{segment}_per_token" for segment in SEGMENTS), "sink_rate")
MEANS = (*SEGMENTS, "entropy_bits", "needle_lift", *PER_TOKEN, "retrieval")  # of a layer type
INTERVALS = ("begin", "needle", "before", "after", "qc", "sink_rate")  # intervals; the context is before and after the needle
PROMPTS = 2  # of a unit, whose attention is averaged
MOST_HEADS = 2**16  # of a layer
ROUND = 16  # queries: prompts whose questions differ a little share a program


def records_of(eval_model: EvalModel, spec: Spec) -> Iterator[dict]:
    """A record per head: means over its queries and then over the prompts of `spec` (`needle_prompts.prompts`).

    The share of each segment (they sum to 1, with `nothing` where the kind has a sink), that of one token of it and that of
    token 0 (`sink_rate`), the entropy in bits, `needle_lift` (the share of the needle over that of its tokens), `retrieval`,
    and the mean weight of a key (`weights`) between neighbouring `edges` of key positions, which follow from the length alone,
    without the first 10 and the last 3% of a prompt: None where no prompt has a key. `reach`: whether the layer shows the
    needle to any query.
    """
    model, length, edges = eval_model.model, spec.length, position_edges(spec.length)
    prompts = needle_prompts.prompts(spec, eval_model.tokenizer)
    values = [[] for _ in model.layers]
    heads = [attention_heads(model, model.kinds[letter])[0] for letter in model.layers]
    weights_NI = [np.zeros((N, len(edges) - 1)) for N in heads]
    tokens_I = np.zeros(len(edges) - 1)
    for prompt, layers in _statistics(eval_model, prompts, length, edges):
        tokens_I += [end - first for first, end in by_position(prompt, edges)]
        for i, (letter, statistics) in enumerate(zip(model.layers, layers, strict=True)):
            check_finite(np.append(statistics.mass_BNI, statistics.entropy_BN), f"the attention of layer {i}")
            values[i].append(head_values(model.kinds[letter], prompt, statistics))
            weights_NI[i] += statistics.mass_BNI[:, len(INTERVALS) :]
    for i, letter in enumerate(model.layers):
        means = {name: np.mean([x[name] for x in values[i]], axis=0) for name in values[i][0]}
        reach = any(reaches(model.kinds[letter], prompt) for prompt in prompts)
        for n in range(heads[i]):
            record = {"layer": i, "kind": letter, "head": n, "length": length, "prompts": len(prompts)}
            record |= {name: float(x[n]) for name, x in means.items()}
            seen = zip(weights_NI[i][n].tolist(), tokens_I.tolist(), strict=True)
            weights = [weight / keys if keys else None for weight, keys in seen]
            yield record | {"reach": reach, "edges": list(edges), "weights": weights}


def position_edges(length: int) -> tuple[int, ...]:
    """10, 14, 20, 28, … up to `length` tokens less the last 3%: two intervals for each doubling."""
    end = max(BEGIN + 1, math.floor(length * (1 - END)))
    steps = [round(BEGIN * 2 ** (i / 2)) for i in range(2 * length.bit_length())]
    return (*(edge for edge in steps if edge < end), end)


def reaches(kind: LayerType, prompt: NeedlePrompt) -> bool:
    """Whether a layer of this kind shows a token of the needle to a query: to the first one, if to any."""
    return prompt.needle[1] > oldest_key(kind, prompt.question)


def parts(prompt: NeedlePrompt) -> list[tuple[int, int]]:
    """The interval of each of `INTERVALS`."""
    length, (start, stop) = len(prompt.tokens_S), prompt.needle
    begin = min(BEGIN, start)
    return [(0, begin), (start, stop), (begin, start), (stop, prompt.question), (prompt.question, length), (0, 1)]


def by_position(prompt: NeedlePrompt, edges: Sequence[int]) -> list[tuple[int, int]]:
    """The intervals between `edges`, of which none goes into the last 3% of the prompt."""
    end = math.floor(len(prompt.tokens_S) * (1 - END))
    return [(min(first, end), min(last, end)) for first, last in zip(edges[:-1], edges[1:], strict=True)]


def head_values(kind: LayerType, prompt: NeedlePrompt, statistics: AttentionStatistics) -> dict[str, np.ndarray]:
    """The numbers of every head [N] for one prompt, whose intervals begin with `INTERVALS`."""
    mass = dict(zip(INTERVALS, statistics.mass_BNI.T.astype(np.float64), strict=False))
    size = {name: end - first for name, (first, end) in zip(INTERVALS, parts(prompt), strict=True)}
    mass["context"], size["context"] = mass["before"] + mass["after"], size["before"] + size["after"]
    values = {name: mass[name] for name in SEGMENTS}
    if kind.sink:
        values["nothing"] = 1 - sum(values.values())
    values |= {f"{name}_per_token": mass[name] / max(size[name], 1) for name in SEGMENTS}
    values |= {"sink_rate": mass["sink_rate"], "entropy_bits": statistics.entropy_BN}
    values["needle_lift"] = mass["needle"] * len(prompt.tokens_S) / size["needle"]
    return values | {"retrieval": retrieval(prompt, statistics.greatest_BNQ)}


def retrieval(prompt: NeedlePrompt, greatest_NQ: np.ndarray) -> np.ndarray:
    """Of the answer's tokens that stand in the needle, the share that a head copies (Wu et al., arXiv 2404.15574): [N].

    A head copies a token where the query before it, which predicts it, attends most to the same token in the needle.
    """
    tokens_S, (start, stop) = prompt.tokens_S, prompt.needle
    copied_A = np.flatnonzero(prompt.copied)
    keys_NA = greatest_NQ[:, prompt.answer - 1 - prompt.question + copied_A]
    inside_NA = (keys_NA >= start) & (keys_NA < stop)
    return (inside_NA & (tokens_S[keys_NA] == tokens_S[prompt.answer + copied_A])).mean(1)


def _statistics(
    eval_model: EvalModel, prompts: Sequence[NeedlePrompt], length: int, edges: Sequence[int]
) -> Iterator[tuple[NeedlePrompt, list[AttentionStatistics]]]:
    """Each prompt with what its queries saw in each layer, as arrays [N, ...]."""
    mesh, execution = eval_model.mesh, eval_model.execution._replace(zigzag=False)
    batch_size, context = batch_shards(mesh), mesh.shape["context"]
    num_queries = max(len(prompt.tokens_S) - prompt.question for prompt in prompts)
    num_queries = -(-num_queries // ROUND) * ROUND
    run = functools.partial(_batch_statistics, eval_model.model, execution, num_queries, eval_model.params)
    for first in range(0, len(prompts), batch_size):
        batch = list(prompts[first : first + batch_size])
        filled = batch + batch[-1:] * (batch_size - len(batch))
        tokens_BT = np.zeros((batch_size, -(-length // context) * context), np.int32)
        for row_T, prompt in zip(tokens_BT, filled, strict=True):
            row_T[: len(prompt.tokens_S)] = prompt.tokens_S
        intervals_BI2 = np.array([parts(prompt) + by_position(prompt, edges) for prompt in filled], np.int32)
        question_B = np.array([prompt.question for prompt in filled], np.int32)
        length_B = np.array([len(prompt.tokens_S) for prompt in filled], np.int32)
        queries = Queries(question_B, length_B, intervals_BI2[..., 0], intervals_BI2[..., 1])
        tokens_BT, queries = put(tokens_BT, mesh, TOKENS_BT), jax.tree.map(lambda x: put(x, mesh, P(BATCH)), queries)
        layers = jax.device_get(run(tokens_BT, queries))
        for b, prompt in enumerate(batch):
            yield prompt, [AttentionStatistics(*(x[b] for x in layer)) for layer in layers]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_statistics(
    model: Model, execution: Execution, num_queries: int, params: dict, tokens_BT: jax.Array, queries: Queries
) -> list[AttentionStatistics]:
    """What each layer's queries see, on every device."""
    pos_BT = jax.reshard(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), TOKENS_BT)
    seg_BT = (pos_BT < jax.reshard(queries.length_B, P(BATCH))[:, None]).astype(jnp.int32)

    def attend_and_measure(letter: str):
        mixing, kind = packed_mixing(model, letter, pos_BT, seg_BT, execution), model.kinds[letter]
        scale = score_scale(model, kind)

        def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N):
            o_BTNH, _ = mixing.attend(q_BTNH, k_BTKH, v_BTKH, sinks_N)
            return o_BTNH, statistics_of(q_BTNH, k_BTKH, queries, sinks_N, num_queries=num_queries, kind=kind, scale=scale)

        return mixing._replace(attend=attend)

    weights = unstacked(model, params, execution.dtype)
    mixings = [attend_and_measure(letter) for letter in model.layers]
    _, states = layer_by_layer(model, weights, Tokens(tokens_BT, pos_BT, seg_BT), mixings, execution)
    return jax.tree.map(lambda x: jax.reshard(x, P()), [state.attention for state in states])


def sources(context: EvalContext, settings: Settings) -> list[str]:
    """Those whose held-out data can hide a needle: documents, and the task "recall"."""
    return [name for name, x in context.heldout.items() if not isinstance(x, Task) or x.name == "recall"]


def spec_of(context: EvalContext, unit: Unit) -> Spec:
    return Spec(context.heldout[unit.part], unit.length, PROMPTS * unit.length)


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    return evaluation.measured_of_source(unit, records_of(context.eval_model, spec_of(context, unit)))


def check_fits(context: EvalContext, settings: Settings, unit: Unit) -> None:
    evaluation.check_task_fits(unit, context.heldout[unit.part])
    try:
        needle_prompts.prompts(spec_of(context, unit), context.eval_model.tokenizer)
    except ValueError as cause:
        raise TooLongError(f"attention_mass of {unit.part}: {cause}") from cause


def mean_lift(records: Sequence[Mapping]) -> float | None:
    """How far the needle stands out in the heads of the layers that reach it."""
    return mean_of([record for record in records if record["reach"]], "needle_lift")


def means_by_layer_type(records: Sequence[Mapping]) -> Iterator[dict]:
    """Means over the heads of each layer type."""
    for _, heads in sorted(grouped(records, itemgetter("kind")).items()):
        names = {name: heads[0][name] for name in ("source", "length", "kind")}
        yield names | {name: mean_of(heads, name) for name in MEANS}


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    for (source, letter), heads in sorted(grouped(records, itemgetter("source", "kind")).items()):
        share = mean_of(heads, "needle")
        yield Line("attention to the needle", f"{source}, layers {letter}", f"{share:.1%}", number=f"{len(heads)} heads")


EVALUATION = Evaluation(
    name="attention_mass",
    parts=sources,
    measure=measure,
    fields={
        **{"source": NAME, "prompts": SIZE, "layer": COUNT, "kind": NAME, "head": integer(0, MOST_HEADS), "length": SIZE},
        **dict.fromkeys(("begin", "needle", "context", "qc", "entropy_bits", "needle_lift", "retrieval"), ANY),
        "reach": FLAG,
    },
    headline=Headline(mean_lift, "attention_needle_lift_ratio", "needle's lift {:.2f}", higher_is_better=True),
    report=report_of("attention"),
    lines=lines,
    section_order=5,
    in_quick_suite=True,
    flags=("heldout",),
    sequences=lambda settings, length: PROMPTS,
    empty=evaluation.without_documents,
    check_fits=check_fits,
    summary=means_by_layer_type,
)
