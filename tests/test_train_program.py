"""The training program: its errors in a line, its exit codes, and signals."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver
from conftest import tool

from hybrid_attn import checkpoint
from hybrid_attn.programs import parse
from hybrid_attn.train import loop

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT}/configs/hybrid_8k.py"
PROGRAM = [sys.executable, str(ROOT / "launch/train.py"), CONFIG]


def test_the_program_says_what_is_wrong_in_a_line(tmp_path):
    command = [*PROGRAM, f"--workdir={tmp_path}", "--config.data.sources.text.paths=('/nowhere/*',)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "matches no file" in [line for line in done.stderr.splitlines() if line.startswith("error: ")][0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.optim.lrr=1"], "unknown key config.optim.lrr; did you mean config.optim.lr?"),
        (["--config=configs/none.py"], "configs/none.py: no such file"),
        (["--config=configs/hybrid_8k.py:7b"], "no size '7b'; it has small, 150m, 1b, 8b"),
        (["--config.model.kinds.L.window=0"], "window=0 must be at least 1"),
        (["--skip_steps=4:x"], "--skip_steps=4:x: '4:x' is no range of steps; write 40, or 40:42"),
        (["--profile=9"], "--profile=9: write the first and the last step to trace, such as 10:12"),
        (["--profile=9:400"], "--profile=9:400 must be steps from 1 to 300, with the first one first"),
        (["--config.model.num_kv_heads=3"], "num_heads=2 is not a multiple of model.num_kv_heads=3"),
    ],
)
def test_a_wrong_config_is_a_line_and_exit_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", CONFIG, f"--workdir={tmp_path}", *arguments])
    monkeypatch.chdir(ROOT)
    with tool("train") as program, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        program.main(parse(sys.argv))
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1) and message in error


@pytest.mark.parametrize(
    "error, code, said",
    [
        (OSError(errno.EROFS, "Read-only file system", "/ro/run"), 1, "error: /ro/run: Read-only file system\n"),
        (ValueError("another model:\n  d_model: 1 -> 2"), 2, "error: another model:\n  d_model: 1 -> 2\n"),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error preparing computation: Out of memory allocating 400 bytes."),
            2,
            "error: a device has too little memory for a step of this config (tools/plan.py computes what a step needs): "
            "INTERNAL: Error preparing computation: Out of memory allocating 400 bytes.\n",
        ),
        (RuntimeError("Unable to initialize backend 'foo': new"), 2, "error: Unable to initialize backend 'foo': new\n"),
    ],
)
def test_an_error_of_a_run_is_said_with_its_file_and_all_its_lines(error, code, said, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(loop, "train", broken)
    monkeypatch.setattr(sys, "argv", ["train.py", CONFIG, f"--workdir={tmp_path}"])
    monkeypatch.chdir(ROOT)
    with tool("train") as program, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        program.main(parse(sys.argv))
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


def test_the_program_reads_its_flags_before_it_imports_what_takes_long():
    """So that --help is there at once, and Ctrl-C meets no import that swallows it."""
    code = f"import runpy, sys; runpy.run_path({str(PROGRAM[1])!r}); print('jax' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout == "False\n", done.stderr


SMALL = (
    "--config.stages[0].steps=100000", "--config.stages[0].seq_len=64", "--config.train.log_every=1",
    "--config.evals.tokens=256", "--config.model.d_model=32", "--config.model.d_ff=32", "--config.model.head_dim=8",
    "--config.model.pattern=L", "--config.model.num_layers=1",
)  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_and_sigterm_save_and_exit_0(corpus, tmp_path, number):
    command = [*PROGRAM, f"--workdir={tmp_path}", f"--config.data.sources.text.paths=('{corpus}',)", *SMALL]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as program:
        killer = threading.Timer(240, program.kill)
        killer.start()
        lines = []
        for line in program.stdout:
            lines.append(line)
            if line.startswith("step 3/"):
                program.send_signal(number)
        stderr = program.stderr.read()
        killer.cancel()
    assert program.returncode == 0, stderr
    assert "Traceback" not in stderr
    saved = checkpoint.steps(tmp_path / "checkpoints")
    assert saved and saved[-1] >= 3
    assert f"stopped after step {saved[-1]}" in lines[-1]
