"""The worked diffs of the code map apply to a copy of the repository, and their own tests pass there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = sorted((ROOT / "docs" / "diffs").glob("*.diff"))
PARTS = ("hybrid_attn", "configs", "tests", "pyproject.toml")


@pytest.fixture
def copy(tmp_path):
    """What the diffs change of the repository, and what their tests need."""
    ignored = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        source, target = ROOT / part, tmp_path / part
        shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
    return tmp_path


OF_EACH_DIFF = pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)


@OF_EACH_DIFF
def test_a_worked_diff_fits_the_code_and_has_a_test(diff):
    subprocess.run(["git", "apply", "--check", diff], cwd=ROOT, check=True)
    assert re.search(r"^\+\+\+ b/tests/test_\w+\.py$", diff.read_text(), re.MULTILINE)


@pytest.mark.slow  # a process for each, which compiles
@OF_EACH_DIFF
def test_the_tests_of_a_worked_diff_pass(diff, copy):
    subprocess.run(["git", "apply", diff], cwd=copy, check=True)
    added = re.findall(r"^\+\+\+ b/(tests/\w+\.py)$", diff.read_text(), re.MULTILINE)
    assert added and all(not (ROOT / path).exists() for path in added)
    env = {**os.environ, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *added]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_code_map_shows_every_diff():
    text = (ROOT / "docs" / "code-map.md").read_text()
    assert len(DIFFS) == 3 and all(f"(diffs/{path.name})" in text for path in DIFFS)
