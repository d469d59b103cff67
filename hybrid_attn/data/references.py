"""Log-probabilities under a reference model, beside the token store of the pairs that they are of.

references.json       the fingerprint and the name of the checkpoint, a digest of its model, and what identifies the store and
                      the other file
references.f32        float32 [n], little-endian: of each document the sum over the tokens that its loss mask trains on
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_attn import files
from hybrid_attn.trees import check

ABOUT, VALUES, DTYPE = "references.json", "references.f32", np.dtype("<f4")
DESCRIBED = "checkpoint", "fingerprint", "function"
TOOL = "tools/prepare_references.py"


class References(NamedTuple):
    """The log-probability of each document, in nats, and the checkpoint that gave them, by fingerprint and by name.

    `function` is a digest of what its parameters compute (`resume.function_of`).
    """

    log_probs: np.ndarray
    fingerprint: str
    checkpoint: str
    function: str

    @property
    def sha256(self) -> str:
        """That of the log-probabilities."""
        return hashlib.sha256(self.log_probs.astype(DTYPE).tobytes()).hexdigest()


def write(folder: Path, references: References, store: str) -> None:
    """Writes the files beside those of a store on this machine, which `store` identifies; the description comes last."""
    values = references.log_probs.astype(DTYPE).tobytes()
    about = {name: getattr(references, name) for name in DESCRIBED} | {"store": store, "sha256": references.sha256}
    files.write_atomically(folder / VALUES, values)
    files.write_atomically(folder / ABOUT, (json.dumps(about, indent=1) + "\n").encode())


def read(path: str, file: Callable[[str], bytes | None], store: str, documents: int) -> References:
    """Those of the store at `path`, whose files `file` reads; ValueError where they are missing, damaged or of another."""
    again = f"make them with {TOOL} --store={path}"
    about, values = file(ABOUT), file(VALUES)
    check(about is not None and values is not None, f"{path} has no log-probabilities of a reference; {again}")
    described = files.object_of(about, f"{path}/{ABOUT}")
    same = described.get("store") == store and len(values) == documents * DTYPE.itemsize
    check(same, f"{path}/{ABOUT} is of another store than the one beside it; {again}")
    lacking = ", ".join(name for name in DESCRIBED if not isinstance(described.get(name), str))
    check(not lacking, f"{path}/{ABOUT} does not say its {lacking}; {again}")
    references = References(np.frombuffer(values, DTYPE), **{name: described[name] for name in DESCRIBED})
    check(described.get("sha256") == references.sha256, f"{path}/{VALUES} was changed; {again}")
    return references
