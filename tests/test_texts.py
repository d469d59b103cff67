"""Text to hide needles in is of all its sources, as far as it is needed."""

import numpy as np

from hybrid_attn.data.documents import in_memory
from hybrid_attn.data.tokenizer import Bytes
from hybrid_attn.evals import texts


def source(*documents: str):
    tokens = [np.frombuffer(text.encode(), np.uint8) for text in documents]
    return in_memory(tokens, range(len(tokens)))


def test_every_source_gives_the_same_share_of_its_first_documents(monkeypatch):
    several = [source("one, ", "two, and three"), source("four"), source("five, ", "six")]
    assert texts.of_documents(several, Bytes()) == "one, \ntwo, and three\nfour\nfive, \nsix"
    monkeypatch.setattr(texts, "CHARACTERS", 27)
    assert texts.of_documents(several, Bytes()) == "one, \ntwo,\nfour\nfive, \nsix"
    assert texts.of_documents(several[:1], Bytes()) == "one, \ntwo, and three"


def test_files_are_read_in_their_order_until_there_is_enough(tmp_path, monkeypatch):
    for name, text in (("b", "two, and three"), ("a", "one, "), ("c", "never")):
        (tmp_path / name).write_text(text)
    patterns = (f"{tmp_path}/*",)
    assert texts.of_files(patterns) == "one, \ntwo, and three\nnever"
    monkeypatch.setattr(texts, "CHARACTERS", 9)
    assert texts.of_files(patterns) == "one, \ntwo,"
