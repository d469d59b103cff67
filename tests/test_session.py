"""A conversation that goes on in its cache has the replies of one that is read from the beginning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_LAYER, mesh_of, random_params, tiny

from hybrid_attn.data import chat
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.infer import steps
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.prompts import Requests
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.infer.session import Session
from hybrid_attn.infer.text import AnswerOptions, answers

PROGRAMS, BYTES = {}, ByteTokenizer()


def engine_of(changes=(), engine=Engine, **options):
    """An engine of a local layer of window 8 and a global one, on the mesh in force."""
    c = tiny({"model.pattern": "LG", "model.num_layers": 2, "train.kernel": "reference"} | dict(changes), L={"window": 8})
    return engine(random_params(c.model), c, EngineOptions(chunk=16, slice=4, **options), PROGRAMS)


def session_of(changes=(), slots=0, **options):
    """A session of that model, whose cache has so many slots."""
    session = engine_of(changes, Session, **options)
    session._slots = slots
    return session


@pytest.mark.parametrize("options", [{}, pytest.param({"cache": "int8"}, marks=pytest.mark.slow)], ids=str)
def test_the_next_turn_reads_only_what_is_new_and_replies_alike(one_device, options):
    session = session_of(slots=64, **options)
    rng, prompt = np.random.default_rng(1), []
    for more in (20, 1, 18):
        prompt += rng.integers(0, 384, more).tolist()
        (generated,), (expected,) = (x.generate([prompt], 7) for x in (session, engine_of(**options)))
        assert generated.tokens.tolist() == expected.tokens.tolist() and session.timing.prompt_tokens == more
        np.testing.assert_allclose(generated.logprobs, expected.logprobs, atol=2e-2 if options else 1e-4)
        prompt += generated.tokens.tolist()
    assert session._continued(np.array([*prompt, 1]), 64) == 60 and session._continued(np.array([*prompt, 1]), 65) == 0
    assert session._slots == 128


def test_another_history_is_read_anew_and_a_stopped_or_failed_reply_is_gone_on_from(one_device):
    session, first = session_of(slots=64), [*range(9)]

    def check(prompt, unread):
        (generated,), (expected,) = session.generate([prompt], 3), engine_of().generate([prompt], 3)
        assert generated.tokens.tolist() == expected.tokens.tolist() and session.timing.prompt_tokens == unread
        return [*prompt, *generated.tokens.tolist()]

    stopped = session.generate([first], 40, on_tokens=lambda _, ids: True)[0].tokens.tolist()
    assert len(stopped) == 1
    check([*first, *stopped, 5], unread=1)
    check([*first, 5], unread=10)
    prompt = [*check(first[:4], unread=4), 2]

    def fail(_, ids):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate([prompt], 3, on_tokens=fail)
    check(prompt, unread=len(prompt))


def test_a_prompt_that_could_not_be_read_leaves_a_session_that_reads_it_anew(one_device, monkeypatch):
    session, prompt = session_of(slots=64), [*range(9)]
    prompt += session.generate([prompt], 3)[0].tokens.tolist()
    with monkeypatch.context() as patch:
        prefill = session._prefill

        def fail(*args):
            prefill(*args)  # which has the arrays of the cache
            raise MemoryError

        patch.setattr(session, "_prefill", fail)
        with pytest.raises(MemoryError):
            session.generate([[*prompt, 1]], 3)
    (generated,), (expected,) = session.generate([[*prompt, 1]], 3), engine_of().generate([[*prompt, 1]], 3)
    assert generated.tokens.tolist() == expected.tokens.tolist() and session.timing.prompt_tokens == 13


def test_the_next_message_of_a_conversation_begins_with_the_tokens_that_are_cached(one_device, monkeypatch):
    reply = jnp.array([*b"yes, sir", BYTES.eos])

    def replied(logits_BV, sampling, seeds_B, numbers_B):
        is_next_BR = numbers_B[:, None] == jnp.arange(len(reply))
        return (is_next_BR * reply).sum(1), jnp.zeros_like(numbers_B, jnp.float32)

    monkeypatch.setattr(steps, "sample", replied)
    session, requests = session_of(ONE_LAYER, slots=128), Requests(BYTES, chat.load_template(None, "bytes"))
    options = AnswerOptions(GenerateOptions(Sampling(temperature=9.0), [BYTES.eos]))  # of which no program is compiled yet
    messages, unread = [], []
    for text in ("hi", "how?"):
        messages.append({"role": "user", "content": text})
        (answer,) = answers(session, BYTES, [requests.ids(messages)], 20, options)
        messages.append({"role": "assistant", "content": answer.text})
        unread.append(session.timing.prompt_tokens)
    assert answer.text == "yes, sir"
    assert unread == [1 + len("user:\nhi\n\nassistant:\n"), len("\nuser:\nhow?\n\nassistant:\n")]


def test_a_mesh_that_splits_the_tokens_reads_every_prompt_from_the_beginning():
    with jax.set_mesh(mesh_of(context=2)):
        session = session_of(ONE_LAYER)
        (generated,) = session.generate([[1, 2, 3]], 2)
        session.generate([[1, 2, 3, *generated.tokens.tolist(), 4]], 2)
        assert session.timing.prompt_tokens == 6


def test_a_session_has_one_prompt_at_a_time(one_device):
    with pytest.raises(ValueError, match="a session has one prompt at a time"):
        session_of(ONE_LAYER).generate([[1], [2]], 2)
