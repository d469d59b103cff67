"""RULER's own generator, draw for draw: the prompts of its scripts for the same tokenizer, seed and files.

Its habits are kept: one order for all samples, samples that depend on those before them, lengths that do not
count BOS. Only where it would try for ever is there an error. Scores of models that read such prompts compare with published
ones; where that is no matter, `fit.generate` asks better.
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_attn.data.words import pairs
from hybrid_attn.evals.ruler import draws as own
from hybrid_attn.evals.ruler import tasks
from hybrid_attn.evals.ruler.draws import Draws
from hybrid_attn.evals.ruler.fit import count, source
from hybrid_attn.evals.ruler.qa import Questions
from hybrid_attn.evals.ruler.tasks import ESSAYS, NEEDLES, NEW_TOKENS, QA, SHORT, Question, SampleSpec
from hybrid_attn.evals.samples import Sample, TooLongError
from hybrid_attn.files import read_object
from hybrid_attn.trees import check

SEED = 42  # that of its scripts
TRIES = 100  # of a prompt that cannot shrink further; RULER's scripts never give up
EXAMPLE_TOKENS, EXAMPLE_VALUE = 500, "12345"


class Words(NamedTuple):
    """`others` are for lists longer than the first three give words: the values of RULER's english_words.json."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    others: tuple[str, ...] = ()


def wonderwords(others: tuple[str, ...] = ()) -> Words:
    """The lists that RULER draws from, of the package wonderwords; ImportError where that is not here."""
    try:
        from wonderwords.random_word import _get_words_from_text_file as read
    except ImportError as error:
        raise ImportError("RULER's own words need the package wonderwords; pip install wonderwords") from error
    return Words(*(tuple(read(f"{kind}list.txt")) for kind in ("adjective", "noun", "verb")), others)


def read_others(path: Path) -> tuple[str, ...]:
    """The words of RULER's english_words.json, a dict of them by their number."""
    others = tuple(read_object(path, "; give RULER's english_words.json").values())
    check(all(isinstance(word, str) for word in others), f"{path} holds other things than words; give english_words.json")
    return others


def sent_tokenize() -> Callable[[str], list[str]] | None:
    """nltk's, by which RULER cuts prose into sentences; None where it or its data, punkt_tab, are not here."""
    try:
        from nltk.tokenize import sent_tokenize

        sent_tokenize("Is it here? It is.")
    except (ImportError, LookupError):
        return None
    return sent_tokenize


class _Request(NamedTuple):
    """What all prompts of a task share; `tokens` counts those of a text."""

    task: str
    length: int
    draws: Draws
    source: Sequence[str] | Questions | None
    tokens: Callable[[str], int]

    def ask(self, index: int, units: int) -> Question:
        return tasks.ask(self.task, self.draws, SampleSpec(self.length, index, self.source), units)

    def fits(self, question: Question) -> bool:
        return self.tokens(question.prompt) + NEW_TOKENS.get(self.task, 0) <= self.length  # an example leaves no room for one

    def shrunk(self, ask: Callable[[int], Question], units: int, step: int, fewest: int) -> Question:
        """The first question that fits, from `units` down."""
        for _ in range(TRIES + units // step):
            if units < fewest:
                break
            question = ask(units)
            if self.fits(question):
                return question
            units -= step if units > step else 0
        raise TooLongError(
            f"{self.task} does not fit into {self.length:,} tokens as RULER asks it, whose script would try for ever; "
            f"use a greater length, a tokenizer with longer pieces, or the default generator"
        )


def generate(
    task: str, length: int, samples: int, seed: int, tokenizer, words: Words,
    haystack: str | None = None, qa: Mapping[str, Questions] | None = None,
    sentences: Callable[[str], list[str]] = own.sentences,
) -> list[Sample]:  # fmt: skip
    """The first `samples` of a task. For those in prose, RULER has nltk's sent_tokenize cut `haystack` into `sentences`.

    TooLongError where its script would try for ever.
    """
    read = source(task, samples - 1, haystack, qa or {})
    draws = _draws(seed, words, task in NEEDLES, sentences)
    request = _Request(task, length, draws, read, functools.partial(count, tokenizer))
    questions = {"vt": _tracking, "fwe": _frequent}.get(task, _searched)(request, samples)
    meta = {"seed": seed, "generator": "RULER"}
    return [Sample(task, length, i, x.prompt, x.answers, NEW_TOKENS[task], "", dict(meta)) for i, x in enumerate(questions)]


def _draws(seed: int, words: Words, named: bool, sentences: Callable[[str], list[str]]) -> Draws:
    def shuffle(things: list) -> None:
        random.Random(seed).shuffle(things)

    listed = sorted({*words.nouns, *words.adjectives, *words.verbs})
    shuffle(listed)

    def drawable(number: int) -> Sequence[str]:
        enough = listed if number <= len(listed) else words.others
        check(number <= len(enough), f"a list of {number:,} words needs more than the {len(listed):,} given; give it others")
        return enough

    keys = pairs(words.adjectives, words.nouns) if named else ()
    integer, hide = np.random.RandomState(seed).randint, functools.partial(own.between_sentences, sentences)
    return Draws(random.Random(seed), integer, shuffle, keys, drawable, None, hide)


def _searched(request: _Request, samples: int) -> list[Question]:
    task, step = request.task, _step(request)
    probe = 4096 if task == "cwe" else step
    each = request.tokens(request.ask(0, probe).prompt) / probe
    most = int(request.length // each) * 2 if task == "cwe" else int(request.length / each * 3)
    units = _search(lambda n: request.fits(request.ask(0, n)), step, most)

    def fewest(index: int) -> int:
        return len(request.source.items[index].documents) if task in QA else 1

    return [request.shrunk(functools.partial(request.ask, i), units, step, fewest(i)) for i in range(samples)]


def _tracking(request: _Request, samples: int) -> list[Question]:
    draws, fewest = request.draws, tasks.HOPS + 1

    def example(units: int) -> Question:
        return tasks.chain(draws, units, 3, EXAMPLE_VALUE)

    shown = request._replace(task="the example of vt", length=EXAMPLE_TOKENS)
    each = request.tokens(example(5).prompt) / 5
    units = _search(lambda n: shown.fits(example(n)), 5, int(EXAMPLE_TOKENS / each * 3))
    solved = tasks.solved(shown.shrunk(example, units, 5, fewest))
    step = _step(request)
    each = request.tokens(request.ask(0, step).prompt) / step
    remaining = request._replace(length=request.length - request.tokens(solved.removesuffix("\n")))
    units = _search(lambda n: remaining.fits(request.ask(0, n)), step, int(request.length / each * 3))

    def ask(units: int) -> Question:
        question, before = request.ask(0, units), solved
        for name in solved.split()[-tasks.HOPS - 1 :]:
            before = before.replace(name, draws.letters(len(name)))
        return question._replace(prompt=before.replace(EXAMPLE_VALUE, draws.value()) + question.prompt)

    return [request.shrunk(ask, units, step, fewest) for _ in range(samples)]


def _frequent(request: _Request, samples: int) -> Iterator[Question]:
    draws, budget = request.draws, request.length - NEW_TOKENS["fwe"]
    step, units = budget // 32, budget // tasks.CODED_LETTERS
    if step < 1:
        raise TooLongError(f"fwe needs more than {request.length:,} tokens; use a length of at least {32 + NEW_TOKENS['fwe']}")
    ranked = tasks.vocabulary(draws, request.length)
    while request.tokens(tasks.coded_text(draws, ranked, units).prompt) < budget:
        units += step
    units -= step
    for _ in range(samples):
        ranked = tasks.vocabulary(draws, request.length)
        yield request.shrunk(functools.partial(tasks.coded_text, draws, ranked), units, step, 1)


def _step(request: _Request) -> int:
    if request.task in ESSAYS:
        return 500
    if request.task == "cwe" or request.task in QA:
        return 10
    if request.length < SHORT:
        return 5
    return 10 if request.task == "vt" else 25


def _search(fits: Callable[[int], bool], low: int, most: int) -> int:
    best, high = low, max(most, 2 * low)
    while low <= high:
        middle = (low + high) // 2
        if fits(middle):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best
