"""Metrics are there once for each step, survive a kill, and divide by an honest peak."""

import io
import json
import math
import sys
import time
import types

import jax
import pytest
from conftest import tensorboard_events, tiny

from hybrid_attn.config import Config
from hybrid_attn.train import console
from hybrid_attn.train import metrics as metrics_module
from hybrid_attn.train.metrics import Metrics, peak_flops, set_aside

VALUES = {
    "loss": 2.3125, "bits_per_byte": 3.3362, "grad_norm": 0.8125, "lr": 3e-3, "step_time": 0.5, "data_wait": 0.001,
    "tokens_per_s": 5412.0, "mfu": 0.4,
}  # fmt: skip


def of_steps(total: int) -> Config:
    return tiny({"stages": [{"steps": total, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}]})


def _run(workdir, start: int, *steps: int, total: int = 300, **changes) -> None:
    """Logs steps of the same `VALUES`, but for the changes."""
    metrics = Metrics(workdir, start, of_steps(total)).open()
    for step in steps:
        metrics.log(step, {**VALUES, **changes})
        metrics.advance(step)
    metrics.close()


def _lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_a_line_of_json_a_line_on_stdout_and_scalars_in_tensorboard(tmp_path, capsys):
    _run(tmp_path, 39, 40)
    assert _lines(tmp_path / "metrics.jsonl") == [{"step": 40, **VALUES}]
    assert capsys.readouterr().out == (
        "step 40/300  loss 2.312  bpb 3.336  lr 0.003  grad 0.81  5,412 tok/s  40% MFU  data 0.2%\n"
    )
    scalars = {v.tag: v.simple_value for event in tensorboard_events(tmp_path) for v in event.summary.value if event.step == 40}
    assert scalars == pytest.approx(
        {
            "train/loss_nats": 2.3125, "train/bits_per_byte": 3.3362, "train/learning_rate": 3e-3, "norms/gradient": 0.8125,
            "speed/tokens_per_second": 5412.0, "speed/mfu_share": 0.4, "speed/step_seconds": 0.5,
            "speed/data_wait_seconds": 0.001,
        }
    )  # fmt: skip


def test_a_line_says_the_stage_the_averages_what_is_seen_and_what_is_left(tmp_path, capsys):
    far = {"loss_mean": 2.5, "bits_per_byte_mean": 3.6, "stage": 2, "stages": 3, "seq_len": 32_768, "tokens_seen": 2_457_600}
    _run(tmp_path, 39, 40, **far, peak_memory_bytes=12_340_000_000, seconds_left=7503.2)
    assert capsys.readouterr().out == (
        "step 40/300  stage 2/3 of 32,768  loss 2.500  bpb 3.600  lr 0.003  grad 0.81  5,412 tok/s  40% MFU  data 0.2%  "
        "2.46M tokens  peak 12.3 GB  2h 05m left\n"
    )
    assert _lines(tmp_path / "metrics.jsonl")[0]["loss"] == 2.3125


def test_the_line_of_a_step_that_was_compiled_has_no_speed(tmp_path, capsys):
    _run(tmp_path, 0, 1, tokens_per_s=math.nan, mfu=math.nan, step_time=12.34)
    assert capsys.readouterr().out == "step 1/300  loss 2.312  bpb 3.336  lr 0.003  grad 0.81  12.3 s with compilation\n"
    assert _lines(tmp_path / "metrics.jsonl")[0]["tokens_per_s"] is None
    tags = {value.tag for event in tensorboard_events(tmp_path) for value in event.summary.value}
    assert "speed/tokens_per_second" not in tags and "train/loss_nats" in tags


def test_a_skipped_step_is_a_line_of_its_own(tmp_path, capsys):
    metrics = Metrics(tmp_path, 3, of_steps(10)).open()
    metrics.skip(4, "its batch is passed over")
    metrics.close()
    assert _lines(tmp_path / "metrics.jsonl") == [{"step": 4, "skipped": True, "reason": "its batch is passed over"}]
    assert capsys.readouterr().out == "step 4/10  skipped: its batch is passed over\n"


@pytest.mark.parametrize("seconds, text", [(8, "8s"), (59.7, "1m 00s"), (312, "5m 12s"), (7503, "2h 05m"), (273_600, "3d 04h")])
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert console.duration(seconds) == text


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    metrics = Metrics(tmp_path, 0, of_steps(10)).open()
    metrics.log(1, VALUES)
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1]
    metrics.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    _run(tmp_path, 0, 1, 2, 3, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # what a kill leaves
    _run(tmp_path, 2, 3, 4, 5, loss=1.0)
    lines = _lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == [2.3125, 2.3125, 1.0, 1.0, 1.0]
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    starts = [event.step for event in tensorboard_events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 3], "TensorBoard hides what the first run wrote from step 3 on"


def test_a_scalar_is_in_tensorboards_file_before_the_next_step(tmp_path):
    metrics = Metrics(tmp_path, 0, of_steps(100)).open()
    for step in range(1, 41):
        metrics.log(step, VALUES)
        metrics.score("position/text/48", 2.0)
        values = [(event.step, value.tag) for event in tensorboard_events(tmp_path) for value in event.summary.value]
        steps = [number for number, tag in values if tag == "train/loss_nats"]
        assert steps == list(range(1, step + 1))


def test_metrics_that_are_removed_while_a_run_goes_on_are_there_again(tmp_path, capsys):
    metrics = Metrics(tmp_path, 0, of_steps(10)).open()
    metrics.log(1, VALUES)
    (tmp_path / "metrics.jsonl").unlink()
    metrics.log(2, VALUES)
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert f"{tmp_path}/metrics.jsonl was removed" in capsys.readouterr().out


def _write_records(workdir, *lines: str) -> str:
    """The same lines in both files, an evaluation of step 300, and TensorBoard's folder."""
    for name in ("metrics.jsonl", "evals.jsonl"):
        (workdir / name).write_text("".join(f"{line}\n" for line in lines))
    for folder in ("evals/300", "evals/200", "tensorboard"):
        (workdir / folder).mkdir(parents=True)
    return (workdir / "metrics.jsonl").read_text()


STEP_LINES = [json.dumps({"step": step}) for step in (100, 200, 300)]


def test_the_records_of_a_run_whose_checkpoints_are_gone_are_kept_under_another_name(tmp_path):
    old = _write_records(tmp_path, *STEP_LINES)
    notes = set_aside(tmp_path, 0, replayed=1000)
    _run(tmp_path, 0, 1)
    kept = {"metrics.jsonl.old", "evals.jsonl.old", "evals/200.old", "evals/300.old", "tensorboard.old"}
    assert len(notes) == 5 and all(str(tmp_path / name) in "\n".join(notes) for name in kept)
    assert all((tmp_path / name).exists() for name in kept)
    assert {(tmp_path / name).read_text() for name in ("metrics.jsonl.old", "evals.jsonl.old")} == {old}
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("start, replayed, more, kept", [
    (200, 100, "", False),
    (200, 100, '{"step": 301, "lo', False),
    (200, 99, "", True),
    (300, 100, "5\n", True),
    (300, 100, "null\n", True),
    (300, 100, "\udcff\n", True),
    (300, 100, '{"step": "x"}\n', True),
])  # fmt: skip
def test_records_are_cut_as_a_kill_requires_and_kept_where_more_would_be_lost(tmp_path, start, replayed, more, kept):
    _write_records(tmp_path, *STEP_LINES)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + more.encode(errors="surrogateescape"))
    old = path.read_bytes()
    set_aside(tmp_path, start, replayed)
    _run(tmp_path, start, 301)
    assert [line["step"] for line in _lines(path)] == [*range(100, start + 1, 100), 301]
    copy = tmp_path / "metrics.jsonl.old"
    assert copy.read_bytes() == old if kept else not copy.exists()
    assert (tmp_path / "evals/300.old").exists() == (start < 300) and (tmp_path / "evals/200").exists()


def test_what_is_not_a_number_is_null(tmp_path):
    _run(tmp_path, 0, 1, loss=math.nan, grad_norm=math.inf)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["loss"] is None and line["grad_norm"] is None and line["lr"] == 3e-3


def test_evaluations_are_lines_of_their_own_and_stay_until_they_are_run_again(tmp_path):
    old = [{"eval": "position", "step": step, "length": 8192, "loss": 2.0} for step in (200, 300, 400)]
    (tmp_path / "evals.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in old) + '{"eval": "posi')
    metrics = Metrics(tmp_path, 300, of_steps(500)).open()
    assert _lines(tmp_path / "evals.jsonl") == old[:2]
    metrics.forget()
    metrics.report("position", [{"length": 8192, "loss": 1.5}])
    assert _lines(tmp_path / "evals.jsonl") == [old[0], old[1] | {"loss": 1.5}]
    metrics.advance(400)
    metrics.forget()
    metrics.close()
    assert _lines(tmp_path / "evals.jsonl") == [old[0], old[1] | {"loss": 1.5}]


def test_a_terminal_shows_a_bar_that_starts_where_the_run_goes_on(tmp_path, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    _run(tmp_path, 150, 151, 152)
    assert "| 152/300 [" in terminal.getvalue() and "loss 2.31" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _run(tmp_path / "run", 0, 1)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


KINDS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_of_a_known_device_is_looked_up(kind):
    device = types.SimpleNamespace(device_kind=kind, platform="unused")
    assert peak_flops(device, "bfloat16") == (KINDS[kind], "looked up")


def test_another_peak_is_measured_quickly_and_shared_by_the_devices_of_a_host(monkeypatch):
    before = time.perf_counter()
    peak, source = peak_flops(jax.devices()[0], "float32")
    assert time.perf_counter() - before < 15  # a second on an idle machine
    assert source == "measured" and 1e8 < peak * jax.device_count() < 1e15
    monkeypatch.setattr(metrics_module, "_measure", lambda device, dtype: 8e9)
    assert peak_flops(jax.devices()[0], "float32") == (1e9, "measured")


def test_the_measure_is_of_matmuls_of_the_asked_type(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: float(next(ticks)))
    assert metrics_module._measure(jax.devices()[0], "float32") == 2 * 1024**3
