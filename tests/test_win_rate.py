"""Answers that another model judges: distinct n-grams, scores, and which of two models wins."""

import json
import shlex
import types

import numpy as np
import pytest
from conftest import ONE_LAYER, random_params, tiny
from evaluate_program import run
from evaluated import run_of
from scipy.special import expit
from test_evaluate import planned_of

from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import report, suite, win_rate
from hybrid_attn.evals.diversity import distinct
from hybrid_attn.evals.judge import Judge, TokenizedPrompts
from hybrid_attn.evals.prompt_set import PromptSet
from hybrid_attn.evals.report import comparison, render
from hybrid_attn.evals.report import win_rate as section
from hybrid_attn.evals.report.statistics import wilson
from hybrid_attn.evals.samples import TooLongError
from hybrid_attn.evals.types import EvalContext, EvalModel, Settings, Unit
from hybrid_attn.infer import loading
from hybrid_attn.infer.engine import Engine, EngineOptions, Generated

BYTES = ByteTokenizer()
RECORDS = {"p.jsonl:1": {"prompt": "one"}, "p.jsonl:2": {"messages": [{"role": "user", "content": "two"}]}}
OPTIONS = EngineOptions(chunk=32)
UNIT, SETTINGS = Unit("win_rate", "p", 64), Settings(("win_rate",), (32, 64), 1, 100, (), 7, max_new_tokens=20)


def test_distinct_n_grams_are_those_of_each_text_over_all_of_them():
    plain, adjusted = distinct([[1, 2, 1, 2], [1, 2, 3], []], 10)
    assert plain == [3 / 7, 3 / 5, 3 / 3, 1 / 1, None]
    expected = [10**n * (1 - ((10**n - 1) / 10**n) ** count) for n, count in ((1, 7), (2, 5), (3, 3), (4, 1))]
    assert adjusted[:4] == pytest.approx([n / x for n, x in zip((3, 3, 3, 1), expected, strict=True)]) and adjusted[4] is None


def test_adjusted_for_their_number_uniform_tokens_are_as_diverse_in_long_texts_as_in_short_ones():
    texts = [np.random.default_rng(0).integers(0, 100, n).tolist() for n in (200, 20_000)]
    (short, _), (long, _) = (distinct([text], 100) for text in texts)
    assert long[0] < 0.01 < short[0] / 10 and long[1] < short[1] / 2
    for text in texts:
        assert distinct([text], 100)[1] == pytest.approx([1] * 5, abs=0.1)
    assert distinct([[1] * 50], 257_000)[1][4] == pytest.approx(1 / 46)  # of 10^27 possible ones


class Answering:
    """An engine that answers "aab" and EOS, and later prompts without an end."""

    def generate(self, prompts, max_new_tokens, options, **more):
        self.call = prompts, max_new_tokens, options, more["seeds"]
        replies = [[*b"aab", BYTES.eos] if i == 0 else [*b"aab"] for i in range(len(prompts))]
        for i, tokens in enumerate(replies):
            more["on_tokens"](i, tokens)
        return [Generated(np.array(x), np.zeros(len(x))) for x in replies]


def prompt_set(log_probs=None, check_fits=lambda max_new_tokens: None):
    known = {"hash": "w", "tokenizer": BYTES, "encode": lambda texts: [[*x.encode()] for x in texts]}
    judge = types.SimpleNamespace(log_probs=log_probs, check_fits=check_fits, **known)
    return PromptSet("p", RECORDS, judge, TokenizedPrompts([[256, *b"one"], [256, *b"user: two"]], [257, 9], 257))


def context_of(engine, of=None):
    model = tiny(ONE_LAYER).model
    return EvalContext(EvalModel(model, {}, None, None, BYTES), engine, {}, "", {}, 48, prompt_set=of or prompt_set())


def test_answers_are_sampled_as_the_settings_say_and_judged():
    engine, judged = Answering(), []

    def log_probs(texts, ended):
        judged.append((texts, ended))
        return [-1.0, -2.5]

    measured = win_rate.measure(context_of(engine, prompt_set(log_probs)), SETTINGS, UNIT, [])
    (record,), prompts = measured.records, [[256, *b"one"], [256, *b"user: two"]]
    assert judged == [(["aab", "aab"], [True, False])]
    assert engine.call[:2] == (prompts, 20) and engine.call[3] == [7, 8]
    assert engine.call[2].stop_tokens == [257, 9] and engine.call[2].sampling == win_rate.Sampling(0.5, top_p=0.75)
    assert (record["log_prob"], record["log_probs"], record["tokens"]) == (-1.75, [-1.0, -2.5], 3)
    assert record["answers"] == ["aab", "aab"] and record["prompt_ends"] == ["one", "two"]
    assert record["distinct"] == [2 / 6, 2 / 4, 1 / 2, None, None]
    win_rate.measure(context_of(engine, prompt_set(log_probs)), SETTINGS._replace(temperature=0.0, top_p=None), UNIT, [])
    assert engine.call[2].sampling == win_rate.Sampling()
    with pytest.raises(FloatingPointError, match="the judge's log-probability of an answer is nan"):
        win_rate.measure(context_of(engine, prompt_set(lambda *_: [float("nan")] * 2)), SETTINGS, UNIT, [])


def test_prompts_and_answers_fit_the_longest_length_which_is_measured_alone():
    context = context_of(None)
    assert win_rate.EVALUATION.units(context, SETTINGS) == [UNIT]
    assert win_rate.EVALUATION.units(context._replace(prompt_set=None), SETTINGS) == []
    assert win_rate.check_fits(context, SETTINGS, UNIT) is None
    said = "win_rate of p: 10 tokens of p.jsonl:2 and 60 new ones do not fit into 64; give larger --lengths or a smaller"
    with pytest.raises(TooLongError, match=said):
        win_rate.check_fits(context, SETTINGS._replace(max_new_tokens=60), UNIT)
    numbers = []
    win_rate.check_fits(context_of(None, prompt_set(check_fits=numbers.append)), SETTINGS, UNIT)
    assert numbers == [20]


def test_a_judge_reads_no_more_than_a_sequence_of_its_training(models, one_device):
    judge = Judge(f"{models}/one", RECORDS, OPTIONS)
    longest = len([256, *b"user:\ntwo\n\nassistant:\n"])
    assert judge.check_fits(judge.trained - longest) is None
    said = f"{longest} tokens of p.jsonl:2 and {judge.trained - longest + 1} of an answer do not fit into the {judge.trained}"
    with pytest.raises(TooLongError, match=said):
        judge.check_fits(judge.trained - longest + 1)
    with pytest.raises(TooLongError, match="4 tokens of p.jsonl:1 and 100 of an answer do not fit into the 48 tokens of a"):
        judge.log_probs(["a" * 100, "b"], [False, False])


def test_a_judge_with_another_template_is_another_one(models, one_device, monkeypatch):
    one, again, other = (Judge(f"{models}/{name}", RECORDS, OPTIONS) for name in ("one", "one", "two"))
    assert one.hash == again.hash != other.hash
    template = loading.chat_template(one.directory, one.step)
    monkeypatch.setattr(loading, "chat_template", lambda *_: template + " ")
    edited = Judge(f"{models}/one", RECORDS, OPTIONS)
    assert edited.weights == one.weights and edited.hash != one.hash
    assert edited.described()["chat_template"] != one.described()["chat_template"]
    texts = {where: x for where, x in RECORDS.items() if "prompt" in x}
    assert Judge(f"{models}/one", texts, OPTIONS).described()["chat_template"] is None


def test_an_error_about_prompts_names_the_checkpoint_that_cannot_read_them(models, one_device, monkeypatch):
    monkeypatch.setattr(loading, "chat_template", lambda *_: None)
    with pytest.raises(
        ValueError, match=r"the checkpoint of step 7 in .*/one/checkpoints does not read .*: p.jsonl:2: there is no"
    ):
        Judge(f"{models}/one", RECORDS, OPTIONS)


def test_the_judge_has_the_options_of_the_engines(models, one_device):
    engine = Judge(f"{models}/one", RECORDS, EngineOptions(chunk=32, batch_size=3))._engine
    assert (engine.chunk, engine.batch_size) == (32, 3)


def test_the_judge_scores_the_tokens_of_an_answer_and_its_end(models, one_device):
    judge, c = Judge(f"{models}/one", RECORDS, OPTIONS), tiny(ONE_LAYER)
    judge._engine = engine = Engine(random_params(c.model), c, OPTIONS)
    prompts = [[256, *b"one"], [256, *b"user:\ntwo\n\nassistant:\n"]]
    for texts, ended, scored in (
        (["ab", "c"], [True, False], [[*b"ab", 257], [*b"c"]]),
        (["", "c"], [False, True], [[257], [*b"c", 257]]),
    ):
        expected = [x.mean() for x in engine.score(prompts, scored)]
        assert judge.log_probs(texts, ended) == pytest.approx(expected, rel=1e-6)
    assert judge.described()["step"] == 7 and len(judge.weights) == 64


def record_of(log_probs, **changes):
    return {
        "eval": "win_rate",
        "source": "p",
        "length": 64,
        "prompts_hash": "a",
        "judge": "w",
        "log_probs": log_probs,
    } | changes


def test_a_model_wins_where_its_answer_is_likelier_and_a_tie_is_half_a_win():
    a, b = [-2.0] * 12, [-1.0] * 9 + [-3.0, -2.0, -2.0]
    runs = [run_of(name, (), [record_of(x)]) for name, x in (("a", a), ("b", b))]
    ((record, log_probs),) = section.pairs(*runs)
    row = dict(zip([x.name for x in section.WINS], section._row(*runs, record, log_probs), strict=True))
    assert (row["run"], row["against"], row["prompts"], row["wins"], row["ties"]) == ("b", "a", 12, 9, 2)
    assert row["win rate"] == 10 / 12 and row["mean P(win)"] == pytest.approx(np.mean(expit(np.subtract(b, a))))
    assert (row["95% from"], row["to"]) == wilson(10, 12) and row["P from"] < row["mean P(win)"] < row["P to"]
    (difference,) = comparison.compare_wins(*runs)
    assert (difference.task, difference.pairs, difference.verdict) == ("win rate on p", 12, "better")
    assert difference.difference == pytest.approx(10 / 12 - 2 / 12)
    low, high = wilson(10, 12)  # the interval of the table
    assert (difference.low, difference.high) == pytest.approx((2 * low - 1, 2 * high - 1))
    said = f"better on win rate on p at 64 (wins 83% ({100 * low:.0f} to {100 * high:.0f}) of n = 12 prompts). Of 1 comparisons"
    assert said in comparison.sentence("a", "b", [difference])
    certain = section._row(*runs, record, np.array([[-9.0, -1.0], [-9.0, 0.0], [-9.0, -8.0]]))
    assert 0 <= certain[-2] < certain[-3] < certain[-1] == 1
    for changes in ({"prompts_hash": "b"}, {"judge": "v"}, {"log_probs": b[1:]}):
        assert not [*section.pairs(runs[0], run_of("b", (), [record_of(b) | changes]))]


def test_a_judge_is_the_same_however_its_path_is_written(evaluate, models, tmp_path, monkeypatch):
    planned = planned_of(evaluate, monkeypatch)
    monkeypatch.chdir(models)
    monkeypatch.setenv("HOME", str(models))
    (models / "p.jsonl").write_text('{"prompt": "one"}\n')
    flags = ["--checkpoint=one", "--suite=win_rate", "--lengths=64", "--max_new_tokens=4", "--temperature=0"]
    for judge, prompts in (("two", "p.jsonl"), ("~/two", "~/p.jsonl"), (f"{models}/two", f"{models}/p.jsonl")):
        run(evaluate, *flags, f"--out={tmp_path}", f"--judge={judge}", f"--prompts={prompts}", trust=())
    assert len(planned) == 3
    contexts, wanted, known = zip(*planned, strict=True)
    assert known[0] == known[1] == known[2] and wanted[0] == wanted[1] == wanted[2]
    assert known[0]["judge"]["tokenizer"] == BYTES.hash and known[0]["chat_template"] is None
    command = render.command([report.Run("one", (), (), suite.described(wanted[0], known[0]))], "win_rate")
    assert f"--judge={models}/two" in command
    run(evaluate, *shlex.split(command)[2:-1], f"--out={tmp_path}/again", trust=())
    assert (planned[-1][1], planned[-1][2]) == (wanted[0], known[0])


@pytest.mark.slow  # compiles the answers of two models and their scores
def test_checkpoints_are_judged_on_a_file_of_prompts(evaluate, models, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(x) + "\n" for x in RECORDS.values()))
    flags = ["--suite=win_rate", f"--prompts={tmp_path}/p.jsonl", f"--judge={models}/one", "--lengths=64", "--max_new_tokens=4"]
    run(evaluate, *(f"--checkpoint={models}/{x}" for x in ("one", "two")), *flags, f"--out={tmp_path}/out", trust=())
    assert "two against one: " in capsys.readouterr().out
    about, report = (json.loads((tmp_path / "out" / x).read_text()) for x in ("one/run.json", "results.json"))
    assert about["judge"]["step"] == 7 and about["settings"]["temperature"] == 0.5 and about["data"]["judge"] == f"{models}/one"
    assert {len(x["records"][0]["answers"]) for x in report["runs"].values()} == {2}
    assert report["tables"]["win_rate"][0]["prompts"] == 2 and len(report["tables"]["diversity"]) == 10
