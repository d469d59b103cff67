"""The step of the next stage is compiled before its first call, at the same steps on every process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_LAYER, on_mesh, tiny
from trained import stage

from configs import base
from hybrid_attn.data.packed import fields_of
from hybrid_attn.train.precompile import LEAD, NextStep
from hybrid_attn.train.step import TrainState, begin_stage, init_state


@pytest.fixture
def compilations():
    """The names of what was compiled."""
    events = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def next_step(*step_fns, steps=3):
    c = tiny({"stages": [stage(steps, 24, 16), stage(3, 48, 8)]})
    return NextStep(c, step_fns, [jax.sharding.get_mesh()] * 2)


def batch_of_twos(stage):
    return on_mesh({name: np.full((8, 48), 2, dtype) for name, dtype in fields_of(stage).items()})


def test_the_first_call_of_a_stage_finds_its_program(one_device, compilations):
    step = jax.jit(lambda state, batch: (state.step + 1, batch["tokens"].sum()))
    state, it = TrainState(jnp.int32(0), {}, ()), next_step(lambda *_: None, step)
    later = batch_of_twos(it.config.at(1))
    del compilations[:]
    it.begin(1, state)
    it.wait(step)
    assert len(compilations) == 1
    assert [int(x) for x in step(state, later)] == [1, 2 * 8 * 48]
    assert len(compilations) == 1


@pytest.mark.parametrize("reference", ["frozen", "store"])
def test_the_program_of_a_stage_that_begins_an_extra_or_reads_other_fields_is_found(reference, one_device, compilations):
    dpo = {"objective": "dpo", "preference": base.preference(reference=reference)}
    c = tiny(ONE_LAYER | {"stages": [stage(3, 24, 16), stage(3, 48, 8) | dpo]})
    step = jax.jit(lambda state, batch: jax.tree.map(jnp.sum, (state.extras, batch)))
    state = jax.jit(init_state, static_argnums=0)(c)
    begun, later = begin_stage(c, 1, state), batch_of_twos(c.at(1))
    del compilations[:]
    it = NextStep(c, (lambda *_: None, step), [one_device] * 2)
    it.begin(2, state)
    it.wait(step)
    extras, sums = step(begun, later)
    assert (
        len(compilations) == 1 and bool(extras) == (reference == "frozen") and ("references" in sums) == (reference == "store")
    )


def test_it_begins_when_a_tenth_of_the_stage_or_some_steps_are_left_and_never_twice_or_for_one_program(one_device):
    def begun(steps, same=False):
        first, second = jax.jit(lambda state, batch: state), jax.jit(lambda state, batch: state.step + 1)
        it = next_step(first, first if same else second, steps=steps)
        for step in range(1, steps + 4):
            it.begin(step, TrainState(jnp.int32(0), {}, ()))
            if it.begun:
                return step

    assert begun(100) == 100 - LEAD and begun(1000) == 900 and begun(100, same=True) is None


def test_a_compilation_that_fails_is_an_error_of_the_call_and_not_of_the_wait(one_device):
    def wrong(state, batch):
        raise ValueError("of this stage")

    step, state = jax.jit(wrong), TrainState(jnp.int32(0), {}, ())
    it = next_step(lambda *_: None, step)
    it.begin(2, state)
    it.wait(step)
    with pytest.raises(ValueError, match="of this stage"):
        step(state, {})
