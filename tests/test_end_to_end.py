"""launch/end_to_end.sh, one command from text to a report, and the conversations that it trains on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tool

ROOT = Path(__file__).parents[1]
SMALL = (
    "model.pattern=LG",
    "model.num_layers=2",
    "model.d_model=32",
    "model.d_ff=32",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "evals.tokens=1024",
)
LENGTHS = 128, 512, 512, 512
STEPS = 3  # of each stage


def test_an_answer_is_a_sentence_of_one_name_and_is_rejected_with_its_words_reversed(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""The first sentence about this module, on\ntwo lines. And another one."""\n'
        'def f():\n    """Too short."""\n'
        'def g():\n    """A sentence that two functions of a file have in common."""\n'
        'def h():\n    """A sentence that two functions of a file have in common."""\n'
        'def _hidden():\n    """A sentence about a function that has no name for others."""\n'
    )
    with tool("write_conversations") as program:
        found = program.answers(tmp_path)
        assert found == {
            "a": "The first sentence about this module, on two lines.",
            "g": "A sentence that two functions of a file have in common.",
        }
        pair = program.preference("a", found["a"])
        assert pair["chosen"].split() == pair["rejected"].split()[::-1] and len(pair["chosen"]) == len(pair["rejected"])
        assert program.chat("a", found["a"])["messages"][0] == pair["prompt"][0]


@pytest.mark.slow
def test_one_command_goes_from_text_to_a_report_and_goes_on_in_the_middle_of_a_stage(tmp_path, corpus):
    keys = [*SMALL, f"data.sources.text.paths={corpus}"]
    for i, length in enumerate(LENGTHS):
        keys += [f"stages[{i}].steps={STEPS}", f"stages[{i}].seq_len={length}", f"stages[{i}].lr_schedule.warmup_steps=1"]
    heeding = ["env", "--default-signal=INT"]  # a program in the background ignores Ctrl-C
    command = [*heeding, ROOT / "launch/end_to_end.sh", "tiny", tmp_path / "out", *(f"--config.{key}" for key in keys)]
    env = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    metrics = tmp_path / "out/run/metrics.jsonl"

    def ended(stop_at: int | None) -> tuple[int, str]:
        """Exit status and text of the command; after this step of the training it gets what Ctrl-C sends."""
        with (tmp_path / "text").open("w+") as text:
            program = subprocess.Popen(
                command, stdout=text, stderr=subprocess.STDOUT, env=env, cwd=tmp_path, start_new_session=True
            )
            try:
                deadline = time.monotonic() + 900
                while program.poll() is None and time.monotonic() < deadline:
                    if stop_at is not None and metrics.exists() and metrics.read_text().count("\n") >= stop_at:
                        os.killpg(program.pid, signal.SIGINT)
                        stop_at = None
                    time.sleep(0.02)
            finally:
                if program.poll() is None:
                    os.killpg(program.pid, signal.SIGKILL)
                    program.wait()
            text.seek(0)
            return program.returncode, text.read()

    for stop_at in (1, 2 * STEPS + 1):  # in pretraining and in sft
        status, text = ended(stop_at)
        assert status == 130 and "the same command goes on" in text, text
    status, text = ended(None)
    assert status == 0, text
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, len(LENGTHS) * STEPS + 1))
    report = (tmp_path / "out/report/report.md").read_text()
    assert all(f"| {name} " in report for name in ("run-3", "run-6", "run-9", "run-12", "merged"))
