"""The page of what the tests cover is that of its script, and a test is known by its words."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "support.py"


@pytest.mark.slow  # collects all tests
def test_the_page_of_what_the_tests_cover_is_current():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # the same
def test_the_tests_behind_a_row_are_those_that_name_it():
    done = subprocess.run([sys.executable, SCRIPT, "--why=ulysses"], capture_output=True, text=True, check=True)
    tests = done.stdout.splitlines()
    assert any("test_context.py" in test for test in tests) and not any("test_tokenizer.py" in test for test in tests)
