"""Prompts with a needle, a question about it and the right answer, and the position of each."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from hybrid_attn import trees
from hybrid_attn.data import words
from hybrid_attn.data.needles import FIND_ONE, NEEDLE
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.evals.types import Spec

SENTENCE = 256  # tokens that the needle moves back at most, to follow the end of a sentence or a line


@dataclasses.dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """int32 tokens, the right answer included: a needle [start, stop) of them, then where the question and the answer begin."""

    tokens_S: np.ndarray
    needle: tuple[int, int]
    question: int
    answer: int

    def __post_init__(self):
        (start, stop), length = self.needle, len(self.tokens_S)
        trees.check(
            0 < start < stop <= self.question < self.answer < length,
            f"needle={self.needle}, question={self.question} and answer={self.answer} do not follow one another after the "
            f"first of {length} tokens",
        )
        trees.check(self.copied.any(), f"no token of the answer stands in the needle [{start}, {stop})")

    @property
    def copied(self) -> np.ndarray:
        """Which tokens of the answer stand in the needle too."""
        return np.isin(self.tokens_S[self.answer :], self.tokens_S[slice(*self.needle)])


def prompts(spec: Spec, tokenizer) -> list[NeedlePrompt]:
    """As many of at most `spec.length` tokens as `spec.tokens` fill.

    Of documents: a magic number in the middle of their text (RULER's niah_single_2). Of the task "recall": a pair of letters
    where the sequence has it.
    """
    number = -(-spec.tokens // spec.length)
    if isinstance(spec.documents, Task):
        return [*_of_task(spec.documents, spec.length, number)]
    sequences = PackedSequences(spec.documents, spec.length, None, tokenizer.byte_lengths)
    tokens = int(spec.documents.lengths.sum())
    full = [i for i in sequences.spread(number) if i < tokens // spec.length]
    if not full:
        raise ValueError(
            f"the documents have {tokens:,} tokens, which fill no prompt of {spec.length:,}; use a shorter length or more text"
        )
    return [_in_text(sequences[i]["tokens"], tokenizer, spec.length, i) for i in full]


def _in_text(text_S: np.ndarray, tokenizer, length: int, index: int) -> NeedlePrompt:
    """The number drawn for (length, index) in the middle of as much of the text as fits."""
    draw = np.random.Philox(np.random.SeedSequence((length, index))).random_raw(2)
    keys = words.pairs()
    key, value = keys[int(draw[0] % len(keys))], f" {1_000_000 + int(draw[1] % 9_000_000)}"
    around = FIND_ONE.format(kind="number", context=value, query=key).split(value)
    statement = NEEDLE.format(kind="numbers", key=key, value=value[1:]).split(value)
    pieces = (around[0], " " + statement[0], value, statement[1], around[1])
    before, needle, value, stop, question = (x.tolist() for x in tokenizer.encode_batch([x.encode() for x in pieces]))
    needle += value + stop
    room = length - 1 - sum(map(len, (before, needle, question, value)))
    trees.check(room >= 2, f"length={length} leaves no text around the needle; use {length - room + 2} or more")
    text = text_S[(text_S != tokenizer.bos) & (text_S != tokenizer.eos)][:room].tolist()
    middle = len(text) // 2
    near = range(middle, max(1, middle - SENTENCE), -1)
    middle = next((i for i in near if tokenizer.decode(text[i - 1 : i]).endswith((".", "\n"))), middle)
    tokens = [tokenizer.bos, *before, *text[:middle]]
    start = len(tokens)
    tokens += needle + text[middle:]
    question_start = len(tokens)
    tokens += question
    return NeedlePrompt(np.array(tokens + value, np.int32), (start, start + len(needle)), question_start, len(tokens))


def _of_task(task: Task, length: int, number: int) -> Iterator[NeedlePrompt]:
    """Rows of "recall" up to the answer of their first question."""
    trees.check(task.name == "recall", f'the task "{task.name}" hides no needle that is asked for; use "recall" or documents')
    sequences = SyntheticSequences(task, length, None)
    for sequence in sequences.read([(i, 0, length) for i in sequences.spread(number)]):
        tokens, key = sequence["tokens"], int(np.flatnonzero(sequence["weights"])[0])
        pair = tokens[key], sequence["targets"][key]
        start = int(np.flatnonzero((tokens[: key - 2] == pair[0]) & (tokens[1 : key - 1] == pair[1]))[0])
        yield NeedlePrompt(np.append(tokens[: key + 1], pair[1]), (start, start + 2), key - 1, key + 1)
