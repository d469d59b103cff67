"""Tasks of lm-evaluation-harness: what its definitions promise, on a tiny model, and on engines whose answers are known."""

import json
import random
import re
import string
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mesh_of, random_params, tiny
from test_tokenizer import byte_level

from hybrid_attn.data import tokenizer as tokenizers
from hybrid_attn.infer.engine import Engine

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402

from hybrid_attn.evals import harness  # noqa: E402

MAX_LENGTH = 48


class Letters:
    """A character for each id of the tiny model, so that every answer of it is a text."""

    characters = string.ascii_letters + string.digits + " \n.,?" + "".join(chr(0x100 + i) for i in range(315))
    bos, eos, vocab_size = 382, 383, 384

    def encode(self, text: bytes) -> np.ndarray:
        return np.array([self.characters.index(x) for x in text.decode()], np.int32)

    def decode(self, ids) -> str:
        return "".join(self.characters[i] for i in ids if i < self.bos)


LETTERS = Letters()


def engine_of(**options) -> Engine:
    c = tiny({"train.kernel": "reference", "train.dtype": "float32"})
    return Engine(random_params(c.model), c, chunk=16, **options)


@pytest.fixture(scope="module")
def engine():
    with jax.set_mesh(mesh_of()):
        yield engine_of()


@pytest.fixture(scope="module")
def lm(engine):
    return harness.EngineLM(engine, LETTERS, MAX_LENGTH)


def requests(kind, *arguments, task="toy", doc=None):
    return [Instance(kind, doc or {}, args, 0, (task, i, 1)) for i, args in enumerate(arguments)]


def scores(lm, *pairs):
    return lm.loglikelihood(requests("loglikelihood", *pairs))


def answers(lm, *contexts, task="toy", doc=None, **options):
    return lm.generate_until(requests("generate_until", *((x, options) for x in contexts), task=task, doc=doc))


class Echo:
    """Gives each prompt the ids that `reply` finds for it, and remembers what it was asked."""

    rows, capacity = 2, None

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def generate(self, prompts, max_new_tokens, *, on_tokens, **options):
        self.asked.append(("generate", [[*prompt] for prompt in prompts], max_new_tokens, options))
        for row, prompt in enumerate(prompts):
            for i in self.reply(prompt)[:max_new_tokens]:
                if on_tokens(row, [i]):
                    break

    def score(self, prompts, continuations):
        self.asked.append(("score", [[*prompt] for prompt in prompts], [[*more] for more in continuations]))
        return [np.full(len(more), -0.5, np.float32) for more in continuations]


TEXT = "The sky is blue.\nWhere is the sea?"


def test_a_whole_text_and_its_parts_have_the_same_probability(lm):
    (whole,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)))
    cuts = [i for i in range(1, len(TEXT)) if not TEXT[i - 1].isspace()]
    pairs = [("", TEXT), *((("", TEXT[:i])) for i in cuts), *((TEXT[:i], TEXT[i:]) for i in cuts)]
    first, *parts = [score for score, _ in scores(lm, *pairs)]
    assert whole < -3 * len(TEXT) and first == pytest.approx(whole, abs=1e-4)
    sums = [a + b for a, b in zip(parts[: len(cuts)], parts[len(cuts) :], strict=True)]
    np.testing.assert_allclose(sums, whole, atol=1e-4)


def test_spaces_that_end_a_context_belong_to_what_follows():
    lm = harness.EngineLM(Echo(lambda prompt: []), LETTERS, MAX_LENGTH)
    for context, continuation in (("a b", " c"), ("a b ", "c"), ("a\n\n", "b"), (" ", "b"), ("", "b c")):
        found = lm._split(context, continuation)
        ids = [LETTERS.bos, *LETTERS.encode((context + continuation).encode())]
        first = 1 + len(context.rstrip())
        assert found == (ids[:first], ids[first:])
        if context.strip():
            stub = type("Stub", (), {"backend": "causal", "tok_encode": lambda self, text: lm._ids(text)})()
            assert found == TemplateLM._encode_pair(stub, context, continuation)


def test_long_texts_are_scored_in_the_windows_that_the_harness_defines():
    engine = Echo(lambda prompt: [])
    lm = harness.EngineLM(engine, LETTERS, 4)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("abcdefghij",), ("abc",), ("",)))
    assert found == [-5.0, -1.5, 0.0]
    asked = [pair for _, *both in engine.asked for pair in zip(*both, strict=True)]
    windows = [([382], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9]), ([382], [0, 1, 2])]
    assert sorted(asked) == sorted(windows)
    assert lm.counts() == {"toy": {"requests": 3, "truncated": 0, "windowed": 1}}


def test_a_continuation_is_greedy_where_the_answer_begins_with_it(lm):
    contexts = ["The sky", "Where is", "a", TEXT]
    for context, answer in zip(contexts, answers(lm, *contexts, until=[], max_gen_toks=5), strict=True):
        assert len(answer) == 5 and not answer.isspace()
        wrong = LETTERS.characters[(LETTERS.characters.index(answer[2]) + 1) % 382]
        more = [answer, answer[:1], answer[:3], answer[:2] + wrong, answer[:2] + wrong + answer[3:], wrong * 9]
        found = [greedy for _, greedy in scores(lm, *((context, x) for x in more))]
        assert found == [True, True, True, False, False, False]


def test_results_are_those_of_the_requests_in_any_order_and_batch(lm):
    rng = random.Random(5)
    pairs = [("".join(rng.choices(LETTERS.characters[:62], k=rng.randrange(1, 40))), "ab cd"[: 1 + i % 5]) for i in range(11)]
    order = rng.sample(range(11), 11)
    draw = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 0.8, "top_k": 50}
    wanted, greedy, drawn = scores(lm, *pairs), answers(lm, *(a for a, _ in pairs), until=[]), None
    drawn = answers(lm, *(a for a, _ in pairs), **draw)
    small = harness.EngineLM(engine_of(rows=2), LETTERS, MAX_LENGTH)
    for other in (lm, small):
        assert scores(other, *(pairs[i] for i in order)) == [wanted[i] for i in order]
        assert answers(other, *(pairs[i][0] for i in order), until=[]) == [greedy[i] for i in order]
        assert answers(other, *(pairs[i][0] for i in order), **draw) == [drawn[i] for i in order]
    again = answers(lm, "abc", "abc", "abc", **draw)
    assert len(set(again)) == 3 and len({score for score, _ in wanted}) == 11
