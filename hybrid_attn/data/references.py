"""Log-probabilities under a reference model, beside the token store of the pairs that they are of.

references.json       the fingerprint and the name of the checkpoint, and what identifies the store and the other file
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
TOOL = "tools/prepare_references.py"


class References(NamedTuple):
    """The log-probability of each document, in nats, and the checkpoint that gave them, by fingerprint and by name."""

    log_probs: np.ndarray
    fingerprint: str
    checkpoint: str


def write(folder: Path, references: References, store: str) -> None:
    """Writes the files beside those of a store on this machine, which `store` identifies; the description comes last."""
    values = references.log_probs.astype(DTYPE).tobytes()
    about = {"checkpoint": references.checkpoint, "fingerprint": references.fingerprint, "store": store}
    about["sha256"] = hashlib.sha256(values).hexdigest()
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
    check(described.get("sha256") == hashlib.sha256(values).hexdigest(), f"{path}/{VALUES} was changed; {again}")
    return References(np.frombuffer(values, DTYPE), described["fingerprint"], described["checkpoint"])
