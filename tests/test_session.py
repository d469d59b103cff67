"""A conversation that goes on in its cache has the replies of one that is read from the beginning."""

import jax
import numpy as np
import pytest
from conftest import ONE_LAYER, mesh_of, random_params, tiny

from hybrid_attn.infer.engine import EngineOptions
from hybrid_attn.infer.session import Session

PROGRAMS = {}


def session_of(changes=(), slots=0, **options):
    """A session of a local layer of window 8 and a global one, whose cache has so many slots, on the mesh in force."""
    c = tiny({"model.pattern": "LG", "model.num_layers": 2, "train.kernel": "reference"} | dict(changes), L={"window": 8})
    session = Session(random_params(c.model), c, EngineOptions(chunk=16, slice=4, **options), PROGRAMS)
    session._slots = slots
    return session


@pytest.mark.parametrize("options", [{}, pytest.param({"cache": "int8"}, marks=pytest.mark.slow)], ids=str)
def test_the_next_turn_reads_only_what_is_new_and_replies_alike(one_device, options):
    session = session_of(slots=64, **options)
    rng, prompt = np.random.default_rng(1), []
    for more in (20, 1, 18):
        prompt += rng.integers(0, 384, more).tolist()
        (generated,), (expected,) = (x.generate([prompt], 7) for x in (session, session_of(slots=64, **options)))
        assert generated.tokens.tolist() == expected.tokens.tolist() and session.timing.prompt_tokens == more
        np.testing.assert_allclose(generated.logprobs, expected.logprobs, atol=2e-2 if options else 1e-4)
        prompt += generated.tokens.tolist()
    assert session._continued(np.array([*prompt, 1]), 64) == 60 and session._continued(np.array([*prompt, 1]), 65) == 0
    assert session._slots == 128


def test_another_history_is_read_anew_and_a_stopped_or_failed_reply_is_gone_on_from(one_device):
    session, first = session_of(slots=64), [*range(9)]

    def check(prompt, unread):
        (generated,), (expected,) = session.generate([prompt], 3), session_of(slots=64).generate([prompt], 3)
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


def test_a_mesh_that_splits_the_tokens_reads_every_prompt_from_the_beginning():
    with jax.set_mesh(mesh_of(context=2)):
        session = session_of(ONE_LAYER)
        (generated,) = session.generate([[1, 2, 3]], 2)
        session.generate([[1, 2, 3, *generated.tokens.tolist(), 4]], 2)
        assert session.timing.prompt_tokens == 6


def test_a_session_has_one_prompt_at_a_time(one_device):
    with pytest.raises(ValueError, match="a session has one prompt at a time"):
        session_of(ONE_LAYER).generate([[1], [2]], 2)
