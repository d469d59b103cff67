"""RULER's thirteen tasks (arXiv 2404.06654): a question of so many units of text, whose templates and counts are its own."""

import math
import string
from collections.abc import Sequence
from typing import NamedTuple

from hybrid_attn.data.needles import FIND_ONE, NEEDLE
from hybrid_attn.evals.ruler.draws import Draws
from hybrid_attn.evals.ruler.qa import Questions

SHORT = 4096  # tokens; below, RULER counts words otherwise, and what it measures is "short RULER"


class Needles(NamedTuple):
    """What is hidden where, and how many keys, values of each and queries there are."""

    haystack: str
    key: str
    value: str
    keys: int = 1
    values: int = 1
    queries: int = 1


class Question(NamedTuple):
    """`gold` is what a perfect model goes on with; `answer_parts` are the parts of the prompt that hold the answers."""

    prompt: str
    answers: tuple[str, ...]
    gold: str
    answer_parts: tuple[str, ...]


NEEDLES = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", keys=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", values=4),
    "niah_multiquery": Needles("essay", "words", "numbers", keys=4, queries=4),
}
QA = ("qa_1", "qa_2")
NAMES = (*NEEDLES, "vt", "cwe", "fwe", *QA)
ESSAYS = tuple(name for name, kind in NEEDLES.items() if kind.haystack == "essay")
NEW_TOKENS = dict.fromkeys(NEEDLES, 128) | {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(QA, 32)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent
FIND_ALL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the value "
    "{query}, they are: "
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
DOCUMENTS = f"{ONLY}\n\nThe following are given documents.\n\n{{context}}\n\n{ONLY}\n\nQuestion: {{query}} Answer:"
HOPS = 4
COMMON_WORDS = 10
CODED_LETTERS = 6


def needles(draws: Draws, kind: Needles, essay: Sequence[str], units: int) -> Question:
    """`units` are words of `essay`, lines of noise, or lines that are needles with other keys."""
    keys, values, statements = [], [], []
    for _ in range(kind.keys):
        keys.append(draws.magic(kind.key))
        values.append([draws.magic(kind.value) for _ in range(kind.values)])
        statements += [NEEDLE.format(kind=kind.value, key=keys[-1], value=value) for value in values[-1]]
    draws.shuffle(statements)
    context = _hidden(draws, kind, statements, essay, units)
    queried = draws.rng.sample(range(kind.keys), kind.queries)
    answers = tuple(value for i in queried for value in values[i])
    *first, last = (keys[i] for i in queried)
    query = f"{', '.join(first)}, and {last}" if first else last
    one = len(answers) == 1
    name = kind.value.removesuffix("s") if one else kind.value
    prompt = (FIND_ONE if one else FIND_ALL).format(kind=name, context=context, query=query)
    parts = tuple(NEEDLE.format(kind=kind.value, key=keys[i], value=value) for i in queried for value in values[i])
    return Question(prompt, answers, ", ".join(answers), parts)


def _hidden(draws: Draws, kind: Needles, statements: list[str], essay: Sequence[str], units: int) -> str:
    if kind.haystack == "essay":
        first = draws.start(len(essay))
        words = list(essay[first : first + units])
        while len(words) < units:
            words += essay[: units - len(words)]
        return draws.hide(" ".join(words).strip(), statements, sorted(draws.rng.sample(DEPTHS, len(statements))))
    lines = [NOISE] * units
    if kind.haystack == "needle":
        others = ((draws.magic(kind.key), draws.magic(kind.value)) for _ in range(units))
        lines = [NEEDLE.format(kind=kind.value, key=key, value=value) for key, value in others]
    for index, needle in zip(sorted(draws.rng.sample(range(units), len(statements)), reverse=True), statements, strict=True):
        lines.insert(index, needle)
    return "\n".join(lines)


def chain(draws: Draws, units: int, letters: int, value: str | None = None) -> Question:
    """A chain of variables with names of so many `letters` among `units` lines of noise, at least five."""
    names = [draws.fresh(lambda: draws.letters(letters)) for _ in range(HOPS + 1)]
    value = value or draws.value()
    hops = [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
    parts = (f"VAR {names[0]} = {value}", *hops)
    lines = [NOISE] * units
    for passed, index in enumerate(sorted(draws.rng.sample(range(units), len(parts)))):
        lines.insert(index + passed, parts[passed])
    prompt = TRACK.format(context="\n".join(lines), query=value, count=len(names))
    return Question(prompt, tuple(names), " ".join(names), parts)


def solved(question: Question) -> str:
    """A question of variables with its answer, to go before another."""
    return f"{question.prompt} {question.gold}\n\n"


def common_words(draws: Draws, length: int, units: int) -> Question:
    """Ten of `units` words stand in the list more often than the others; a solved list goes before it."""
    example, main = ((3, 1), (6, 1)) if length < SHORT else ((10, 3), (30, 3))
    solved, listed = draws.lists(example_words(length), units)
    example_list, example_answers = _word_list(draws, solved, *example)
    main_list, answers = _word_list(draws, listed, *main)
    prompt = f"{COMMON.format(context=example_list)} {_numbered(example_answers)}\n{COMMON.format(context=main_list)}"
    return Question(prompt, tuple(answers), _numbered(answers), ())


def example_words(length: int) -> int:
    """The words of the solved list."""
    return 20 if length < SHORT else 40


def _word_list(draws: Draws, candidates: list[str], often: int, seldom: int) -> tuple[str, list[str]]:
    common = candidates[:COMMON_WORDS]
    listed = common * often + candidates[COMMON_WORDS:] * seldom
    draws.shuffle(listed)
    return _numbered(listed), common


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def vocabulary(draws: Draws, length: int) -> list[str]:
    """Coded words from the most frequent, which is dots, to the least."""
    size = (length - NEW_TOKENS["fwe"]) // 50
    coded = [draws.letters(CODED_LETTERS, string.ascii_lowercase) for _ in range(size)]
    while len(set(coded)) < size:
        coded.append(draws.letters(CODED_LETTERS, string.ascii_lowercase))
    ranked = sorted(set(coded))
    draws.shuffle(ranked)
    return ["...", *ranked[1:]]


def coded_text(draws: Draws, ranked: Sequence[str], units: int) -> Question:
    """Of `units` words, the share of rank k is 1 / k² ζ(2), rounded down; ranks 2 to 4 are asked for."""
    counts = [int(units * float(rank) ** -2.0 / (math.pi**2 / 6)) for rank in range(1, len(ranked) + 1)]
    coded = [word for word, times in zip(ranked, counts, strict=True) for _ in range(times)]
    draws.shuffle(coded)
    answers = tuple(ranked[1:4])
    return Question(FREQUENT.format(context=" ".join(coded)), answers, " ".join(answers), ())


def documents(draws: Draws, qa: Questions, index: int, units: int) -> Question:
    """Question `index` with the documents that answer it and others, `units` in all; those of its own article come first."""
    item = qa.items[index]
    if units >= len(qa.documents):
        texts = (list(qa.documents) * -(-units // len(qa.documents)))[:units]
    else:
        near, more = list(item.documents), list(item.related)
        if units - len(near) > len(more):
            known = {*near, *more}
            others = [i for i in range(len(qa.documents)) if i not in known]
            chosen = near + more + draws.rng.sample(others, units - len(near) - len(more))
        else:
            chosen = near + draws.rng.sample(more, units - len(near))
        texts = [qa.documents[i] for i in chosen]
    draws.shuffle(texts)
    context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
    prompt = DOCUMENTS.format(context=context, query=item.question)
    return Question(prompt, item.answers, max(item.answers, key=len), tuple(qa.documents[i] for i in item.documents))


class SampleSpec(NamedTuple):
    """A sample to make: the length of its task, its number, and the words of an essay or the `Questions` that it needs."""

    length: int
    index: int
    source: Sequence[str] | Questions | None


def ask(task: str, draws: Draws, spec: SampleSpec, units: int) -> Question:
    """One question of a task; of variables without the solved one before it."""
    if task in NEEDLES:
        return needles(draws, NEEDLES[task], spec.source, units)
    if task in QA:
        return documents(draws, spec.source, spec.index, units)
    if task == "vt":
        return chain(draws, units, 5)
    if task == "cwe":
        return common_words(draws, spec.length, units)
    return coded_text(draws, vocabulary(draws, spec.length), units)
