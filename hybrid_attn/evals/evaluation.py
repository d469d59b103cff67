"""The record of one evaluation: all that the suite, the trainer, the tool and the report know of it."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hybrid_attn import config
from hybrid_attn.data.synthetic import Task
from hybrid_attn.evals.records import Kind, grouped, is_total
from hybrid_attn.evals.samples import Sample, TooLongError
from hybrid_attn.evals.types import EvalContext, Measured, Settings, Unit
from hybrid_attn.parallel import fit

HELDOUT = "heldout"  # the flag of an evaluation that reads held-out documents


class Questions(NamedTuple):
    """How the samples of a unit are drawn. They go to a file that is shared by all models with the same tokenizer.

    `draw` yields the samples of a unit, and `count` is the most that the settings ask for at each length. `sources` lists what
    else, besides the settings, determines the samples, as values for JSON: a hash of it is in the name of the file. `matches`
    says whether a sample that was read from the file belongs to the unit.
    """

    draw: Callable[[EvalContext, Settings, Unit], Iterator[Sample]]
    count: Callable[[Settings], int]
    sources: Callable[[EvalContext, Settings, Unit], list]
    matches: Callable[[Settings, Unit, Sample], bool]


class Headline(NamedTuple):
    """The one number of a unit: `value` computes it from its records, and is None where they have none.

    `tag` is its group in TensorBoard, and `form` formats it for a line of the log.
    """

    value: Callable[[Sequence[Mapping]], float | None]
    tag: str
    form: str
    higher_is_better: bool


class Line(NamedTuple):
    """A line of the tables at the end of a training; `part` is the source or task of the number."""

    name: str
    part: str
    score: str = ""
    spread: str = ""
    bits: str = ""
    number: str = ""


class Baselines(NamedTuple):
    """What losses are compared with: records of simple models, and a uniform guess among the tokens of the vocabulary."""

    records: Sequence[Mapping]
    vocab_size: int


class BaselineModel(NamedTuple):
    """A simple model that a trained one is compared with. `records` makes it from training documents and measures it.

    `fields` are those that each record must have, beside "eval", which is `name`.
    """

    name: str
    fields: Mapping[str, Kind]
    records: Callable[[EvalContext, Settings], Iterable[dict]]


def sequences_of_tokens(settings: Settings, length: int) -> int:
    """How many sequences of `length` tokens hold the tokens that the settings ask for."""
    return -(-settings.tokens // length)


def part_of(record: Mapping) -> str:
    """The source or the task that a record names."""
    return str(record.get("source", record.get("task", "")))


class Evaluation(NamedTuple):
    """One evaluation. Its units are its parts (sources or tasks) at each length; `measure` gives the records of a unit.

    `fields` are those that each record must have, beside "eval". `report()` imports and returns its `EvaluationReport`.
    `section_order` sorts the sections of all evaluations. The fields with defaults are for evaluations that differ.
    """

    name: str
    parts: Callable[[EvalContext, Settings], Sequence[str]]
    measure: Callable[[EvalContext, Settings, Unit, list[Sample]], Measured]
    fields: Mapping[str, Kind]
    headline: Headline
    report: Callable[[], Any]  # -> report.section.EvaluationReport, which imports this module and matplotlib
    section_order: int = 100
    questions: Questions | None = None  # None: no samples are drawn
    uses_engine: bool = False  # an engine generates or scores, at `settings.engine_lengths` if these are set
    longest_alone: bool = False  # only the longest length is measured: the result does not depend on it
    in_training: bool = True  # whether evals.names of a config may name it
    in_quick_suite: bool = False
    flags: tuple[str, ...] = ("tokens",)  # of tools/evaluate.py, which change what is measured
    all_logits: bool = False  # the logits of all tokens of a sequence are in memory at once
    sequences: Callable[[Settings, int], int] = sequences_of_tokens  # of a unit, by its length; its time grows with them
    # parts that cannot be measured, with the reason
    missing: Callable[[EvalContext, Settings], Mapping[str, str]] = lambda context, settings: {}
    # (what it needs, why there is none), for a context in which it has no parts
    empty: Callable[[EvalContext], tuple[str, str]] | None = None
    check_fits: Callable[[EvalContext, Settings, Unit], None] = lambda context, settings, unit: None  # TooLongError if not
    # whether a record or an answer belongs to a unit
    is_of: Callable[[Unit, Mapping], bool] = lambda unit, line: line.get("source", line.get("task")) == unit.part
    check_record: Callable[[Mapping, str], None] = lambda record, where: None  # ValueError; for what `fields` cannot check
    summary: Callable[[Sequence[Mapping]], Iterable[Mapping]] = lambda records: records  # for evals.jsonl of a training
    totals: Callable[[Sequence[Mapping]], Iterable[Mapping]] = lambda records: ()  # over all units, for the log of a training
    baseline: BaselineModel | None = None  # measured in a training, beside the model
    lines: Callable[[Sequence[Mapping], Baselines], Iterable[Line]] | None = None  # None: the headline

    def table_lines(self, records: Sequence[Mapping], baselines: Baselines) -> Iterable[Line]:
        """The lines of records of one length; by default the headline of each source or task."""
        if self.lines:
            return self.lines(records, baselines)
        values = {part: self.headline.value(of_part) for part, of_part in grouped(records, part_of).items()}
        return [Line(self.name, part, self.headline.form.format(x)) for part, x in values.items() if x is not None]

    @property
    def reads_heldout(self) -> bool:
        """Whether it measures held-out documents of the model's sources."""
        return HELDOUT in self.flags

    def lengths(self, settings: Settings) -> tuple[int, ...]:
        of_engine = self.uses_engine and settings.engine_lengths is not None
        lengths = settings.engine_lengths if of_engine else settings.lengths
        return (max(lengths),) if self.longest_alone else lengths

    def units(self, context: EvalContext, settings: Settings) -> list[Unit]:
        """Each part that is not missing at each length; some may not fit their length."""
        missing = self.missing(context, settings)
        parts = [part for part in self.parts(context, settings) if part not in missing]
        return [Unit(self.name, part, length) for length in self.lengths(settings) for part in parts]


def report_of(module: str, name: str = "REPORT") -> Callable[[], Any]:
    """A function that imports a module of evals/report, which imports this one and matplotlib, and returns its report."""
    return lambda: getattr(importlib.import_module(f"hybrid_attn.evals.report.{module}"), name)


def texts(context: EvalContext, settings: Settings) -> list[str]:
    """The sources whose held-out data are documents."""
    return [name for name, heldout in context.heldout.items() if not isinstance(heldout, Task)]


def without_documents(context: EvalContext) -> tuple[str, str]:
    return "documents", "the model's sources hold none out"


def measured_of_source(unit: Unit, records: Iterable[Mapping]) -> Measured:
    """The records, each with the source of its unit, and no answers."""
    return Measured([{"source": unit.part, **record} for record in records], [])


def first_total(field: str) -> Callable[[Sequence[Mapping]], float | None]:
    """A headline: the field of the first record that is about all tokens of its sequences."""
    return lambda records: next((record[field] for record in records if is_total(record)), None)


def check_sequence(context: EvalContext, settings: Settings, unit: Unit) -> None:
    """ValueError where the mesh does not split sequences of the unit's length, or the heads of the model."""
    model, execution, sizes = context.eval_model.model, context.eval_model.execution, context.eval_model.mesh.shape
    fit.check_length(f"{unit.eval} of {unit.part}: length", unit.length, sizes, execution.zigzag)
    fit.check_schemes(model, execution.context, sizes)


def check_task_fits(unit: Unit, task: object) -> None:
    """TooLongError where the shortest sequence of a synthetic task is longer than the unit; documents have no shortest one."""
    if isinstance(task, Task) and unit.length < (least := config.shortest_sequence(task.name, task.pairs)):
        raise TooLongError(
            f"{unit.eval} of {unit.part}: its shortest sequence has {least} tokens, and {unit.length} are asked for"
        )
