"""The tool that asks compressed caches: its questions, what counts as right, and what it refuses."""

import json
import re
from types import SimpleNamespace

import conftest
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import mesh_of, random_params, tiny

from hybrid_attn import checkpoint, config
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.programs import parse

KEPT, WINDOW = {"1/2": 32, "1/4": 16}, 8


@pytest.fixture(scope="module")
def tool():
    with conftest.tool("bench_compression") as module:
        yield module


class Reader:
    """Knows every pair that it keeps: all of them without a compression, those of even rows with snapkv, none with others."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, most, *, compression, questions):
        assert most == 1
        self.asked.append((prompts, questions, compression))
        answers = []
        for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
            text, (mark, key) = bytes(prompt[1:].tolist()).decode(), bytes(question.tolist()).decode()
            kept = compression is None or (compression.method == "snapkv" and row % 2 == 0)
            assert mark == "?"
            answers.append(ord(re.search(f"{key}([a-z])", text)[1]) if kept else ord("?"))
        return [SimpleNamespace(tokens=np.array([answer])) for answer in answers]


@pytest.mark.parametrize("length", [64, 65])
def test_an_answer_is_right_when_it_is_the_value_of_the_key_that_was_asked_for(tool, length):
    engine, rows = Reader(), SyntheticSequences(Task("recall", 4), length, None)
    records = tool.accuracies(engine, rows, 10, KEPT, WINDOW)
    whole, *others = [(r["method"], r["share"], r["question"], r["accuracy"]) for r in records]
    assert whole == ("full", "1", "new", 1.0) and others[0] == ("full", "1", "foretold", 1.0)
    right = {"snapkv": 0.5, "adakv": 0.0, "streaming": 0.0, "random": 0.0}
    assert others[1:] == [(m, s, q, right[m]) for m in right for s in KEPT for q in ("new", "foretold")]
    for (new, questions, same), (foretold, again, compression) in zip(engine.asked[::2], engine.asked[1::2], strict=True):
        assert same == compression and (compression is None or compression.cap in KEPT.values())
        for text, longer, question, repeated in zip(new, foretold, questions, again, strict=True):
            text, longer, asked = (bytes(x).decode() for x in (text[1:].tolist(), longer[1:].tolist(), question.tolist()))
            assert "?" not in text and longer.replace(asked, "") == text and asked in longer[-WINDOW:]
            assert repeated is question and re.findall("[A-H][a-h]", longer) == re.findall("[A-H][a-h]", text)


@pytest.mark.slow
def test_a_checkpoint_is_asked_and_its_table_has_a_line_for_each_method_and_question(tool, tmp_path, capsys):
    c = tiny({"model.num_kv_heads": 4})
    with jax.set_mesh(mesh_of()):
        checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
        state = {"params": random_params(c.model)}
        checkpoints.save(1, state, {"stage_steps": [1], "stage": {"tokenizer": "bytes"}}, config.to_dict(c))
        checkpoints.close()
    out = tmp_path / "out.json"
    with flagsaver.flagsaver():
        sizes = [f"--checkpoint={tmp_path}", "--length=64", "--rows=3", "--shares=0.5,1/4", f"--json={out}"]
        tool.main(parse(["bench_compression.py", *sizes]))
    records = json.loads(out.read_text())
    assert len(records) == 2 + 4 * 2 * 2 and {round(3 * r["accuracy"], 6) for r in records} <= {0, 1, 2, 3}
    title, header, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "LG; 3 rows of 64 tokens, 4 pairs; window 8"
    assert [x.strip() for x in header.strip("|").split("|")] == ["method", "question", "1", "0.5", "1/4"]
    assert [line.split()[1] for line in lines] == [
        m for m in ("full", "snapkv", "adakv", "streaming", "random") for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shares=1/x"], "--shares has '1/x', which is no number and no fraction such as 1/8"),
        (["--shares=1/2,2"], "--shares has '2', which does not lie between 0 and 1"),
        (["--shares=1/128"], "--shares: 8 slots leave nothing beside --window=8; use larger shares"),
        (["--pairs=9"], "pairs=9 must lie between 1 and 8 for task='recall'"),
        (["--length=64", "--pairs=8", "--shares=1/2", "--checkpoint=nowhere"], "nowhere is no directory"),
        (["--length=64", "--window=7", "--shares=1/2", "--rows=0"], "flag --rows=0: 0 is not a positive integer"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(tool, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended, flagsaver.flagsaver():
        tool.main(parse(["bench_compression.py", f"--checkpoint={tmp_path}", *arguments]))
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1) and said in error
