"""The process beside a run of a study: it stops the run of a killed study, and writes what the run cost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid_attn.studies import children, runs

WAITS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
STUDY_TO_KILL = "import os, subprocess, sys; subprocess.Popen([*sys.argv[1:4], str(os.getpid()), *sys.argv[4:]]).wait()"


def child(cost: Path, *command: str) -> list[str]:
    """The command of a child process without the number of the study."""
    return [sys.executable, "-P", str(children.CHILD), str(cost), '{"started": 1.5, "machine": {"processor": "x"}}', *command]


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_of_a_killed_study_is_stopped_and_its_cost_is_written(tmp_path):
    cost, begun = tmp_path / "cost.jsonl", tmp_path / "begun"
    command = child(cost, sys.executable, "-c", WAITS, str(begun))
    program = subprocess.Popen([sys.executable, "-c", STUDY_TO_KILL, *command])
    wait_for(begun.exists)
    assert runs.costs(tmp_path)[0] is None
    program.kill()
    program.wait()
    wait_for(lambda: cost.read_text().count("\n") == 2)
    start, end = (json.loads(line) for line in cost.read_text().splitlines())
    assert start["started"] == end["started"] == 1.5 and end["exit_code"] == 3 and 0 < end["cpu_seconds"] < 60


def test_a_command_that_a_signal_ends_has_the_exit_code_of_a_shell(tmp_path):
    command = child(tmp_path / "cost.jsonl", "sh", "-c", "kill -9 $$")
    command.insert(3, str(os.getpid()))
    assert subprocess.run(command).returncode == 128 + signal.SIGKILL
    assert json.loads((tmp_path / "cost.jsonl").read_text().splitlines()[1])["exit_code"] == -signal.SIGKILL


ENDED = {"cpu_seconds": 2.5, "seconds": 3.0, "exit_code": 0}


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ([ENDED, ENDED], 5.0),  # as older versions wrote them
        ([{"started": 1}, ENDED | {"started": 1, "exit_code": 1}, {"started": 2}, ENDED | {"started": 2}], 5.0),
        ([{"started": 1}, {"started": 2}, ENDED | {"started": 2}], None),
        ([ENDED | {"exit_code": 2}], None),  # the process that completed the run has written nothing
        ([], None),
    ],
)  # fmt: skip
def test_the_cost_of_a_run_is_known_if_all_of_its_processes_wrote_it(lines, seconds, tmp_path):
    (tmp_path / "cost.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs.costs(tmp_path)[0] == seconds
