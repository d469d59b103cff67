"""The suite measures what is asked, each unit once, whoever interrupts it; and every model gets the same questions."""

import dataclasses
import hashlib
import json
import re
import types

import numpy as np
import pytest
from test_ruler import LISTS

from hybrid_attn.data.synthetic import Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import keytokens, replies, report, samples, suite
from hybrid_attn.evals.ruler import compat, draws
from hybrid_attn.evals.ruler.qa import Item, Questions
from hybrid_attn.evals.table import EVALS
from hybrid_attn.evals.types import RECALL, EvalContext, EvalModel, Settings, Unit
from hybrid_attn.infer.engine import Generated

TEXT = " ".join(f"Sentence number {i} says little." for i in range(400))
SETTINGS = Settings(("needle", "ruler"), (2048,), 2, 100, (0.0, 50.0), 3)
ABOUT = {"model": {"layers": "LG", "parameters": 5, "seq_len": 2048}, "step": 1, "revision": "now"}


class Engine:
    """Finds the numbers of the key that is asked for, as often as `patience` lets it; knows nothing else."""

    def __init__(self, patience=10**6):
        self.patience, self.prompts = patience, []

    def generate(self, ids, most, *, on_tokens, options, **_):
        self.stops = options.stop_tokens
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt
        found = []
        for row, prompt in enumerate(ids):
            text = bytes(prompt[1:]).decode()
            self.prompts.append(text)
            asked = re.search(r"special magic number(?:s)? for (\S+) mentioned", text)
            values = re.findall(rf"for {asked[1]} is: (\d+)\.", text) if asked else []
            tokens = list(", ".join(values).encode())[:most] or [ByteTokenizer.eos]
            on_tokens(row, tokens)
            found.append(Generated(np.array(tokens), np.zeros(len(tokens))))
        return found


def context_of(engine, text=TEXT):
    return EvalContext(EvalModel(None, None, None, None, ByteTokenizer()), engine, {}, text, {}, 2048)


def run(tmp_path, engine, settings=SETTINGS, name="one", **changes):
    heard, context = [], context_of(engine)
    settings = suite.fitting(settings, context, tmp_path / "samples", lengths_are_fixed=True)
    suite.measure_units(
        context, settings, ABOUT | changes, tmp_path / name, tmp_path / "samples",
        lambda unit, number, of: heard.append((unit.name, number, of)),
    )  # fmt: skip
    return heard


def test_every_unit_is_measured_by_different_questions_and_its_answers_are_kept(tmp_path):
    engine = Engine()
    heard = run(tmp_path, engine)
    assert [number for _, number, _ in heard] == list(range(1, 14)) and {of for *_, of in heard} == {13}
    found = report.read(tmp_path / "one")
    cells = [(r["needles"], r["depth"], r["answers"], r["right"]) for r in found.of("needle")]
    assert cells == [(1, 0.0, 2, 2), (1, 50.0, 2, 2), (4, 0.0, 8, 8), (4, 50.0, 8, 8)]
    scores = {r["task"]: (r["score"], r["samples"], r["nulls"]) for r in found.of("ruler")}
    assert scores["niah_single_1"] == (100.0, 2, 0) and scores["vt"] == (0.0, 2, 2)
    assert "qa_1" not in scores and len(scores) == 11
    assert len(found.answers) == 2 * 4 + 11 * 2
    for answer in found.answers:
        assert (answer["score"] == 1) == all(value in answer["given"] for value in answer["wanted"])
    hashes = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in engine.prompts]
    assert sorted(answer["prompt_hash"] for answer in found.answers) == sorted(hashes) and len(set(hashes)) == 30
    assert {answer["index"] for answer in found.answers} == {0, 1}
    assert found.provenance["settings"]["samples"] == 2 and found.provenance["step"] == 1


def test_who_was_interrupted_goes_on_with_what_is_not_done(tmp_path):
    straight, first, second = Engine(), Engine(patience=3), Engine()
    run(tmp_path, straight, name="straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    assert not (tmp_path / "one/records.jsonl").exists() and len(list((tmp_path / "one/units").iterdir())) == 3
    heard = run(tmp_path, second)
    assert len(heard) == 13 and first.prompts + second.prompts == straight.prompts
    for name in ("records.jsonl", "answers.jsonl"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "straight" / name).read_text()
    assert run(tmp_path, Engine(patience=0)) == heard
    path = tmp_path / "one/units/needle-1-2048.json"
    path.write_text(path.read_text()[:300])  # as a machine leaves it that loses its power
    third = Engine()
    assert run(tmp_path, third) == heard and len(third.prompts) == 4  # two depths, two samples
    assert (tmp_path / "one/answers.jsonl").read_text() == (tmp_path / "straight/answers.jsonl").read_text()


SPOILT = {
    "a number": "5",
    "null": "null",
    "a list": "[]",
    "cut short": '{"records": [',
    "no UTF-8": b"\xff\xfe{}",
    "deep": "[" * 100_000,
    "no records": '{"records": 5, "answers": []}',
    "another length": '{"records": [{"eval": "needle", "needles": 1, "length": "../../x"}], "answers": []}',
    "another unit": '{"records": [{"eval": "ruler", "task": "../x", "length": 2048}], "answers": []}',
    "other answers": '{"records": [], "answers": [{"task": "<script>", "length": 2048}]}',
}


@pytest.mark.parametrize("content", SPOILT.values(), ids=SPOILT)
def test_a_unit_whose_file_holds_anything_else_is_measured_again(tmp_path, content):
    settings = SETTINGS._replace(evals=("needle",))
    run(tmp_path, Engine(), settings)
    path = tmp_path / "one/units/needle-1-2048.json"
    before = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    engine = Engine()
    run(tmp_path, engine, settings)
    assert path.read_bytes() == before and len(engine.prompts) == 4  # two depths, two samples


@pytest.mark.parametrize("content", ["5", "null", "{", "[" * 100_000, '{"revision": 5}', "{}"])
def test_a_run_json_that_says_something_else_is_named(tmp_path, content):
    settings = SETTINGS._replace(evals=("needle",))
    run(tmp_path, Engine(), settings)
    (tmp_path / "one/run.json").write_text(content)
    with pytest.raises(ValueError, match="one/run.json .*remove it, or use another directory"):
        run(tmp_path, Engine(), settings)


def test_samples_of_another_unit_are_refused(tmp_path):
    settings = SETTINGS._replace(evals=("needle",))
    run(tmp_path, Engine(), settings)
    (path,) = (tmp_path / "samples").glob("needle-1-2048-*.jsonl")
    asked, _ = samples.read(path)
    for changes in ({"length": 4096}, {"task": "../x"}, {"meta": {"depth": "../x"}}):
        samples.write(path, [dataclasses.replace(asked[0], **changes)])
        with pytest.raises(ValueError, match="holds other samples than those of needle-1-2048; remove the file"):
            run(tmp_path, Engine(), settings, name="two")


@pytest.mark.parametrize("part", ["../../x", "/etc/x", "a b", "\x00\x1b[2J", "..", "100%"])
def test_the_file_of_a_unit_lies_in_its_folder_whatever_its_part_is_called(part, tmp_path):
    unit = Unit("position", part, 32)
    path = tmp_path / "units" / f"{unit.name}.json"
    assert path.parent == tmp_path / "units" and path.resolve().parent == (tmp_path / "units").resolve()
    assert unit.name.isprintable() and len({unit.name, Unit("position", "100%25", 32).name}) == 2


def test_what_a_model_computes_that_is_not_finite_ends_the_suite_with_the_name_of_the_unit(tmp_path):
    engine = Engine()

    def generate(*_, **__):
        raise FloatingPointError("the logits are nan")

    engine.generate = generate
    with pytest.raises(FloatingPointError, match="^needle-1-2048: the logits are nan$"):
        run(tmp_path, engine, SETTINGS._replace(evals=("needle",)))
    assert not (tmp_path / "one/units").exists()


def test_an_answer_has_the_room_of_its_own_question_whatever_is_asked_beside_it():
    one = samples.Sample("niah_single_1", 2048, 0, "special magic number for x mentioned for x is: 1234567.", ("1",), 4, "", {})
    asked = [one, dataclasses.replace(one, max_new_tokens=6), one]
    found = EVALS["ruler"].measure(context_of(Engine()), SETTINGS, Unit("ruler", "niah_single_1", 2048), asked)
    assert [answer["given"] for answer in found.answers] == ["1234", "123456", "1234"]


def test_a_directory_of_another_evaluation_is_refused_with_what_differs(tmp_path):
    run(tmp_path, Engine())
    with pytest.raises(
        ValueError, match=r"one holds another evaluation \(there -> wanted\):\n  settings.seed: 3 -> 4\nuse another"
    ):
        run(tmp_path, Engine(), SETTINGS._replace(seed=4))
    with pytest.raises(ValueError, match="  step: 1 -> 2\n"):
        run(tmp_path, Engine(), step=2)


def test_all_samples_are_drawn_before_anything_is_asked(tmp_path):
    engine = Engine()
    with pytest.raises(ValueError, match="sample 0 of vt does not fit into 1,024 tokens"):
        run(tmp_path, engine, SETTINGS._replace(lengths=(2048, 1024)))
    assert not engine.prompts and not (tmp_path / "one").exists()


def test_evaluations_are_known_by_name():
    assert suite.names_of("quick") == suite.suites()["quick"] and set(suite.names_of("full")) == set(EVALS)
    assert suite.names_of("ruler, needle") == ("ruler", "needle")
    assert suite.names_of("quick,key_tokens,needle") == (*suite.suites()["quick"], "key_tokens")
    with pytest.raises(ValueError, match="names '', which is not one of 'quick', 'full', 'position'"):
        suite.names_of("position,")
    with pytest.raises(ValueError, match="names 'needel', which .*; did you mean 'needle'"):
        suite.names_of("position,needel")


def test_rows_of_a_task_are_left_out_where_they_are_too_short():
    model, way = types.SimpleNamespace(num_kv_heads=1), types.SimpleNamespace(zigzag=False, context={})
    eval_model = EvalModel(model, None, way, types.SimpleNamespace(shape={"context": 1, "tensor": 1}), ByteTokenizer())
    context, settings = context_of(None)._replace(eval_model=eval_model), SETTINGS._replace(evals=("recall",), lengths=(16, 64))
    fitted = suite.fitting(settings, context, None, False)
    assert [x.part for x in fitted.absent] == ["recall", "mqar", "tracking"]
    names = [unit.name for unit in suite.units(fitted, context)]
    assert names == ["recall-copy-16", *(f"recall-{task}-64" for task in RECALL)]
    with pytest.raises(ValueError, match="recall of recall: its shortest sequence has 26 tokens, and 16 are asked for"):
        suite.fitting(settings, context, None, True)
    with pytest.raises(ValueError, match="nothing to measure at lengths 2"):
        nothing = suite.fitting(settings._replace(lengths=(2,)), context, None, False)
        suite.measure_units(context, nothing, {}, None, None, None)


def test_tasks_in_bytes_are_not_asked_of_other_tokenizers_and_no_task_of_the_harness_is_no_secret():
    eval_model = EvalModel(None, None, None, None, types.SimpleNamespace(hash="json"))
    settings = SETTINGS._replace(evals=("recall", "harness", "position"), lengths=(64, 128))
    fitted = suite.fitting(settings, context_of(None)._replace(eval_model=eval_model, heldout={}), None, True)
    assert [x[:3] for x in fitted.absent] == [
        (name, part, length)
        for name, part in (("recall", "tasks"), ("harness", "tasks"), ("position", "documents"))
        for length in (64, 128)
    ]
    assert "in bytes" in fitted.absent[0].reason and suite.units(fitted, context_of(None)._replace(eval_model=eval_model)) == []


def test_questions_may_have_lengths_of_their_own():
    settings = SETTINGS._replace(evals=("recall", "needle"), lengths=(64, 128), engine_lengths=(2048,))
    found = {(unit.eval, unit.length) for unit in suite.units(settings, context_of(None))}
    assert found == {("recall", 64), ("recall", 128), ("needle", 2048)}
    written = suite.described(settings, {})["settings"]
    fields = SETTINGS._fields[: SETTINGS._fields.index("engine_lengths")]
    assert written["asked"] == [2048] and [*written] == [*fields, "asked"]  # as in the files of earlier runs
    judged = suite.described(settings._replace(evals=("win_rate",)), {})["settings"]
    assert [*judged] == [*fields, "max_new_tokens", "temperature", "top_p", "asked"]


def test_an_answer_ends_where_its_model_says_so(tmp_path):
    engine, unit = Engine(), Unit("needle", "1", 2048)
    context = context_of(engine)._replace(stops=(7, ByteTokenizer.eos))
    EVALS["needle"].measure(context, SETTINGS, unit, list(EVALS["needle"].questions.draw(context, SETTINGS, unit)))
    assert engine.stops == [7, ByteTokenizer.eos]


def test_samples_differ_with_what_they_follow_from_and_not_with_the_model(tmp_path):
    run(tmp_path, Engine(), name="one")
    files = sorted((tmp_path / "samples").glob("*.jsonl"))
    run(tmp_path, Engine(), name="two")
    assert sorted((tmp_path / "samples").glob("*.jsonl")) == files and len(files) == 13
    run(tmp_path, Engine(), SETTINGS._replace(seed=4), name="three")
    assert len(list((tmp_path / "samples").glob("*.jsonl"))) == 26
    assert json.loads((tmp_path / "two/run.json").read_text())["settings"]["seed"] == 3
    context, needles = context_of(None), SETTINGS._replace(evals=("needle",))
    tokenizer = ByteTokenizer()
    tokenizer.hash = "other"
    changed = [(context, needles._replace(samples=1)), (context, needles._replace(depths=(50.0, 0.0)))]
    changed += [(context._replace(haystack=TEXT.replace("little", "much")), needles)]
    changed += [(context._replace(eval_model=context.eval_model._replace(tokenizer=tokenizer)), needles)]
    for number, (like, settings) in enumerate(changed, 14):
        suite.fitting(settings, like, tmp_path / "samples", lengths_are_fixed=True)
        assert len(list((tmp_path / "samples").glob("*.jsonl"))) == 2 * number


def test_a_further_model_is_not_asked_other_questions_under_the_same_name(tmp_path):
    run(tmp_path, Engine(), name="one")
    first, *_ = report.read(tmp_path / "one").answers
    (path,) = (tmp_path / "samples").glob("needle-1-2048-*.jsonl")
    assert first["samples_hash"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(path.read_text().replace("Sentence", "Word"))
    for name in ("one", "two"):  # whose answers are there, and who is still to be asked
        with pytest.raises(ValueError, match="was changed after it was written"):
            run(tmp_path, Engine(), name=name)
    path.with_suffix(".sha256").unlink()
    with pytest.raises(ValueError, match="jsonl has lost the hash beside it; remove the file"):
        run(tmp_path, Engine(), name="two")


def plan(tmp_path, settings, lengths_are_fixed=False):
    context = context_of(None)._replace(lists=LISTS, essays=TEXT)
    return context, suite.fitting(settings, context, tmp_path / "samples", lengths_are_fixed)


RULER = SETTINGS._replace(evals=("ruler",), lengths=(4096,))


def test_rulers_own_prompts_are_asked_and_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "sent_tokenize", lambda: draws.sentences)
    plan(tmp_path, RULER)
    ours = {*(tmp_path / "samples").glob("*.jsonl")}
    context, own = plan(tmp_path, RULER._replace(compat=True))
    assert len(ours) == 10 and len({*(tmp_path / "samples").glob("*.jsonl")} - ours) == 9  # of cwe, ours does not fit either
    assert [(x.part, "script would try for ever" in x.reason) for x in own.absent] == [
        *(("qa_1", False), ("qa_2", False), ("vt", True), ("cwe", True))
    ]
    engine = Engine()
    for patience in (10**6, 0):  # the second time, all is done
        engine.patience = patience
        suite.measure_units(
            context._replace(engine=engine), own, ABOUT, tmp_path / "own", tmp_path / "samples", lambda *_: None
        )
    found = report.read(tmp_path / "own")
    assert found.compat and found.provenance["settings"]["absent"] == [list(x) for x in own.absent]
    asked = [x for unit in suite.units(own, context) for x in EVALS["ruler"].questions.draw(context, own, unit)]
    assert sorted(engine.prompts) == sorted(x.prompt for x in asked) and len(asked) == 18
    with pytest.raises(samples.TooLongError, match="the example of vt does not fit into 500 tokens as RULER asks it"):
        plan(tmp_path, RULER._replace(compat=True), lengths_are_fixed=True)


def test_the_text_of_rulers_own_prompts_is_that_of_its_essays_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "sent_tokenize", lambda: draws.sentences)
    context = context_of(None)._replace(lists=LISTS)
    own = RULER._replace(compat=True, ruler_tasks=("niah_single_2", "fwe"))
    without = suite.fitting(own, context, tmp_path / "samples", False)
    assert [(x.part, "needs the text of RULER's essays" in x.reason) for x in without.absent] == [("niah_single_2", True)]
    essays = "Another text stands here. " * 999
    suite.fitting(own, context._replace(essays=essays), tmp_path / "samples", True)
    (path,) = (tmp_path / "samples").glob("ruler-niah_single_2-*.jsonl")
    asked, _ = samples.read(path)
    wanted = compat.generate("niah_single_2", 4096, 2, own.seed, ByteTokenizer(), LISTS, essays, {}, draws.sentences)
    assert asked == wanted and "little" not in asked[0].prompt


def test_of_ruler_those_tasks_are_asked_that_are_chosen(tmp_path):
    found = plan(tmp_path, RULER._replace(ruler_tasks=("vt", "qa_1", "cwe")))[1]
    assert [x.part for x in found.absent] == ["qa_1", "cwe"]
    names = [unit.name for unit in suite.units(found, context_of(None))]
    assert names == ["ruler-vt-4096"]


def test_prose_is_left_out_of_rulers_own_prompts_where_nltk_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "sent_tokenize", lambda: None)
    _, own = plan(tmp_path, RULER._replace(compat=True))
    assert {x.part for x in own.absent if "nltk" in x.reason} == {*compat.ESSAYS}
    assert not any("nltk" in x.reason for x in plan(tmp_path, RULER)[1].absent)


def test_samples_of_questions_follow_from_their_file(tmp_path):
    context = context_of(None)
    place = "Ada works at the mill."
    for answer in ("mill", "forge"):
        asked = Questions((Item("Where does Ada work?", (answer,), (0,), ()),) * 2, (place, "Bo works at the forge."))
        suite.fitting(RULER, context._replace(questions={"qa_1": asked}), tmp_path / "samples", False)
    assert len(list((tmp_path / "samples").glob("ruler-qa_1-4096-*.jsonl"))) == 2


def test_rows_that_a_mesh_does_not_split_are_refused():
    mesh = types.SimpleNamespace(shape={"context": 2, "tensor": 1})
    kinds = {"G": types.SimpleNamespace(mixer="attention", share_kv=False)}
    way = types.SimpleNamespace(zigzag=True, context={"G": "ulysses"})
    model = types.SimpleNamespace(num_heads=6, num_kv_heads=2, kinds=kinds)
    eval_model = EvalModel(model, None, way, mesh, ByteTokenizer())
    context = context_of(None)._replace(eval_model=eval_model)
    settings = SETTINGS._replace(evals=("recall",), lengths=(64, 66))
    with pytest.raises(ValueError, match="recall of recall: length 66 does not split over 2 context shards of 2 parts each"):
        suite.fitting(settings, context, None, True)
    wide = eval_model._replace(model=types.SimpleNamespace(num_heads=6, num_kv_heads=3, kinds=kinds))
    with pytest.raises(ValueError, match="ulysses splits the 3 key/value heads"):
        suite.fitting(settings._replace(lengths=(64,)), context._replace(eval_model=wide), None, True)


def test_models_of_tasks_have_their_attention_measured_and_no_loss_of_text():
    eval_model = EvalModel(
        None, None, types.SimpleNamespace(zigzag=False), types.SimpleNamespace(shape={"context": 1}), ByteTokenizer()
    )
    heldout = {"probe": Task("recall", 4), "again": Task("copy", 1)}
    context = context_of(None)._replace(eval_model=eval_model, heldout=heldout)
    settings = SETTINGS._replace(evals=("position", "attention_mass"), lengths=(16, 64))
    found = suite.fitting(settings, context, None, False)
    assert suite.units(found, context) == [("attention_mass", "probe", 64)]
    assert [x[:3] for x in found.absent] == [
        *(("position", "documents", 16), ("position", "documents", 64), ("attention_mass", "probe", 16))
    ]  # fmt: skip


def test_the_short_context_of_key_tokens_is_half_of_what_training_had(monkeypatch):
    monkeypatch.setattr(keytokens, "records_of", lambda eval_model, spec, short: [{"length": spec.length, "short": short}])
    context = context_of(None)._replace(heldout={"text": None}, trained=64)
    found = [EVALS["key_tokens"].measure(context, SETTINGS, Unit("key_tokens", "text", n), []) for n in (32, 64, 4096)]
    assert [x.records[0]["short"] for x in found] == [16, 32, 32]


def test_rulers_lengths_are_without_the_mark_that_begins_a_document():
    full, unit = samples.Sample("fwe", 400, 0, "x" * 350, ("7",), 50, "", {}), Unit("ruler", "fwe", 400)
    own = RULER._replace(compat=True)
    assert EVALS["ruler"].measure(context_of(Engine()), own, unit, [full]).records[0]["samples"] == 1
    for settings, prompt in ((RULER, "x" * 350), (own, "x" * 351)):
        with pytest.raises(ValueError, match="sample 0 of fwe does not fit into 400 tokens"):
            EVALS["ruler"].measure(context_of(Engine()), settings, unit, [dataclasses.replace(full, prompt=prompt)])


def test_an_answer_counts_in_part_and_one_of_blanks_is_none(monkeypatch):
    given = ["8 and 7", " \n\x07\t", "7", "none"]
    monkeypatch.setattr(replies, "answers", lambda *_, **__: [types.SimpleNamespace(text=text) for text in given])
    for unit, task in ((Unit("needle", "4", 400), "needle_4"), (Unit("ruler", "vt", 400), "vt")):
        asked = [samples.Sample(task, 400, i, "x", ("6", "7", "8", "9"), 50, "", {"depth": 0.0}) for i in range(len(given))]
        measured = EVALS[unit.eval].measure(context_of(None), SETTINGS, unit, asked)
        assert [answer["score"] for answer in measured.answers] == [0.5, 0, 0.25, 0]
    assert measured.records == [{"task": "vt", "length": 400, "samples": 4, "score": 18.75, "nulls": 1}]
