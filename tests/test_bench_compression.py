"""The benchmark of compressed caches: its questions, the right answers, and its errors."""

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

CAPS, WINDOW = {"1/2": 32, "1/4": 16}, 8


@pytest.fixture(scope="module")
def tool():
    with conftest.tool("bench_compression") as module:
        yield module


class Recall:
    """Knows every pair without a compression, the pairs of even requests with snapkv, and none with another method."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, max_new_tokens, *, options, questions):
        assert max_new_tokens == 1
        compression = options.compression
        self.calls.append((prompts, questions, compression))
        answers = []
        for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
            text, (question_mark, key) = bytes(prompt[1:].tolist()).decode(), bytes(question.tolist()).decode()
            kept = compression is None or (compression.method == "snapkv" and row % 2 == 0)
            assert question_mark == "?"
            answers.append(ord(re.search(f"{key}([a-z])", text)[1]) if kept else ord("?"))
        return [SimpleNamespace(tokens=np.array([answer])) for answer in answers]


@pytest.mark.parametrize("length", [64, 65])
def test_an_answer_is_right_if_it_is_the_value_of_the_key_in_the_question(tool, length):
    engine, rows = Recall(), SyntheticSequences(Task("recall", 4), length, None)
    records = tool.accuracies(engine, rows, 10, CAPS, WINDOW)
    full, *others = [(r["method"], r["share"], r["question"], r["accuracy"]) for r in records]
    assert full == ("full", "1", "new", 1.0) and others[0] == ("full", "1", "known", 1.0)
    right = {"snapkv": 0.5, "adakv": 0.0, "streaming": 0.0, "random": 0.0}
    assert others[1:] == [(m, s, q, right[m]) for m in right for s in CAPS for q in ("new", "known")]
    for (new, questions, same), (known, again, compression) in zip(engine.calls[::2], engine.calls[1::2], strict=True):
        assert same == compression and (compression is None or compression.cap in CAPS.values())
        for text, longer, question, repeated in zip(new, known, questions, again, strict=True):
            text, longer, asked_for = (bytes(x).decode() for x in (text[1:].tolist(), longer[1:].tolist(), question.tolist()))
            assert "?" not in text and longer.replace(asked_for, "") == text and asked_for in longer[-WINDOW:]
            assert repeated is question and re.findall("[A-H][a-h]", longer) == re.findall("[A-H][a-h]", text)


@pytest.mark.slow
def test_the_table_of_a_checkpoint_has_a_line_for_each_method_and_question(tool, tmp_path, capsys):
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
    assert title == "LG; 3 sequences of 64 tokens, 4 pairs; window 8"
    assert [x.strip() for x in header.strip("|").split("|")] == ["method", "question", "1", "0.5", "1/4"]
    assert [line.split()[1] for line in lines] == [
        m for m in ("full", "snapkv", "adakv", "streaming", "random") for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares=1/x"], "--shares has '1/x', which is neither a number nor a fraction such as 1/8"),
        (["--shares=1/2,2"], "--shares has '2', which is not between 0 and 1"),
        (["--shares=1/128"], "--shares: 8 slots leave nothing beside --window=8; use larger shares"),
        (["--pairs=9"], "pairs=9 must lie between 1 and 8 for task='recall'"),
        (["--length=64", "--pairs=8", "--shares=1/2", "--checkpoint=nowhere"], "nowhere is no directory"),
        (["--length=64", "--window=7", "--shares=1/2", "--rows=0"], "flag --rows=0: 0 is not a positive integer"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(tool, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended, flagsaver.flagsaver():
        tool.main(parse(["bench_compression.py", f"--checkpoint={tmp_path}", *arguments]))
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1) and message in error
