"""Small compiled programs cost what they cost before, as XLA counts it: tests/golden_programs.json."""

import json
from pathlib import Path

import golden_programs
import pytest

GOLDEN = json.loads((Path(__file__).parent / "golden_programs.json").read_text())
FAST = [name for name in golden_programs.PROGRAMS if name.startswith("attention")]
REWRITE = "python tests/golden_programs.py --out=tests/golden_programs.json"


def assert_as_before(name: str) -> None:
    version = golden_programs.version()
    if version not in GOLDEN:
        pytest.skip(f"golden_programs.json has jax {' and '.join(GOLDEN)}, not {version}: {REWRITE}")
    costs, before = golden_programs.costs(name), GOLDEN[version][name]
    changed = {key: (before[key], value) for key, value in costs.items() if value != pytest.approx(before[key], rel=0.02)}
    assert not changed, f"{name}: before and now {changed}; if this is meant, {REWRITE}"


@pytest.mark.parametrize("name", FAST)
def test_flops_bytes_and_temporaries_of_attention_are_those_of_before(name):
    assert_as_before(name)


@pytest.mark.slow  # seconds of compiling, each
@pytest.mark.parametrize("name", [name for name in golden_programs.PROGRAMS if name not in FAST])
def test_flops_bytes_and_temporaries_of_steps_of_training_and_inference_are_those_of_before(name):
    assert_as_before(name)


def test_the_golden_file_has_every_program_for_every_version():
    assert GOLDEN and all(set(costs) == set(golden_programs.PROGRAMS) for costs in GOLDEN.values())
