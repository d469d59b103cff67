"""Tasks of lm-evaluation-harness as an evaluation. Its library is an extra, which only a measurement imports."""

from hybrid_attn.evals.evaluation import Evaluation, Headline, first_total, report_of
from hybrid_attn.evals.records import ANY, NAME, SIZE
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, Measured, Settings, Unit


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    """Prompts that are longer than the unit lose their beginning."""
    from hybrid_attn.evals import engine_lm

    results = engine_lm.evaluate(
        context.engine, context.eval_model.tokenizer, [unit.part], max_length=unit.length, include_path=settings.task_path,
        limit=settings.samples, stop_tokens=context.stop_tokens,
    )  # fmt: skip
    return Measured([{"length": unit.length, **record} for record in engine_lm.records(results)], [])


EVALUATION = Evaluation(
    name="harness",
    parts=lambda context, settings: settings.tasks,
    measure=measure,
    fields={"task": NAME, "length": SIZE, "metric": NAME, "value": ANY},
    headline=Headline(first_total("value"), "harness_value", "{:.4f}", higher_is_better=True),
    report=report_of("harness"),
    section_order=6,
    uses_engine=True,
    in_training=False,  # no key of a config names its tasks
    flags=("samples", "seed", "tasks", "task_path"),
    sequences=lambda settings, length: settings.samples,
    empty=lambda context: ("tasks", "none is named"),
    is_of=lambda unit, line: isinstance(line.get("task"), str),  # a group has tasks of other names
)
