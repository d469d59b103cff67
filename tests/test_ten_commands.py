"""The ten commands of the page follow one another, from text to a table of RULER, with a smaller model."""

import email
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, TINY, fences, shlex

SMALLER = {
    "plan": TINY,
    "train": TINY,
    "evaluate": ["--lengths=2048", "--ruler_tasks=niah_single_1,vt", "--samples=1", "--tokens=512"],
    "generate": ["--max_new_tokens=2"],
}
EXTENDED = ["--steps=2", "--config.stages[0].lr_schedule.warmup_steps=1", "--config.evals.tokens=512"]


def smaller(words: list[str]) -> list[str]:
    """The words after `python` of a command, with the flags of a smaller model behind them."""
    script, *flags = (
        word.replace("configs/", f"{ROOT}/configs/").replace("vocab_size=4096", "vocab_size=512") for word in words[1:]
    )
    is_extended = any("extend.py" in flag for flag in flags)
    return [str(ROOT / script), *flags, *(EXTENDED if is_extended else SMALLER.get(Path(script).stem, []))]


@pytest.mark.slow  # ten programs
def test_ten_commands_go_from_text_to_a_table_of_ruler(tmp_path):
    for module in (email, json):
        shutil.copytree(Path(module.__file__).parent, tmp_path / "text" / module.__name__)
    (content, *_) = fences((ROOT / "docs" / "ten-commands.md").read_text(), "text")
    commands = [shlex.split(line) for line in content.splitlines()]
    assert len(commands) == 10
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for words in commands:
        subprocess.run([sys.executable, *smaller(words)], cwd=tmp_path, env=env, check=True)
    assert "niah_single_1" in (tmp_path / "evals/ten/report.md").read_text()
    assert "RULER" in (tmp_path / "exported/README.md").read_text() and (tmp_path / "loss.png").exists()
