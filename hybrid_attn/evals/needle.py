"""Needles in a text: numbers at chosen depths, and a question about them at its end, in RULER's words.

After Kamradt's "needle in a haystack", with numbers that no model has seen and containment in place of a judge. Several needles
have one key: the first stands at the depth, the others at equal distances below it.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.data import words
from hybrid_attn.data.needles import FIND_ONE, NEEDLE
from hybrid_attn.evals.evaluation import Baselines, Evaluation, Headline, Line, Questions, report_of
from hybrid_attn.evals.records import SIZE, grouped, number
from hybrid_attn.evals.replies import answer_records, replies_to
from hybrid_attn.evals.ruler import fit, scores
from hybrid_attn.evals.ruler.draws import of_sample
from hybrid_attn.evals.ruler.tasks import FIND_ALL
from hybrid_attn.evals.samples import Sample, spent
from hybrid_attn.evals.types import EvalContext, Measured, Settings, Unit
from hybrid_attn.trees import check

FEWEST = 8  # words of the text
NEEDLES = (1, 4)  # in a text; a part of the evaluation each


def task_of(needles: int) -> str:
    """The name of samples with so many needles."""
    return "needle" if needles == 1 else f"needle_{needles}"


def generate(length: int, depth: float, needles: int, index: int, seed: int, tokenizer, haystack: str) -> Sample:
    """A question of `length` tokens, answer included, about `needles` numbers from `depth` percent of the text on.

    ValueError where the smallest prompt does not fit.
    """
    check(0 <= depth <= 100, f"depth={depth} must lie between 0 and 100 percent")
    check(bool(haystack.split()), "needles are hidden in a text, and this one has no words")
    task = task_of(needles)
    name = f"{task} {depth:g} {index} {seed}"  # without the length: longer texts hide the same
    draws = of_sample(name, (), words.pairs())
    key, values = draws.magic("words"), tuple(draws.magic("numbers") for _ in range(needles))
    depths = [depth + i * (100 - depth) / needles for i in range(needles)]
    needle_texts = [NEEDLE.format(kind="numbers", key=key, value=value) for value in values]
    listed = haystack.split()
    start = draws.start(len(listed))

    def ask(units: int) -> str:
        text = " ".join(listed[(start + i) % len(listed)] for i in range(units))
        context = draws.hide(text, needle_texts, depths)
        template, kind = (FIND_ONE, "number") if needles == 1 else (FIND_ALL, "numbers")
        return template.format(kind=kind, context=context, query=key)

    gold = ", ".join(values)
    new = fit.new_tokens("niah_single_1", gold, tokenizer)
    where = f"sample {index} of {task} at depth {depth:g}"
    units = fit.largest(lambda n: spent(fit.count(tokenizer, ask(n)), new), length, FEWEST, where)
    return Sample(task, length, index, ask(units), values, new, f"{depth:g}", {"depth": depth, "seed": seed, "units": units})


def records(samples: Sequence[Sample], replies: Sequence[str]) -> Iterator[dict]:
    """One for each depth of one length: how many numbers were hidden, and how many of them the replies contain."""
    cells = grouped(zip(samples, replies, strict=True), lambda pair: pair[0].meta["depth"])
    for depth, pairs in sorted(cells.items()):
        answers = sum(len(sample.answers) for sample, _ in pairs)
        right = sum(scores.right(reply, sample.answers) for sample, reply in pairs)
        sample, _ = pairs[0]
        cell = {"length": sample.length, "depth": depth, "needles": len(sample.answers)}
        yield cell | {"answers": answers, "right": right}


def draw(context: EvalContext, settings: Settings, unit: Unit) -> Iterator[Sample]:
    tokenizer, text = context.eval_model.tokenizer, context.haystack
    for depth in settings.depths:
        for index in range(settings.samples):
            yield generate(unit.length, depth, int(unit.part), index, settings.seed, tokenizer, text)


def matches(settings: Settings, unit: Unit, sample: Sample) -> bool:
    return sample.task == task_of(int(unit.part)) and sample.meta.get("depth") in settings.depths


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    replies = replies_to(context, samples)
    return Measured([*records(samples, replies)], [*answer_records(samples, replies)])


def is_of(unit: Unit, line: Mapping) -> bool:
    """An answer names its task, and a record its number of needles."""
    needles = int(unit.part)
    return line["task"] == task_of(needles) if "task" in line else line.get("needles") == needles


def check_record(record: Mapping, where: str) -> None:
    needles, answers, right = (record[name] for name in ("needles", "answers", "right"))
    check(needles <= answers, f"{where}: {needles} needles have {answers} answers")
    check(right <= answers, f"{where}: {right:g} of {answers} answers are right")


def share_found(cells: Sequence[Mapping]) -> float | None:
    """The share of the needles of some cells that are in the answers, if there are any: each counts the same."""
    return sum(r["right"] for r in cells) / sum(r["answers"] for r in cells) if cells else None


def lines(records: Sequence[Mapping], baselines: Baselines) -> Iterator[Line]:
    for needles, cells in sorted(grouped(records, itemgetter("needles")).items()):
        answers = sum(record["answers"] for record in cells)
        yield Line("needles found", f"{needles} hidden", f"{share_found(cells):.1%}", number=f"{answers:,} answers")


EVALUATION = Evaluation(
    name="needle",
    parts=lambda context, settings: [str(needles) for needles in NEEDLES],
    measure=measure,
    fields={"length": SIZE, "depth": number(0, 100), "needles": SIZE, "answers": SIZE, "right": number(0, 2**53)},
    headline=Headline(share_found, "needle_found_share", "{:.1%} found", higher_is_better=True),
    report=report_of("needle"),
    lines=lines,
    section_order=1,
    questions=Questions(
        draw,
        count=lambda settings: len(NEEDLES) * len(settings.depths) * settings.samples,
        sources=lambda context, settings, unit: [context.haystack, None],  # None: keeps the names of files
        matches=matches,
    ),
    uses_engine=True,
    in_quick_suite=True,
    flags=("samples", "seed", "depths", "text"),
    sequences=lambda settings, length: settings.samples * len(settings.depths),
    is_of=is_of,
    check_record=check_record,
)
