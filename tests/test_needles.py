"""Documents with needles: a question's answer stands in the text before it, and nothing is shared with evaluations."""

import functools
import re

import numpy as np
import pytest
from conftest import tiny

from configs import base
from hybrid_attn import config
from hybrid_attn.data import corpora, documents, needles, pipeline, words
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import needle, needle_prompts
from hybrid_attn.evals.types import Spec

BYTES = ByteTokenizer()
LENGTH = 2048


def pattern(template: str, **fields: str) -> re.Pattern:
    """Of a template whose fields are regular expressions."""
    literal = template.format(kind="KIND", key="KEY", query="KEY", value="VALUE")
    return re.compile(functools.reduce(lambda text, x: text.replace(*x), fields.items(), re.escape(literal)))


HIDDEN = pattern(needles.NEEDLE, KIND="numbers", KEY="([a-z]+-[a-z]+)", VALUE=r"(\d+)")
QUESTION = pattern(f"{needles.QUESTION} {{value}}", KIND="number", KEY="([a-z]+-[a-z]+)", VALUE=r"(\d+)")


@pytest.fixture(scope="module")
def text():
    """Documents of numbered words, so that what a needle document has of them can be found again."""
    pieces = ["\n\t".join(f"w{i}é{j}  of" for j in range(200 + 50 * i)).encode() for i in range(12)]
    tokens = [documents.with_boundaries(BYTES, BYTES.encode(x)) for x in pieces]
    return documents.in_memory(tokens, [documents.content_hash(x) for x in pieces])


def questions(document):
    """The key, the same key again and the answer of each question, without the repetition."""
    matches = QUESTION.findall(document)
    assert all(first == second for first, second, _ in matches)
    return [(key, number) for key, _, number in matches]


def sequences_of(text, pairs=3, seed=7, count=40, length=LENGTH):
    return SyntheticSequences(Task("needle", pairs, text), length, seed).read([(i, 0, length) for i in range(count)])


def parts(sequence):
    """The text and the answered digits of each document of a sequence."""
    for segment in range(1, sequence["segments"].max() + 1):
        inside = sequence["segments"] == segment
        tokens, weights = sequence["tokens"][inside], sequence["weights"][inside] > 0
        np.testing.assert_array_equal(sequence["positions"][inside], np.arange(len(tokens)))
        assert tokens[0] == BYTES.bos and weights[-1]  # the last target is the last digit
        last = sequence["targets"][inside][-1]
        yield BYTES.decode([*tokens, last]), BYTES.decode(sequence["targets"][inside][weights])


@pytest.mark.parametrize("seed", [7, None])
def test_the_answer_of_each_question_is_the_number_of_its_key_in_the_text(text, seed):
    numbers, depths, lengths = [], [], []
    for sequence in sequences_of(text, seed=seed):
        for document, answers in parts(sequence):
            hidden, answered = HIDDEN.findall(document), questions(document)
            assert 1 <= len(hidden) <= 3 and sorted(hidden) == sorted(answered) and len(dict(hidden)) == len(hidden)
            assert answers == "".join(number for _, number in answered)
            assert document.startswith(needles.BEFORE.format(kind="number")) and document.endswith(answered[-1][1])
            context = document[len(needles.BEFORE) : document.index("\nWhat is")]
            depths += [match.start() / len(context) for match in HIDDEN.finditer(context)]
            numbers += [number for _, number in answered]
            lengths.append(len(document.encode()))
            assert all(re.fullmatch(r"w\d+é\d+|of", word) for word in HIDDEN.sub("", context).split()[1:])
    assert {len(x) for x in numbers} == set(needles.DIGITS) and not any(x.startswith("0") for x in numbers)
    digits = np.bincount([int(x) for number in numbers for x in number[1:]]) / sum(len(x) - 1 for x in numbers)
    assert len(digits) == 10 and 0.05 < digits.min() and digits.max() < 0.15
    assert min(depths) < 0.1 and max(depths) > 0.8 and 0.3 < np.mean(depths) < 0.6
    assert min(lengths) < 600 and max(lengths) > 1800 if seed else min(lengths) > LENGTH - 20
    assert max(lengths) <= LENGTH


def test_keys_and_numbers_are_none_of_an_evaluation(text, monkeypatch):
    monkeypatch.setattr(words, "pairs", lambda: ["brave-apple", "calm-apple"])  # of half a million
    keys, numbers = zip(*(x for s in sequences_of(text) for document, _ in parts(s) for x in questions(document)), strict=True)
    sample = needle.generate(LENGTH, 50, 1, 0, 0, BYTES, "some words " * 200)
    (prompt,) = needle_prompts.prompts(Spec(text, LENGTH, 1), BYTES)
    evaluated = [sample.prompt + f" {sample.answers[0]}", BYTES.decode(prompt.tokens_S)]
    for document in evaluated:  # the form is the same
        ((key, number),) = questions(document)
        assert HIDDEN.findall(document) == [(key, number)] and document.startswith(needles.BEFORE.format(kind="number"))
        assert len(number) not in needles.DIGITS and key in words.pairs()
    assert not {key.split("-")[0] for key in keys} & set(words.ADJECTIVES)  # as they all begin in evaluations
    assert len(set(keys)) > 50 and len(set(numbers)) > 50


def test_a_sequence_follows_from_its_number_its_seed_and_its_text(text):
    contents = [x["tokens"].tobytes() for seed in (0, 7, None) for x in sequences_of(text, seed=seed, count=20)]
    assert len(set(contents)) == 60
    sequences = SyntheticSequences(Task("needle", 3, text), LENGTH, 7)
    full, first, second = sequences.read([(5, 0, LENGTH), (5, 0, 900), (5, 900, LENGTH)])
    for name, values in full.items():
        np.testing.assert_array_equal(values, np.concatenate([first[name], second[name]]))
    (other,) = SyntheticSequences(Task("needle", 3, text.select(np.arange(12) > 3)), LENGTH, 7).read([(5, 0, LENGTH)])
    assert (other["tokens"] != full["tokens"]).any()


def test_the_shortest_sequence_of_a_config_holds_the_longest_keys_and_numbers():
    key = f"{max(words.VERBS, key=len)}-{max(words.NOUNS, key=len)}"
    digits = max(needles.DIGITS) * "1"
    hidden = needles.NEEDLE.format(kind="numbers", key=key, value=digits)
    asked_for = needles.QUESTION.format(kind="number", query=key)
    for pairs in (1, 16):
        least = config.shortest_sequence("needle", pairs)
        text = needles.BEFORE.format(kind="number") + pairs * f" {hidden}{asked_for} {digits}"
        assert len(text) < least < len(text) + 100
        with pytest.raises(
            ValueError, match=f"seq_len {least - 1} is too short for data.sources.hidden: .* needs {least} tokens"
        ):
            mixed(least - 1, pairs)


def mixed(seq_len, pairs=1):
    """Text and needles in one stage."""
    sources = {"text": base.source(), "hidden": base.source(task="needle", pairs=pairs)}
    stage = {"steps": 2, "seq_len": seq_len, "batch": 1, "microbatches": 1, "mixture": {"text": 0.5, "hidden": 0.5}}
    return tiny({"data.sources": sources, "stages": [stage], "evals.names": ()})


def test_a_source_hides_needles_in_its_training_documents_and_evaluations_in_those_held_out(text, monkeypatch):
    monkeypatch.setattr(documents, "load", lambda paths, tokenizer: text)
    c = mixed(LENGTH)
    loaded = corpora.load(c.data, ["text", "hidden"], BYTES)
    for split in ("training", "heldout"):
        plain, task = (getattr(loaded[name], split) for name in ("text", "hidden"))
        assert task == Task("needle", 1, task.text) and task.text.fingerprint() == plain.fingerprint()
        assert task.fingerprint() == f"needle of 1 pairs in {plain.fingerprint()}"
    training = {name: x.training for name, x in loaded.items()}
    (stage,) = pipeline.stage_sequences(c, training, BYTES)
    batch = stage.read([(0, 0, LENGTH), (1, 0, LENGTH)])
    shares = sorted(float(x["weights"].mean()) for x in batch)
    assert 0 < shares[0] < 0.1 and shares[1] > 0.9
    assert pipeline.identities(c, training, BYTES)[0]["documents"]["hidden"] == training["hidden"].fingerprint()
