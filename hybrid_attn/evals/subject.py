"""What is evaluated, and on what."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from hybrid_attn.config import Model
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.synthetic import Task
from hybrid_attn.model import Run


class Subject(NamedTuple):
    """A model with its parameters on a mesh (which must be in force), and the tokenizer of its vocabulary."""

    model: Model
    params: dict
    run: Run
    mesh: Mesh
    tokenizer: object


class Spec(NamedTuple):
    """Held-out documents, the length of the rows that they are cut into, and how many tokens to score; or a task's rows."""

    documents: Documents | Task
    length: int
    tokens: int


def check_finite(numbers, what: str) -> None:
    """FloatingPointError where one of the `numbers` that a model computed is NaN or infinite; `what` says what they are."""
    bad = np.ravel(numbers)[~np.isfinite(np.ravel(numbers))]
    if bad.size:
        raise FloatingPointError(
            f"{what} is {bad[0]}: the parameters are not finite, or activations overflow; use an earlier checkpoint, or float32"
        )
