"""Learning rates by step, over all stages or of each stage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from hybrid_attn import config
from hybrid_attn.config import LrSchedule, Piece
from hybrid_attn.configs import base
from hybrid_attn.train.schedule import schedule

STAGE = {"steps": 20, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}


def piece(steps, shape, start=None, end=None, warmup=0, fraction=0.5, decay="linear", jump=False):
    return Piece(steps, LrSchedule(shape, start, end, warmup, None, fraction, decay, jump))


def rates(*pieces):
    rate = schedule(tiny().optim, pieces)
    return np.asarray(jax.vmap(rate)(jnp.arange(sum(x.steps for x in pieces))))


def test_a_stage_goes_on_from_the_last_rate_of_the_stage_before():
    r = rates(piece(10, "constant", 0.4, warmup=4), piece(5, "linear", end=0.2), piece(6, "cosine", end=0.0))
    np.testing.assert_allclose(r[:4], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(r[4:10], 0.4, rtol=1e-6)
    np.testing.assert_allclose(r[10:15], [0.4, 0.35, 0.3, 0.25, 0.2], rtol=1e-6)
    np.testing.assert_allclose(r[15:], 0.1 * (1 + np.cos(np.pi * np.arange(6) / 5)), atol=1e-7)


def test_a_stage_may_warm_up_from_the_last_rate_of_the_stage_before():
    r = rates(piece(4, "linear", 0.4, end=0.1), piece(6, "constant", 0.5, warmup=4))
    np.testing.assert_allclose(r[3:], [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "decay, expected",
    [
        ("linear", [1, 0.775, 0.55, 0.325, 0.1]),
        ("sqrt", [1 - 0.9 * (i / 4) ** 0.5 for i in range(5)]),
        ("exponential", [0.1 ** (i / 4) for i in range(5)]),
    ],
)
def test_wsd_is_constant_and_decays_over_the_last_share_of_its_steps(decay, expected):
    np.testing.assert_allclose(rates(piece(10, "wsd", 1.0, end=0.1, decay=decay)), [1] * 5 + expected, rtol=1e-6)


def test_inverse_sqrt_falls_with_the_root_of_the_step():
    r = rates(piece(40, "inverse_sqrt", 1.0, warmup=4))
    np.testing.assert_allclose(r[[3, 4, 8, 16, 36]], [1, 1, 0.5**0.5, 0.5, 1 / 3], rtol=1e-6)


def test_the_schedule_of_a_run_is_that_of_one_stage_with_the_same_values():
    optim = dataclasses.replace(tiny().optim, schedule="wsd", lr=0.5, final_lr_ratio=0.2, warmup_steps=3, decay_fraction=0.5)
    of_run = jax.vmap(schedule(optim, [Piece(20, None)]))(jnp.arange(20))
    np.testing.assert_array_equal(of_run, rates(piece(20, "wsd", 0.5, end=0.1, warmup=3)))


@pytest.mark.parametrize("shape, end", [("inverse_sqrt", None), ("wsd", 1e-7), ("cosine", 0.0)])
def test_a_step_as_a_python_number_has_the_rate_that_it_has_as_an_array(shape, end):
    pieces = piece(3, "constant", 1e-3), piece(400, shape, end=end, warmup=2, fraction=0.01, decay="exponential")
    rate, expected = schedule(tiny().optim, pieces), rates(*pieces)
    for step in (0, 1, 2, 3, 4, 5, 398, 399, 400, 402):
        assert float(rate(step)) == pytest.approx(expected[step], rel=1e-5, abs=1e-12)


def counting(tokens, own, *spans):
    """The piece with the schedule of `own`, whose warm-up has so many tokens, over (steps, tokens of each)."""
    form = dataclasses.replace(own.lr_schedule, warmup_steps=0, warmup_tokens=tokens)
    return Piece(sum(steps for steps, _ in spans), form, spans)


@pytest.mark.parametrize("shape, end", [("inverse_sqrt", None), ("wsd", 1e-4), ("cosine", 0.0), ("linear", 0.0)])
def test_a_schedule_in_tokens_is_that_in_steps_where_all_steps_have_as_many_tokens(shape, end):
    pieces = piece(5, "constant", 2e-3), piece(40, shape, 1e-2, end=end, warmup=7, fraction=0.31)
    in_tokens = counting(7 * 384, pieces[1], (30, 384), (10, 384))
    np.testing.assert_allclose(rates(pieces[0], in_tokens), rates(*pieces), rtol=1e-5, atol=1e-9)


def test_a_schedule_in_tokens_rises_and_falls_with_the_tokens_of_a_ramp():
    spans = (6, 100), (5, 200), (9, 400)  # 600, 1,600 and 5,200 tokens
    seen = np.cumsum(np.repeat([100, 200, 400], [6, 5, 9]))
    r = rates(counting(1000, piece(20, "linear", 1.0, end=0.0), *spans))
    np.testing.assert_allclose(r[:8], seen[:8] / 1000, rtol=1e-5)
    share = (seen[8:] - 1000 - 400) / (5200 - 1000 - 400)  # the decay begins a step, of 400 tokens, after the warm-up
    np.testing.assert_allclose(r[8:], 1 - np.clip(share, 0, 1), rtol=1e-5, atol=1e-6)
    assert rates(counting(0, piece(20, "constant", 0.5), *spans)).tolist() == [0.5] * 20


def test_a_schedule_of_the_run_in_tokens_counts_those_of_every_stage():
    stages = [STAGE | {"steps": 10, "batch": 2}, STAGE | {"steps": 5, "seq_len": 96}]
    c = tiny({"stages": stages, "optim.warmup_steps": 0, "optim.warmup_tokens": 1920, "optim.lr": 1.0})
    r = np.asarray(jax.vmap(schedule(c.optim, c.pieces))(jnp.arange(15)))
    np.testing.assert_allclose(r[:12], [*(np.arange(1, 11) * 96 / 1920), 0.9, 1.0], rtol=1e-5)
    assert r[12] < 1 and r[14] == pytest.approx(0.1)


def test_a_stage_cannot_go_on_from_a_rate_of_zero():
    with pytest.raises(ValueError, match=r"stages\[1\].lr_schedule.start is None, and the stage before ends at 0; give a rate"):
        rates(piece(4, "linear", 0.1, end=0.0), piece(4, "cosine", end=0.0))


def test_a_jump_is_an_error_unless_it_is_asked_for():
    before = piece(4, "linear", 0.4, end=0.1)
    with pytest.raises(
        ValueError, match=r"stages\[1\].lr_schedule.start=0.2 is not the last rate of the stage before, 0.1; use"
    ):
        rates(before, piece(4, "constant", 0.2))
    assert rates(before, piece(4, "constant", 0.2, jump=True))[4] == pytest.approx(0.2)
    assert rates(before, piece(4, "constant", 0.1))[4] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="start is None, and no stage is before it"):
        rates(piece(4, "linear", end=0.1))


def built(*schedules):
    return tiny({"stages": [STAGE | {"lr_schedule": x and base.lr_schedule(**x)} for x in schedules]})


def test_every_stage_has_a_schedule_or_none():
    c = built({"start": 0.1, "end": 0.05}, {"end": 0.01})
    assert [x.lr_schedule.end for x in c.pieces] == [0.05, 0.01] and c.at(0) == c.at(1)
    assert built(None, None).pieces == (Piece(40, None, ((20, 384), (20, 384))),)
    with pytest.raises(ValueError, match=r"of stages\[0\] and stages\[1\] only one has lr_schedule"):
        built({"start": 0.1, "end": 0.05}, None)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"start": 0.1}, "shape='linear' needs a last rate, and lr_schedule.end=None"),
        ({"shape": "constant", "start": 0.1, "end": 0.1}, "shape='constant' has no last rate of its own"),
        ({"shape": "wsd", "start": 0.1, "end": 0.0, "decay_shape": "exponential"}, "lr_schedule.end=0 is never reached"),
        ({"start": 0.1, "end": 0.0, "warmup_steps": 4, "warmup_tokens": 9}, "warmup_steps=4 and lr_schedule.warmup_tokens=9"),
        ({"shape": "liner"}, "is not one of 'cosine', .*did you mean 'linear'"),
    ],
)
def test_values_that_do_not_fit_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        built(values)


def test_an_older_config_has_no_schedules_of_stages():
    values = config.to_dict(tiny())
    del values["stages"][0]["lr_schedule"], values["optim"]["decay_shape"], values["optim"]["warmup_tokens"]
    assert config.build(values) == tiny()
    values = config.to_dict(built({"start": 0.1, "end": 0.05}))
    del values["stages"][0]["lr_schedule"]["warmup_tokens"], values["stages"][0]["tokens"]
    assert config.build(values) == built({"start": 0.1, "end": 0.05})
