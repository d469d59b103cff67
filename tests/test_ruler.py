"""RULER's questions fill their length and no more, follow from their names, and are answered by rules that read the prompt."""

import collections
import dataclasses
import hashlib
import itertools
import json
import re
import sys
import types

import pytest

from hybrid_attn.data import words
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import ruler, samples
from hybrid_attn.evals.ruler import compat, fit, scores, tasks
from hybrid_attn.evals.ruler.draws import of_sample
from hybrid_attn.evals.ruler.qa import read_hotpot, read_squad

PROSE = "It had rained since noon. Who would go out? Nobody! The dog slept by the stove, and the clock went on. " * 9
FREE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")  # of any file
FACTS = {"Ada": "mill", "Bo": "forge", "Cy": "barn", "Di": "quay", "Ed": "inn", "Flo": "dairy"}


class Pieces(ByteTokenizer):
    """A tokenizer of few tokens: a word, a number or a sign with the space before it is one."""

    def encode(self, text):
        return ByteTokenizer().encode(b"." * len(re.findall(r" ?\w+| ?[^\w ]", text.decode())))


@pytest.fixture(scope="module")
def qa(tmp_path_factory):
    """Two questions of each file."""
    folder = tmp_path_factory.mktemp("qa")
    lines = {name: f"{name} works at the {place}. " * 3 for name, place in FACTS.items()}

    def article(*names):
        none, one = {"question": "Why?", "is_impossible": True, "answers": []}, {"is_impossible": False}
        asked = {x: one | {"question": f"Where does {x} work?", "answers": [{"text": FACTS[x]}] * 2} for x in names}
        return {"paragraphs": [{"context": lines[x], "qas": [none, asked[x]]} for x in names]}

    squad, hotpot = folder / "squad.json", folder / "hotpot.json"
    squad.write_text(json.dumps({"data": [article("Ada", "Bo"), article("Cy", "Di", "Ed", "Flo")]}))
    context = [[name, [line, "No more."]] for name, line in lines.items()]
    entries = [{"question": f"Where does {x} work?", "answer": FACTS[x], "context": context[i:]} for i, x in enumerate(FACTS)]
    hotpot.write_text(json.dumps(entries[:2]))
    return {"qa_1": read_squad(squad), "qa_2": read_hotpot(hotpot)}


def answer(sample: samples.Sample) -> str:
    """What rules find that know no more than the prompt."""
    prompt = sample.prompt
    if sample.task.startswith("niah"):
        asked = re.search(r"What (?:is|are all) the special magic \w+ for (.*?) mentioned in", prompt)[1]
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt)
        return ", ".join(value for key, value in found if key in re.split(r", (?:and )?", asked))
    if sample.task == "vt":
        body = prompt[prompt.rindex("Memorize and track") :]
        value = re.search(r"assigned the value (\d+)", body)[1]
        known = {value}
        return " ".join(
            name for name, of in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", body) if of in known and not known.add(name)
        )
    if sample.task == "cwe":
        body = prompt[prompt.rindex("Below is a numbered list") :]
        return " ".join(x for x, _ in collections.Counter(re.findall(r"\d+\. ([a-z-]+)", body)).most_common(10))
    if sample.task == "fwe":
        body = re.search(r"coded words\. (.*)\nQuestion", prompt)[1]
        return " ".join(x for x, _ in collections.Counter(re.findall(r"[a-z]{6}", body)).most_common(3))
    return re.search(rf"{re.search('Where does (.*) work', prompt)[1]} works at the (.*?)\.", prompt)[1]


def score(sample: samples.Sample, prediction: str) -> float:
    return scores.score(sample.task, prediction, sample.answers)


@pytest.mark.parametrize("task", ruler.NAMES)
@pytest.mark.parametrize(
    ("tokenizer", "length"), [(ByteTokenizer(), 2300), (ByteTokenizer(), 8192), (Pieces(), 600), (Pieces(), 4096)]
)
def test_a_question_fills_its_length_and_the_prompt_tells_its_answer(task, tokenizer, length, qa):
    asked = [ruler.generate(task, length, i, 7, tokenizer, PROSE, qa) for i in range(2)]
    samples.check_lengths(asked, tokenizer)
    for sample, other in (asked, asked[::-1]):
        assert score(sample, answer(sample)) == 100
        assert score(sample, answer(other)) == score(sample, "") == 0
        assert sample.max_new_tokens >= fit.count(tokenizer, f" {answer(sample)}")
        assert all(0 < depth < 1 for depth in sample.meta["depths"])
        assert fit.count(tokenizer, sample.prompt) + 1 + sample.max_new_tokens == sample.meta["tokens"]


UNITS = {
    "niah_single_1": 92,
    "niah_multikey_2": 80,
    "niah_multikey_3": 130,
    "vt": 92,
    "cwe": 70,
    "fwe": 70,
    "qa_1": 99,
    "qa_2": 99,
}


@pytest.mark.parametrize("task", ruler.NAMES)
@pytest.mark.parametrize("length", [2400, 6600])
def test_less_than_one_unit_of_text_is_left_empty(task, length, qa):
    sample = ruler.generate(task, length, 1, 0, ByteTokenizer(), PROSE, qa)
    assert sample.length - sample.meta["tokens"] < UNITS.get(task, 20)


@pytest.mark.parametrize("task", ruler.NAMES)
def test_a_question_follows_from_its_name(task, qa):
    def ask(index, seed, length=2400):
        return ruler.generate(task, length, index, seed, ByteTokenizer(), PROSE, qa)

    assert ask(1, 7) == ask(1, 7)
    prompts = {ask(1, 7).prompt, ask(0, 7).prompt, ask(1, 8).prompt, ask(1, 7, 3000).prompt}
    assert len(prompts) == 4


def test_every_sample_has_an_order_of_its_own(qa):
    def places(task, length):
        return {tuple(ruler.generate(task, length, i, 0, ByteTokenizer(), PROSE, qa).meta["depths"]) for i in range(2)}

    assert len(places("qa_2", 900)) == 2

    def ranks(index):
        prompt = ruler.generate("fwe", 4096, index, 0, ByteTokenizer()).prompt
        coded = re.search(r"coded words\. (.*)\nQuestion", prompt)[1].split()
        return [i for i, word in enumerate(coded) if word == "..."]

    assert ranks(0)[:20] != ranks(1)[:20]


def test_a_question_of_variables_comes_after_a_solved_one_of_its_own():
    examples = set()
    for index in range(3):
        sample = ruler.generate("vt", 4096, index, 0, Pieces())
        example, question = re.fullmatch(r"(Memorize and track .*?)(Memorize and track .*?)", sample.prompt, re.DOTALL).groups()
        asked, told = example.rsplit("they are: ", 1)
        assert answer(dataclasses.replace(sample, prompt=asked)).split() == told.split()
        assert not any(name in question for name in told.split())
        assert 470 < fit.count(Pieces(), example) <= 500
        examples.add(example)
    assert len(examples) == 3


@pytest.mark.parametrize("task", FREE)
def test_what_does_not_fit_is_refused_with_the_length_that_does(task):
    with pytest.raises(ValueError, match=f"sample 0 of {task} does not fit into 300 tokens") as refused:
        ruler.generate(task, 300, 0, 0, ByteTokenizer())
    enough = int(re.search(r"use a length of at least ([\d,]+)", str(refused.value))[1].replace(",", ""))
    assert ruler.generate(task, enough, 0, 0, ByteTokenizer()).meta["tokens"] <= enough


def test_a_long_list_has_enough_words():
    sample = ruler.generate("cwe", 40_000, 0, 0, Pieces())
    assert score(sample, answer(sample)) == 100
    assert set(sample.answers) < set(words.pairs())
    assert not set(ruler.generate("cwe", 8000, 0, 0, Pieces()).answers) & set(words.pairs())


def test_no_word_contains_another():
    singles = words.singles()
    assert len(set(singles)) == len(singles) > 1500
    whole = " ".join(singles)
    assert all(whole.count(word) == 1 for word in singles)
    assert all(re.fullmatch("[a-z]+", word) for word in singles)


def test_who_repeats_a_question_about_common_words_names_none_of_them():
    question = tasks.COMMON.lower()
    assert not [word for word in words.singles() if word in question]


@pytest.mark.parametrize("length", [2400, 8192])
def test_a_solved_list_has_no_word_of_the_list_that_is_asked_about(length):
    for index in range(8):
        prompt = ruler.generate("cwe", length, index, 0, Pieces()).prompt
        solved, asked = ({*re.findall(r"\d+\. (\S+)", part)} for part in prompt.split("\nBelow is a numbered list"))
        assert len(solved) == tasks.example_words(length) and len(asked) > 50 and not solved & asked


@pytest.mark.parametrize("task", tasks.ESSAYS)
def test_every_sample_has_a_part_of_the_text_of_its_own(task):
    text = " ".join(f"Sentence {i} {'is long and ' * (i % 7)}says little." for i in range(3000))
    found = [ruler.generate(task, 2400, index, 0, ByteTokenizer(), text) for index in range(20)]
    texts = [re.sub(r"One of the special magic .*? is: \S+\. ?", "", sample.prompt.split("\n")[1]) for sample in found]
    assert len({text[:200] for text in texts}) == 20
    assert len({depth for sample in found for depth in sample.meta["depths"]}) >= 18  # 8 where all begin alike
    short, long = (ruler.generate(task, length, 3, 0, ByteTokenizer(), text) for length in (2400, 4000))
    assert short.answers == long.answers and short.prompt.split("\n")[1][:40] == long.prompt.split("\n")[1][:40]


def test_a_text_that_is_too_short_is_repeated_from_where_a_sample_begins():
    essay = [f"w{i}" for i in range(9)]
    kind = tasks.NEEDLES["niah_single_2"]
    draws = dataclasses.replace(of_sample("any", (), words.pairs()), start=lambda n: 7)
    told = tasks.needles(draws, kind, essay, 25).prompt.split("\n")[1]
    told = re.sub(r"One of the special magic numbers for \S+ is: \d+\.", "", told).split()
    assert told == [f"w{i % 9}" for i in range(7, 7 + 25)]


def test_nothing_magic_is_drawn_twice():
    drawn = of_sample("any", (), ("a-b", "c-d", "e-f"))
    assert {drawn.magic("words") for _ in range(3)} == {"a-b", "c-d", "e-f"}


def test_the_coded_words_that_are_asked_for_are_the_most_frequent():
    ranked = ["...", "bbbbbb", "cccccc", "dddddd", "eeeeee", "ffffff"]
    for units in range(fit.FEWEST["fwe"], 600):
        question = tasks.coded_text(of_sample("any", (), ()), ranked, units)
        times = [question.prompt.count(word) for word in ranked[1:]]
        assert question.answers == ("bbbbbb", "cccccc", "dddddd")
        assert times == sorted(times, reverse=True) and times[2] > times[3]


def test_answers_that_bytes_spell_out_get_more_tokens_than_subwords():
    assert fit.new_tokens("vt", "ABCDE " * 5, ByteTokenizer()) == 32 and fit.new_tokens("vt", "ABCDE " * 5, Pieces()) == 30
    assert fit.new_tokens("qa_1", "x" * 40, ByteTokenizer()) == 64


def test_the_search_finds_the_largest_in_few_calls():
    calls = []

    def cost(n):
        calls.append(n)
        return 200 + int(1.37 * n) + 3 * (n % 2)

    found = fit.largest(cost, 131_072, 1, "it")
    assert cost(found) <= 131_072 < cost(found + 1) and len(calls) < 16
    assert fit.largest(lambda n: 3 * n, 20, 1, "it", 4) == 4


@pytest.mark.parametrize("cost", [lambda n: n**3, lambda n: n if n < 70_000 else 50 * n, lambda n: n.bit_length() * 9000])
def test_the_search_ends_soon_where_costs_are_no_line(cost):
    calls = []
    found = fit.largest(lambda n: calls.append(n) or cost(n), 131_072, 1, "it")
    assert cost(found) <= 131_072 < cost(found + 1) and len(calls) < 40


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("niah_singel_1", {}, "'niah_singel_1' is no task of RULER: it .*; did you mean 'niah_single_1'"),
        ("niah_single_2", {}, "niah_single_2 hides its needles in a text; give one"),
        ("niah_single_2", {"haystack": " \n"}, "give one as haystack"),
        ("qa_1", {}, "qa_1 asks questions of a file that was not given"),
    ],
)
def test_what_is_missing_is_named(task, given, words):
    with pytest.raises(ValueError, match=words):
        ruler.generate(task, 4096, 0, 0, ByteTokenizer(), **given)


def test_tasks_without_their_data_are_not_present(qa):
    assert {*ruler.NAMES} - {*ruler.missing(None, {})} == {*FREE}
    assert ruler.missing(PROSE, qa) == {}
    assert ruler.missing(PROSE, {}) == dict.fromkeys(("qa_1", "qa_2"), "needs the file of its questions")


def test_questions_are_those_of_the_files(qa, tmp_path):
    assert [len(x.items) for x in qa.values()] == [6, 2] and [len(x.documents) for x in qa.values()] == [6, 6]
    own = qa["qa_1"].items[2]
    assert qa["qa_1"].documents[own.documents[0]].startswith("Cy") and len(own.related) == 3
    with pytest.raises(ValueError, match="qa_2 has 2 questions and no number 2; ask for at most 2 samples"):
        ruler.generate("qa_2", 4096, 2, 0, ByteTokenizer(), None, qa)
    other = tmp_path / "other.json"
    other.write_text('{"data": [{}]}')
    for read in (read_squad, read_hotpot):
        with pytest.raises(ValueError, match="other.json is no file of"):
            read(other)


def spelled(*letters: str) -> tuple[str, ...]:
    return tuple(map("".join, itertools.product(*letters)))


LISTS = compat.Words(
    spelled("bdf", "aeiou", "lmn"), spelled("ghj", "aeiou", "rst"), spelled("kpw", "aei", "dz"), spelled(*["aeiou", "rstl"] * 3)
)
# SHA-256 of the prompts and answers of two samples that RULER's scripts gave for these words, texts, seed and tokenizer.
GOLDEN = {
    "niah_single_1": ("b3c7f22c35b84bb7", "44313c9ed2d3208d"),
    "niah_single_2": ("b7c35d8f36331d5e", "8ffd6b53d2c8cd73"),
    "niah_single_3": ("035fbf39850d5d08", "fe07e9ffd77e9a24"),
    "niah_multikey_1": ("d897610e5b055164", "fca6516d9b51a7c1"),
    "niah_multikey_2": ("7985d2d64b410458", "42d58bf05d7dbf79"),
    "niah_multikey_3": ("6660c9bdc01c0167", "af07ae11f66cce1c"),
    "niah_multivalue": ("68c19a82fa88cf5c", "741d9ffea4c09544"),
    "niah_multiquery": ("d0ef0b31b4c398fe", "0c2334f47ee5f251"),
    "vt": ("0243d478d7302a8b", "ba4032b2f005b498"),
    "cwe": ("3d071e020b269ff1", "f113ada7db149f90"),
    "fwe": ("527dfe36f589c257", "273d265d5ee4ae0c"),
    "qa_1": ("d3ce52db19670fb9", "eb054e03b7e2ad08"),
    "qa_2": ("6297a462986b3eb7", "556ff38d19003484"),
}


@pytest.mark.parametrize("length", [1800, 4600])
@pytest.mark.parametrize("task", ruler.NAMES)
def test_prompts_are_those_of_rulers_own_scripts(task, length, qa):
    found = compat.generate(task, length, 2, 7, Pieces(), LISTS, PROSE, qa)
    whole = "".join(sample.prompt + "".join(sample.answers) for sample in found)
    assert hashlib.sha256(whole.encode()).hexdigest()[:16] == GOLDEN[task][length > 4096]


def test_rulers_habits_are_kept():
    first = compat.generate("cwe", 4600, 2, 7, Pieces(), LISTS)
    assert compat.generate("cwe", 4600, 1, 7, Pieces(), LISTS) == first[:1]
    assert [sample.max_new_tokens for sample in first] == [120, 120]
    places = [[sample.prompt.rindex(f" {word} ") for word in sample.answers] for sample in first]
    orders = [sorted(range(10), key=found.__getitem__) for found in places]
    assert orders[0] == orders[1]  # one order for all, with other words


@pytest.mark.parametrize(
    ("task", "length", "lists", "words"),
    [
        ("vt", 8192, LISTS, "the example of vt does not fit into 500 tokens as RULER asks it"),
        ("niah_single_1", 500, LISTS, "niah_single_1 does not fit into 500 tokens as RULER asks it"),
        ("fwe", 60, LISTS, "fwe needs more than 60 tokens; use a length of at least 82"),
        ("cwe", 8192, LISTS._replace(others=()), "a list of 4,096 words needs more than the 108 given; give it others"),
        ("qa_2", 8192, LISTS, "qa_2 asks questions of a file that was not given"),
        ("cwf", 8192, LISTS, "did you mean 'cwe'"),
    ],
)
def test_what_rulers_scripts_try_for_ever_is_an_error(task, length, lists, words):
    with pytest.raises(ValueError, match=words):
        compat.generate(task, length, 1, 7, ByteTokenizer(), lists)


def test_rulers_own_words_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.setitem(sys.modules, "wonderwords.random_word", None)
    with pytest.raises(ImportError, match="pip install wonderwords"):
        compat.wonderwords()


def test_prose_is_cut_as_nltk_does_where_it_and_its_data_are_here(monkeypatch):
    def without_data(text):
        raise LookupError("punkt_tab")

    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    tokenize = types.ModuleType("nltk.tokenize")
    for cut, wanted in ((without_data, None), (str.split, str.split)):
        tokenize.sent_tokenize = cut
        monkeypatch.setitem(sys.modules, "nltk.tokenize", tokenize)
        assert compat.sent_tokenize() is wanted
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    assert compat.sent_tokenize() is None


def test_the_words_of_a_file_are_its_values(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"0": "one", "1": "two"}')
    assert compat.read_others(path) == ("one", "two")
    for other in ('["one"]', '{"0": 1}', "one"):
        path.write_text(other)
        with pytest.raises(ValueError, match="words.json .*english_words.json"):
            compat.read_others(path)
