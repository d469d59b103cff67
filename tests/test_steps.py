"""The loop over steps: the metrics of a step are read after the next is dispatched, and no step waits without need."""

import time

import numpy as np
import pytest
from conftest import mesh_of, tiny
from trained import stage

from hybrid_attn.train import loop, steps


def test_metrics_of_a_step_are_read_after_the_next_is_dispatched():
    events = []

    class Value:
        def __init__(self, step):
            self.step = step

        def __array__(self, *_, **__):
            events.append(("read", self.step))
            return np.float32(1.0)

        __float__ = lambda self: float(self.__array__())  # noqa: E731

    def step(state, batch):
        events.append(("dispatch", state + 1))
        return state + 1, {"loss": Value(state + 1), **dict.fromkeys(others, np.float32(1))}

    class Quiet:
        log = advance = lambda *_: None
        due = lambda *_: False  # noqa: E731

    others = ("grad_norm", "bits_per_byte", "lr", "param_norm")
    c = tiny({"train.log_every": 1, "stages": [stage(3, 48, 8)]})
    with loop.Stop(None) as stop:
        batches = iter((i, ()) for i in range(3))
        steps.Loop(c, [step], [mesh_of()], batches, Quiet(), Quiet(), stop, None, None, state=0, step=0, peaks=[1e12]).train()
    order = [events.index(event) for event in (("dispatch", 2), ("read", 1), ("dispatch", 3), ("read", 2), ("read", 3))]
    assert order == sorted(order)


def test_no_step_waits_longer_for_data_than_it_takes():
    waits, waited, values = (0.0, 0.2, 0.0, 0.1), [], {"step_time": [], "data_wait": []}

    def batches():
        for i, seconds in enumerate(waits):
            began = time.perf_counter()
            time.sleep(seconds)
            waited.append(time.perf_counter() - began)  # on a busy machine a sleep is longer
            yield i, ()

    class Lines:
        advance = lambda *_: None  # noqa: E731
        due = lambda *_: False  # noqa: E731

        def log(self, number, line, *_):
            for name, of_steps in values.items():
                of_steps.append(line[name])

    names = ("loss", "grad_norm", "bits_per_byte", "lr", "param_norm")
    c = tiny({"train.log_every": 1, "stages": [stage(len(waits), 48, 8)]})
    with loop.Stop(None) as stop:
        step = lambda state, *_: (state, dict.fromkeys(names, np.float32(1)))  # noqa: E731
        steps.Loop(c, [step], [mesh_of()], batches(), Lines(), Lines(), stop, None, None, state=0, step=0, peaks=[1e12]).train()
    assert all(wait <= took for wait, took in zip(values["data_wait"], values["step_time"], strict=True))
    assert sum(values["data_wait"]) == pytest.approx(sum(waited), rel=0.5)
