"""Tasks of lm-evaluation-harness: what its definitions promise, on a tiny model, and on engines whose answers are known."""

import json
import random
import re
import string
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mesh_of, random_params, tiny
from test_tokenizer import byte_level, load

from hybrid_attn.infer.engine import Engine, EngineOptions

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402

from hybrid_attn.evals import engine_lm, report  # noqa: E402
from hybrid_attn.evals.report import harness as report_harness  # noqa: E402

MAX_LENGTH = 48


class Letters:
    """A character for each id of the tiny model, so that every answer of it is a text."""

    characters = string.ascii_letters + string.digits + " \n.,?" + "".join(chr(0x100 + i) for i in range(315))
    bos, eos, vocab_size = 382, 383, 384

    def encode(self, text: bytes) -> np.ndarray:
        return np.array([self.characters.index(x) for x in text.decode()], np.int32)

    def decode(self, ids) -> str:
        return "".join(self.characters[i] for i in ids if i < self.bos)


LETTERS = Letters()


def engine_of(**options) -> Engine:
    c = tiny({"train.kernel": "reference", "train.dtype": "float32"})
    return Engine(random_params(c.model), c, EngineOptions(chunk=16, **options))


@pytest.fixture(scope="module")
def engine():
    with jax.set_mesh(mesh_of()):
        yield engine_of()


@pytest.fixture(scope="module")
def lm(engine):
    return engine_lm.EngineLM(engine, LETTERS, MAX_LENGTH)


def requests(kind, *arguments, task="toy", doc=None):
    return [Instance(kind, doc or {}, args, 0, (task, i, 1)) for i, args in enumerate(arguments)]


def scores(lm, *pairs):
    return lm.loglikelihood(requests("loglikelihood", *pairs))


def answers(lm, *contexts, task="toy", doc=None, **options):
    return lm.generate_until(requests("generate_until", *((x, options) for x in contexts), task=task, doc=doc))


class Echo:
    """Gives each prompt the ids that `reply` finds for it, and remembers what it was asked."""

    batch_size, capacity = 2, None

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def generate(self, prompts, max_new_tokens, *, on_tokens, **options):
        self.asked.append(("generate", [[*prompt] for prompt in prompts], max_new_tokens, options))
        for row, prompt in enumerate(prompts):
            for i in self.reply(prompt)[:max_new_tokens]:
                if on_tokens(row, [i]):
                    break

    def score(self, prompts, continuations):
        self.asked.append(("score", [[*prompt] for prompt in prompts], [[*more] for more in continuations]))
        return [np.full(len(more), -0.5, np.float32) for more in continuations]


TEXT = "The sky is blue.\nWhere is the sea?"


def test_a_whole_text_and_its_parts_have_the_same_probability(lm):
    (whole,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)))
    cuts = [i for i in range(1, len(TEXT)) if not TEXT[i - 1].isspace()]
    pairs = [("", TEXT), *((("", TEXT[:i])) for i in cuts), *((TEXT[:i], TEXT[i:]) for i in cuts)]
    first, *parts = [score for score, _ in scores(lm, *pairs)]
    assert whole < -3 * len(TEXT) and first == pytest.approx(whole, abs=1e-4)
    sums = [a + b for a, b in zip(parts[: len(cuts)], parts[len(cuts) :], strict=True)]
    np.testing.assert_allclose(sums, whole, atol=1e-4)


class Stub:
    """What lm-evaluation-harness needs of a model to split a context and its continuation."""

    backend = "causal"

    def __init__(self, lm):
        self.tok_encode = lm._ids


def crossing(tmp_path):
    """A BPE with tokens that cross the border of ("import sys, o", "s.path") and of ("a", "b c")."""
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=t.pre_tokenizer.alphabet(), show_progress=False
    )
    t.train_from_iterator(["import sys, os", "os.path", "ab c"] * 9, trainer)
    return load(t, tmp_path)


def test_a_context_is_encoded_alone_as_the_harness_encodes_it(tmp_path):
    tokenizer = crossing(tmp_path)
    lm = engine_lm.EngineLM(Echo(lambda prompt: []), tokenizer, MAX_LENGTH)
    pairs = [("import sys, o", "s.path"), ("import sys,", " os"), ("import ", "os"), ("a", "b c"), (" a\n", "b")]
    for context, continuation in pairs:
        found = lm._split(context, continuation)
        assert found == TemplateLM._encode_pair(Stub(lm), context, continuation)
        assert found[0] == [tokenizer.bos, *tokenizer.encode(context.rstrip().encode())]
    context, continuation = lm._split("import sys, o", "s.path")
    whole = lm._ids("import sys, os.path")
    assert context[-1] != whole[len(context) - 1] and continuation == whole[len(context) :]  # a token crosses the border
    scores(lm, ("import sys, o", "s.path"))
    assert lm.engine.asked[0] == ("score", [context], [continuation])


def test_a_continuation_of_which_no_token_is_left_is_refused(tmp_path):
    lm = engine_lm.EngineLM(Echo(lambda prompt: []), crossing(tmp_path), MAX_LENGTH)
    with pytest.raises(ValueError, match="toy, document 1: no token is left of the answer 's', which the tokenizer joins"):
        scores(lm, ("import", " sys"), ("import sys, o", "s"))


def test_a_probability_that_is_not_finite_is_an_error():
    engine = Echo(lambda prompt: [])
    engine.score = lambda prompts, continuations: [np.array([-0.5, np.nan]) for _ in prompts]
    with pytest.raises(FloatingPointError, match="the log-probability of a continuation is nan: the parameters are not finite"):
        scores(engine_lm.EngineLM(engine, LETTERS, MAX_LENGTH), ("a", "bc"))


def test_spaces_that_end_a_context_belong_to_what_follows():
    lm = engine_lm.EngineLM(Echo(lambda prompt: []), LETTERS, MAX_LENGTH)
    for context, continuation in (("a b", " c"), ("a b ", "c"), ("a\n\n", "b"), (" ", "b"), ("", "b c")):
        found = lm._split(context, continuation)
        ids = [LETTERS.bos, *LETTERS.encode((context + continuation).encode())]
        first = 1 + len(context.rstrip())
        assert found == (ids[:first], ids[first:])
        if context.strip():
            assert found == TemplateLM._encode_pair(Stub(lm), context, continuation)


def test_long_texts_are_scored_in_the_windows_that_the_harness_defines():
    engine = Echo(lambda prompt: [])
    lm = engine_lm.EngineLM(engine, LETTERS, 4)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("abcdefghij",), ("abc",), ("",)))
    assert found == [-5.0, -1.5, 0.0]
    asked = [pair for _, *both in engine.asked for pair in zip(*both, strict=True)]
    windows = [([382], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9]), ([382], [0, 1, 2])]
    assert sorted(asked) == sorted(windows)
    assert lm.counts() == {"toy": {"requests": 3, "truncated": 0, "windowed": 1}}


def test_a_continuation_is_greedy_where_the_answer_begins_with_it(lm):
    contexts, pairs = ["The sky", "Where is", "a", TEXT], []
    for context, answer in zip(contexts, answers(lm, *contexts, until=[], max_gen_toks=5), strict=True):
        assert len(answer) == 5 and not answer.isspace()
        wrong = LETTERS.characters[(LETTERS.characters.index(answer[2]) + 1) % 382]
        more = [answer, answer[:1], answer[:3], answer[:2] + wrong, answer[:2] + wrong + answer[3:], wrong * 9]
        pairs += [(context, x) for x in more]
    assert [greedy for _, greedy in scores(lm, *pairs)] == [True, True, True, False, False, False] * 4


def test_results_are_those_of_the_requests_in_any_order_and_batch(lm):
    rng = random.Random(5)
    contexts = ["".join(rng.choices(LETTERS.characters[:62], k=n)) for n in (1, 7, 9, 7, 30, 20, 14, 3, 11)]
    pairs = [(context, "ab cd"[: 1 + i % 3]) for i, context in enumerate(contexts)]
    order = rng.sample(range(9), 9)
    shuffled = [contexts[i] for i in order]
    draw = {"until": [], "max_gen_toks": 3, "do_sample": True, "temperature": 0.8, "top_k": 50}
    greedy = {"until": [], "max_gen_toks": 3}
    wanted = scores(lm, *pairs)
    assert len({score for score, _ in wanted}) == 9
    assert scores(lm, *(pairs[i] for i in order)) == [wanted[i] for i in order]
    for options in (greedy, draw):
        found = answers(lm, *contexts, **options)
        assert answers(lm, *shuffled, **options) == [found[i] for i in order]
    assert len(set(answers(lm, "abc", "abc", "abc", **draw))) == 3
    small = engine_lm.EngineLM(engine_of(batch_size=2), LETTERS, MAX_LENGTH)
    np.testing.assert_allclose([x for x, _ in scores(small, *pairs)], [x for x, _ in wanted], atol=1e-5)
    assert answers(small, *shuffled, **greedy) == answers(lm, *shuffled, **greedy)


def test_which_questions_are_asked_together_does_not_depend_on_their_order():
    questions, calls = [(i % 2, [i] * (5 * i % 7), i) for i in range(11)], []

    def ask(some):
        calls.append(some)
        return [number for _, _, number in some]

    assert engine_lm.in_turn(questions, ask, 4, "numbers") == [*range(11)]
    assert [(len(some), {group for group, *_ in some}) for some in calls] == [(4, {0}), (2, {0}), (4, {1}), (1, {1})]
    assert [len(ids) for _, ids, _ in calls[0]] == [6, 5, 3, 2]
    asked = [*calls]
    calls.clear()
    assert engine_lm.in_turn(questions[::-1], ask, 4, "numbers") == [*range(11)][::-1] and calls == asked


def test_an_answer_ends_before_a_stop_whose_characters_come_one_by_one(lm):
    contexts = ["The sky", "Where is", "a"]
    whole = answers(lm, *contexts, until=[], max_gen_toks=6)
    asked = [(x, {"until": ["\n\n\n", answer[2:5]], "max_gen_toks": 6}) for x, answer in zip(contexts, whole, strict=True)]
    found = lm.generate_until(requests("generate_until", *asked))
    assert found == [answer[: answer.find(answer[2:5])] for answer in whole]
    engine = Echo(lambda prompt: LETTERS.encode(b"a bQ x").tolist())
    found = engine_lm.EngineLM(engine, LETTERS, MAX_LENGTH, stop_tokens=[383])
    assert answers(found, "x", "y", until=["Q:", "Q x"], max_new_tokens=6) == ["a b"] * 2
    assert answers(found, "x", until="Q:", max_gen_toks=4) == ["a bQ"]
    assert [(new, options["options"].stop_tokens) for _, _, new, options in engine.asked] == [(6, (383,)), (4, (383,))]


def test_a_long_prompt_loses_its_beginning_and_is_counted():
    engine = Echo(lambda prompt: [])
    lm = engine_lm.EngineLM(engine, LETTERS, 8)
    answers(lm, "abcdef", "abcde", until=[], max_gen_toks=2)
    assert [prompts for _, prompts, *_ in engine.asked] == [[[*range(6)], [382, *range(5)]]]
    engine.asked.clear()
    scores(lm, ("abcdefg", "h"), ("abcdefgh", "ij"))
    assert engine.asked[0][1:] == ([[382, *range(7)], [*range(1, 8)]], [[7], [8, 9]])
    assert lm.counts() == {"toy": {"requests": 4, "truncated": 2, "windowed": 0}}


@pytest.mark.parametrize(
    ("task", "doc"), [("niah_single_1", {}), ("my_needles", {}), ("passkey", {}), ("cwe", {"max_length": 8})]
)
def test_a_prompt_that_hides_its_answer_is_never_cut(task, doc):
    lm = engine_lm.EngineLM(Echo(lambda prompt: []), LETTERS, 8)
    assert answers(lm, "abcde", task=task, doc=doc, until=[], max_gen_toks=2) == [""]
    message = rf"{task}, document 0: a prompt of 8 tokens would lose its first 2, .*; raise max_length=8 to 10"
    with pytest.raises(ValueError, match=message):
        answers(lm, "abcdefg", task=task, doc=doc, until=[], max_gen_toks=2)
    assert lm.counts()[task]["truncated"] == 0


def test_options_that_cannot_be_kept_are_refused(engine):
    lm = engine_lm.EngineLM(Echo(lambda prompt: [0]), LETTERS, 8)
    with pytest.raises(ValueError, match="toy has 'num_beams' in its generation_kwargs, which may have only do_"):
        answers(lm, "a", until=[], max_gen_toks=2, num_beams=4)
    assert answers(lm, "a", until=[], max_gen_toks=2, num_beams=1, top_p=0.9, temperature=0.0) == ["a"]
    with pytest.raises(ValueError, match="a prompt of 2 tokens has no room beside its answer of 8; raise max_length=8 to 10"):
        answers(lm, "a", until=[], max_gen_toks=8)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1 token"):
        engine_lm.EngineLM(engine, LETTERS, 0)
    engine = Echo(lambda prompt: [])
    engine.capacity = 8
    with pytest.raises(ValueError, match="use max_length=7, or make the engine with capacity=9"):
        engine_lm.EngineLM(engine, LETTERS, 8)


CHOICES = [
    {"question": "The sky is", "choices": [" blue", " red", " a"], "answer": 2},
    {"question": "The sea is", "choices": [" deep", " ab", " blue"], "answer": 1},
    {"question": "Grass", "choices": [" is green", " z", " q"], "answer": 0},
    {"question": "Who?", "choices": [" I", " you", " we"], "answer": 0},
    {"question": "Where?", "choices": [" at", " in it", " up"], "answer": 1},
]


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder of tasks over files beside them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [{"question": "The sky", "text": "The sky is blue. " * n} for n in (1, 4)]
    kinds = {
        "toy_choice": (CHOICES, {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}),
        "toy_text": (texts, {"output_type": "loglikelihood_rolling", "doc_to_target": "text"}),
        "toy_answer": (texts, {"output_type": "generate_until", "doc_to_target": "text"}),
    }
    metrics = {"toy_choice": ["acc"], "toy_text": ["byte_perplexity", "bits_per_byte"], "toy_answer": ["exact_match"]}
    for name, (lines, task) in kinds.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        task |= {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        task |= {"test_split": "test", "doc_to_text": "" if name == "toy_text" else "{{question}}", "target_delimiter": ""}
        task["metric_list"] = [{"metric": metric} for metric in metrics[name]]
        if name == "toy_text":
            task["metric_list"] = [
                {"metric": x, "aggregation": y} for x, y in (("byte_perplexity", "weighted_perplexity"), ("bits_per_byte",) * 2)
            ]
        if name == "toy_answer":
            task["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 4}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    group = {"group": "toys", "task": ["toy_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "toys.yaml").write_text(json.dumps(group))
    return tmp_path


def test_local_tasks_of_every_kind_have_the_values_that_a_hand_finds(engine, lm, local):
    names = ["toys", "toy_text", "toy_answer"]
    found = engine_lm.evaluate(engine, LETTERS, names, max_length=MAX_LENGTH, include_path=local)
    assert json.loads(json.dumps(found)) == found
    right = 0
    for doc in CHOICES:
        given = engine.score(
            [[382, *LETTERS.encode(doc["question"].encode())]] * 3, [LETTERS.encode(x.encode()) for x in doc["choices"]]
        )
        right += int(np.argmax([x.sum() for x in given])) == doc["answer"]
    values = {(x["task"], x["metric"]): x for x in engine_lm.records(found)}
    choice = values["toy_choice", "acc"]
    assert 0 < right < 5 and choice["value"] == right / 5 and choice["stderr"] > 0
    assert choice | {"value": 0, "stderr": 0} == {
        "task": "toy_choice", "metric": "acc", "filter": "none", "value": 0, "stderr": 0, "documents": 5, "shots": 0,
        "version": "Yaml", "requests": 15, "truncated": 0, "windowed": 0,
    }  # fmt: skip
    texts = ["The sky is blue. " * n for n in (1, 4)]
    nats = -sum(lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts))))
    assert values["toy_text", "bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / sum(map(len, texts)))
    assert values["toy_text", "byte_perplexity"]["windowed"] == 1
    assert values["toy_answer", "exact_match"]["value"] == 0
    assert values["toys", "acc"]["value"] == right / 5
    stored = [{"eval": "harness", "length": MAX_LENGTH, **record} for record in values.values()]
    table = report_harness.table([report.Run("run", tuple(stored), (), {})])
    shown = {column.name for column in table.columns}
    assert {*choice} - {"stderr"} <= shown and all(len(row) == len(shown) for row in table.rows)


def test_on_a_mesh_tasks_have_the_same_values(engine, local):
    def values(engine):
        found = engine_lm.evaluate(
            engine, LETTERS, ["toys", "toy_text", "toy_answer"], max_length=MAX_LENGTH, include_path=local
        )
        return {(x["task"], x["metric"]): x["value"] for x in engine_lm.records(found)}

    alone = values(engine)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, context=2)):
        assert values(engine_of()) == pytest.approx(alone, rel=1e-5)
    assert len(alone) > 3


def test_one_process_reports_and_all_ask_the_same(local, monkeypatch):
    asked, reports = [], []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        engine = Echo(lambda prompt: [0, 1, 2])
        names = ["toy_choice", "toy_text", "toy_answer"]
        reports.append(engine_lm.evaluate(engine, LETTERS, names, max_length=MAX_LENGTH, include_path=local, limit=2))
        asked.append(engine.asked)
    assert reports[0]["n-samples"]["toy_choice"] == {"original": 5, "effective": 2} and reports[1] is None
    assert len(asked[0]) == 4 and repr(asked[0]) == repr(asked[1])


def test_what_is_not_there_is_named(local):
    def evaluate(*tasks, **options):
        engine_lm.evaluate(Echo(lambda prompt: []), LETTERS, tasks, max_length=8, include_path=local, **options)

    with pytest.raises(ValueError, match="no task is named"):
        evaluate()
    with pytest.raises(ValueError, match="limit=0 leaves no document of a task; use at least 1, or None for all"):
        evaluate("toy_choice", limit=0)
    with pytest.raises(ValueError, match=r"there is no task 'toy_choise' under .*; did you mean 'toy_choice'\?"):
        evaluate("toy_choise")
    with pytest.raises(ValueError, match="/none is no directory; name the one that holds the YAML files"):
        engine_lm.evaluate(Echo(lambda prompt: []), LETTERS, ["toy_choice"], max_length=8, include_path=local / "none")
    (local / "toy_choice.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="toy_choice.jsonl"):
        evaluate("toy_choice")


def value_of_the_key(text: str) -> str:
    """What a reader of a needle task answers."""
    key = re.search("What is the special magic [a-z]+ for (.+?) mentioned in the provided text", text)[1]
    return re.search(f"One of the special magic [a-z]+ for {re.escape(key)} is: (.+?)[.]", text)[1]


@pytest.mark.parametrize("score", [1.0, 0.0])
def test_who_reads_a_needle_scores_all_and_who_drops_a_letter_none(score, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(pytest.importorskip("nltk"), "download", lambda name: None)
    tokenizer, first = load(byte_level(), tmp_path), 0 if score else 1
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    engine = Echo(lambda prompt: tokenizer.encode(f" it is {value_of_the_key(tokenizer.decode(prompt))[first:]}.".encode()))
    tasks = ["niah_single_1", "niah_multikey_2", "niah_multikey_3"] if score else ["niah_multikey_3"]
    (own := tmp_path / "tasks").mkdir()
    for task in tasks:
        of_harness = Path(lm_eval.__file__).parent / "tasks" / "ruler" / f"{task}.yaml"
        about = {"tokenizer": str(tmp_path), "max_seq_lengths": [1024]}
        (own / f"{task}.yaml").write_text(json.dumps({"include": str(of_harness), "task": task, "metadata": about}))
    found = engine_lm.evaluate(engine, tokenizer, tasks, max_length=1024, limit=12, include_path=own)
    assert {task: found["results"][task]["1024,none"] for task in tasks} == dict.fromkeys(tasks, score)
    assert sum(len(prompts) for _, prompts, *_ in engine.asked) == 12 * len(tasks)
