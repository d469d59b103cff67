"""A trace has the steps that the flag names, and its operations the letters of their layer types."""

import jax
import numpy as np
import pytest
from conftest import BATCH, BLOCKED, mesh_of, on_mesh, random_params, tiny
from trained import stage

from hybrid_attn.model import losses
from hybrid_attn.train import loop, profile, steps


@pytest.mark.parametrize("text", ["5", "5:", "a:b", "1:2:3", "", "-1:2"])
def test_a_text_that_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match=rf"^--profile={text}: write the first and the last step to trace, such as 10:12$"):
        profile.parse(text)


@pytest.mark.parametrize("steps", [(0, 3), (4, 3), (9, 11), (5, 6)])
def test_steps_that_the_run_does_not_train_are_refused(steps):
    assert profile.check_range(profile.parse("7:8"), 6, 10) is None
    with pytest.raises(ValueError, match=r"must be steps from 7 to 10, with the first one first"):
        profile.check_range(steps, 6, 10)


def test_the_trace_begins_and_ends_with_the_steps_that_the_flag_names(tmp_path, monkeypatch):
    events, names = [], ("loss", "grad_norm", "bits_per_byte", "lr", "param_norm")
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_, name=name, **__: events.append(name))

    class Quiet:
        log = advance = lambda *_: None
        due = lambda *_: False  # noqa: E731
        say = lambda _, *lines: events.extend(lines)  # noqa: E731

    def step(state, batch):
        events.append(state + 1)
        return state + 1, dict.fromkeys(names, np.float32(1))

    c = tiny({"stages": [stage(5, 48, 8)]})
    with loop.Stop(None) as stop:
        traced = profile.Profile((2, 3), tmp_path)
        batches = iter((i, ()) for i in range(5))
        steps.Loop(
            c, [step], [mesh_of()], batches, Quiet(), Quiet(), stop, None, None, state=0, step=0, peaks=[1e12], profile=traced
        ).train()
    line = f"profile      steps 2 to 3: xprof --logdir={tmp_path}"
    assert events == [1, "start_trace", 2, 3, "stop_trace", line, 4, 5]


def test_operations_of_a_layer_have_the_letter_of_its_type_in_their_names(one_device):
    model = tiny({"model.pattern": "LGLG", "model.num_layers": 4}).model
    lowered = jax.jit(losses, static_argnums=(0, 3)).lower(model, random_params(model), on_mesh(BATCH), BLOCKED)
    text = lowered.as_text(debug_info=True)
    assert all(f"{name}/" in text for name in ("L/L0", "G/G1", "L/L2", "G/G3"))


def test_steps_are_traced_once_also_by_a_run_that_goes_back_to_them(tmp_path, monkeypatch):
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_, **__: None)
    traced = profile.Profile((3, 4), tmp_path)
    assert traced.begins(3)
    traced.start()
    assert traced.ends(5) and traced.stop() == f"profile      steps 3 to 4: xprof --logdir={tmp_path}"
    assert not traced.begins(3) and not traced.ends(5)
