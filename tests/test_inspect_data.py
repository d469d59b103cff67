"""tools/inspect_data.py prints what a store and a step contain."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver
from conftest import tool

from hybrid_attn.data import documents, prepare
from hybrid_attn.data.sources import Fields
from hybrid_attn.programs import parse

ROOT = Path(__file__).parents[1]


def run(*arguments, program="inspect_data"):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "tools" / f"{program}.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def shown(monkeypatch, capsys):
    """Runs a program of tools/ in this process and returns its exit status, stdout and stderr."""
    monkeypatch.chdir(ROOT)

    def call(*arguments, program="inspect_data"):
        status = 0
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments])
        with tool(program) as module, flagsaver.flagsaver():
            try:
                module.main(parse(sys.argv))
            except SystemExit as end:
                status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def made(tmp_path):
    texts = ["a short one", "東京" * 50, "begin" + "x" * 5000 + "end"]
    lines = [json.dumps({"text": text, "from": f"label {i % 2}"}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    options = prepare.Options("bytes", Fields("text", "from"), None, "text", False, "stop", 10**6)
    prepare.prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "store"), options, 1)
    return tmp_path / "store"


def test_a_store_is_summarised_verified_and_read(made, shown):
    done = run(str(made), "--verify", "--document=2", "--characters=9")
    assert done.returncode == 0, done.stderr
    for line in (
        "documents    3, of 5,319 bytes", "tokens       5,325, 0.999 bytes each, BOS and EOS included",
        "label        label 0: 2 documents, 5,023 tokens (94.3%), 0.999 bytes each",
        "verified     all files have the checksums of the manifest",
        "verified     all ids are in the vocabulary, and all documents go from BOS to EOS", "beginxxxx [...] xxxxxxend",
    ):  # fmt: skip
        assert line in done.stdout.splitlines(), line
    assert "document     2: label label 0, 5,010 tokens, hash " in done.stdout
    assert "東京" * 50 in shown(str(made), "--document=1")[1]
    assert "東京東 [...] 東京\n" not in (cut := shown(str(made), "--document=1", "--characters=3")[1])
    assert "東京東 [...] 京東京\n" in cut


def test_the_loss_mask_of_a_store_and_of_a_document_is_summed_up(tmp_path, capsys):
    pieces = [{"text": "question", "loss": False}, {"text": "answer", "loss": True}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("x" * 10, pieces)))
    options = prepare.Options("bytes", Fields("text", None, "loss"), None, "text", False, "stop", 10**6)
    prepare.prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "store"), options, 1)
    with tool("inspect_data") as module, flagsaver.flagsaver():
        module.main(parse(["inspect_data.py", str(tmp_path / "store"), "--verify", "--document=1"]))
    shown = capsys.readouterr().out.splitlines()
    assert "loss mask    19 tokens are trained on (67.9%)" in shown and "loss mask    7 tokens are trained on (43.8%)" in shown
    assert "verified     all values of the loss masks are 0 or 1" in shown


def test_what_is_trained_on_is_marked_or_on_a_terminal_coloured(tmp_path, shown, monkeypatch):
    pieces = [{"text": "quéstion\n\x1b", "loss": False}, {"text": "one\ntwo", "loss": True}, {"text": "end", "loss": False}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": pieces}))
    options = prepare.Options("bytes", Fields("text", None, "loss"), None, "text", False, "stop", 10**6)
    prepare.prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "store"), options, 1)
    said = shown(str(tmp_path / "store"), "--document=0")[1]
    assert said.endswith("trained on   between ⟦ and ⟧\n<|bos|>quéstion\n\\x1b⟦one⟧\n⟦two⟧end<|eos|>\n")
    clipped = shown(str(tmp_path / "store"), "--document=0", "--characters=11")[1]
    assert clipped.endswith("\n<|bos|>qués [...] ⟦o⟧end<|eos|>\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said = shown(str(tmp_path / "store"), "--document=0")[1]
    assert said.endswith("trained on   in green\n<|bos|>quéstion\n\\x1b\x1b[32mone\x1b[0m\n\x1b[32mtwo\x1b[0mend<|eos|>\n")


def test_pairs_are_shown_beside_each_other_in_a_store_and_in_a_step(tmp_path, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "36")
    records = [{"prompt": f"{i}?", "chosen": f"東 it is {i}", "rejected": f"\tno, I do not say {i}\nbye"} for i in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    flags = ["--format=preference", f"--input={tmp_path}/in.jsonl", f"--out={tmp_path}/store", "--workers=1"]
    assert shown(*flags, program="prepare_data")[0] == 0
    for number in (6, 7):
        said = shown(str(tmp_path / "store"), f"--document={number}")[1].splitlines()
        assert "pairs        20, chosen before rejected" in said and "template     a chat template of 654 characters" in said
        assert any(x.startswith("document     6: chosen, label text, 15 tokens, ") for x in said)
        assert any(x.startswith("document     7: rejected, label text, 27 tokens, ") for x in said)
        assert said[-4:] == [
            "trained on   between ⟦ and ⟧",
            "<|bos|>3?⟦東 it i⟧ | <|bos|>3?⟦ no, I ⟧",
            "⟦s 3<|eos|>⟧       | ⟦do not say 3⟧",
            "                   | ⟦bye<|eos|>⟧",
        ]
    paths = [f"--config.data.sources.text.store={tmp_path}/store", "--config.data.holdout=0.2"]
    sizes = ["--config.stages[0].seq_len=90", "--config.stages[0].batch=2"]
    status, said, error = shown("--config=configs/base.py", *paths, *sizes)
    assert status == 0, error
    lines = said.splitlines()
    assert lines[2:4] == [
        "--- chosen document 1, tokens 0 to 16, from its beginning, to its end",
        "--- rejected document 2, tokens 17 to 45, from its beginning, to its end",
    ]
    assert all("?⟦東 it" in x and "?⟦ no, I" in x for x in lines if "<|bos|>" in x) and said.count("⟦bye<|eos|>⟧") == 4


def test_wrong_input_is_an_error_of_one_line(made, monkeypatch, capsys):
    def wrong(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *arguments])
        with tool("inspect_data") as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            module.main(parse(sys.argv))
        assert ended.value.code == 2
        return capsys.readouterr().err

    monkeypatch.chdir(ROOT)
    for arguments, message in [
        (["nowhere"], "error: nowhere is not a token store"),
        ([str(made), "--document=3"], "error: --document=3: the store has 3 documents, numbered from 0"),
        ([], "error: pass a STORE, with --verify or --document, or a --config with --stage and --step"),
        ([str(made), "--step=3"], "error: pass a STORE"),
        ([str(made), "--document=0", "--tokenizer=none.json"], "error: the tokenizer 'none.json' is not a file; use 'bytes'"),
        (["--config=configs/hybrid_8k.py", "--verify"], "error: pass a STORE"),
        (["--config=configs/none.py"], "error: --config=configs/none.py: no such file"),
        (["--config=configs/base.py", "--config.data.sorces=1"], "error: unknown key config.data.sorces; did you mean"),
        (["--config=configs/hybrid_8k.py", "--stage=2"], "error: --stage=2 --step=0: the stages have 300 steps, both are"),
    ]:
        error = wrong(*arguments)
        assert error.startswith(message) and error.count("\n") == 1, error
    manifest = json.loads((made / "manifest.json").read_text())
    for summary in ({}, {"documents": "3"}, manifest["summary"] | {"lengths": {}}, manifest["summary"] | {"tokens": 0}):
        (made / "manifest.json").write_text(json.dumps(manifest | {"summary": summary}))
        error = wrong(str(made))
        assert error.startswith("error: the summary in the manifest is damaged: ") and error.count("\n") == 1
    (made / "manifest.json").write_text(json.dumps(manifest))
    path = made / "shard-00000.tokens"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    assert "error: " + f"{made}: the checksum of shard-00000.tokens differs" in wrong(str(made), "--verify")


def test_escape_characters_of_a_store_are_shown_by_their_numbers(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "one\ntwo\x1b]0;x\x07\u202e", "from": "label\x1b[2J\ndocuments 9"}))
    options = prepare.Options("bytes", Fields("text", "from"), None, "text", False, "stop", 10**6)
    prepare.prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "store"), options, 1)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    (tmp_path / "store/manifest.json").write_text(json.dumps(manifest | {"tokenizer": "bytes\x9b2J"}))
    capsys.readouterr()
    with tool("inspect_data") as module, flagsaver.flagsaver():
        module.main(parse(["inspect_data.py", str(tmp_path / "store"), "--document=0", "--tokenizer=bytes"]))
        shown = capsys.readouterr().out
        with pytest.raises(SystemExit):
            module.main(parse(["inspect_data.py", "no\x1b[2J"]))
    shown += capsys.readouterr().err
    for line in (
        "tokenizer    bytes\\x9b2J, hash bytes", "label        label\\x1b[2J documents 9: 1 documents, ",
        "document     0: label label\\x1b[2J documents 9, ", "one\ntwo\\x1b]0;x\\x07\\u202e\n",
        "error: no\\x1b[2J is not a token store",
    ):  # fmt: skip
        assert f"\n{line}" in shown, line
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


def test_the_batch_of_a_step_is_decoded_with_its_documents_apart(tmp_path, shown):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>" + "abcdefgh"[i] * 40)
    heldout = next(str(i) for i in itertools.count() if documents.content_hash(str(i).encode()) < 0.001 * 2**64)
    (tmp_path / "heldout.txt").write_text(heldout)
    paths = f'--config.data.sources.text.paths=("{tmp_path}/*.txt",)'
    sizes = ["--config.data.holdout=0.001", "--config.stages[0].seq_len=100", "--config.stages[0].batch=2"]
    status, said, error = shown("--config=configs/base.py", paths, *sizes, "--step=0")
    assert status == 0, error
    sequences = [line for line in said.splitlines() if line.startswith("sequence ")]
    assert [x.split(", ")[1] for x in sequences] == ["number 0 of text: 100 tokens", "number 1 of text: 100 tokens"]
    assert said.count(", from its beginning, ") == 4 and said.count("to its end\n") == 4
    assert said.count("cut at the end of the sequence") == said.count("from the middle") == 1
    assert sequences[1].endswith(" trained targets, 20 of padding") and all(f"<{i}>" in said for i in range(4))
    ramp = ["--config.stages[0].batch=4", "--config.stages[0].batch_ramp=2", "--config.stages[0].batch_ramp_tokens=150"]
    status, other, error = shown("--config=configs/base.py", paths, *sizes[:2], *ramp, "--step=1")
    assert status == 0, error
    assert [line.split()[3] for line in other.splitlines() if line.startswith("sequence ")] == ["2", "3", "4", "5"]


def test_prepare_prints_its_summary_and_its_errors_in_a_line(tmp_path, shown):
    (tmp_path / "a.txt").write_text("four")
    flags = [f"--input={tmp_path}/a.txt", f"--out={tmp_path}/store", "--label=mine", "--workers=1"]
    done = run(*flags, program="prepare_data")
    assert done.returncode == 0 and "label        mine: 1 documents, 6 tokens (100.0%)" in done.stdout
    assert shown(str(tmp_path / "store"))[1].splitlines()[2:] == done.stdout.splitlines()
    for changed, message in [
        (["--label=other"], "was begun with label='mine', and now it is 'other'"),
        ([f"--input={tmp_path}/none*"], "matches no file"),
        (["stray"], "'stray' is no flag: flags begin with --, and text with spaces is quoted"),
    ]:
        status, _, error = shown(*flags, *changed, program="prepare_data")
        assert status == 2 and message in error and error.count("\n") == 1, error
