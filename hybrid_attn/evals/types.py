"""What is evaluated, on what, and in which units."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from hybrid_attn.config import Model
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.synthetic import Task
from hybrid_attn.evals import ruler
from hybrid_attn.evals.ruler import compat
from hybrid_attn.evals.ruler.qa import Questions
from hybrid_attn.infer.engine import Engine
from hybrid_attn.model import Run

RECALL = {name: Task(name, pairs) for name, pairs in (("recall", 4), ("mqar", 4), ("copy", 1), ("tracking", 2))}
ASKED = ("needle", "ruler", "harness")  # what is measured by questions that an engine answers


def with_own(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that a model was trained on, by their sources, then the tasks of RECALL that the model was not trained on."""
    others = {name: task for name, task in RECALL.items() if name not in tasks and task not in tasks.values()}
    return {**tasks, **others}


class EvalModel(NamedTuple):
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


class Absent(NamedTuple):
    """A unit that is not measured, and why."""

    eval: str
    part: str
    length: int
    reason: str


class Settings(NamedTuple):
    """What is measured: which evaluations, at which lengths in tokens, and on how much."""

    evals: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int  # of each task of RULER and each depth of the needles, at each length
    tokens: int  # of held-out text, or of rows of a drawn task, at each length
    depths: tuple[float, ...]
    seed: int
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness, whose own files are in `task_path`
    task_path: str | None = None
    compat: bool = False  # RULER's own prompts
    ruler_tasks: tuple[str, ...] = ruler.NAMES
    absent: tuple[Absent, ...] = ()
    asked: tuple[int, ...] | None = None  # the lengths of what an engine answers, where they are others

    def lengths_of(self, evaluation: str) -> tuple[int, ...]:
        return self.asked if self.asked is not None and evaluation in ASKED else self.lengths


class EvalContext(NamedTuple):
    """A model with an engine of it (None if nothing is asked), and what it is asked about.

    `heldout` has the documents or the task of each source, `haystack` the text to hide needles in, `tasks` those whose answers
    are counted, `lists` the words of RULER's own prompts and `essays` their text; rows of training had `trained` tokens, and
    `stops` end an answer as the end of a document does.
    """

    eval_model: EvalModel
    engine: Engine | None
    heldout: Mapping[str, Documents | Task]
    haystack: str
    questions: Mapping[str, Questions]
    trained: int
    lists: compat.Words | None = None
    essays: str = ""
    tasks: Mapping[str, Task] = RECALL
    stops: tuple[int, ...] = ()

    @property
    def stop_tokens(self) -> list[int]:
        return sorted({self.eval_model.tokenizer.eos, *self.stops})


class Unit(NamedTuple):
    """What is done or not: `part` is a source or a task.

    `name` is that of its file: a slash in the name of a part, which would lead elsewhere, and control characters are escaped.
    """

    eval: str
    part: str
    length: int

    @property
    def name(self) -> str:
        part = re.sub(r"[/\x00-\x1f\x7f%]", lambda found: f"%{ord(found[0]):02X}", self.part)
        return f"{self.eval}-{part}-{self.length}"


class Measured(NamedTuple):
    records: list[dict]
    answers: list[dict]


def check_finite(numbers, what: str) -> None:
    """FloatingPointError where one of the `numbers` that a model computed is NaN or infinite; `what` says what they are."""
    bad = np.ravel(numbers)[~np.isfinite(np.ravel(numbers))]
    if bad.size:
        raise FloatingPointError(
            f"{what} is {bad[0]}: the parameters are not finite, or activations overflow; use an earlier checkpoint, or float32"
        )
