import os

import numpy as np
import pytest

from hybrid_attn import config
from hybrid_attn.data import documents, tokenizer

BYTES = tokenizer.load("bytes")


class Letters:
    """Reads text as a tokenizer.json does, with more ids than 16 bits hold."""

    vocab_size, bos, eos = 70_000, 69_998, 69_999

    def encode(self, text):
        return np.array([ord(x) for x in text.decode("utf-8")], np.int32)


def data(*paths, holdout=0.3):
    return config.Data(tuple(map(str, paths)), "bytes", holdout, seed=0, prefetch=1)


def write(root, names, text="text of {}"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.format(name))


def texts_of(loaded):
    """The text of each document, without its marks."""
    return [bytes(ids[1:-1].tolist()).decode() for ids in loaded.read((i, 0, n) for i, n in enumerate(loaded.lengths))]


def split(*paths, holdout=0.3):
    """Texts of the training and of the held-out documents."""
    return tuple(set(texts_of(documents.load(data(*paths, holdout=holdout), BYTES, heldout))) for heldout in (False, True))


def test_each_file_is_one_document_between_its_marks_in_the_order_of_names(tmp_path):
    texts = {f"{i}.txt": bytes(range(i, 5 * i + 1)) for i in range(1, 30)}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    found = []
    for heldout in (False, True):
        loaded = documents.load(data(tmp_path / "*.txt"), BYTES, heldout)
        assert loaded.dtype == np.uint16 and loaded.lengths.dtype == np.int64 and loaded.hashes.dtype == np.uint64
        read = loaded.read((i, 0, n) for i, n in enumerate(loaded.lengths))
        wanted = [text for _, text in sorted(texts.items()) if text in [bytes(ids[1:-1].tolist()) for ids in read]]
        assert [ids.tolist() for ids in read] == [[256, *text, 257] for text in wanted]
        assert loaded.hashes.tolist() == [documents.content_hash(text) for text in wanted]
        found += wanted
    assert sorted(found) == sorted(texts.values())


def test_spans_of_documents_are_read_and_a_selection_counts_its_own(tmp_path):
    write(tmp_path, [f"{i}.txt" for i in range(5)])
    loaded = documents.load(data(tmp_path / "*.txt", holdout=1e-9), BYTES, heldout=False)
    chosen = loaded.select(np.array([True, False, True, True, False])).select(np.array([False, True, True]))
    assert len(chosen) == 2 and chosen.hashes.tolist() == loaded.hashes[2:4].tolist()
    first, second = chosen.read([(1, 1, 5), (0, 10, 12)])
    assert first.tolist() == list(b"text") and second.tolist() == list(b".t")
    assert texts_of(chosen) == ["text of 2.txt", "text of 3.txt"]


def test_copies_of_a_document_are_on_the_same_side_of_the_split(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i % 20}")
    train, heldout = (documents.load(data(tmp_path / "*.txt"), BYTES, side) for side in (False, True))
    assert len(train) + len(heldout) == 60 and not set(train.hashes.tolist()) & set(heldout.hashes.tolist())
    assert len(heldout) == 3 * len(set(heldout.hashes.tolist())) > 0


def test_a_large_vocabulary_is_stored_whole(tmp_path):
    (tmp_path / "a.txt").write_text("a東🙂"[:2])
    loaded = documents.load(data(tmp_path / "a.txt", holdout=1e-9), Letters(), heldout=False)
    assert loaded.dtype == np.uint32
    assert loaded.read([(0, 0, 4)])[0].tolist() == [69_998, ord("a"), ord("東"), 69_999]


def test_splits_are_disjoint_complete_and_of_the_share_asked_for(tmp_path):
    names = [f"{i}.txt" for i in range(400)]
    write(tmp_path, names)
    train, heldout = split(tmp_path / "*.txt")
    assert train | heldout == {f"text of {name}" for name in names} and not train & heldout
    assert 80 < len(heldout) < 160


def test_files_keep_their_split_when_others_are_added_and_the_folder_moves(tmp_path, monkeypatch):
    names = [f"{folder}/{i}.txt" for folder in "ab" for i in range(20)]
    write(tmp_path / "here", names)
    write(tmp_path / "there", names + ["a/new.txt", "0/new.txt"])
    before = split(tmp_path / "here/**/*.txt")
    after = split(tmp_path / "there/**/*.txt")
    assert before == tuple(part - {"text of a/new.txt", "text of 0/new.txt"} for part in after)
    monkeypatch.chdir(tmp_path / "here")
    assert split("**/*.txt") == before


def test_a_larger_holdout_only_adds_documents(tmp_path):
    write(tmp_path, [f"{i}.txt" for i in range(60)])
    assert split(tmp_path / "*.txt", holdout=0.2)[1] < split(tmp_path / "*.txt", holdout=0.5)[1]


def test_a_file_found_twice_is_one_document(tmp_path):
    write(tmp_path, ["a/1.txt", "b/2.txt"])
    os.symlink(tmp_path / "a/1.txt", tmp_path / "b/3.txt")
    found = documents.find((str(tmp_path / "a/*"), str(tmp_path / "**/*.txt")))
    assert [name for name, _ in found] == ["1.txt", "b/2.txt"]


def test_empty_files_and_folders_are_no_documents(tmp_path):
    write(tmp_path, ["full.txt", "folder/inner.txt"])
    (tmp_path / "empty.txt").touch()
    assert [name for name, _ in documents.find((str(tmp_path / "*"),))] == ["full.txt"]
    assert [name for name, _ in documents.find((str(tmp_path / "**"),))] == ["folder/inner.txt", "full.txt"]


def test_the_standard_library_is_the_default():
    found = dict(documents.find(()))
    assert list(found) == sorted(found) and len(found) > 500
    assert {"ast.py", "json/decoder.py"} <= set(found)
    assert not [name for name in found if not name.endswith(".py")]
    assert not [name for name in found if {"site-packages", "__pycache__"} & set(name.split("/"))]
    assert found["json/decoder.py"] == __import__("json").decoder.__file__


def test_bytes_read_what_is_not_utf8_and_text_tokenizers_name_it(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    settings = data(tmp_path / "latin.txt", holdout=1e-9)
    assert documents.load(settings, BYTES, heldout=False).read([(0, 0, 6)])[0].tolist() == [256, *b"caf\xe9", 257]
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 at byte 3, .*use data.tokenizer='bytes'"):
        documents.load(settings, Letters(), heldout=False)


def test_paths_that_give_no_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"none\*.txt' matches no file, seen from "):
        documents.find((str(tmp_path / "none*.txt"),))
    with pytest.raises(ValueError, match=r"missing.txt' matches no file"):
        documents.find((str(tmp_path / "missing.txt"),))
    with pytest.raises(ValueError, match=rf"is a directory; use '{tmp_path}/\*\*' for all its files"):
        documents.find((str(tmp_path),))
    with pytest.raises(ValueError, match="matches 1 files and all are empty"):
        documents.find((str(tmp_path / "*.txt"),))


def test_a_split_without_documents_is_refused(tmp_path):
    write(tmp_path, ["only.txt"])
    with pytest.raises(ValueError, match="leaves none of the 1 documents to the held-out split; raise data.holdout"):
        documents.load(data(tmp_path / "*.txt", holdout=1e-9), BYTES, heldout=True)
    with pytest.raises(ValueError, match="leaves none of the 1 documents to the training split; lower data.holdout"):
        documents.load(data(tmp_path / "*.txt", holdout=1 - 1e-9), BYTES, heldout=False)
