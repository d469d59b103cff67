"""Answers and scores of the engine, against the forward pass and against themselves in other batches and on other meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, mesh_of, random_params, temporary_bytes, tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.infer import cache as caches
from hybrid_attn.infer.cache import Compression
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import GREEDY, Sampling
from hybrid_attn.infer.steps import DecodeSlice, DecodeState, decode
from hybrid_attn.model import apply, logits
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT

NEW = 6


def config_of(**changes):
    return tiny({"train.kernel": "reference", "train.dtype": "float32"} | changes)


@pytest.fixture(scope="module")
def engine():
    c = config_of()
    with jax.set_mesh(mesh_of()):
        yield Engine(random_params(c.model), c, EngineOptions(chunk=16))


def sequences_of(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 384, n).tolist() for n in lengths]


def all_logits(model, params, sequence):
    """Logits [T, V] of a sequence, by the forward pass."""
    size = 64
    tokens = np.pad(sequence, (0, size - len(sequence)))[None].astype(np.int32)
    seg = (np.arange(size) < len(sequence))[None].astype(np.int32)
    sharding = NamedSharding(jax.sharding.get_mesh(), TOKENS_BT)
    args = (jax.device_put(x, sharding) for x in (tokens, np.arange(size, dtype=np.int32)[None], seg))
    return np.asarray(forward(model, params, *args))[0, : len(sequence)]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, *arrays):
    return logits(model, params, apply(model, params, *arrays, REFERENCE))


PROMPTS = sequences_of(1, 4, 5, 6, 16, 17, 40)


def test_greedy_answers_are_what_the_forward_pass_finds_most_likely(engine):
    c = config_of()
    params = random_params(c.model)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, NEW), strict=True):
        scores = all_logits(c.model, params, [*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        assert answer.tokens.tolist() == scores.argmax(-1).tolist()
        logprobs = scores.max(-1) - np.asarray(jax.nn.logsumexp(scores, axis=-1))
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
    timing = engine.timing
    assert timing.prompt_tokens == sum(map(len, PROMPTS)) and timing.new_tokens == NEW * len(PROMPTS)
    assert 0 < timing.first_token_s and timing.prefill_s > 0 and timing.decode_s > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_end_answers_and_scores(engine, monkeypatch, bad):
    spoilt = engine.weights | {"embed": engine.weights["embed"] + jnp.asarray(bad, engine.weights["embed"].dtype)}
    came = []
    monkeypatch.setattr(engine, "weights", spoilt)
    with pytest.raises(FloatingPointError, match="prompt 1: the log-probability of token 0 is nan: .* earlier step"):
        engine.generate(PROMPTS[:2], NEW, on_tokens=lambda _, ids: came.extend(ids))
    assert not came
    with pytest.raises(FloatingPointError, match="prompt [01]: the log-probability of token [14] is nan"):
        engine.score(PROMPTS[:2], [[1, 2], [3]])


def test_sampled_answers_do_not_depend_on_the_batch(engine):
    sampling, seeds = Sampling(temperature=1.0, top_k=50), [5, 6, 7, 8, 9, 10, 11]
    together = engine.generate(PROMPTS, NEW, GenerateOptions(sampling), seeds=seeds)
    for i in (0, 3, 6):
        (alone,) = engine.generate(PROMPTS[i : i + 1], NEW, GenerateOptions(sampling), seeds=seeds[i : i + 1])
        assert alone.tokens.tolist() == together[i].tokens.tolist()
    (other,) = engine.generate(PROMPTS[:1], NEW, GenerateOptions(sampling), seeds=[99])
    assert other.tokens.tolist() != together[0].tokens.tolist()


def test_more_requests_than_a_batch_come_back_in_their_order(engine):
    expected = [answer.tokens.tolist() for answer in engine.generate(PROMPTS, NEW)]
    assert [answer.tokens.tolist() for answer in engine.generate(PROMPTS[::-1] * 2, NEW)] == expected[::-1] * 2


def test_a_request_ends_with_its_stop_token_or_when_on_tokens_returns_true(engine):
    full_answers = engine.generate(PROMPTS, NEW)
    stop = int(full_answers[2].tokens[3])
    stopped = engine.generate(PROMPTS, NEW, GenerateOptions(stop_tokens=[stop]))
    for answer, full in zip(stopped, full_answers, strict=True):
        tokens = full.tokens.tolist()
        assert answer.tokens.tolist() == (tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
    came = {}

    def on_tokens(index, ids):
        came.setdefault(index, []).extend(ids)
        return index == 1

    answers = engine.generate(PROMPTS, NEW, on_tokens=on_tokens)
    assert {index: answer.tokens.tolist() for index, answer in enumerate(answers)} == came
    assert len(came[1]) == 1 and len(came[0]) == NEW


def test_a_shared_prefix_is_read_once_and_changes_nothing(engine):
    prefix = PROMPTS[6]
    prompts = [[*prefix, *more] for more in ([1], [2, 3, 4], [5] * 20)]
    expected = [engine.generate([prompt], NEW)[0].tokens.tolist() for prompt in prompts]
    assert [answer.tokens.tolist() for answer in engine.generate(prompts, NEW)] == expected


def test_a_step_of_decoding_copies_neither_weights_nor_cache(engine):
    config, _, capacity = engine._sizes(64, 64)
    cache = caches.empty(engine.model, 1, capacity, 1, engine.execution.dtype, False)
    last_BD = jnp.zeros((1, engine.model.d_model), engine.execution.dtype, out_sharding=P(BATCH, None))
    no_B, seeds_B = jnp.zeros_like(cache.lengths_B, bool), jnp.zeros_like(cache.lengths_B, jnp.uint32)
    part = DecodeSlice(no_B, seeds_B, np.full(1, -1, np.int32), 0, 1)
    lowered = decode.lower(config, GREEDY, engine.weights, DecodeState(cache, last_BD), part)
    assert temporary_bytes(lowered) < min(engine.weights["embed"].nbytes, caches.num_bytes(cache))


def test_scores_are_those_of_the_forward_pass(engine):
    c = config_of()
    params = random_params(c.model)
    continuations = sequences_of(3, 1, 20, 2, 5, 18, 4)
    for prompt, more, scores in zip(PROMPTS, continuations, engine.score(PROMPTS, continuations), strict=True):
        logprobs = np.asarray(jax.nn.log_softmax(all_logits(c.model, params, [*prompt, *more])))
        expected = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(more)]
        np.testing.assert_allclose(scores, expected, atol=1e-4)


COMPRESSIONS = {
    "snapkv": Compression("snapkv", cap=20, window=8),
    "pyramid": Compression("pyramid", cap=20, window=8, beta=4),
    "adakv": Compression("adakv", cap=20, window=8),
    "streaming": Compression("streaming", cap=12, sinks=2),
    "random": Compression("random", cap=20, window=8),
}


# tests/test_compress.py has the slots that each of them keeps.
MARKS = dict.fromkeys(("adakv", "streaming"), pytest.mark.slow) | dict.fromkeys(("pyramid", "random"), pytest.mark.exhaustive)


@pytest.mark.parametrize("method", [pytest.param(x, marks=MARKS.get(x, ())) for x in COMPRESSIONS])
def test_compression_changes_long_prompts_alone(engine, method):
    question, options = [[7, 8]] * len(PROMPTS), GenerateOptions(compression=COMPRESSIONS[method])
    prompts = [*PROMPTS[:6], PROMPTS[6] * 3]
    for questions in (None, question):
        full = engine.generate(prompts, NEW, questions=questions)
        full_bytes = engine.timing.cache_bytes
        answers = engine.generate(prompts, NEW, options, questions=questions)
        cap = COMPRESSIONS[method].cap
        for prompt, a, b in zip(prompts, answers, full, strict=True):
            if len(prompt) <= cap:
                assert a.tokens.tolist() == b.tokens.tolist()
        assert np.abs(answers[6].logprobs - full[6].logprobs).max() > 0
        assert engine.timing.cache_bytes < 0.6 * full_bytes


def test_a_compressed_prompt_is_attended_to_as_its_kept_tokens(engine):
    """A compressed last layer gives what the forward pass gives whose mask hides the other tokens in that layer."""
    c = config_of(**{"model.pattern": "G", "model.num_layers": 1})
    params, prompt = random_params(c.model), PROMPTS[6]
    cut = GenerateOptions(compression=Compression("streaming", cap=12, sinks=2))
    (answer,) = Engine(params, c, EngineOptions(chunk=16)).generate([prompt], 1, cut, questions=[[9]])
    kept = [*prompt[:2], *prompt[-10:], 9]
    scores = all_logits(c.model, params, kept)[-1]  # one layer without positions: hidden tokens may be left out
    assert answer.tokens.tolist() == [scores.argmax()]
    np.testing.assert_allclose(
        answer.logprobs, [np.log(np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()).max()], atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(4, 1), pytest.param((4, 4), marks=pytest.mark.exhaustive)], ids=str)
def test_one_prompt_is_compressed_whatever_its_heads(heads):
    c = config_of(**{"model.num_heads": heads[0], "model.num_kv_heads": heads[1]})

    def compressed(cap):
        return GenerateOptions(compression=Compression("snapkv", cap=cap, window=4))

    with jax.set_mesh(mesh_of()):
        engine = Engine(random_params(c.model), c, EngineOptions(chunk=16))
        (full,) = engine.generate(PROMPTS[5:6], NEW)
        for cap in (9, 20):
            (answer,) = engine.generate(PROMPTS[5:6], NEW, compressed(cap))
            assert (answer.tokens.tolist() == full.tokens.tolist()) or cap == 9
        assert engine.timing.compile_s > 0
        engine.generate(PROMPTS[5:6], NEW, compressed(20))
        assert engine.timing.compile_s == 0


def test_engines_may_share_compiled_programs(engine):
    c, programs = config_of(), {}
    first, other = (Engine(random_params(c.model, seed), c, EngineOptions(chunk=16), programs) for seed in (1, 0))
    first.generate(PROMPTS[:2], NEW)
    answers, expected = (x.generate(PROMPTS[:2], NEW) for x in (other, engine))
    assert other.timing.compile_s == 0 < first.timing.compile_s
    assert [x.tokens.tolist() for x in answers] == [x.tokens.tolist() for x in expected]


def test_no_prompts_give_no_answers_and_empty_continuations_no_scores(engine):
    assert engine.generate([], NEW) == [] and engine.score([], []) == []
    empty, two = engine.score([[5], [6]], [[], [7, 8]])
    assert empty.shape == (0,) and two.shape == (2,)
    assert engine.score([[5]], [[]])[0].shape == (0,)


def test_short_prompts_are_read_in_a_small_cache_beside_long_ones():
    c = config_of()
    with jax.set_mesh(mesh_of()):
        engine = Engine(random_params(c.model), c, EngineOptions(chunk=32, batch_size=1))
        short, small = engine.generate([PROMPTS[0]], NEW)[0], engine.timing.cache_bytes
        sizes = []
        decoded = engine._decoded

        def observed(call, indices, config, state):
            sizes.append(state.cache.layers[1].k_BKSH.shape[2])
            return decoded(call, indices, config, state)

        engine._decoded = observed
        assert engine.generate([PROMPTS[6], PROMPTS[0]], NEW)[1].tokens.tolist() == short.tokens.tolist()
    assert sizes == [64, 16] and small < engine.timing.cache_bytes


def test_compression_over_a_split_sequence_is_refused():
    c = config_of()
    with jax.set_mesh(mesh_of(context=2)):
        engine = Engine(random_params(c.model), c, EngineOptions(chunk=16))
        with pytest.raises(NotImplementedError, match="use a mesh with context=1"):
            engine.generate(PROMPTS, NEW, GenerateOptions(compression=COMPRESSIONS["snapkv"]))


def answers_and_scores(**sizes):
    c = config_of(**{"model.pattern": "LLG", "model.num_layers": 4})
    alike = [[*PROMPTS[6], i] for i in range(3)]  # their prefix is read once
    with jax.set_mesh(mesh_of(**sizes)):
        engine = Engine(random_params(c.model), c, EngineOptions(chunk=16))
        answers = engine.generate(PROMPTS, NEW) + engine.generate(alike, NEW)
        return [x.tokens.tolist() for x in answers], np.concatenate(engine.score(PROMPTS, PROMPTS[::-1]))


@pytest.fixture(scope="module")
def of_one_device():
    return answers_and_scores()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [pytest.param({"context": 4}, marks=pytest.mark.exhaustive), {"fsdp": 2, "context": 2, "tensor": 2}], ids=str
)
def test_a_mesh_answers_and_scores_like_one_device(sizes, of_one_device):
    answers, scores = answers_and_scores(**sizes)
    assert answers == of_one_device[0]
    np.testing.assert_allclose(scores, of_one_device[1], atol=1e-4)


def test_int8_slots_answer_nearly_the_same_in_a_third_of_the_bytes():
    c = config_of()
    with jax.set_mesh(mesh_of()):
        params = random_params(c.model)
        exact, small = (Engine(params, c, EngineOptions(chunk=16, cache=cache)) for cache in ("auto", "int8"))
        a, b = (np.concatenate(engine.score(PROMPTS, PROMPTS)) for engine in (exact, small))
        assert 0 < np.abs(a - b).max() < 0.3
        exact.generate(PROMPTS, NEW)
        small.generate(PROMPTS, NEW)
    assert small.timing.cache_bytes < 0.6 * exact.timing.cache_bytes


def test_a_cache_has_an_eighth_more_slots_than_tokens_at_most_and_few_sizes(engine):
    totals = range(16 * 64 + 1, 16 * 128 + 1)  # the chunk is 16
    slots = [engine._sizes(total, total).capacity for total in totals]
    assert all(total <= capacity < 9 / 8 * total + 16 for total, capacity in zip(totals, slots, strict=True))
    assert len(set(slots)) == 8


@pytest.mark.parametrize(
    "length, share", [(8192, 0.625), (32768, 0.34375), (131072, 0.2734375), (262144, 0.26171875)], ids=lambda x: str(x)
)
def test_the_hybrid_s_cache_is_a_quarter_and_its_windows(length, share):
    """3 of 4 layers cache W = 4096 of S tokens: (3 W / S + 1) / 4 of the cache of full attention."""
    kinds = dict(L={"window": 4096, "rope_theta": 1e4}, G={})
    hybrid = tiny({"model.pattern": "LLLG", "model.num_layers": 32}, **kinds).model
    full = tiny({"model.pattern": "G", "model.num_layers": 32}, **kinds).model
    with jax.set_mesh(mesh_of()):
        sizes = []
        for model in (hybrid, full):
            cache = jax.eval_shape(lambda model=model: caches.empty(model, 1, length, 1, jnp.dtype("bfloat16"), False))
            sizes.append(sum(2 * x.k_BKSH.size for x in cache.layers))
    assert sizes[0] / sizes[1] == pytest.approx(share)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[]], 4), "prompt 0 is empty"),
        (([[1], [2, 384]], 4), "prompt 1: token 384 is not in the vocabulary of 384"),
        (([[-1]], 4), "token -1 is not in the vocabulary"),
        (
            ([[1] * 60], 5),
            "60 tokens and 5 new tokens do not fit the capacity of 64; shorten it, or make the engine with capacity=128",
        ),
        (([[1]], 0), "max_new_tokens=0 must be at least 1"),
        (([[1.5]], 4), "prompt 0 must hold token ids"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(engine, arguments, message):
    c = config_of()
    limited = Engine(random_params(c.model), c, EngineOptions(chunk=16, capacity=64))
    with pytest.raises(ValueError, match=message):
        limited.generate(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": [1, 2]}, "2 seeds do not match 1 prompts; use one for each prompt"),
        ({"seeds": [-1]}, "seed -1 is not one of 0 to 4294967295"),
        ({"stop_tokens": [2**40]}, "stop token 1099511627776 is not one of 0 to 2147483647"),
        ({"questions": [[1], [2]]}, "2 questions do not match 1 prompts"),
    ],
)
def test_options_that_do_not_fit_the_prompts_are_refused(engine, options, message):
    with pytest.raises(ValueError, match=message):
        own = {name: options[name] for name in options if name != "stop_tokens"}
        engine.generate([[1]], 2, GenerateOptions(stop_tokens=options.get("stop_tokens", ())), **own)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunk": 18}, "chunk=18 does not split over 4 context shards"),
        ({"cache": "int4"}, "'int4' is not one of"),
        ({"slice": 0}, "slice=0 is not one of 1 to 32 tokens"),
        ({"slice": 33}, "slice=33 is not one of 1 to 32 tokens"),
        ({"batch_size": 0}, "a batch of 0 requests does not split over 1 shards"),
    ],
)
def test_engine_options_that_do_not_fit_are_refused(options, message):
    c = config_of()
    with jax.set_mesh(mesh_of(context=4)), pytest.raises(ValueError, match=message):
        Engine({}, c, EngineOptions(**options))
