"""A trained tokenizer depends on its text alone, decodes every text exactly, and fits the data pipeline and the configs."""

import gzip
import json

import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import tool

from hybrid_attn.data import tokenizer as tokenizers
from hybrid_attn.data.tokenizer import check_vocab, load_tokenizer
from hybrid_attn.programs import parse

pytest.importorskip("tokenizers")


@pytest.fixture
def corpus(tmp_path):
    """Text files, and the same documents as the records of one file."""
    documents = [f"naïve 東京 number {i}: def f(x):\n    return x + {i}  # 🙂\n" * 3 for i in range(30)]
    for i, text in enumerate(documents):
        (tmp_path / f"{i:02}.txt").write_text(text)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    return tmp_path


def run(*arguments):
    """The exit code of the program, in this process."""
    with tool("train_tokenizer") as module, flagsaver.flagsaver():
        try:
            module.main(parse(["train_tokenizer.py", *arguments]))
        except SystemExit as ended:
            return ended.code
    return 0


def test_the_same_documents_give_the_same_file_that_encodes_every_text_and_knows_its_ends(corpus, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    assert run("--vocab_size=300", f"--input={corpus}/*.txt", "--out=a.json") == 0
    assert "a.json: 300 ids, from 30 documents of" in capsys.readouterr().out
    assert run("--vocab_size=300", f"--input={corpus}/all.jsonl", "--text_field=body", "--out=b.json") == 0
    assert (corpus / "a.json").read_bytes() == (corpus / "b.json").read_bytes()
    trained = load_tokenizer("a.json")
    for text in ("return x + 東京\r\n", "\u0000 ünseen 🜚 </s> <s>", "".join(map(chr, range(1, 400)))):
        ids = trained.encode(text.encode())
        assert trained.decode(ids) == text and trained.byte_lengths[ids].sum() == len(text.encode())
    assert trained.vocab_size == 300 and {trained.bos, trained.eos} == {0, 1}
    assert len(trained.encode(b"    return x + 7")) < 8
    assert not np.isin([trained.bos, trained.eos], trained.encode(b"<s></s>")).any()


def test_a_text_with_fewer_pairs_gives_fewer_ids_and_the_output_names_the_model_size(corpus, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    assert run("--vocab_size=65536", f"--input={corpus}/*.txt") == 0
    out = capsys.readouterr().out
    size = load_tokenizer("tokenizer.json").vocab_size
    assert 258 < size < 1000 and f"{size} ids" in out and "65,536 ids need more text" in out
    vocab_size = int(out.split("--config.model.vocab_size=")[1])
    check_vocab(load_tokenizer("tokenizer.json"), vocab_size, "tokenizer.json")
    with pytest.raises(ValueError, match=f"wastes memory on the {size} ids"):
        check_vocab(load_tokenizer("tokenizer.json"), 65_536, "tokenizer.json")


def test_a_long_text_is_counted_in_one_piece(monkeypatch):
    text = "one two three\n" * 50
    short = tokenizers.train([text], 270).to_str()
    monkeypatch.setattr(tokenizers, "PIECE", 20)
    assert tokenizers.train([text], 270).to_str() == short


def test_a_wrong_input_is_an_error_of_one_line_and_leaves_no_file(corpus, capsys, monkeypatch):
    monkeypatch.chdir(corpus)
    (corpus / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (corpus / "binary.dat").write_bytes(b"\0\1\2" * 50)
    (corpus / "empty.log").write_text("")
    (corpus / "long.txt.gz").write_bytes(gzip.compress(b"a" * (10**8 + 8193), 1))
    (corpus / "taken.json").write_text("{}")
    for arguments, message in [
        (["--vocab_size=257"], "257"),
        ([], "vocab_size"),
        (["--vocab_size=300", "--input=nowhere/*"], "matches no file"),
        (["--vocab_size=300", "--input=broken.jsonl"], "broken.jsonl, line 2"),
        (["--vocab_size=300", "--input=binary.dat"], "binary or UTF-16, not UTF-8 text; repair or split the file, or"),
        (["--vocab_size=300", "--input=long.txt.gz"], "long.txt.gz: decompressed, it has more than the 100,000,000 bytes"),
        (["--vocab_size=300", "--input=empty.log"], "no text in empty.log"),
        (["--vocab_size=300", "--input=00.txt", "--out=taken.json"], "taken.json exists"),
        (["--vocab_size=300", "--input=00.txt", "--out="], "--out= is empty; name a new file"),
    ]:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
        assert "--max_document_mb" not in error  # which this program does not have
    assert (corpus / "taken.json").read_text() == "{}" and not (corpus / "tokenizer.json").exists()
