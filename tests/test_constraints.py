"""Every requirement of pyproject.toml, also of the extras for accelerators, is pinned for every tested Python."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROUGHT = {"jax[cuda13]": ["jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13"], "jax[tpu]": ["libtpu"]}


def name_of(requirement):
    return re.split(r"[\[=<>; ]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_every_requirement_is_pinned_and_matplotlib_is_no_extra(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {name_of(line): line for line in path.read_text().splitlines()}
    requirements = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    for requirement in requirements:
        for name in (name_of(requirement), *BROUGHT.get(requirement, ())):
            assert re.search(r"==\d", pinned[name]), name
    assert "tokamax==0.0.12" in pinned.values()
    assert any(name_of(x) == "matplotlib" for x in project["dependencies"]) and "eval" not in project["optional-dependencies"]
