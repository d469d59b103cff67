"""What a wheel installs: one package, and programs that run without the repository."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]
CONFIG = """
from hybrid_attn.configs import base


def get_config():
    c = base.get_config()
    c.stages[0].steps = 0
    return c
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a console script on a copy of the package alone, in a directory of its own."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "hybrid_attn", folder / "site/hybrid_attn", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mine.py").write_text(CONFIG)

    def call(script, *arguments):
        module, _, function = SCRIPTS[script].partition(":")
        code = f"import sys; sys.modules['configs'] = None; from {module} import {function}; {function}()"
        environment = os.environ | {"PYTHONPATH": str(folder / "site"), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )

    return call


def test_a_wheel_has_the_package_alone():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["hybrid_attn"]


def test_a_config_outside_the_repository_starts_from_the_base_of_the_package(installed):
    done = installed("hybrid-train", "--config=mine.py")
    assert done.returncode == 2
    assert done.stderr == "error: config.stages[0].steps=0 must be at least 1 and at most 1,000,000,000, or None\n"


def test_help_shows_the_docstring_and_the_flags_of_the_program(installed):
    done = installed("hybrid-train", "--help")
    assert done.stdout.startswith("Trains the model of a config: ") and not done.stderr
    assert all(f"--{flag}: " in done.stdout for flag in ("config", "steps", "workdir"))


@pytest.mark.slow  # each imports JAX in a process of its own
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_console_script_has_its_help(script, installed):
    done, module = installed(script, "--help"), SCRIPTS[script].partition(":")[0].replace(".", "/")
    docstring = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text()))
    assert done.stdout.startswith(docstring.partition("\n")[0]) and "Traceback" not in done.stderr
    assert "flags:" in done.stdout or "DEFINE" not in (ROOT / f"{module}.py").read_text()
