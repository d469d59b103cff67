"""What all processes of a run must have in common, or they would train on different data or hang in different collectives."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def identity(values: Mapping, workdir: str | Path, revision: str) -> dict[str, str]:
    """Fields and their values: those of a config (`values`, nested), the workdir, this code, Python and the libraries."""
    versions = {f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
    return {
        **dict(_fields(values, "config")),
        "workdir": os.path.abspath(workdir),
        "revision": revision,
        "source code": _source_code(),
        "version of python": platform.python_version(),
        **versions,
    }


def _fields(values, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _fields(value, f"{name}.{key}")
    elif isinstance(values, (list, tuple)) and any(isinstance(value, Mapping) for value in values):
        for i, value in enumerate(values):
            yield from _fields(value, f"{name}[{i}]")
    else:
        yield name, repr(values)


def _source_code() -> str:
    """A digest of the files of this package: two copies of one revision may have been edited, or be in no repository."""
    sha = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sha.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]
