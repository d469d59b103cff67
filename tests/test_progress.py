"""The line of a step: averages since the last one that no compilation distorts, tokens seen, and time left."""

import math
import types

import pytest
from conftest import tiny

from hybrid_attn.model import flops
from hybrid_attn.train import steps
from hybrid_attn.train.steps import Progress, Timed

STAGES = [
    {"steps": steps, "seq_len": seq_len, "batch": batch, "microbatches": 1, "mixture": {}}
    for steps, seq_len, batch in ((4, 24, 16), (6, 48, 2))
]
VALUES = {"loss": 2.0, "bits_per_byte": 3.0, "grad_norm": 1.0, "lr": 1e-3}


def timed(stage, seconds, compiled=False, **changes):
    return Timed(VALUES | changes, seconds, 0.1 * seconds, compiled, stage, STAGES[stage]["batch"])


def test_speed_is_that_of_the_steps_that_compiled_nothing_and_losses_are_means_of_all():
    progress = Progress(tiny({"stages": STAGES}), [], [1e9, 4e9])  # a later stage in a faster dtype
    progress.steps.append(timed(0, 60.0, compiled=True))
    values = progress.line(1)
    assert values["step_time"] == 60.0 and all(math.isnan(values[name]) for name in ("tokens_per_s", "mfu", "seconds_left"))
    for stage, seconds, compiled, loss in ((0, 2.0, False, 6.0), (1, 80.0, True, 5.0), (1, 1.0, False, 1.0)):
        progress.steps.append(timed(stage, seconds, compiled, loss=loss))
    values = progress.line(6)
    assert (values["loss"], values["loss_mean"], values["steps"]) == (1.0, 4.0, 3)
    assert (values["step_time"], values["data_wait"]) == (1.5, pytest.approx(0.15))
    of_first, of_second = (n * flops.train_flops_per_token(tiny().model, length) for n, length in ((16 * 24, 24), (2 * 48, 48)))
    assert values["tokens_per_s"] == pytest.approx((16 * 24 + 2 * 48) / 3.0)
    assert values["mfu"] == pytest.approx((of_first / 1e9 + of_second / 4e9) / 3.0)
    assert (values["stage"], values["stages"], values["seq_len"]) == (2, 2, 48)
    assert values["tokens_seen"] == 4 * 16 * 24 + 2 * 2 * 48
    assert values["seconds_left"] == pytest.approx(4 * of_second / ((of_first + of_second) / 3.0))


def test_skipped_steps_are_not_among_the_tokens_seen():
    progress = Progress(tiny({"stages": STAGES}), [(3, 5), (9, 20)], [1e9, 1e9])
    assert progress.tokens_seen(4) == 2 * 16 * 24
    assert progress.tokens_seen(10) == 2 * 16 * 24 + 3 * 2 * 48


@pytest.mark.parametrize("stats, peak", [([None, None], None), ([{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}], 7)])
def test_the_peak_memory_is_that_of_the_fullest_device_that_reports_it(monkeypatch, stats, peak):
    devices = [types.SimpleNamespace(memory_stats=lambda x=x: x) for x in stats]
    monkeypatch.setattr(steps.jax, "local_devices", lambda: devices)
    progress = Progress(tiny({"stages": STAGES}), [], [1e9, 1e9])
    progress.steps.append(timed(0, 2.0))
    assert progress.line(1).get("peak_memory_bytes") == peak
