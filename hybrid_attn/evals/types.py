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
from hybrid_attn.evals.prompt_set import PromptSet
from hybrid_attn.evals.ruler import compat
from hybrid_attn.evals.ruler.qa import Questions
from hybrid_attn.infer.engine import Engine
from hybrid_attn.model import Execution

RECALL = {name: Task(name, pairs) for name, pairs in (("recall", 4), ("mqar", 4), ("copy", 1), ("tracking", 2))}


def with_own(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that a model was trained on, by their sources, then the tasks of RECALL that the model was not trained on."""
    others = {name: task for name, task in RECALL.items() if name not in tasks and task not in tasks.values()}
    return {**tasks, **others}


class EvalModel(NamedTuple):
    """A model with its parameters on a mesh (which must be in force), and the tokenizer of its vocabulary."""

    model: Model
    params: dict
    execution: Execution
    mesh: Mesh
    tokenizer: object


class Spec(NamedTuple):
    """Held-out documents or a task, the length of their sequences, and how many tokens to score."""

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
    tokens: int  # of held-out text, or of sequences of a synthetic task, at each length
    depths: tuple[float, ...]
    seed: int
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness, whose own files are in `task_path`
    task_path: str | None = None
    compat: bool = False  # RULER's own prompts
    ruler_tasks: tuple[str, ...] = ruler.NAMES
    absent: tuple[Absent, ...] = ()
    engine_lengths: tuple[int, ...] | None = None  # those of evaluations that use an engine; None: `lengths`
    max_new_tokens: int = 256  # of an answer that is judged; `temperature` and `top_p` are those of its sampling
    temperature: float = 0.5
    top_p: float | None = 0.75

    def as_written(self) -> dict:
        """The fields by their names in run.json, where `engine_lengths` is "asked"; those of answers if they are judged."""
        values = self._asdict()
        if "win_rate" not in self.evals:
            del values["max_new_tokens"], values["temperature"], values["top_p"]
        return values | {"asked": values.pop("engine_lengths")}


class EvalContext(NamedTuple):
    """A model with its engine (None if no evaluation uses one), and the data of evaluations.

    `heldout` has the documents or the task of each source, `haystack` the text to hide needles in, `tasks` the synthetic tasks
    of recall, `lists` the words of RULER's own prompts and `essays` their text. Sequences of training had `trained` tokens, and
    the tokens of `stops` end an answer as EOS does. `training` has the training documents of each source, where a training
    is evaluated. `pairs` has the held-out pairs of completions, with their loss masks, of each source that holds pairs.
    `prompt_set` has the prompts whose answers are judged, and the judge.
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
    training: Mapping[str, Documents] = {}
    pairs: Mapping[str, Documents] = {}
    prompt_set: PromptSet | None = None

    @property
    def stop_tokens(self) -> list[int]:
        return sorted({self.eval_model.tokenizer.eos, *self.stops})


class Unit(NamedTuple):
    """What is measured as a whole or not at all: an evaluation of a part (a source or a task) at a length.

    `name` is that of its file: slashes, which would lead to another folder, and control characters of a part are escaped.
    """

    eval: str
    part: str
    length: int

    @property
    def name(self) -> str:
        part = re.sub(r"[/\x00-\x1f\x7f%]", lambda match: f"%{ord(match[0]):02X}", self.part)
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
