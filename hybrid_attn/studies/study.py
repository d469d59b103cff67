"""What a study is: its cells, which are configs, its metrics, its claims and its plot; and how a folder is read."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from hybrid_attn import config_file
from hybrid_attn.studies.metrics import Metric
from hybrid_attn.trees import check, not_among

NAME = re.compile(r"[\w.+-]+")  # of a cell: it becomes a folder


@dataclasses.dataclass(frozen=True)
class Cell:
    """A config, FILE.py:ARGUMENT, and its keys that have another value, such as {"optim.lr": 4e-3}.

    The file is looked for in the study's folder, then from the working directory.
    """

    config: str
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Claim:
    """That the cell `better` has a better mean of a metric than `worse`: a paired t test over the seeds that both have.

    With `of_learned` only the seeds count in which both cells learned the task.
    """

    sentence: str
    better: str
    worse: str
    metric: str
    of_learned: bool = False


@dataclasses.dataclass(frozen=True)
class Reach:
    """That a cell reaches a bound in every seed in which it learned the task; in every seed if the study has no `learned`."""

    sentence: str
    cell: str
    metric: str
    bound: float


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: every cell is trained with the seeds 0 to `seeds` - 1.

    `changes` are those of all cells; a cell's own come after them. A run has learned the task if the metric `learned[0]`
    reaches `learned[1]`. `claims` may be a function of the results that returns them. `plot` draws a figure of the results; its
    method `check`, if it has one, gets the study before anything is trained. The table and the verdicts are written into
    `page`, seen from the folder of the study. The table has the metrics `table`, or all. Its rows are in the order of the
    cells, or of the mean of the metric `sorted_by`, best first; those in which a seed did not learn the task come after the
    others.

    With `one_core` a run has one core of the CPU and no compile cache, and studies without it do not share its workdir: its CPU
    seconds depend on its config and the machine.
    """

    title: str
    question: str
    cells: Mapping[str, Cell]
    metrics: Mapping[str, Metric]
    plot: Callable[[Any], Any]
    claims: Sequence[Claim | Reach] | Callable[[Any], Sequence[Claim | Reach]] = ()
    learned: tuple[str, float] | None = None
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    seeds: int = 5
    page: str = "README.md"
    sorted_by: str | None = None
    one_core: bool = False
    table: Sequence[str] = ()

    def __post_init__(self):
        check(bool(self.cells) and bool(self.metrics), f"the study {self.title!r} needs a cell and a metric at least")
        for name in self.cells:
            check(NAME.fullmatch(name) is not None, f"the cell {name!r} becomes a folder: use letters, digits, and any of _.+-")
        self.check_names("metric", self.metrics, self.table)
        if self.sorted_by is not None:
            self.check_names("metric", self.metrics, [self.sorted_by])
        if self.learned is not None:
            self.check_names("metric", self.metrics, [self.learned[0]])
        for claim in () if callable(self.claims) else self.claims:
            self.check_names("metric", self.metrics, [claim.metric])
            is_claim = isinstance(claim, Claim)
            self.check_names("cell", self.cells, [claim.better, claim.worse] if is_claim else [claim.cell])
            needs = is_claim and claim.of_learned and self.learned is None
            check(
                not needs,
                f"the claim {claim.sentence!r} is of seeds that learned, and the study does not say what `learned` is",
            )
        if hasattr(self.plot, "check"):
            self.plot.check(self)

    def check_names(self, kind: str, known: Mapping, names: Sequence[str]) -> None:
        """ValueError for a name that is not among the `known` ones."""
        for name in names:
            problem = not_among(name, tuple(known))
            check(not problem, f"the study {self.title!r} names the {kind} {name!r}, which {problem}")

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The cells of --only, or all without it; ValueError for one that there is not."""
        self.check_names("cell", self.cells, names)
        return [name for name in self.cells if name in names or not names]


def load(folder: Path) -> Study:
    """`STUDY` of FOLDER/study.py, or what its `get_study()` returns; ValueError where there is neither."""
    path = folder / "study.py"
    check(path.is_file(), f"{folder} has no study.py; name a folder of studies/, such as studies/layouts")
    loader = SourceFileLoader("study_file", str(path))
    module = module_from_spec(spec_from_loader("study_file", loader))
    try:
        loader.exec_module(module)
        study = module.get_study() if hasattr(module, "get_study") else getattr(module, "STUDY", None)
    except Exception as error:
        raise ValueError(config_file.message_with_line(error, str(path))) from error
    check(isinstance(study, Study), f"{path} has neither STUDY nor get_study(), which make a hybrid_attn.studies.Study")
    return study


def config_name(folder: Path, cell: Cell) -> str:
    """The --config of a cell: its file beside the study, or else from the working directory."""
    path, colon, argument = cell.config.partition(":")
    beside = folder / path
    return f"{beside if beside.is_file() else path}{colon}{argument}"
