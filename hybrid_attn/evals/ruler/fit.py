"""Samples of RULER's tasks that fill a length, counted by the tokenizer of the model, and never pass it."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

from hybrid_attn.data import words
from hybrid_attn.evals.ruler import tasks
from hybrid_attn.evals.ruler.draws import Draws, of_sample
from hybrid_attn.evals.ruler.qa import Questions
from hybrid_attn.evals.ruler.tasks import ESSAYS, NAMES, NEW_TOKENS, QA, Question, SampleSpec
from hybrid_attn.evals.samples import Sample, TooLongError, spent
from hybrid_attn.trees import check, not_among

# Units; from 53 coded words on, the last rank asked for is more frequent than the next.
FEWEST = {"vt": tasks.HOPS + 1, "cwe": tasks.COMMON_WORDS + 1, "fwe": 53}
EXAMPLE_TOKENS = 500  # of the solved question before one of variables
STRAIGHT = 12  # calls after which costs were not near a line, and halving ends sooner
ROUND_TO = 32  # tokens of an answer longer than the task has in mind: few numbers make few compilations


def missing(haystack: str | None, qa: Mapping[str, Questions]) -> dict[str, str]:
    """Why tasks cannot be asked, of those that cannot: some need a text, the last two the files of their questions."""
    reasons = {} if haystack else dict.fromkeys(ESSAYS, "needs a text to hide needles in")
    return reasons | {task: "needs the file of its questions" for task in QA if task not in qa}


def generate(
    task: str, length: int, index: int, seed: int, tokenizer,
    haystack: str | None = None, qa: Mapping[str, Questions] | None = None,
) -> Sample:  # fmt: skip
    """A sample that follows from its arguments alone; one more unit of text and it would not fit into `length` tokens.

    BOS and the answer count. TooLongError where the smallest prompt does not fit, ValueError where the task lacks its data.
    """
    name = f"{task} {index} {seed}"  # without the length: longer texts hide the same
    spec = SampleSpec(length, index, source(task, index, haystack, qa or {}))

    def cost(question: Question) -> int:
        return spent(count(tokenizer, question.prompt), new_tokens(task, question.gold, tokenizer))

    fewest = FEWEST.get(task, len(spec.source.items[index].documents) if task in QA else 1)
    what = f"sample {index} of {task}"
    ask = _tracking(name, length, tokenizer) if task == "vt" else _asking(task, name, spec, words.singles())
    most = len(words.singles()) - tasks.example_words(length) if task == "cwe" else None
    units = largest(lambda n: cost(ask(n)), length, fewest, what, most)
    if units == most:
        ask = _asking(task, name, spec, words.pairs())
        units = largest(lambda n: cost(ask(n)), length, fewest, what)
    question = ask(units)
    depths = [round(question.prompt.rindex(part) / len(question.prompt), 4) for part in question.answer_parts]
    meta = {"seed": seed, "units": units, "tokens": cost(question), "depths": depths}
    answers = tuple(dict.fromkeys(question.answers))
    return Sample(task, length, index, question.prompt, answers, new_tokens(task, question.gold, tokenizer), "", meta)


def largest(cost: Callable[[int], int], budget: int, fewest: int, what: str, most: int | None = None) -> int:
    """The n from `fewest` to `most` that costs at most `budget` where n + 1 does not: few calls where costs are near a line."""
    low, spent = fewest, cost(fewest)
    if spent > budget:
        raise TooLongError(
            f"{what} does not fit into {budget:,} tokens: its smallest prompt, BOS and its answer take "
            f"{spent:,}; use a length of at least {spent:,}, or a tokenizer with longer pieces"
        )
    high, each, calls = None if most is None else most + 1, spent / fewest, 0
    while high is None or high - low > 1:
        guess = low + max(1, min(int((budget - spent) / max(each, 0.01)), 63 * low))
        if high is not None:
            guess = (low + high) // 2 if calls > STRAIGHT else min(guess, high - 1)
        new = cost(guess)
        each, calls = (new - spent) / (guess - low), calls + 1
        if new <= budget:
            low, spent = guess, new
        else:
            high = guess
    return low


def count(tokenizer, text: str) -> int:
    return len(tokenizer.encode(text.encode()))


def new_tokens(task: str, gold: str, tokenizer) -> int:
    """RULER's for the task, or more where its answer takes more tokens than that, as in bytes."""
    needed = count(tokenizer, f" {gold}")
    return NEW_TOKENS[task] if needed <= NEW_TOKENS[task] else -(-needed // ROUND_TO) * ROUND_TO


def check_known(task: str) -> None:
    problem = not_among(task, NAMES)
    check(not problem, f"{task!r} is no task of RULER: it {problem}")


def _asking(task: str, name: str, spec: SampleSpec, listed: Sequence[str]) -> Callable[[int], Question]:
    """Questions of so many units."""
    return lambda units: tasks.ask(task, of_sample(name, listed, words.pairs()), spec, units)


def _tracking(name: str, length: int, tokenizer) -> Callable[[int], Question]:
    """Questions of variables after a solved one, which has 500 tokens or its smallest, and less where all is short."""

    def example(draws: Draws, units: int) -> str:
        return tasks.solved(tasks.chain(draws, units, 3))

    def cost(units: int) -> int:
        return count(tokenizer, example(of_sample(name, (), ()), units))

    fewest = FEWEST["vt"]
    shown = largest(cost, max(min(EXAMPLE_TOKENS, length // 8), cost(fewest)), fewest, "the example of vt")

    def ask(units: int) -> Question:
        draws = of_sample(name, (), ())
        before = example(draws, shown)
        question = tasks.chain(draws, units, 5)
        return question._replace(prompt=before + question.prompt)

    return ask


def source(task: str, index: int, haystack: str | None, qa: Mapping[str, Questions]) -> Sequence[str] | Questions | None:
    """What question `index` is made from besides the numbers drawn; ValueError for no task, and where it is missing."""
    check_known(task)
    if task in ESSAYS:
        check(bool(haystack and haystack.strip()), f"{task} hides its needles in a text; give one as haystack")
        return _words(haystack)
    if task not in QA:
        return None
    check(task in qa, f"{task} asks questions of a file that was not given; give it, or leave the task out")
    number = len(qa[task].items)
    check(index < number, f"{task} has {number:,} questions and no number {index:,}; ask for at most {number:,} samples")
    return qa[task]


@functools.lru_cache(maxsize=2)
def _words(text: str) -> list[str]:
    return re.sub(r"\s+", " ", text).split(" ")
