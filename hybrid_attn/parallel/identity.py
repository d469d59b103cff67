"""What must be the same in all processes of a run: otherwise they train on different data, or hang in different collectives."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "ml_collections", "numpy", "tokenizers",
)  # fmt: skip
MAX_VALUE_LENGTH = 200  # characters; all fields must fit into one message of the hub


def identity(values: Mapping, workdir: str | Path, revision: str) -> dict[str, str]:
    """Fields and their values: those of a config (`values`, nested), the workdir, this code, Python and the libraries."""
    code = hashlib.sha256()  # of this package's files, which may have been edited or lie outside a repository
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    fields = dict(_fields(values, "config")) | {"workdir": os.path.abspath(workdir), "revision": revision}
    fields |= {"source code": code.hexdigest()[:12], "version of python": platform.python_version()}
    return fields | {f"version of {name}": _version(name) for name in LIBRARIES}


def data_identity(corpora: Mapping, tokenizer) -> dict[str, str]:
    """Fields and their values: the training and held-out documents of each source in `corpora`, and the tokenizer."""
    fields = {f"training documents of {name}": corpus.training.fingerprint() for name, corpus in corpora.items()}
    fields |= {f"held-out documents of {name}": corpus.heldout.fingerprint() for name, corpus in corpora.items()}
    return fields | {"tokenizer": tokenizer.hash}


def references_identity(references: Mapping) -> dict[str, str]:
    """Fields and their values: the stored references of each source, their log-probabilities and what these are of."""
    parts = {"log-probabilities": "sha256", "checkpoint": "fingerprint", "model": "function"}
    return {
        f"{part} of the references of {name}": getattr(x, key) for name, x in references.items() for part, key in parts.items()
    }


def _fields(values, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _fields(value, f"{name}.{key}")
    elif isinstance(values, (list, tuple)) and any(isinstance(value, Mapping) for value in values):
        for i, value in enumerate(values):
            yield from _fields(value, f"{name}[{i}]")
    else:
        value = repr(values)
        if len(value) > MAX_VALUE_LENGTH:
            value = f"{value[: MAX_VALUE_LENGTH - 50]}... (sha256 {hashlib.sha256(value.encode()).hexdigest()[:12]})"
        yield name, value


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
