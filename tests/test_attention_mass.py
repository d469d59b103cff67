"""Shares of attention are those of a dense softmax in float64, on any mesh; marks stand where the text says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BLOCKED, biggest_array, everything, mesh_of, random_params, tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import score_scale
from hybrid_attn.data.documents import in_memory
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import EvalModel, Spec, attention, attention_statistics, needle_prompts
from hybrid_attn.evals.attention import SEGMENTS
from hybrid_attn.evals.attention_statistics import AttentionStatistics, Queries
from hybrid_attn.evals.needle_prompts import NeedlePrompt
from hybrid_attn.model import attention_sums
from hybrid_attn.model.transformer import Tokens, layer_by_layer, packed_mixing, unstacked
from hybrid_attn.parallel.mesh import BATCH, HEADS_BTNH, TOKENS_BT

B, T, N, K, H, Q = 2, 48, 4, 2, 8, 24  # more queries than a row has, beyond the reach of the windows
QUERIES, LENGTHS = (33, 27), (48, 43)  # each row's first query and its tokens
INTERVALS = np.array([[(0, 10), (10, 30), (30, 48)], [(0, 1), (5, 9), (9, 43)]])
KINDS = {
    "prefix": {},
    "window": {"window": 7},
    "chunk": {"chunk": 10, "rope_theta": 9.0},
    "cap and sink": {"softcap": 6.0, "sink": True},
    "window and sink": {"window": 20, "sink": True},
}


def kind_of(fields):
    return tiny({}, G=fields).model.kinds["G"]


def weights_of(q_NH, k_SKH, pos, kind, scale, sinks_N=None):
    """Shares [N, S + 1] of one query at `pos`, by their definition in float64; the last is that of the sink."""
    S, K = k_SKH.shape[:2]
    k_NSH = np.repeat(k_SKH.astype(np.float64).swapaxes(0, 1), len(q_NH) // K, axis=0)
    s_NS = scale * np.einsum("NH,NSH->NS", q_NH.astype(np.float64), k_NSH)
    s_NS = s_NS if kind.softcap is None else kind.softcap * np.tanh(s_NS / kind.softcap)
    at = np.arange(S)
    see = at <= pos
    if kind.window is not None:
        see &= pos - at < kind.window
    if kind.chunk is not None:
        see &= at // kind.chunk == pos // kind.chunk
    sink_N1 = np.full((len(q_NH), 1), -np.inf) if sinks_N is None else sinks_N[:, None]
    s_NS = np.concatenate([np.where(see, s_NS, -np.inf), sink_N1], 1)
    p_NS = np.exp(s_NS - s_NS.max(1, keepdims=True))
    return p_NS / p_NS.sum(1, keepdims=True)


def entropy(p_NS):
    return -(p_NS * np.log2(np.where(p_NS > 0, p_NS, 1))).sum(1)


def found(q, k, kind, sinks, intervals=INTERVALS, scale=0.4):
    asked = Queries(np.array(QUERIES), np.array(LENGTHS), intervals[..., 0], intervals[..., 1])
    asked = jax.tree.map(lambda x: jax.device_put(x.astype(np.int32), P(BATCH)), asked)
    q, k = (jax.device_put(x, HEADS_BTNH) for x in (q, k))
    sinks = None if sinks is None else jax.device_put(sinks, P("tensor"))
    measure = functools.partial(attention_statistics.statistics_of, num_queries=Q, kind=kind, scale=scale)
    return jax.device_get(jax.jit(measure)(q, k, asked, sinks))


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "context": 2, "tensor": 2}], ids=["one", "eight"])
@pytest.mark.parametrize("name", KINDS)
def test_shares_are_those_of_a_dense_softmax(name, sizes, monkeypatch):
    monkeypatch.setattr(attention_sums, "KEYS", 10)  # a shard has blocks that it begins again in the middle
    kind, rng = kind_of(KINDS[name]), np.random.default_rng(0)
    q, k = (2 * rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K))
    sinks = rng.normal(size=N).astype(np.float32) if kind.sink else None
    with jax.set_mesh(mesh_of(**sizes)):
        got = found(q, k, kind, sinks)
    for b, (first, length) in enumerate(zip(QUERIES, LENGTHS, strict=True)):
        p_QNS = np.stack([weights_of(q[b, p], k[b], p, kind, 0.4, sinks) for p in range(first, length)])
        mass_NI = np.stack([p_QNS[..., start:end].sum(-1).mean(0) for start, end in INTERVALS[b]], 1)
        np.testing.assert_allclose(got.mass_BNI[b], mass_NI, atol=1e-6)
        np.testing.assert_allclose(got.entropy_BN[b], np.mean([entropy(p_NS) for p_NS in p_QNS], 0), atol=2e-5)
        np.testing.assert_array_equal(got.greatest_BNQ[b, :, : length - first], p_QNS[..., :-1].argmax(-1).T)


def test_equal_scores_give_an_interval_its_share_of_the_keys_that_a_query_sees(one_device):
    kind = kind_of({})
    q, k = np.zeros((B, T, N, H), np.float32), np.ones((B, T, K, H), np.float32)
    got = found(q, k, kind, None)
    for b, (first, length) in enumerate(zip(QUERIES, LENGTHS, strict=True)):
        seen_Q1 = np.arange(first, length)[:, None] + 1
        wanted_QI = np.clip(seen_Q1 - INTERVALS[b, :, 0], 0, np.diff(INTERVALS[b])[:, 0]) / seen_Q1
        np.testing.assert_allclose(got.mass_BNI[b], np.tile(wanted_QI.mean(0), (N, 1)), rtol=1e-5)
        np.testing.assert_allclose(got.entropy_BN[b], np.log2(seen_Q1).mean(), rtol=1e-5)
        assert np.all(got.greatest_BNQ[b] == 0)  # the first of equals


def test_a_head_that_looks_at_the_needle_alone_has_the_greatest_lift(one_device):
    prompt = NeedlePrompt(np.arange(T) % 7, (14, 17), 33, 40)
    q, k = np.zeros((B, T, N, H), np.float32), np.zeros((B, T, K, H), np.float32)
    q[..., 0], k[:, 14:17, 0, 0] = 100.0, 1.0  # the first key/value head's needle
    measured = found(q, k, kind_of({}), None, np.array([attention.parts(prompt)] * B), scale=1.0)
    look = AttentionStatistics(*(x[0] for x in measured))
    values = attention.head_values(kind_of({}), prompt, look)
    np.testing.assert_allclose(values["needle_lift"][: N // K], T / 3, rtol=1e-5)
    np.testing.assert_allclose(values["entropy_bits"][: N // K], math.log2(3), rtol=1e-5)
    np.testing.assert_allclose(values["needle_per_token"][: N // K], 1 / 3, rtol=1e-5)
    assert np.all(values["needle_lift"][N // K :] < 2)


def test_the_largest_array_is_a_block_of_scores(one_device):
    long, kind = 64 * 1024, kind_of({})
    q = k = jnp.zeros((1, long, 1, H), out_sharding=HEADS_BTNH)
    asked = Queries(*(jax.device_put(np.int32(x), P(BATCH)) for x in ([long - Q], [long], [[0]], [[9]])))
    measure = functools.partial(attention_statistics.statistics_of, sinks_N=None, num_queries=Q, kind=kind, scale=1.0)
    assert biggest_array(measure, q, k, asked) == Q * attention_sums.KEYS


MODELS = {"everything": everything("LLG", 5), "chunks": tiny({}, L={"chunk": 16, "rope_theta": 50.0}, G={"softcap": 2.0}).model}


def eval_model_on(mesh, model):
    return EvalModel(model, random_params(model), BLOCKED._replace(kernel="reference", zigzag=True), mesh, ByteTokenizer())


def watched_weights(eval_model, prompt):
    """Dense shares [N, Q, S + 1] of each layer, from the queries and keys that its attention gets."""
    S = len(prompt.tokens_S)
    put = functools.partial(jax.device_put, device=NamedSharding(eval_model.mesh, TOKENS_BT))
    tokens, pos, seg = (put(x[None]) for x in (prompt.tokens_S, np.arange(S, dtype=np.int32), np.ones(S, np.int32)))
    execution = eval_model.execution._replace(zigzag=False)

    def watched(letter):
        mixing = packed_mixing(eval_model.model, letter, pos, seg, execution)

        def attend(q, k, v, sinks):
            return mixing.attend(q, k, v, sinks)[0], (q[0], k[0], sinks)

        return mixing._replace(attend=attend)

    @jax.jit
    def through(params):
        weights = unstacked(eval_model.model, params, jnp.float32)
        mixings = [watched(x) for x in eval_model.model.layers]
        states = layer_by_layer(eval_model.model, weights, Tokens(tokens, pos, seg), mixings, execution)[1]
        return [state.attention for state in states]

    dense = []
    for letter, (q, k, sinks) in zip(eval_model.model.layers, jax.device_get(through(eval_model.params)), strict=True):
        kind = eval_model.model.kinds[letter]
        scale = score_scale(eval_model.model, kind)
        dense.append(np.stack([weights_of(q[p], k, p, kind, scale, sinks) for p in range(prompt.question, S)], 1))
    return dense


@functools.cache
def dense_values(name, spec):
    """(prompts, their dense shares by layer)."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        eval_model = eval_model_on(mesh, MODELS[name])
        prompts = needle_prompts.prompts(spec, ByteTokenizer())
        return prompts, [watched_weights(eval_model, prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("everything", {"data": 2, "context": 2, "tensor": 2}),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("everything", {}), ("chunks", {"fsdp": 2}))),
    ],
)
def test_records_are_the_means_of_dense_shares(name, sizes):
    spec, mesh, model = Spec(Task("recall", 4), 64, 3 * 64), mesh_of(**sizes), MODELS[name]
    with jax.set_mesh(mesh):
        records = [*attention.records_of(eval_model_on(mesh, model), spec)]
    prompts, dense = dense_values(name, spec)
    heads = {(r["layer"], r["head"]): r for r in records}
    assert len(prompts) == 3 and len(heads) == len(records) == len(model.layers) * model.num_heads
    for (i, n), record in heads.items():
        p = [layers[i][n] for layers in dense]
        ends = [(min(10, x.needle[0]), *x.needle, x.question, len(x.tokens_S)) for x in prompts]
        wanted = {
            "begin": [x[:, :begin].sum(1).mean() for x, (begin, *_) in zip(p, ends, strict=True)],
            "needle": [x[:, start:stop].sum(1).mean() for x, (_, start, stop, *_) in zip(p, ends, strict=True)],
            "qc": [x[:, asked:length].sum(1).mean() for x, (*_, asked, length) in zip(p, ends, strict=True)],
            "sink_rate": [x[:, 0].mean() for x in p],
            "needle_lift": [
                x[:, start:stop].sum(1).mean() * length / 2 for x, (_, start, stop, _, length) in zip(p, ends, strict=True)
            ],
        }
        for field, values in wanted.items():
            assert record[field] == pytest.approx(np.mean(values), abs=2e-5 if field == "needle_lift" else 1e-5), field
        nothing = np.mean([x[:, -1].mean() for x in p])
        assert sum(record[field] for field in SEGMENTS) == pytest.approx(1 - nothing, abs=1e-5)
        assert record.get("nothing", 0.0) == pytest.approx(nothing, abs=1e-5)
        assert record["entropy_bits"] == pytest.approx(np.mean([entropy(x).mean() for x in p]), abs=1e-4)
        assert (record["kind"], record["length"], record["prompts"]) == (model.layers[i], 64, 3)


def test_weights_by_position_leave_out_both_ends(one_device):
    spec = Spec(Task("recall", 4), 64, 3 * 64)
    records = [*attention.records_of(eval_model_on(one_device, MODELS["everything"]), spec)]
    prompts, dense = dense_values("everything", spec)
    for record in records:
        edges = record["edges"]
        assert edges == [10, 14, 20, 28, 40, 57, 62]  # those of 64 tokens, whose prompts end before the last interval
        p = [layers[record["layer"]][record["head"]].mean(0) for layers in dense]
        for first, end, weight in zip(edges[:-1], edges[1:], record["weights"], strict=True):
            keys = [x[first : min(end, math.floor(0.97 * (len(x) - 1)))] for x in p]
            every = np.concatenate(keys)
            assert weight == (pytest.approx(every.mean(), abs=1e-6) if len(every) else None)


def test_a_window_that_ends_behind_the_needle_is_marked(one_device):
    records = attention.records_of(eval_model_on(one_device, MODELS["everything"]), Spec(Task("recall", 4), 64, 64))
    assert {(r["kind"], r["reach"], r["needle"] > 0, r["needle_lift"] > 0) for r in records} == {
        ("G", True, True, True), ("L", False, False, False),
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields, reaches",
    [({}, True), ({"window": 14}, True), ({"window": 13}, False), ({"chunk": 16}, True), ({"chunk": 10}, False)],
)
def test_a_layer_reaches_the_needle_if_a_query_sees_its_last_token(fields, reaches):
    kind, prompt = kind_of({"rope_theta": 9.0, **fields}), NeedlePrompt(np.zeros(40, np.int32), (14, 18), 30, 35)
    assert attention.reaches(kind, prompt) == reaches  # the first query is the 13th token after the needle's last
    seen = np.flatnonzero(weights_of(np.zeros((1, H)), np.zeros((40, 1, H)), 30, kind, 1.0)[0])
    assert np.isin(np.arange(14, 18), seen).any() == reaches


def test_retrieval_counts_the_words_that_are_copied_from_the_needle():
    #                           0  1  2  3  4  5  6   7  8  9 10 11
    prompt = NeedlePrompt(np.array([9, 1, 2, 5, 1, 2, 3, 30, 31, 1, 7, 3]), (4, 7), 7, 9)
    greatest = [
        [7, 4, 0, 6, 0],  # both words from their places: 7 stands in no needle
        [7, 1, 0, 6, 0],  # the first from a like word outside the needle
        [4, 5, 4, 5, 6],  # always another word of the needle
        [7, 4, 0, 9, 0],
    ]
    np.testing.assert_array_equal(attention.retrieval(prompt, np.array(greatest)), [1.0, 0.5, 0.0, 0.5])


def text_documents(number, size):
    text = b"The grass is green. The sky is blue.\nThe sun is yellow. " * (size // 50)
    return in_memory([np.array([256, *text[i : i + size - 2], 257], np.uint16) for i in range(number)], range(number))


def test_a_prompt_of_text_has_its_marks_round_the_needle_the_question_and_the_answer():
    prompts = needle_prompts.prompts(Spec(text_documents(3, 700), 600, 3 * 600), ByteTokenizer())
    assert len({p.tokens_S.tobytes() for p in prompts}) == len(prompts) == 3
    for prompt in prompts:
        start, stop = prompt.needle
        tokens = prompt.tokens_S
        needle, question, answer = (
            ByteTokenizer().decode(part)
            for part in (tokens[start:stop], tokens[prompt.question : prompt.answer], tokens[prompt.answer :])
        )
        key, value = needle.removeprefix(" One of the special magic numbers for ").removesuffix(".").split(" is:")
        assert 10**6 <= int(value) < 10**7 and answer == value and question.count(f" for {key} ") == 2
        assert len(tokens) <= 600 and len(tokens) > 595 and tokens[0] == 256 and not np.isin(257, tokens)
        before = ByteTokenizer().decode(tokens[:start])
        assert before.startswith("A special magic number") and before.endswith((".", "\n"))
        assert abs(len(before) - before.index("\n") - (prompt.question - stop)) < 60
        assert prompt.copied.all()


def test_a_prompt_of_recall_is_its_row_up_to_the_first_answer():
    (prompt,) = needle_prompts.prompts(Spec(Task("recall", 4), 64, 1), ByteTokenizer())
    (row,) = SyntheticSequences(Task("recall", 4), 64, None).read([(0, 0, 64)])
    text = ByteTokenizer().decode(prompt.tokens_S[1:])
    assert np.array_equal(prompt.tokens_S[:-1], row["tokens"][: len(prompt.tokens_S) - 1])
    assert text[prompt.needle[0] - 1 : prompt.needle[1] - 1] == text[-2:] and text[-3] == "?" and prompt.copied.all()
    assert (prompt.question, prompt.answer) == (len(prompt.tokens_S) - 3, len(prompt.tokens_S) - 1)


@pytest.mark.parametrize(
    "spec, message",
    [
        (Spec(text_documents(3, 700), 300, 1), "length=300 leaves no text around the needle; use 3"),
        (Spec(text_documents(3, 700), 4096, 1), "the documents have 2,100 tokens, which fill no prompt of 4,096"),
        (Spec(Task("copy", 4), 64, 1), 'the task "copy" hides no needle'),
    ],
)
def test_what_makes_no_prompt_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        needle_prompts.prompts(spec, ByteTokenizer())


@pytest.mark.parametrize(
    "needle, question, answer", [((0, 2), 5, 7), ((3, 3), 5, 7), ((3, 6), 5, 7), ((3, 5), 7, 7), ((3, 5), 6, 9)]
)
def test_marks_out_of_order_are_refused(needle, question, answer):
    with pytest.raises(ValueError, match="do not follow one another"):
        NeedlePrompt(np.zeros(9, np.int32), needle, question, answer)
