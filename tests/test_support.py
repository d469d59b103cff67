"""The page of what the tests cover is that of its script, and a test uses what its code names."""

import ast
import runpy
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


CODE = '''
def test_something(sizes):
    """Of splash."""  # and of cudnn
    with raises(ValueError, match="ring is refused"):
        run({"train.remat": "layer"}, mesh_of(data=2, tensor=1), scheme="halo", flags=["--config.train.kernel=blocked"])
    assert attention, "the optimiser muon is named in a long text"
'''


def test_only_the_code_of_a_test_says_what_it_uses():
    names = runpy.run_path(str(SCRIPT))
    uses = names["part_of"](ast.parse(CODE)).uses

    def is_used(title, *entries):
        return [bool(names["about"](title, entry, {"test_something": uses})) for entry in entries]

    assert is_used("Attention kernels", "blocked", "splash", "cudnn") == [True, False, False]
    assert is_used("Context parallelism", "halo", "ring") == [True, False]
    assert is_used(names["REMAT"], "layer", "attention") == [True, False]
    assert is_used(names["AXES"], "data", "tensor") == [True, False]
    assert is_used("Optimisers", "muon") == [False]
    assert names["about"]("Context parallelism", "halo", {"test_halo_is_refused": uses}) == []
