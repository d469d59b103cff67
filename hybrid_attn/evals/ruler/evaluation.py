"""RULER as an evaluation: which of its tasks can be asked, and their scores."""

from collections.abc import Iterator, Mapping, Sequence

from hybrid_attn.evals import ruler
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, Questions, first_total, report_of
from hybrid_attn.evals.records import COUNT, NAME, SIZE, mean_of, number
from hybrid_attn.evals.replies import answer_records, replies_to
from hybrid_attn.evals.ruler import compat, draws, scores
from hybrid_attn.evals.ruler.tasks import ESSAYS
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.types import EvalContext, Measured, Settings, Unit


def missing(context: EvalContext, settings: Settings) -> dict[str, str]:
    """Why tasks cannot be asked at any length, of those that cannot."""
    reasons = ruler.missing(context.haystack, context.questions)
    if settings.compat and not context.essays:
        reasons |= dict.fromkeys(ESSAYS, "needs the text of RULER's essays, its PaulGrahamEssays.json, as --text")
    elif settings.compat and compat.sent_tokenize() is None:
        reasons |= dict.fromkeys(ESSAYS, "needs nltk with its punkt_tab, by which RULER cuts prose into sentences")
    return {task: reason for task, reason in reasons.items() if task in settings.ruler_tasks}


def _text(context: EvalContext, settings: Settings) -> str:
    """The text that hides needles."""
    return context.essays if settings.compat else context.haystack


def draw(context: EvalContext, settings: Settings, unit: Unit) -> Iterator[Sample]:
    tokenizer, texts = context.eval_model.tokenizer, (_text(context, settings), context.questions)
    if settings.compat:
        sentences = compat.sent_tokenize() if unit.part in ESSAYS else draws.sentences
        sizes = unit.part, unit.length, settings.samples, settings.seed
        yield from compat.generate(*sizes, tokenizer, context.lists, *texts, sentences)
        return
    for index in range(settings.samples):
        yield ruler.generate(unit.part, unit.length, index, settings.seed, tokenizer, *texts)


def sources(context: EvalContext, settings: Settings, unit: Unit) -> list:
    lists = [context.lists] if settings.compat else []
    return [_text(context, settings), context.questions.get(unit.part), *lists]


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    replies = replies_to(context, samples, settings.compat)  # RULER's own lengths do not count BOS
    answers = [*answer_records(samples, replies)]
    score = 100 * sum(answer["score"] for answer in answers) / len(answers)
    nulls = sum(not scores.postprocess(text) for text in replies)
    record = {"task": unit.part, "length": unit.length, "samples": len(samples), "score": score, "nulls": nulls}
    return Measured([record], answers)


def totals(records: Sequence[Mapping]) -> list[dict]:
    """The mean over tasks at each length."""
    return [{"task": "mean", "length": length, "score": mean} for length, mean in scores.means(records).items()]


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    yield Line("RULER, mean", f"{len(records)} tasks", f"{mean_of(records, 'score'):.1f}")
    for record in records:
        yield Line("  RULER", record["task"], f"{record['score']:.1f}", number=f"{record['samples']:,} questions")


EVALUATION = Evaluation(
    name="ruler",
    parts=lambda context, settings: settings.ruler_tasks,
    measure=measure,
    fields={"task": NAME, "length": SIZE, "samples": SIZE, "score": number(0, 100), "nulls": COUNT},
    headline=Headline(first_total("score"), "ruler_score_percent", "score {:.1f}", higher_is_better=True),
    report=report_of("ruler"),
    totals=totals,
    lines=lines,
    section_order=0,
    questions=Questions(
        draw,
        count=lambda settings: len(settings.ruler_tasks) * settings.samples,
        sources=sources,
        matches=lambda settings, unit, sample: sample.task == unit.part,
    ),
    uses_engine=True,
    in_quick_suite=True,
    flags=("samples", "seed", "ruler_tasks", "text", "squad", "hotpot", "english_words", "compat"),
    sequences=lambda settings, length: settings.samples,
    missing=missing,
)
