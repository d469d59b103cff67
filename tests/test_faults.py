"""Disturbed runs end with the same bits as undisturbed ones, and the program that compares them notices differences."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tool
from test_metrics import VALUES, of_steps

from hybrid_attn.train.metrics import Metrics

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_broken_runs_end_as_undisturbed_ones_do():
    command = [sys.executable, str(ROOT / "tools/faults.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_step_that_was_logged_before_a_kill_is_in_tensorboard_once_when_the_run_goes_on(tmp_path):
    for start, steps in ((0, range(1, 8)), (4, range(5, 11))):
        metrics = Metrics(tmp_path, start, of_steps(10)).open()
        for step in steps:
            metrics.log(step, VALUES)
            metrics.advance(step)  # and no close, as after a kill
    with tool("faults") as faults:
        assert faults.tensorboard_steps(tmp_path / "tensorboard") == list(range(1, 11))


def test_the_harness_sees_a_lost_step_another_loss_and_other_parameters(tmp_path, monkeypatch):
    every = [(step, 1 / step) for step in range(1, 97)]
    steps = [step for step, _ in every]
    outcomes = {
        "other parameters": ("b", every, steps),
        "a step twice, or missing": ("a", every[:50] + every[49:], steps),
        "a step twice, or missing, in TensorBoard": ("a", every, steps[:-39]),
        "other losses": ("a", [*every[:-1], (96, 2.0)], steps),
    }
    with tool("faults") as faults:
        monkeypatch.setattr(faults, "finish", lambda *_: [])
        lab = faults.Lab(tmp_path, {1: ("a", every, steps)})
        case = faults.Case("kill", None, (0, -9))
        for wrong, outcome in outcomes.items():
            monkeypatch.setattr(faults, "outcome", lambda _, outcome=outcome: outcome)
            assert faults.failures_of(lab, case, tmp_path / "kill", [-9]) == [wrong]
        monkeypatch.setattr(faults, "outcome", lambda _: ("a", every, steps))
        assert faults.failures_of(lab, case, tmp_path / "kill", [0]) == []
        assert faults.failures_of(lab, case, tmp_path / "kill", [1]) == ["exit code 1"]
        damage = faults.Case("kill", None, unreadable=2)
        for noticed in range(3):
            wrong = [f"{noticed} of 2 damaged checkpoints renamed"] if noticed < 2 else []
            assert faults.failures_of(lab, damage, tmp_path / "kill", []) == wrong
            (tmp_path / f"kill/checkpoints/{noticed}.unreadable").mkdir(parents=True)
        shutil.rmtree(tmp_path / "kill")
        (tmp_path / "kill.log").mkdir()
        traceback = "Traceback (most recent call last):\n"
        (tmp_path / "kill.log/0-0.err").write_text(f"{traceback}  in a file\nOSError: full\nerror: full\n")
        (tmp_path / "kill.log/1-0.err").write_text(f"a line\n{traceback}  in a f")
        assert faults.failures_of(lab, case, tmp_path / "kill", [0]) == ["a traceback: OSError: full", "a traceback: cut off"]
