"""Needles stand at their depths in prompts that fill their length, and count when their numbers are given."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest

from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import needle
from hybrid_attn.evals.ruler.draws import hidden

TEXT = " ".join(f"Sentence number {i} says little." for i in range(400))


def drawn(length=2048, depth=50.0, needles=1, index=0, seed=0, text=TEXT):
    return needle.generate(length, depth, needles, index, seed, ByteTokenizer(), text)


@pytest.mark.parametrize("depth", [0.0, 33.0, 50.0, 100.0])
@pytest.mark.parametrize("needles", [1, 3])
def test_needles_stand_at_their_depths_and_are_asked_for(depth, needles):
    sample = drawn(4096, depth, needles)
    context = sample.prompt.split("\n")[1]
    places = []
    for value in sample.answers:
        key, found = re.search(rf"One of the special magic numbers for (\S+) is: ({value})\.", context).groups()
        assert sample.prompt.endswith(f"for {key} mentioned in the provided text {'is' if needles == 1 else 'are'}")
        places.append(context.index(f"is: {found}.") / len(context))
    wanted = [depth / 100 + i * (1 - depth / 100) / needles for i in range(needles)]
    np.testing.assert_allclose(places, wanted, atol=0.06)
    assert len(set(sample.answers)) == needles and sample.group == f"{depth:g}"


@pytest.mark.parametrize("depth", [25.0, 50.0, 75.0])
def test_in_a_text_of_few_sentences_needles_stand_at_their_depths_too(depth):
    code = Path(argparse.__file__).read_text()
    for index in range(4):
        context = drawn(2048, depth, index=index, text=code).prompt.split("\n")[1]
        before, after = re.split(r" ?One of the special magic numbers for \S+ is: \d+\. ?", context)
        assert abs(len(before) / len(before + after) - depth / 100) < 0.04


def test_a_needle_goes_between_two_sentences_where_some_end_near():
    text = "A b. " * 20 + "c d e " * 60
    for depth in (11.5, 24.0):  # words end nearer
        assert hidden(text, ["X."], [depth]).count("b. X.") == 1
    assert hidden(text, ["X."], [26.0]).count("c X. d") == 1  # the last sentence ends too far away
    assert hidden(text, ["X.", "Y."], [60.0, 80.0]).count(" X. ") == 1
    assert hidden(text, ["X.", "Y."], [0.0, 100.0]) == f"X. {text.strip()} Y."


@pytest.mark.parametrize("length", [1024, 2048, 5000])
def test_a_prompt_fills_its_length_to_a_word_and_never_passes_it(length):
    sample = drawn(length)
    used = 1 + len(sample.prompt.encode()) + sample.max_new_tokens
    assert length - 12 <= used <= length


def test_a_sample_follows_from_its_arguments_alone():
    assert drawn(index=3) == drawn(index=3)
    others = [drawn(), drawn(index=1), drawn(seed=1), drawn(depth=25.0)]
    assert len({x.answers for x in others}) == 4 and len({x.prompt for x in others}) == 4
    assert len({x.prompt.split("\n")[1][:40] for x in others}) == 4  # the text begins elsewhere
    assert drawn(8192).answers == drawn(2048).answers  # longer texts hide the same


def test_what_does_not_fit_and_what_hides_nothing_is_refused():
    with pytest.raises(ValueError, match="does not fit into 300 tokens: .* take"):
        drawn(300)
    with pytest.raises(ValueError, match="depth=101 must lie between 0 and 100 percent"):
        drawn(depth=101)
    with pytest.raises(ValueError, match="this one has no words"):
        drawn(text=" \n")


def test_numbers_count_where_an_answer_has_them_whatever_else_it_says():
    samples = [drawn(depth=depth, needles=2, index=i) for depth in (0.0, 50.0, 100.0) for i in range(2)]
    given = [" and ".join(samples[0].answers), f"It is {samples[1].answers[1]}!", "", samples[2].answers[0]]
    given += [" and ".join(x[:-1] for x in samples[4].answers), " and ".join(x[1:] for x in samples[5].answers)]
    cells = [(x["depth"], x["needles"], x["answers"], x["right"]) for x in needle.records(samples, given)]
    assert cells == [(0.0, 2, 4, 3), (50.0, 2, 4, 0), (100.0, 2, 4, 0)]
