import gzip
import hashlib
import json
import os
import sysconfig

import numpy as np
import pytest
from test_sources import FORMATS

from hybrid_attn.data import documents, prepare, store
from hybrid_attn.data.sources import Fields
from hybrid_attn.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


class Letters:
    """Reads text as a tokenizer.json does, with more ids than 16 bits hold."""

    vocab_size, bos, eos = 70_000, 69_998, 69_999

    def encode(self, text):
        return np.array([ord(x) for x in text.decode("utf-8")], np.int32)


def data(*paths, holdout=0.3):
    return tuple(map(str, paths)), holdout


def load(settings, tokenizer, heldout):
    paths, holdout = settings
    return documents.load(paths, tokenizer).split(holdout, heldout)


def write(root, names, text="text of {}"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.format(name))


def split(*paths, holdout=0.3):
    """Texts of the training and of the held-out documents."""
    loaded = [load(data(*paths, holdout=holdout), BYTES, heldout) for heldout in (False, True)]
    return tuple(sorted(BYTES.decode(x) for x in part.read(all_spans(part))) for part in loaded)


def all_spans(part):
    return [(i, 0, n) for i, n in enumerate(part.lengths)]


def test_each_file_is_one_document_between_bos_and_eos(tmp_path):
    texts = [bytes(range(i, 5 * i + 1)) for i in range(10, 40)]
    for i, text in enumerate(texts, 10):
        (tmp_path / f"{i}.txt").write_bytes(text)
    read = []
    for heldout in (False, True):
        loaded = load(data(tmp_path / "*.txt"), BYTES, heldout)
        assert loaded.dtype == np.uint16 and loaded.lengths.dtype == np.int64 and loaded.hashes.dtype == np.uint64
        assert loaded.labels.tolist() == [0] * len(loaded) and loaded.label_names == ("text",)
        for tokens, content in zip(loaded.read(all_spans(loaded)), loaded.hashes, strict=True):
            text = bytes(tokens[1:-1].astype(np.uint8))
            assert tokens.tolist() == [256, *text, 257] and tokens.dtype == np.uint16
            assert content == int(hashlib.sha256(text).hexdigest()[:16], 16)
            read.append(text)
    assert sorted(read) == texts


def test_ids_of_a_large_vocabulary_are_stored_in_four_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("a東🙂"[:2])
    loaded = load(data(tmp_path / "a.txt", holdout=1e-9), Letters(), heldout=False)
    assert loaded.dtype == np.uint32
    assert loaded.read([(0, 0, 4)])[0].tolist() == [69_998, ord("a"), ord("東"), 69_999]


def test_spans_are_read_in_the_requested_order_and_within_their_document():
    tokens = [np.arange(10 * i, 10 * i + n, dtype=np.uint16) for i, n in enumerate([3, 7, 5])]
    corpus = documents.in_memory(tokens, [5, 6, 7])
    read = corpus.read([(2, 1, 4), (0, 0, 3), (1, 7, 7), (2, 0, 1)])
    assert [x.tolist() for x in read] == [[21, 22, 23], [0, 1, 2], [], [20]]
    for span in [(0, 0, 4), (0, 2, 1), (1, -1, 2)]:
        with pytest.raises(AssertionError, match=f"document {span[0]} has "):
            corpus.read([span])


def test_a_selection_of_a_selection_reads_the_documents_it_shows():
    tokens = [np.full(n, n, np.uint16) for n in (4, 2, 9, 3, 7)]
    corpus = documents.in_memory(tokens, range(5))
    chosen = corpus.select(corpus.lengths > 2).select(np.array([False, True, True, False]))
    assert chosen.lengths.tolist() == [9, 3] and chosen.hashes.tolist() == [2, 3] and len(chosen) == 2
    assert [x.tolist() for x in chosen.read([(1, 0, 2), (0, 8, 9)])] == [[3, 3], [9]]
    assert chosen.read([(0, 0, 9)])[0].base is tokens[2]


def test_splits_are_disjoint_complete_and_of_the_requested_share(tmp_path):
    names = [f"{i}.txt" for i in range(400)]
    write(tmp_path, names)
    train, heldout = split(tmp_path / "*.txt")
    assert sorted(train + heldout) == sorted(map("text of {}".format, names))
    assert 80 < len(heldout) < 160


def test_texts_keep_their_split_under_other_names_and_beside_others(tmp_path):
    write(tmp_path / "here", names := [f"{i}.txt" for i in range(40)])
    before = split(tmp_path / "here/*.txt")
    for name in names:
        (tmp_path / "here" / name).rename(tmp_path / f"here/moved_{name}")
    write(tmp_path / "here", ["new.txt", "0/other.txt"])
    after = split(tmp_path / "here/**/*.txt")
    assert before == tuple([x for x in part if not x.endswith(("new.txt", "other.txt"))] for part in after)


def test_copies_of_a_text_are_in_the_same_split(tmp_path):
    write(tmp_path, [f"{i}.txt" for i in range(60)], text="one of two")
    (tmp_path / "other.txt").write_text("two")
    assert sorted(map(len, split(tmp_path / "*.txt", holdout=0.55))) == [1, 60]


def test_a_larger_holdout_only_adds_documents(tmp_path):
    write(tmp_path, [f"{i}.txt" for i in range(60)])
    assert set(split(tmp_path / "*.txt", holdout=0.2)[1]) < set(split(tmp_path / "*.txt", holdout=0.5)[1])


def test_a_file_that_two_patterns_match_is_one_document(tmp_path):
    write(tmp_path, ["a/1.txt", "b/2.txt"])
    os.symlink(tmp_path / "a/1.txt", tmp_path / "b/3.txt")
    paths = documents.find((str(tmp_path / "a/*"), str(tmp_path / "**/*.txt")))
    assert paths == [str(tmp_path / name) for name in ("a/1.txt", "b/2.txt")]


def test_empty_files_and_folders_are_no_documents(tmp_path):
    write(tmp_path, ["full.txt", "folder/inner.txt"])
    (tmp_path / "empty.txt").touch()
    assert len(documents.load((str(tmp_path / "*"),), BYTES)) == 1
    assert len(documents.load((str(tmp_path / "**"),), BYTES)) == len(documents.load((str(tmp_path),), BYTES)) == 2


def test_the_standard_library_is_the_default():
    root = sysconfig.get_path("stdlib")
    named = {os.path.relpath(path, root): path for path in documents.find(())}
    assert list(named) == sorted(named) and len(named) > 500
    assert {"ast.py", "json/decoder.py"} <= set(named)
    assert not [name for name in named if not name.endswith(".py")]
    assert not [name for name in named if {"site-packages", "__pycache__"} & set(name.split("/"))]
    assert named["json/decoder.py"] == __import__("json").decoder.__file__


def test_invalid_utf8_is_read_as_bytes_and_is_an_error_for_a_text_tokenizer(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    settings = data(tmp_path / "latin.txt", holdout=1e-9)
    assert load(settings, BYTES, heldout=False).read([(0, 0, 6)])[0].tolist() == [256, *b"caf\xe9", 257]
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 at byte 3, .*use data.tokenizer='bytes'"):
        load(settings, Letters(), heldout=False)


@pytest.mark.parametrize("name", [*FORMATS, "x.txt.gz", "crlf.jsonl", "marked.jsonl"])
def test_files_are_decoded_as_they_are_for_a_store(tmp_path, name):
    record = json.dumps({"text": "東京\r\n"}).encode()
    others = {
        "x.txt.gz": gzip.compress(b"packed", mtime=0),
        "crlf.jsonl": record + b"\r\n\r\n" + record + b"\r\n",
        "marked.jsonl": b"\xef\xbb\xbf" + record,
    }
    FORMATS[name](tmp_path / name) if name in FORMATS else (tmp_path / name).write_bytes(others[name])
    options = prepare.Options("bytes", Fields("text", None), None, "text", False, "stop", None)
    prepare.prepare([str(tmp_path / name)], str(tmp_path / "store"), options, 1)
    stored, loaded = store.load(str(tmp_path / "store")), documents.load((f"{tmp_path}/{name[0]}*.*",), BYTES)
    assert [x.tolist() for x in loaded.read(all_spans(loaded))] == [x.tolist() for x in stored.read(all_spans(stored))]
    assert loaded.hashes.tolist() == stored.hashes.tolist() and len(loaded) > 0
    assert loaded.fingerprint() == documents.load((str(tmp_path / name),) * 2, BYTES).fingerprint()


def test_a_directory_is_read_as_it_is_for_a_store(tmp_path):
    write(tmp_path, ["b.txt", "a/1.txt", ".git/config"])
    (tmp_path / "c.jsonl").write_text('{"text": "record"}\n')
    loaded = documents.load((str(tmp_path),), BYTES)
    assert [BYTES.decode(x) for x in loaded.read(all_spans(loaded))] == ["text of a/1.txt", "text of b.txt", "record"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "x.jsonl.gz: its compression is damaged: "),
    ("x.txt.gz", b"no gzip", "x.txt.gz: its compression is damaged: "),
    ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2: not JSON: "),
    ("x.jsonl", b'{"body": "a"}\n', "x.jsonl, line 1: there is no field 'text': .*prepare_data.py, which has --text_field"),
    ("x.json", b'{"text": "a"}\n{"text": "b"}\n', "x.json: it holds JSON records"),
    ("x.txt", "東".encode("utf-16"), "x.txt: binary or UTF-16, not UTF-8 text; repair the file, leave it out of paths"),
    ("x.png", b"\x89PNG\r\n\x1a\n\0\0", "x.png: binary or UTF-16"),
    ("x.parquet", b"PAR1 no more", "x.parquet: not Parquet: "),
    ("x.txt.gz", gzip.compress(b"", mtime=0), "matches 1 files and all are empty; name files with text"),
    ("x.jsonl", b'{"text": ""}\n\n{"text": null}\n', "matches 1 files and all are empty"),
])  # fmt: skip
def test_a_file_that_is_not_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents.load((f"{tmp_path}/*",), BYTES)


def test_paths_that_give_no_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"none\*.txt' matches no file; the working directory is "):
        documents.find((str(tmp_path / "none*.txt"),))
    with pytest.raises(ValueError, match=r"missing.txt' matches no file"):
        documents.find((str(tmp_path / "missing.txt"),))
    with pytest.raises(ValueError, match="matches 1 files and all are empty"):
        documents.load((str(tmp_path / "*.txt"),), BYTES)
