"""Text to hide needles in is of all its sources, as far as it is needed."""

import json

import numpy as np
import pytest

from hybrid_attn.data.documents import in_memory
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import haystack


def source(*documents: str):
    tokens = [np.frombuffer(text.encode(), np.uint8) for text in documents]
    return in_memory(tokens, range(len(tokens)))


def test_every_source_gives_the_same_share_of_its_first_documents(monkeypatch):
    several = [source("one, ", "two, and three"), source("four"), source("five, ", "six")]
    assert haystack.of_documents(several, ByteTokenizer()) == "one, \ntwo, and three\nfour\nfive, \nsix"
    monkeypatch.setattr(haystack, "CHARACTERS", 27)
    assert haystack.of_documents(several, ByteTokenizer()) == "one, \ntwo,\nfour\nfive, \nsix"
    assert haystack.of_documents(several[:1], ByteTokenizer()) == "one, \ntwo, and three"


def test_files_are_read_in_their_order_until_there_is_enough(tmp_path, monkeypatch):
    for name, text in (("b", "two, and three"), ("a", "one, "), ("c", "never")):
        (tmp_path / name).write_text(text)
    (tmp_path / "aa").touch()
    patterns = (f"{tmp_path}/*",)
    assert haystack.of_files(patterns) == haystack.of_files((str(tmp_path),)) == "one, \ntwo, and three\nnever"
    monkeypatch.setattr(haystack, "CHARACTERS", 9)
    assert haystack.of_files(patterns) == "one, \ntwo,"


def test_rulers_essays_are_its_files_with_nothing_between_or_the_one_that_its_script_makes_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(haystack, "CHARACTERS", 5)
    for name, text in (("repo/b.txt", "Two.\n"), ("repo/a.txt", "One"), ("html/a.txt", "three")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode())
    whole = "OneTwo.\nthree"
    assert haystack.of_essays((f"{tmp_path}/repo/*.txt", f"{tmp_path}/html/*.txt")) == whole
    (path := tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": whole}))
    assert haystack.of_essays((str(path),)) == whole and haystack.of_files((str(path),)) == whole[:5]
    for other in ('{"a": 1}', '{"text": 7}', '"text"', path.read_text()[:-2], "[" * 100_000):
        path.write_text(other)
        with pytest.raises(
            ValueError, match='Essays.json is no JSON object with a text "text", as RULER makes it; copy it again'
        ):
            haystack.of_essays((str(path),))
        assert haystack.of_files((str(path),)) == other[:5]  # JSON that is a text like others


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.gz", "a.parquet", "a.txt.zst"])
def test_files_that_are_no_plain_text_are_refused(tmp_path, name):
    (tmp_path / name).write_text("some")
    for read in (haystack.of_files, haystack.of_essays):
        with pytest.raises(ValueError, match=f"{name} is packed or has records; name files of plain text"):
            read((str(tmp_path / name),))


@pytest.mark.parametrize("content", [b"%PDF-1.7 text", b"a text \0" * 9_000, b"x" * 9_000 + b"\0"])
def test_binary_files_are_no_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    for read in (haystack.of_files, haystack.of_essays):
        with pytest.raises(ValueError, match="a.txt is no text"):
            read((str(tmp_path / "a.txt"),))
